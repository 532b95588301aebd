// What one instruction set offers: a table of functions, one entry a type.
#pragma once

#include <cstddef>
#include <cstdint>

#include "amx.h"
#include "types.h"

namespace scarlet {

// Rows of activations up to which weights are decoded straight into the sums; above it, into tiles.
constexpr int kFewRows = 4;

// Rows of weights that a matrix product decodes at a time.
constexpr int kTileRows = 96;

// `rows` rows of weights times `count` rows of activations:
//   y[m][r] = sum over k of w[r][k] * x[m][k],  0 <= r < rows, 0 <= m < count.
// Both ends are lists of pointers, so that rows can be gathered and scattered without a copy.
struct Product {
  const uint8_t* w;       // the first row of weights
  int64_t rows;           // of weights
  int64_t elements;       // of a row of weights and of activations (k)
  const float* const* x;  // `count` rows of activations
  float* const* y;        // `count` rows of results, already advanced to the first row of weights
  int64_t count;
};

using DecodeFn = void (*)(const uint8_t* blocks, float* out, int64_t elements);
using MultiplyFn = void (*)(const Product& product, float* scratch);
using PrepareFn = void (*)(const float* x, int64_t elements, float* out);

// Products with 1 <= count <= kFewRows; a row's sums do not depend on count. If `prepare` is not null, it is to
// make `prepared_floats` of each row of x before.
struct FewKernels {
  PrepareFn prepare;
  int64_t (*prepared_floats)(int64_t elements);
  MultiplyFn multiply;
};

struct FixedKernels;
struct Mixers;

struct Kernels {
  const char* isa;
  DecodeFn decode[kTypeCount];
  FewKernels few[kTypeCount];
  MultiplyFn multiply_many[kTypeCount];  // any count; a row's sums do not depend on it either
  size_t scratch_floats;                 // what multiply_many needs, aligned to 64 bytes
  void (*silu_gate)(float* gate, const float* up, int64_t n);  // gate = silu(gate) * up
  // y (n) = the sum over `count` rows of (count, n) of each times its share.
  void (*weighted_sum)(const float* rows, const float* shares, int64_t count, int64_t n, float* y);
  float (*sum_of_bytes)(const uint8_t* bytes, size_t n);       // reads all of them: a bandwidth probe
  double (*fma_chain)(int64_t iterations);                     // returns the flops it did: a peak probe
  const Mixers& (*mixers)();
  const FixedKernels* fixed = nullptr;  // if not null, what takes the types and rows that it covers
  const MatrixUnit* matrix = nullptr;   // if not null, what takes many rows, of any type
};

const Kernels& kernels_generic();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512vnni();
const Kernels& kernels_amx();
#endif

}  // namespace scarlet
