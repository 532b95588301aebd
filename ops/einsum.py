"""einsum in full f32 on every device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Left alone, a GPU would multiply f32 in TF32 and a TPU in bf16: about 1e-3 off, where we promise 1e-6.
einsum = functools.partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)
