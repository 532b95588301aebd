// Eight f32 lanes in the compiler's own vectors: whatever the machine has, or scalars.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "inline.h"

#include "inline.h"

namespace scarlet {
namespace generic {

struct Simd {  // the members are explained in simd_avx512.h
  static constexpr int kWidth = 8;
  static constexpr const char* kName = "generic";
  static constexpr bool kFused = false;
  typedef float F __attribute__((vector_size(32), aligned(4)));
  typedef int32_t I __attribute__((vector_size(32), aligned(4)));
  static constexpr int kTileM = 2;
  static constexpr int kTileN = 2;

  static SCARLET_INLINE F zero() { return F{}; }
  static SCARLET_INLINE F set1(float x) { return F{x, x, x, x, x, x, x, x}; }
  static SCARLET_INLINE F load(const float* p) { return read<F>(p); }
  static SCARLET_INLINE F kept(F v) { return v; }
  static SCARLET_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
  static SCARLET_INLINE F add(F a, F b) { return a + b; }
  static SCARLET_INLINE F sub(F a, F b) { return a - b; }
  static SCARLET_INLINE F mul(F a, F b) { return a * b; }
  static SCARLET_INLINE F div(F a, F b) { return a / b; }
  static SCARLET_INLINE F max(F a, F b) { return a > b ? a : b; }
  static SCARLET_INLINE F min(F a, F b) { return a < b ? a : b; }
  static SCARLET_INLINE F fma(F a, F b, F c) { return a * b + c; }
  static SCARLET_INLINE F fms(F a, F b, F c) { return a * b - c; }
  static SCARLET_INLINE float sum(F v) {
    float a = (v[0] + v[4]) + (v[2] + v[6]);
    float b = (v[1] + v[5]) + (v[3] + v[7]);
    return a + b;
  }

  template <int count>
  static SCARLET_INLINE void sums(const F* v, float* out) {
    SCARLET_UNROLL for (int i = 0; i < count; i++) out[i] = sum(v[i]);
  }

  static SCARLET_INLINE I set1i(int x) { return I{x, x, x, x, x, x, x, x}; }
  static SCARLET_INLINE I from_u8(const uint8_t* p) {
    typedef uint8_t U8 __attribute__((vector_size(8)));
    return __builtin_convertvector(read<U8>(p), I);
  }
  static SCARLET_INLINE I from_i8(const uint8_t* p) {
    typedef int8_t I8 __attribute__((vector_size(8)));
    return __builtin_convertvector(read<I8>(p), I);
  }
  static SCARLET_INLINE I and_(I a, I b) { return a & b; }
  static SCARLET_INLINE I or_(I a, I b) { return a | b; }
  static SCARLET_INLINE I add(I a, I b) { return a + b; }
  static SCARLET_INLINE I mul(I a, I b) { return a * b; }
  static SCARLET_INLINE I shl(I a, int n) { return a << n; }
  static SCARLET_INLINE I shr(I a, int n) { return a >> n; }  // of integers that are never negative
  static SCARLET_INLINE F lane(F v, int i) { return set1(v[i]); }
  static SCARLET_INLINE I pairs(uint32_t bits) {
    return (set1i(static_cast<int>(bits)) >> I{0, 2, 4, 6, 8, 10, 12, 14}) & 3;
  }
  static SCARLET_INLINE F to_float(I a) { return __builtin_convertvector(a, F); }

  static SCARLET_INLINE F from_f16(const uint8_t* p) {
    F v;
    for (int i = 0; i < kWidth; i++) v[i] = f16(p + 2 * i);
    return v;
  }
  static SCARLET_INLINE F from_bf16(const uint8_t* p) {
    typedef uint16_t U16 __attribute__((vector_size(16)));
    typedef uint32_t U32 __attribute__((vector_size(32)));
    U32 bits = __builtin_convertvector(read<U16>(p), U32) << 16;
    F v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  }
  // A half's 15 lower bits are an f32's, 13 places lower and with an exponent 112 too small; multiplying
  // by 2^112 mends that, subnormals included.
  static SCARLET_INLINE float f16(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, sizeof(half));
    uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, sizeof(value));
    value *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if ((half & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;  // infinity or NaN
    bits |= static_cast<uint32_t>(half & 0x8000) << 16;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  static SCARLET_INLINE F lookup(const float* table, I index) {
    F v;
    for (int i = 0; i < kWidth; i++) v[i] = table[index[i] & 15];
    return v;
  }
  static SCARLET_INLINE I where_bit(uint32_t bits, int value) { return has_bit(bits) & set1i(value); }
  static SCARLET_INLINE F negate_where_bit(F v, uint32_t bits) {
    I as_int;
    std::memcpy(&as_int, &v, sizeof(v));
    as_int ^= has_bit(bits) & set1i(INT32_MIN);
    std::memcpy(&v, &as_int, sizeof(v));
    return v;
  }
  static SCARLET_INLINE I rows_of_8(const uint8_t* const* rows) { return from_i8(rows[0]); }
  static SCARLET_INLINE I rows_of_4(const uint8_t* const* rows) {
    uint8_t both[8];
    std::memcpy(both, rows[0], 4);
    std::memcpy(both + 4, rows[1], 4);
    return from_i8(both);
  }
  static SCARLET_INLINE F exp2_whole(F n) {
    I bits = (__builtin_convertvector(n, I) + 127) << 23;
    F v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  }
  static SCARLET_INLINE F round(F v) {
    for (int i = 0; i < kWidth; i++) v[i] = std::nearbyint(v[i]);
    return v;
  }

  static SCARLET_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

 private:
  template <class T>
  static SCARLET_INLINE T read(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static SCARLET_INLINE I has_bit(uint32_t bits) {
    const I lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return (set1i(static_cast<int>(bits)) & lane_bit) == lane_bit;
  }
};

}  // namespace generic
}  // namespace scarlet
