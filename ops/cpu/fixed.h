// Products in fixed point: activations in whole numbers, weights as they are, by AVX-512 VNNI.
//
// A row of x becomes, for each sub-block of weights that share a factor (16 or 32, as a rule), a scale times
// whole numbers, of one plane of 8 bits (fast mode) or three (exact mode). A weight is a factor times a byte,
// less, in some types, a minimum. A plane's products with the bytes are summed exactly, in 32 bits, four to a
// lane and instruction: three planes take three quarters of the instructions that f32 takes, and no weight
// is made a float.
//
// What is lost is x's rounding: in exact mode half a unit of 2^-23 of the largest |x| of its sub-block, as in an
// f32 of that size, so that products lie as near the truth as sums of f32 do; in fast mode half a 127th.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace scarlet {

constexpr int kFixedTileRows = 128;  // rows of weights that a task takes
constexpr int kFastPlanes = 1, kExactPlanes = 3;

struct FixedKernels {  // `planes` is one of the above
  bool (*covers)(QType type, int64_t elements);          // rows of whole blocks of 256, of quantised types
  FewKernels (*few)(QType type, int planes);             // for 1 <= count <= kFewRows
  // For any count:
  size_t (*rounded_bytes)(QType type, int planes, int64_t elements);  // of a row of x as `round` makes it
  // The m-th of `count` rows, into what holds all of them.
  void (*round)(QType type, int planes, const float* x, int64_t elements, int64_t m, int64_t count, uint8_t* to);
  // As MultiplyFn, but with rounded rows in place of p.x.
  void (*multiply)(QType type, int planes, const Product& p, const uint8_t* x, float* scratch);
  size_t scratch_floats;  // what multiply needs, aligned to 64 bytes
};

}  // namespace scarlet
