#include "fixed.h"

#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "simd_avx512.h"

namespace scarlet {
namespace avx512vnni {
using avx512::Simd;
#include "decoders.h"
#include "regimes.h"
#include "planar_avx512.h"

namespace fixed {
using planar::kElements;

// --- weights as bytes -------------------------------------------------------------------------------

// A type's quants are its values plus kOffset, bytes without a sign, in the order of its planes
// (planar_avx512.h); in some sub-blocks a multiple of that, `unit(group)`.
template <class T>
struct Bytes : T {
  static constexpr float unit(int) { return 1; }
};

template <class T, int mask, int offset = 0>
struct Masked : Bytes<T> {
  static constexpr int kOffset = offset;
  static SCARLET_INLINE I bytes(const uint8_t* b, int v) {
    return Simd::and_(T::plane(T::quants(b, v), v, 0), Simd::set1i(mask * 0x01010101));
  }
};

template <class T, int offset>
struct Signed : Bytes<T> {
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
template <class T, class Book>
struct Table : Bytes<T> {
  static constexpr int kOffset = Book::kOffset;
  static SCARLET_INLINE I bytes(const uint8_t* b, int v) {
    const __m128i whole = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(Book::values()));
    const I table = _mm512_broadcast_i32x4(_mm_add_epi8(whole, _mm_set1_epi8(static_cast<char>(kOffset))));
    const I nibbles = Simd::and_(T::plane(T::quants(b, v), v, 0), Simd::set1i(0x0f0f0f0f));
    return _mm512_shuffle_epi8(table, nibbles);
  }
};

// Bits above others in a byte are as good where they are, so many times as large. Then lanes that share bytes can
// see a sub-block each, in four vectors, and nothing is shifted; all that moves is packed.
static SCARLET_INLINE I by_lane(int a, int b, int c, int d) { return _mm512_set4_epi32(d, c, b, a); }

// The four lanes of each 128 bits, `by` of them further down.
static SCARLET_INLINE I turned(I x, int by) {
  switch (by) {
    case 1: return _mm512_shuffle_epi32(x, _MM_PERM_ADCB);
    case 2: return _mm512_shuffle_epi32(x, _MM_PERM_BADC);
    case 3: return _mm512_shuffle_epi32(x, _MM_PERM_CBAD);
    default: return x;
  }
}

// 32 bytes are two sub-blocks. Of each 128 bits the first half are lower nibbles, the second upper ones.
struct Q4_K : planar::Q4_K {
  static constexpr int kOffset = 0;
  static constexpr float unit(int group) { return group % 2 == 0 ? 1 : 16; }
  static SCARLET_INLINE I bytes(const uint8_t* b, int v) {
    const I first = quants(b, 0), second = quants(b, 2);
    const I half = v % 2 == 0 ? _mm512_shuffle_i32x4(first, second, 0x88) : _mm512_shuffle_i32x4(first, second, 0xdd);
    return Simd::and_(turned(half, v / 2 * 2), by_lane(0x0f0f0f0f, 0x0f0f0f0f, kUpper, kUpper));
  }
  static constexpr int element(int v, int n) {
    const int pair = n / 16, lane = n / 4 % 4, place = (lane + v / 2 * 2) % 4;
    return pair * 64 + lane / 2 * 32 + v % 2 * 16 + place * 4 + n % 4;
  }
  static constexpr int group(int v, int lane) { return element(v, 4 * lane) / 32; }

