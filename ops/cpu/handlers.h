// What all FFI handlers share: checks whose errors name the argument, its shape and what was expected.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

#include "library.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace scarlet {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;

// Thrown within a handler, and turned into its ffi::Error.
struct Misfit {
  std::string message;
};

inline std::string describe(const Buffer& b) {
  std::string type;
  switch (b.element_type()) {
    case ffi::F32: type = "f32"; break;
    case ffi::F16: type = "f16"; break;
    case ffi::BF16: type = "bf16"; break;
    case ffi::F64: type = "f64"; break;
    case ffi::U8: type = "u8"; break;
    case ffi::S32: type = "i32"; break;
    default: type = "element type " + std::to_string(static_cast<int>(b.element_type()));
  }
  std::string dims;
  for (int64_t d : b.dimensions()) dims += (dims.empty() ? "" : ", ") + std::to_string(d);
  return type + " (" + dims + ")";
}

inline void expect(bool fits, const char* name, const Buffer& b, const std::string& expected) {
  if (!fits) throw Misfit{std::string(name) + " is " + describe(b) + ": expected " + expected};
}

inline size_t rank(const Buffer& b) { return b.dimensions().size(); }
inline int64_t dim(const Buffer& b, size_t from_last) { return b.dimensions()[rank(b) - 1 - from_last]; }

// Product of all dimensions but the last `kept`.
inline int64_t leading(const Buffer& b, size_t kept) {
  int64_t n = 1;
  for (size_t i = 0; i + kept < rank(b); i++) n *= b.dimensions()[i];
  return n;
}

// Runs a handler's body with subnormals kept, and turns what it throws into an error that names it.
template <class Body>
ffi::Error guarded(const char* handler, Body body) {
  try {
    const KeepSubnormals guard;
    body(kernels());
    return ffi::Error::Success();
  } catch (const Misfit& misfit) {
    return ffi::Error::InvalidArgument(std::string(handler) + ": " + misfit.message);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string(handler) + ": " + error.what());
  }
}

}  // namespace scarlet
