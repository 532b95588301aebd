"""Products with planes in Pallas: a matvec for up to eight rows, and a tiled matmul for more.

The matvec takes all weights of an input in one launch: a token's products are so short that starting a kernel
would be a good part of them. Both decode a tile of weights in registers (`planes.part`) and never write it
anywhere. Sums are f32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from scarlet_jax.ops.einsum import einsum
from scarlet_jax.ops.gpu import backend
from scarlet_jax.ops.gpu.planes import PART, PARTS, Planes, part, values

FEW = 8  # rows of activations up to which the weights are what takes time
ROWS = 4  # weight rows that one program of the matvec sums up
STRETCHES = 8  # of 256 elements, read at a time
TILE = (32, 32)  # activations by weight rows, of one program of the matmul


def qmatmul(x: jax.Array, w: Planes, *, activations: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """`x @ w.T`: f32 (..., in), planes of (out, in) -> f32 (..., out), without `w.scale`.

    `activations`: f32, or bf16 to have the matmul round both sides to it and use tensor cores. Sums are f32.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = backend.on_gpu(functools.partial(_on_gpu, activations=activations), elsewhere, rows, w)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def qmatmul_many(x: jax.Array, ws: Sequence[Planes]) -> list[jax.Array]:
    """`[qmatmul(x, w) for w in ws]`, a few rows by one kernel."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if len(rows) > FEW or not ws:
        return [qmatmul(x, w) for w in ws]
    ys = backend.on_gpu(_few_on_gpu, _many_elsewhere, rows, *ws)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


def elsewhere(x: jax.Array, w: Planes) -> jax.Array:
    """The product of x f32 (M, in) in plain XLA, from the same planes."""
    return einsum("mi,oi->mo", x, values(w))


def _many_elsewhere(x: jax.Array, *ws: Planes) -> list[jax.Array]:
    return [elsewhere(x, w) for w in ws]


def _on_gpu(x: jax.Array, w: Planes, activations: jax.typing.DTypeLike) -> jax.Array:
    return _few_on_gpu(x, w)[0] if len(x) <= FEW else _matmul(_in_parts(x), w, activations)


def _few_on_gpu(x: jax.Array, *ws: Planes) -> list[jax.Array]:
    return _matvec(_in_parts(x), ws)


def _in_parts(x: jax.Array) -> jax.Array:
    """x (M, in) -> (M, stretches, PARTS, PART), filled up with zeros."""
    filled = jnp.pad(x, ((0, 0), (0, -x.shape[1] % (PARTS * PART))))
    return filled.reshape(len(x), -1, PARTS, PART)


def _matvec(x: jax.Array, ws: Sequence[Planes]) -> list[jax.Array]:
    """x f32 (M, stretches, PARTS, PART) -> f32 (M, out) each; a program for every few rows of a weight."""
    rows = [_power_of_two(min(ROWS, w.shape[0])) for w in ws]
    ends = np.cumsum([-(-w.shape[0] // n) for w, n in zip(ws, rows, strict=True)]).tolist()

    def kernel(x_ref, w_refs, *y_refs):
        program = pl.program_id(0)
        for i, w in enumerate(ws):
            begin = ends[i - 1] if i else 0
            sums = functools.partial(_sum_rows, x_ref, w_refs[i], y_refs[i], w, program - begin, rows[i])
            if len(ws) == 1:
                sums()
            else:
                pl.when((program >= begin) & (program < ends[i]))(sums)

    results = tuple(jax.ShapeDtypeStruct((len(x), w.shape[0]), jnp.float32) for w in ws)
    return list(backend.call(kernel, grid=(ends[-1],), out=results)(x, tuple(ws)))


def _sum_rows(x_ref: Any, w_refs: Any, y_ref: Any, w: Planes, number: Any, rows: int) -> None:
    """The `number`-th few rows of a weight, times every row of x."""
    out, (batch, stretches) = w.shape[0], x_ref.shape[:2]
    step = _power_of_two(math.gcd(STRETCHES, stretches))
    # The last program starts early rather than ending late: it writes some rows a second time.
    first = jnp.minimum(number * rows, out - rows)

    def add(i, sums):
        at = (pl.ds(first, rows), pl.ds(i * step, step))
        for p in range(PARTS):
            weights = part(w_refs, at, p, w.qtype)
            sums = [
                total + jnp.sum(weights * x_ref[m, pl.ds(i * step, step), p, :][None], axis=(1, 2))
                for m, total in enumerate(sums)
            ]
        return sums

    sums = lax.fori_loop(0, stretches // step, add, [jnp.zeros(rows, jnp.float32)] * batch)
    for m, total in enumerate(sums):
        y_ref[m, pl.ds(first, rows)] = total


def _matmul(x: jax.Array, w: Planes, activations: jax.typing.DTypeLike) -> jax.Array:
    """x f32 (M, stretches, PARTS, PART) -> f32 (M, out); a program for every tile of the result."""
    batch, stretches = x.shape[:2]
    tall, wide = TILE
    x = jnp.pad(x, ((0, -batch % tall), (0, 0), (0, 0), (0, 0))).astype(activations)
    rows = w.shape[0]
    w = jax.tree.map(lambda a: jnp.pad(a, ((0, max(0, wide - len(a))), (0, 0), (0, 0))), w)
    out = w.shape[0]
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT

    def kernel(x_ref, w_refs, y_ref):
        first = jnp.minimum(pl.program_id(1) * wide, out - wide)
        tokens = pl.ds(pl.program_id(0) * tall, tall)

        def add(i, sums):
            for p in range(PARTS):
                weights = part(w_refs, (pl.ds(first, wide), pl.ds(i, 1)), p, w.qtype).reshape(wide, PART)
                sums += lax.dot_general(
                    x_ref[tokens, i, p, :],
                    weights.astype(activations),
                    (((1,), (1,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
            return sums

        y_ref[tokens, pl.ds(first, wide)] = lax.fori_loop(0, stretches, add, jnp.zeros(TILE, jnp.float32))

    grid = (len(x) // tall, -(-out // wide))
    y = backend.call(kernel, grid=grid, out=jax.ShapeDtypeStruct((len(x), out), jnp.float32))(x, w)
    return y[:batch, :rows]


def _power_of_two(n: int) -> int:
    """The largest that is no larger than n: the sizes that Triton knows."""
    return 1 << (n.bit_length() - 1)
