// Products with a few rows of activations, the fast way: for the types that are at heart small integers.
//
// A block of 256 quants (or eight blocks of 32) is taken as four vectors of 64 bytes, one quant a byte. A
// vector's sixteen 32-bit words, shifted down by 0, 8, 16 and 24 bits, are four planes of sixteen quants
// each: no widening, and for up to five bits one table look-up (which ignores what stands above) makes
// floats of a plane. The sums over quants are scaled once a vector, since all that a lane sees there is of
// one sub-block, and the minimums are one multiplication with sums of x. Weights are never rounded: sums of
// `scale q x` and `min x` are those of `(scale q - min) x` before anything is rounded at all.
//
// x is brought into the order of the planes once a product (`prepare`). Included after decoders.h.
#pragma once

namespace planar {

// A type says: kBytes of 256 elements; `scales(b)` and `minimums(b)`, up to sixteen factors each;
// `quants(b, v)`, its v-th vector, from which `plane(q, v, k)` takes the k-th plane and `value(plane)` its
// floats; `element(v, n)`, where the n-th byte of the v-th vector belongs; `group(v, lane)`, the factor of a
// lane. kSumOf elements make up each sum that a minimum multiplies, times kSumBy (0: there is none).
struct Plain {
  static constexpr int kSumOf = 32, kSumBy = 0, kSumsFrom = 0;
  // Rows of weights that are multiplied at a time. One, a single stream, suits what waits for memory;
  // several, which share the reading of x, what computes for long.
  static constexpr int kAbreast = 1;
  static SCARLET_INLINE F minimums(const uint8_t*, F) { return Simd::zero(); }
  static SCARLET_INLINE I plane(I q, int, int k) { return k == 0 ? q : Simd::shr(q, 8 * k); }

  static SCARLET_INLINE F iota() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static SCARLET_INLINE I load64(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static SCARLET_INLINE I both_halves(const uint8_t* p) {  // 32 bytes twice
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static SCARLET_INLINE I halves(int low, int high) {  // eight lanes of each
    return _mm512_setr_epi32(low, low, low, low, low, low, low, low, high, high, high, high, high, high, high,
                             high);
  }
  // The bits of a that are set in `mask`, and all others of b.
  static SCARLET_INLINE I select(int mask, I a, I b) {
    return _mm512_ternarylogic_epi32(Simd::set1i(mask), a, b, 0xca);
  }
};

// --- K-quants ---------------------------------------------------------------------------------------

constexpr int kNibbles = 0x0f0f0f0f, kPairs = 0x03030303, kBit4 = 0x10101010;

constexpr int kOrAnd = 0xf8;  // ternary logic: a | (b & c)

// Eight scales times d, then eight mins times dmin.
static SCARLET_INLINE F scales_and_mins(const uint8_t* b) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  const __m128i of_low = _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i of_high = _mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11);
  const __m128i all_six = _mm_setr_epi32(0x3f3f3f3f, kNibbles, 0x3f3f3f3f, 0);
  const __m128i upper_four = _mm_setr_epi32(0, 0, 0, kNibbles);
  const __m128i low = _mm_shuffle_epi8(raw, of_low);
  const __m128i high = _mm_srli_epi16(_mm_shuffle_epi8(raw, of_high), 2);
  const __m128i lower = _mm_ternarylogic_epi32(_mm_and_si128(low, all_six), _mm_srli_epi16(low, 4), upper_four, kOrAnd);
  const I six = _mm512_cvtepu8_epi32(_mm_ternarylogic_epi32(lower, high, _mm_set1_epi8(0x30), kOrAnd));
  const F factors = _mm512_permutexvar_ps(Plain::halves(0, 1), _mm512_castps128_ps512(_mm_cvtph_ps(raw)));
  return Simd::mul(Simd::to_float(six), factors);
}

struct Q4_K : Plain {
  static constexpr int kBytes = 144, kSumBy = -1;
  static SCARLET_INLINE F scales(const uint8_t* b) { return scales_and_mins(b); }
  static SCARLET_INLINE F minimums(const uint8_t*, F scales) { return scales; }  // the upper eight
  static constexpr int kSumsFrom = 8;
  static SCARLET_INLINE I quants(const uint8_t* b, int v) { return load64(b + 16 + v / 2 * 64); }
  static SCARLET_INLINE I plane(I q, int v, int k) {
    return k + v % 2 == 0 ? q : Simd::shr(q, 8 * k + v % 2 * 4);
  }
  static SCARLET_INLINE F value(I plane) { return _mm512_permutexvar_ps(plane, iota()); }
  static constexpr int element(int v, int n) { return v / 2 * 128 + n / 32 * 64 + v % 2 * 32 + n % 32; }
  static constexpr int group(int v, int lane) { return element(v, 4 * lane) / 32; }
};

struct Q5_K : Q4_K {
  static constexpr int kBytes = 176;
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const I nibbles = load64(b + 48 + v / 2 * 64);
    const int bit = v / 2 * 4 + v % 2;  // of the lower half; the upper half takes the bit two above
    const I shifts = halves((bit - 4) & 31, (bit - 2) & 31);
    const I high = _mm512_rorv_epi32(both_halves(b + 16), shifts);
    return select(kNibbles, v % 2 ? Simd::shr(nibbles, 4) : nibbles, high);
  }
  static SCARLET_INLINE I plane(I q, int v, int k) { return Plain::plane(q, v, k); }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutex2var_ps(iota(), plane, Simd::add(iota(), Simd::set1(16)));
  }
};

struct LessThirtyTwo {  // i - 32 for 0 <= i < 64, as bf16
  alignas(64) uint16_t bf16[64] = {};

