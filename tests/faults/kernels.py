"""How kernels go wrong: numbers in few bits, chunks and their solves, caches, tiles, shards, strides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracle
from faults import changes
from faults.changes import ANY, Change, function, product, tap


def of(part: str, other: str) -> Callable[..., np.ndarray]:
    """The weight whose name has `other` where this one's has `part`."""
    return lambda w, name, all_: all_[name.replace(part, other)]


# --- numbers in few bits --------------------------------------------------------------------------------------


def significant(x: np.ndarray, bits: int) -> np.ndarray:
    """Rounded to that many significant bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def int8(x: np.ndarray) -> np.ndarray:
    """One scale a row."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.round(x / scale) * scale


def quick_exp(x: np.ndarray) -> np.ndarray:
    """2^whole (1 + fraction): the exponent's bits set and the mantissa left linear."""
    y = x / np.log(2)
    return np.ldexp(1 + (y - np.floor(y)), np.floor(y).astype(int))


def sums_in_bf16(x: np.ndarray, w: np.ndarray, width: int = 16) -> np.ndarray:
    """A product whose accumulator has eight bits, `width` inputs at a time."""
    total = np.zeros((len(x), len(w)))
    for start in range(0, x.shape[1], width):
        part = slice(start, start + width)
        total = changes.bf16(total + x[:, part] @ w[:, part].T)
    return total


# --- the delta rule by chunks ---------------------------------------------------------------------------------


def solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(I + a) x = b, a (H, C, C) strictly lower, b (H, C, Dv)."""
    return np.linalg.solve(np.eye(a.shape[-1]) + a, b)


def truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The first two terms of the inverse's series."""
    return b - a @ b


def chunked(
    chunk: int = 16,
    solve: Callable[[np.ndarray, np.ndarray], np.ndarray] = solve,
    sums: Callable[[np.ndarray], np.ndarray] = lambda g: np.cumsum(g, axis=0),
    start_decays: bool = True,
    scores: Callable[[np.ndarray], np.ndarray] = lambda qk: qk,
    carry: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda state, before: state,
) -> Change:
    """The delta rule chunk by chunk, one part of it as given."""

    def rule(_original, q, k, v, g, beta):
        T, Hv, Dv = v.shape
        states, outputs = np.zeros((T + 1, Hv, Dv, k.shape[-1])), np.empty_like(v)
        state = states[0]
        for start in range(0, T, chunk):
            part = slice(start, start + chunk)
            Q, K, V, B = (np.moveaxis(x[part], 0, 1) for x in (q, k, v, beta))
            G = sums(g[part]).T
            lower = np.tril(np.ones((G.shape[1], G.shape[1])))
            ratio = np.exp(np.where(lower, G[:, :, None] - G[:, None], -np.inf))
            reach = np.exp(G)[..., None] if start_decays else np.ones((*G.shape, 1))
            known = reach * (K @ state.swapaxes(1, 2))
            mixing = B[..., None] * ratio * (K @ K.swapaxes(1, 2)) * np.tril(lower, -1)
            delta = solve(mixing, B[..., None] * (V - known))
            within = ratio * scores(Q @ K.swapaxes(1, 2)) @ delta
            outputs[part] = np.moveaxis(reach * (Q @ state.swapaxes(1, 2)) + within, 0, 1)
            last = np.exp(G[:, -1:] - G)[..., None] * delta
            after = np.exp(G[:, -1])[:, None, None] * state + last.swapaxes(1, 2) @ K
            states[T] = after
            state = carry(after, state)
        return outputs, states

    return function("delta_rule", rule)


def carried(history: Callable[[np.ndarray], np.ndarray], chunk: int = 32) -> Change:
    """The convolution by chunks; `history` is what becomes of the rows that one leaves to the next."""

    def conv(original, padded, kernel):
        past, parts = kernel.shape[1] - 1, []
        for start in range(0, len(padded) - past, chunk):
            part = padded[start : start + chunk + past].copy()
            if start:
                part[:past] = history(part[:past])
            parts.append(original(part, kernel))
        return np.concatenate(parts)

    return function("causal_conv", conv)


# --- attention ------------------------------------------------------------------------------------------------


