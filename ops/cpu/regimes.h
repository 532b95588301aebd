// What is done with decoded blocks: stored (decode), multiplied at once by a few rows of activations, or
// kept as a tile of f32 for many. Included after decoders.h, inside an instruction set's namespace.
//
// All sums are f32, over k in an order that depends on the type and on k alone: neither on the number of
// threads nor on which other rows are computed beside.
#pragma once

template <class D, int elements, int bytes>
struct Block {
  using Decoder = D;
  static constexpr int kElements = elements;
  static constexpr int kBytes = bytes;
  // Only a row of plain floats may end within a block.
  static constexpr bool kRagged = std::is_same_v<D, F32> || std::is_same_v<D, F16> || std::is_same_v<D, BF16>;
};

// The last elements of a row that ends within a block, padded with zeros to a block of their own.
template <class B>
struct Tail {
  uint8_t block[B::kBytes] = {};
  SCARLET_INLINE Tail(const uint8_t* source, int64_t elements) {
    std::memcpy(block, source, elements * B::kBytes / B::kElements);
  }
};

// --- decode -----------------------------------------------------------------------------------------

template <class B>
static __attribute__((noinline)) void decode_row(const uint8_t* w, float* out, int64_t elements) {
  const int64_t whole = elements / B::kElements;
  for (int64_t i = 0; i < whole; i++, w += B::kBytes, out += B::kElements) {
    B::Decoder::decode(w, [&](int at, F v) SCARLET_LAMBDA { Simd::store(out + at, v); });
  }
  const int64_t rest = elements - whole * B::kElements;
  if constexpr (B::kRagged) {
    if (rest == 0) return;
    const Tail<B> tail(w, rest);
    float padded[B::kElements];
    B::Decoder::decode(tail.block, [&](int at, F v) SCARLET_LAMBDA { Simd::store(padded + at, v); });
    std::memcpy(out, padded, rest * sizeof(float));
  }
}

// --- a few rows of activations ----------------------------------------------------------------------

// Every dot product is kChains interleaved sums, so that additions need not wait for one another.
static constexpr int kChains = 2;

// The sums of R rows of weights times M of activations.
template <int R, int M>
struct Sums {
  F of[R][M][kChains];

  SCARLET_INLINE Sums() {
    SCARLET_UNROLL for (int i = 0; i < R * M * kChains; i++)
      of[i / (M * kChains)][i / kChains % M][i % kChains] = Simd::zero();
  }

  template <class B>
  SCARLET_INLINE void add_block(const uint8_t* const* w, const float* const* x) {
    SCARLET_UNROLL for (int r = 0; r < R; r++) {
      auto add = [&](int at, F v) SCARLET_LAMBDA {
        SCARLET_UNROLL for (int m = 0; m < M; m++) {
          F& sum = of[r][m][at / W % kChains];
          sum = Simd::fma(v, Simd::load(x[m] + at), sum);
        }
      };
      if constexpr (Simd::kFused) {
        B::Decoder::decode(w[r], add);
      } else {
        float block[B::kElements];
        decode_row<B>(w[r], block, B::kElements);
        for (int at = 0; at < B::kElements; at += W) add(at, Simd::load(block + at));
      }
    }
  }

  SCARLET_INLINE float total(int r, int m) const { return Simd::sum(Simd::add(of[r][m][0], of[r][m][1])); }
};

// R rows of `elements` weights times M rows of activations; w and x are used up.
template <class B, int R, int M>
static SCARLET_INLINE void dot_rows(const uint8_t** w, const float** x, int64_t elements, Sums<R, M>& sums) {
  // The rows that follow lie right behind these in memory; asking early beats the hardware's guess.
  const int64_t ahead = R * (elements * B::kBytes / B::kElements);
  const int64_t whole = elements / B::kElements;
  for (int64_t i = 0; i < whole; i++) {
    SCARLET_UNROLL for (int r = 0; r < R; r++) {
      for (int line = 0; line < B::kBytes; line += 64) Simd::prefetch(w[r] + ahead + line);
    }
    sums.template add_block<B>(w, x);
    SCARLET_UNROLL for (int r = 0; r < R; r++) w[r] += B::kBytes;
    SCARLET_UNROLL for (int m = 0; m < M; m++) x[m] += B::kElements;
  }
}

