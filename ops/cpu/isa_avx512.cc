#include <type_traits>

#include "kernels.h"
#include "mixers.h"
#include "simd_avx512.h"

namespace scarlet {
namespace avx512 {
#include "decoders.h"
#include "regimes.h"
#include "planar_avx512.h"
static constexpr auto kMixersHere = mixers_avx512;
#include "table.h"
}  // namespace avx512

const Kernels& kernels_avx512() { return avx512::kKernels; }

}  // namespace scarlet
