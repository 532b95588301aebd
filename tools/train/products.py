"""An implementation of the products for training: bf16 factors, f32 sums, forwards and backwards.

Processors with matrix units multiply bf16 several times as fast as f32, and training does not mind: the
parameters, their gradients' sums and everything that is not a product stay f32.

The delta rule's triangular systems are solved by products too. The solver that XLA:CPU calls instead is exact,
but waits for threads of its own, and a step of training took a minute or never ended.
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


# --- The delta rule's system --------------------------------------------------------------------------------


@jax.custom_vjp
def solve(lower: jax.Array, columns: jax.Array) -> jax.Array:
    """(I + lower)^-1 columns, f32: `lower` strictly lower triangular (..., n, n), n a power of two."""
    return _inverse(lower) @ columns


def _solve_forward(lower: jax.Array, columns: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    inverse = _inverse(lower)
    solved = inverse @ columns
    return solved, (inverse, solved)


def _solve_backward(saved: tuple[jax.Array, jax.Array], dx: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse, solved = saved
    dcolumns = inverse.mT @ dx
    return jnp.tril(-dcolumns @ solved.mT, -1), dcolumns


solve.defvjp(_solve_forward, _solve_backward)


def _inverse(lower: jax.Array) -> jax.Array:
    """(I + lower)^-1, by diagonal blocks of doubling size: [[A, 0], [C, B]] has -B^-1 C A^-1 in its corner."""
    *batch, n, _ = lower.shape
    inverse = jnp.ones((*batch, n, 1, 1))
    for size in (1 << i for i in range(n.bit_length() - 1)):
        blocks = lower.reshape(*batch, n // (2 * size), 2 * size, n // (2 * size), 2 * size)
        blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -second @ blocks[..., size:, :size] @ first
        top = jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
    return inverse[..., 0, :, :]