  constexpr LessThirtyTwo() {
    for (int i = 0; i < 64; i++) {
      int exponent = 127, magnitude = i < 32 ? 32 - i : i - 32;
      if (magnitude == 0) continue;
      for (magnitude <<= 7; magnitude >= 256; magnitude >>= 1) exponent++;
      bf16[i] = static_cast<uint16_t>((i < 32 ? 0x8000 : 0) | exponent << 7 | (magnitude & 127));
    }
  }
};
static constexpr LessThirtyTwo kLessThirtyTwo{};

struct Q6_K : Plain {
  static constexpr int kBytes = 210;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    return Simd::mul(Simd::to_float(Simd::from_i8(b + 192)), Simd::set1(Simd::f16(b + 208)));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const I nibbles = load64(b + v / 2 * 64), pairs = both_halves(b + 128 + v / 2 * 32);
    const I high = v % 2 ? _mm512_srlv_epi32(pairs, halves(0, 2)) : _mm512_sllv_epi32(pairs, halves(4, 2));
    return select(kNibbles, v % 2 ? Simd::shr(nibbles, 4) : nibbles, high);
  }
  // Six bits are a look-up of bf16 in 64 words; a bf16 is the upper half of an f32.
  static SCARLET_INLINE F floats(I q, int, int k) {
    const I* table = reinterpret_cast<const I*>(kLessThirtyTwo.bf16);
    const I words = _mm512_permutex2var_epi16(table[0], k % 2 ? _mm512_srli_epi16(q, 8) : q, table[1]);
    return _mm512_castsi512_ps(k < 2 ? Simd::shl(words, 16) : Simd::and_(words, Simd::set1i(-0x10000)));
  }
  static constexpr int element(int v, int n) { return v / 2 * 128 + v % 2 * 64 + n; }
  static constexpr int group(int v, int lane) { return element(v, 4 * lane) / 16; }
};

struct Q2_K : Plain {
  static constexpr int kBytes = 84, kSumOf = 16, kSumBy = -1, kSumsFrom = 0;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    return Simd::mul(Simd::to_float(low_nibble(Simd::from_u8(b))), Simd::set1(Simd::f16(b + 80)));
  }
  static SCARLET_INLINE F minimums(const uint8_t* b, F) {
    return Simd::mul(Simd::to_float(Simd::shr(Simd::from_u8(b), 4)), Simd::set1(Simd::f16(b + 82)));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int) { return load64(b + 16); }
  static SCARLET_INLINE I plane(I q, int v, int k) { return k + v == 0 ? q : Simd::shr(q, 8 * k + 2 * v); }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutexvar_ps(plane, _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3));
  }
  static constexpr int element(int v, int n) { return n / 32 * 128 + v * 32 + n % 32; }
  static constexpr int group(int v, int lane) { return element(v, 4 * lane) / 16; }
};

struct Q3_K : Q2_K {
  static constexpr int kBytes = 110, kSumBy = 0;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 94));  // 12 scales, then d
    const __m128i of_low = _mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9);
    const __m128i of_high = _mm_setr_epi8(10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13);
    const I shifts = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const I low = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(raw, of_low)), halves(0, 4));
    const I high = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(raw, of_high)), shifts);
    const I six = Simd::and_(select(15, low, Simd::shl(high, 4)), Simd::set1i(63));
    return Simd::mul(minus(six, 32), Simd::set1(Simd::f16(b + 108)));
  }
  static SCARLET_INLINE F minimums(const uint8_t*, F) { return Simd::zero(); }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const I pairs = load64(b + 32);
    const I third = _mm512_rorv_epi32(both_halves(b), halves((v - 2) & 31, v + 2));
    return select(kPairs, v == 0 ? pairs : Simd::shr(pairs, 2 * v), third);
  }
  static SCARLET_INLINE I plane(I q, int v, int k) { return Plain::plane(q, v, k); }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutexvar_ps(plane,
                                 _mm512_setr_ps(-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3));
  }
};

struct TQ2_0 : Q2_K {
  static constexpr int kBytes = 66, kSumBy = 0;
  static SCARLET_INLINE F scales(const uint8_t* b) { return Simd::set1(Simd::f16(b + 64)); }
  static SCARLET_INLINE F minimums(const uint8_t*, F) { return Simd::zero(); }
  static SCARLET_INLINE I quants(const uint8_t* b, int) { return load64(b); }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutexvar_ps(plane, _mm512_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2));
  }
};

// --- sub-blocks of 32 whose nibbles are sixteen bytes of their own ----------------------------------

struct Sixteens : Plain {
  static SCARLET_INLINE I plane(I q, int v, int k) {
    return k + v % 2 == 0 ? q : Simd::shr(q, 8 * k + v % 2 * 4);
  }
  static constexpr int element(int v, int n) { return v / 2 * 128 + n / 16 * 32 + v % 2 * 16 + n % 16; }
  static constexpr int group(int v, int lane) { return v / 2 * 4 + lane / 4; }
};

struct IQ4_XS : Sixteens {
  static constexpr int kBytes = 136;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    const I low = Simd::set1i(read<int32_t>(b + 4)), high = Simd::set1i(read<uint16_t>(b + 2));
    const I low_shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
    const I high_shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    const I two = Simd::shl(_mm512_srlv_epi32(high, high_shifts), 4);
    const I six = Simd::and_(select(15, _mm512_srlv_epi32(low, low_shifts), two), Simd::set1i(63));
    return Simd::mul(minus(six, 32), Simd::set1(Simd::f16(b)));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) { return load64(b + 8 + v / 2 * 64); }
  static SCARLET_INLINE F value(I plane) { return Simd::lookup(codebooks.iq4, plane); }
};

