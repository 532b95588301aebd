#include "fast.h"

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

namespace fast {
using planar::kElements;

// --- weights as bytes -------------------------------------------------------------------------------

// A type's quants are its values plus kOffset, bytes without a sign, in the order of its planes
// (planar_avx512.h).
template <class T, int mask, int offset = 0>
struct Masked : T {
  static constexpr int kOffset = offset;
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
template <class T, class Book>
struct Table : T {
  static constexpr int kOffset = Book::kOffset;
  static SCARLET_INLINE I bytes(const uint8_t* b, int v) {
    const __m128i whole = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(Book::values()));
    const I table = _mm512_broadcast_i32x4(_mm_add_epi8(whole, _mm_set1_epi8(static_cast<char>(kOffset))));
    const I nibbles = Simd::and_(T::plane(T::quants(b, v), v, 0), Simd::set1i(0x0f0f0f0f));
    return _mm512_shuffle_epi8(table, nibbles);
  }
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

// 256 rounded elements: their quads in order; then, of each sub-block, the scale, and what its sum of quants
// adds to the products: an offset's share in whole numbers, or what a minimum is to multiply.
template <class T>
struct Rounded {
  int8_t quants[kElements];
  float scales[kGroups<T>];
  union {
    int32_t offsets[kGroups<T>];
    float sums[kGroups<T>];
  };
};

// `size` elements, times the inverse of their scale, which is returned; NaN if one is not finite.
static float round_group(const float* x, int size, int8_t* quants, int32_t* sum) {
  I largest = _mm512_setzero_si512();  // magnitudes compare as integers, and NaN is then above infinity
  for (int i = 0; i < size; i += 16) {
    const I magnitude = Simd::and_(_mm512_castps_si512(Simd::load(x + i)), Simd::set1i(0x7fffffff));
    largest = _mm512_max_epi32(largest, magnitude);
  }
  const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
  const bool finite = most - most == 0;
  constexpr float least = 0x1p-126f;  // a normal number, whose inverse is finite
  const float scale = most / 127 > least ? most / 127 : least;
  const F inverse = Simd::set1(finite ? 1 / scale : 0);
  I total = _mm512_setzero_si512();
  for (int i = 0; i < size; i += 16) {
    const I whole = _mm512_cvtps_epi32(Simd::mul(Simd::load(x + i), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quants + i), _mm512_cvtsepi32_epi8(whole));
    total = Simd::add(total, whole);
  }
  *sum = finite ? _mm512_reduce_add_epi32(total) : 0;
  return finite ? scale : most - most;
}

template <class T>
static void round_row(const float* x, int64_t elements, uint8_t* to) {
  constexpr int size = 4 * kOrder<T>.a_group;
  Rounded<T>* block = reinterpret_cast<Rounded<T>*>(to);
  for (int64_t k = 0; k < elements; k += kElements, block++) {
    int8_t quants[kElements];
    for (int g = 0; g < kGroups<T>; g++) {
      int32_t sum;
      block->scales[g] = round_group(x + k + g * size, size, quants + g * size, &sum);
      if constexpr (T::kSumBy != 0) {
        block->sums[g] = T::kSumBy * block->scales[g] * static_cast<float>(sum);
      } else {
        block->offsets[g] = -T::kOffset * sum;
      }
    }
    for (int quad = 0; quad < kQuads; quad++) {
      std::memcpy(block->quants + 4 * quad, quants + 4 * kOrder<T>.source[quad], 4);
    }
  }
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

// --- the product ------------------------------------------------------------------------------------

constexpr int kSpan = 2;    // blocks of k decoded at a time: with two strips, 24 KiB
constexpr int kStrips = 2;  // decoded and multiplied at a time
constexpr int kTileM = 4;   // rows of x at a time
constexpr int kScratchFloats = 16 * (kQuads + 2 * 16);  // of a strip with the most sub-blocks

// M rows of x times S strips over `blocks`, strips of a block together: y, a row of x and of 16 S weights each.
template <class T, int S, int M>
static SCARLET_INLINE void tile(const Rounded<T>* const* x, const Strip<T>* strips, int64_t blocks, F (*y)[S]) {
  SCARLET_UNROLL for (int i = 0; i < M * S; i++) y[i / S][i % S] = Simd::zero();
  for (int64_t b = 0; b < blocks; b++, strips += kStrips) {
    for (int g = 0; g < kGroups<T>; g++) {
      I sum[M][S];
      SCARLET_UNROLL for (int i = 0; i < M * S; i++) {
        sum[i / S][i % S] = T::kSumBy != 0 ? _mm512_setzero_si512() : Simd::set1i(x[i / S][b].offsets[g]);
      }
      const int first = g * kOrder<T>.a_group;
      SCARLET_UNROLL for (int quad = first; quad < first + kOrder<T>.a_group; quad++) {
        I w[S];
        SCARLET_UNROLL for (int s = 0; s < S; s++) w[s] = strips[s].quads[quad];
        SCARLET_UNROLL for (int m = 0; m < M; m++) {
          const uint8_t* own = reinterpret_cast<const uint8_t*>(x[m][b].quants);
          const I four = Simd::set1i(read<int32_t>(own + 4 * quad));
          SCARLET_UNROLL for (int s = 0; s < S; s++) sum[m][s] = _mm512_dpbusd_epi32(sum[m][s], w[s], four);
        }
      }
      SCARLET_UNROLL for (int m = 0; m < M; m++) {
        const F scale = Simd::set1(x[m][b].scales[g]);
        SCARLET_UNROLL for (int s = 0; s < S; s++) {
          y[m][s] = Simd::fma(Simd::to_float(sum[m][s]), Simd::mul(strips[s].factors[g], scale), y[m][s]);
          if constexpr (T::kSumBy != 0) {
            y[m][s] = Simd::fma(strips[s].minimums[g], Simd::set1(x[m][b].sums[g]), y[m][s]);
          }
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

template <class T, int S>
static void multiply_strips(const Rounded<T>* x, int64_t from, int64_t blocks, const Strip<T>* strips,
                            const Product& p, int64_t row) {
  const int64_t rows = p.rows - row < 16 * S ? p.rows - row : 16 * S;
  const auto several = [&](int64_t m, auto count) {
    constexpr int M = decltype(count)::value;
    const Rounded<T>* own[M];
    float* y[M];
    for (int i = 0; i < M; i++) {
      own[i] = x + (m + i) * (p.elements / kElements) + from;
      y[i] = p.y[m + i] + row;
    }
    F sums[M][S];
    tile<T, S, M>(own, strips, blocks, sums);
    put<S, M>(sums, y, rows, from == 0);
  };
  int64_t m = 0;
  for (; m + kTileM <= p.count; m += kTileM) several(m, std::integral_constant<int, kTileM>());
  for (; m < p.count; m++) several(m, std::integral_constant<int, 1>());
}

template <class T>
static void multiply(const Product& p, const uint8_t* rounded, float* scratch) {
  const int64_t blocks = p.elements / kElements, row_bytes = blocks * T::kBytes;
  const Rounded<T>* const x = reinterpret_cast<const Rounded<T>*>(rounded);
  Strip<T>* const strips = reinterpret_cast<Strip<T>*>(scratch);
  static_assert(sizeof(Strip<T>) <= kScratchFloats * sizeof(float), "what the scratch is for");
  for (int64_t row = 0; row < p.rows; row += 16 * kStrips) {
    for (int64_t from = 0; from < blocks; from += kSpan) {
      const int64_t span = blocks - from < kSpan ? blocks - from : kSpan;
      for (int64_t i = 0; i < span * kStrips; i++) {
        const uint8_t* w[16];
        for (int r = 0; r < 16; r++) {
          const int64_t wanted = row + i % kStrips * 16 + r, at = wanted < p.rows ? wanted : p.rows - 1;
          w[r] = p.w + at * row_bytes + (from + i / kStrips) * T::kBytes;
        }
        decode_strip<T>(w, strips + i);
      }
      const auto multiply_them = p.rows - row > 16 ? multiply_strips<T, 2> : multiply_strips<T, 1>;
      multiply_them(x, from, span, strips, p, row);
    }
  }
}

// --- a few rows -------------------------------------------------------------------------------------

// 256 rounded elements in the order of the planes; by sub-block their scales, and, in the lanes that are to
// multiply them, sums (see Rounded).
struct Planes {
  int8_t quants[kElements];
  float scales[16];
  float sums[16];
};
constexpr int64_t kPlanesFloats = sizeof(Planes) / sizeof(float);

template <class T>
static void prepare(const float* x, int64_t elements, float* out) {
  constexpr int size = 4 * kOrder<T>.a_group;
  constexpr float by = T::kSumBy != 0 ? T::kSumBy : -T::kOffset;
  Planes* block = reinterpret_cast<Planes*>(out);
  for (int64_t k = 0; k < elements; k += kElements, block++) {
    int8_t quants[kElements];
    std::memset(block->scales, 0, sizeof(block->scales) + sizeof(block->sums));
    for (int g = 0; g < kGroups<T>; g++) {
      int32_t sum;
      block->scales[g] = round_group(x + k + g * size, size, quants + g * size, &sum);
      block->sums[T::kSumsFrom + g] = by * block->scales[g] * static_cast<float>(sum);
    }
    for (int quad = 0; quad < kQuads; quad++) {
      std::memcpy(block->quants + 4 * quad, quants + 4 * kOrder<T>.source[kOrder<T>.place[quad]], 4);
    }
  }
}

// A block of weights times M rows of x: adds to their sums.
template <class T, int M>
static SCARLET_INLINE void dot_block(const uint8_t* b, const Planes* const* x, Sums<1, M>& sums) {
  const F factors = T::scales(b);
  F scaled[M];
  SCARLET_UNROLL for (int m = 0; m < M; m++) scaled[m] = Simd::mul(factors, Simd::load(x[m]->scales));
  SCARLET_UNROLL for (int v = 0; v < 4; v++) {
    const I weights = Simd::kept(T::bytes(b, v)), group = _mm512_load_si512(planar::kOrder<T>.group[v]);
    SCARLET_UNROLL for (int m = 0; m < M; m++) {
      const I quants = _mm512_loadu_si512(x[m]->quants + 64 * v);
      const I dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, quants);
      F& sum = sums.of[0][m][v % 2];
      sum = Simd::fma(_mm512_permutexvar_ps(group, scaled[m]), Simd::to_float(dot), sum);
    }
  }
  const F of_sums = T::kSumBy != 0 ? T::minimums(b, factors) : factors;
  constexpr __mmask16 lanes = static_cast<__mmask16>(((1 << kGroups<T>) - 1) << T::kSumsFrom);
  SCARLET_UNROLL for (int m = 0; m < M; m++) {
    F& sum = sums.of[0][m][0];
    sum = _mm512_mask3_fmadd_ps(of_sums, Simd::load(x[m]->sums), sum, lanes);
  }
}

template <class T, int M>
static void multiply_rows(const Product& p) {
  const int64_t blocks = p.elements / kElements;
  const uint8_t* w = p.w;
  for (int64_t row = 0; row < p.rows; row++) {
    const Planes* x[M];
    for (int m = 0; m < M; m++) x[m] = reinterpret_cast<const Planes*>(p.x[m < p.count ? m : p.count - 1]);
    Sums<1, M> sums;
    for (int64_t i = 0; i < blocks; i++, w += T::kBytes) {
      planar::prefetch_block<T>(w + planar::kAhead);
      dot_block<T, M>(w, x, sums);
      SCARLET_UNROLL for (int m = 0; m < M; m++) x[m]++;
    }
    SCARLET_UNROLL for (int m = 0; m < M; m++) p.y[m < p.count ? m : p.count - 1][row] = sums.total(0, m);
  }
}

template <class T>
static void multiply_few(const Product& p, float*) {
  if (p.count == 1) return multiply_rows<T, 1>(p);
  if (p.count == 2) return multiply_rows<T, 2>(p);
  multiply_rows<T, 4>(p);
}

static int64_t planes_floats(int64_t elements) { return elements / kElements * kPlanesFloats; }

// --- the table --------------------------------------------------------------------------------------

struct Entry {
  size_t rounded;  // bytes of 256 elements; 0: the type is not covered
  void (*round)(const float* x, int64_t elements, uint8_t* to);
  void (*multiply)(const Product& p, const uint8_t* x, float* scratch);
  FewKernels few;
};

template <class T>
static constexpr Entry entry() {
  return {sizeof(Rounded<T>), round_row<T>, multiply<T>, {prepare<T>, planes_floats, multiply_few<T>}};
}

static Entry entry_of(QType type) {
  switch (type) {
    case QType::Q4_0: return entry<Masked<planar::Q4_0, 15, 8>>();
    case QType::Q4_1: return entry<Masked<planar::Q4_1, 15>>();
    case QType::Q5_0: return entry<Masked<planar::Q5_0, 31, 16>>();
    case QType::Q5_1: return entry<Masked<planar::Q5_1, 31>>();
    case QType::Q8_0: return entry<Signed<planar::Q8_0, 128>>();
    case QType::Q2_K: return entry<Masked<planar::Q2_K, 3>>();
    case QType::Q3_K: return entry<Masked<planar::Q3_K, 7, 4>>();
    case QType::Q4_K: return entry<Masked<planar::Q4_K, 15>>();
    case QType::Q5_K: return entry<Masked<planar::Q5_K, 31>>();
    case QType::Q6_K: return entry<Masked<planar::Q6_K, 63, 32>>();
    case QType::IQ1_S: return entry<Signed<planar::IQ1_S, 16>>();
    case QType::IQ1_M: return entry<Signed<planar::IQ1_M, 16>>();
    case QType::IQ2_XXS: return entry<Signed<planar::IQ2_XXS, 64>>();
    case QType::IQ2_XS: return entry<Signed<planar::IQ2_XS, 64>>();
    case QType::IQ2_S: return entry<Signed<planar::IQ2_S, 64>>();
    case QType::IQ3_XXS: return entry<Signed<planar::IQ3_XXS, 64>>();
    case QType::IQ3_S: return entry<Signed<planar::IQ3_S, 16>>();
    case QType::IQ4_NL: return entry<Table<planar::IQ4_NL, Iq4>>();
    case QType::IQ4_XS: return entry<Table<planar::IQ4_XS, Iq4>>();
    case QType::TQ1_0: return entry<Masked<planar::TQ1_0, 3, 1>>();
    case QType::TQ2_0: return entry<Masked<planar::TQ2_0, 3, 1>>();
    case QType::MXFP4: return entry<Table<planar::MXFP4, E2m1>>();
    case QType::NVFP4: return entry<Table<planar::NVFP4, E2m1>>();
    default: return {};  // floats; and Q1_0 and Q2_0, whose planes are not of bytes
  }
}

static bool covers(QType type, int64_t elements) {
  return elements % kElements == 0 && entry_of(type).rounded > 0;
}
static size_t rounded_bytes(QType type, int64_t elements) {
  return entry_of(type).rounded * static_cast<size_t>(elements / kElements);
}
static void round(QType type, const float* x, int64_t elements, uint8_t* to) {
  entry_of(type).round(x, elements, to);
}
static FewKernels few(QType type) { return entry_of(type).few; }
static void multiply_by_type(QType type, const Product& p, const uint8_t* x, float* scratch) {
  entry_of(type).multiply(p, x, scratch);
}

}  // namespace fast
}  // namespace avx512vnni

const FastKernels& fast_kernels_avx512vnni() {
  namespace own = avx512vnni::fast;
  constexpr size_t scratch = size_t{own::kScratchFloats} * own::kSpan * own::kStrips;
  static const FastKernels table = {own::covers,         own::few,  own::rounded_bytes, own::round,
                                    own::multiply_by_type, scratch};
  return table;
}

}  // namespace scarlet
