#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "mixers.h"
#include "simd_generic.h"

namespace scarlet {
namespace generic {
#include "vectors.h"

#include "delta_net.h"

#include "attention.h"
}  // namespace generic

const Mixers& mixers_generic() { return generic::kMixers; }

}  // namespace scarlet