// Eight blocks of `bytes`, nibbles in the last sixteen.
template <int bytes>
struct Eight : Sixteens {
  static constexpr int kBytes = 8 * bytes;
  static SCARLET_INLINE __m128i nibbles(const uint8_t* b, int block) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + (block + 1) * bytes - 16));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const int first = v / 2 * 4;
    const __m256i low =
        _mm256_inserti128_si256(_mm256_castsi128_si256(nibbles(b, first)), nibbles(b, first + 1), 1);
    const __m256i high =
        _mm256_inserti128_si256(_mm256_castsi128_si256(nibbles(b, first + 2)), nibbles(b, first + 3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  // The half that each block begins with; with `second`, the one behind it in the upper lanes.
  static SCARLET_INLINE F factors(const uint8_t* b, bool second) {
    __m128i low = _mm_cvtsi32_si128(read<int32_t>(b)), high = _mm_cvtsi32_si128(read<int32_t>(b + 4 * bytes));
    low = _mm_insert_epi32(low, read<int32_t>(b + 1 * bytes), 1);
    low = _mm_insert_epi32(low, read<int32_t>(b + 2 * bytes), 2);
    low = _mm_insert_epi32(low, read<int32_t>(b + 3 * bytes), 3);
    high = _mm_insert_epi32(high, read<int32_t>(b + 5 * bytes), 1);
    high = _mm_insert_epi32(high, read<int32_t>(b + 6 * bytes), 2);
    high = _mm_insert_epi32(high, read<int32_t>(b + 7 * bytes), 3);
    const __m256i pairs = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    const __m256 first = _mm256_cvtph_ps(_mm256_cvtepi32_epi16(pairs));
    if (!second) return _mm512_castps256_ps512(first);
    const __m256 behind = _mm256_cvtph_ps(_mm256_cvtepi32_epi16(_mm256_srli_epi32(pairs, 16)));
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), behind, 1);
  }
  // The fifth bits of the four blocks of vector v, at `at` in each.
  static SCARLET_INLINE __mmask64 fifth_bits(const uint8_t* b, int v, int at) {
    uint64_t mask = 0;
    SCARLET_UNROLL for (int i = 0; i < 4; i++) {
      mask |= static_cast<uint64_t>(read<uint16_t>(b + (v / 2 * 4 + i) * bytes + at + v % 2 * 2)) << (16 * i);
    }
    return mask;
  }
  static SCARLET_INLINE I with_fifth_bits(I nibbles, int v, __mmask64 mask) {
    const I low = Simd::and_(v % 2 ? Simd::shr(nibbles, 4) : nibbles, Simd::set1i(kNibbles));
    return _mm512_mask_add_epi8(low, mask, low, Simd::set1i(kBit4));
  }
};

struct Q4_0 : Eight<18> {
  static SCARLET_INLINE F scales(const uint8_t* b) { return factors(b, false); }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutexvar_ps(plane, Simd::sub(iota(), Simd::set1(8)));
  }
};

struct IQ4_NL : Q4_0 {
  static SCARLET_INLINE F value(I plane) { return Simd::lookup(codebooks.iq4, plane); }
};

struct Q4_1 : Eight<20> {
  static constexpr int kSumBy = 1, kSumsFrom = 8;
  static SCARLET_INLINE F scales(const uint8_t* b) { return factors(b, true); }
  static SCARLET_INLINE F minimums(const uint8_t*, F scales) { return scales; }
  static SCARLET_INLINE F value(I plane) { return _mm512_permutexvar_ps(plane, iota()); }
};

struct Q5_0 : Eight<22> {
  static SCARLET_INLINE F scales(const uint8_t* b) { return factors(b, false); }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    return with_fifth_bits(Eight::quants(b, v), v, fifth_bits(b, v, 2));
  }
  static SCARLET_INLINE I plane(I q, int v, int k) { return Plain::plane(q, v, k); }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutex2var_ps(Simd::sub(iota(), Simd::set1(16)), plane, iota());
  }
};

struct Q5_1 : Eight<24> {
  static constexpr int kSumBy = 1, kSumsFrom = 8;
  static SCARLET_INLINE F scales(const uint8_t* b) { return factors(b, true); }
  static SCARLET_INLINE F minimums(const uint8_t*, F scales) { return scales; }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    return with_fifth_bits(Eight::quants(b, v), v, fifth_bits(b, v, 4));
  }
  static SCARLET_INLINE I plane(I q, int v, int k) { return Plain::plane(q, v, k); }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutex2var_ps(iota(), plane, Simd::add(iota(), Simd::set1(16)));
  }
};

struct MXFP4 : Eight<17> {
  static SCARLET_INLINE F scales(const uint8_t* b) {  // 2^(e - 128); the two smallest are subnormal
    const I e =
        _mm512_castsi256_si512(_mm256_setr_epi32(b[0], b[17], b[34], b[51], b[68], b[85], b[102], b[119]));
    const I normal = Simd::shl(Simd::add(e, Simd::set1i(-1)), 23);
    const I subnormal = _mm512_sllv_epi32(Simd::set1i(0x00200000), e);
    return _mm512_castsi512_ps(
        _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(e, Simd::set1i(2)), normal, subnormal));
  }
  static SCARLET_INLINE F value(I plane) { return Simd::lookup(codebooks.e2m1, plane); }
};

// --- two bits and fewer -----------------------------------------------------------------------------

