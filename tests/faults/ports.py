"""Faults as whoever ports an engine makes them, written to put the analyzer to the test and not beside it.

The catalogue grew with the analyzer; these were run against it first and only then did it learn from what it got
wrong. Most touch a part: a head, a tail, a chunk, some ids. Expected names are those that a person would use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
from faults import catalogue
from faults.catalogue import ATT, NORM, SSM, Change, Fault, both, function, tap, weights

_ANY = r"-\d+"
_EMBED, _HEAD, _MOE, FFN = ("embedding",), ("head",), ("moe",), ("ffn", "moe")
_ALL_NORMS = ("attn_norm", "norm")
_STATE = ("new_state", "attn_output")
_GENERAL = ("channel-permutation", "weight-layout", "head-permutation")


def _rows(change: Callable[[np.ndarray], np.ndarray], rows: slice | list[int]) -> Callable[..., np.ndarray]:
    """A tap changed at some tokens only."""

    def apply(x: np.ndarray, _get: Any) -> np.ndarray:
        x = x.copy()
        x[rows] = change(x[rows])
        return x

    return apply


def _columns(change: Callable[..., np.ndarray], columns: slice | list[int]) -> Callable[..., np.ndarray]:
    """A tap changed at some of its second axis (channels or heads) only."""

    def apply(x: np.ndarray, _get: Any) -> np.ndarray:
        x = x.copy()
        x[:, columns] = change(x[:, columns])
        return x

    return apply


def _heads(x: np.ndarray, dim: int) -> np.ndarray:
    return x.reshape(len(x), -1, dim)


def _head_minor(x: np.ndarray, dim: int) -> np.ndarray:
    """Heads (N, H) laid out as (H, N)."""
    return _heads(x, dim).swapaxes(1, 2).reshape(len(x), -1)


def _without_tail(n: int) -> Callable[..., np.ndarray]:
    """A product whose last `n` inputs are left out: a loop over whole tiles only."""

    def change(w: np.ndarray, *_: Any) -> np.ndarray:
        w = w.copy()
        w[:, -n:] = 0
        return w

    return change


def _conv_by_chunks(history: Callable[[np.ndarray], np.ndarray], chunk: int = 64) -> Change:
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


def _turn(change: Callable[..., tuple]) -> Change:
    """Rotation with other arguments: change(x, positions, rotary, sections, base) -> the same five."""
    return function("rope", lambda original, *args: original(*change(*args[:5])))


def _last_dims(original, x, positions, rotary, *rest):
    turned = original(np.roll(x, rotary, axis=-1), positions, rotary, *rest)
    return np.roll(turned, -rotary, axis=-1)


def _text_in_one_section(original, x, positions, rotary, sections, base, *rest):
    """Height and width positions of text left at zero."""
    positions = positions.copy()
    positions[1:] = 0
    return original(x, positions, rotary, sections, base, *rest)


def _later(x, positions, rotary, sections, base):
    positions = positions + (np.arange(positions.shape[1]) >= 64)
    return x, positions, rotary, sections, base


def _softmax(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Change:
    """Softmax made from raw scores and the causal mask."""

    def softmax(_original, scores):
        visible = np.broadcast_to(
            np.arange(scores.shape[2]) <= np.arange(len(scores))[:, None, None], scores.shape
        )
        return change(scores - scores.max(axis=-1, keepdims=True), visible)

    return function("causal_softmax", softmax)


def _normalised(e: np.ndarray, extra: float | np.ndarray = 0.0) -> np.ndarray:
    return e / (e.sum(axis=-1, keepdims=True) + extra)


def _without_sink(scores, visible):
    late = np.arange(len(scores))[:, None, None] >= 16
    return _normalised(np.exp(scores) * (visible & ~(late & (np.arange(scores.shape[2]) < 4))))


def _peeking(scores, visible):
    T = len(scores)
    seen = np.arange(scores.shape[2]) <= np.arange(T)[:, None, None] + 1
    return _normalised(np.exp(scores) * (visible | seen))


def _delta(
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


def _beta_on_what_is_known(state, q, k, v, g, beta):
    state = state * np.exp(g)[:, None, None]
    known = np.einsum("hvk,hk->hv", state, k)
    state = state + (v - beta[:, None] * known)[:, :, None] * k[:, None]
    return state, np.einsum("hvk,hk->hv", state, q)


def _decay_of_the_first(state, q, k, v, g, beta):
    g = g.copy()
    g[1] = g[0]
    return catalogue._step(state, q, k, v, g, beta)


def _known_before_decay(state, q, k, v, g, beta):
    known = np.einsum("hvk,hk->hv", state, k)
    state = state * np.exp(g)[:, None, None]
    state = state + (beta[:, None] * (v - known))[:, :, None] * k[:, None]
    return state, np.einsum("hvk,hk->hv", state, q)


def _scale_from_the_second_head(state, q, k, v, g, beta):
    q = q.copy()
    q[0] *= q.shape[-1] ** 0.5
    return catalogue._step(state, q, k, v, g, beta)


def _garbage(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape) * 0.3


def _sparse(x: np.ndarray, _get: Any) -> np.ndarray:
    """A race: one element in two hundred has missed an addition."""
    hit = np.random.default_rng(6).random(x.shape) < 0.005
    return np.where(hit, 0.4 * x + 0.1, x)


def _stale_tile(x: np.ndarray, _get: Any) -> np.ndarray:
    """Rows 32 to 47 still hold those of the tile before."""
    x = x.copy()
    if len(x) >= 48:
        x[32:48] = x[16:32]
    return x


def _token_axis(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=0, keepdims=True) + eps)


def _whole_vectors(x: np.ndarray, eps: float) -> np.ndarray:
    """The mean over whole vectors of 16 lanes only, still divided by all."""
    n = max(16, x.shape[-1] // 16 * 16) if x.shape[-1] % 16 else x.shape[-1] - 16
    return x / np.sqrt((x[..., :n] ** 2).sum(-1, keepdims=True) / x.shape[-1] + eps)


def _quick_root(o: Any, x: np.ndarray, eps: float) -> np.ndarray:
    """A reciprocal root of eight bits, not refined."""
    root = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    mantissa, exponent = np.frexp(root)
    return x * np.ldexp(np.round(mantissa * 256) / 256, exponent)


def _overwritten(x: np.ndarray, _get: Any) -> np.ndarray:
    """Key slot 5 was written over by token 6's."""
    x = x.copy()
    x[6:, :, 5] = x[6:, :, 6]
    return x


