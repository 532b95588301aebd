"""What a memory that forgets by a gate has left of each token, within a chunk of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def log_decay(g: jax.Array) -> jax.Array:
    """Log of what is left at token i of what j wrote, (..., i, j): the sum of g over j < l <= i; -inf above.

    Summed from j on, not as a difference of two running totals: those grow to hundreds where a head forgets
    fast, and their difference would be left with a few digits.
    """
    chunk = g.shape[-1]
    steps = jnp.where(jnp.tri(chunk, k=-1, dtype=bool), g[..., :, None], 0)
    return jnp.where(jnp.tri(chunk, dtype=bool), jnp.cumsum(steps, axis=-2), -jnp.inf)
