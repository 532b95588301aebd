#include "amx.h"

#include <immintrin.h>

#include "kernels.h"
#include "simd_avx512.h"

namespace scarlet {
namespace {

using avx512::Simd;
using F = Simd::F;
using I = Simd::I;

constexpr int kTile = 512;    // bf16 of a tile: 16 rows of 32, or 16 pairs of 16 rows
constexpr int kDepth = 32;    // elements of k in a tile
constexpr int kSteps = 16;    // tiles of k decoded at a time
constexpr int kTerms = 3;     // at most
constexpr int kRows = 96;     // rows of weights decoded at a time: 288 KiB, of a second level of 2 MiB
constexpr int kBatch = 8;     // groups of x (384 KiB) that stay there too meanwhile
constexpr int kSpan = kSteps * kDepth;

constexpr int64_t tiles_of(int64_t elements) { return (elements + kDepth - 1) / kDepth; }

// --- terms ------------------------------------------------------------------------------------------

// The next bf16 term of 32 elements, taken away from them. Rounded to nearest, so that the rest is at most
// half of a last place.
SCARLET_INLINE I take_term(F* low, F* high) {
  const I term = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(*high, *low));
  const auto wide = [](__m256i half) SCARLET_LAMBDA {
    return _mm512_castsi512_ps(Simd::shl(_mm512_cvtepu16_epi32(half), 16));
  };
  *low = Simd::sub(*low, wide(_mm512_castsi512_si256(term)));
  *high = Simd::sub(*high, wide(_mm512_extracti64x4_epi64(term, 1)));
  return term;
}

// Rows and columns of 16 x 16 dwords exchanged.
SCARLET_INLINE void transpose(F* v) {
  F a[16], b[16];
  SCARLET_UNROLL for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  const auto low = [](F x, F y) SCARLET_LAMBDA {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](F x, F y) SCARLET_LAMBDA {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  SCARLET_UNROLL for (int i = 0; i < 16; i += 4) {
    b[i] = low(a[i], a[i + 2]);
    b[i + 1] = high(a[i], a[i + 2]);
    b[i + 2] = low(a[i + 1], a[i + 3]);
    b[i + 3] = high(a[i + 1], a[i + 3]);
  }
  // b[4 q + j]: of rows 4 q ... 4 q + 3, columns j, 4 + j, 8 + j and 12 + j.
  SCARLET_UNROLL for (int j = 0; j < 4; j++) {
    const F even = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), odd = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const F even2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const F odd2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    v[j] = _mm512_shuffle_f32x4(even, even2, 0x88);
    v[4 + j] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    v[8 + j] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    v[12 + j] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

size_t split_size(const SplitRows& rows) {
  const int64_t groups = (rows.count + kSplitGroup - 1) / kSplitGroup;
  return static_cast<size_t>(groups * tiles_of(rows.elements) * rows.terms) * kTile;
}

void split(const float* const* x, int64_t group, const SplitRows& rows) {
  const int64_t first = group * kSplitGroup;
  uint16_t* out = rows.tiles + group * tiles_of(rows.elements) * rows.terms * kTile;
  for (int64_t k = 0; k < rows.elements; k += kDepth) {
    F low[16], high[16], term[16];
    for (int i = 0; i < 16; i++) {
      const bool there = first + i < rows.count;
      const int64_t left = there ? rows.elements - k : 0;
      const __mmask32 mask = left >= kDepth ? ~0u : (1u << left) - 1;
      const float* from = there ? x[first + i] + k : x[first];
      low[i] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
      high[i] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), mask >> 16 ? from + 16 : from);
    }
    for (int t = 0; t < rows.terms; t++, out += kTile) {
      for (int i = 0; i < 16; i++) term[i] = _mm512_castsi512_ps(take_term(&low[i], &high[i]));
      transpose(term);
      for (int i = 0; i < 16; i++) _mm512_storeu_ps(out + 32 * i, term[i]);
    }
  }
}

// Splits a row of `elements` <= kSpan weights into row `r` of tiles kTerms apart, and says which terms there
// are: bit t for the t-th.
int split_weights(const float* values, int64_t elements, int terms, int64_t r, uint16_t* tiles) {
  I any[kTerms] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t k = 0; k < elements; k += kDepth, tiles += kTerms * kTile) {
    F low = Simd::load(values + k), high = Simd::load(values + k + 16);
    for (int t = 0; t < terms; t++) {
      const I term = take_term(&low, &high);
      any[t] = Simd::or_(any[t], term);
      _mm512_storeu_si512(tiles + t * kTile + r * kDepth, term);
    }
  }
  int there = 1;
  for (int t = 1; t < terms; t++) {
    const I magnitude = Simd::and_(any[t], Simd::set1i(0x7fff7fff));  // minus zero is none
    there |= _mm512_test_epi32_mask(magnitude, magnitude) ? 1 << t : 0;
  }
  return there;
}