def _swap_experts(w: np.ndarray, *_: Any) -> np.ndarray:
    w = w.copy()
    w[[1, 2]] = w[[2, 1]]
    return w


def _lost_expert_rows(x: np.ndarray, get: Any) -> np.ndarray:
    """Tokens beyond an expert's capacity are dropped."""
    x, chosen = x.copy(), get("ffn_moe_topk")
    for expert in np.unique(chosen):
        token, slot = np.nonzero(chosen == expert)
        x[token[24:], slot[24:]] = 0
    return x


def _high_ids(table: np.ndarray, *_: Any) -> np.ndarray:
    table = table.copy()
    table[64:] = np.roll(table, -1, axis=0)[64:]
    return table


def _clamped_ids(table: np.ndarray, *_: Any) -> np.ndarray:
    table = table.copy()
    table[50:] = table[50]
    return table


def _exchange(a: str, b: str) -> Callable[..., np.ndarray]:
    return lambda w, n, all_: all_[n.replace(a, "@").replace(b, a).replace("@", b)]


def _split(get: Any, part: int) -> np.ndarray:
    """Queries (0) or keys (1) of the delta net, cut out of the convolution's output."""
    width = catalogue.KEYS * catalogue.DIM
    return _heads(get("conv_output_silu")[:, part * width : (part + 1) * width], catalogue.DIM)


def _of_the_block_input(x: np.ndarray, get: Any) -> np.ndarray:
    """The norm before the feed-forward network reads the stream before the mixer was added."""
    try:
        before = get("attn_residual") - get("linear_attn_out")
    except KeyError:
        return x
    return oracle.rms(before, 1e-6) * x / oracle.rms(get("attn_residual"), 1e-6)


