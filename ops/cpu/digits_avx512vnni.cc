#include "digits.h"

#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "simd_avx512.h"

namespace scarlet {
namespace avx512vnni {
using avx512::Simd;
#include "decoders.h"
#include "regimes.h"
#include "planar_avx512.h"

namespace digits {
using planar::kElements;
using planar::kOrder;

// --- weights as bytes -------------------------------------------------------------------------------

// A type's quants are its values plus kOffset, bytes without a sign, in the order of its planes
// (planar_avx512.h); factor g belongs to kSumOf elements.
template <class T, int mask, int offset = 0, int of = T::kSumOf>
struct Masked : T {
  static constexpr int kOffset = offset, kSumOf = of;
  static SCARLET_INLINE I bytes(const uint8_t* b, int v) {
    return Simd::and_(T::plane(T::quants(b, v), v, 0), Simd::set1i(mask * 0x01010101));
  }
};

template <class T, int offset>
struct Signed : T {
  static constexpr int kOffset = offset;
  static SCARLET_INLINE I bytes(const uint8_t* b, int v) {
    return _mm512_add_epi8(T::quants(b, v), _mm512_set1_epi8(static_cast<char>(offset)));
  }
};

// Nibbles that are the indices of a codebook of whole numbers.
struct Iq4 {
  static constexpr int kOffset = 128;
  static SCARLET_INLINE F values() { return _mm512_load_ps(codebooks.iq4); }
};
struct E2m1 {
  static constexpr int kOffset = 12;
  static SCARLET_INLINE F values() { return _mm512_load_ps(codebooks.e2m1); }
};
template <class T, class Book, int of = T::kSumOf>
struct Table : T {
  static constexpr int kOffset = Book::kOffset, kSumOf = of;
  static SCARLET_INLINE I bytes(const uint8_t* b, int v) {
    const __m128i whole = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(Book::values()));
    const I table = _mm512_broadcast_i32x4(_mm_add_epi8(whole, _mm_set1_epi8(static_cast<char>(kOffset))));
    const I nibbles = Simd::and_(T::plane(T::quants(b, v), v, 0), Simd::set1i(0x0f0f0f0f));
    return _mm512_shuffle_epi8(table, nibbles);
  }
};

// --- activations as digits --------------------------------------------------------------------------

// A prepared block, by 32-bit words: for each vector of weights its vectors of digits, the greatest first; for
// each, what the weights' offset has added to the products of the two greatest, by lanes; sixteen sums; then,
// sixteen times, the unit.
template <int digits>
struct Words {
  static constexpr int kDigits = 16 * digits;  // of one vector of weights
  static constexpr int kExcess = 4 * kDigits, kSums = kExcess + 64, kUnit = kSums + 16, kCount = kUnit + 16;
};

template <int digits>
static int64_t prepared_floats(int64_t elements) {
  return elements / kElements * Words<digits>::kCount + elements % kElements;
}

// What the 256 x are to be multiples of: NaN if one is not finite. For four digits a power of two, so that
// dividing by it rounds nothing, of which the greatest x makes less than 2^30; for two, 1/32512 (127 x 256) of
// the greatest.
template <int digits>
static float unit_of(const float* x) {
  I greatest = _mm512_setzero_si512();  // magnitudes compare as integers, and NaN is above infinity
  for (int i = 0; i < kElements; i += 16) {
    const I magnitude = Simd::and_(_mm512_castps_si512(Simd::load(x + i)), Simd::set1i(0x7fffffff));
    greatest = _mm512_max_epi32(greatest, magnitude);
  }
  int32_t bits = _mm512_reduce_max_epi32(greatest);
  if (digits == 4) bits &= 0x7f800000;
  float most;
  std::memcpy(&most, &bits, sizeof(most));
  if (bits >= 0x7f800000) return __builtin_nanf("");
  constexpr float part = digits == 4 ? 0x1p-29f : 1.0f / 32512, least = 0x1p-126f;  // a normal number
  return most * part > least ? most * part : least;
}

// Sixteen x as whole numbers whose bytes are signed digits, the least in the lowest.
static SCARLET_INLINE I digits_of(F x, float inverse) {
  const I whole = _mm512_cvtps_epi32(Simd::mul(x, Simd::set1(inverse)));
  const I carries = Simd::set1i(0x00808080);  // a digit of 128 and above is 256 less, and one carried
  return _mm512_xor_si512(Simd::add(whole, carries), carries);
}

// Weights times two digits, the greater first, summed by lanes.
static SCARLET_INLINE I two_digits(I weights, const float* x) {
  const I first = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, _mm512_loadu_si512(x));
  return _mm512_dpbusd_epi32(Simd::shl(first, 8), weights, _mm512_loadu_si512(x + 16));
}

template <class T, int digits>
static void write_digits(const float* x, float unit, float* out) {
  const float inverse = unit == unit ? 1 / unit : 0;
  float ordered[kElements];
  for (int i = 0; i < kElements; i++) ordered[i] = x[kOrder<T>.element[i / 64 * 64 + i % 4 * 16 + i % 64 / 4]];
  uint8_t* to = reinterpret_cast<uint8_t*>(out);
  for (int i = 0; i < kElements; i += 16) {
    const I words = digits_of(Simd::load(ordered + i), inverse);
    SCARLET_UNROLL for (int n = 0; n < digits; n++) {
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32(words, 8 * (digits - 1 - n)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (i / 64 * digits + n) * 64 + i % 64), bytes);
    }
  }
}

