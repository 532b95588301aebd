// Attention over a key-value cache, with a softmax that is kept up as slots are read: no matrix of scores.
// Included after vectors.h, inside an instruction set's namespace.
//
// The slots are cut into parts, each queries' outcome of a part being its largest score m, the sum l of
// exp(score - m), and the sum of exp(score - m) v; the parts are joined at the end. The cut depends on shapes
// and lengths alone, so that results do not depend on the number of threads.
#pragma once

static constexpr int kQueries = 4;           // taken together
static constexpr int64_t kBlockSlots = 16;   // whose keys and values stay in the first-level cache

// --- 16-bit floats ----------------------------------------------------------------------------------

static uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// To the nearest, ties to even.
static uint16_t to_f16(float x) {
  const uint32_t magnitude = float_bits(x) & 0x7fffffff;
  const uint16_t sign = float_bits(x) >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and more: infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: subnormal, in units of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(std::fabs(x) * 0x1p24f));
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

static uint16_t to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void store_as(QType type, const float* from, int64_t n, uint8_t* to) {
  if (type == QType::F32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    const uint16_t half = type == QType::F16 ? to_f16(from[i]) : to_bf16(from[i]);
    std::memcpy(to + 2 * i, &half, sizeof(half));
  }
}

// n floats of that type, padded with zeros to whole vectors.
static void load_as(QType type, const uint8_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += W) {
    F v;
    if (type == QType::F32) {
      v = load_upto(reinterpret_cast<const float*>(from) + i, n - i);
    } else {
      uint8_t padded[2 * W] = {};
      const uint8_t* p = from + 2 * i;
      if (n - i < W) p = static_cast<const uint8_t*>(std::memcpy(padded, p, 2 * (n - i)));
      v = type == QType::F16 ? Simd::from_f16(p) : Simd::from_bf16(p);
    }
    Simd::store(to + i, v);
  }
}

// --- before: norms, rotation, the new keys and values -------------------------------------------------

// to = x / rms(x) * weight
static void head_norm(const Attention& a, const float* x, const float* weight, float* to) {
  const F factor = Simd::set1(1 / std::sqrt(sum_of_squares(x, a.dim) / static_cast<float>(a.dim) + a.eps));
  for (int64_t i = 0; i < a.dim; i += W) {
    const F normed = Simd::mul(load_upto(x + i, a.dim - i), factor);
    Simd::store(to + i, Simd::mul(normed, load_upto(weight + i, a.dim - i)));
  }
}

// to = x, normed if heads are, its first 2M dims rotated by the angles whose cosines and sines are given.
static void norm_and_turn(const Attention& a, const float* x, const float* weight, const float* cosine,
                          const float* sine, float* to) {
  if (a.normed) {
    head_norm(a, x, weight, to);
  } else {
    for (int64_t i = 0; i < a.dim; i += W) Simd::store(to + i, load_upto(x + i, a.dim - i));
  }
  const int64_t step = a.adjacent ? 2 : 1, apart = a.adjacent ? 1 : a.pairs;
  for (int64_t i = 0; i < a.pairs; i++) {
    float &first = to[i * step], &second = to[i * step + apart];
    const float x0 = first, x1 = second;
    first = x0 * cosine[i] - x1 * sine[i];
    second = x0 * sine[i] + x1 * cosine[i];
  }
}

// Turns the token's queries, and puts its key and value into the cache.
static void attention_store(const Attention& a, int64_t b, int64_t token) {
  if (token >= a.count[b]) return;
  const int64_t padded = whole_vectors(a.dim), at = b * a.tokens + token;
  std::vector<float> buffer(2 * a.pairs + padded);
  float *cosine = buffer.data(), *sine = cosine + a.pairs, *key = sine + a.pairs;
  for (int64_t i = 0; i < a.pairs; i++) {
    cosine[i] = a.magnitude * std::cos(a.angle[at * a.pairs + i]);
    sine[i] = a.magnitude * std::sin(a.angle[at * a.pairs + i]);
  }
  const int64_t stride = a.dim * (a.gated ? 2 : 1);
  for (int64_t n = 0; n < a.heads; n++) {
    norm_and_turn(a, a.q + (at * a.heads + n) * stride, a.q_norm, cosine, sine, a.turned + (at * a.heads + n) * padded);
  }
  const int64_t bytes = row_bytes(a.cache_type, a.dim);
  const int64_t slot = (b * a.slots + a.start[b] + token) * a.kv_heads;
  for (int64_t h = 0; h < a.kv_heads; h++) {
    norm_and_turn(a, a.k + (at * a.kv_heads + h) * a.dim, a.k_norm, cosine, sine, key);
    store_as(a.cache_type, key, a.dim, a.k_cache + (slot + h) * bytes);
    store_as(a.cache_type, a.v + (at * a.kv_heads + h) * a.dim, a.dim, a.v_cache + (slot + h) * bytes);
  }
}

