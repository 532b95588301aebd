// Sixteen f32 lanes by AVX-512 (F, BW, DQ, VL) with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace scarlet {
namespace avx512 {

struct Simd {
  static constexpr int kWidth = 16;
  static constexpr const char* kName = "avx512";
  // Whether decoders are compiled into the dot products (fast, slow to compile) or called by them.
  static constexpr bool kFused = true;
  using F = __m512;   // floats
  using I = __m512i;  // 32-bit integers
  // The block of results that a matmul keeps in registers: kTileM rows of x times kTileN rows of w.
  static constexpr int kTileM = 4;
  static constexpr int kTileN = 6;

  static SCARLET_INLINE F zero() { return _mm512_setzero_ps(); }
  static SCARLET_INLINE F set1(float x) { return _mm512_set1_ps(x); }
  static SCARLET_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  // The same, but the compiler may not read it from memory again at each use instead of keeping it.
  template <class T>
  static SCARLET_INLINE T kept(T v) {
    asm("" : "+v"(v));
    return v;
  }
  static SCARLET_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static SCARLET_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static SCARLET_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static SCARLET_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static SCARLET_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static SCARLET_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static SCARLET_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static SCARLET_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static SCARLET_INLINE F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }  // a b - c
  // The sum of the lanes.
  static SCARLET_INLINE float sum(F v) {
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
    return _mm_cvtss_f32(sum_of_quarters(v));
  }
  // The same of `count` vectors, to the last bit, four at a time.
  template <int count>
  static SCARLET_INLINE void sums(const F* v, float* out) {
    SCARLET_UNROLL for (int i = 0; i + 4 <= count; i += 4) _mm_storeu_ps(out + i, sum_of_4(v + i));
    SCARLET_UNROLL for (int i = count / 4 * 4; i < count; i++) out[i] = sum(v[i]);
  }

  static SCARLET_INLINE I set1i(int x) { return _mm512_set1_epi32(x); }
  static SCARLET_INLINE I from_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(load16(p)); }
  static SCARLET_INLINE I from_i8(const uint8_t* p) { return _mm512_cvtepi8_epi32(load16(p)); }
  static SCARLET_INLINE I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static SCARLET_INLINE I or_(I a, I b) { return _mm512_or_si512(a, b); }
  static SCARLET_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static SCARLET_INLINE I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static SCARLET_INLINE I shl(I a, int n) { return _mm512_slli_epi32(a, n); }
  static SCARLET_INLINE I shr(I a, int n) { return _mm512_srli_epi32(a, n); }
  // Every lane: lane `i` of v.
  static SCARLET_INLINE F lane(F v, int i) { return _mm512_permutexvar_ps(_mm512_set1_epi32(i), v); }
  // Lane i: the two bits of `bits` from bit 2i on.
  static SCARLET_INLINE I pairs(uint32_t bits) {
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return and_(_mm512_srlv_epi32(set1i(static_cast<int>(bits)), shifts), set1i(3));
  }
  static SCARLET_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }

  static SCARLET_INLINE F from_f16(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static SCARLET_INLINE F from_bf16(const uint8_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static SCARLET_INLINE float f16(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return _cvtsh_ss(bits);
  }

  // table[index & 15], 16 floats aligned to 64 bytes: the upper bits of the index are ignored.
  static SCARLET_INLINE F lookup(const float* table, I index) {
    return _mm512_permutexvar_ps(index, _mm512_load_ps(table));
  }
  // Lane i: `value` where bit i is set, else 0.
  static SCARLET_INLINE I where_bit(uint32_t bits, int value) {
    return _mm512_maskz_set1_epi32(static_cast<__mmask16>(bits), value);
  }
  // Lane i: minus v where bit i is set.
  static SCARLET_INLINE F negate_where_bit(F v, uint32_t bits) {
    const __m512 minus = _mm512_set1_ps(-0.0f);
    return _mm512_mask_xor_ps(v, static_cast<__mmask16>(bits), v, minus);
  }
  // Two rows of eight signed bytes, or four rows of four, as one vector.
  static SCARLET_INLINE I rows_of_8(const uint8_t* const* rows) {
    uint64_t a, b;
    std::memcpy(&a, rows[0], 8);
    std::memcpy(&b, rows[1], 8);
    return _mm512_cvtepi8_epi32(_mm_set_epi64x(b, a));
  }
  static SCARLET_INLINE I rows_of_4(const uint8_t* const* rows) {
    uint32_t a, b, c, d;
    std::memcpy(&a, rows[0], 4);
    std::memcpy(&b, rows[1], 4);
    std::memcpy(&c, rows[2], 4);
    std::memcpy(&d, rows[3], 4);
    return _mm512_cvtepi8_epi32(_mm_set_epi32(d, c, b, a));
  }
  // 2^n for whole n, -126 <= n <= 127.
  static SCARLET_INLINE F exp2_whole(F n) {
    __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }
  static SCARLET_INLINE F round(F v) { return _mm512_roundscale_ps(v, 8); }  // nearest, ties to even

  static SCARLET_INLINE void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }

 private:
  static SCARLET_INLINE __m128 sum_of_quarters(F v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  static SCARLET_INLINE __m128 sum_of_4(const F* v) {
    const F a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const F b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    const F low = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
            high = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    return sum_of_quarters(_mm512_add_ps(low, high));
  }
  static SCARLET_INLINE __m128i load16(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
};

}  // namespace avx512
}  // namespace scarlet