// The same for the last elements of rows that end within a block.
template <class B, int R, int M>
static __attribute__((noinline)) void dot_tails(const uint8_t** w, const float** x, int64_t rest,
                                                Sums<R, M>& sums) {
  float padded_w[R][B::kElements], padded_x[M][B::kElements] = {};
  for (int r = 0; r < R; r++) decode_row<B>(Tail<B>(w[r], rest).block, padded_w[r], B::kElements);
  for (int m = 0; m < M; m++) std::memcpy(padded_x[m], x[m], rest * sizeof(float));
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) {
      for (int at = 0; at < B::kElements; at += W) {
        F& sum = sums.of[r][m][at / W % kChains];
        sum = Simd::fma(Simd::load(padded_w[r] + at), Simd::load(padded_x[m] + at), sum);
      }
    }
  }
}

// All rows of weights, R at a time, times `count` <= M rows of activations. Where fewer than R or M are
// left, the last stands in for the missing ones: the same sums, written once or twice.
template <class B, int R, int M>
static void multiply_rows(const Product& p) {
  const int64_t stride = p.elements * B::kBytes / B::kElements;
  for (int64_t row = 0; row < p.rows; row += R) {
    const uint8_t* w[R];
    const float* x[M];
    for (int r = 0; r < R; r++) w[r] = p.w + (row + r < p.rows ? row + r : p.rows - 1) * stride;
    for (int m = 0; m < M; m++) x[m] = p.x[m < p.count ? m : p.count - 1];
    Sums<R, M> sums;
    dot_rows<B, R, M>(w, x, p.elements, sums);
    if constexpr (B::kRagged) {
      if (const int64_t rest = p.elements % B::kElements) dot_tails<B, R, M>(w, x, rest, sums);
    }
    SCARLET_UNROLL for (int r = 0; r < R; r++) {
      SCARLET_UNROLL for (int m = 0; m < M; m++) {
        const int64_t to = row + r < p.rows ? row + r : p.rows - 1;
        p.y[m < p.count ? m : p.count - 1][to] = sums.total(r, m);
      }
    }
  }
}

template <class B>
static void multiply_few(const Product& p, float*) {
  if (p.count == 1) return multiply_rows<B, 2, 1>(p);
  if (p.count == 2) return multiply_rows<B, 2, 2>(p);
  multiply_rows<B, 1, 4>(p);
}

// The few rows of type B, as the decoder alone does it; an instruction set may know better for some types.
template <class B>
struct Few {
  static constexpr MultiplyFn kMultiply = multiply_few<B>;
  static constexpr PrepareFn kPrepare = nullptr;
};

// --- many rows of activations -----------------------------------------------------------------------

// Blocking, for a core with 32 KiB or more of first-level and 1 MiB of second-level cache:
//   kSpan      elements of k decoded at a time;
//   kTileRows  rows of weights decoded at a time (kTileRows * kSpan floats: 192 KiB);
//   kPanelRows of those that are multiplied while in the first level (24 KiB);
//   kBatchRows of activations, whose spans (512 KiB) stay in the second level meanwhile.
static constexpr int kSpan = 512;
static constexpr int kPanelRows = 12;
static constexpr int kBatchRows = 256;
static_assert(kTileRows % kPanelRows == 0 && kPanelRows % Simd::kTileN == 0, "panels of whole tiles");

