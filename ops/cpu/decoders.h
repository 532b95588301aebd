// The block formats, each written once in terms of `Simd` and so compiled once per instruction set.
//
// A decoder turns one block into vectors of f32 and hands each to `emit(offset, vector)`, where `offset`
// is the position in the block of the vector's first element. Decoding to memory, the dot products and the
// matrix products all are such an `emit`. Every value is bit for bit ggml's: products here are exact in
// f32 (at most 11 bits of a half times 12 of scale and quant), so that fusing them changes nothing.
//
// Included after a simd_*.h, inside the namespace of its instruction set. The layouts are those of ggml's
// block formats; `b` points at one block, unaligned.
#pragma once

#include "vectors.h"

template <class T>
static SCARLET_INLINE T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

static SCARLET_INLINE I low_nibble(I v) { return Simd::and_(v, Simd::set1i(15)); }
static SCARLET_INLINE I bits_at(I v, int shift, int mask) {
  return Simd::and_(Simd::shr(v, shift), Simd::set1i(mask));
}
static SCARLET_INLINE F minus(I v, int bias) {  // as floats
  return Simd::to_float(Simd::add(v, Simd::set1i(-bias)));
}
// The bits for the W lanes from element `first` on, of a field of one bit an element.
static SCARLET_INLINE uint32_t lane_bits(const uint8_t* field, int first) {
  return W == 16 ? read<uint16_t>(field + first / 8) : field[first / 8];
}

// --- plain floats -----------------------------------------------------------------------------------

struct F32 {
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    SCARLET_UNROLL for (int i = 0; i < 32; i += W) emit(i, Simd::load(reinterpret_cast<const float*>(b) + i));
  }
};

struct F16 {
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    SCARLET_UNROLL for (int i = 0; i < 32; i += W) emit(i, Simd::from_f16(b + 2 * i));
  }
};

struct BF16 {
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    SCARLET_UNROLL for (int i = 0; i < 32; i += W) emit(i, Simd::from_bf16(b + 2 * i));
  }
};

// --- blocks of 32 with one scale --------------------------------------------------------------------

// Sixteen bytes of nibbles, the low ones being the first sixteen elements: value(element, quants).
template <class Value, class Emit>
static SCARLET_INLINE void split_nibbles(const uint8_t* qs, Value value, Emit emit) {
  SCARLET_UNROLL for (int i = 0; i < 16; i += W) emit(i, value(i, low_nibble(Simd::from_u8(qs + i))));
  SCARLET_UNROLL for (int i = 0; i < 16; i += W) {
    emit(16 + i, value(16 + i, Simd::shr(Simd::from_u8(qs + i), 4)));
  }
}

struct Q4_0 {  // f16 d, nibbles[16]: d (q - 8)
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b));
    split_nibbles(b + 2, [&](int, I q) SCARLET_LAMBDA { return Simd::mul(d, minus(q, 8)); }, emit);
  }
};

struct Q4_1 {  // f16 d, f16 m, nibbles[16]: d q + m
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b)), m = Simd::set1(Simd::f16(b + 2));
    split_nibbles(b + 4, [&](int, I q) SCARLET_LAMBDA { return Simd::fma(d, Simd::to_float(q), m); }, emit);
  }
};

struct Q5_0 {  // f16 d, u32 fifth bits, nibbles[16]: d (q - 16)
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b));
    auto value = [&](int i, I q) SCARLET_LAMBDA {
      return Simd::mul(d, minus(Simd::or_(q, Simd::where_bit(lane_bits(b + 2, i), 16)), 16));
    };
    split_nibbles(b + 6, value, emit);
  }
};

struct Q5_1 {  // f16 d, f16 m, u32 fifth bits, nibbles[16]: d q + m
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b)), m = Simd::set1(Simd::f16(b + 2));
    auto value = [&](int i, I q) SCARLET_LAMBDA {
      I five = Simd::or_(q, Simd::where_bit(lane_bits(b + 4, i), 16));
      return Simd::fma(d, Simd::to_float(five), m);
    };
    split_nibbles(b + 8, value, emit);
  }
};

struct Q8_0 {  // f16 d, i8 q[32]: d q
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b));
    SCARLET_UNROLL for (int i = 0; i < 32; i += W) {
      emit(i, Simd::mul(d, Simd::to_float(Simd::from_i8(b + 2 + i))));
    }
  }
};

