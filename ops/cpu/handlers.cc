// The XLA FFI handlers: they check every shape and type, then hand pointers to the kernels.
//
// Weights are packed rows, u8 (..., out, row bytes), or plain f32, f16 or bf16 (..., out, in), with the type
// named by an attribute. What does not fit is an error that names the argument, its shape and what was
// expected.

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "handlers.h"

namespace scarlet {
namespace {

// Weights as the kernels see them.
struct Weights {
  QType type;
  const uint8_t* data;
  int64_t rows, elements;  // of one matrix: its out and in
  size_t bytes;            // of one matrix
};

Weights weights(const char* name, const Buffer& b, std::string_view type_name) {
  Weights w;
  if (!type_by_name(type_name.data(), type_name.size(), &w.type)) {
    throw Misfit{std::string(name) + " has quant type " + std::string(type_name) + ", which is unknown"};
  }
  const TypeInfo& info = kTypes[static_cast<int>(w.type)];
  expect(rank(b) >= 2, name, b, "(..., out, row bytes)");
  w.rows = dim(b, 1);
  const int64_t last = dim(b, 0);
  if (b.element_type() == ffi::U8) {
    const int64_t unit = is_float(w.type) ? info.bytes / info.elements : info.bytes;
    expect(last % unit == 0, name, b,
           "rows of whole " + std::string(info.name) + " blocks of " + std::to_string(unit) + " bytes");
    w.elements = last / unit * (is_float(w.type) ? 1 : info.elements);
  } else {
    const ffi::DataType own[] = {ffi::F32, ffi::F16, ffi::BF16};
    expect(is_float(w.type) && b.element_type() == own[static_cast<int>(w.type)], name, b,
           "u8, or the element type of " + std::string(info.name));
    w.elements = last;
  }
  w.data = static_cast<const uint8_t*>(b.untyped_data());
  w.bytes = row_bytes(w.type, w.elements) * w.rows;
  return w;
}

std::vector<std::string_view> split_names(std::string_view names) {
  std::vector<std::string_view> parts;
  for (size_t from = 0;;) {
    const size_t comma = names.find(',', from);
    parts.push_back(names.substr(from, comma - from));
    if (comma == std::string_view::npos) return parts;
    from = comma + 1;
  }
}

// A product and the lists of row pointers that it refers to.
struct Rows {
  std::vector<const float*> x;
  std::vector<float*> y;

