"""Strict settings for every test."""

import jax

# Mixing dtypes (bf16 with f32, int with float) is an error rather than a silent promotion.
jax.config.update("jax_numpy_dtype_promotion", "strict")