struct TQ1_0 : Plain {
  static constexpr int kBytes = 54;
  static SCARLET_INLINE F scales(const uint8_t* b) { return Simd::set1(Simd::f16(b + 52)); }
  static constexpr int element(int v, int n) { return 64 * v + n; }
  static constexpr int group(int, int) { return 0; }
  // A byte is a fraction of 256 in base three: three times it, modulo 256, brings the next digit to the
  // front, and the digit in front is how many of 86 and 171 (a third and two, rounded up) the byte reaches.
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    if (v < 2) {
      __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
      if (v == 1) low = thrice(thrice(low));
      return digits(_mm512_inserti64x4(_mm512_castsi256_si512(low), thrice(low), 1));
    }
    const __m128i tail = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 32));
    const __m256i pair = _mm256_inserti128_si256(_mm256_castsi128_si256(tail), thrice(tail), 1);
    if (v == 2) {
      const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
      const __m256i fourth = thrice(thrice(thrice(thrice(all))));
      return digits(_mm512_inserti64x4(_mm512_castsi256_si512(fourth), pair, 1));
    }
    const __m256i next = thrice(thrice(pair));
    const __m128i last = thrice(_mm256_extracti128_si256(next, 1));
    const uint32_t x = read<uint32_t>(b + 48);  // 4 bytes: their four digits in turn
    const __m128i four = _mm_set_epi32(times(x, 27), times(x, 9), times(x, 3), x);
    return digits(_mm512_inserti64x4(_mm512_castsi256_si512(next),
                                     _mm256_inserti128_si256(_mm256_castsi128_si256(last), four, 1), 1));
  }
  static SCARLET_INLINE F value(I plane) { return minus_one(plane); }

  static SCARLET_INLINE __m256i thrice(__m256i x) { return _mm256_add_epi8(x, _mm256_add_epi8(x, x)); }
  static SCARLET_INLINE __m128i thrice(__m128i x) { return _mm_add_epi8(x, _mm_add_epi8(x, x)); }
  static SCARLET_INLINE int times(uint32_t x, uint32_t factor) {  // each byte, modulo 256
    const uint32_t even = ((x & 0x00ff00ff) * factor) & 0x00ff00ff;
    const uint32_t odd = (((x >> 8) & 0x00ff00ff) * factor) & 0x00ff00ff;
    return static_cast<int>(even | odd << 8);
  }
  static SCARLET_INLINE I digits(I x) {
    const I one = _mm512_set1_epi8(1);
    const I first = _mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(x, _mm512_set1_epi8(86)), one);
    return _mm512_mask_add_epi8(first, _mm512_cmpge_epu8_mask(x, _mm512_set1_epi8(static_cast<char>(171))),
                                first, one);
  }
  static SCARLET_INLINE F minus_one(I plane) {
    return _mm512_permutexvar_ps(plane, _mm512_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2));
  }
};

struct Q1_0 : Plain {  // two blocks of 128: bit s of each word, and bit 16 + s in the upper lanes
  static constexpr int kBytes = 36;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    return _mm512_castps128_ps512(
        _mm_cvtph_ps(_mm_insert_epi16(_mm_cvtsi32_si128(read<uint16_t>(b)), read<uint16_t>(b + 18), 1)));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 2));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 20));
    return _mm512_broadcast_i64x4(_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1));
  }
  static SCARLET_INLINE I plane(I q, int v, int k) {
    return _mm512_srlv_epi32(q, halves(4 * v + k, 16 + 4 * v + k));
  }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutexvar_ps(plane,
                                 _mm512_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1));
  }
  static constexpr int element(int v, int n) { return n / 4 % 8 * 32 + n / 32 * 16 + 4 * v + n % 4; }
  static constexpr int group(int, int lane) { return lane % 8 / 4; }
};

struct Q2_0 : Plain {  // four blocks of 64: pair s of each word
  static constexpr int kBytes = 72;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    __m128i d = _mm_cvtsi32_si128(read<uint16_t>(b));
    d = _mm_insert_epi16(d, read<uint16_t>(b + 18), 1);
    d = _mm_insert_epi16(d, read<uint16_t>(b + 36), 2);
    return _mm512_castps128_ps512(_mm_cvtph_ps(_mm_insert_epi16(d, read<uint16_t>(b + 54), 3)));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int) { return Eight<18>::quants(b, 0); }
  static SCARLET_INLINE I plane(I q, int v, int k) { return v + k == 0 ? q : Simd::shr(q, 2 * (4 * v + k)); }
  static SCARLET_INLINE F value(I plane) { return TQ1_0::minus_one(plane); }
  static constexpr int element(int v, int n) { return n / 4 * 16 + 4 * v + n % 4; }
  static constexpr int group(int, int lane) { return lane / 4; }
};

struct NVFP4 : Plain {  // four blocks of 64
  static constexpr int kBytes = 144;
  // Four bits of exponent (bias 7) and three of mantissa, halved because E2M1 is doubled; 0x7f is zero.
  static SCARLET_INLINE F scales(const uint8_t* b) {
    __m128i bytes = _mm_cvtsi32_si128(read<int32_t>(b));
    bytes = _mm_insert_epi32(bytes, read<int32_t>(b + 36), 1);
    bytes = _mm_insert_epi32(bytes, read<int32_t>(b + 72), 2);
    const I x = _mm512_cvtepu8_epi32(_mm_insert_epi32(bytes, read<int32_t>(b + 108), 3));
    const I magnitude = Simd::and_(x, Simd::set1i(0x7f));
    const F normal = _mm512_castsi512_ps(Simd::add(Simd::shl(magnitude, 20), Simd::set1i(119 << 23)));
    const F subnormal = Simd::mul(Simd::to_float(magnitude), Simd::set1(0x1p-10f));
    const F value =
        _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(magnitude, Simd::set1i(8)), normal, subnormal);
    return _mm512_maskz_mov_ps(_mm512_cmpneq_epi32_mask(x, Simd::set1i(0x7f)), value);
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const auto block = [&](int i) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 36 * (v / 2 * 2 + i) + 4));
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(block(0)), block(1), 1);
  }
  static SCARLET_INLINE I plane(I q, int v, int k) {
    return k + v % 2 == 0 ? q : Simd::shr(q, 8 * k + v % 2 * 4);
  }
  static SCARLET_INLINE F value(I plane) { return Simd::lookup(codebooks.e2m1, plane); }
  static constexpr int element(int v, int n) { return v / 2 * 128 + n / 8 * 16 + v % 2 * 8 + n % 8; }
  static constexpr int group(int v, int lane) { return v / 2 * 8 + lane / 2; }
};

