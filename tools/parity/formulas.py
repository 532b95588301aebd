"""The mathematics of the family's operations in numpy, in whatever float type the arguments have.

Written from the papers and the fact sheet, not from the engine: an analyzer that shared code with what it judges
would share its mistakes. Letters as in `scarlet_jax.types`; the token axis comes first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich, 2019)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))


def l2(x: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(sum(x^2) + eps) over the last axis."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), without overflow."""
    return (0.5 * (1 + np.tanh(0.5 * x))).astype(x.dtype, copy=False)


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x), without overflow; in f32 as engines write it, which loses digits where e^x is small."""
    if x.dtype == np.float32:
        return np.where(x > 20, x, np.log(1 + np.exp(np.minimum(x, 20))))
    return np.logaddexp(0, x)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; rows of -inf give zeros."""
    top = x.max(axis=-1, keepdims=True)
    e = np.exp(x - np.where(np.isfinite(top), top, 0))
    return e / np.maximum(e.sum(axis=-1, keepdims=True), np.finfo(x.dtype).tiny)


def causal_conv(padded: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """y[t, c] = sum_j kernel[c, j] padded[t + j, c]: padded (W-1+T, C), kernel (C, W)."""
    width = kernel.shape[1]
    tokens = len(padded) - (width - 1)
    y = padded[:tokens] * kernel[:, 0]
    for j in range(1, width):
        y = y + padded[j : j + tokens] * kernel[:, j]
    return y


def rotate(
    x: np.ndarray, angle: np.ndarray, *, adjacent: bool = False, tables: Callable = lambda table: table
) -> np.ndarray:
    """Turn the first 2M dims of x (T, N, H) by angle (T, M); dims i, i+M are a pair, or 2i, 2i+1 if adjacent.

    `tables`: what becomes of cosines and sines before they are used.
    """
    pairs = angle.shape[-1]
    first, second = pair_dims(pairs, adjacent)
    cos, sin = (tables(table(angle))[:, None].astype(x.dtype) for table in (np.cos, np.sin))
    a, b = x[..., first], x[..., second]
    y = x.copy()
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y


def pair_dims(pairs: int, adjacent: bool) -> tuple[np.ndarray, np.ndarray]:
    """The dims that are rotated together: (i, i+M), or (2i, 2i+1) if adjacent."""
    i = np.arange(pairs)
    return (2 * i, 2 * i + 1) if adjacent else (i, i + pairs)


def causal_mask(queries: int, keys: int) -> np.ndarray:
    """bool (T, S): whether query t sees key s, when the queries are the last of the keys."""
    return np.arange(keys) <= np.arange(queries)[:, None] + (keys - queries)


def scores(q: np.ndarray, k: np.ndarray, read: np.ndarray) -> np.ndarray:
    """q (T, N, H) . k (S, K, H) -> (T, N, S); query head n reads kv head read[n]."""
    return np.matmul(q.transpose(1, 0, 2), k[:, read].transpose(1, 2, 0)).transpose(1, 0, 2)


def mix(probabilities: np.ndarray, v: np.ndarray, read: np.ndarray) -> np.ndarray:
    """probabilities (T, N, S), v (S, K, H) -> (T, N, H)."""
    return np.matmul(probabilities.transpose(1, 0, 2), v[:, read].transpose(1, 0, 2)).transpose(1, 0, 2)


def delta_rule(
    q,
    k,
    v,
    g,
    beta,
    state,
    *,
    rounding=None,
    entering=None,
    decay_last=False,
    correct=True,
    read_first=False,
    read_before=False,
    correct_first=False,
    beta_on="both",
):
    """The gated delta rule, token by token (Yang et al., 2024), and its known misreadings.

    q, k (T, Hv, Dk), v (T, Hv, Dv), g and beta (T, Hv), state (Hv, Dv, Dk) -> o (T, Hv, Dv), the last state.

    Args:
        q: queries, already scaled.
        k: keys.
        v: values.
        g: log decay.
        beta: write strength.
        state: the state before the first token.
        rounding: applied to the state after every token (a state kept in low precision).
        entering: applied to the state before every token (a state that heads share).
        decay_last: the state decays after the update instead of before.
        correct: subtract what the state already says of this key (False: plain gated linear attention).
        read_first: the output reads the state before the update.
        read_before: the output reads the state before decay and update.
        correct_first: what the state says of this key is looked up before the decay.
        beta_on: what the write strength scales: "both", or only the "new" value, or only what is "known".
    """
    o = np.empty_like(v)
    for t in range(len(v)):
        decay = np.exp(g[t])[:, None, None]
        if entering is not None:
            state = entering(state)
        if read_before:
            o[t] = np.matmul(state, q[t][:, :, None])[..., 0]
        before = state
        if not decay_last:
            state = state * decay
        known = np.matmul(before if correct_first else state, k[t][:, :, None])[..., 0] if correct else 0
        strength = beta[t][:, None]
        new, known = (
            part if beta_on == other else strength * part for part, other in ((v[t], "known"), (known, "new"))
        )
        write = (new - known)[:, :, None] * k[t][:, None, :]
        if read_first:
            o[t] = np.matmul(state, q[t][:, :, None])[..., 0]
        state = state + write
        if decay_last:
            state = state * decay
        if rounding is not None:
            state = rounding(state)
        if not (read_first or read_before):
            o[t] = np.matmul(state, q[t][:, :, None])[..., 0]
    return o, state


def delta_rule_by_chunk(
    q, k, v, g, beta, state, *, chunk, terms=None, start_decays=True, sums=lambda g: np.cumsum(g, axis=0)
):
    """The delta rule with the tokens of a chunk solved for together, as kernels do it, and its misreadings.

    Arrays and results as in `delta_rule`. With S the state before the chunk, G the sums of log decays and A what
    one write of the chunk says of a later key, the writes d solve (1 + A) d = beta (v - e^G S k).

    Args:
        q: queries, already scaled.
        k: keys.
        v: values.
        g: log decay.
        beta: write strength.
        state: the state before the first token.
        chunk: tokens solved for together.
        terms: of the series 1 - A + A^2 - ... in place of the solution; None for all.
        start_decays: whether S is seen to decay within the chunk.
        sums: g (C, Hv) -> G.
    """
    o, state = np.empty_like(v), state.copy()
    for start in range(0, len(v), chunk):
        rows = slice(start, start + chunk)
        qs, ks, vs, strength = (np.moveaxis(x[rows], 0, 1) for x in (q, k, v, beta))
        total = sums(g[rows]).T  # (Hv, C)
        size = total.shape[1]
        lower = np.tril(np.ones((size, size), bool))
        decay = np.exp(np.where(lower, total[:, :, None] - total[:, None], -np.inf))
        seen = np.exp(total)[..., None] if start_decays else np.ones((*total.shape, 1))
        asked = strength[..., None] * (vs - seen * np.matmul(ks, state.swapaxes(1, 2)))
        mixing = strength[..., None] * decay * np.matmul(ks, ks.swapaxes(1, 2)) * np.tril(lower, -1)
        write = _inverse(mixing, asked, terms)
        within = np.matmul(decay * np.matmul(qs, ks.swapaxes(1, 2)), write)
        o[rows] = np.moveaxis(seen * np.matmul(qs, state.swapaxes(1, 2)) + within, 0, 1)
        left = np.exp(total[:, -1:] - total)[..., None] * write
        state = np.exp(total[:, -1])[:, None, None] * state + np.matmul(left.swapaxes(1, 2), ks)
    return o, state


def _inverse(a: np.ndarray, b: np.ndarray, terms: int | None) -> np.ndarray:
    """(1 + a)^-1 b, or its series cut off."""
    if terms is None:
        return np.linalg.solve(np.eye(a.shape[-1]) + a, b)
    total = part = b
    for _ in range(terms - 1):
        part = -np.matmul(a, part)
        total = total + part
    return total
