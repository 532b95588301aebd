// The FFI handlers of the token mixers: they check every shape and type, then spread the heads over the team.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "handlers.h"
#include "mixers.h"

namespace scarlet {
namespace {

std::string shape(std::initializer_list<int64_t> dims) {
  std::string text;
  for (int64_t d : dims) text += (text.empty() ? "" : ", ") + std::to_string(d);
  return "(" + text + ")";
}

bool has_shape(const Buffer& b, std::initializer_list<int64_t> dims) {
  return rank(b) == dims.size() && std::equal(dims.begin(), dims.end(), b.dimensions().begin());
}

const float* floats(const char* name, const Buffer& b, std::initializer_list<int64_t> dims) {
  expect(b.element_type() == ffi::F32 && has_shape(b, dims), name, b, "f32 " + shape(dims));
  return b.typed_data<float>();
}

// int32 (B), each from `least` to `most`.
const int32_t* lengths(const char* name, const Buffer& b, int64_t batch, int64_t least, int64_t most) {
  expect(b.element_type() == ffi::S32 && has_shape(b, {batch}), name, b, "i32 " + shape({batch}));
  for (int64_t i = 0; i < batch; i++) {
    const int64_t n = b.typed_data<int32_t>()[i];
    if (n < least || n > most) {
      throw Misfit{std::string(name) + " has " + std::to_string(n) + ": expected " + std::to_string(least) + " to " +
                   std::to_string(most)};
    }
  }
  return b.typed_data<int32_t>();
}

// inputs (B, W-1 + T, C) are history and then qkv: the next history is the W-1 rows before row count + W-1.
void keep_history(const float* history, const float* qkv, int64_t tokens, int64_t past, int64_t channels, int64_t count,
                  float* to) {
  for (int64_t i = 0; i < past; i++) {  // upwards: `to` may be `history` itself
    const int64_t row = count + i;
    const float* from = row < past ? history + row * channels : qkv + (row - past) * channels;
    std::memmove(to + i * channels, from, channels * sizeof(float));
  }
}

ffi::Error delta_net(Buffer qkv, Buffer z, Buffer alpha, Buffer beta, Buffer conv1d, Buffer dt, Buffer a, Buffer norm,
                     Buffer history, Buffer memory, Buffer count, ffi::Result<Buffer> out_result,
                     ffi::Result<Buffer> history_result, ffi::Result<Buffer> memory_result,
                     ffi::Span<const int32_t> key_head, int64_t key_heads, float eps) {
  return guarded("scarlet_delta_net", [&](const Kernels& kernels) {
    const Buffer out = *out_result, new_history = *history_result, new_memory = *memory_result;
    expect(rank(qkv) == 3, "qkv", qkv, "f32 (B, T, C)");
    expect(rank(memory) == 4, "memory", memory, "f32 (B, Hv, Dv, Dk)");
    expect(rank(conv1d) == 2 && dim(conv1d, 0) > 0, "conv1d", conv1d, "f32 (C, W)");
    const int64_t B = qkv.dimensions()[0];
    DeltaNet net;
    net.tokens = dim(qkv, 1);
    net.value_heads = dim(memory, 2), net.value_dim = dim(memory, 1), net.key_dim = dim(memory, 0);
    net.key_heads = key_heads;
    net.conv_width = dim(conv1d, 0);
    net.eps = eps;
    const int64_t T = net.tokens, C = net.channels(), Hv = net.value_heads, Dv = net.value_dim, past = net.conv_width - 1;
    net.key_head = key_head.begin();
    if (static_cast<int64_t>(key_head.size()) != Hv) throw Misfit{"key_head: expected one of each value head"};
    for (int32_t head : key_head) {
      if (head < 0 || head >= key_heads) throw Misfit{"key_head has " + std::to_string(head) + ": there is no such head"};
    }
    net.qkv = floats("qkv", qkv, {B, T, C});
    net.z = floats("z", z, {B, T, Hv * Dv});
    net.alpha = floats("alpha", alpha, {B, T, Hv});
    net.beta = floats("beta", beta, {B, T, Hv});
    net.conv1d = floats("conv1d", conv1d, {C, past + 1});
    net.dt = floats("dt", dt, {Hv});
    net.a = floats("a", a, {Hv});
    net.norm = floats("norm", norm, {Dv});
    net.history = floats("history", history, {B, past, C});
    net.memory = floats("memory", memory, {B, Hv, Dv, net.key_dim});
    net.count = lengths("count", count, B, 0, T);
    floats("the new history", new_history, {B, past, C});
    floats("the new memory", new_memory, {B, Hv, Dv, net.key_dim});
    floats("the result", out, {B, T, Hv * Dv});
    net.new_memory = new_memory.typed_data<float>();
    net.out = out.typed_data<float>();

    const Mixers& m = kernels.mixers();
    run_tasks(B * Hv, m.delta_net_scratch(net), [&](int64_t i, float* scratch) {
      const FlushSubnormals guard;  // a memory that nobody writes decays to nothing
      m.delta_net_head(net, i / Hv, i % Hv, scratch);
    });
    for (int64_t b = 0; b < B; b++) {
      keep_history(net.history + b * past * C, net.qkv + b * T * C, T, past, C, net.count[b],
                   new_history.typed_data<float>() + b * past * C);
    }
  });
}

QType cache_type(const Buffer& cache) {
  switch (cache.element_type()) {
    case ffi::F32: return QType::F32;
    case ffi::F16: return QType::F16;
    case ffi::BF16: return QType::BF16;
    default: expect(false, "the cache", cache, "f32, f16 or bf16 (B, S, K, H)");
  }
  return QType::F32;
}

// The output holds what the input held; XLA makes them one where it can.
uint8_t* carried_over(const char* name, const Buffer& in, const Buffer& out, const Buffer& like) {
  for (const Buffer& b : {in, out}) {
    expect(b.element_type() == like.element_type() && rank(b) == 4 &&
               std::equal(b.dimensions().begin(), b.dimensions().end(), like.dimensions().begin()),
           name, b, "the same as " + describe(like));
  }
  if (in.untyped_data() != out.untyped_data()) std::memcpy(out.untyped_data(), in.untyped_data(), in.size_bytes());
  return static_cast<uint8_t*>(out.untyped_data());
}

ffi::Error attention(Buffer q, Buffer k, Buffer v, Buffer q_norm, Buffer k_norm, Buffer angle, Buffer start, Buffer count,
                     Buffer k_cache, Buffer v_cache, ffi::Result<Buffer> out_result, ffi::Result<Buffer> k_result,
                     ffi::Result<Buffer> v_result, bool gated, bool adjacent, float eps, float magnitude, float scale) {
  return guarded("scarlet_attention", [&](const Kernels& kernels) {
    const Buffer out = *out_result;
    Attention a;
    a.cache_type = cache_type(k_cache);
    expect(rank(k_cache) == 4, "the cache", k_cache, "(B, S, K, H)");
    expect(rank(q) == 3, "q", q, "f32 (B, T, N H), or with gates (B, T, N 2H)");
    expect(rank(angle) == 3, "angle", angle, "f32 (B, T, M)");
    a.batch = q.dimensions()[0], a.tokens = dim(q, 1);
    a.slots = dim(k_cache, 2), a.kv_heads = dim(k_cache, 1), a.dim = dim(k_cache, 0);
    a.pairs = dim(angle, 0);
    a.gated = gated, a.adjacent = adjacent, a.eps = eps, a.magnitude = magnitude, a.scale = scale;
    const int64_t B = a.batch, T = a.tokens, K = a.kv_heads, H = a.dim, row = H * (gated ? 2 : 1);
    expect(H > 0 && K > 0 && dim(q, 0) % (row * K) == 0, "q", q, "rows of a multiple of " + std::to_string(row * K));
    expect(2 * a.pairs <= H, "angle", angle, "at most half of the " + std::to_string(H) + " dims of a head");
    a.heads = dim(q, 0) / row;
    a.q = floats("q", q, {B, T, a.heads * row});
    a.k = floats("k", k, {B, T, K * H});
    a.v = floats("v", v, {B, T, K * H});
    const int64_t normed = dim(q_norm, 0) > 0 ? H : 0;
    a.q_norm = floats("q_norm", q_norm, {normed});
    a.k_norm = floats("k_norm", k_norm, {normed});
    a.normed = normed > 0;
    a.angle = floats("angle", angle, {B, T, a.pairs});
    a.count = lengths("count", count, B, 0, T);
    a.start = lengths("start", start, B, 0, a.slots);
    int64_t used = 0;
    for (int64_t b = 0; b < B; b++) used = std::max<int64_t>(used, a.start[b] + a.count[b]);
    if (used > a.slots) throw Misfit{std::to_string(used) + " tokens: the cache has " + std::to_string(a.slots) + " slots"};
    expect(dim(k_cache, 3) == B, "the cache", k_cache, "of " + std::to_string(B) + " sequences");
    a.k_cache = carried_over("the key cache", k_cache, *k_result, k_cache);
    a.v_cache = carried_over("the value cache", v_cache, *v_result, k_cache);
    floats("the result", out, {B, T, a.heads * H});
    a.out = out.typed_data<float>();

    // A few tokens read a long cache in parts, for all cores; many tokens are parts enough.
    constexpr int64_t kFewTokens = 8, kFewSlots = 256, kPartQueries = 32;
    const Mixers& m = kernels.mixers();
    const int64_t padded = (H + m.width - 1) / m.width * m.width;
    a.part_slots = T <= kFewTokens ? kFewSlots : std::max<int64_t>(1, used);
    a.parts = (used + a.part_slots - 1) / a.part_slots;
    const std::unique_ptr<float[]> turned(new float[B * T * a.heads * padded]);
    const std::unique_ptr<float[]> partials(new float[a.parts * B * T * a.heads * (padded + 2)]);
    a.turned = turned.get(), a.partials = partials.get();

    run_tasks(B * T, 0, [&](int64_t i, float*) {
      const FlushSubnormals guard;
      m.attention_store(a, i / T, i % T);
    });
    const int64_t queries = T * (a.heads / K), blocks = (queries + kPartQueries - 1) / kPartQueries;
    run_tasks(a.parts * B * K * blocks, m.attention_scratch(a), [&](int64_t i, float* scratch) {
      const FlushSubnormals guard;
      const int64_t first = (blocks - 1 - i % blocks) * kPartQueries, head = i / blocks % K;  // the longest first
      m.attention_part(a, i / blocks / K / B, i / blocks / K % B, head, first, std::min(queries, first + kPartQueries),
                       scratch);
    });
    run_tasks(B * T, 0, [&](int64_t i, float*) {
      const FlushSubnormals guard;
      m.attention_join(a, i / T, i % T);
    });
  });
}

}  // namespace
}  // namespace scarlet