struct IQ4_NL {  // f16 d, nibbles[16]: d K[q]
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b));
    auto value = [&](int, I q) SCARLET_LAMBDA { return Simd::mul(d, Simd::lookup(codebooks.iq4, q)); };
    split_nibbles(b + 2, value, emit);
  }
};

struct MXFP4 {  // u8 e, nibbles[16]: E2M1[q] 2^(e - 127)
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(half_of_power(b[0]));
    auto value = [&](int, I q) SCARLET_LAMBDA { return Simd::mul(d, Simd::lookup(codebooks.e2m1, q)); };
    split_nibbles(b + 1, value, emit);
  }

  static SCARLET_INLINE float half_of_power(uint32_t e) {  // 2^(e - 128); the two smallest are subnormal
    const uint32_t bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

// --- other small blocks -----------------------------------------------------------------------------

struct NVFP4 {  // UE4M3 scales[4], 8 bytes of nibbles for each 16 elements: scale E2M1[q]
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    SCARLET_UNROLL for (int s = 0; s < 4; s++) {
      const F scale = Simd::set1(half_of_ue4m3(b[s]));
      const uint64_t nibbles = read<uint64_t>(b + 4 + 8 * s);
      const uint64_t high_nibbles = nibbles >> 4;
      const uint8_t* rows[2] = {reinterpret_cast<const uint8_t*>(&nibbles),
                                reinterpret_cast<const uint8_t*>(&high_nibbles)};
      SCARLET_UNROLL for (int i = 0; i < 16; i += W) {
        emit(16 * s + i, Simd::mul(scale, Simd::lookup(codebooks.e2m1, Simd::rows_of_8(rows + i / 8))));
      }
    }
  }

  // Four bits of exponent (bias 7) and three of mantissa, halved because E2M1 is doubled; 0x7f is zero.
  static SCARLET_INLINE float half_of_ue4m3(uint32_t x) {
    const uint32_t exponent = (x >> 3) & 15, mantissa = x & 7;
    const uint32_t bits = (exponent + 119) << 23 | mantissa << 20;
    float normal;
    std::memcpy(&normal, &bits, sizeof(normal));
    const float value = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-10f : normal;
    return x == 0x7f ? 0.0f : value;
  }
};

struct Q1_0 {  // f16 d, a bit for each of 128 elements: d where set, else -d
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b));
    SCARLET_UNROLL for (int i = 0; i < 128; i += W) emit(i, Simd::negate_where_bit(d, ~lane_bits(b + 2, i)));
  }
};

struct Q2_0 {  // f16 d, two bits for each of 64 elements: d (q - 1)
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b));
    SCARLET_UNROLL for (int i = 0; i < 64; i += W) {
      const uint8_t* p = b + 2 + i / 4;
      const uint32_t bits = W == 16 ? read<uint32_t>(p) : read<uint16_t>(p);
      emit(i, Simd::mul(d, minus(Simd::pairs(bits), 1)));
    }
  }
};

// --- K-quants: 256 elements, sub-blocks with scales of their own ------------------------------------

// Sixteen factors in registers, of which each sub-block takes one. (Through memory it would be slower: a
// wide store is not forwarded to narrow loads.)
struct Sixteen {
  F v[16 / W];

  SCARLET_INLINE F operator[](int i) const { return Simd::lane(v[i / W], i % W); }
  // d times each of sixteen signed scales, less `bias`.
  static SCARLET_INLINE Sixteen scaled(float d, const uint8_t* scales, int bias) {
    Sixteen s;
    SCARLET_UNROLL for (int i = 0; i < 16; i += W) {
      s.v[i / W] = Simd::mul(Simd::set1(d), minus(Simd::from_i8(scales + i), bias));
    }
    return s;
  }
};

struct Q2_K {  // scale | min << 4 [16], pairs[64], f16 d, f16 dmin: d scale q - dmin min
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b + 80)), dmin = Simd::set1(Simd::f16(b + 82));
    Sixteen scale, minimum;
    SCARLET_UNROLL for (int i = 0; i < 16; i += W) {
      const I both = Simd::from_u8(b + i);
      scale.v[i / W] = Simd::mul(d, Simd::to_float(low_nibble(both)));
      minimum.v[i / W] = Simd::mul(dmin, Simd::to_float(Simd::shr(both, 4)));
    }
    SCARLET_UNROLL for (int h = 0; h < 2; h++) {
      SCARLET_UNROLL for (int s = 0; s < 4; s++) {
        SCARLET_UNROLL for (int i = 0; i < 32; i += W) {
          const int sub = 8 * h + 2 * s + i / 16;
          const F q = Simd::to_float(bits_at(Simd::from_u8(b + 16 + 32 * h + i), 2 * s, 3));
          emit(128 * h + 32 * s + i, Simd::fms(q, scale[sub], minimum[sub]));
        }
      }
    }
  }
};

