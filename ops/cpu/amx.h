// Products with many rows on the matrix unit (Intel AMX), which multiplies bf16 and adds in f32.
//
// An f32 of 24 bits is the sum of three bf16 of 8, and a product of two f32 that of nine products of their
// terms, of which the six greatest reach 2^-26 of it: exact mode, f32 for all that a sum of f32 can tell. In
// the fast mode two terms and the three greatest products are taken: about 2^-18. Terms of weights that are
// zero throughout a tile (the lower ones of f16 and bf16, and of quants that are few bits times a scale) are
// left out, to the same bits.
//
// Bf16 that are subnormal count as zero; what is not finite, or beyond 3.38e38, makes NaN.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace scarlet {

struct Kernels;
struct Product;

// Rows of x as the matrix unit wants them: for 16 rows, 32 elements and a term, the pairs of elements one
// after another, each of all the rows (1 KiB); terms, then elements, then rows.
struct SplitRows {
  int64_t count, elements;
  int terms;
  uint16_t* tiles;
};

struct MatrixUnit {
  int tile_rows;  // rows of weights that a task takes
  size_t (*split_size)(const SplitRows& rows);  // of `tiles`
  void (*split)(const float* const* x, int64_t group, const SplitRows& rows);  // one group of 16 rows
  // As MultiplyFn, but with `rows` in place of p.x; decodes by `exact`. At most tile_rows of p.rows.
  void (*multiply)(const Kernels& exact, QType type, const Product& p, const SplitRows& rows, float* scratch);
  size_t scratch_floats;
};

constexpr int64_t kSplitGroup = 16;

}  // namespace scarlet