 private:
  static constexpr int kUpper = ~0x0f0f0f0f;
};

// 16 bytes are four sub-blocks. The lanes of each 128 bits are pairs of bits, the lowest first.
struct Q2_K : planar::Q2_K {
  static constexpr int kOffset = 0;
  static constexpr float unit(int group) { return static_cast<float>(1 << group / 2 % 4 * 2); }
  static SCARLET_INLINE I bytes(const uint8_t* b, int v) {
    const I pairs = by_lane(0x03030303, 0x0c0c0c0c, 0x30303030, ~0x3f3f3f3f);
    return Simd::and_(turned(quants(b, 0), v), pairs);
  }
  static constexpr int element(int v, int n) {
    const int sixteen = n / 16, pair = n / 4 % 4, place = (pair + v) % 4;
    return sixteen / 2 * 128 + pair * 32 + sixteen % 2 * 16 + place * 4 + n % 4;
  }
  static constexpr int group(int v, int lane) { return element(v, 4 * lane) / 16; }
};

// --- quads ------------------------------------------------------------------------------------------

constexpr int kQuads = kElements / 4;  // four elements that follow one another: a lane's, of one instruction

// Where the quads of a block stand, sub-block by sub-block.
template <class T>
struct Order {
  int a_group = 0;           // quads of a sub-block
  uint8_t place[kQuads] = {};   // of the quad that is lane % 16 of vector / 16 among the planes
  uint8_t source[kQuads] = {};  // the first element / 4 of the quad at a place

  constexpr Order() {
    for (int quad = 0; quad < kQuads; quad++) a_group += T::group(quad / 16, quad % 16) == 0;
    int filled[kQuads] = {};
    for (int quad = 0; quad < kQuads; quad++) {
      const int group = T::group(quad / 16, quad % 16), at = group * a_group + filled[group]++;
      place[quad] = static_cast<uint8_t>(at);
      source[at] = static_cast<uint8_t>(T::element(quad / 16, quad % 16 * 4) / 4);
    }
  }
};
template <class T>
static constexpr Order<T> kOrder{};
template <class T>
static constexpr int kGroups = kQuads / kOrder<T>.a_group;

// --- activations ------------------------------------------------------------------------------------

// The greatest whole number of P planes, whose digits, to base 256 and with a sign, are at most 127; with room
// for the rounding of the largest.
template <int P>
constexpr int kMost = P == kFastPlanes ? 0x7f : 0x7f7f00;
template <int P>
constexpr int kBias = P == kFastPlanes ? 0x80 : 0x808080;  // makes digits bytes without a sign

// 256 elements of x in whole numbers, as they come: a row of digits a plane, the highest first; by sub-block,
// the scale and each plane's sum.
template <class T, int P>
struct Whole {
  int8_t digits[P][kElements];
  float scales[kGroups<T>];
  int32_t sums[P][kGroups<T>];

