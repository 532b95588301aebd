"""Products with weights of any kind: the matmul decides what a weight is, so that no layer has to.

GGUF matrices are (out, in): every product here contracts the last axis of both sides, no transpose.
"""

from __future__ import annotations

from typing import Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.ops import portable
from scarlet_jax.ops.einsum import einsum
from scarlet_jax.ops.qtensor import QTensor
from scarlet_jax.ops.quants import decode

Weight = jax.Array | np.ndarray | QTensor


class Implementation(Protocol):
    """A module that multiplies by packed weights in its own way."""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, in a line; None if it can."""
        ...

    def qmatmul(self, x: jax.Array, w: QTensor) -> jax.Array:
        """f32 (..., in), packed (out, in) -> f32 (..., out), without `w.scale`, which the caller applies.

        Raises NotImplementedError, saying why, for a block format or shape that it does not cover.
        """
        ...


# Best first: "auto" takes the first that can run and covers the weight. The portable one always does.
IMPLEMENTATIONS: dict[str, Implementation] = {"portable": portable}


def linear(x: jax.Array, w: Weight, *, implementation: str = "auto") -> jax.Array:
    """`x @ w.T`: f32 (..., in), w (out, in) packed, F32, F16 or BF16 -> f32 (..., out).

    Products and sums are f32 on every device. `implementation` is for packed weights (see `qmatmul`).
    """
    chex.assert_type(x, jnp.float32)
    chex.assert_equal(x.shape[-1], w.shape[-1])
    if isinstance(w, QTensor):
        return qmatmul(x, w, implementation=implementation)
    if w.dtype == jnp.float32:
        return einsum("...i,oi->...o", x, w)
    return portable.matmul_by_tiles(x, jnp.asarray(w), lambda rows: rows.astype(jnp.float32))


def embed(w: Weight, ids: jax.Array) -> jax.Array:
    """Rows of a (V, D) table: int (...) -> f32 (..., D), gathered as packed bytes and then decoded.

    `ids` must be within 0 .. V-1 (the caller checks: under jit an id outside is clipped).
    """
    if not isinstance(w, QTensor):
        return _rows(w, ids).astype(jnp.float32)
    return _scaled(decode(_rows(w.blocks, ids), w.qtype), w)


def qmatmul(x: jax.Array, w: QTensor, *, implementation: str = "auto") -> jax.Array:
    """`x @ w.T` with packed weights: f32 (..., in), (out, in) -> f32 (..., out), times `w.scale` if any.

    `implementation` is "auto" or a name in IMPLEMENTATIONS, static under jit. Raises BadInput, with the
    implementation's own reason, if one chosen by name cannot do it.
    """
    chex.assert_rank(w.blocks, 2)
    if implementation == "auto":
        return _scaled(_first_that_can(x, w), w)
    if implementation not in IMPLEMENTATIONS:
        raise BadInput(
            f"implementation {implementation}: expected auto or one of {', '.join(IMPLEMENTATIONS)}"
        )
    chosen = IMPLEMENTATIONS[implementation]
    if reason := chosen.unavailable():
        raise BadInput(f"implementation {implementation}: {reason}")
    try:
        return _scaled(chosen.qmatmul(x, w), w)
    except NotImplementedError as error:
        raise BadInput(f"implementation {implementation}: {error}") from error


def _first_that_can(x: jax.Array, w: QTensor) -> jax.Array:
    for candidate in IMPLEMENTATIONS.values():
        if candidate.unavailable() is None:
            try:
                return candidate.qmatmul(x, w)
            except NotImplementedError:
                continue
    raise AssertionError("the portable implementation covers everything")


def _rows(table: jax.Array | np.ndarray, ids: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table), ids, axis=0, mode="clip")


def _scaled(y: jax.Array, w: QTensor) -> jax.Array:
    """Times the tensor's own scale, one value."""
    return y if w.scale is None else y * jnp.reshape(w.scale, ()).astype(jnp.float32)
