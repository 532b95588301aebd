"""The gated delta rule: linear attention whose state forgets by a gate and corrects what it remembers.

Yang et al., 2024 (Gated Delta Networks); spec section 4, "Delta net" step 7 and "Chunked form". For one head,
with state S (Dv, Dk), per token:

    S <- exp(g) S;    S <- S + beta (v - S k) k^T;    o = S q

Shapes in both functions: q, k f32 (B, T, Hv, Dk); v (B, T, Hv, Dv); g, beta (B, T, Hv); state
(B, Hv, Dv, Dk), llama.cpp's orientation. They return o (B, T, Hv, Dv) and the new state. A token with
g = 0 and beta = 0 leaves the state as it was: padding.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from scarlet_jax.ops import implementations
from scarlet_jax.ops.decay import log_decay
from scarlet_jax.ops.einsum import einsum

CHUNK = 64  # tokens solved together; the published kernels' choice, and llama.cpp's


def recurrent(q, k, v, g, beta, state):
    """Token by token, the definition itself: for decoding."""

    def step(state, token):
        q, k, v, g, beta = token
        state = state * jnp.exp(g)[..., None, None]
        correction = beta[..., None] * (v - einsum("bhvk,bhk->bhv", state, k))
        state = state + correction[..., None] * k[..., None, :]
        return state, einsum("bhvk,bhk->bhv", state, q)

    _check(q, k, v, g, beta, state)
    tokens_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, beta))
    state, o = jax.lax.scan(step, state, tokens_first)
    return jnp.moveaxis(o, 0, 1), state


def chunked(q, k, v, g, beta, state):
    """The same, CHUNK tokens at a time: within a chunk the corrections solve one triangular system."""
    _check(q, k, v, g, beta, state)
    tokens = q.shape[1]
    chunk = min(CHUNK, 1 << (tokens - 1).bit_length())
    q, k, v, g, beta = (_chunks(x, chunk) for x in (q, k, v, g, beta))  # (B, n, Hv, chunk, ...)

    decay = jnp.exp(log_decay(g))
    since_start = jnp.exp(jnp.cumsum(g, axis=-1))[..., None]
    to_end = decay[..., -1, :, None]

    # (I + A) u = beta v: what each token writes, given what the earlier ones of the chunk wrote.
    coupling = einsum("bnhik,bnhjk->bnhij", beta[..., None] * k, k) * jnp.tril(decay, -1)
    written, read = _solve(coupling, beta[..., None] * v, beta[..., None] * since_start * k)
    within = einsum("bnhik,bnhjk->bnhij", q, k) * decay

    def step(state, chunk):
        written, read, within, q_start, k_end, keep = chunk
        new = written - einsum("bhik,bhvk->bhiv", read, state)
        o = einsum("bhik,bhvk->bhiv", q_start, state) + einsum("bhij,bhjv->bhiv", within, new)
        state = keep[..., None, None] * state + einsum("bhiv,bhik->bhvk", new, k_end)
        return state, o

    per_chunk = (written, read, within, since_start * q, to_end * k, since_start[..., -1, 0])
    state, o = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), per_chunk))
    return _unchunk(o)[:, :tokens], state


def _check(q, k, v, g, beta, state):
    batch, tokens, heads, key_dim = q.shape
    chex.assert_shape(k, (batch, tokens, heads, key_dim))
    chex.assert_shape(v, (batch, tokens, heads, None))
    chex.assert_shape((g, beta), (batch, tokens, heads))
    chex.assert_shape(state, (batch, heads, v.shape[-1], key_dim))


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, T, Hv, ...) -> (B, n, Hv, chunk, ...), the last chunk filled up with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % chunk)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 2, 3)


def _unchunk(o: jax.Array) -> jax.Array:
    """(n, B, Hv, chunk, Dv) -> (B, n chunk, Hv, Dv)."""
    n, batch, heads, chunk, dim = o.shape
    return o.transpose(1, 0, 3, 2, 4).reshape(batch, n * chunk, heads, dim)


def _solve(lower: jax.Array, *columns: jax.Array) -> list[jax.Array]:
    """Solve (I + lower) x = column for each column (..., chunk, n); `lower` is strictly lower triangular."""
    joined = jnp.concatenate(columns, axis=-1)
    if implementations.offered("solve"):
        solved = implementations.call("solve", lower, joined)
    else:
        matrix = lower + jnp.eye(lower.shape[-1])
        solved = jax.scipy.linalg.solve_triangular(matrix, joined, lower=True, unit_diagonal=True)
    return jnp.split(solved, [columns[0].shape[-1]], axis=-1)
