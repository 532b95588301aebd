"""What happens to a part: a head, a tail, a chunk, a cache slot, some ids, one expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
from faults import changes
from faults.changes import Change, delta_step, function


def rows(change: Callable[[np.ndarray], np.ndarray], rows: slice | list[int]) -> Callable[..., np.ndarray]:
    """A tap changed at some tokens only."""

    def apply(x: np.ndarray, _get: Any) -> np.ndarray:
        x = x.copy()
        x[rows] = change(x[rows])
        return x

    return apply


def columns(change: Callable[..., np.ndarray], columns: slice | list[int]) -> Callable[..., np.ndarray]:
    """A tap changed at some of its second axis (channels or heads) only."""

    def apply(x: np.ndarray, _get: Any) -> np.ndarray:
        x = x.copy()
        x[:, columns] = change(x[:, columns])
        return x

    return apply


def heads(x: np.ndarray, dim: int) -> np.ndarray:
    return x.reshape(len(x), -1, dim)


def head_minor(x: np.ndarray, dim: int) -> np.ndarray:
    """Heads (N, H) laid out as (H, N)."""
    return heads(x, dim).swapaxes(1, 2).reshape(len(x), -1)


def without_tail(n: int) -> Callable[..., np.ndarray]:
    """A product whose last `n` inputs are left out: a loop over whole tiles only."""

    def change(w: np.ndarray, *_: Any) -> np.ndarray:
        w = w.copy()
        w[:, -n:] = 0
        return w

    return change


def conv_by_chunks(history: Callable[[np.ndarray], np.ndarray], chunk: int = 64) -> Change:
    """The convolution run chunk by chunk, what is carried over mistreated."""

    def conv(original, padded, kernel):
        past = kernel.shape[1] - 1
        parts = []
        for start in range(0, len(padded) - past, chunk):
            part = padded[start : start + chunk + past].copy()
            if start:
                part[:past] = history(padded[max(0, start - 1) : start + past])[-past:] if past else part[:0]
            parts.append(original(part, kernel))
        return np.concatenate(parts)

    return function("causal_conv", conv)


def turn(change: Callable[..., tuple]) -> Change:
    """Rotation with other arguments: change(x, positions, rotary, sections, base) -> the same five."""
    return function("rope", lambda original, *args: original(*change(*args[:5])))


def last_dims(original, x, positions, rotary, *rest):
    turned = original(np.roll(x, rotary, axis=-1), positions, rotary, *rest)
    return np.roll(turned, -rotary, axis=-1)


def text_in_one_section(original, x, positions, rotary, sections, base, *rest):
    """Height and width positions of text left at zero."""
    positions = positions.copy()
    positions[1:] = 0
    return original(x, positions, rotary, sections, base, *rest)


def later(x, positions, rotary, sections, base):
    positions = positions + (np.arange(positions.shape[1]) >= 64)
    return x, positions, rotary, sections, base


def softmax(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Change:
    """Softmax made from raw scores and the causal mask."""

    def softmax(_original, scores):
        visible = np.broadcast_to(
            np.arange(scores.shape[2]) <= np.arange(len(scores))[:, None, None], scores.shape
        )
        return change(scores - scores.max(axis=-1, keepdims=True), visible)

    return function("causal_softmax", softmax)


def normalised(e: np.ndarray, extra: float | np.ndarray = 0.0) -> np.ndarray:
    return e / (e.sum(axis=-1, keepdims=True) + extra)


def without_sink(scores, visible):
    late = np.arange(len(scores))[:, None, None] >= 16
    return normalised(np.exp(scores) * (visible & ~(late & (np.arange(scores.shape[2]) < 4))))


def peeking(scores, visible):
    T = len(scores)
    seen = np.arange(scores.shape[2]) <= np.arange(T)[:, None, None] + 1
    return normalised(np.exp(scores) * (visible | seen))


def delta(
    change: Callable[..., Any], boundary: int = 0, carry: Callable = lambda s: s, start: Any = None
) -> Change:
    """The delta rule with a step of its own: change(state, q, k, v, g, beta) -> state, output."""

    def rule(_original, q, k, v, g, beta):
        T, Hv, Dv = v.shape
        states, outputs = np.zeros((T + 1, Hv, Dv, k.shape[-1])), np.empty_like(v)
        if start is not None:
            states[0] = start(states[0].shape)
        for t in range(T):
            state = carry(states[t]) if boundary and t and t % boundary == 0 else states[t]
            states[t + 1], outputs[t] = change(state, q[t], k[t], v[t], g[t], beta[t])
        return outputs, states

    return function("delta_rule", rule)


def beta_on_what_is_known(state, q, k, v, g, beta):
    state = state * np.exp(g)[:, None, None]
    known = np.einsum("hvk,hk->hv", state, k)
    state = state + (v - beta[:, None] * known)[:, :, None] * k[:, None]
    return state, np.einsum("hvk,hk->hv", state, q)


def decay_of_the_first(state, q, k, v, g, beta):
    g = g.copy()
    g[1] = g[0]
    return delta_step(state, q, k, v, g, beta)


def known_before_decay(state, q, k, v, g, beta):
    known = np.einsum("hvk,hk->hv", state, k)
    state = state * np.exp(g)[:, None, None]
    state = state + (beta[:, None] * (v - known))[:, :, None] * k[:, None]
    return state, np.einsum("hvk,hk->hv", state, q)


def scale_from_the_second_head(state, q, k, v, g, beta):
    q = q.copy()
    q[0] *= q.shape[-1] ** 0.5
    return delta_step(state, q, k, v, g, beta)


def garbage(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape) * 0.3


def sparse(x: np.ndarray, _get: Any) -> np.ndarray:
    """A race: one element in two hundred has missed an addition."""
    hit = np.random.default_rng(6).random(x.shape) < 0.005
    return np.where(hit, 0.4 * x + 0.1, x)


def stale_tile(x: np.ndarray, _get: Any) -> np.ndarray:
    """Rows 32 to 47 still hold those of the tile before."""
    x = x.copy()
    if len(x) >= 48:
        x[32:48] = x[16:32]
    return x


def token_axis(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=0, keepdims=True) + eps)


def whole_vectors(x: np.ndarray, eps: float) -> np.ndarray:
    """The mean over whole vectors of 16 lanes only, still divided by all."""
    n = max(16, x.shape[-1] // 16 * 16) if x.shape[-1] % 16 else x.shape[-1] - 16
    return x / np.sqrt((x[..., :n] ** 2).sum(-1, keepdims=True) / x.shape[-1] + eps)


def quick_root(o: Any, x: np.ndarray, eps: float) -> np.ndarray:
    """A reciprocal root of eight bits, not refined."""
    root = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    mantissa, exponent = np.frexp(root)
    return x * np.ldexp(np.round(mantissa * 256) / 256, exponent)


def overwritten(x: np.ndarray, _get: Any) -> np.ndarray:
    """Key slot 5 was written over by token 6's."""
    x = x.copy()
    x[6:, :, 5] = x[6:, :, 6]
    return x


