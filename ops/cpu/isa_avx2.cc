#include <type_traits>

#include "kernels.h"
#include "mixers.h"
#include "simd_avx2.h"

namespace scarlet {
namespace avx2 {
#include "decoders.h"
#include "regimes.h"
static constexpr int64_t (*kPreparedFloats)(int64_t) = nullptr;
static constexpr auto kMixersHere = mixers_avx2;
#include "table.h"
}  // namespace avx2

const Kernels& kernels_avx2() { return avx2::kKernels; }

}  // namespace scarlet