// The sums of M rows of x and N of w over `span` elements, added to what y holds unless it is the first.
template <int M, int N>
static SCARLET_INLINE void tile(const float* const* x, const float* w, int64_t span, float* const* y,
                                bool first) {
  F acc[M][N];
  SCARLET_UNROLL for (int m = 0; m < M; m++) {
    SCARLET_UNROLL for (int n = 0; n < N; n++) acc[m][n] = Simd::zero();
  }
  for (int64_t k = 0; k < span; k += W) {
    F v[M];
    SCARLET_UNROLL for (int m = 0; m < M; m++) v[m] = Simd::load(x[m] + k);
    SCARLET_UNROLL for (int n = 0; n < N; n++) {
      const F u = Simd::kept(Simd::load(w + n * kSpan + k));
      SCARLET_UNROLL for (int m = 0; m < M; m++) acc[m][n] = Simd::fma(v[m], u, acc[m][n]);
    }
  }
  float sums[M][N];
  Simd::sums<M * N>(&acc[0][0], &sums[0][0]);
  SCARLET_UNROLL for (int m = 0; m < M; m++) {
    SCARLET_UNROLL for (int n = 0; n < N; n++) y[m][n] = first ? sums[m][n] : y[m][n] + sums[m][n];
  }
}

template <int M>
static void panel(const float* const* x, const float* w, int64_t rows, int64_t span, float* const* y,
                  bool first) {
  int64_t n = 0;
  float* out[M];
  for (; n + Simd::kTileN <= rows; n += Simd::kTileN) {
    for (int m = 0; m < M; m++) out[m] = y[m] + n;
    tile<M, Simd::kTileN>(x, w + n * kSpan, span, out, first);
  }
  for (; n < rows; n++) {
    for (int m = 0; m < M; m++) out[m] = y[m] + n;
    tile<M, 1>(x, w + n * kSpan, span, out, first);
  }
}

// Up to kBatchRows rows of x (spans of a multiple of W elements) times up to kTileRows decoded rows.
static void multiply_tile(const float* const* x, const float* w, int64_t batch, int64_t rows, int64_t span,
                          float* const* y, bool first) {
  constexpr int M = Simd::kTileM;
  for (int64_t n = 0; n < rows; n += kPanelRows) {
    const int64_t panel_rows = rows - n < kPanelRows ? rows - n : kPanelRows;
    float* out[M];
    int64_t m = 0;
    for (; m + M <= batch; m += M) {
      for (int i = 0; i < M; i++) out[i] = y[m + i] + n;
      panel<M>(x + m, w + n * kSpan, panel_rows, span, out, first);
    }
    for (; m < batch; m++) {
      out[0] = y[m] + n;
      panel<1>(x + m, w + n * kSpan, panel_rows, span, out, first);
    }
  }
}

// Decodes `span` elements of rows of weights into rows kSpan apart, the last padded with zeros.
template <class B>
static void decode_tile(const uint8_t* w, int64_t stride, int64_t rows, int64_t span, float* out) {
  const int64_t padded = (span + W - 1) / W * W;
  for (int64_t r = 0; r < rows; r++, w += stride, out += kSpan) {
    decode_row<B>(w, out, span);
    for (int64_t i = span; i < padded; i++) out[i] = 0;
  }
}

// The scratch: a decoded tile, then one batch of padded spans of x for rows that end within a vector.
static constexpr size_t kScratchFloats = size_t{kTileRows} * kSpan + size_t{kBatchRows} * W;