  // A sub-block's sum of x / scale.
  float sum(int group) const {
    int64_t total = 0;
    for (int p = 0; p < P; p++) total = 256 * total + sums[p][group];
    return static_cast<float>(total);
  }
};

// The greatest magnitude of `size` elements; NaN if one of them is not finite.
static float greatest(const float* x, int size) {
  I largest = _mm512_setzero_si512();  // magnitudes compare as integers, and NaN is then above infinity
  for (int i = 0; i < size; i += 16) {
    const I magnitude = Simd::and_(_mm512_castps_si512(Simd::load(x + i)), Simd::set1i(0x7fffffff));
    largest = _mm512_max_epi32(largest, magnitude);
  }
  const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
  return most - most == 0 ? most : std::numeric_limits<float>::quiet_NaN();
}

template <class T, int P>
static void round_group(const float* x, int group, Whole<T, P>* to) {
  constexpr int size = 4 * kOrder<T>.a_group;
  const int first = group * size;
  constexpr float least = 0x1p-120f;  // normal, also when it is divided by a unit, and its inverse finite
  const float most = greatest(x + first, size), scale = most / kMost<P> < least ? least : most / kMost<P>;
  const F inverse = Simd::set1(scale == scale ? 1 / scale : 0);
  for (int i = first; i < first + size; i += 16) {
    const I whole = _mm512_cvtps_epi32(Simd::mul(Simd::load(x + i), inverse));
    const I bytes = Simd::add(whole, Simd::set1i(kBias<P>));
    SCARLET_UNROLL for (int p = 0; p < P; p++) {
      const __m128i unsigned_digits = _mm512_cvtepi32_epi8(Simd::shr(bytes, 8 * (P - 1 - p)));
      const __m128i digits = _mm_xor_si128(unsigned_digits, _mm_set1_epi8(-128));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to->digits[p] + i), digits);
    }
  }
  to->scales[group] = scale;
  for (int p = 0; p < P; p++) {
    to->sums[p][group] = 0;
    for (int i = first; i < first + size; i++) to->sums[p][group] += to->digits[p][i];
  }
}

template <class T, int P>
static Whole<T, P> round_block(const float* x) {
  Whole<T, P> whole;
  for (int g = 0; g < kGroups<T>; g++) round_group<T, P>(x, g, &whole);
  return whole;
}

// --- weights, sixteen rows abreast ------------------------------------------------------------------

// A block of each of sixteen rows: their quads in order, a row a lane; factors and minimums likewise.
template <class T>
struct Strip {
  I quads[kQuads];
  F factors[kGroups<T>];
  F minimums[T::kSumBy != 0 ? kGroups<T> : 1];
};

// rows[r][lane] -> rows[lane][r].
static SCARLET_INLINE void transpose(I* rows) {
  I a[16], b[16];
  SCARLET_UNROLL for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  SCARLET_UNROLL for (int i = 0; i < 16; i += 4) {
    SCARLET_UNROLL for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  }
  SCARLET_UNROLL for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  SCARLET_UNROLL for (int i = 0; i < 8; i++) {
    rows[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
  }
}

static SCARLET_INLINE void transpose(F* rows) {
  I whole[16];
  SCARLET_UNROLL for (int i = 0; i < 16; i++) whole[i] = _mm512_castps_si512(rows[i]);
  transpose(whole);
  SCARLET_UNROLL for (int i = 0; i < 16; i++) rows[i] = _mm512_castsi512_ps(whole[i]);
}

template <class T>
static void decode_strip(const uint8_t* const* blocks, Strip<T>* strip) {
  for (int v = 0; v < 4; v++) {
    I rows[16];
    for (int r = 0; r < 16; r++) rows[r] = T::bytes(blocks[r], v);
    transpose(rows);
    for (int lane = 0; lane < 16; lane++) strip->quads[kOrder<T>.place[v * 16 + lane]] = rows[lane];
  }
  F factors[16];
  for (int r = 0; r < 16; r++) factors[r] = T::scales(blocks[r]);
  if constexpr (T::kSumBy != 0) {
    F minimums[16];
    for (int r = 0; r < 16; r++) minimums[r] = T::minimums(blocks[r], factors[r]);
    transpose(minimums);
    for (int g = 0; g < kGroups<T>; g++) strip->minimums[g] = minimums[T::kSumsFrom + g];
  }
  transpose(factors);
  for (int g = 0; g < kGroups<T>; g++) strip->factors[g] = factors[g];
}

// --- many rows of x ---------------------------------------------------------------------------------

// 256 elements of x: digits, their quads in order; then, of each sub-block, the scale, and what its sum of
// whole numbers adds to the products: an offset's share, a plane, or what a minimum is to multiply.
template <class T, int P>
struct Rounded {
  int8_t digits[P][kElements];
  float scales[kGroups<T>];
  union {
    int32_t offsets[P][kGroups<T>];
    float sums[kGroups<T>];
  };
};

template <class T, int P>
static Rounded<T, P> rounded_block(const float* x) {
  const Whole<T, P> whole = round_block<T, P>(x);
  Rounded<T, P> block;
  for (int g = 0; g < kGroups<T>; g++) {
    block.scales[g] = whole.scales[g] / T::unit(g);
    if constexpr (T::kSumBy != 0) {
      block.sums[g] = T::kSumBy * whole.scales[g] * whole.sum(g);
    } else {
      for (int p = 0; p < P; p++) block.offsets[p][g] = -T::kOffset * whole.sums[p][g];
    }
  }
  for (int i = 0; i < P * kQuads; i++) {
    const int p = i / kQuads, quad = i % kQuads;
    std::memcpy(block.digits[p] + 4 * quad, whole.digits[p] + 4 * kOrder<T>.source[quad], 4);
  }
  return block;
}

// The m-th of `count` rows: a block of each row after another, then the next block of each.
template <class T, int P>
static void round_row(const float* x, int64_t elements, int64_t m, int64_t count, uint8_t* to) {
  Rounded<T, P>* block = reinterpret_cast<Rounded<T, P>*>(to) + m;
  for (int64_t k = 0; k < elements; k += kElements, block += count) *block = rounded_block<T, P>(x + k);
}

// Sums of digits, the highest plane first, as floats.
template <int P>
static SCARLET_INLINE F joined(const I* sums) {
  if constexpr (P == kFastPlanes) return Simd::to_float(sums[0]);
  const I lower = Simd::add(Simd::shl(sums[1], 8), sums[2]);
  return Simd::fma(Simd::to_float(sums[0]), Simd::set1(65536), Simd::to_float(lower));
}

// Blocking: two decoded strips (12 KiB or less) stay in the first level of cache while kBatch rows of x, a
// block of each (0.5 MiB or less), come by from the second, where they stay for all the rows of a task.
constexpr int kStrips = 2;  // decoded and multiplied at a time
constexpr int kTileM = 4;   // rows of x at a time
constexpr int kBatch = 512;
constexpr int kScratchFloats = 16 * (kQuads + 2 * 16);  // of a strip with the most sub-blocks

// M rows of x times S strips: y, a row of x and of 16 S weights each.
template <class T, int P, int S, int M>
static SCARLET_INLINE void tile(const Rounded<T, P>* x, const Strip<T>* strips, F (*y)[S]) {
  SCARLET_UNROLL for (int i = 0; i < M * S; i++) y[i / S][i % S] = Simd::zero();
  for (int g = 0; g < kGroups<T>; g++) {
    I sums[M][S][P];
    SCARLET_UNROLL for (int i = 0; i < M * S * P; i++) {
      const int m = i / (S * P), p = i % P;
      sums[m][i / P % S][p] = T::kSumBy != 0 ? _mm512_setzero_si512() : Simd::set1i(x[m].offsets[p][g]);
    }
    const int first = g * kOrder<T>.a_group;
    SCARLET_UNROLL for (int quad = first; quad < first + kOrder<T>.a_group; quad++) {
      I w[S];
      SCARLET_UNROLL for (int s = 0; s < S; s++) w[s] = strips[s].quads[quad];
      SCARLET_UNROLL for (int i = 0; i < M * P; i++) {
        const int m = i / P, p = i % P;
        const I four = Simd::set1i(read<int32_t>(reinterpret_cast<const uint8_t*>(x[m].digits[p]) + 4 * quad));
        SCARLET_UNROLL for (int s = 0; s < S; s++) {
          sums[m][s][p] = _mm512_dpbusd_epi32(sums[m][s][p], w[s], four);
        }
      }
    }
    SCARLET_UNROLL for (int m = 0; m < M; m++) {
      const F scale = Simd::set1(x[m].scales[g]);
      SCARLET_UNROLL for (int s = 0; s < S; s++) {
        y[m][s] = Simd::fma(Simd::mul(joined<P>(sums[m][s]), strips[s].factors[g]), scale, y[m][s]);
        if constexpr (T::kSumBy != 0) {
          y[m][s] = Simd::fma(strips[s].minimums[g], Simd::set1(x[m].sums[g]), y[m][s]);
        }
      }
    }
  }
}

// M rows of results of up to 16 S rows of weights: stored, or added to what is there.
template <int S, int M>
static SCARLET_INLINE void put(const F (*sums)[S], float* const* y, int64_t rows, bool first) {
  SCARLET_UNROLL for (int s = 0; s < S; s++) {
    const int64_t left = rows - 16 * s;
    const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    SCARLET_UNROLL for (int m = 0; m < M; m++) {
      float* to = y[m] + 16 * s;
      const F before = first ? Simd::zero() : _mm512_maskz_loadu_ps(mask, to);
      _mm512_mask_storeu_ps(to, mask, Simd::add(before, sums[m][s]));
    }
  }
}

// A block of rows first ... end - 1 of x times that of up to 16 S rows of weights, those from `row` on.
template <class T, int P, int S>
static void multiply_strips(const Rounded<T, P>* x, int64_t first, int64_t end, const Strip<T>* strips,
                            const Product& p, int64_t row, bool fresh) {
  const auto several = [&](int64_t m, auto count) {
    constexpr int M = decltype(count)::value;
    float* y[M];
    for (int i = 0; i < M; i++) y[i] = p.y[m + i] + row;
    F sums[M][S];
    tile<T, P, S, M>(x + m, strips, sums);
    put<S, M>(sums, y, p.rows - row, fresh);
  };
  int64_t m = first;
  for (; m + kTileM <= end; m += kTileM) several(m, std::integral_constant<int, kTileM>());
  for (; m < end; m++) several(m, std::integral_constant<int, 1>());
}

template <class T, int P>
static void multiply(const Product& p, const uint8_t* rounded, float* scratch) {
  static_assert(sizeof(Strip<T>) <= kScratchFloats * sizeof(float), "what the scratch is for");
  const int64_t blocks = p.elements / kElements, row_bytes = blocks * T::kBytes;
  const Rounded<T, P>* const x = reinterpret_cast<const Rounded<T, P>*>(rounded);
  Strip<T>* const strips = reinterpret_cast<Strip<T>*>(scratch);
  for (int64_t first = 0; first < p.count; first += kBatch) {
    const int64_t end = p.count - first < kBatch ? p.count : first + kBatch;
    for (int64_t b = 0; b < blocks; b++) {
      for (int64_t row = 0; row < p.rows; row += 16 * kStrips) {
        for (int s = 0; s < kStrips; s++) {
          const uint8_t* w[16];
          for (int r = 0; r < 16; r++) {
            const int64_t wanted = row + 16 * s + r, at = wanted < p.rows ? wanted : p.rows - 1;
            w[r] = p.w + at * row_bytes + b * T::kBytes;
          }
          decode_strip<T>(w, strips + s);
        }
        const auto multiply_them = p.rows - row > 16 ? multiply_strips<T, P, 2> : multiply_strips<T, P, 1>;
        multiply_them(x + b * p.count, first, end, strips, p, row, b == 0);
      }
    }
  }
}

// --- a few rows of x --------------------------------------------------------------------------------

// Four vectors of weights are merged, so that each lane sees one sub-block alone, the same in all four, and
// their products need one factor. Ways to do it, the cheapest first: what comes to lane `lane` of the `to`-th.
struct Source {
  int vector, lane;
};

struct AsTheyAre {
  static constexpr Source from(int to, int lane) { return {to, lane}; }
  static SCARLET_INLINE void merge(I*) {}
};

struct PairsOf64 {  // within each 128 bits, the lower or upper halves of vectors i and i + 2
  static constexpr Source from(int to, int lane) {
    return {to / 2 + lane % 4 / 2 * 2, lane / 4 * 4 + to % 2 * 2 + lane % 2};
  }
  static SCARLET_INLINE void merge(I* w) {
    const I a[4] = {w[0], w[1], w[2], w[3]};
    SCARLET_UNROLL for (int i = 0; i < 2; i++) {
      w[2 * i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
      w[2 * i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    }
  }
};

struct PairsOf32 {  // within each 128 bits, the even or odd lanes of vectors i and i + 2
  static constexpr Source from(int to, int lane) {
    return {to / 2 + lane % 4 / 2 * 2, lane / 4 * 4 + lane % 2 * 2 + to % 2};
  }
  static SCARLET_INLINE void merge(I* w) {
    const F a[4] = {_mm512_castsi512_ps(w[0]), _mm512_castsi512_ps(w[1]), _mm512_castsi512_ps(w[2]),
                    _mm512_castsi512_ps(w[3])};
    SCARLET_UNROLL for (int i = 0; i < 2; i++) {
      w[2 * i] = _mm512_castps_si512(_mm512_shuffle_ps(a[i], a[i + 2], 0x88));
      w[2 * i + 1] = _mm512_castps_si512(_mm512_shuffle_ps(a[i], a[i + 2], 0xdd));
    }
  }
};

struct FoursOf64 {  // the i-th 64 bits of each half of each vector
  static constexpr Source from(int to, int lane) {
    return {lane / 8 * 2 + lane / 2 % 2, lane / 4 % 2 * 8 + to * 2 + lane % 2};
  }
  static SCARLET_INLINE void merge(I* w) {
    I a[4];
    SCARLET_UNROLL for (int i = 0; i < 2; i++) {
      a[i] = _mm512_unpacklo_epi64(w[2 * i], w[2 * i + 1]);
      a[i + 2] = _mm512_unpackhi_epi64(w[2 * i], w[2 * i + 1]);
    }
    SCARLET_UNROLL for (int i = 0; i < 2; i++) {
      w[i] = _mm512_shuffle_i32x4(a[2 * i], a[2 * i + 1], 0x88);
      w[i + 2] = _mm512_shuffle_i32x4(a[2 * i], a[2 * i + 1], 0xdd);
    }
  }
};

struct FoursOf32 {  // within each 128 bits, the i-th lane of each vector
  static constexpr Source from(int to, int lane) { return {lane % 4, lane / 4 * 4 + to}; }
  static SCARLET_INLINE void merge(I* w) {
    I a[4];
    SCARLET_UNROLL for (int i = 0; i < 2; i++) {
      a[i] = _mm512_unpacklo_epi32(w[2 * i], w[2 * i + 1]);
      a[i + 2] = _mm512_unpackhi_epi32(w[2 * i], w[2 * i + 1]);
    }
    SCARLET_UNROLL for (int i = 0; i < 2; i++) {
      w[2 * i] = _mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]);
      w[2 * i + 1] = _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]);
    }
  }
};

