// The fast mode of products with many rows: activations of 16 bits, weights as they are.
//
// A block of 256 weights is d times whole numbers of at most thirteen bits and a sign (sub-block scale times
// quant), less, in some types, dmin times minimums. A row of x becomes, 256 elements at a time, a scale times
// 16-bit integers. Products of the two are summed exactly, in 32 bits, by the instructions of AVX-512 VNNI,
// twice as many at a time as of f32; the minimums multiply exact sums of x. What is lost is x's rounding:
// 2^-16 of the largest |x| of each 256.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace scarlet {

constexpr int kFastTileRows = 64;  // rows of weights that a task takes

// Rows of x, ready for every weight that they meet.
struct FastRows {
  int64_t count, elements;
  int16_t* quants;  // (count, elements)
  float* scales;    // (count, elements / 256)
  float* sums;      // (count, elements / 16): of 16 elements each
};

struct FastKernels {
  bool (*covers)(QType type);  // types of 256 elements with one d
  void (*quantise)(const float* x, int64_t row, const FastRows& rows);
  // As MultiplyFn, but with `rows` in place of p.x; decodes by `exact`. At most kFastTileRows of p.rows.
  void (*multiply)(const Kernels& exact, QType type, const Product& p, const FastRows& rows, float* scratch);
  size_t (*scratch_floats)(int64_t elements);
};

// Null where the processor lacks it.
const FastKernels* fast_kernels();
#if defined(__x86_64__)
const FastKernels& fast_kernels_avx512vnni();
#endif

}  // namespace scarlet