// The excess of the two greatest digits, a whole number, is taken from the products before they are rounded;
// that of the others, 2^-16 of it, with the sums.
template <class T, int digits>
static void write_excess(float unit, float* out) {
  const I offsets = _mm512_set1_epi8(static_cast<char>(T::kOffset));
  for (int v = 0; v < 4; v++) {
    const float* x = out + v * Words<digits>::kDigits;
    _mm512_storeu_si512(out + Words<digits>::kExcess + 16 * v, two_digits(offsets, x));
    if constexpr (digits == 4) {
      float lesser[16];
      Simd::store(lesser, Simd::to_float(two_digits(offsets, x + 32)));
      float* sums = out + Words<digits>::kSums;
      for (int lane = 0; lane < 16; lane++) sums[kOrder<T>.group[v][lane]] -= unit * lesser[lane];
    }
  }
}

template <class T, int digits>
static void prepare_block(const float* x, float* out) {
  const float unit = unit_of<digits>(x);
  write_digits<T, digits>(x, unit, out);
  float* sums = out + Words<digits>::kSums;
  for (int i = 0; i < 16; i++) sums[i] = 0;
  if constexpr (T::kOffset != 0) {
    write_excess<T, digits>(unit, out);
  } else {
    for (int i = 0; i < kElements / T::kSumOf; i++) {
      F sum = Simd::zero();
      for (int k = 0; k < T::kSumOf; k += 16) sum = Simd::add(sum, Simd::load(x + i * T::kSumOf + k));
      sums[T::kSumsFrom + i] = T::kSumBy * Simd::sum(sum);
    }
  }
  for (int i = 0; i < 16; i++) out[Words<digits>::kUnit + i] = unit;
}

// What is beyond the last whole block stays as it is.
template <class T, int digits>
static void prepare(const float* x, int64_t elements, float* out) {
  int64_t left = elements;
  for (; left >= kElements; left -= kElements, x += kElements, out += Words<digits>::kCount) {
    prepare_block<T, digits>(x, out);
  }
  std::memcpy(out, x, left * sizeof(float));
}

// --- the product ------------------------------------------------------------------------------------

