"""Normalisations over the last axis, without weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps), f32 (..., n). Zhang and Sennrich, 2019."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def l2(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(sum(x^2) + eps), f32 (..., n)."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)
