// Eight f32 lanes by AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace scarlet {
namespace avx2 {

struct Simd {  // the members are explained in simd_avx512.h
  static constexpr int kWidth = 8;
  static constexpr const char* kName = "avx2";
  static constexpr bool kFused = true;
  using F = __m256;
  using I = __m256i;
  static constexpr int kTileM = 4;
  static constexpr int kTileN = 3;

  static SCARLET_INLINE F zero() { return _mm256_setzero_ps(); }
  static SCARLET_INLINE F set1(float x) { return _mm256_set1_ps(x); }
  static SCARLET_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  template <class T>
  static SCARLET_INLINE T kept(T v) {
    asm("" : "+x"(v));
    return v;
  }
  static SCARLET_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static SCARLET_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static SCARLET_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static SCARLET_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static SCARLET_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static SCARLET_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static SCARLET_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static SCARLET_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static SCARLET_INLINE F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static SCARLET_INLINE float sum(F v) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }

  template <int count>
  static SCARLET_INLINE void sums(const F* v, float* out) {
    SCARLET_UNROLL for (int i = 0; i < count; i++) out[i] = sum(v[i]);
  }

  static SCARLET_INLINE I set1i(int x) { return _mm256_set1_epi32(x); }
  static SCARLET_INLINE I from_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(load8(p)); }
  static SCARLET_INLINE I from_i8(const uint8_t* p) { return _mm256_cvtepi8_epi32(load8(p)); }
  static SCARLET_INLINE I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static SCARLET_INLINE I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static SCARLET_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static SCARLET_INLINE I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static SCARLET_INLINE I shl(I a, int n) { return _mm256_slli_epi32(a, n); }
  static SCARLET_INLINE I shr(I a, int n) { return _mm256_srli_epi32(a, n); }
  static SCARLET_INLINE F lane(F v, int i) { return _mm256_permutevar8x32_ps(v, _mm256_set1_epi32(i)); }
  static SCARLET_INLINE I pairs(uint32_t bits) {
    const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    return and_(_mm256_srlv_epi32(set1i(static_cast<int>(bits)), shifts), set1i(3));
  }
  static SCARLET_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }

  static SCARLET_INLINE F from_f16(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static SCARLET_INLINE F from_bf16(const uint8_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static SCARLET_INLINE float f16(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return _cvtsh_ss(bits);
  }

  static SCARLET_INLINE F lookup(const float* table, I index) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), index);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), index);
    __m256i bit3_as_sign = _mm256_slli_epi32(index, 28);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(bit3_as_sign));
  }
  static SCARLET_INLINE I where_bit(uint32_t bits, int value) {
    return _mm256_and_si256(has_bit(bits), _mm256_set1_epi32(value));
  }
  static SCARLET_INLINE F negate_where_bit(F v, uint32_t bits) {
    __m256i minus = _mm256_and_si256(has_bit(bits), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(v, _mm256_castsi256_ps(minus));
  }
  static SCARLET_INLINE I rows_of_8(const uint8_t* const* rows) { return from_i8(rows[0]); }
  static SCARLET_INLINE I rows_of_4(const uint8_t* const* rows) {
    uint32_t a, b;
    std::memcpy(&a, rows[0], 4);
    std::memcpy(&b, rows[1], 4);
    return _mm256_cvtepi8_epi32(_mm_set_epi32(0, 0, b, a));
  }
  static SCARLET_INLINE F exp2_whole(F n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static SCARLET_INLINE F round(F v) { return _mm256_round_ps(v, 8); }

  static SCARLET_INLINE void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }

 private:
  static SCARLET_INLINE __m128i load8(const uint8_t* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  }
  static SCARLET_INLINE __m256i has_bit(uint32_t bits) {  // all ones in lane i where bit i is set
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i selected = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
    return _mm256_cmpeq_epi32(selected, lane_bit);
  }
};

}  // namespace avx2
}  // namespace scarlet
