// The block formats: one line a type, and the codebooks that some of them index.
#pragma once

#include <cstddef>
#include <cstdint>

namespace scarlet {

// X(name, elements of a block, bytes of a block); `name` is also the decoder's name in decoders.h.
// The plain floats are taken 32 elements at a time: their rows alone may end within a block.
#define SCARLET_QTYPES(X) \
  X(F32, 32, 128)         \
  X(F16, 32, 64)          \
  X(BF16, 32, 64)         \
  X(Q4_0, 32, 18)         \
  X(Q4_1, 32, 20)         \
  X(Q5_0, 32, 22)         \
  X(Q5_1, 32, 24)         \
  X(Q8_0, 32, 34)         \
  X(Q2_K, 256, 84)        \
  X(Q3_K, 256, 110)       \
  X(Q4_K, 256, 144)       \
  X(Q5_K, 256, 176)       \
  X(Q6_K, 256, 210)       \
  X(IQ1_S, 256, 50)       \
  X(IQ1_M, 256, 56)       \
  X(IQ2_XXS, 256, 66)     \
  X(IQ2_XS, 256, 74)      \
  X(IQ2_S, 256, 82)       \
  X(IQ3_XXS, 256, 98)     \
  X(IQ3_S, 256, 110)      \
  X(IQ4_NL, 32, 18)       \
  X(IQ4_XS, 256, 136)     \
  X(TQ1_0, 256, 54)       \
  X(TQ2_0, 256, 66)       \
  X(MXFP4, 32, 17)        \
  X(NVFP4, 64, 36)        \
  X(Q1_0, 128, 18)        \
  X(Q2_0, 64, 18)

enum class QType : int {
#define SCARLET_ENUM(name, elements, bytes) name,
  SCARLET_QTYPES(SCARLET_ENUM)
#undef SCARLET_ENUM
};

struct TypeInfo {
  const char* name;
  int elements;  // of a block
  int bytes;     // of a block
};

constexpr TypeInfo kTypes[] = {
#define SCARLET_INFO(name, elements, bytes) {#name, elements, bytes},
    SCARLET_QTYPES(SCARLET_INFO)
#undef SCARLET_INFO
};

constexpr int kTypeCount = sizeof(kTypes) / sizeof(kTypes[0]);
constexpr int kFloatTypeCount = 3;  // F32, F16, BF16 come first

// Whether the rows of `type` may end within a block.
constexpr bool is_float(QType type) { return static_cast<int>(type) < kFloatTypeCount; }

// Bytes of a row of `elements`; for a float type any number, for a quantised one whole blocks.
constexpr size_t row_bytes(QType type, size_t elements) {
  const TypeInfo& info = kTypes[static_cast<int>(type)];
  return elements * info.bytes / info.elements;
}

// The grids of the IQ types, expanded to a signed byte a value, the sign codes of seven bits expanded to
// eight, and the 16-entry tables. Filled once by `scarlet_set_codebook` before any kernel runs.
struct Codebooks {
  alignas(64) uint8_t iq1[2048][8];
  alignas(64) uint8_t iq2_xxs[256][8];
  alignas(64) uint8_t iq2_xs[512][8];
  alignas(64) uint8_t iq2_s[1024][8];
  alignas(64) uint8_t iq3_xxs[256][4];
  alignas(64) uint8_t iq3_s[512][4];
  alignas(64) uint8_t sign_codes[128];
  alignas(64) float iq4[16];   // IQ4_NL and IQ4_XS
  alignas(64) float e2m1[16];  // MXFP4 and NVFP4, doubled
};
extern Codebooks codebooks;

}  // namespace scarlet