  void add(const float* from, float* to) {
    x.push_back(from);
    y.push_back(to);
  }
  Job job(const Weights& w, int64_t matrix, bool fast) const {
    return {
        w.type,
        {w.data + matrix * w.bytes, w.rows, w.elements, x.data(), y.data(), static_cast<int64_t>(x.size())},
        fast};
  }
};

// --- products ---------------------------------------------------------------------------------------

// The index into leading dimensions `dims`, each 1 or that of `full`, of a row-major index into `full`.
int64_t broadcast_index(int64_t index, Buffer::Dimensions full, Buffer::Dimensions dims, size_t kept) {
  int64_t result = 0, scale = 1;
  for (size_t i = full.size() - kept; i-- > 0; index /= full[i]) {
    if (dims[i] == 1) continue;
    result += index % full[i] * scale;
    scale *= dims[i];
  }
  return result;
}

void expect_leading(const char* name, const Buffer& b, const Buffer& y) {
  bool fits = rank(b) == rank(y);
  for (size_t i = 0; fits && i + 2 < rank(y); i++) {
    fits = b.dimensions()[i] == 1 || b.dimensions()[i] == y.dimensions()[i];
  }
  expect(fits, name, b, "the leading dimensions of the result, " + describe(y) + ", or 1");
}

// x (..., M, in) times one w (..., out, in): the rows of each matrix of w.
void collect(const Buffer& x, const Buffer& wb, const Buffer& y, const Weights& w,
             std::map<int64_t, Rows>* rows) {
  expect(w.elements == dim(x, 0), "w", wb,
         "rows of " + std::to_string(dim(x, 0)) + " elements, as in x " + describe(x));
  expect(y.element_type() == ffi::F32 && rank(y) == rank(x) && dim(y, 0) == w.rows && dim(y, 1) == dim(x, 1),
         "the result", y, "f32 (..., M, out) for x " + describe(x) + " and w " + describe(wb));
  expect_leading("x", x, y);
  expect_leading("w", wb, y);
  const int64_t M = dim(x, 1);
  for (int64_t b = 0; b < leading(y, 2); b++) {
    const float* from =
        x.typed_data<float>() + broadcast_index(b, y.dimensions(), x.dimensions(), 2) * M * w.elements;
    float* to = y.typed_data<float>() + b * M * w.rows;
    Rows& target = (*rows)[broadcast_index(b, y.dimensions(), wb.dimensions(), 2)];
    for (int64_t m = 0; m < M; m++) target.add(from + m * w.elements, to + m * w.rows);
  }
}

ffi::Error qmatmul(Buffer x, ffi::RemainingArgs ws, ffi::RemainingRets ys, std::string_view qtypes,
                   bool fast) {
  return guarded("scarlet_qmatmul", [&](const Kernels& kernels) {
    const std::vector<std::string_view> names = split_names(qtypes);
    if (names.size() != ws.size() || names.size() != ys.size()) {
      throw Misfit{std::to_string(ws.size()) + " weights and " + std::to_string(ys.size()) +
                   " results for quant types " + std::string(qtypes)};
    }
    expect(x.element_type() == ffi::F32 && rank(x) >= 2, "x", x, "f32 (..., M, in)");
    std::vector<std::map<int64_t, Rows>> rows(names.size());
    std::vector<Job> jobs;
    for (size_t i = 0; i < names.size(); i++) {
      const Buffer wb = *ws.get<Buffer>(i), y = **ys.get<Buffer>(i);
      const Weights w = weights("w", wb, names[i]);
      collect(x, wb, y, w, &rows[i]);
      for (const auto& [matrix, list] : rows[i]) jobs.push_back(list.job(w, matrix, fast));
    }
    multiply_all(kernels, jobs);
  });
}

// The expert of each of M rows' k slots: int32 (M, k), each below `experts`.
const int32_t* expert_ids(const Buffer& ids, int64_t experts) {
  expect(ids.element_type() == ffi::S32 && rank(ids) == 2, "ids", ids, "i32 (M, k)");
  const int32_t* id = ids.typed_data<int32_t>();
  for (int64_t i = 0; i < leading(ids, 0); i++) {
    if (id[i] < 0 || id[i] >= experts) {
      throw Misfit{"ids has " + std::to_string(id[i]) + ": expected 0 to " + std::to_string(experts - 1)};
    }
  }
  return id;
}

// x (M, in) or, each slot with its own, (M, k, in); w (E, out, in); ids i32 (M, k) -> y (M, k, out).
ffi::Error qmatmul_experts(Buffer x, Buffer wb, Buffer ids, ffi::Result<Buffer> result,
                           std::string_view qtype, bool fast) {
  return guarded("scarlet_qmatmul_experts", [&](const Kernels& kernels) {
    const Buffer y = *result;
    const Weights w = weights("w", wb, qtype);
    expect(rank(wb) == 3, "w", wb, "(E, out, row bytes)");
    const int32_t* id = expert_ids(ids, wb.dimensions()[0]);
    const int64_t M = dim(ids, 1), k = dim(ids, 0);
    const bool own = rank(x) == 3;
    expect(x.element_type() == ffi::F32 && (rank(x) == 2 || (own && dim(x, 1) == k)) &&
               x.dimensions()[0] == M && dim(x, 0) == w.elements,
           "x", x, "f32 (M, in) or (M, k, in) for w " + describe(wb) + " and ids " + describe(ids));
    expect(y.element_type() == ffi::F32 && rank(y) == 3 && y.dimensions()[0] == M && dim(y, 1) == k &&
               dim(y, 0) == w.rows,
           "the result", y, "f32 (M, k, out)");
    std::map<int64_t, Rows> rows;
    for (int64_t i = 0; i < M * k; i++) {
      rows[id[i]].add(x.typed_data<float>() + (own ? i : i / k) * w.elements,
                      y.typed_data<float>() + i * w.rows);
    }
    std::vector<Job> jobs;
    for (const auto& [expert, list] : rows) jobs.push_back(list.job(w, expert, fast));
    multiply_all(kernels, jobs);
  });
}

// Gate and up (..., F, in), down (..., out, F), of rows x (M, in).
struct Network {
  Weights gate, up, down;

