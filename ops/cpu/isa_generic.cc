#include <type_traits>

#include "kernels.h"
#include "mixers.h"
#include "simd_generic.h"

namespace scarlet {
namespace generic {
#include "decoders.h"
#include "regimes.h"
static constexpr int64_t (*kPreparedFloats)(int64_t) = nullptr;
static constexpr auto kMixersHere = mixers_generic;
#include "table.h"
}  // namespace generic

const Kernels& kernels_generic() { return generic::kKernels; }

}  // namespace scarlet