// Where each quad of vectors merged that way comes from, and the sub-block of each lane.
template <class T, class Way>
struct Merged {
  uint8_t source[kQuads] = {};  // the first element / 4 of the quad at to * 16 + lane
  alignas(64) int32_t group[16] = {};
  bool apart = true;  // whether each lane sees one sub-block

  constexpr Merged() {
    for (int i = 0; i < kQuads; i++) {
      const Source from = Way::from(i / 16, i % 16);
      source[i] = static_cast<uint8_t>(T::element(from.vector, 4 * from.lane) / 4);
      const int own = T::group(from.vector, from.lane);
      if (i < 16) group[i] = own;
      apart = apart && group[i % 16] == own;
    }
  }
};

template <class T, class First, class... More>
static constexpr auto first_apart() {
  if constexpr (Merged<T, First>().apart) {
    return First();
  } else {
    return first_apart<T, More...>();
  }
}
template <class T>
using Merge = decltype(first_apart<T, AsTheyAre, PairsOf64, PairsOf32, FoursOf64, FoursOf32>());
template <class T>
static constexpr Merged<T, Merge<T>> kMerged{};

// 256 elements of x for merged weights: digits; by lane the scale, and an offset's share, a plane; or, in the
// lanes of minimums, sums.
template <int P>
struct Prepared {
  int8_t digits[P][kElements];
  float scales[16];
  union {
    int32_t offsets[P][16];
    float sums[16];
  };
};