// --- a part of the slots ------------------------------------------------------------------------------

// What is known of a query after some slots; `sum` of padded H floats.
struct Partial {
  float* sum;
  float* largest;  // score, and beside it the total weight
  float* weight;
};

static Partial partial(const Attention& a, int64_t part, int64_t b, int64_t token, int64_t head) {
  const int64_t padded = whole_vectors(a.dim);
  float* p = a.partials + (((part * a.batch + b) * a.tokens + token) * a.heads + head) * (padded + 2);
  return {p, p + padded, p + padded + 1};
}

// A few rows of f32, where they are or decoded into scratch.
struct SlotRows {
  const float* at[kBlockSlots];

  SlotRows(const Attention& a, const uint8_t* cache, int64_t b, int64_t kv_head, int64_t first, int64_t count,
           float* scratch) {
    const int64_t bytes = row_bytes(a.cache_type, a.dim), padded = whole_vectors(a.dim);
    const uint8_t* row = cache + ((b * a.slots + first) * a.kv_heads + kv_head) * bytes;
    const bool in_place = a.cache_type == QType::F32 && padded == a.dim;
    for (int64_t i = 0; i < kBlockSlots; i++) {  // the last stands in for those missing
      if (i < count && !in_place) load_as(a.cache_type, row, a.dim, scratch + i * padded);
      at[i] = i >= count ? at[count - 1] : in_place ? reinterpret_cast<const float*>(row) : scratch + i * padded;
      if (i < count) row += a.kv_heads * bytes;
    }
  }
};

// scores[m][n] = q[m] . k[n]
static void multiply_keys(const float* const* q, const SlotRows& k, int64_t n, float (*scores)[kBlockSlots]) {
  constexpr int N = 2;
  for (int64_t slot = 0; slot < kBlockSlots; slot += N) {
    F sums[kQueries][N];
    SCARLET_UNROLL for (int i = 0; i < kQueries * N; i++) sums[i / N][i % N] = Simd::zero();
    for (int64_t j = 0; j < n; j += W) {
      F key[N];
      SCARLET_UNROLL for (int i = 0; i < N; i++) key[i] = Simd::load(k.at[slot + i] + j);
      SCARLET_UNROLL for (int m = 0; m < kQueries; m++) {
        const F query = Simd::load(q[m] + j);
        SCARLET_UNROLL for (int i = 0; i < N; i++) sums[m][i] = Simd::fma(query, key[i], sums[m][i]);
      }
    }
    SCARLET_UNROLL for (int m = 0; m < kQueries; m++) {
      SCARLET_UNROLL for (int i = 0; i < N; i++) scores[m][slot + i] = Simd::sum(sums[m][i]);
    }
  }
}

// Turns the first `seen` scores into weights relative to the largest score so far, the others into 0, and
// returns the factor that what was summed before is to be multiplied by.
static float weigh(const Attention& a, float* scores, int64_t seen, Partial& p) {
  float largest = *p.largest;
  for (int64_t i = 0; i < seen; i++) largest = std::max(largest, scores[i] *= a.scale);
  if (largest == -INFINITY) largest = 0;  // nothing seen, or nothing but -inf
  const F top = Simd::set1(largest);
  for (int64_t i = seen; i < kBlockSlots; i++) scores[i] = 0;
  for (int64_t i = 0; i < kBlockSlots; i += W) {
    Simd::store(scores + i, exponential(Simd::sub(Simd::load(scores + i), top)));
  }
  float total = 0;
  for (int64_t i = 0; i < seen; i++) total += scores[i];
  for (int64_t i = seen; i < kBlockSlots; i++) scores[i] = 0;
  const float kept = std::exp(*p.largest - largest);
  *p.largest = largest;
  *p.weight = kept * *p.weight + total;
  return kept;
}

// sum[m] = kept[m] * sum[m] + the values, each times its weight
static void add_values(const SlotRows& v, const float (*weights)[kBlockSlots], const float* kept, int64_t n,
                       float* const* sum) {
  for (int64_t j = 0; j < n; j += W) {
    F total[kQueries];
    SCARLET_UNROLL for (int m = 0; m < kQueries; m++) {
      total[m] = Simd::mul(Simd::set1(kept[m]), Simd::load(sum[m] + j));
    }
    SCARLET_UNROLL for (int i = 0; i < kBlockSlots; i++) {
      const F value = Simd::load(v.at[i] + j);
      SCARLET_UNROLL for (int m = 0; m < kQueries; m++) total[m] = Simd::fma(Simd::set1(weights[m][i]), value, total[m]);
    }
    SCARLET_UNROLL for (int m = 0; m < kQueries; m++) Simd::store(sum[m] + j, total[m]);
  }
}