// --- codebook types ---------------------------------------------------------------------------------

// Eight grid rows of eight (or sixteen of four) are a vector of 64 elements in order, as signed bytes.
template <int of>
struct Grid : Plain {
  static constexpr int kAbreast = 4;
  static SCARLET_INLINE I plane(I q, int, int k) {  // sign-extended
    return _mm512_srai_epi32(k == 3 ? q : Simd::shl(q, 24 - 8 * k), 24);
  }
  static SCARLET_INLINE F value(I plane) { return Simd::to_float(plane); }
  static constexpr int element(int v, int n) { return 64 * v + n; }
  static constexpr int group(int v, int lane) { return (64 * v + 4 * lane) / of; }

  template <class Row>
  static SCARLET_INLINE I rows_of_8(Row row) {  // row(i): where the i-th is
    const auto pair = [&](int i) SCARLET_LAMBDA {
      return _mm_insert_epi64(_mm_cvtsi64_si128(read<int64_t>(row(i))), read<int64_t>(row(i + 1)), 1);
    };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(pair(0)), pair(2), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(pair(4)), pair(6), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  template <class Row>
  static SCARLET_INLINE I rows_of_4(Row row) {
    const auto four = [&](int i) SCARLET_LAMBDA {
      __m128i v = _mm_cvtsi32_si128(read<int32_t>(row(i)));
      v = _mm_insert_epi32(v, read<int32_t>(row(i + 1)), 1);
      v = _mm_insert_epi32(v, read<int32_t>(row(i + 2)), 2);
      return _mm_insert_epi32(v, read<int32_t>(row(i + 3)), 3);
    };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(four(0)), four(4), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(four(8)), four(12), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  // Four indices of sixteen bits: the low bytes, and what stands above them already in its place.
  static SCARLET_INLINE uint64_t indices(const uint8_t* low, uint64_t high) {
    return _pdep_u64(read<uint32_t>(low), 0x00ff00ff00ff00ffull) | high;
  }
  static SCARLET_INLINE uint16_t index(const uint64_t* fours, int i) {
    return static_cast<uint16_t>(fours[i / 4] >> (16 * (i % 4)));
  }
  static SCARLET_INLINE I negated(I bytes, uint64_t where) {
    return _mm512_mask_sub_epi8(bytes, where, _mm512_setzero_si512(), bytes);
  }
  // Eight sign codes of seven bits, 28 bits of each word: a bit an element, the eighth being their parity.
  static SCARLET_INLINE uint64_t signs(uint64_t first_four, uint64_t last_four) {
    const uint64_t seven = 0x7f7f7f7f;
    const uint64_t x = _pdep_u64(first_four, seven) | _pdep_u64(last_four, seven) << 32;
    uint64_t parity = x ^ x >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return x | (parity & 0x0101010101010101ull) << 7;
  }
  // (1/2 + s) d / 4 for the nibble s of each sixteen elements.
  static SCARLET_INLINE F nibble_scales(const uint8_t* packed, float d) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
    const __m128i both = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
    const F s = Simd::to_float(low_nibble(_mm512_cvtepu8_epi32(both)));
    return Simd::mul(Simd::add(s, Simd::set1(0.5f)), Simd::set1(d * 0.25f));
  }
};

// Eight blocks of 34 bytes: a half, then 32 signed bytes, as a grid's rows are.
struct Q8_0 : Grid<32> {
  static constexpr int kBytes = 272, kAbreast = 1;
  static SCARLET_INLINE F scales(const uint8_t* b) { return Eight<34>::factors(b, false); }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const auto block = [&](int i) SCARLET_LAMBDA {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 34 * (2 * v + i) + 2));
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(block(0)), block(1), 1);
  }
};

struct IQ2_XXS : Grid<32> {
  static constexpr int kBytes = 66;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    const __m256i codes = _mm512_cvtepi64_epi32(_mm512_srli_epi64(load64(b + 2), 60));
    return Simd::mul(Simd::add(Simd::to_float(_mm512_castsi256_si512(codes)), Simd::set1(0.5f)),
                     Simd::set1(Simd::f16(b) * 0.25f));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const uint8_t* p = b + 2 + 16 * v;
    const auto row = [&](int i) SCARLET_LAMBDA { return codebooks.iq2_xxs[p[i + i / 4 * 4]]; };
    return negated(rows_of_8(row), signs(read<uint32_t>(p + 4), read<uint32_t>(p + 12)));
  }
};

struct IQ2_XS : Grid<16> {
  static constexpr int kBytes = 74;
  static SCARLET_INLINE F scales(const uint8_t* b) { return nibble_scales(b + 66, Simd::f16(b)); }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const uint8_t* p = b + 2 + 16 * v;
    const auto row = [&](int i) SCARLET_LAMBDA { return codebooks.iq2_xs[read<uint16_t>(p + 2 * i) & 511]; };
    const uint64_t codes = 0xfe00fe00fe00fe00ull;
    return negated(rows_of_8(row),
                   signs(_pext_u64(read<uint64_t>(p), codes), _pext_u64(read<uint64_t>(p + 8), codes)));
  }
};