def seen(visible: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Change:
    """Another mask: visible(token, head, key)."""

    def softmax(_original, scores):
        T, N, S = scores.shape
        seen = visible(np.arange(T)[:, None, None], np.arange(N)[:, None], np.arange(S))
        e = np.exp(scores - scores.max(axis=-1, keepdims=True)) * np.broadcast_to(seen, scores.shape)
        return e / e.sum(axis=-1, keepdims=True)

    return function("causal_softmax", softmax)


def reread(cached: Callable[[np.ndarray], np.ndarray]) -> tuple[Change, Change]:
    """Scores made with keys, and mixes made with values, as a cache gives them back."""

    def scores(x, get):
        key = cached(get("Kcur"))
        read = oracle.kv_head(np.arange(x.shape[1]), x.shape[1], key.shape[1])
        return np.einsum("tnh,snh->tns", get("Qcur"), key[:, read])

    def mix(x, get):
        value = cached(get("Vcur"))
        read = oracle.kv_head(np.arange(x.shape[1]), x.shape[1], value.shape[1])
        return np.einsum("tns,snh->tnh", get("kq_soft_max"), value[:, read])

    return tap("kq" + ANY, scores), tap("kqv" + ANY, mix)


def mixed_with_other_heads(x: np.ndarray, get: Any) -> np.ndarray:
    """Scores read kv head n // r, values n % K."""
    value = get("Vcur")
    read = np.arange(x.shape[1]) % value.shape[1]
    return np.einsum("tns,snh->tnh", get("kq_soft_max"), value[:, read])


def wrapped(x: np.ndarray, _get: Any) -> np.ndarray:
    """A ring of 64 slots: from token 64 on, the oldest keys are the newest."""
    x = x.copy()
    for slot in range(max(0, len(x) - 64)):
        x[slot + 64 :, :, slot] = x[slot + 64 :, :, slot + 64]
    return x


def turned(which: str, position: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Queries or keys alone turned by other positions."""

    def change(x: np.ndarray, get: Any) -> np.ndarray:
        return oracle.rope(
            get(f"{which}cur_normed"), np.stack([position(np.arange(len(x)))] * 4), *changes.ROPE
        )

    return tap(f"{which}cur" + ANY, change)


def rope_before_norm(model: oracle.Model) -> Change:
    def change(x: np.ndarray, get: Any) -> np.ndarray:
        raw = get("Qcur_reshaped")
        turned = oracle.rope(raw, np.stack([np.arange(len(x))] * 4), *changes.ROPE)
        weight = get("Qcur_normed") / oracle.rms(raw, 1e-6)  # the same for every token and head
        return oracle.rms(turned, 1e-6) * weight[:1, :1]

    return tap("Qcur" + ANY, change)


def coarse_tables(_original, x, positions, rotary, sections, base, *rest):
    """Cosines and sines stored in bf16."""
    half = rotary // 2
    angle = oracle.rope_angles(positions, rotary, sections, base, *rest)
    cos, sin = (changes.bf16(f(angle))[:, None] for f in (np.cos, np.sin))
    a, b, passed = np.split(x, [half, rotary], axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos, passed], axis=-1)


# --- products -------------------------------------------------------------------------------------------------


def tile(rows: slice, cols: slice) -> Callable[..., np.ndarray]:
    """A tile that nobody wrote."""

    def change(x: np.ndarray, _get: Any) -> np.ndarray:
        x = x.copy()
        x[rows, cols] = np.random.default_rng(8).standard_normal(x[rows, cols].shape)
        return x

    return change


def stale_last(x: np.ndarray, _get: Any) -> np.ndarray:
    """Tokens go in pairs; an odd one at the end gets what was in the buffer, the pair's first before it."""
    x = x.copy()
    if len(x) % 2:
        x[-1] = x[-3]
    return x


def half_the_inputs(w: np.ndarray) -> np.ndarray:
    """One of two shards: its sum was never added to the other's."""
    return np.where(np.arange(w.shape[1]) < w.shape[1] // 2, w, 0)


def shards_interleaved(w: np.ndarray) -> np.ndarray:
    """Rows of two shards put together one by one, not one after the other."""
    return w.reshape(2, -1, w.shape[1]).swapaxes(0, 1).reshape(w.shape)


def next_block_scale(w: np.ndarray) -> np.ndarray:
    """Blocks of 8 inputs, each with the scale of the block after it."""
    blocks = w.reshape(len(w), -1, 8)
    scale = np.abs(blocks).max(axis=-1, keepdims=True)
    return (blocks / scale * np.roll(scale, -1, axis=1)).reshape(w.shape)


def without_minimum(w: np.ndarray) -> np.ndarray:
    """Blocks of 8 inputs that start at 0 and not at their least value."""
    blocks = w.reshape(len(w), -1, 8)
    return (blocks - blocks.min(axis=-1, keepdims=True)).reshape(w.shape)


def every_eighth_negative(w: np.ndarray) -> np.ndarray:
    """The sign of the last of eight, made from the parity of the others, with the wrong parity."""
    return np.where(np.arange(w.shape[1]) % 8 == 7, -w, w)


def expert_stride(w: np.ndarray, *_: Any) -> np.ndarray:
    """Expert e read from e rows too early."""
    rows = w.reshape(-1, w.shape[-1])
    return np.stack([np.roll(rows, e, axis=0)[e * w.shape[1] : (e + 1) * w.shape[1]] for e in range(len(w))])


def second_shard_of_ids(table: np.ndarray, *_: Any) -> np.ndarray:
    """Ids of the other half of the vocabulary find nothing, and the sum over shards was left out."""
    return np.where(np.arange(len(table))[:, None] < len(table) // 2, table, 0)


def down_in_bf16(model: oracle.Model) -> Change:
    def down(original, m, name, x):
        if not name.endswith("ffn_down"):
            return original(m, name, x)
        return sums_in_bf16(x, m.weights[f"{name}.weight"])

    return product(down)


def input_of(stem: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """One product on changed inputs."""
    return product(lambda o, m, name, x: o(m, name, change(x) if name.endswith(stem) else x))


def router_before_the_norm(model: oracle.Model) -> Change:
    """The router on the stream itself."""

    @contextlib.contextmanager
    def change(m: oracle.Model) -> Iterator[oracle.Model]:
        with contextlib.ExitStack() as stack:
            for i in range(m.trunk_layers):
                w = m.weights[f"blk.{i}.ffn_gate_inp.weight"]
                replaced = tap(f"ffn_moe_logits-{i}", lambda x, get, w=w: get("attn_residual") @ w.T)
                stack.enter_context(replaced(m))
            yield m

    return change