template <class T, int P>
static void prepare(const float* x, int64_t elements, float* out) {
  Prepared<P>* block = reinterpret_cast<Prepared<P>*>(out);
  for (int64_t k = 0; k < elements; k += kElements, block++) {
    const Whole<T, P> whole = round_block<T, P>(x + k);
    std::memset(block->offsets, 0, sizeof(block->offsets));
    for (int lane = 0; lane < 16; lane++) {
      const int group = kMerged<T>.group[lane];
      block->scales[lane] = whole.scales[group] / T::unit(group);
    }
    for (int i = 0; i < P * kQuads; i++) {
      const int p = i / kQuads, quad = i % kQuads;
      const int8_t* four = whole.digits[p] + 4 * kMerged<T>.source[quad];
      std::memcpy(block->digits[p] + 4 * quad, four, 4);
      if constexpr (T::kSumBy == 0) {
        block->offsets[p][quad % 16] -= T::kOffset * (four[0] + four[1] + four[2] + four[3]);
      }
    }
    if constexpr (T::kSumBy != 0) {
      for (int g = 0; g < kGroups<T>; g++) {
        block->sums[T::kSumsFrom + g] = T::kSumBy * whole.scales[g] * whole.sum(g);
      }
    }
  }
}

// Blocks of R rows of weights times M of x, in whole numbers of P planes (see planar::InFloats).
template <class T, int P>
struct InWholes {
  using Type = T;
  static constexpr int kPrepared = sizeof(Prepared<P>) / sizeof(float);
  template <int M>
  static constexpr int kAbreast = M == 1 && T::kAbreast > 2 ? T::kAbreast : 2;