// The v-th vector of weights times all digits, summed by lanes, in units.
template <class T, int digits>
static SCARLET_INLINE F dot_vector(I weights, int v, const float* x) {
  const float* own = x + v * Words<digits>::kDigits;
  I greater = two_digits(weights, own);
  if constexpr (T::kOffset != 0) {
    greater = _mm512_sub_epi32(greater, _mm512_loadu_si512(x + Words<digits>::kExcess + 16 * v));
  }
  if constexpr (digits == 2) return Simd::to_float(greater);
  return Simd::fma(Simd::to_float(greater), Simd::set1(65536), Simd::to_float(two_digits(weights, own + 32)));
}

// A block of weights times M rows of prepared x: adds to their sums.
template <class T, int digits, int M>
static SCARLET_INLINE void dot_block(const uint8_t* b, const float* const* x, Sums<1, M>& sums) {
  const F scales = T::scales(b);
  F scaled[M];
  SCARLET_UNROLL for (int m = 0; m < M; m++) {
    scaled[m] = Simd::mul(scales, Simd::load(x[m] + Words<digits>::kUnit));
  }
  SCARLET_UNROLL for (int v = 0; v < 4; v++) {
    const I weights = Simd::kept(T::bytes(b, v)), group = _mm512_load_si512(kOrder<T>.group[v]);
    SCARLET_UNROLL for (int m = 0; m < M; m++) {
      F& sum = sums.of[0][m][v % 2];
      sum = Simd::fma(_mm512_permutexvar_ps(group, scaled[m]), dot_vector<T, digits>(weights, v, x[m]), sum);
    }
  }
  if constexpr (T::kOffset != 0 ? digits == 2 : T::kSumBy == 0) return;
  const F of_sums = T::kOffset != 0 ? scales : T::minimums(b, scales);
  SCARLET_UNROLL for (int m = 0; m < M; m++) {
    sums.of[0][m][0] = Simd::fma(of_sums, Simd::load(x[m] + Words<digits>::kSums), sums.of[0][m][0]);
  }
}

constexpr int kAhead = 4096;  // bytes from the block being multiplied to the one being asked for

template <class B, class T, int digits, int M>
static void multiply_rows(const Product& p) {
  const int64_t stride = p.elements * B::kBytes / B::kElements;
  const int64_t blocks = p.elements / kElements;
  const auto nth = [&](int m) { return m < p.count ? m : p.count - 1; };  // as in regimes.h
  for (int64_t row = 0; row < p.rows; row++) {
    const uint8_t* w[1] = {p.w + row * stride};
    const float* x[M];
    for (int m = 0; m < M; m++) x[m] = p.x[nth(m)];
    Sums<1, M> sums;
    for (int64_t i = 0; i < blocks; i++) {
      SCARLET_UNROLL for (int line = 0; line < T::kBytes; line += 64) Simd::prefetch(w[0] + kAhead + line);
      dot_block<T, digits>(w[0], x, sums);
      w[0] += T::kBytes;
      SCARLET_UNROLL for (int m = 0; m < M; m++) x[m] += Words<digits>::kCount;
    }
    if constexpr (B::kElements < kElements) {
      dot_rows<B, 1, M>(w, x, p.elements - blocks * kElements, sums);
    }
    SCARLET_UNROLL for (int m = 0; m < M; m++) p.y[nth(m)][row] = sums.total(0, m);
  }
}

template <class B, class T, int digits>
static void multiply_few(const Product& p, float*) {
  if (p.count == 1) return multiply_rows<B, T, digits, 1>(p);
  if constexpr (digits == 2) {
    if (p.count == 2) return multiply_rows<B, T, digits, 2>(p);
    multiply_rows<B, T, digits, 4>(p);
  }
}

template <class D, int digits>
struct By {
  static constexpr PrepareFn kPrepare = nullptr;
  static constexpr MultiplyFn kMultiply = nullptr;
};
#define SCARLET_DIGITS(name, elements, bytes, ...)                                   \
  template <int digits>                                                              \
  struct By<Block<name, elements, bytes>, digits> {                                  \
    using B = Block<name, elements, bytes>;                                          \
    static constexpr PrepareFn kPrepare = prepare<__VA_ARGS__, digits>;              \
    static constexpr MultiplyFn kMultiply = multiply_few<B, __VA_ARGS__, digits>;    \
  };
