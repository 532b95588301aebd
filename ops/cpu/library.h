// The library's state: which instruction set runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace scarlet {

// Those of the instruction set that `scarlet_set_isa` chose.
const Kernels& kernels();

// The type of that name, or false.
bool type_by_name(const char* name, size_t length, QType* type);

// Decodes or multiplies on the whole team.
void decode_all(const Kernels& kernels, QType type, const uint8_t* blocks, float* out, int64_t rows,
                int64_t elements);

// One matrix of weights times rows of activations, as in Product, split over rows of weights.
struct Job {
  QType type;
  Product product;
  bool fast = false;  // x may be rounded, where fixed.h covers the type and the length of a row
};
void multiply_all(const Kernels& kernels, const std::vector<Job>& jobs);

// For each gate and its up, both of the same shape: gate.y = silu(x gate.w) * (x up.w); up.y is not used.
void multiply_gated(const Kernels& kernels, const std::vector<Job>& gates, const std::vector<Job>& ups);

}  // namespace scarlet
