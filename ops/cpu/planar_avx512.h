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
  static constexpr int kSumOf = 32, kSumBy = 0;
  static SCARLET_INLINE F minimums(const uint8_t*, F) { return Simd::zero(); }
  static SCARLET_INLINE I plane(I q, int, int k) { return k == 0 ? q : Simd::shr(q, 8 * k); }
  static SCARLET_INLINE F value(I plane) { return _mm512_permutexvar_ps(plane, iota()); }

  static SCARLET_INLINE F iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static SCARLET_INLINE I load64(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static SCARLET_INLINE I both_halves(const uint8_t* p) {  // 32 bytes twice
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static SCARLET_INLINE I halves(int low, int high) {  // eight lanes of each
    return _mm512_setr_epi32(low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high);
  }
  // (a & mask_a) | (b & mask_b)
  static SCARLET_INLINE I merge(I a, int mask_a, I b, int mask_b) {
    return _mm512_ternarylogic_epi32(Simd::and_(b, Simd::set1i(mask_b)), a, Simd::set1i(mask_a), 0xf8);
  }
};

// --- K-quants ---------------------------------------------------------------------------------------

constexpr int kNibbles = 0x0f0f0f0f, kBit4 = 0x10101010, kBits45 = 0x30303030;

// Eight scales times d, then eight mins times dmin.
static SCARLET_INLINE F scales_and_mins(const uint8_t* b) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  const __m128i of_low = _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i of_high = _mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11);
  const I low_shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4);
  const I low_mask = _mm512_setr_epi32(63, 63, 63, 63, 15, 15, 15, 15, 63, 63, 63, 63, 15, 15, 15, 15);
  I low = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(raw, of_low));
  low = Simd::and_(_mm512_srlv_epi32(low, low_shift), low_mask);
  const I high = Simd::shr(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(raw, of_high)), 2);
  const I six = _mm512_ternarylogic_epi32(low, high, Simd::set1i(0x30), 0xf8);
  const F factors = _mm512_permutexvar_ps(Plain::halves(0, 1), _mm512_castps128_ps512(_mm_cvtph_ps(raw)));
  return Simd::mul(Simd::to_float(six), factors);
}

struct Q4_K : Plain {
  static constexpr int kBytes = 144, kSumBy = -1;
  static SCARLET_INLINE F scales(const uint8_t* b) { return scales_and_mins(b); }
  static SCARLET_INLINE F minimums(const uint8_t*, F scales) { return scales; }  // the upper eight
  static constexpr int kSumsFrom = 8;
  static SCARLET_INLINE I quants(const uint8_t* b, int v) { return load64(b + 16 + v / 2 * 64); }
  static SCARLET_INLINE I plane(I q, int v, int k) { return k + v % 2 == 0 ? q : Simd::shr(q, 8 * k + v % 2 * 4); }
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
    return merge(v % 2 ? Simd::shr(nibbles, 4) : nibbles, kNibbles, high, kBit4);
  }
  static SCARLET_INLINE I plane(I q, int v, int k) { return Plain::plane(q, v, k); }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutex2var_ps(iota(), plane, Simd::add(iota(), Simd::set1(16)));
  }
};

struct Q6_K : Plain {
  static constexpr int kBytes = 210, kSumOf = 16, kSumBy = -32, kSumsFrom = 0;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    return Simd::mul(Simd::to_float(Simd::from_i8(b + 192)), Simd::set1(Simd::f16(b + 208)));
  }
  static SCARLET_INLINE F minimums(const uint8_t*, F scales) { return scales; }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const I nibbles = load64(b + v / 2 * 64), pairs = both_halves(b + 128 + v / 2 * 32);
    const I high = v % 2 ? _mm512_srlv_epi32(pairs, halves(0, 2)) : _mm512_sllv_epi32(pairs, halves(4, 2));
    return merge(v % 2 ? Simd::shr(nibbles, 4) : nibbles, kNibbles, high, kBits45);
  }
  static SCARLET_INLINE I plane(I q, int, int k) {
    return k == 3 ? Simd::shr(q, 24) : Simd::and_(k == 0 ? q : Simd::shr(q, 8 * k), Simd::set1i(63));
  }
  static SCARLET_INLINE F value(I plane) { return Simd::to_float(plane); }
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
    return Simd::mul(minus(merge(low, 15, Simd::shl(high, 4), 48), 32), Simd::set1(Simd::f16(b + 108)));
  }
  static SCARLET_INLINE F minimums(const uint8_t*, F) { return Simd::zero(); }
  static SCARLET_INLINE I quants(const uint8_t* b, int v) {
    const I pairs = load64(b + 32);
    const I third = _mm512_rorv_epi32(both_halves(b), halves((v - 2) & 31, v + 2));
    return merge(v == 0 ? pairs : Simd::shr(pairs, 2 * v), 0x03030303, third, 0x04040404);
  }
  static SCARLET_INLINE I plane(I q, int v, int k) { return Plain::plane(q, v, k); }
  static SCARLET_INLINE F value(I plane) {
    return _mm512_permutexvar_ps(plane, _mm512_setr_ps(-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3));
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
  static SCARLET_INLINE I plane(I q, int v, int k) { return k + v % 2 == 0 ? q : Simd::shr(q, 8 * k + v % 2 * 4); }
  static constexpr int element(int v, int n) { return v / 2 * 128 + n / 16 * 32 + v % 2 * 16 + n % 16; }
  static constexpr int group(int v, int lane) { return v / 2 * 4 + lane / 4; }
};

