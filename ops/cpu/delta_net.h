// One value head of a gated delta net, from its projections to its gated output. Included after vectors.h,
// inside an instruction set's namespace.
//
// The rows of the memory S (Dv, Dk) do not depend on one another: each is taken through a block of tokens
// while it stays in the first-level cache, so that the memory is read and written once a block. Token by
// token is then less work than the chunked form of the rule, which exists to fill matrix units.
#pragma once

static constexpr int64_t kBlockTokens = 16;
static constexpr int kBlockRows = 4;  // of S: eight interleaved sums keep both multipliers busy

// One block of tokens of a head: rows of whole vectors, the padding zero.
struct HeadBlock {
  int64_t key_stride, value_stride;
  float* q;      // (tokens, Dk), of length 1 / sqrt(Dk)
  float* k;      // (tokens, Dk), of length 1
  float* v;      // (tokens, Dv)
  float* o;      // (tokens, Dv)
  float* rows;   // (kBlockRows, Dk) of S
  float* taps;   // (W, Dk + Dk + Dv): the convolution's, tap by tap
  float decay[kBlockTokens], beta[kBlockTokens], qk[kBlockTokens];

  HeadBlock(const DeltaNet& net, float* scratch)
      : key_stride(whole_vectors(net.key_dim)), value_stride(whole_vectors(net.value_dim)) {
    q = scratch;
    k = q + kBlockTokens * key_stride;
    v = k + kBlockTokens * key_stride;
    o = v + kBlockTokens * value_stride;
    rows = o + kBlockTokens * value_stride;
    taps = rows + kBlockRows * key_stride;
  }
  static size_t floats(const DeltaNet& net) {
    const int64_t key = whole_vectors(net.key_dim), value = whole_vectors(net.value_dim);
    return kBlockTokens * 2 * (key + value) + kBlockRows * key + net.conv_width * (2 * key + value);
  }
};

static size_t delta_net_scratch(const DeltaNet& net) { return HeadBlock::floats(net); }

// (n, width) -> (width, n padded to `stride`)
static void transpose_taps(const float* from, int64_t n, int64_t width, int64_t stride, float* to) {
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < width; j++) to[j * stride + i] = from[i * width + j];
  }
  for (int64_t j = 0; j < width; j++) {
    for (int64_t i = n; i < stride; i++) to[j * stride + i] = 0;
  }
}

// y = silu(sum over j of taps[j] * inputs[j]), n channels, padded with zeros.
static void convolve(const float* const* inputs, const float* taps, int64_t width, int64_t n, int64_t stride, float* y) {
  for (int64_t i = 0; i < n; i += W) {
    F sum = Simd::zero();
    for (int64_t j = 0; j < width; j++) {
      sum = Simd::fma(load_upto(inputs[j] + i, n - i), Simd::load(taps + j * stride + i), sum);
    }
    Simd::store(y + i, silu(sum));
  }
}

static void scale_to_length(float* p, int64_t n, float eps, float length) {
  const F factor = Simd::set1(length / std::sqrt(sum_of_squares(p, n) + eps));
  for (int64_t i = 0; i < n; i += W) Simd::store(p + i, Simd::mul(factor, Simd::load(p + i)));
}

static float dot(const float* a, const float* b, int64_t n) {
  F sum = Simd::zero();
  for (int64_t i = 0; i < n; i += W) sum = Simd::fma(Simd::load(a + i), Simd::load(b + i), sum);
  return Simd::sum(sum);
}