  template <int R, int M>
  static SCARLET_INLINE void dot(const uint8_t* const* b, const float* const* x, Sums<R, M>& sums) {
    I w[R][4];
    F factors[R], minimums[R];
    SCARLET_UNROLL for (int r = 0; r < R; r++) {
      const F by_group = T::scales(b[r]);
      factors[r] = _mm512_permutexvar_ps(_mm512_load_si512(kMerged<T>.group), by_group);
      minimums[r] = T::minimums(b[r], by_group);
      SCARLET_UNROLL for (int v = 0; v < 4; v++) w[r][v] = T::bytes(b[r], v);
      Merge<T>::merge(w[r]);
    }
    SCARLET_UNROLL for (int m = 0; m < M; m++) {
      const Prepared<P>& own = *reinterpret_cast<const Prepared<P>*>(x[m]);
      I products[R][P];
      multiply_digits<R>(w, own, products);
      SCARLET_UNROLL for (int r = 0; r < R; r++) {
        const F factor = Simd::mul(factors[r], Simd::load(own.scales));
        sums.of[r][m][0] = Simd::fma(joined<P>(products[r]), factor, sums.of[r][m][0]);
        if constexpr (T::kSumBy != 0) {
          constexpr __mmask16 lanes = static_cast<__mmask16>(((1 << kGroups<T>) - 1) << T::kSumsFrom);
          F& sum = sums.of[r][m][1];
          sum = _mm512_mask3_fmadd_ps(minimums[r], Simd::load(own.sums), sum, lanes);
        }
      }
    }
  }
  template <int R, int M>
  static SCARLET_INLINE void rest(const uint8_t**, const float**, int64_t, Sums<R, M>&) {}