  Network(const Buffer& x, const Buffer& gate_b, const Buffer& up_b, const Buffer& down_b,
          std::string_view qtypes, size_t dims) {
    const std::vector<std::string_view> names = split_names(qtypes);
    if (names.size() != 3) throw Misfit{"quant types " + std::string(qtypes) + ": expected three"};
    gate = weights("gate", gate_b, names[0]), up = weights("up", up_b, names[1]);
    down = weights("down", down_b, names[2]);
    expect(x.element_type() == ffi::F32 && rank(x) == 2, "x", x, "f32 (M, in)");
    const int64_t in = dim(x, 0);
    expect(rank(gate_b) == dims && gate.elements == in, "gate", gate_b,
           "rows of " + std::to_string(in) + " elements");
    expect(rank(up_b) == dims && up.elements == in && up.rows == gate.rows, "up", up_b, "the shape of gate");
    expect(rank(down_b) == dims && down.elements == gate.rows, "down", down_b,
           "rows of " + std::to_string(gate.rows) + " elements");
  }

  void expect_result(const Buffer& y, int64_t M) const {
    expect(y.element_type() == ffi::F32 && rank(y) == 2 && dim(y, 1) == M && dim(y, 0) == down.rows,
           "the result", y, "f32 (M, out)");
  }
};

// x (M, in), gate and up (F, in), down (out, F) -> y (M, out) = (silu(x gate) * (x up)) down.
ffi::Error ffn(Buffer x, Buffer gate, Buffer up, Buffer down, ffi::Result<Buffer> result,
               std::string_view qtypes, bool fast) {
  return guarded("scarlet_ffn", [&](const Kernels& kernels) {
    const Buffer y = *result;
    const Network net(x, gate, up, down, qtypes, 2);
    const int64_t M = dim(x, 1), in = dim(x, 0), F = net.gate.rows, out = net.down.rows;
    net.expect_result(y, M);
    const std::unique_ptr<float[]> hidden(new float[M * F]);
    Rows in_rows, out_rows;
    for (int64_t m = 0; m < M; m++) {
      in_rows.add(x.typed_data<float>() + m * in, hidden.get() + m * F);
      out_rows.add(hidden.get() + m * F, y.typed_data<float>() + m * out);
    }
    multiply_gated(kernels, {in_rows.job(net.gate, 0, fast)}, {in_rows.job(net.up, 0, fast)});
    multiply_all(kernels, {out_rows.job(net.down, 0, fast)});
  });
}

// x (M, in), gate and up (E, F, in), down (E, out, F), ids i32 (M, k), shares f32 (M, k) -> y (M, out): the sum
// over a row's slots of its share times what the slot's network makes of the row.
ffi::Error ffn_experts(Buffer x, Buffer gate, Buffer up, Buffer down, Buffer ids, Buffer shares,
                       ffi::Result<Buffer> result, std::string_view qtypes, bool fast) {
  return guarded("scarlet_ffn_experts", [&](const Kernels& kernels) {
    const Buffer y = *result;
    const Network net(x, gate, up, down, qtypes, 3);
    const int64_t experts = gate.dimensions()[0], M = dim(x, 1), in = dim(x, 0);
    const int64_t F = net.gate.rows, out = net.down.rows;
    expect(up.dimensions()[0] == experts, "up", up, std::to_string(experts) + " experts, as gate has");
    expect(down.dimensions()[0] == experts, "down", down, std::to_string(experts) + " experts, as gate has");
    const int32_t* id = expert_ids(ids, experts);
    const int64_t k = dim(ids, 0);
    expect(dim(ids, 1) == M, "ids", ids, "rows as in x " + describe(x));
    expect(shares.element_type() == ffi::F32 && rank(shares) == 2 && dim(shares, 1) == M && dim(shares, 0) == k,
           "shares", shares, "f32, of the shape of ids " + describe(ids));
    net.expect_result(y, M);
    const std::unique_ptr<float[]> hidden(new float[M * k * F]), outputs(new float[M * k * out]);
    std::map<int64_t, Rows> in_rows, out_rows;
    for (int64_t i = 0; i < M * k; i++) {
      in_rows[id[i]].add(x.typed_data<float>() + i / k * in, hidden.get() + i * F);
      out_rows[id[i]].add(hidden.get() + i * F, outputs.get() + i * out);
    }
    std::vector<Job> gates, ups, downs;
    for (const auto& [expert, rows] : in_rows) {
      gates.push_back(rows.job(net.gate, expert, fast));
      ups.push_back(rows.job(net.up, expert, fast));
    }
    for (const auto& [expert, rows] : out_rows) downs.push_back(rows.job(net.down, expert, fast));
    multiply_gated(kernels, gates, ups);
    multiply_all(kernels, downs);
    run_tasks(M, 0, [&](int64_t m, float*) {
      kernels.weighted_sum(outputs.get() + m * k * out, shares.typed_data<float>() + m * k, k, out,
                           y.typed_data<float>() + m * out);
    });
  });
}

// Blocks u8 (..., row bytes) -> f32 (..., elements).
ffi::Error decode(Buffer blocks, ffi::Result<Buffer> result, std::string_view qtype) {
  return guarded("scarlet_decode", [&](const Kernels& kernels) {
    const Buffer out = *result;
    QType type;
    if (!type_by_name(qtype.data(), qtype.size(), &type))
      throw Misfit{"quant type " + std::string(qtype) + " is unknown"};
    expect(blocks.element_type() == ffi::U8 && rank(blocks) >= 1, "blocks", blocks, "u8 (..., row bytes)");
    expect(out.element_type() == ffi::F32 && rank(out) == rank(blocks) &&
               leading(out, 1) == leading(blocks, 1) &&
               (is_float(type) || dim(out, 0) % kTypes[static_cast<int>(type)].elements == 0) &&
               static_cast<int64_t>(row_bytes(type, dim(out, 0))) == dim(blocks, 0),
           "the result", out,
           "f32 (..., elements) for " + std::string(qtype) + " blocks " + describe(blocks));
    decode_all(kernels, type, static_cast<const uint8_t*>(blocks.untyped_data()), out.typed_data<float>(),
               leading(out, 1), dim(out, 0));
  });
}

}  // namespace
}  // namespace scarlet

XLA_FFI_DEFINE_HANDLER_SYMBOL(scarlet_qmatmul, scarlet::qmatmul,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("qtypes")
                                  .Attr<bool>("fast"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(scarlet_qmatmul_experts, scarlet::qmatmul_experts,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::string_view>("qtype")
                                  .Attr<bool>("fast"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(scarlet_ffn, scarlet::ffn,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::string_view>("qtypes")
                                  .Attr<bool>("fast"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(scarlet_ffn_experts, scarlet::ffn_experts,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::string_view>("qtypes")
                                  .Attr<bool>("fast"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    scarlet_decode, scarlet::decode,
    xla::ffi::Ffi::Bind().Arg<xla::ffi::AnyBuffer>().Ret<xla::ffi::AnyBuffer>().Attr<std::string_view>(
        "qtype"));