static size_t attention_scratch(const Attention& a) { return (2 * kBlockSlots + 1) * whole_vectors(a.dim); }

// Queries first ... end - 1 of those that read key head `kv_head`: query u is head u mod G of token u div G.
static void attention_part(const Attention& a, int64_t part, int64_t b, int64_t kv_head, int64_t first, int64_t end,
                           float* scratch) {
  const int64_t padded = whole_vectors(a.dim), group = a.heads / a.kv_heads;
  float *key_rows = scratch, *value_rows = scratch + kBlockSlots * padded, *spare = value_rows + kBlockSlots * padded;
  end = std::min(end, a.count[b] * group);
  if (first >= end) return;
  for (int64_t u = first; u < end; u++) {
    const Partial p = partial(a, part, b, u / group, kv_head * group + u % group);
    std::memset(p.sum, 0, padded * sizeof(float));
    *p.largest = -INFINITY;
    *p.weight = 0;
  }
  auto slots_seen = [&](int64_t u) { return a.start[b] + u / group + 1; };
  const int64_t from = part * a.part_slots, to = std::min(from + a.part_slots, slots_seen(end - 1));
  for (int64_t slot = from; slot < to; slot += kBlockSlots) {
    const int64_t count = std::min(kBlockSlots, to - slot);
    const SlotRows keys(a, a.k_cache, b, kv_head, slot, count, key_rows);
    const SlotRows values(a, a.v_cache, b, kv_head, slot, count, value_rows);
    for (int64_t u = first; u < end; u += kQueries) {
      if (slots_seen(std::min(u + kQueries, end) - 1) <= slot) continue;
      const float* q[kQueries];
      float *sum[kQueries], kept[kQueries] = {};
      alignas(64) float scores[kQueries][kBlockSlots] = {};
      for (int m = 0; m < kQueries; m++) {  // the last stands in for those missing
        const int64_t v = std::min(u + m, end - 1), head = kv_head * group + v % group;
        q[m] = a.turned + ((b * a.tokens + v / group) * a.heads + head) * padded;
      }
      multiply_keys(q, keys, padded, scores);
      for (int m = 0; m < kQueries; m++) {
        const int64_t v = u + m, seen = std::min(count, slots_seen(v) - slot);
        sum[m] = spare;
        if (v >= end || seen <= 0) {
          for (float& score : scores[m]) score = 0;
          continue;
        }
        Partial p = partial(a, part, b, v / group, kv_head * group + v % group);
        sum[m] = p.sum;
        kept[m] = weigh(a, scores[m], seen, p);
      }
      add_values(values, scores, kept, padded, sum);
    }
  }
}

// --- after: the parts joined, the gate ----------------------------------------------------------------

static void attention_join(const Attention& a, int64_t b, int64_t token) {
  const int64_t padded = whole_vectors(a.dim), at = b * a.tokens + token;
  float* out = a.out + at * a.heads * a.dim;
  if (token >= a.count[b]) {
    std::memset(out, 0, a.heads * a.dim * sizeof(float));
    return;
  }
  std::vector<float> sum(padded);
  const int64_t parts = (a.start[b] + token) / a.part_slots + 1;  // those that it sees
  for (int64_t head = 0; head < a.heads; head++, out += a.dim) {
    float largest = -INFINITY, weight = 0;
    for (int64_t part = 0; part < parts; part++) largest = std::max(largest, *partial(a, part, b, token, head).largest);
    for (int64_t part = 0; part < parts; part++) {
      const Partial p = partial(a, part, b, token, head);
      const float factor = std::exp(*p.largest - largest);
      weight += factor * *p.weight;
      for (int64_t i = 0; i < padded; i += W) {
        const F before = part == 0 ? Simd::zero() : Simd::load(sum.data() + i);
        Simd::store(sum.data() + i, Simd::fma(Simd::set1(factor), Simd::load(p.sum + i), before));
      }
    }
    const F scale = Simd::set1(1 / weight);
    const float* gate = a.q + (at * a.heads + head) * 2 * a.dim + a.dim;
    for (int64_t i = 0; i < a.dim; i += W) {
      F mean = Simd::mul(Simd::load(sum.data() + i), scale);
      if (a.gated) mean = Simd::mul(mean, sigmoid(load_upto(gate + i, a.dim - i)));
      store_upto(out + i, mean, a.dim - i);
    }
  }
}

static const Mixers kMixers = {Simd::kWidth,      delta_net_scratch, delta_net_head,
                               attention_store,   attention_scratch, attention_part,    attention_join};
