#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "mixers.h"
#include "simd_avx512.h"

namespace scarlet {
namespace avx512 {
#include "vectors.h"

#include "delta_net.h"

#include "attention.h"
}  // namespace avx512

const Mixers& mixers_avx512() { return avx512::kMixers; }

}  // namespace scarlet
