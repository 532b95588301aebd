"""Softmax attention over a key-value cache, in three steps that can be looked at one by one."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from scarlet_jax.ops.einsum import einsum


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Unscaled products q.k: q (B, T, N, H), k (B, S, K, H) -> f32 (B, T, N, S); head n reads n div (N/K)."""
    batch, tokens, heads, dim = q.shape
    chex.assert_shape(k, (batch, None, None, dim))
    groups = k.shape[2]
    grouped = q.reshape(batch, tokens, groups, heads // groups, dim)
    products = einsum("btkgh,bskh->btkgs", grouped, k.astype(jnp.float32))
    return products.reshape(batch, tokens, heads, k.shape[1])


def softmax(products: jax.Array, position: jax.Array, scale: float) -> jax.Array:
    """Causal softmax of f32 (B, T, N, S): the token in slot `position` (B, T) sees slots up to its own."""
    seen = jnp.arange(products.shape[-1]) <= position[:, :, None]
    return jax.nn.softmax(jnp.where(seen[:, :, None], products * scale, -jnp.inf), axis=-1)


def mix(probabilities: jax.Array, v: jax.Array) -> jax.Array:
    """Mean of the values v (B, S, K, H) under probabilities (B, T, N, S) -> f32 (B, T, N, H)."""
    batch, tokens, heads, slots = probabilities.shape
    chex.assert_shape(v, (batch, slots, None, None))
    groups = v.shape[2]
    grouped = probabilities.reshape(batch, tokens, groups, heads // groups, slots)
    return einsum("btkgs,bskh->btkgh", grouped, v.astype(jnp.float32)).reshape(batch, tokens, heads, -1)