SCARLET_DIGITS(Q4_0, 32, 18, Masked<planar::Q4_0, 15, 8>)
SCARLET_DIGITS(Q4_1, 32, 20, Masked<planar::Q4_1, 15>)
SCARLET_DIGITS(Q5_0, 32, 22, Masked<planar::Q5_0, 31, 16>)
SCARLET_DIGITS(Q5_1, 32, 24, Masked<planar::Q5_1, 31>)
SCARLET_DIGITS(Q8_0, 32, 34, Signed<planar::Q8_0, 128>)
SCARLET_DIGITS(Q2_K, 256, 84, Masked<planar::Q2_K, 3>)
SCARLET_DIGITS(Q3_K, 256, 110, Masked<planar::Q3_K, 7, 4>)
SCARLET_DIGITS(Q4_K, 256, 144, Masked<planar::Q4_K, 15>)
SCARLET_DIGITS(Q5_K, 256, 176, Masked<planar::Q5_K, 31>)
SCARLET_DIGITS(Q6_K, 256, 210, Masked<planar::Q6_K, 63, 32, 16>)
SCARLET_DIGITS(IQ1_S, 256, 50, Signed<planar::IQ1_S, 16>)
SCARLET_DIGITS(IQ1_M, 256, 56, Signed<planar::IQ1_M, 16>)
SCARLET_DIGITS(IQ2_XXS, 256, 66, Signed<planar::IQ2_XXS, 64>)
SCARLET_DIGITS(IQ2_XS, 256, 74, Signed<planar::IQ2_XS, 64>)
SCARLET_DIGITS(IQ2_S, 256, 82, Signed<planar::IQ2_S, 64>)
SCARLET_DIGITS(IQ3_XXS, 256, 98, Signed<planar::IQ3_XXS, 64>)
SCARLET_DIGITS(IQ3_S, 256, 110, Signed<planar::IQ3_S, 16>)
SCARLET_DIGITS(IQ4_NL, 32, 18, Table<planar::IQ4_NL, Iq4>)
SCARLET_DIGITS(IQ4_XS, 256, 136, Table<planar::IQ4_XS, Iq4>)
SCARLET_DIGITS(TQ1_0, 256, 54, Masked<planar::TQ1_0, 3, 1, 256>)
SCARLET_DIGITS(TQ2_0, 256, 66, Masked<planar::TQ2_0, 3, 1>)
SCARLET_DIGITS(MXFP4, 32, 17, Table<planar::MXFP4, E2m1>)
SCARLET_DIGITS(NVFP4, 64, 36, Table<planar::NVFP4, E2m1, 16>)
#undef SCARLET_DIGITS

template <int digits>
static constexpr Digits kDigits = {
#define SCARLET_BLOCK(name, elements, bytes) By<Block<name, elements, bytes>, digits>::kPrepare,
    {SCARLET_QTYPES(SCARLET_BLOCK)},
#undef SCARLET_BLOCK
#define SCARLET_BLOCK(name, elements, bytes) By<Block<name, elements, bytes>, digits>::kMultiply,
    {SCARLET_QTYPES(SCARLET_BLOCK)},
#undef SCARLET_BLOCK
    prepared_floats<digits>,
    digits == 4 ? 1 : kFewRows,
};

}  // namespace digits
}  // namespace avx512vnni

const Kernels& kernels_avx512vnni() {
  static const Kernels table = [] {
    Kernels kernels = kernels_avx512();
    kernels.isa = "avx512vnni";
    kernels.four_digits = &avx512vnni::digits::kDigits<4>;
    kernels.two_digits = &avx512vnni::digits::kDigits<2>;
    return kernels;
  }();
  return table;
}

}  // namespace scarlet
