// The token mixers between their projections: each a few functions that one thread runs on its part.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace scarlet {

// A gated delta net: causal convolution, SiLU, unit queries and keys, gates, the delta rule, gated norm.
// B sequences of T tokens, of which the first `count[b]` are real; Hk key heads and Hv value heads of Dk and
// Dv dims; C = 2 Hk Dk + Hv Dv channels, in this order: queries, keys, values.
struct DeltaNet {
  int64_t tokens, key_heads, value_heads, key_dim, value_dim, conv_width;
  float eps;
  const int32_t* key_head;   // (Hv): the key head that each value head reads
  const int32_t* count;      // (B)
  const float* qkv;          // (B, T, C)
  const float* z;            // (B, T, Hv Dv)
  const float* alpha;        // (B, T, Hv)
  const float* beta;         // (B, T, Hv)
  const float* conv1d;       // (C, W), the last column for the current token
  const float* dt;           // (Hv)
  const float* a;            // (Hv)
  const float* norm;         // (Dv)
  const float* history;      // (B, W-1, C): the inputs before the first token
  const float* memory;       // (B, Hv, Dv, Dk)
  float* new_memory;         // the same, and maybe the same memory
  float* out;                // (B, T, Hv Dv); zeros for padding

  int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

// Attention over a cache of S slots: N query heads, K key heads of H dims, of which the first 2M rotate.
// The token t of sequence b has slot start[b] + t and sees every slot up to its own.
struct Attention {
  int64_t batch, tokens, slots, heads, kv_heads, dim, pairs;
  bool gated;     // q holds, a head, H of query and then H of gate
  bool adjacent;  // dims 2i and 2i+1 rotate together, else i and i+M
  bool normed;    // heads have norms
  float eps, scale;
  float magnitude;  // of cosines and sines: YaRN's
  QType cache_type;             // F32, F16 or BF16
  const int32_t *start, *count; // (B)
  const float* q;               // (B, T, N H) or gated (B, T, N 2H)
  const float *k, *v;           // (B, T, K H)
  const float *q_norm, *k_norm; // (H)
  const float* angle;           // (B, T, M)
  uint8_t *k_cache, *v_cache;   // (B, S, K, H)
  float* out;                   // (B, T, N H); zeros for padding

  float* turned;    // (B, T, N, padded H): scratch, the queries normed and rotated
  float* partials;  // (parts, B, T, N, padded H + 2): scratch, see attention.h
  int64_t part_slots, parts;
};

struct Mixers {
  int width;  // floats of a vector: what "padded" rounds up to
  size_t (*delta_net_scratch)(const DeltaNet& net);  // floats, for the next
  void (*delta_net_head)(const DeltaNet& net, int64_t b, int64_t head, float* scratch);
  void (*attention_store)(const Attention& attention, int64_t b, int64_t token);  // also turns the queries
  size_t (*attention_scratch)(const Attention& attention);  // floats, for the next
  void (*attention_part)(const Attention& attention, int64_t part, int64_t b, int64_t kv_head, int64_t first,
                         int64_t end, float* scratch);  // queries first ... end - 1 of T N/K
  void (*attention_join)(const Attention& attention, int64_t b, int64_t token);
};

const Mixers& mixers_generic();
#if defined(__x86_64__)
const Mixers& mixers_avx2();
const Mixers& mixers_avx512();
#endif

}  // namespace scarlet