static float softplus(float x) { return std::fmax(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

// Queries, keys, values and gates of `count` tokens from `first` on.
static void prepare(const DeltaNet& net, int64_t b, int64_t head, int64_t first, int64_t count, HeadBlock& block) {
  const int64_t Dk = net.key_dim, Dv = net.value_dim, C = net.channels(), past = net.conv_width - 1;
  const int64_t from_q = net.key_head[head] * Dk, from_k = net.key_heads * Dk + from_q;
  const int64_t from_v = 2 * net.key_heads * Dk + head * Dv;
  std::vector<const float*> inputs(net.conv_width);
  auto channels = [&](int64_t from) {
    for (const float*& input : inputs) input += from;
    return inputs.data();
  };
  const float* k_taps = block.taps + net.conv_width * block.key_stride;
  const float* v_taps = k_taps + net.conv_width * block.key_stride;
  for (int64_t i = 0; i < count; i++) {
    const int64_t token = first + i, at = (b * net.tokens + token) * net.value_heads + head;
    for (int64_t j = 0; j <= past; j++) {
      const int64_t row = token + j;  // of the history and then the call's own tokens
      inputs[j] = row < past ? net.history + (b * past + row) * C : net.qkv + (b * net.tokens + row - past) * C;
    }
    float *q = block.q + i * block.key_stride, *k = block.k + i * block.key_stride;
    convolve(channels(from_q), block.taps, net.conv_width, Dk, block.key_stride, q);
    convolve(channels(from_k - from_q), k_taps, net.conv_width, Dk, block.key_stride, k);
    convolve(channels(from_v - from_k), v_taps, net.conv_width, Dv, block.value_stride, block.v + i * block.value_stride);
    scale_to_length(q, Dk, net.eps, 1 / std::sqrt(static_cast<float>(Dk)));
    scale_to_length(k, Dk, net.eps, 1);
    block.qk[i] = dot(q, k, block.key_stride);
    block.decay[i] = std::exp(softplus(net.alpha[at] + net.dt[head]) * net.a[head]);
    block.beta[i] = 1 / (1 + std::exp(-net.beta[at]));
  }
}

// R rows of S (in block.rows, its rows from `first` on) through `count` tokens:
//   S' = decay S + c k^T with c = beta (v - decay S k), and o = S' q = decay S q + c (k q).
// Both products are of the memory before the token, so that one pass writes what the token before it left
// and reads what this one needs.
template <int R>
static void advance_rows(HeadBlock& block, int64_t first, int64_t count) {
  const int64_t n = block.key_stride;
  float written[R] = {}, decay = 1;
  const float* before = block.k;
  auto updated = [&](int r, int64_t j, F k) SCARLET_LAMBDA {
    const F s = Simd::mul(Simd::set1(decay), Simd::load(block.rows + r * n + j));
    const F next = Simd::fma(Simd::set1(written[r]), k, s);
    Simd::store(block.rows + r * n + j, next);
    return next;
  };
  for (int64_t i = 0; i < count; i++) {
    const float *q = block.q + i * n, *k = block.k + i * n;
    F sk[R], sq[R];
    SCARLET_UNROLL for (int r = 0; r < R; r++) sk[r] = sq[r] = Simd::zero();
    for (int64_t j = 0; j < n; j += W) {
      const F past = Simd::load(before + j), kj = Simd::load(k + j), qj = Simd::load(q + j);
      SCARLET_UNROLL for (int r = 0; r < R; r++) {
        const F s = updated(r, j, past);
        sk[r] = Simd::fma(s, kj, sk[r]);
        sq[r] = Simd::fma(s, qj, sq[r]);
      }
    }
    decay = block.decay[i];
    SCARLET_UNROLL for (int r = 0; r < R; r++) {
      const int64_t at = i * block.value_stride + first + r;
      written[r] = block.beta[i] * (block.v[at] - decay * Simd::sum(sk[r]));
      block.o[at] = decay * Simd::sum(sq[r]) + written[r] * block.qk[i];
    }
    before = k;
  }
  for (int64_t j = 0; j < n; j += W) {
    const F past = Simd::load(before + j);
    SCARLET_UNROLL for (int r = 0; r < R; r++) updated(r, j, past);
  }
}

static void delta_rule(const DeltaNet& net, const float* memory, float* new_memory, int64_t count, HeadBlock& block) {
  const int64_t Dk = net.key_dim, Dv = net.value_dim;
  for (int64_t row = 0; row < Dv;) {
    const int64_t rows = Dv - row < kBlockRows ? 1 : kBlockRows;
    for (int64_t r = 0; r < rows; r++) {
      float* to = block.rows + r * block.key_stride;
      for (int64_t i = 0; i < Dk; i += W) Simd::store(to + i, load_upto(memory + (row + r) * Dk + i, Dk - i));
    }
    rows == 1 ? advance_rows<1>(block, row, count) : advance_rows<kBlockRows>(block, row, count);
    for (int64_t r = 0; r < rows; r++) {
      std::memcpy(new_memory + (row + r) * Dk, block.rows + r * block.key_stride, Dk * sizeof(float));
    }
    row += rows;
  }
}

// out = o / rms(o) * norm * silu(z)
static void gated_norm(const float* o, const float* norm, const float* z, int64_t n, float eps, float* out) {
  const F factor = Simd::set1(1 / std::sqrt(sum_of_squares(o, n) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += W) {
    const F normed = Simd::mul(Simd::mul(Simd::load(o + i), factor), load_upto(norm + i, n - i));
    store_upto(out + i, Simd::mul(normed, silu(load_upto(z + i, n - i))), n - i);
  }
}

static void delta_net_head(const DeltaNet& net, int64_t b, int64_t head, float* scratch) {
  const int64_t Dk = net.key_dim, Dv = net.value_dim, width = net.conv_width;
  const int64_t key_channel = net.key_head[head] * Dk;
  HeadBlock block(net, scratch);
  float* taps = block.taps;
  transpose_taps(net.conv1d + key_channel * width, Dk, width, block.key_stride, taps);
  taps += width * block.key_stride;
  transpose_taps(net.conv1d + (net.key_heads * Dk + key_channel) * width, Dk, width, block.key_stride, taps);
  taps += width * block.key_stride;
  transpose_taps(net.conv1d + (2 * net.key_heads * Dk + head * Dv) * width, Dv, width, block.value_stride, taps);

  const float* memory = net.memory + (b * net.value_heads + head) * Dv * Dk;
  float* new_memory = net.new_memory + (b * net.value_heads + head) * Dv * Dk;
  const int64_t real = net.count[b];
  if (real == 0 && memory != new_memory) std::memcpy(new_memory, memory, Dv * Dk * sizeof(float));
  for (int64_t first = 0; first < net.tokens; first += kBlockTokens) {
    const int64_t count = std::min(kBlockTokens, std::max<int64_t>(0, real - first));
    if (count > 0) {
      prepare(net, b, head, first, count, block);
      delta_rule(net, first == 0 ? memory : new_memory, new_memory, count, block);
    }
    for (int64_t i = 0; i < std::min(kBlockTokens, net.tokens - first); i++) {
      const int64_t at = ((b * net.tokens + first + i) * net.value_heads + head) * Dv;
      if (i < count) {
        gated_norm(block.o + i * block.value_stride, net.norm, net.z + at, Dv, net.eps, net.out + at);
      } else {
        std::memset(net.out + at, 0, Dv * sizeof(float));
      }
    }
  }
}