 private:
  template <int R>
  static SCARLET_INLINE void multiply_digits(const I (*w)[4], const Prepared<P>& x, I (*products)[P]) {
    SCARLET_UNROLL for (int p = 0; p < P; p++) {
      const I start = T::kSumBy != 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(x.offsets[p]);
      SCARLET_UNROLL for (int r = 0; r < R; r++) products[r][p] = start;
      SCARLET_UNROLL for (int v = 0; v < 4; v++) {
        const I digits = Simd::kept(_mm512_loadu_si512(x.digits[p] + 64 * v));
        SCARLET_UNROLL for (int r = 0; r < R; r++) {
          products[r][p] = _mm512_dpbusd_epi32(products[r][p], w[r][v], digits);
        }
      }
    }
  }
};

template <int P>
static int64_t prepared_floats(int64_t elements) {
  return elements / kElements * static_cast<int64_t>(sizeof(Prepared<P>) / sizeof(float));
}

// --- the table --------------------------------------------------------------------------------------

struct Entry {
  size_t rounded;  // bytes of 256 elements; 0: the type is not covered
  void (*round)(const float* x, int64_t elements, int64_t m, int64_t count, uint8_t* to);
  void (*multiply)(const Product& p, const uint8_t* x, float* scratch);
  FewKernels few;
};

template <class T, int P>
static constexpr Entry of_planes() {
  return {sizeof(Rounded<T, P>),
          round_row<T, P>,
          multiply<T, P>,
          {prepare<T, P>, prepared_floats<P>, planar::multiply_few<InWholes<T, P>>}};
}

