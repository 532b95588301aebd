#include <type_traits>

#include "kernels.h"
#include "simd_generic.h"

namespace scarlet {
namespace generic {
#include "decoders.h"
#include "regimes.h"
}  // namespace generic

const Kernels& kernels_generic() { return generic::kKernels; }

}  // namespace scarlet