PORTS: list[Fault] = [
    # --- norms
    Fault(
        "rms-over-tokens",
        "norm",
        function("rms", lambda o, x, e: _token_axis(x, e)),
        _ALL_NORMS,
        NORM,
        ("norm-axis",),
    ),
    Fault(
        "rms-whole-vectors-only",
        "norm",
        function("rms", lambda o, x, e: _whole_vectors(x, e)),
        _ALL_NORMS,
        NORM,
        ("norm-axis", "partial-sum", "token-gain"),
    ),
    Fault(
        "rms-n-minus-one",
        "norm",
        function("rms", lambda o, x, e: x / np.sqrt((x * x).sum(-1, keepdims=True) / (x.shape[-1] - 1) + e)),
        _ALL_NORMS,
        NORM,
        ("gain", "missing-scale", "sum-for-mean"),
    ),
    Fault(
        "rms-quick-root",
        "norm",
        function("rms", _quick_root),
        _ALL_NORMS,
        NORM,
        ("token-gain", "output-precision", "approximation"),
    ),
    Fault(
        "post-norm-eps-1e-2",
        "norm",
        tap(
            "attn_post_norm" + _ANY,
            lambda x, get: (
                x
                * np.sqrt(
                    (np.mean(get("attn_residual") ** 2, -1, keepdims=True) + 1e-6)
                    / (np.mean(get("attn_residual") ** 2, -1, keepdims=True) + 1e-2)
                )
            ),
        ),
        ("attn_post_norm",),
        NORM,
        ("eps", "token-gain"),
    ),
    Fault(
        "norm-weights-rolled",
        "norm",
        weights(r"attn_q_norm\.weight", lambda w, *_: np.roll(w, 1)),
        ("Qcur_normed",),
        ("norm", "attention"),
        ("norm-weight", "wrong-weight", "weight-layout", "channel-permutation"),
    ),
    Fault(
        "final-norm-weight-skipped",
        "norm",
        weights(r"output_norm", lambda w, *_: 0 * w + 1),
        ("result_norm", "h_nextn"),
        NORM,
        ("missing-norm-weight", "norm-weight"),
        "one",
    ),
    Fault(
        "one-post-norm-doubled",
        "norm",
        weights(r"blk\.2\.post_attention_norm", lambda w, *_: w + 1),
        ("attn_post_norm",),
        NORM,
        ("double-norm-offset",),
        "one",
    ),
    Fault(
        "post-norm-reads-the-block-input",
        "norm",
        tap("attn_post_norm" + _ANY, _of_the_block_input),
        ("attn_post_norm",),
        NORM,
        ("wrong-input", "residual-source", "missing-branch", "wrong-tap"),
    ),
    Fault(
        "last-key-head-not-normed",
        "norm",
        tap("Kcur_normed" + _ANY, _columns(lambda x: 2.5 * x, [-1])),
        ("Kcur_normed",),
        ("norm", "attention"),
        ("head-gain", "missing-norm", "gain"),
    ),
    # --- delta net
    Fault(
        "softplus-threshold-one",
        "ssm",
        function("softplus", lambda o, x: np.where(x > 0, x, o(x))),
        ("a_softplus",),
        SSM,
        ("softplus-threshold", "relu-for-softplus"),
    ),
    Fault(
        "softplus-is-exp",
        "ssm",
        function("softplus", lambda o, x: np.exp(np.minimum(x, 3))),
        ("a_softplus",),
        SSM,
        ("exp-for-softplus", "missing-softplus"),
    ),
    Fault(
        "softplus-base-two",
        "ssm",
        function("softplus", lambda o, x: o(x) / np.log(2)),
        ("a_softplus",),
        SSM,
        ("gain", "missing-scale"),
    ),
    Fault(
        "dt-bias-after",
        "ssm",
        tap(
            "a_softplus" + _ANY,
            lambda x, get: oracle.softplus(get("alpha")) + np.log(np.expm1(x)) - get("alpha"),
        ),
        ("a_softplus",),
        SSM,
        ("bias-after-softplus", "missing-bias"),
    ),
    Fault(
        "decay-limited",
        "ssm",
        tap("gate" + _ANY, lambda x, get: np.maximum(x, -0.2)),
        ("gate",),
        SSM,
        ("saturation", "decay"),
    ),
    Fault(
        "decay-bf16",
        "ssm",
        tap("gate" + _ANY, lambda x, get: catalogue._bf16(x)),
        ("gate",),
        SSM,
        ("output-precision",),
    ),
    Fault(
        "beta-negated",
        "ssm",
        tap("beta_sigmoid" + _ANY, lambda x, get: 1 - x),
        ("beta_sigmoid",),
        SSM,
        ("sigmoid-sign",),
    ),
    Fault(
        "beta-of-the-next-head",
        "ssm",
        tap("beta_sigmoid" + _ANY, lambda x, get: np.roll(x, 1, axis=1)),
        ("beta_sigmoid",),
        SSM,
        _GENERAL,
    ),
    Fault(
        "alpha-is-beta",
        "ssm",
        weights(r"ssm_alpha\.weight", lambda w, n, all_: all_[n.replace("alpha", "beta")]),
        ("alpha",),
        SSM,
        ("wrong-weight", "wrong-tap", "swapped-alpha-beta"),
    ),
    Fault(
        "conv-history-lost-at-chunks",
        "state",
        _conv_by_chunks(lambda p: 0 * p),
        ("conv_output_raw",),
        SSM,
        ("chunk-boundary", "conv-state"),
        tokens=100,
    ),
    Fault(
        "conv-history-one-late",
        "state",
        _conv_by_chunks(lambda p: p[:-1]),
        ("conv_output_raw",),
        SSM,
        ("chunk-boundary", "conv-state", "token-shift"),
        tokens=100,
    ),
    Fault(
        "conv-history-reversed",
        "state",
        _conv_by_chunks(lambda p: p[1:][::-1]),
        ("conv_output_raw",),
        SSM,
        ("chunk-boundary", "conv-state", "state-reversed"),
        tokens=100,
    ),
    Fault(
        "conv-kernels-one-head-on",
        "ssm",
        weights(r"ssm_conv1d", lambda w, *_: np.roll(w, catalogue.DIM, axis=0)),
        ("conv_output_raw",),
        SSM,
        ("wrong-weight", *_GENERAL),
    ),
    Fault(
        "conv-silu-on-values-only",
        "ssm",
        tap(
            "conv_output_silu" + _ANY,
            lambda x, get: np.concatenate(
                [
                    get("conv_output_raw")[:, : 2 * catalogue.KEYS * catalogue.DIM],
                    x[:, 2 * catalogue.KEYS * catalogue.DIM :],
                ],
                1,
            ),
        ),
        ("conv_output_silu",),
        SSM,
        ("missing-silu",),
    ),
    Fault(
        "queries-are-keys",
        "ssm",
        both(
            tap("q_conv" + _ANY, lambda x, get: _split(get, 1)),
            tap("k_conv" + _ANY, lambda x, get: _split(get, 0)),
        ),
        ("q_conv", "k_conv"),
        SSM,
        ("swapped-q-k", "wrong-tap"),
    ),
    Fault(
        "query-norm-left-out",
        "ssm",
        tap("q_conv_predelta" + _ANY, lambda x, get: get("q_conv")),
        ("q_conv_predelta",),
        SSM,
        ("missing-norm",),
        tokens=20,
    ),
    Fault(
        "l2-half-norm",
        "ssm",
        tap(
            "k_conv_predelta" + _ANY,
            lambda x, get: get("k_conv") / np.abs(get("k_conv")).sum(-1, keepdims=True),
        ),
        ("k_conv_predelta",),
        SSM,
        ("token-gain", "head-gain", "norm-axis", "l1-norm", "missing-norm"),
        tokens=30,
    ),
    Fault(
        "value-dims-interleaved",
        "ssm",
        tap(
            "v_conv_predelta" + _ANY,
            lambda x, get: x.reshape(*x.shape[:2], 2, -1).swapaxes(2, 3).reshape(x.shape),
        ),
        ("v_conv_predelta",),
        SSM,
        ("channel-permutation",),
    ),
    Fault(
        "decay-of-the-first-head",
        "ssm",
        _delta(_decay_of_the_first),
        _STATE,
        SSM,
        ("decay", "head-permutation"),
    ),
    Fault(
        "beta-on-what-is-known",
        "ssm",
        _delta(_beta_on_what_is_known),
        _STATE,
        SSM,
        ("missing-beta", "beta-order"),
    ),
    Fault(
        "correction-before-decay",
        "ssm",
        _delta(_known_before_decay),
        _STATE,
        SSM,
        ("update-order", "decay", "missing-correction"),
    ),
    Fault(
        "scale-from-the-second-head",
        "ssm",
        _delta(_scale_from_the_second_head),
        ("attn_output",),
        SSM,
        ("missing-scale", "head-gain"),
    ),
    Fault(
        "state-lost-every-sixteen",
        "state",
        _delta(catalogue._step, 16, lambda s: 0 * s),
        _STATE,
        SSM,
        ("chunk-boundary",),
        tokens=50,
    ),
    Fault(
        "state-halved-at-chunks",
        "state",
        _delta(catalogue._step, 64, lambda s: 0.5 * s),
        _STATE,
        SSM,
        ("chunk-boundary", "late-tokens", "decay"),
        tokens=100,
    ),
    Fault(
        "state-of-the-last-user",
        "state",
        _delta(catalogue._step, start=_garbage),
        ("state_predelta", *_STATE),
        SSM,
        ("stale-state", "state-reset", "first-token", "initial-state", "early-tokens"),
    ),
    Fault(
        "z-of-the-next-head",
        "ssm",
        function("gated_norm", lambda o, x, w, z, e: o(x, w, np.roll(z, 1, axis=1), e)),
        ("final_output",),
        SSM,
        ("head-permutation", "gate-layout"),
    ),
    Fault(
        "gated-norm-eps-1e-2",
        "ssm",
        function("gated_norm", lambda o, x, w, z, e: o(x, w, z, 1e-2)),
        ("final_output",),
        SSM,
        ("eps",),
    ),
    Fault(
        "gate-of-norm-is-tanh",
        "ssm",
        function("gated_norm", lambda o, x, w, z, e: oracle.rms(x, e) * w * np.tanh(z)),
        ("final_output",),
        SSM,
        ("tanh-for-silu",),
    ),
    Fault(
        "heads-minor-into-out",
        "ssm",
        weights(r"ssm_out\.weight", lambda w, *_: _head_minor(w, catalogue.DIM)),
        ("linear_attn_out",),
        SSM,
        _GENERAL,
    ),
    Fault(
        "out-tail-of-inputs",
        "ssm",
        weights(r"ssm_out\.weight", _without_tail(4)),
        ("linear_attn_out",),
        SSM,
        ("missing-inputs", "partial-sum"),
    ),
    Fault(
        "mixer-branch-twice",
        "ssm",
        tap("attn_residual-0", lambda x, get: x + get("linear_attn_out")),
        ("attn_residual",),
        SSM,
        ("double-branch",),
        "one",
    ),
    Fault(
        "qkv-last-rows-stale",
        "ssm",
        tap("linear_attn_qkv_mixed-1", _columns(lambda x: 0.7 * np.roll(x, 1, axis=0), slice(-6, None))),
        ("linear_attn_qkv_mixed",),
        SSM,
        ("channel-range", "token-shift"),
        "one",
    ),
    # --- attention
    Fault(
        "attention-scale-of-the-model",
        "attention",
        function("attention_scale", lambda o, H: 0.6 * H**-0.5),
        ("kq_soft_max",),
        ATT,
        ("missing-scale", "double-scale", "attention-scale", "gain"),
    ),
    Fault(
        "kv-heads-capped",
        "attention",
        function("kv_head", lambda o, q, n, k: np.minimum(q, k - 1)),
        ("kq", "kqv", "attn_pregate"),
        ATT,
        ("head-permutation",),
    ),
    Fault(
        "rope-base-times-ten",
        "attention",
        _turn(lambda x, p, r, s, b: (x, p, r, s, 10 * b)),
        ("Qcur", "Kcur"),
        ATT,
        ("rope-base",),
    ),
    Fault(
        "rope-on-the-last-dims",
        "attention",
        function("rope", _last_dims),
        ("Qcur", "Kcur"),
        ATT,
        ("rope-partial", "rope-dims"),
    ),
    Fault(
        "rope-sections-zero",
        "attention",
        function("rope", _text_in_one_section),
        ("Qcur", "Kcur"),
        ATT,
        ("rope-sections", "rope-partial"),
    ),
    Fault(
        "rope-frequencies-of-the-head",
        "attention",
        _turn(lambda x, p, r, s, b: (x, p, r, s, b ** (r / x.shape[-1]))),
        ("Qcur", "Kcur"),
        ATT,
        ("rope-base", "rope-partial", "rope-frequencies"),
    ),
    Fault(
        "positions-later-after-a-chunk",
        "attention",
        _turn(_later),
        ("Qcur", "Kcur"),
        ATT,
        ("position-shift", "chunk-boundary"),
        tokens=100,
    ),
    Fault(
        "positions-within-the-chunk",
        "attention",
        _turn(lambda x, p, r, s, b: (x, p % 64, r, s, b)),
        ("Qcur", "Kcur"),
        ATT,
        ("position-shift", "chunk-boundary", "position-reset"),
        tokens=100,
    ),
    Fault("mask-peeks", "attention", _softmax(_peeking), ("kq_soft_max",), ATT, ("mask",)),
    Fault(
        "mask-drops-the-first-keys", "attention", _softmax(_without_sink), ("kq_soft_max",), ATT, ("mask",)
    ),
    Fault(
        "mask-after-softmax",
        "attention",
        _softmax(lambda s, seen: _normalised(np.exp(s)) * seen),
        ("kq_soft_max",),
        ATT,
        ("mask", "softmax-normalisation"),
    ),
    Fault(
        "softmax-plus-one",
        "attention",
        _softmax(lambda s, seen: _normalised(np.exp(s) * seen, 1.0)),
        ("kq_soft_max",),
        ATT,
        ("softmax-normalisation", "head-gain"),
    ),
    Fault(
        "key-slot-overwritten",
        "attention",
        tap("kq" + _ANY, _overwritten),
        ("kq",),
        ATT,
        ("kv-cache", "stale-row", "channel-range"),
    ),
    Fault(
        "first-value-slot-empty",
        "attention",
        tap(
            "kqv" + _ANY,
            lambda x, get: (
                x
                - get("kq_soft_max")[:, :, :1]
                * get("Vcur")[0][oracle.kv_head(np.arange(x.shape[1]), x.shape[1], get("Vcur").shape[1])][
                    None
                ]
            ),
        ),
        ("kqv",),
        ATT,
        ("kv-cache", "zeros", "mask"),
    ),
    Fault(
        "one-score-head-nan",
        "attention",
        tap(
            "kq_soft_max" + _ANY,
            _columns(lambda x: np.where(np.arange(len(x))[:, None, None] == 7, np.nan, x), [1]),
        ),
        ("kq_soft_max",),
        ATT,
        ("nan",),
    ),
    Fault(
        "gate-interleaved",
        "attention",
        function("query_and_gate", lambda o, u: (u[..., 0::2], u[..., 1::2])),
        ("Qcur_reshaped", "gate_reshaped"),
        ATT,
        ("gate-layout",),
    ),
    Fault(
        "mix-laid-out-head-minor",
        "attention",
        tap("attn_pregate" + _ANY, lambda x, get: _head_minor(x, catalogue.HEAD)),
        ("attn_pregate",),
        ATT,
        _GENERAL,
    ),
    Fault(
        "one-value-head-rolled",
        "attention",
        tap("Vcur" + _ANY, _columns(lambda x: np.roll(x, 1, axis=-1), [0])),
        ("Vcur",),
        ATT,
        _GENERAL,
    ),
    Fault(
        "query-not-rotated",
        "attention",
        tap("Qcur" + _ANY, lambda x, get: get("Qcur_normed")),
        ("Qcur",),
        ATT,
        ("missing-rope",),
    ),
    Fault(
        "one-attention-layer-ungated",
        "attention",
        tap(r"attn_gated-\d*[13579]", lambda x, get: get("attn_pregate")),
        ("attn_gated",),
        ATT,
        ("missing-gate",),
    ),
    Fault(
        "keys-from-values",
        "attention",
        weights(r"attn_k\.weight", _exchange("attn_k", "attn_v")),
        ("Kcur_normed", "Kcur", "Kcur_projected"),
        ("attention", "norm"),
        ("wrong-weight",),
    ),
    # --- feed-forward and residuals
    Fault(
        "ffn-reads-the-first-norm",
        "ffn",
        function("ffn", lambda o, model, h, i, t: o(model, t[f"attn_norm-{i}"], i, t)),
        ("ffn_gate", "ffn_up"),
        FFN,
        ("wrong-input",),
    ),
    Fault(
        "ffn-hard-swish",
        "ffn",
        tap(
            "ffn_swiglu" + _ANY,
            lambda x, get: get("ffn_gate") * np.clip(get("ffn_gate") / 6 + 0.5, 0, 1) * get("ffn_up"),
        ),
        ("ffn_swiglu",),
        FFN,
        ("hard-swish-for-silu",),
    ),
    Fault(
        "ffn-quick-gelu",
        "ffn",
        tap(
            "ffn_swiglu" + _ANY,
            lambda x, get: get("ffn_gate") * oracle.sigmoid(1.702 * get("ffn_gate")) * get("ffn_up"),
        ),
        ("ffn_swiglu",),
        FFN,
        ("gelu-for-silu",),
    ),
    Fault(
        "ffn-silu-table",
        "ffn",
        tap(
            "ffn_swiglu" + _ANY,
            lambda x, get: oracle.silu(np.round(get("ffn_gate") * 16) / 16) * get("ffn_up"),
        ),
        ("ffn_swiglu",),
        FFN,
        ("approximation", "output-precision", "input-precision"),
    ),
    Fault(
        "down-tail-of-inputs",
        "ffn",
        weights(r"ffn_down\.weight", _without_tail(8)),
        ("ffn_out",),
        FFN,
        ("missing-inputs", "partial-sum"),
    ),
    Fault(
        "down-tail-twice",
        "ffn",
        weights(r"ffn_down\.weight", lambda w, *_: np.concatenate([w[:, :-8], 2 * w[:, -8:]], 1)),
        ("ffn_out",),
        FFN,
        ("double-inputs", "missing-inputs", "partial-sum"),
    ),
    Fault(
        "down-int8-inputs",
        "ffn",
        tap(
            "ffn_out" + _ANY,
            lambda x, get: (
                x
                + 0.004 * np.linalg.norm(x) / x.size**0.5 * np.random.default_rng(1).standard_normal(x.shape)
            ),
        ),
        ("ffn_out",),
        FFN,
        ("output-precision", "input-precision", "low-precision"),
    ),
    Fault(
        "stale-tile",
        "ffn",
        tap("ffn_gate-2", _stale_tile),
        ("ffn_gate",),
        FFN,
        ("stale-row", "token-shift", "some-tokens"),
        "one",
    ),
    Fault(
        "last-token-row-empty",
        "ffn",
        tap("ffn_out" + _ANY, _rows(lambda x: 0 * x, slice(-1, None))),
        ("ffn_out",),
        FFN,
        ("zeros",),
    ),
    Fault("race", "ffn", tap("ffn_out-1", _sparse), ("ffn_out",), FFN, ("sparse", "race"), "one"),
    Fault(
        "one-weight-row-of-another",
        "ffn",
        weights(r"blk\.1\.ffn_up\.weight", lambda w, *_: np.concatenate([w[:17], w[16:17], w[18:]])),
        ("ffn_up",),
        FFN,
        ("channel-copy", "channel-range", "channel-permutation", "stale-row"),
        "one",
    ),
    Fault(
        "residual-twice",
        "ffn",
        tap("l_out-2", lambda x, get: x + get("attn_residual")),
        ("l_out",),
        FFN,
        ("double-residual",),
        "one",
    ),
    Fault(
        "residual-of-the-block-input",
        "ffn",
        tap("l_out-0", lambda x, get: x - get("linear_attn_out")),
        ("l_out",),
        FFN,
        ("residual-before-mixer", "residual-source"),
        "one",
    ),
    Fault(
        "residual-bf16",
        "ffn",
        tap("l_out" + _ANY, lambda x, get: catalogue._bf16(x)),
        ("l_out",),
        FFN,
        ("output-precision",),
    ),
    Fault(
        "ffn-f16-overflow",
        "ffn",
        tap("ffn_swiglu-3", lambda x, get: np.where(np.abs(x) > 0.8 * np.abs(x).max(), np.inf, x)),
        ("ffn_swiglu",),
        FFN,
        ("nan", "overflow", "infinite"),
        "one",
    ),
    # --- ends
    Fault(
        "embedding-high-ids",
        "embedding",
        weights("token_embd", _high_ids),
        ("model.input_embed",),
        _EMBED,
        ("token-offset", "wrong-row"),
        "one",
    ),
    Fault(
        "embedding-clamped-ids",
        "embedding",
        weights("token_embd", _clamped_ids),
        ("model.input_embed",),
        _EMBED,
        ("token-clamp", "token-offset", "stale-row"),
        "one",
    ),
    Fault(
        "embedding-bf16",
        "embedding",
        tap("model.input_embed", lambda x, get: catalogue._bf16(x)),
        ("model.input_embed",),
        _EMBED,
        ("output-precision",),
        "one",
    ),
    Fault(
        "head-last-rows-zero",
        "head",
        tap("result_output", _columns(lambda x: 0 * x, slice(-5, None))),
        ("result_output",),
        _HEAD,
        ("zeros",),
        "one",
    ),
    Fault(
        "head-scaled",
        "head",
        tap("result_output", lambda x, get: x / 48),
        ("result_output",),
        _HEAD,
        ("gain", "missing-scale"),
        "one",
    ),
    Fault(
        "head-log-softmax",
        "head",
        tap("result_output", lambda x, get: x - np.log(np.exp(x).sum(-1, keepdims=True))),
        ("result_output",),
        _HEAD,
        ("log-softmax", "token-bias"),
        "one",
    ),
    Fault(
        "head-rows-one-off",
        "head",
        weights(r"^output\.weight", lambda w, *_: np.roll(w, 1, axis=0)),
        ("result_output",),
        _HEAD,
        ("channel-permutation", "token-offset"),
        "one",
    ),
    Fault(
        "head-two-blocks-exchanged",
        "head",
        weights(r"^output\.weight", lambda w, *_: np.concatenate([w[16:32], w[:16], w[32:]])),
        ("result_output",),
        _HEAD,
        ("channel-permutation",),
        "one",
    ),
]

