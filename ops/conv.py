"""Causal depthwise convolution over tokens, with the inputs before the first one handed in as state."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def causal_conv(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """y[t, c] = sum_j kernel[c, j] inputs[t + j, c]; no bias.

    `inputs` is f32 (B, W-1+T, C): W-1 rows of history (zeros at the start of a text), then this call's
    T rows; `kernel` f32 (C, W), its last column for the current token. Returns f32 (B, T, C).
    """
    channels, width = kernel.shape
    chex.assert_shape(inputs, (None, None, channels))
    tokens = inputs.shape[1] - (width - 1)
    return sum(inputs[:, j : j + tokens] * kernel[:, j] for j in range(width))


def history(inputs: jax.Array, count: jax.Array, width: int) -> jax.Array:
    """The next state: the last W-1 rows of `inputs` (B, W-1+T, C) once `count` (B,) of its T are taken.

    The tokens after those are padding and leave no trace.
    """
    rows = count[:, None] + jnp.arange(width - 1)
    return jnp.take_along_axis(inputs, rows[:, :, None], axis=1)