struct IQ2_S : Grid<16> {
  static constexpr int kBytes = 82;
  static SCARLET_INLINE F scales(const uint8_t* b) { return nibble_scales(b + 74, Simd::f16(b)); }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const uint64_t pairs = 0x0300030003000300ull;
    const uint64_t fours[2] = {indices(b + 2 + 8 * v, _pdep_u64(b[66 + 2 * v], pairs)),
                               indices(b + 6 + 8 * v, _pdep_u64(b[67 + 2 * v], pairs))};
    const auto row = [&](int i) SCARLET_LAMBDA { return codebooks.iq2_s[index(fours, i)]; };
    return negated(rows_of_8(row), read<uint64_t>(b + 34 + 8 * v));
  }
};

struct IQ3_XXS : Grid<32> {
  static constexpr int kBytes = 98;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    const __m256i codes = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 66)), 28);
    return Simd::mul(Simd::add(Simd::to_float(_mm512_castsi256_si512(codes)), Simd::set1(0.5f)),
                     Simd::set1(Simd::f16(b) * 0.5f));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const auto row = [&](int i) SCARLET_LAMBDA { return codebooks.iq3_xxs[b[2 + 16 * v + i]]; };
    return negated(rows_of_4(row), signs(read<uint32_t>(b + 66 + 8 * v), read<uint32_t>(b + 70 + 8 * v)));
  }
};

struct IQ3_S : Grid<32> {
  static constexpr int kBytes = 110;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    const I shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
    const I s = low_nibble(_mm512_srlv_epi32(Simd::set1i(read<int32_t>(b + 106)), shifts));
    return Simd::mul(Simd::to_float(Simd::add(Simd::add(s, s), Simd::set1i(1))), Simd::set1(Simd::f16(b)));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const uint32_t high = read<uint16_t>(b + 66 + 2 * v);
    uint64_t fours[4];
    SCARLET_UNROLL for (int i = 0; i < 4; i++) {
      fours[i] = indices(b + 2 + 16 * v + 4 * i, _pdep_u64(high >> (4 * i), 0x0100010001000100ull));
    }
    const auto row = [&](int i) SCARLET_LAMBDA { return codebooks.iq3_s[index(fours, i)]; };
    return negated(rows_of_4(row), read<uint64_t>(b + 74 + 8 * v));
  }
};

// Eight times grid plus or minus one, and an eighth of the scale: all whole numbers.
struct IQ1_S : Grid<32> {
  static constexpr int kBytes = 50;
  static constexpr uint64_t kThrees = 0x0700070007000700ull;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 34));
    const I s =
        Simd::and_(Simd::shr(_mm512_castsi256_si512(_mm256_cvtepu16_epi32(words)), 11), Simd::set1i(14));
    return Simd::mul(Simd::to_float(Simd::add(s, Simd::set1i(1))), Simd::set1(Simd::f16(b) * 0.125f));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const uint32_t first = read<uint16_t>(b + 34 + 4 * v), second = read<uint16_t>(b + 36 + 4 * v);
    const uint64_t fours[2] = {indices(b + 2 + 8 * v, _pdep_u64(first, kThrees)),
                               indices(b + 6 + 8 * v, _pdep_u64(second, kThrees))};
    const auto row = [&](int i) SCARLET_LAMBDA { return codebooks.iq1[index(fours, i)]; };
    const uint64_t negative =
        (first & 0x8000 ? 0xffffffffull : 0) | (second & 0x8000 ? 0xffffffffull << 32 : 0);
    return with_delta(rows_of_8(row), negative);
  }
  static SCARLET_INLINE I with_delta(I grid, uint64_t negative) {
    const I one = _mm512_set1_epi8(1);
    const I eightfold = Simd::and_(Simd::shl(grid, 3), _mm512_set1_epi8(static_cast<char>(0xf8)));
    return _mm512_mask_sub_epi8(_mm512_add_epi8(eightfold, one), negative, eightfold, one);
  }
};

struct IQ1_M : Grid<16> {
  static constexpr int kBytes = 56;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    const uint64_t words = read<uint64_t>(b + 48);
    const float d = _cvtsh_ss(static_cast<uint16_t>(_pext_u64(words, 0xf000f000f000f000ull)));
    const uint64_t bytes[2] = {_pdep_u64(_pext_u64(words, 0x0fff0fff), 0x0707070707070707ull),
                               _pdep_u64(_pext_u64(words >> 32, 0x0fff0fff), 0x0707070707070707ull)};
    const I s = _mm512_cvtepu8_epi32(_mm_set_epi64x(bytes[1], bytes[0]));
    return Simd::mul(Simd::to_float(Simd::add(Simd::add(s, s), Simd::set1i(1))), Simd::set1(d * 0.125f));
  }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const uint32_t high = read<uint32_t>(b + 32 + 4 * v);  // eight nibbles
    const uint32_t threes = _pext_u32(high, 0x77777777);
    const uint64_t fours[2] = {indices(b + 8 * v, _pdep_u64(threes, IQ1_S::kThrees)),
                               indices(b + 8 * v + 4, _pdep_u64(threes >> 12, IQ1_S::kThrees))};
    const auto row = [&](int i) SCARLET_LAMBDA { return codebooks.iq1[index(fours, i)]; };
    const uint64_t negative = _pdep_u64(_pext_u64(high, 0x88888888), 0x0101010101010101ull) * 255;
    return IQ1_S::with_delta(rows_of_8(row), negative);
  }
};

// --- the product ------------------------------------------------------------------------------------

constexpr int kElements = 256;
constexpr int kPrepared = kElements + 16;  // floats a block of prepared x: the planes, then the sums

template <class T>
struct Order {  // where each element of a prepared block comes from, and the factor of each lane
  uint8_t element[kElements] = {};
  alignas(64) int32_t group[4][16] = {};