template <class T>
static Entry entry(int planes) {
  return planes == kFastPlanes ? of_planes<T, kFastPlanes>() : of_planes<T, kExactPlanes>();
}

static Entry entry_of(QType type, int planes) {
  switch (type) {
    case QType::Q4_0: return entry<Masked<planar::Q4_0, 15, 8>>(planes);
    case QType::Q4_1: return entry<Masked<planar::Q4_1, 15>>(planes);
    case QType::Q5_0: return entry<Masked<planar::Q5_0, 31, 16>>(planes);
    case QType::Q5_1: return entry<Masked<planar::Q5_1, 31>>(planes);
    case QType::Q8_0: return entry<Signed<planar::Q8_0, 128>>(planes);
    case QType::Q2_K: return entry<Q2_K>(planes);
    case QType::Q3_K: return entry<Masked<planar::Q3_K, 7, 4>>(planes);
    case QType::Q4_K: return entry<Q4_K>(planes);
    case QType::Q5_K: return entry<Masked<planar::Q5_K, 31>>(planes);
    case QType::Q6_K: return entry<Masked<planar::Q6_K, 63, 32>>(planes);
    case QType::IQ1_S: return entry<Signed<planar::IQ1_S, 16>>(planes);
    case QType::IQ1_M: return entry<Signed<planar::IQ1_M, 16>>(planes);
    case QType::IQ2_XXS: return entry<Signed<planar::IQ2_XXS, 64>>(planes);
    case QType::IQ2_XS: return entry<Signed<planar::IQ2_XS, 64>>(planes);
    case QType::IQ2_S: return entry<Signed<planar::IQ2_S, 64>>(planes);
    case QType::IQ3_XXS: return entry<Signed<planar::IQ3_XXS, 64>>(planes);
    case QType::IQ3_S: return entry<Signed<planar::IQ3_S, 16>>(planes);
    case QType::IQ4_NL: return entry<Table<planar::IQ4_NL, Iq4>>(planes);
    case QType::IQ4_XS: return entry<Table<planar::IQ4_XS, Iq4>>(planes);
    case QType::TQ1_0: return entry<Masked<planar::TQ1_0, 3, 1>>(planes);
    case QType::TQ2_0: return entry<Masked<planar::TQ2_0, 3, 1>>(planes);
    case QType::MXFP4: return entry<Table<planar::MXFP4, E2m1>>(planes);
    case QType::NVFP4: return entry<Table<planar::NVFP4, E2m1>>(planes);
    default: return {};  // floats; and Q1_0 and Q2_0, whose planes are not of bytes
  }
}

static bool covers(QType type, int64_t elements) {
  return elements % kElements == 0 && entry_of(type, kFastPlanes).rounded > 0;
}
static size_t rounded_bytes(QType type, int planes, int64_t elements) {
  return entry_of(type, planes).rounded * static_cast<size_t>(elements / kElements);
}
static void round(QType type, int planes, const float* x, int64_t elements, int64_t m, int64_t count,
                  uint8_t* to) {
  entry_of(type, planes).round(x, elements, m, count, to);
}
static FewKernels few(QType type, int planes) { return entry_of(type, planes).few; }
static void multiply_by_type(QType type, int planes, const Product& p, const uint8_t* x, float* scratch) {
  entry_of(type, planes).multiply(p, x, scratch);
}

}  // namespace fixed
}  // namespace avx512vnni

static const FixedKernels& fixed_kernels() {
  namespace own = avx512vnni::fixed;
  constexpr size_t scratch = size_t{own::kScratchFloats} * own::kStrips;
  static const FixedKernels table = {own::covers,         own::few,  own::rounded_bytes, own::round,
                                     own::multiply_by_type, scratch};
  return table;
}

const Kernels& kernels_avx512vnni() {
  static const Kernels table = [] {
    Kernels k = kernels_avx512();
    k.isa = "avx512vnni";
    k.fixed = &fixed_kernels();
    return k;
  }();
  return table;
}

}  // namespace scarlet
