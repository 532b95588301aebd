// The fast mode of products: activations of 8 bits, weights as they are.
//
// A row of x becomes, for each sub-block of weights that share a factor (16 or 32, as a rule), a scale times
// whole numbers of at most 127. A weight is a factor times a byte, less, in some types, a minimum. Products of
// the two are summed exactly, in 32 bits, four to a lane, by the instructions of AVX-512 VNNI: what is lost is
// x's rounding, half a 127th of the largest |x| of each sub-block, and sums are then f32 as in exact mode.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace scarlet {

constexpr int kFastTileRows = 64;  // rows of weights that a task takes

struct FastKernels {
  bool (*covers)(QType type, int64_t elements);             // rows of whole blocks of 256, of quantised types
  FewKernels (*few)(QType type);                            // for 1 <= count <= kFewRows
  // For any count:
  size_t (*rounded_bytes)(QType type, int64_t elements);    // of a row of x as `round` makes it
  void (*round)(QType type, const float* x, int64_t elements, uint8_t* to);
  // As MultiplyFn, but with rounded rows, one behind another, in place of p.x.
  void (*multiply)(QType type, const Product& p, const uint8_t* x, float* scratch);
  size_t scratch_floats;  // what multiply needs, aligned to 64 bytes
};

// Null where the processor lacks it.
const FastKernels* fast_kernels();
#if defined(__x86_64__)
const FastKernels& fast_kernels_avx512vnni();
#endif

}  // namespace scarlet