template <class B>
static void multiply_many(const Product& p, float* scratch) {
  const int64_t stride = p.elements * B::kBytes / B::kElements;
  const float* x[kBatchRows];
  float* y[kBatchRows];
  for (int64_t row = 0; row < p.rows; row += kTileRows) {
    const int64_t rows = p.rows - row < kTileRows ? p.rows - row : kTileRows;
    for (int64_t k = 0; k < p.elements; k += kSpan) {
      const int64_t span = p.elements - k < kSpan ? p.elements - k : kSpan;
      const int64_t ragged = span % W;
      decode_tile<B>(p.w + row * stride + k * B::kBytes / B::kElements, stride, rows, span, scratch);
      for (int64_t m = 0; m < p.count; m += kBatchRows) {
        const int64_t batch = p.count - m < kBatchRows ? p.count - m : kBatchRows;
        for (int64_t i = 0; i < batch; i++) {
          x[i] = p.x[m + i] + k;
          y[i] = p.y[m + i] + row;
        }
        multiply_tile(x, scratch, batch, rows, span - ragged, y, k == 0);
        if (ragged == 0) continue;
        float* padded = scratch + size_t{kTileRows} * kSpan;
        for (int64_t i = 0; i < batch; i++, padded += W) {
          for (int64_t j = 0; j < W; j++) padded[j] = j < ragged ? x[i][span - ragged + j] : 0;
          x[i] = padded;
        }
        multiply_tile(x, scratch + span - ragged, batch, rows, W, y, k == 0 && span == ragged);
      }
    }
    if (p.elements == 0) {
      for (int64_t m = 0; m < p.count; m++) std::memset(p.y[m] + row, 0, rows * sizeof(float));
    }
  }
}

// --- between products -------------------------------------------------------------------------------

static void silu_gate(float* gate, const float* up, int64_t n) {
  auto gated = [](F g, F u) SCARLET_LAMBDA { return Simd::mul(silu(g), u); };
  int64_t i = 0;
  for (; i + W <= n; i += W) Simd::store(gate + i, gated(Simd::load(gate + i), Simd::load(up + i)));
  if (i == n) return;
  float g[W] = {}, u[W] = {};
  std::memcpy(g, gate + i, (n - i) * sizeof(float));
  std::memcpy(u, up + i, (n - i) * sizeof(float));
  Simd::store(g, gated(Simd::load(g), Simd::load(u)));
  std::memcpy(gate + i, g, (n - i) * sizeof(float));
}

static void weighted_sum(const float* rows, const float* shares, int64_t count, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    F sum = Simd::zero();
    for (int64_t r = 0; r < count; r++) {
      sum = Simd::fma(Simd::set1(shares[r]), Simd::load(rows + r * n + i), sum);
    }
    Simd::store(y + i, sum);
  }
  for (; i < n; i++) {
    y[i] = 0;
    for (int64_t r = 0; r < count; r++) y[i] += shares[r] * rows[r * n + i];
  }
}

// --- what the machine can do ------------------------------------------------------------------------

static float sum_of_bytes(const uint8_t* bytes, size_t n) {
  constexpr size_t kStep = 8 * W * sizeof(float);
  F acc[8];
  SCARLET_UNROLL for (int i = 0; i < 8; i++) acc[i] = Simd::zero();
  for (size_t at = 0; at + kStep <= n; at += kStep) {
    SCARLET_UNROLL for (int i = 0; i < 8; i++) {
      Simd::prefetch(bytes + at + 4096 + i * W * sizeof(float));
      acc[i] = Simd::add(acc[i], Simd::load(reinterpret_cast<const float*>(bytes + at) + i * W));
    }
  }
  SCARLET_UNROLL for (int i = 1; i < 8; i++) acc[0] = Simd::add(acc[0], acc[i]);
  return Simd::sum(acc[0]);
}

static double fma_chain(int64_t iterations) {
  F acc[12];
  SCARLET_UNROLL for (int i = 0; i < 12; i++) acc[i] = Simd::set1(static_cast<float>(i));
  const F a = Simd::set1(0.5f), b = Simd::set1(1.0f);
  for (int64_t n = 0; n < iterations; n++) {
    SCARLET_UNROLL for (int i = 0; i < 12; i++) acc[i] = Simd::fma(acc[i], a, b);
  }
  SCARLET_UNROLL for (int i = 1; i < 12; i++) acc[0] = Simd::add(acc[0], acc[i]);
  const double flops = 2.0 * 12 * W * static_cast<double>(iterations);
  return Simd::sum(acc[0]) > 0 ? flops : 0;  // uses the sum, so that the loop is not dropped
}