  constexpr Order() {
    for (int v = 0; v < 4; v++) {
      for (int lane = 0; lane < 16; lane++) {
        for (int k = 0; k < 4; k++) {
          element[(4 * v + k) * 16 + lane] = static_cast<uint8_t>(T::element(v, 4 * lane + k));
        }
        group[v][lane] = T::group(v, lane);
      }
    }
  }
};

template <class T>
static constexpr Order<T> kOrder{};

static constexpr int64_t prepared_floats(int64_t elements) {
  return elements / kElements * kPrepared + elements % kElements;
}

// A row of x in the order of the planes, with its sums; what is beyond the last whole block stays as it is.
template <class T>
static void prepare(const float* x, int64_t elements, float* out) {
  int64_t left = elements;
  for (; left >= kElements; left -= kElements, x += kElements, out += kPrepared) {
    for (int i = 0; i < kElements; i++) out[i] = x[kOrder<T>.element[i]];
    float* sums = out + kElements;
    for (int i = 0; i < 16; i++) sums[i] = 0;
    if constexpr (T::kSumBy != 0) {
      for (int i = 0; i < kElements / T::kSumOf; i++) {
        float sum = 0;
        for (int j = 0; j < T::kSumOf; j++) sum += x[i * T::kSumOf + j];
        sums[T::kSumsFrom + i] = T::kSumBy * sum;
      }
    }
  }
  std::memcpy(out, x, left * sizeof(float));
}

template <class T>
static SCARLET_INLINE auto floats(I q, int v, int k) -> decltype(T::floats(q, v, k)) {
  return T::floats(q, v, k);
}
template <class T>
static SCARLET_INLINE auto floats(I q, int v, int k) -> decltype(T::value(T::plane(q, v, k))) {
  return T::value(T::plane(q, v, k));
}

// Asks for a block of weights that will be wanted: into the second level, the first being x's.
template <class T>
static SCARLET_INLINE void prefetch_block(const uint8_t* b) {
  SCARLET_UNROLL for (int line = 0; line < T::kBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(b + line), _MM_HINT_T1);
  }
}

// A block of R rows of weights times M rows of prepared x: adds to their sums.
template <class T, int R, int M>
static SCARLET_INLINE void dot_blocks(const uint8_t* const* b, const float* const* x, Sums<R, M>& sums) {
  F scales[R];
  SCARLET_UNROLL for (int r = 0; r < R; r++) scales[r] = T::scales(b[r]);
  SCARLET_UNROLL for (int v = 0; v < 4; v++) {
    I q[R];
    F sum[R][M];
    // To read q again for each plane would mostly be across two cache lines.
    SCARLET_UNROLL for (int r = 0; r < R; r++) q[r] = Simd::kept(T::quants(b[r], v));
    SCARLET_UNROLL for (int k = 0; k < 4; k++) {
      F at[M];
      SCARLET_UNROLL for (int m = 0; m < M; m++) at[m] = Simd::load(x[m] + (4 * v + k) * 16);
      SCARLET_UNROLL for (int r = 0; r < R; r++) {
        const F value = floats<T>(q[r], v, k);
        SCARLET_UNROLL for (int m = 0; m < M; m++) {
          sum[r][m] = k == 0 ? Simd::mul(value, at[m]) : Simd::fma(value, at[m], sum[r][m]);
        }
      }
    }
    SCARLET_UNROLL for (int r = 0; r < R; r++) {
      const F factor = _mm512_permutexvar_ps(_mm512_load_si512(kOrder<T>.group[v]), scales[r]);
      SCARLET_UNROLL for (int m = 0; m < M; m++) {
        sums.of[r][m][v % 2] = Simd::fma(factor, sum[r][m], sums.of[r][m][v % 2]);
      }
    }
  }
  if constexpr (T::kSumBy != 0) {
    SCARLET_UNROLL for (int r = 0; r < R; r++) {
      const F minimums = T::minimums(b[r], scales[r]);
      SCARLET_UNROLL for (int m = 0; m < M; m++) {
        sums.of[r][m][0] = Simd::fma(minimums, Simd::load(x[m] + kElements), sums.of[r][m][0]);
      }
    }
  }
}

// --- rows of weights, one after another -------------------------------------------------------------

// A Way of multiplying says: Type, of the weights; kPrepared, the floats of 256 prepared elements; kAbreast<M>,
// the rows of weights that it multiplies at a time by M of x;
// `dot(b, x, sums)`, which adds a block of R rows times M; and `rest`, the same for what is left of rows.
template <class B, class T>
struct InFloats {
  using Type = T;
  static constexpr int kPrepared = planar::kPrepared;
  template <int M>
  static constexpr int kAbreast = M == 1 ? T::kAbreast : 1;

  template <int R, int M>
  static SCARLET_INLINE void dot(const uint8_t* const* b, const float* const* x, Sums<R, M>& sums) {
    dot_blocks<T>(b, x, sums);
  }
  template <int R, int M>
  static SCARLET_INLINE void rest(const uint8_t** b, const float** x, int64_t elements, Sums<R, M>& sums) {
    if constexpr (B::kElements < kElements) dot_rows<B, R, M>(b, x, elements, sums);
  }
};

// Bytes from the block being multiplied to the one being asked for: rows follow one another in memory.
constexpr int kAhead = 8192;

