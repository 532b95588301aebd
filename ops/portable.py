"""The product with weights of any kind in plain XLA: decode a tile of rows to f32, multiply, next tile.

Runs wherever XLA runs, for every block format; the other implementations are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scarlet_jax.ops.einsum import einsum
from scarlet_jax.ops.qtensor import QTensor
from scarlet_jax.ops.quants import decode

# Decoded weights alive at once. A vocabulary's head decoded whole would take a gigabyte and more. A tile of
# this size is read back from a processor's cache (twice the speed of 8 MiB at one token on the machine
# where it was measured), and is still hundreds of rows, enough to keep a GEMM busy.
TILE_BYTES = 4 * 2**20


def unavailable() -> None:
    """Why this implementation cannot run here: it always can."""


def qmatmul(x: jax.Array, w: jax.Array | np.ndarray | QTensor) -> jax.Array:
    """`x @ w.T`: f32 (..., in), (out, in) packed, F32, F16 or BF16 -> f32 (..., out), without `w.scale`."""
    if isinstance(w, QTensor):
        return matmul_by_tiles(x, jnp.asarray(w.blocks), lambda rows: decode(rows, w.qtype))
    if w.dtype == jnp.float32:
        return _product(x, jnp.asarray(w))
    return matmul_by_tiles(x, jnp.asarray(w), lambda rows: rows.astype(jnp.float32))


def qmatmul_experts(x: jax.Array, w: jax.Array | np.ndarray | QTensor, ids: jax.Array) -> jax.Array:
    """Each row by its own experts: x f32 (M, in) or (M, k, in), w (E, out, in), ids int32 (M, k) within
    0 .. E-1 -> f32 (M, k, out), without `w.scale`.

    One expert after another, by all rows, and none that no row asks for.
    """  # noqa: D205
    own = x if x.ndim == 3 else x[:, None]

    def add_expert(expert: jax.Array, y: jax.Array) -> jax.Array:
        asked = ids == expert

        def multiply() -> jax.Array:
            matrix = jax.tree.map(lambda all_: lax.dynamic_index_in_dim(all_, expert, keepdims=False), stack)
            return jnp.where(asked[..., None], qmatmul(own, matrix), y)

        return lax.cond(asked.any(), multiply, lambda: y)

    stack = QTensor(jnp.asarray(w.blocks), w.qtype) if isinstance(w, QTensor) else jnp.asarray(w)
    y = jnp.zeros((*ids.shape, w.shape[-2]), jnp.float32)
    return lax.fori_loop(0, w.shape[0], add_expert, y)


def matmul_by_tiles(x: jax.Array, rows: jax.Array, to_f32: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`x @ to_f32(rows).T`: f32 (..., in), rows (out, anything) that become f32 (out, in) -> f32 (..., out).

    Never more than `TILE_BYTES` of rows (or one row) are f32 at a time. The last tile overlaps the one
    before it, so that all are of one shape: a few rows are then multiplied twice.
    """
    out = rows.shape[0]
    tile = max(1, TILE_BYTES // (4 * x.shape[-1]))
    if tile >= out:
        return _product(x, to_f32(rows))

    def multiply_tile(i: jax.Array, y: jax.Array) -> jax.Array:
        # Without the barrier XLA:CPU, which has no bf16 slice, converts all rows once before the loop.
        start, source = lax.optimization_barrier((jnp.minimum(i * tile, out - tile), rows))
        weights = to_f32(lax.dynamic_slice_in_dim(source, start, tile, axis=0))
        return lax.dynamic_update_slice_in_dim(y, _product(x, weights), start, axis=-1)

    y = jnp.zeros((*x.shape[:-1], out), jnp.float32)
    return lax.fori_loop(0, -(-out // tile), multiply_tile, y)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return einsum("...i,oi->...o", x, w)
