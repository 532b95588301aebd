// Products with few rows of activations, by the integer instructions of AVX-512 VNNI.
//
// A block of 256 activations becomes whole numbers times a unit, written as signed digits to the base
// 256; weights are small integers, a byte each. Products of the two are summed exactly, four to an
// instruction, and a lane's sum is the first thing to be rounded to f32: no weight is ever made a float.
//
// With four digits, every x that reaches 1/64 of the block's greatest is still itself, and of the others what
// is lost is at most 1/128 of that one's last bit: exact mode, closer to float64 than sums of f32 products, in
// fewer instructions. With two digits, for the fast mode, 2^-16 of the greatest is lost at most.
#pragma once

#include "types.h"

namespace scarlet {

struct Product;
using MultiplyFn = void (*)(const Product& product, float* scratch);
using PrepareFn = void (*)(const float* x, int64_t elements, float* out);

// As `prepare`, `multiply_few` and `prepared_floats` of Kernels; null for the types that are not covered.
struct Digits {
  PrepareFn prepare[kTypeCount];
  MultiplyFn multiply[kTypeCount];
  int64_t (*prepared_floats)(int64_t elements);
  int rows;  // of x, at most
};

}  // namespace scarlet