struct Q3_K {  // third bits[32], pairs[64], scales[12], f16 d: d (scale - 32) (q - 4)
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const Sixteen scale = unpack_scales(b + 96, Simd::f16(b + 108));
    SCARLET_UNROLL for (int h = 0; h < 2; h++) {
      SCARLET_UNROLL for (int s = 0; s < 4; s++) {
        SCARLET_UNROLL for (int i = 0; i < 32; i += W) {
          const I low = bits_at(Simd::from_u8(b + 32 + 32 * h + i), 2 * s, 3);
          const I high = Simd::shl(bits_at(Simd::from_u8(b + i), 4 * h + s, 1), 2);
          emit(128 * h + 32 * s + i,
               Simd::mul(scale[8 * h + 2 * s + i / 16], minus(Simd::or_(low, high), 4)));
        }
      }
    }
  }

  // Sixteen scales of six bits: four low bits in eight bytes (low nibbles first), two high ones in four.
  static SCARLET_INLINE Sixteen unpack_scales(const uint8_t* packed, float d) {
    const uint32_t a = read<uint32_t>(packed), c = read<uint32_t>(packed + 4);
    const uint32_t high = read<uint32_t>(packed + 8);
    const uint32_t nibble = 0x0f0f0f0f, pair = 0x30303030;
    const uint32_t words[4] = {(a & nibble) | ((high << 4) & pair), (c & nibble) | ((high << 2) & pair),
                               ((a >> 4) & nibble) | (high & pair),
                               ((c >> 4) & nibble) | ((high >> 2) & pair)};
    return Sixteen::scaled(d, reinterpret_cast<const uint8_t*>(words), 32);
  }
};

// The eight scales and eight mins of Q4_K and Q5_K: f16 d, f16 dmin, then six bits each in twelve bytes.
// The first four of each are the low six bits of their bytes; the last four have their low nibbles in the
// last four bytes and their two high bits above the first four's.
struct ScalesAndMins {
  Sixteen by_d, by_dmin;

  SCARLET_INLINE explicit ScalesAndMins(const uint8_t* b) {
    const uint32_t s = read<uint32_t>(b + 4), m = read<uint32_t>(b + 8), low = read<uint32_t>(b + 12);
    const uint32_t six = 0x3f3f3f3f, nibble = 0x0f0f0f0f, pair = 0x30303030;
    const uint32_t words[4] = {s & six, (low & nibble) | ((s >> 2) & pair), m & six,
                               ((low >> 4) & nibble) | ((m >> 2) & pair)};
    by_d = Sixteen::scaled(Simd::f16(b), reinterpret_cast<const uint8_t*>(words), 0);
    by_dmin = Sixteen::scaled(Simd::f16(b + 2), reinterpret_cast<const uint8_t*>(words), 0);
  }
  SCARLET_INLINE F scale(int sub) const { return by_d[sub]; }
  SCARLET_INLINE F minimum(int sub) const { return by_dmin[8 + sub]; }
};

struct Q4_K {  // scales and mins, nibbles[128]: d scale q - dmin min
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const ScalesAndMins sm(b);
    SCARLET_UNROLL for (int sub = 0; sub < 8; sub++) {
      SCARLET_UNROLL for (int i = 0; i < 32; i += W) {
        const I q = bits_at(Simd::from_u8(b + 16 + sub / 2 * 32 + i), 4 * (sub & 1), 15);
        emit(32 * sub + i, Simd::fms(Simd::to_float(q), sm.scale(sub), sm.minimum(sub)));
      }
    }
  }
};

struct Q5_K {  // scales and mins, fifth bits[32], nibbles[128]: d scale q - dmin min
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const ScalesAndMins sm(b);
    SCARLET_UNROLL for (int sub = 0; sub < 8; sub++) {
      SCARLET_UNROLL for (int i = 0; i < 32; i += W) {
        const I low = bits_at(Simd::from_u8(b + 48 + sub / 2 * 32 + i), 4 * (sub & 1), 15);
        const I high = Simd::shl(bits_at(Simd::from_u8(b + 16 + i), sub, 1), 4);
        emit(32 * sub + i, Simd::fms(Simd::to_float(Simd::or_(low, high)), sm.scale(sub), sm.minimum(sub)));
      }
    }
  }
};