// One row of x.
template <class Way>
static void multiply_one(const Product& p) {
  using T = typename Way::Type;
  constexpr int R = Way::template kAbreast<1>;
  const int64_t stride = p.elements * T::kBytes / kElements;
  const int64_t blocks = p.elements / kElements;
  for (int64_t row = 0; row < p.rows; row += R) {
    const auto nth = [&](int r) { return row + r < p.rows ? row + r : p.rows - 1; };  // as in multiply_rows
    const uint8_t* w[R];
    for (int r = 0; r < R; r++) w[r] = p.w + nth(r) * stride;
    const float* x[1] = {p.x[0]};
    Sums<R, 1> sums;
    for (int64_t i = 0; i < blocks; i++) {
      for (int r = 0; r < R; r++) prefetch_block<T>(w[r] + kAhead);
      Way::template dot<R, 1>(w, x, sums);
      SCARLET_UNROLL for (int r = 0; r < R; r++) w[r] += T::kBytes;
      x[0] += Way::kPrepared;
    }
    Way::template rest<R, 1>(w, x, p.elements - blocks * kElements, sums);
    SCARLET_UNROLL for (int r = 0; r < R; r++) p.y[0][nth(r)] = sums.total(r, 0);
  }
}

// Several rows of x may not fit in the first level of cache whole. Then a stretch of them that does (16 KiB)
// is multiplied by kGroup rows of weights before the next one, with the rows' sums set aside meanwhile: the same
// additions in the same order.
template <class Way, int M>
static constexpr int64_t kStretch = 16 * 1024 / (M * Way::kPrepared * 4);
constexpr int kGroup = 16, kRowsAhead = 4;  // and how many rows ahead weights are asked for

template <class Way, int M>
static void multiply_group(const Product& p, int64_t row, int64_t rows) {
  using T = typename Way::Type;
  constexpr int R = Way::template kAbreast<M>;
  const int64_t stride = p.elements * T::kBytes / kElements;
  const int64_t blocks = p.elements / kElements;
  const auto nth = [&](int m) { return m < p.count ? m : p.count - 1; };  // as in multiply_rows
  const auto nth_row = [&](int64_t r) { return row + (r < rows ? r : rows - 1); };
  Sums<R, M> sums[kGroup / R];
  for (int64_t from = 0; from == 0 || from < blocks; from += kStretch<Way, M>) {
    const int64_t end = blocks - from < kStretch<Way, M> ? blocks : from + kStretch<Way, M>;
    for (int64_t first = 0; first < rows; first += R) {
      const uint8_t* w[R];
      const float* x[M];
      for (int r = 0; r < R; r++) w[r] = p.w + nth_row(first + r) * stride + from * T::kBytes;
      for (int m = 0; m < M; m++) x[m] = p.x[nth(m)] + from * Way::kPrepared;
      Sums<R, M> own = sums[first / R];
      for (int64_t i = from; i < end; i++) {
        SCARLET_UNROLL for (int r = 0; r < R; r++) prefetch_block<T>(w[r] + kRowsAhead * stride);
        Way::template dot<R, M>(w, x, own);
        SCARLET_UNROLL for (int r = 0; r < R; r++) w[r] += T::kBytes;
        SCARLET_UNROLL for (int m = 0; m < M; m++) x[m] += Way::kPrepared;
      }
      sums[first / R] = own;
      if (end < blocks) continue;
      Way::template rest<R, M>(w, x, p.elements - end * kElements, own);
      SCARLET_UNROLL for (int r = 0; r < R; r++) {
        SCARLET_UNROLL for (int m = 0; m < M; m++) p.y[nth(m)][nth_row(first + r)] = own.total(r, m);
      }
    }
  }
}

template <class Way, int M>
static void multiply_rows(const Product& p) {
  for (int64_t row = 0; row < p.rows; row += kGroup) {
    multiply_group<Way, M>(p, row, p.rows - row < kGroup ? p.rows - row : kGroup);
  }
}

template <class Way>
static void multiply_few(const Product& p, float*) {
  if (p.count == 1) return multiply_one<Way>(p);
  if (p.count == 2) return multiply_rows<Way, 2>(p);
  multiply_rows<Way, 4>(p);
}

}  // namespace planar

#define SCARLET_PLANAR(name, elements, bytes)                             \
  template <>                                                             \
  struct Few<Block<name, elements, bytes>> {                              \
    using Way = planar::InFloats<Block<name, elements, bytes>, planar::name>; \
    static constexpr MultiplyFn kMultiply = planar::multiply_few<Way>;    \
    static constexpr PrepareFn kPrepare = planar::prepare<planar::name>;  \
  };
SCARLET_PLANAR(Q4_K, 256, 144)
SCARLET_PLANAR(Q5_K, 256, 176)
SCARLET_PLANAR(Q6_K, 256, 210)
SCARLET_PLANAR(Q2_K, 256, 84)
SCARLET_PLANAR(Q3_K, 256, 110)
SCARLET_PLANAR(TQ2_0, 256, 66)
SCARLET_PLANAR(IQ4_XS, 256, 136)
SCARLET_PLANAR(Q4_0, 32, 18)
SCARLET_PLANAR(IQ4_NL, 32, 18)
SCARLET_PLANAR(Q4_1, 32, 20)
SCARLET_PLANAR(Q5_0, 32, 22)
SCARLET_PLANAR(Q5_1, 32, 24)
SCARLET_PLANAR(Q8_0, 32, 34)
SCARLET_PLANAR(MXFP4, 32, 17)
SCARLET_PLANAR(TQ1_0, 256, 54)
SCARLET_PLANAR(Q1_0, 128, 18)
SCARLET_PLANAR(Q2_0, 64, 18)
SCARLET_PLANAR(NVFP4, 64, 36)
SCARLET_PLANAR(IQ2_XXS, 256, 66)
SCARLET_PLANAR(IQ2_XS, 256, 74)
SCARLET_PLANAR(IQ2_S, 256, 82)
SCARLET_PLANAR(IQ3_XXS, 256, 98)
SCARLET_PLANAR(IQ3_S, 256, 110)
SCARLET_PLANAR(IQ1_S, 256, 50)
SCARLET_PLANAR(IQ1_M, 256, 56)
#undef SCARLET_PLANAR

static constexpr auto kPreparedFloats = planar::prepared_floats;
