#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "mixers.h"
#include "simd_avx2.h"

namespace scarlet {
namespace avx2 {
#include "vectors.h"

#include "delta_net.h"

#include "attention.h"
}  // namespace avx2

const Mixers& mixers_avx2() { return avx2::kMixers; }

}  // namespace scarlet