struct Q6_K {  // nibbles[128], pairs[64], i8 scales[16], f16 d: d scale (q - 32)
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const Sixteen scale = Sixteen::scaled(Simd::f16(b + 208), b + 192, 0);
    SCARLET_UNROLL for (int h = 0; h < 2; h++) {
      SCARLET_UNROLL for (int s = 0; s < 4; s++) {
        SCARLET_UNROLL for (int i = 0; i < 32; i += W) {
          const I low = bits_at(Simd::from_u8(b + 64 * h + 32 * (s & 1) + i), 4 * (s >> 1), 15);
          const I high = Simd::shl(bits_at(Simd::from_u8(b + 128 + 32 * h + i), 2 * s, 3), 4);
          emit(128 * h + 32 * s + i,
               Simd::mul(scale[8 * h + 2 * s + i / 16], minus(Simd::or_(low, high), 32)));
        }
      }
    }
  }
};

// --- codebook types: 256 elements, indices into a grid of eight (or four) magnitudes ----------------

// Element `at` on: scale times grid rows, eight elements each, with the lanes of set `signs` negated.
static SCARLET_INLINE F signed_rows_of_8(F scale, const uint8_t* const* rows, uint32_t signs) {
  return Simd::negate_where_bit(Simd::mul(scale, Simd::to_float(Simd::rows_of_8(rows))), signs);
}
static SCARLET_INLINE F signed_rows_of_4(F scale, const uint8_t* const* rows, uint32_t signs) {
  return Simd::negate_where_bit(Simd::mul(scale, Simd::to_float(Simd::rows_of_4(rows))), signs);
}
// The nibble of each sixteen elements in eight bytes, as (1/2 + s) d / 4.
static SCARLET_INLINE void scales_of_16(const uint8_t* packed, float d, float* scale) {
  const uint64_t word = read<uint64_t>(packed), nibble = 0x0f0f0f0f0f0f0f0full;
  const uint64_t even = word & nibble, odd = (word >> 4) & nibble;
  SCARLET_UNROLL for (int i = 0; i < 8; i++) {
    scale[2 * i] = d * (0.5f + static_cast<float>((even >> (8 * i)) & 15)) * 0.25f;
    scale[2 * i + 1] = d * (0.5f + static_cast<float>((odd >> (8 * i)) & 15)) * 0.25f;
  }
}

struct IQ2_XXS {  // f16 d; per 32: four indices, u32 of four 7-bit sign codes and 4-bit s
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const float d = Simd::f16(b);
    SCARLET_UNROLL for (int sub = 0; sub < 8; sub++) {
      const uint8_t* index = b + 2 + 8 * sub;
      const uint32_t codes = read<uint32_t>(index + 4);
      const F scale = Simd::set1(d * (0.5f + static_cast<float>(codes >> 28)) * 0.25f);
      SCARLET_UNROLL for (int i = 0; i < 4; i += W / 8) {
        const uint8_t* rows[W / 8];
        uint32_t signs = 0;
        SCARLET_UNROLL for (int j = 0; j < W / 8; j++) {
          rows[j] = codebooks.iq2_xxs[index[i + j]];
          signs |= static_cast<uint32_t>(codebooks.sign_codes[(codes >> (7 * (i + j))) & 127]) << (8 * j);
        }
        emit(32 * sub + 8 * i, signed_rows_of_8(scale, rows, signs));
      }
    }
  }
};

struct IQ2_XS {  // f16 d, u16[32] of 9-bit index and 7-bit sign code, nibble s per 16
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    float scale[16];
    scales_of_16(b + 66, Simd::f16(b), scale);
    SCARLET_UNROLL for (int i = 0; i < 32; i += W / 8) {
      const uint8_t* rows[W / 8];
      uint32_t signs = 0;
      SCARLET_UNROLL for (int j = 0; j < W / 8; j++) {
        const uint32_t q = read<uint16_t>(b + 2 + 2 * (i + j));
        rows[j] = codebooks.iq2_xs[q & 511];
        signs |= static_cast<uint32_t>(codebooks.sign_codes[q >> 9]) << (8 * j);
      }
      emit(8 * i, signed_rows_of_8(Simd::set1(scale[i / 2]), rows, signs));
    }
  }
};

