"""Mamba-2's state space: a memory of outer products that fades at a rate which every token chooses.

Dao and Gu, 2024 (state space duality). For one head, with state S (P, N), per token with time step dt > 0 and
rate a < 0:

    S <- exp(dt a) S + dt x b^T;    y = S c

Shapes in both functions: x f32 (B, T, H, P); dt (B, T, H), zero where a token is padding and leaves the state
as it was; a (H,); b, c (B, T, G, N), head h reading group h div (H / G); state (B, H, P, N). They return
y (B, T, H, P) and the new state.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from scarlet_jax.ops.decay import log_decay
from scarlet_jax.ops.einsum import einsum

CHUNK = 64  # tokens at a time: what they are to each other is a matrix a head, of CHUNK x CHUNK


def recurrent(x, dt, a, b, c, state):
    """Token by token, the definition itself: for decoding."""

    def step(state, token):
        x, dt, b, c = token
        written = einsum("bgrp,bgn->bgrpn", dt[..., None] * x, b)
        state = jnp.exp(dt * rate)[..., None, None] * state + written
        return state, einsum("bgrpn,bgn->bgrp", state, c)

    _check(x, dt, a, b, c, state)
    groups = b.shape[2]
    rate = a.reshape(groups, -1)
    tokens_first = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0), (_grouped(x, groups), _grouped(dt, groups), b, c)
    )
    end, y = jax.lax.scan(step, _grouped(state, groups, axis=1), tokens_first)
    return jnp.moveaxis(y, 0, 1).reshape(x.shape), end.reshape(state.shape)


def chunked(x, dt, a, b, c, state):
    """The same, CHUNK tokens at a time, one chunk after the other: no matrix is of all tokens by all."""

    def step(state, chunk):
        x, dt, b, c = chunk  # (B, chunk, G, ...)
        log = jnp.moveaxis(dt * rate, 1, -1)
        decay = jnp.exp(log_decay(log))  # (B, G, R, chunk, chunk)
        since_start, to_end = jnp.exp(jnp.cumsum(log, axis=-1)), decay[..., -1, :]
        written = dt[..., None] * x
        within = einsum("bign,bjgn->bgij", c, b)[:, :, None] * decay
        read = einsum("bgrpn,bign->bigrp", state, c) * jnp.moveaxis(since_start, -1, 1)[..., None]
        y = einsum("bgrij,bjgrp->bigrp", within, written) + read
        left = jnp.moveaxis(to_end, -1, 1)[..., None] * written
        state = since_start[..., -1, None, None] * state + einsum("bjgrp,bjgn->bgrpn", left, b)
        return state, y

    _check(x, dt, a, b, c, state)
    tokens, groups = x.shape[1], b.shape[2]
    rate = a.reshape(groups, -1)
    chunk = min(CHUNK, 1 << (tokens - 1).bit_length())
    parts = tuple(_chunks(part, chunk) for part in (_grouped(x, groups), _grouped(dt, groups), b, c))
    end, y = jax.lax.scan(step, _grouped(state, groups, axis=1), parts)
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])
    return y[:, :tokens], end.reshape(state.shape)


def _check(x, dt, a, b, c, state):
    batch, tokens, heads, dim = x.shape
    chex.assert_shape(dt, (batch, tokens, heads))
    chex.assert_shape(a, (heads,))
    chex.assert_shape((b, c), (batch, tokens, b.shape[2], b.shape[3]))
    chex.assert_shape(state, (batch, heads, dim, b.shape[3]))


def _grouped(x: jax.Array, groups: int, axis: int = 2) -> jax.Array:
    """(..., H, ...) -> (..., G, R, ...): the heads of each group together."""
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, T, ...) -> (n, B, chunk, ...), the last chunk filled up with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % chunk)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
