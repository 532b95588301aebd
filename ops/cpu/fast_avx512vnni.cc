#include "fast.h"

#include <cmath>
#include <type_traits>

#include "simd_avx512.h"

namespace scarlet {
namespace {

using avx512::Simd;
using F = Simd::F;
using I = Simd::I;

constexpr int kBlock = 256;     // elements
constexpr int kSpanBlocks = 4;  // blocks of k decoded at a time
constexpr int kSpan = kSpanBlocks * kBlock;
constexpr int kStride =
    kSpan + 32;  // of decoded rows: a multiple of 4096 bytes would crowd a few sets of the cache
constexpr int kPanelRows = 12;   // rows of weights multiplied while in the first level of cache (24 KiB)
constexpr int kBatchRows = 192;  // rows of x whose spans (384 KiB) stay in the second level meanwhile
constexpr int kTileM = 3, kTileN = 4;  // the results that are kept in registers: of x and of weights

constexpr uint16_t kOne = 0x3c00, kFour = 0x4400, kEight = 0x4800;  // as f16

// Where a type keeps d and dmin (-1: it has none), and the d that makes whole numbers of its weights.
struct Format {
  bool covered;
  int d;
  uint16_t unit;
  int dmin = -1;
};

Format format(QType type) {
  switch (type) {
    case QType::Q2_K: return {true, 80, kOne, 82};
    case QType::Q3_K: return {true, 108, kOne};
    case QType::Q4_K: return {true, 0, kOne, 2};
    case QType::Q5_K: return {true, 0, kOne, 2};
    case QType::Q6_K: return {true, 208, kOne};
    case QType::IQ1_S: return {true, 0, kEight};    // steps of 1/8
    case QType::IQ2_XXS: return {true, 0, kEight};  // of 1/8: (1/2 + s) / 4
    case QType::IQ2_XS: return {true, 0, kEight};
    case QType::IQ2_S: return {true, 0, kEight};
    case QType::IQ3_XXS: return {true, 0, kFour};  // of 1/4: (1/2 + s) / 2
    case QType::IQ3_S: return {true, 0, kOne};
    case QType::IQ4_XS: return {true, 0, kOne};
    case QType::TQ1_0: return {true, 52, kOne};
    case QType::TQ2_0: return {true, 64, kOne};
    default: return {false, 0, 0};
  }
}

bool covers(QType type) { return format(type).covered; }

void put_f16(uint8_t* block, int at, uint16_t bits) {
  if (at >= 0) std::memcpy(block + at, &bits, sizeof(bits));
}

// --- activations ------------------------------------------------------------------------------------

void quantise(const float* x, int64_t row, const FastRows& rows) {
  int16_t* quants = rows.quants + row * rows.elements;
  float* scales = rows.scales + row * (rows.elements / kBlock);
  float* sums = rows.sums + row * (rows.elements / 16);
  for (int64_t k = 0; k < rows.elements; k += kBlock) {
    I largest = _mm512_setzero_si512();  // magnitudes compare as integers, and NaN is then above infinity
    for (int i = 0; i < kBlock; i += 16) {
      const I magnitude = Simd::and_(_mm512_castps_si512(Simd::load(x + k + i)), Simd::set1i(0x7fffffff));
      largest = _mm512_max_epi32(largest, magnitude);
      *sums++ = Simd::sum(Simd::load(x + k + i));
    }
    const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
    const bool finite = most - most == 0;
    const float scale = most / 32767;
    *scales++ = finite ? scale : most - most;  // NaN makes the sums NaN
    const F inverse = Simd::set1(finite && scale > 0 ? 1 / scale : 0);
    for (int i = 0; i < kBlock; i += 16, quants += 16) {
      const I rounded = _mm512_cvtps_epi32(Simd::mul(Simd::load(x + k + i), inverse));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(quants), _mm512_cvtsepi32_epi16(rounded));
    }
  }
}

// --- weights ----------------------------------------------------------------------------------------

// A block's whole numbers, and d in their unit.
float decode_block(DecodeFn decode, const Format& f, const uint8_t* block, int bytes, int16_t* out) {
  uint8_t copy[256];
  alignas(64) float values[kBlock];
  std::memcpy(copy, block, bytes);
  put_f16(copy, f.d, f.unit);
  put_f16(copy, f.dmin, 0);
  decode(copy, values, kBlock);
  for (int i = 0; i < kBlock; i += 16) {
    const I whole = _mm512_cvtps_epi32(Simd::load(values + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtsepi32_epi16(whole));
  }
  const uint8_t unit[2] = {static_cast<uint8_t>(f.unit & 255), static_cast<uint8_t>(f.unit >> 8)};
  return Simd::f16(block + f.d) / Simd::f16(unit);
}

// Minus dmin times the minimums of a block, one for each 16 elements (what 32 share stands twice).
void decode_minimums(QType type, const uint8_t* b, float* out) {
  if (type == QType::Q2_K) {
    const I minimums = Simd::shr(Simd::from_u8(b), 4);
    return Simd::store(out, Simd::mul(Simd::to_float(minimums), Simd::set1(-Simd::f16(b + 82))));
  }
  uint32_t m, low, high;  // Q4_K and Q5_K: see ScalesAndMins in decoders.h
  std::memcpy(&m, b + 8, sizeof(m));
  std::memcpy(&low, b + 12, sizeof(low));
  high = ((low >> 4) & 0x0f0f0f0f) | ((m >> 2) & 0x30303030);
  m &= 0x3f3f3f3f;
  const __m128i eight =
      _mm_unpacklo_epi32(_mm_cvtsi32_si128(static_cast<int>(m)), _mm_cvtsi32_si128(static_cast<int>(high)));
  const I minimums = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(eight, eight));
  Simd::store(out, Simd::mul(Simd::to_float(minimums), Simd::set1(-Simd::f16(b + 2))));
}

// --- the product ------------------------------------------------------------------------------------

// The sums of M rows of x and N of weights over some blocks, added to y.
template <int M, int N>
SCARLET_INLINE void tile(const int16_t* const* x, const float* const* x_scales, const int16_t* w,
                         const float* d, int64_t blocks, float* const* y) {
  F total[M * N];
  SCARLET_UNROLL for (int i = 0; i < M * N; i++) total[i] = Simd::zero();
  for (int64_t b = 0; b < blocks; b++) {
    I sum[M][N];
    SCARLET_UNROLL for (int i = 0; i < M * N; i++) sum[i / N][i % N] = _mm512_setzero_si512();
    SCARLET_UNROLL for (int k = 0; k < kBlock; k += 32) {
      I v[M];
      SCARLET_UNROLL for (int m = 0; m < M; m++) v[m] = _mm512_loadu_si512(x[m] + b * kBlock + k);
      SCARLET_UNROLL for (int n = 0; n < N; n++) {
        const I u = Simd::kept(_mm512_loadu_si512(w + n * kStride + b * kBlock + k));
        SCARLET_UNROLL for (int m = 0; m < M; m++) sum[m][n] = _mm512_dpwssd_epi32(sum[m][n], v[m], u);
      }
    }
    SCARLET_UNROLL for (int m = 0; m < M; m++) {
      const F scale = Simd::set1(x_scales[m][b]);
      SCARLET_UNROLL for (int n = 0; n < N; n++) {
        const F factor = Simd::set1(d[n * kSpanBlocks + b]);
        total[m * N + n] = Simd::fma(Simd::mul(Simd::to_float(sum[m][n]), scale), factor, total[m * N + n]);
      }
    }
  }
  float sums[M * N];
  Simd::sums<M * N>(total, sums);
  SCARLET_UNROLL for (int i = 0; i < M * N; i++) y[i / N][i % N] += sums[i];
}

template <int M>
void panel(const int16_t* const* x, const float* const* x_scales, const int16_t* w, const float* d,
           int64_t rows, int64_t blocks, float* const* y) {
  int64_t n = 0;
  float* out[M];
  for (; n < rows; n += n + kTileN <= rows ? kTileN : 1) {
    for (int m = 0; m < M; m++) out[m] = y[m] + n;
    if (n + kTileN <= rows) {
      tile<M, kTileN>(x, x_scales, w + n * kStride, d + n * kSpanBlocks, blocks, out);
    } else {
      tile<M, 1>(x, x_scales, w + n * kStride, d + n * kSpanBlocks, blocks, out);
    }
  }
}

// Where things are in the scratch: what the exact product needs, the tile, its ds, its minimums.
size_t scratch_floats(int64_t elements) {
  return size_t{kFastTileRows} * (kStride / 2 + kSpanBlocks + static_cast<size_t>(elements) / 16);
}

void multiply_span(const FastRows& rows, int64_t from, int64_t blocks, const int16_t* w, const float* d,
                   int64_t w_rows, float* const* y) {
  const int16_t* x[kTileM];
  const float* scales[kTileM];
  float* out[kTileM];
  for (int64_t batch = 0; batch < rows.count; batch += kBatchRows) {
    const int64_t end = rows.count - batch < kBatchRows ? rows.count : batch + kBatchRows;
    for (int64_t n = 0; n < w_rows; n += kPanelRows) {
      const int64_t panel_rows = w_rows - n < kPanelRows ? w_rows - n : kPanelRows;
      for (int64_t m = batch; m < end; m += m + kTileM <= end ? kTileM : 1) {
        const int taken = m + kTileM <= end ? kTileM : 1;
        for (int i = 0; i < taken; i++) {
          x[i] = rows.quants + (m + i) * rows.elements + from * kBlock;
          scales[i] = rows.scales + (m + i) * (rows.elements / kBlock) + from;
          out[i] = y[m + i] + n;
        }
        const auto multiply = taken == kTileM ? panel<kTileM> : panel<1>;
        multiply(x, scales, w + n * kStride, d + n * kSpanBlocks, panel_rows, blocks, out);
      }
    }
  }
}

// y = x times the minimums (or zero), to which the rest is then added.
void start(const Kernels& exact, QType type, const Product& p, const FastRows& rows, float* minimums,
           float* scratch) {
  const Format f = format(type);
  if (f.dmin < 0) {
    for (int64_t m = 0; m < rows.count; m++) std::memset(p.y[m], 0, p.rows * sizeof(float));
    return;
  }
  const int bytes = kTypes[static_cast<int>(type)].bytes;
  const int64_t blocks = p.elements / kBlock;
  for (int64_t i = 0; i < p.rows * blocks; i++) {
    decode_minimums(type, p.w + i * bytes, minimums + i * 16);
  }
  const float* x[kBatchRows];
  for (int64_t m = 0; m < rows.count; m += kBatchRows) {
    const int64_t count = rows.count - m < kBatchRows ? rows.count - m : kBatchRows;
    for (int64_t i = 0; i < count; i++) x[i] = rows.sums + (m + i) * (p.elements / 16);
    const Product of_minimums = {
        reinterpret_cast<const uint8_t*>(minimums), p.rows, blocks * 16, x, p.y + m, count};
    exact.multiply_many[static_cast<int>(QType::F32)](of_minimums, scratch);
  }
}

void multiply(const Kernels& exact, QType type, const Product& p, const FastRows& rows, float* scratch) {
  const Format f = format(type);
  const int bytes = kTypes[static_cast<int>(type)].bytes;
  const int64_t blocks = p.elements / kBlock;
  float* const own = scratch + exact.scratch_floats;
  int16_t* const w = reinterpret_cast<int16_t*>(own);
  float* const d = own + size_t{kFastTileRows} * kStride / 2;
  start(exact, type, p, rows, d + size_t{kFastTileRows} * kSpanBlocks, scratch);
  for (int64_t from = 0; from < blocks; from += kSpanBlocks) {
    const int64_t span = blocks - from < kSpanBlocks ? blocks - from : kSpanBlocks;
    for (int64_t r = 0; r < p.rows; r++) {
      for (int64_t b = 0; b < span; b++) {
        const uint8_t* block = p.w + (r * blocks + from + b) * bytes;
        int16_t* out = w + r * kStride + b * kBlock;
        d[r * kSpanBlocks + b] = decode_block(exact.decode[static_cast<int>(type)], f, block, bytes, out);
      }
    }
    multiply_span(rows, from, span, w, d, p.rows, p.y);
  }
}

}  // namespace

const FastKernels& fast_kernels_avx512vnni() {
  static const FastKernels table = {covers, quantise, multiply, scratch_floats};
  return table;
}

}  // namespace scarlet