# On models with experts only.
EXPERTS: list[Fault] = [
    Fault(
        "router-not-renormalised",
        "moe",
        tap("ffn_moe_weights_norm" + _ANY, lambda x, get: get("ffn_moe_weights")[..., 0]),
        ("ffn_moe_weights_norm",),
        _MOE,
        ("router",),
    ),
    Fault(
        "router-sigmoid",
        "moe",
        tap("ffn_moe_probs" + _ANY, lambda x, get: oracle.sigmoid(get("ffn_moe_logits"))),
        ("ffn_moe_probs",),
        _MOE,
        ("router", "sigmoid-for-softmax"),
    ),
    Fault(
        "router-temperature",
        "moe",
        tap("ffn_moe_probs" + _ANY, lambda x, get: oracle.softmax(get("ffn_moe_logits") / 2)),
        ("ffn_moe_probs",),
        _MOE,
        ("router", "missing-scale"),
    ),
    Fault(
        "router-reads-the-stream",
        "moe",
        tap("ffn_moe_logits" + _ANY, lambda x, get: 1.7 * x + 0.1 * np.cos(np.arange(x.shape[1]))),
        ("ffn_moe_logits",),
        _MOE,
        ("router", "wrong-input", "gain", "missing-bias", "channel-gain"),
    ),
    Fault(
        "weights-of-the-wrong-slots",
        "moe",
        tap("ffn_moe_weights_norm" + _ANY, lambda x, get: x[:, ::-1]),
        ("ffn_moe_weights_norm",),
        _MOE,
        ("router", "channel-permutation"),
    ),
    Fault(
        "experts-exchanged",
        "moe",
        weights(r"ffn_down_exps", _swap_experts),
        ("ffn_moe_down",),
        _MOE,
        ("expert-permutation", "wrong-expert", "router"),
    ),
    Fault(
        "experts-one-on",
        "moe",
        weights(r"ffn_(gate|up|down)_exps", lambda w, *_: np.roll(w, 1, axis=0)),
        ("ffn_moe_gate", "ffn_moe_up"),
        _MOE,
        ("expert-permutation", "wrong-expert", "router"),
    ),
    Fault(
        "expert-capacity",
        "moe",
        tap("ffn_moe_down" + _ANY, _lost_expert_rows),
        ("ffn_moe_down",),
        _MOE,
        ("zeros", "some-tokens", "missing-expert", "expert-capacity"),
        tokens=90,
    ),
    Fault(
        "expert-gate-up-exchanged",
        "moe",
        weights(r"ffn_(gate|up)_exps", _exchange("gate", "up")),
        ("ffn_moe_gate", "ffn_moe_up"),
        _MOE,
        ("swapped-gate-up", "wrong-weight"),
    ),
    Fault(
        "routed-scaling-factor",
        "moe",
        tap("ffn_moe_weighted" + _ANY, lambda x, get: 2.5 * x),
        ("ffn_moe_weighted",),
        _MOE,
        ("router", "gain", "missing-scale"),
    ),
    Fault(
        "last-slot-left-out",
        "moe",
        both(
            tap("ffn_moe_out" + _ANY, lambda x, get: x - get("ffn_moe_weighted")[:, -1]),
            tap("ffn_out" + _ANY, lambda x, get: x - get("ffn_moe_weighted")[:, -1]),
        ),
        ("ffn_moe_out",),
        _MOE,
        ("missing-expert",),
    ),
    Fault(
        "shared-gate-left-out",
        "moe",
        tap("ffn_shexp_gated" + _ANY, lambda x, get: get("ffn_shexp")),
        ("ffn_shexp_gated",),
        _MOE,
        ("shared-expert-gain", "missing-gate"),
    ),
    Fault(
        "shared-expert-twice",
        "moe",
        tap("ffn_out" + _ANY, lambda x, get: x + get("ffn_shexp_gated")),
        ("ffn_out",),
        _MOE,
        ("shared-expert-gain",),
    ),
    Fault(
        "shared-expert-left-out",
        "moe",
        tap("ffn_out" + _ANY, lambda x, get: get("ffn_moe_out")),
        ("ffn_out",),
        _MOE,
        ("missing-shared-expert", "shared-expert-gain"),
    ),
    Fault(
        "shared-gate-raw",
        "moe",
        tap("shared_expert_gate_sigmoid" + _ANY, lambda x, get: get("shared_expert_gate")),
        ("shared_expert_gate_sigmoid",),
        _MOE,
        ("missing-sigmoid",),
    ),
    Fault(
        "one-expert-stale",
        "moe",
        weights(r"blk\.1\.ffn_up_exps", lambda w, *_: np.concatenate([w[:3], w[3:4] * 0.5, w[4:]])),
        ("ffn_moe_up",),
        _MOE,
        ("expert-gain", "wrong-expert", "gain", "missing-scale"),
        "one",
    ),
]
