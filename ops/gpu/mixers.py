"""Pallas kernels between a mixer's projections: the gated delta rule, and attention over a cache.

All of f32 inside, products at full precision. Head dims that are no power of two are filled up with zeros for the
delta rule (Triton knows no others) and left to XLA for attention, whose cache would have to be copied.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from scarlet_jax.ops import attention, gated_delta
from scarlet_jax.ops.gpu import backend

FEW = 8  # tokens up to which the rule goes one by one, and attention reads the cache in parts
CHUNK = 64  # tokens solved together
BLOCK = 16  # of them, whose diagonal block is inverted row by row; also Triton's smallest side of a product
VALUES = 32  # value dims of one program
SLOTS = 64  # of the cache, read at a time
SPLITS = 16  # programs that share a long cache

_dot = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _rows_by_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b.T."""
    return _dot(a, b, (((1,), (1,)), ((), ())))


def _rows_by_columns(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b."""
    return _dot(a, b, (((1,), (0,)), ((), ())))


def _columns_by_columns(a: jax.Array, b: jax.Array) -> jax.Array:
    """a.T @ b."""
    return _dot(a, b, (((0,), (0,)), ((), ())))


# --- the gated delta rule -----------------------------------------------------------------------------------


def delta_rule(q, k, v, g, beta, state):
    """`ops.gated_delta`: token by token for a few, else by chunks."""
    if q.shape[1] <= FEW:
        return backend.on_gpu(_recurrent, gated_delta.recurrent, q, k, v, g, beta, state)
    return backend.on_gpu(_chunked, gated_delta.chunked, q, k, v, g, beta, state)


def _recurrent(q, k, v, g, beta, state):
    """A program for some value dims of a head: its rows of the state are read once and written once."""
    batch, tokens, heads, value_dim = v.shape
    key_dim = k.shape[-1]
    q, k, v, state = _filled(q, k, v, state)
    rows = min(VALUES, state.shape[2])

    def kernel(q_ref, k_ref, v_ref, g_ref, beta_ref, old_ref, o_ref, new_ref):
        b, h = pl.program_id(0), pl.program_id(1)
        mine = pl.ds(pl.program_id(2) * rows, rows)

        def step(t, state):
            key = k_ref[b, t, h, :]
            state = state * jnp.exp(g_ref[b, t, h])
            correction = beta_ref[b, t, h] * (v_ref[b, t, h, mine] - jnp.sum(state * key[None], axis=1))
            state += correction[:, None] * key[None]
            o_ref[b, t, h, mine] = jnp.sum(state * q_ref[b, t, h, :][None], axis=1)
            return state

        new_ref[b, h, mine, :] = lax.fori_loop(0, tokens, step, old_ref[b, h, mine, :])

    o, new = backend.call(
        kernel,
        grid=(batch, heads, state.shape[2] // rows),
        out=(jax.ShapeDtypeStruct(v.shape, jnp.float32), jax.ShapeDtypeStruct(state.shape, jnp.float32)),
        input_output_aliases={5: 1},
    )(q, k, v, g, beta, state)
    return o[..., :value_dim], new[:, :, :value_dim, :key_dim]


def _chunked(q, k, v, g, beta, state):
    """Two kernels: each chunk's system solved by itself, then the state through the chunks, one after another."""
    tokens, value_dim = v.shape[1], v.shape[-1]
    key_dim = k.shape[-1]
    q, k, v, state = _filled(q, k, v, state)
    q, k, v, g, beta = (_whole_chunks(x) for x in (q, k, v, g, beta))
    written, read, within, since, until = _solved(q, k, v, g, beta)
    o, state = _through(q, k, written, read, within, since, until, state)
    return o[:, :tokens, :, :value_dim], state[:, :, :value_dim, :key_dim]


def _solved(q, k, v, g, beta):
    """What each chunk writes and reads by itself: see `gated_delta.chunked`.

    `written` like v, `read` like k, `within` (B, T, Hv, CHUNK); decay since the chunk's start and until its
    end, (B, T, Hv).
    """
    batch, tokens, heads, _ = k.shape

    def kernel(q_ref, k_ref, v_ref, g_ref, beta_ref, written_ref, read_ref, within_ref, since_ref, until_ref):
        b, h = pl.program_id(0), pl.program_id(1)
        chunk = pl.ds(pl.program_id(2) * CHUNK, CHUNK)
        key, gate, beta = k_ref[b, chunk, h, :], g_ref[b, chunk, h], beta_ref[b, chunk, h]
        i = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0)
        j = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)

        # Summed from j on, not as a difference of two running totals: see `gated_delta._log_decay`.
        steps = jnp.where(i > j, gate[:, None], 0.0)
        ones = jnp.where(i >= j, 1.0, 0.0)
        decay = jnp.where(i >= j, jnp.exp(_rows_by_columns(ones, steps)), 0.0)
        since = jnp.exp(jnp.sum(jnp.where(i >= j, gate[None], 0.0), axis=1))
        until = jnp.exp(jnp.sum(jnp.where(i > j, gate[:, None], 0.0), axis=0))

        coupling = jnp.where(i > j, beta[:, None] * _rows_by_rows(key, key) * decay, 0.0)
        inverse = _inverse(coupling, i, j)
        written_ref[b, chunk, h, :] = _rows_by_columns(inverse, beta[:, None] * v_ref[b, chunk, h, :])
        read_ref[b, chunk, h, :] = _rows_by_columns(inverse, (beta * since)[:, None] * key)
        within_ref[b, chunk, h, :] = _rows_by_rows(q_ref[b, chunk, h, :], key) * decay
        since_ref[b, chunk, h] = since
        until_ref[b, chunk, h] = until

    shapes = (v.shape, k.shape, (batch, tokens, heads, CHUNK), g.shape, g.shape)
    return backend.call(
        kernel,
        grid=(batch, heads, tokens // CHUNK),
        out=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
    )(q, k, v, g, beta)


def _inverse(lower: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """(I + lower)^-1 of a strictly lower triangle (CHUNK, CHUNK), by blocks.

    Those on the diagonal by forward substitution, all at once, row by row; the rest makes of them a nilpotent
    N, and the inverse is (I - N + N^2 - ...) times theirs.
    """
    same = i // BLOCK == j // BLOCK
    diagonal = jnp.where(same, lower, 0.0)
    unit = jnp.where(i == j, 1.0, 0.0)

    def substitute(row, x):
        here = i % BLOCK == row
        factors = jnp.sum(jnp.where(here, diagonal, 0.0), axis=0)  # of each row within its own block
        return jnp.where(here & same, x - jnp.sum(factors[:, None] * x, axis=0)[None], x)

    blocks = lax.fori_loop(1, BLOCK, substitute, unit)
    below = _rows_by_columns(blocks, jnp.where(same, 0.0, lower))
    series = unit
    for _ in range(CHUNK // BLOCK - 1):
        series = unit - _rows_by_columns(below, series)
    return _rows_by_columns(series, blocks)


def _through(q, k, written, read, within, since, until, state):
    """The state from chunk to chunk, by programs that each keep some of a head's value dims."""
    batch, tokens, heads, _ = k.shape
    rows = min(VALUES, state.shape[2])

    def kernel(
        q_ref, k_ref, written_ref, read_ref, within_ref, since_ref, until_ref, old_ref, o_ref, new_ref
    ):
        b, h = pl.program_id(0), pl.program_id(1)
        mine = pl.ds(pl.program_id(2) * rows, rows)

        def step(n, state):
            chunk = pl.ds(n * CHUNK, CHUNK)
            new = written_ref[b, chunk, h, mine] - _rows_by_rows(read_ref[b, chunk, h, :], state)
            query = since_ref[b, chunk, h][:, None] * q_ref[b, chunk, h, :]
            inside = _rows_by_columns(within_ref[b, chunk, h, :], new)
            o_ref[b, chunk, h, mine] = _rows_by_rows(query, state) + inside
            key = until_ref[b, chunk, h][:, None] * k_ref[b, chunk, h, :]
            return since_ref[b, n * CHUNK + CHUNK - 1, h] * state + _columns_by_columns(new, key)

        new_ref[b, h, mine, :] = lax.fori_loop(0, tokens // CHUNK, step, old_ref[b, h, mine, :])

    return backend.call(
        kernel,
        grid=(batch, heads, state.shape[2] // rows),
        out=(
            jax.ShapeDtypeStruct(written.shape, jnp.float32),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ),
        input_output_aliases={7: 1},
    )(q, k, written, read, within, since, until, state)


def _filled(q, k, v, state):
    """Head dims filled up with zeros to a power of two, at least BLOCK."""
    key, value = (_next_power_of_two(max(BLOCK, dim)) for dim in (k.shape[-1], v.shape[-1]))
    q, k = (_pad_last(x, key) for x in (q, k))
    state = jnp.pad(state, ((0, 0), (0, 0), (0, value - state.shape[2]), (0, key - state.shape[3])))
    return q, k, _pad_last(v, value), state


def _pad_last(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def _whole_chunks(x: jax.Array) -> jax.Array:
    """(B, T, ...) with T filled up to whole chunks: zeros change no state."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK)] + [(0, 0)] * (x.ndim - 2))


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


# --- attention over the cache -------------------------------------------------------------------------------


def attend(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array, *, scale: float) -> jax.Array:
    """Causal attention: q f32 (B, T, N, H), caches (B, S, K, H), `position` int32 (B, T), the slot of each token.

    -> f32 (B, T, N, H). A few tokens by a kernel that reads each slot in use once; more, and head dims that are
    no power of two, in plain XLA.
    """

    def by_steps(q, k, v, position):
        return attention.mix(attention.softmax(attention.scores(q, k), position, scale), v)

    tokens, dim, slots = q.shape[1], q.shape[3], k.shape[1]
    if tokens > FEW or dim != _next_power_of_two(max(dim, BLOCK)) or slots % SLOTS:
        return by_steps(q, k, v, position)
    return backend.on_gpu(functools.partial(_attend, scale=scale), by_steps, q, k, v, position)


def _attend(q, k, v, position, *, scale: float):
    """Parts of the cache by programs of their own, each with a softmax of its own; then one of all parts."""
    batch, tokens, heads, dim = q.shape
    slots, groups = k.shape[1:3]
    each = heads // groups
    rows = _next_power_of_two(max(BLOCK, tokens * each))
    # (B, K, rows, H): the queries that read the same keys, in the order of (token, head).
    queries = q.reshape(batch, tokens, groups, each, dim).transpose(0, 2, 1, 3, 4)
    queries = queries.reshape(batch, groups, tokens * each, dim) * scale
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, rows - tokens * each), (0, 0)))
    last = jnp.pad(jnp.repeat(position, each, axis=1), ((0, 0), (0, rows - tokens * each)))
    blocks = slots // SLOTS
    splits = math.gcd(SPLITS, blocks)
    lowest = -1e30  # of what sees nothing: minus infinity would make NaN of its own difference

    def kernel(q_ref, k_ref, v_ref, last_ref, sum_ref, top_ref, total_ref):
        b, g, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        query, seen = q_ref[b, g, :, :], last_ref[b, :]
        first = split * (blocks // splits)
        used = jnp.max(seen) // SLOTS + 1  # blocks of the cache that any token sees

        def add(n, carry):
            mixed, top, total = carry
            here = pl.ds(n * SLOTS, SLOTS)
            products = _rows_by_rows(query, k_ref[b, here, g, :].astype(jnp.float32))
            slot = n * SLOTS + lax.broadcasted_iota(jnp.int32, (rows, SLOTS), 1)
            products = jnp.where(slot <= seen[:, None], products, lowest)
            new_top = jnp.maximum(top, jnp.max(products, axis=1))
            weights = jnp.where(slot <= seen[:, None], jnp.exp(products - new_top[:, None]), 0.0)
            faded = jnp.exp(top - new_top)
            values = v_ref[b, here, g, :].astype(jnp.float32)
            mixed = faded[:, None] * mixed + _rows_by_columns(weights, values)
            return mixed, new_top, faded * total + jnp.sum(weights, axis=1)

        nothing = (
            jnp.zeros((rows, dim), jnp.float32),
            jnp.full(rows, lowest, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        end = jnp.minimum(first + blocks // splits, used)
        mixed, top, total = lax.fori_loop(first, end, add, nothing)
        sum_ref[b, g, split, :, :] = mixed
        top_ref[b, g, split, :] = top
        total_ref[b, g, split, :] = total

    each_split = (batch, groups, splits, rows)
    mixed, top, total = backend.call(
        kernel,
        grid=(batch, groups, splits),
        out=tuple(
            jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*each_split, dim), each_split, each_split)
        ),
    )(queries, k, v, last)
    share = jnp.exp(top - top.max(axis=2, keepdims=True))
    out = (share[..., None] * mixed).sum(axis=2) / (share * total).sum(axis=2)[..., None]
    out = out[:, :, : tokens * each].reshape(batch, groups, tokens, each, dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, heads, dim)