struct IQ4_XS : Sixteens {
  static constexpr int kBytes = 136;
  static SCARLET_INLINE F scales(const uint8_t* b) {
    const I low = Simd::set1i(read<int32_t>(b + 4)), high = Simd::set1i(read<uint16_t>(b + 2));
    const I low_shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
    const I high_shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    const I six = merge(_mm512_srlv_epi32(low, low_shifts), 15, Simd::shl(_mm512_srlv_epi32(high, high_shifts), 4), 48);
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
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(nibbles(b, first)), nibbles(b, first + 1), 1);
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
    const I e = _mm512_castsi256_si512(_mm256_setr_epi32(b[0], b[17], b[34], b[51], b[68], b[85], b[102], b[119]));
    const I normal = Simd::shl(Simd::add(e, Simd::set1i(-1)), 23);
    const I subnormal = _mm512_sllv_epi32(Simd::set1i(0x00200000), e);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(e, Simd::set1i(2)), normal, subnormal));
  }
  static SCARLET_INLINE F value(I plane) { return Simd::lookup(codebooks.e2m1, plane); }
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

// One row of weights times M rows of prepared x: adds to each row's two chains of sums.
template <class T, int M>
static SCARLET_INLINE void dot_block(const uint8_t* b, const float* const* x, F (&acc)[M][2]) {
  const F scales = T::scales(b);
  SCARLET_UNROLL for (int v = 0; v < 4; v++) {
    const I q = T::quants(b, v);
    const F factor = _mm512_permutexvar_ps(_mm512_load_si512(kOrder<T>.group[v]), scales);
    F sum[M];
    SCARLET_UNROLL for (int k = 0; k < 4; k++) {
      const F value = T::value(T::plane(q, v, k));
      SCARLET_UNROLL for (int m = 0; m < M; m++) {
        const F at = Simd::load(x[m] + (4 * v + k) * 16);
        sum[m] = k == 0 ? Simd::mul(value, at) : Simd::fma(value, at, sum[m]);
      }
    }
    SCARLET_UNROLL for (int m = 0; m < M; m++) acc[m][v % 2] = Simd::fma(factor, sum[m], acc[m][v % 2]);
  }
  if constexpr (T::kSumBy != 0) {
    const F minimums = T::minimums(b, scales);
    SCARLET_UNROLL for (int m = 0; m < M; m++) {
      acc[m][0] = Simd::fma(minimums, Simd::load(x[m] + kElements), acc[m][0]);
    }
  }
}

// Bytes from the block being multiplied to those being asked for: rows follow one another in memory.
constexpr int kAhead = 4096;

template <class B, class T, int M>
static void multiply_rows(const Product& p) {
  const int64_t stride = p.elements * B::kBytes / B::kElements;
  const int64_t blocks = p.elements / kElements;
  const int64_t rest = p.elements % kElements / B::kElements;
  for (int64_t row = 0; row < p.rows; row++) {
    const uint8_t* w[1] = {p.w + row * stride};
    const float* x[M];
    for (int m = 0; m < M; m++) x[m] = p.x[m < p.count ? m : p.count - 1];
    F acc[M][2];
    SCARLET_UNROLL for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = Simd::zero();
    for (int64_t i = 0; i < blocks; i++) {
      SCARLET_UNROLL for (int line = 0; line < T::kBytes; line += 64) Simd::prefetch(w[0] + kAhead + line);
      dot_block<T, M>(w[0], x, acc);
      w[0] += T::kBytes;
      SCARLET_UNROLL for (int m = 0; m < M; m++) x[m] += kPrepared;
    }
    Sums<1, M> sums;
    SCARLET_UNROLL for (int m = 0; m < M; m++) {
      sums.of[0][m][0] = acc[m][0];
      sums.of[0][m][1] = acc[m][1];
    }
    if constexpr (B::kElements < kElements) dot_rows<B, 1, M>(w, x, rest * B::kElements, sums);
    SCARLET_UNROLL for (int m = 0; m < M; m++) p.y[m < p.count ? m : p.count - 1][row] = sums.total(0, m);
  }
}

template <class B, class T>
static void multiply_few(const Product& p, float*) {
  if (p.count == 1) return multiply_rows<B, T, 1>(p);
  if (p.count == 2) return multiply_rows<B, T, 2>(p);
  multiply_rows<B, T, 4>(p);
}

}  // namespace planar

#define SCARLET_PLANAR(name, elements, bytes)                                                             \
  template <>                                                                                             \
  struct Few<Block<name, elements, bytes>> {                                                              \
    static constexpr MultiplyFn kMultiply = planar::multiply_few<Block<name, elements, bytes>, planar::name>; \
    static constexpr PrepareFn kPrepare = planar::prepare<planar::name>;                                  \
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
SCARLET_PLANAR(MXFP4, 32, 17)
#undef SCARLET_PLANAR

static constexpr auto kPreparedFloats = planar::prepared_floats;