struct IQ2_S {  // f16 d, index[32], signs[32], two high index bits each [8], nibble s per 16
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    float scale[16];
    scales_of_16(b + 74, Simd::f16(b), scale);
    SCARLET_UNROLL for (int i = 0; i < 32; i += W / 8) {
      const uint8_t* rows[W / 8];
      SCARLET_UNROLL for (int j = 0; j < W / 8; j++) {
        const int g = i + j;
        rows[j] = codebooks.iq2_s[b[2 + g] | ((b[66 + g / 4] >> (2 * (g & 3))) & 3) << 8];
      }
      emit(8 * i, signed_rows_of_8(Simd::set1(scale[i / 2]), rows, lane_bits(b + 34, 8 * i)));
    }
  }
};

struct IQ3_XXS {  // f16 d, index[64], then u32 per 32 as in IQ2_XXS; (1/2 + s) d / 2
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const float d = Simd::f16(b);
    SCARLET_UNROLL for (int sub = 0; sub < 8; sub++) {
      const uint8_t* index = b + 2 + 8 * sub;
      const uint32_t codes = read<uint32_t>(b + 66 + 4 * sub);
      const F scale = Simd::set1(d * (0.5f + static_cast<float>(codes >> 28)) * 0.5f);
      SCARLET_UNROLL for (int i = 0; i < 8; i += W / 4) {
        const uint8_t* rows[W / 4];
        SCARLET_UNROLL for (int j = 0; j < W / 4; j++) rows[j] = codebooks.iq3_xxs[index[i + j]];
        uint32_t signs = 0;
        SCARLET_UNROLL for (int j = 0; j < W / 8; j++) {
          const uint32_t code = (codes >> (7 * (i / 2 + j))) & 127;
          signs |= static_cast<uint32_t>(codebooks.sign_codes[code]) << (8 * j);
        }
        emit(32 * sub + 4 * i, signed_rows_of_4(scale, rows, signs));
      }
    }
  }
};

struct IQ3_S {  // f16 d, index[64], high index bits[8], signs[32], nibble s per 32; d (1 + 2 s)
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const float d = Simd::f16(b);
    SCARLET_UNROLL for (int sub = 0; sub < 8; sub++) {
      const uint32_t s = (b[106 + sub / 2] >> (4 * (sub & 1))) & 15, high = b[66 + sub];
      const F scale = Simd::set1(d * static_cast<float>(1 + 2 * s));
      SCARLET_UNROLL for (int i = 0; i < 8; i += W / 4) {
        const uint8_t* rows[W / 4];
        SCARLET_UNROLL for (int j = 0; j < W / 4; j++) {
          rows[j] = codebooks.iq3_s[b[2 + 8 * sub + i + j] | ((high >> (i + j)) & 1) << 8];
        }
        emit(32 * sub + 4 * i, signed_rows_of_4(scale, rows, lane_bits(b + 74, 32 * sub + 4 * i)));
      }
    }
  }
};

struct IQ1_S {  // f16 d, index[32], u16 per 32: four 3-bit high indices, 3-bit s, sign of delta
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const float d = Simd::f16(b);
    SCARLET_UNROLL for (int sub = 0; sub < 8; sub++) {
      const uint32_t high = read<uint16_t>(b + 34 + 2 * sub);
      const F scale = Simd::set1(d * static_cast<float>(2 * ((high >> 12) & 7) + 1));
      const F delta = Simd::set1(high & 0x8000 ? -0.125f : 0.125f);
      SCARLET_UNROLL for (int i = 0; i < 4; i += W / 8) {
        const uint8_t* rows[W / 8];
        SCARLET_UNROLL for (int j = 0; j < W / 8; j++) {
          rows[j] = codebooks.iq1[b[2 + 4 * sub + i + j] | ((high >> (3 * (i + j))) & 7) << 8];
        }
        const F grid = Simd::to_float(Simd::rows_of_8(rows));
        emit(32 * sub + 8 * i, Simd::mul(scale, Simd::add(grid, delta)));
      }
    }
  }
};