using xla::ffi::AnyBuffer;

XLA_FFI_DEFINE_HANDLER_SYMBOL(scarlet_delta_net, scarlet::delta_net,
                              xla::ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()  // qkv
                                  .Arg<AnyBuffer>()  // z
                                  .Arg<AnyBuffer>()  // alpha
                                  .Arg<AnyBuffer>()  // beta
                                  .Arg<AnyBuffer>()  // conv1d
                                  .Arg<AnyBuffer>()  // dt
                                  .Arg<AnyBuffer>()  // a
                                  .Arg<AnyBuffer>()  // norm
                                  .Arg<AnyBuffer>()  // history
                                  .Arg<AnyBuffer>()  // memory
                                  .Arg<AnyBuffer>()  // count
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<xla::ffi::Span<const int32_t>>("key_head")
                                  .Attr<int64_t>("key_heads")
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(scarlet_attention, scarlet::attention,
                              xla::ffi::Ffi::Bind()
                                  .Arg<AnyBuffer>()  // q
                                  .Arg<AnyBuffer>()  // k
                                  .Arg<AnyBuffer>()  // v
                                  .Arg<AnyBuffer>()  // q_norm
                                  .Arg<AnyBuffer>()  // k_norm
                                  .Arg<AnyBuffer>()  // angle
                                  .Arg<AnyBuffer>()  // start
                                  .Arg<AnyBuffer>()  // count
                                  .Arg<AnyBuffer>()  // key cache
                                  .Arg<AnyBuffer>()  // value cache
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<bool>("gated")
                                  .Attr<bool>("adjacent")
                                  .Attr<float>("eps")
                                  .Attr<float>("magnitude")
                                  .Attr<float>("scale"));
