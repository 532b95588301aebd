"""Products with weights of any kind: the matmul decides what a weight is, so that no layer has to.

GGUF matrices are (out, in): every product here contracts the last axis of both sides, no transpose.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from scarlet_jax.ops import implementations, shares
from scarlet_jax.ops.gpu.planes import Planes, values
from scarlet_jax.ops.qtensor import QTensor
from scarlet_jax.ops.quants import decode
from scarlet_jax.ops.shares import Experts, Share, Stacked, Summed

Weight = jax.Array | np.ndarray | QTensor | Planes | Share


def linear(x: jax.Array, w: Weight, *, implementation: str = "auto") -> jax.Array:
    """`x @ w.T`: f32 (..., in), w (out, in) packed, F32, F16 or BF16 -> f32 (..., out).

    Times `w.scale` and plus `w.bias`, where the weight has them.

    Products and sums are f32 on every device. `implementation` is a name in
    `implementations.IMPLEMENTATIONS` or "auto", static under jit. Raises BadInput, with the implementation's
    own reason, if one chosen by name cannot do it.
    """
    _check(x, w)
    if isinstance(w, Stacked):
        return shares.join(linear(x, w.part, implementation=implementation), w.rows)
    if isinstance(w, Summed):
        term = implementations.call("qmatmul", x, w.part, implementation=implementation)
        return _completed(shares.sum_up(term), w.part)
    return _completed(implementations.call("qmatmul", x, w, implementation=implementation), w)


def linear_many(x: jax.Array, *ws: Weight) -> list[jax.Array]:
    """`[linear(x, w) for w in ws]`, in one go where an implementation offers that."""
    if not implementations.offered("qmatmul_many"):
        return [linear(x, w) for w in ws]
    for w in ws:
        _check(x, w)
    return [_completed(y, w) for y, w in zip(implementations.call("qmatmul_many", x, ws), ws, strict=True)]


def is_bare(w: Weight) -> bool:
    """Whether products with the weight are all there is: no scale of its own, no bias, no other device's share."""
    if isinstance(w, Share):
        return False
    return not isinstance(w, QTensor | Planes) or (w.scale is None and w.bias is None)


def linear_experts(x: jax.Array, w: Weight, ids: jax.Array) -> jax.Array:
    """Each row of x by the matrices of its own experts: w (E, out, in), ids int32 (..., k) -> f32 (..., k, out).

    x is f32 (..., 1, in), a row for all its experts, or (..., k, in), a row for each; times `w.scale` (E,) if
    any. Experts that no row asks for are not read. `ids` must be within 0 .. E-1.
    """
    chex.assert_type([x, ids], [jnp.float32, jnp.int32])
    chex.assert_equal(x.shape[-1], w.shape[-1])
    if isinstance(w, Summed):
        return shares.sum_up(linear_experts(x, w.part, ids))
    if isinstance(w, Experts):
        local, held = shares.here(ids, w.shape[0])
        return jnp.where(held[..., None], linear_experts(x, w.part, local), 0)
    k = ids.shape[-1]
    rows = x.reshape(-1, *x.shape[-1:] if x.shape[-2] == 1 else x.shape[-2:])
    y = implementations.call("qmatmul_experts", rows, w, ids.reshape(-1, k)).reshape(*ids.shape, -1)
    return y * jnp.asarray(w.scale, jnp.float32)[ids][..., None] if _has_scale(w) else y


def embed(w: Weight, ids: jax.Array) -> jax.Array:
    """Rows of a (V, D) table: int (...) -> f32 (..., D), gathered as packed bytes and then decoded.

    `ids` must be within 0 .. V-1 (the caller checks: under jit an id outside is clipped).
    """
    if isinstance(w, Stacked):
        local, held = shares.here(ids, w.shape[0])
        return shares.sum_up(jnp.where(held[..., None], embed(w.part, local), 0))
    if isinstance(w, Planes):
        return _scaled(_embed_planes(w, ids), w)
    if not isinstance(w, QTensor):
        return _rows(w, ids).astype(jnp.float32)
    return _scaled(decode(_rows(w.blocks, ids), w.qtype), w)


def _embed_planes(w: Planes, ids: jax.Array) -> jax.Array:
    rows = values(
        jax.tree.map(lambda plane: _rows(plane, ids.ravel()), dataclasses.replace(w, scale=None, bias=None))
    )
    return rows.reshape(*ids.shape, w.width)


def _rows(table: jax.Array | np.ndarray, ids: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table), ids, axis=0, mode="clip")


def _check(x: jax.Array, w: Weight) -> None:
    chex.assert_type(x, jnp.float32)
    chex.assert_equal(len(w.shape), 2)
    chex.assert_equal(x.shape[-1], w.shape[-1])


def _completed(y: jax.Array, w: Weight) -> jax.Array:
    """A product, times the weight's own scale and plus its bias, if it has them."""
    y = _scaled(y, w)
    return y + w.bias if isinstance(w, QTensor | Planes) and w.bias is not None else y


def _scaled(y: jax.Array, w: Weight) -> jax.Array:
    """Times the weight's own scale, one value, if it has one."""
    return y * jnp.reshape(w.scale, ()).astype(jnp.float32) if _has_scale(w) else y


def _has_scale(w: Weight) -> bool:
    return isinstance(w, QTensor | Planes) and w.scale is not None