struct IQ1_M {  // index[32], nibble per 8 of 3 high index bits and sign of delta, u16[4] of 3-bit s per 16
                // and d
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const uint64_t words = read<uint64_t>(b + 48);
    const uint16_t d_bits = static_cast<uint16_t>(((words >> 12) & 0xf) | ((words >> 24) & 0xf0) |
                                                  ((words >> 36) & 0xf00) | ((words >> 48) & 0xf000));
    uint8_t d_bytes[2];
    std::memcpy(d_bytes, &d_bits, sizeof(d_bytes));
    const float d = Simd::f16(d_bytes);
    SCARLET_UNROLL for (int i = 0; i < 32; i += W / 8) {
      const int sub = i / 2;
      const uint32_t s = static_cast<uint32_t>(words >> (16 * (sub / 4) + 3 * (sub & 3))) & 7;
      const uint8_t* rows[W / 8];
      uint32_t negative = 0;
      SCARLET_UNROLL for (int j = 0; j < W / 8; j++) {
        const uint32_t high = b[32 + (i + j) / 2] >> (4 * ((i + j) & 1));
        rows[j] = codebooks.iq1[b[i + j] | (high & 7) << 8];
        negative |= (high & 8 ? 255u : 0u) << (8 * j);
      }
      const F delta = Simd::negate_where_bit(Simd::set1(0.125f), negative);
      const F grid = Simd::to_float(Simd::rows_of_8(rows));
      emit(8 * i, Simd::mul(Simd::set1(d * static_cast<float>(2 * s + 1)), Simd::add(grid, delta)));
    }
  }
};

struct IQ4_XS {  // f16 d, u16 and u8[4] of 6-bit scales, nibbles[128]: d (scale - 32) K[q]
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const float d = Simd::f16(b);
    const uint32_t high = read<uint16_t>(b + 2), low = read<uint32_t>(b + 4);
    SCARLET_UNROLL for (int sub = 0; sub < 8; sub++) {
      const int s = static_cast<int>(((low >> (4 * sub)) & 15) | ((high >> (2 * sub)) & 3) << 4);
      const F scale = Simd::set1(d * static_cast<float>(s - 32));
      auto value = [&](int, I q) SCARLET_LAMBDA { return Simd::mul(scale, Simd::lookup(codebooks.iq4, q)); };
      split_nibbles(b + 8 + 16 * sub, value, [&](int i, F v) SCARLET_LAMBDA { emit(32 * sub + i, v); });
    }
  }
};

// --- ternary types ----------------------------------------------------------------------------------

struct TQ1_0 {  // trits[48] five a byte, trits[4] four a byte, f16 d: d (t - 1)
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b + 52));
    static constexpr int kPower[5] = {1, 3, 9, 27, 81};
    SCARLET_UNROLL for (int n = 0; n < 5; n++) {
      SCARLET_UNROLL for (int i = 0; i < 32; i += W) {
        emit(32 * n + i, Simd::mul(d, trit(Simd::from_u8(b + i), kPower[n])));
      }
    }
    SCARLET_UNROLL for (int n = 0; n < 5; n++) {
      SCARLET_UNROLL for (int i = 0; i < 16; i += W) {
        emit(160 + 16 * n + i, Simd::mul(d, trit(Simd::from_u8(b + 32 + i), kPower[n])));
      }
    }
    uint8_t last[16];
    SCARLET_UNROLL
    for (int i = 0; i < 16; i++) last[i] = static_cast<uint8_t>(b[48 + (i & 3)] * kPower[i / 4]);
    SCARLET_UNROLL for (int i = 0; i < 16; i += W) {
      emit(240 + i, Simd::mul(d, trit(Simd::from_u8(last + i), 1)));
    }
  }

  // A byte is a fraction of 256 in base three: bring the digit to the front, then multiply it out.
  static SCARLET_INLINE F trit(I byte, int power) {
    const I front = Simd::and_(Simd::mul(byte, Simd::set1i(power)), Simd::set1i(255));
    return minus(Simd::shr(Simd::mul(front, Simd::set1i(3)), 8), 1);
  }
};

struct TQ2_0 {  // pairs[64], f16 d: d (q - 1)
  template <class Emit>
  static SCARLET_INLINE void decode(const uint8_t* b, Emit emit) {
    const F d = Simd::set1(Simd::f16(b + 64));
    SCARLET_UNROLL for (int h = 0; h < 2; h++) {
      SCARLET_UNROLL for (int s = 0; s < 4; s++) {
        SCARLET_UNROLL for (int i = 0; i < 32; i += W) {
          emit(128 * h + 32 * s + i,
               Simd::mul(d, minus(bits_at(Simd::from_u8(b + 32 * h + i), 2 * s, 3), 1)));
        }
      }
    }
  }
};
