// What is done with vectors in every kernel. Included after a simd_*.h, inside the namespace of its
// instruction set.
#pragma once

static constexpr int W = Simd::kWidth;
using F = Simd::F;
using I = Simd::I;

// e^v to about one unit in the last place: v = n ln 2 + r, a polynomial for e^r, then the power of two.
// Of max and min the second operand is the result where one is a NaN: it stays a NaN.
static SCARLET_INLINE F exponential(F v) {
  v = Simd::min(Simd::set1(88.0f), Simd::max(Simd::set1(-87.0f), v));
  const F n = Simd::round(Simd::mul(v, Simd::set1(1.44269504f)));
  F r = Simd::fma(n, Simd::set1(-0.693359375f), v);  // ln 2 in two parts, the first with zeros behind it
  r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
  F sum = Simd::set1(1.0f / 5040);  // Taylor: |r| <= 0.35, so that the next term is below 1e-8
  constexpr float kFactorials[] = {720, 120, 24, 6, 2, 1, 1};
  SCARLET_UNROLL for (int i = 0; i < 7; i++) sum = Simd::fma(sum, r, Simd::set1(1 / kFactorials[i]));
  return Simd::mul(sum, Simd::exp2_whole(n));
}

// v / (1 + e^-v)
static SCARLET_INLINE F silu(F v) {
  return Simd::div(v, Simd::add(Simd::set1(1.0f), exponential(Simd::sub(Simd::zero(), v))));
}

static SCARLET_INLINE F sigmoid(F v) {
  return Simd::div(Simd::set1(1.0f), Simd::add(Simd::set1(1.0f), exponential(Simd::sub(Simd::zero(), v))));
}

// The first n floats (all W of them if there are more), the other lanes 0.
static SCARLET_INLINE F load_upto(const float* p, int64_t n) {
  if (n >= W) return Simd::load(p);
  float padded[W] = {};
  std::memcpy(padded, p, n * sizeof(float));
  return Simd::load(padded);
}

static SCARLET_INLINE void store_upto(float* p, F v, int64_t n) {
  if (n >= W) return Simd::store(p, v);
  float padded[W];
  Simd::store(padded, v);
  std::memcpy(p, padded, n * sizeof(float));
}

static constexpr int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }

static SCARLET_INLINE float sum_of_squares(const float* p, int64_t n) {
  F sum = Simd::zero();
  for (int64_t i = 0; i < n; i += W) {
    const F v = load_upto(p + i, n - i);
    sum = Simd::fma(v, v, sum);
  }
  return Simd::sum(sum);
}
