"""An implementation of the products for training: bf16 factors, f32 sums, forwards and backwards.

Processors with matrix units multiply bf16 several times as fast as f32, and training does not mind: the
parameters, their gradients' sums and everything that is not a product stay f32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def unavailable() -> None:
    """Why this implementation cannot run here: it always can."""


@jax.custom_vjp
def qmatmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w.T`: f32 (..., in), (out, in) -> f32 (..., out)."""
    return _product("...i,oi->...o", x, w)


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return qmatmul(x, w), (x, w)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    rows = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    return _product("...o,oi->...i", dy, w), _product("ro,ri->oi", rows(dy), rows(x))


qmatmul.defvjp(_forward, _backward)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    narrow = (a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    return jnp.einsum(axes, *narrow, preferred_element_type=jnp.float32)