def swap_experts(w: np.ndarray, *_: Any) -> np.ndarray:
    w = w.copy()
    w[[1, 2]] = w[[2, 1]]
    return w


def lost_expert_rows(x: np.ndarray, get: Any) -> np.ndarray:
    """Tokens beyond an expert's capacity are dropped."""
    x, chosen = x.copy(), get("ffn_moe_topk")
    for expert in np.unique(chosen):
        token, slot = np.nonzero(chosen == expert)
        x[token[24:], slot[24:]] = 0
    return x


def high_ids(table: np.ndarray, *_: Any) -> np.ndarray:
    table = table.copy()
    table[64:] = np.roll(table, -1, axis=0)[64:]
    return table


def clamped_ids(table: np.ndarray, *_: Any) -> np.ndarray:
    table = table.copy()
    table[50:] = table[50]
    return table


def exchange(a: str, b: str) -> Callable[..., np.ndarray]:
    return lambda w, n, all_: all_[n.replace(a, "@").replace(b, a).replace("@", b)]


def split(get: Any, part: int) -> np.ndarray:
    """Queries (0) or keys (1) of the delta net, cut out of the convolution's output."""
    width = changes.KEYS * changes.DIM
    return heads(get("conv_output_silu")[:, part * width : (part + 1) * width], changes.DIM)


def of_the_block_input(x: np.ndarray, get: Any) -> np.ndarray:
    """The norm before the feed-forward network reads the stream before the mixer was added."""
    try:
        before = get("attn_residual") - get("linear_attn_out")
    except KeyError:
        return x
    return oracle.rms(before, 1e-6) * x / oracle.rms(get("attn_residual"), 1e-6)