// --- tiles ------------------------------------------------------------------------------------------

struct TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Within its scope this thread's eight tiles are of 16 rows of 64 bytes; then again what they were, for
// others that use the unit and set it up but once. (The memory is named to the compiler whole: some headers
// name the first eight bytes alone.)
class Tiles {
 public:
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    TileConfig own;
    own.palette = 1;
    for (int i = 0; i < 8; i++) own.bytes[i] = 64, own.rows[i] = 16;
    load(own);
  }
  ~Tiles() { load(before_); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  static void load(const TileConfig& config) {
    if (config.palette == 0) {
      asm volatile("tilerelease" ::: "memory");
    } else {
      asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
    }
  }
  alignas(64) TileConfig before_;
};

// Tiles 0 to 3: sums of two groups of weights times two of x (or one: 0 and 2). 4 and 5: a term of the
// weights. 6 and 7: a term of x.
template <int G>
SCARLET_INLINE void load_weights(const uint16_t* w, int64_t group) {
  _tile_loadd(4, w, 64);
  _tile_loadd(5, w + group, 64);
}
template <int G>
SCARLET_INLINE void load_x(const uint16_t* x, int64_t group) {
  _tile_loadd(6, x, 64);
  if constexpr (G == 2) _tile_loadd(7, x + group, 64);
}
template <int G>
SCARLET_INLINE void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  if constexpr (G == 2) {
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// What WT terms of weights and XT of x make, least first and with few loads: each line keeps one of the two.
template <int WT, int XT, int G>
SCARLET_INLINE void step(const uint16_t* w, int64_t w_group, const uint16_t* x, int64_t x_group) {
  const auto weights = [&](int t) SCARLET_LAMBDA { load_weights<G>(w + t * kTile, w_group); };
  const auto rows = [&](int t) SCARLET_LAMBDA { load_x<G>(x + t * kTile, x_group); };
  rows(0);
  if constexpr (WT > 2) weights(2), add_products<G>();
  if constexpr (WT > 1) weights(1), add_products<G>();
  rows(1);
  if constexpr (WT > 1 && XT > 2) add_products<G>();
  weights(0), add_products<G>();
  if constexpr (XT > 2) rows(2), add_products<G>();
  rows(0), add_products<G>();
}

template <int WT, int XT, int G>
void multiply_tiles(const uint16_t* w, int64_t w_group, const uint16_t* x, int64_t x_group, int64_t steps,
                    float* sums) {
  asm volatile("" ::: "memory");  // the loads below do not name what they read to every compiler
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; i++, w += kTerms * kTile, x += XT * kTile) {
    step<WT, XT, G>(w, w_group, x, x_group);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + 256, 64);
  if constexpr (G == 2) {
    _tile_stored(1, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

using TilesFn = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, float*);

TilesFn tiles_fn(int weight_terms, int x_terms, bool two) {
  constexpr TilesFn table[2][3][2] = {
      {{multiply_tiles<1, 2, 1>, multiply_tiles<1, 2, 2>}, {multiply_tiles<2, 2, 1>, multiply_tiles<2, 2, 2>}},
      {{multiply_tiles<1, 3, 1>, multiply_tiles<1, 3, 2>},
       {multiply_tiles<2, 3, 1>, multiply_tiles<2, 3, 2>},
       {multiply_tiles<3, 3, 1>, multiply_tiles<3, 3, 2>}}};
  return table[x_terms - 2][weight_terms - 1][two];
}

// Adds sums, 16 rows of weights by 16 of x, to `count` rows of y.
void add_sums(const float* sums, float* const* y, int64_t count, int64_t rows, bool first) {
  F v[16];
  for (int i = 0; i < 16; i++) v[i] = Simd::load(sums + 16 * i);
  transpose(v);
  const auto mask = static_cast<__mmask16>(rows >= 16 ? 0xffff : (1 << rows) - 1);
  for (int64_t m = 0; m < count; m++) {
    const F before = first ? Simd::zero() : _mm512_maskz_loadu_ps(mask, y[m]);
    _mm512_mask_storeu_ps(y[m], mask, Simd::add(before, v[m]));
  }
}

// --- the product ------------------------------------------------------------------------------------

// The decoded terms of up to kRows rows over up to kSpan elements: for each 16 rows and 32 elements kTerms
// tiles. Groups are even in number: of a last pair's second, nothing is used.
struct Decoded {
  uint16_t* tiles;
  int terms[kRows / 16];  // of each pair of groups, how many are not zero

  static constexpr int64_t kGroup = int64_t{kSteps} * kTerms * kTile;
};

void decode(const Kernels& exact, QType type, const Product& p, int64_t k, int64_t span, int terms,
            float* values, Decoded* out) {
  const int64_t stride = static_cast<int64_t>(row_bytes(type, p.elements));
  const uint8_t* w = p.w + row_bytes(type, k);
  for (int64_t i = span; i < tiles_of(span) * kDepth; i++) values[i] = 0;
  for (int& there : out->terms) there = 1;
  for (int64_t r = 0; r < p.rows; r++, w += stride) {
    exact.decode[static_cast<int>(type)](w, values, span);
    const int there = split_weights(values, span, terms, r % 16, out->tiles + r / 16 * Decoded::kGroup);
    int& most = out->terms[r / 32];
    const int own = there >= 4 ? 3 : there >= 2 ? 2 : 1;
    if (own > most) most = own;
  }
}

void multiply(const Kernels& exact, QType type, const Product& p, const SplitRows& rows, float* scratch) {
  const Tiles set_up;
  float* const sums = scratch;
  float* const values = sums + 1024;
  Decoded w = {reinterpret_cast<uint16_t*>(values + kSpan), {}};
  const int64_t groups = (rows.count + 15) / 16, x_group = tiles_of(p.elements) * rows.terms * kTile;
  if (p.elements == 0) {
    for (int64_t m = 0; m < rows.count; m++) std::memset(p.y[m], 0, p.rows * sizeof(float));
  }
  for (int64_t k = 0; k < p.elements; k += kSpan) {
    const int64_t span = p.elements - k < kSpan ? p.elements - k : kSpan;
    decode(exact, type, p, k, span, rows.terms, values, &w);
    for (int64_t batch = 0; batch < groups; batch += kBatch) {
      const int64_t end = groups - batch < kBatch ? groups : batch + kBatch;
      for (int64_t r = 0; r < p.rows; r += 32) {
        for (int64_t g = batch; g < end; g += 2) {
          const bool two = g + 1 < end;
          const uint16_t* x = rows.tiles + g * x_group + k / kDepth * rows.terms * kTile;
          const auto run = tiles_fn(w.terms[r / 32], rows.terms, two);
          run(w.tiles + r / 16 * Decoded::kGroup, Decoded::kGroup, x, x_group, tiles_of(span), sums);
          for (int part = 0; part < (two ? 4 : 2); part++) {
            const int64_t m = (g + part / 2) * 16, row = r + part % 2 * 16;
            if (row >= p.rows) continue;
            float* y[16];
            const int64_t count = rows.count - m < 16 ? rows.count - m : 16;
            for (int64_t i = 0; i < count; i++) y[i] = p.y[m + i] + row;
            add_sums(sums + part * 256, y, count, p.rows - row, k == 0);
          }
        }
      }
    }
  }
}

constexpr size_t kScratch = 1024 + kSpan + size_t{kRows} / 16 * Decoded::kGroup / 2;

constexpr MatrixUnit kUnit = {kRows, split_size, split, multiply, kScratch};

}  // namespace

const Kernels& kernels_amx() {
  static const Kernels table = [] {
    Kernels k = kernels_avx512vnni();
    k.isa = "amx";
    k.matrix = &kUnit;
    return k;
  }();
  return table;
}

}  // namespace scarlet
