// The table of an instruction set's kernels. Included last, inside its namespace, after
// kMixersHere, the function that gives the instruction set's token mixers.
#pragma once

static const Kernels kKernels = {
    Simd::kName,
#define SCARLET_BLOCK(name, elements, bytes) decode_row<Block<name, elements, bytes>>,
    {SCARLET_QTYPES(SCARLET_BLOCK)},
#undef SCARLET_BLOCK
#define SCARLET_BLOCK(name, elements, bytes)                                      \
  {Few<Block<name, elements, bytes>>::kPrepare, kPreparedFloats,                  \
   Few<Block<name, elements, bytes>>::kMultiply},
    {SCARLET_QTYPES(SCARLET_BLOCK)},
#undef SCARLET_BLOCK
#define SCARLET_BLOCK(name, elements, bytes) multiply_many<Block<name, elements, bytes>>,
    {SCARLET_QTYPES(SCARLET_BLOCK)},
#undef SCARLET_BLOCK
    kScratchFloats,
    silu_gate,
    weighted_sum,
    sum_of_bytes,
    fma_chain,
    kMixersHere,
};
