#pragma once

#define SCARLET_INLINE inline __attribute__((always_inline))
#define SCARLET_LAMBDA __attribute__((always_inline))
#define SCARLET_UNROLL _Pragma("GCC unroll 32")
