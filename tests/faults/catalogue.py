"""Faults seen in real engines, and the traps of the formats, each with what an analyzer should say of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
from faults import changes
from faults.changes import (
    ANY,
    Change,
    Fault,
    bf16,
    delta,
    delta_step,
    f16,
    function,
    gelu,
    late,
    softmax_with,
    step,
    tap,
    tiled_to_grouped,
    weights,
)


def _rope(turn: Callable[..., np.ndarray]) -> Change:
    return function("rope", turn)


def _adjacent(_o, x, positions, rotary, sections, base):
    half = rotary // 2
    component = [oracle.rope_component(i, sections) for i in range(half)]
    angle = positions[component].T * base ** (-2 * np.arange(half) / rotary)
    y = x.copy()
    a, b = x[..., 0:rotary:2], x[..., 1:rotary:2]
    y[..., 0:rotary:2] = a * np.cos(angle)[:, None] - b * np.sin(angle)[:, None]
    y[..., 1:rotary:2] = a * np.sin(angle)[:, None] + b * np.cos(angle)[:, None]
    return y


def _whole_head(_o, x, positions, rotary, sections, base):
    H = x.shape[-1]
    return _neox(x, positions[0], H, base)


def _neox(x, position, rotary, base):
    half = rotary // 2
    angle = position[:, None] * base ** (-2 * np.arange(half) / rotary)
    a, b, rest = np.split(x, [half, rotary], axis=-1)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)


def _padded_tables(_o, x, positions, rotary, sections, base):
    H = x.shape[-1]
    angle = np.zeros((len(x), H // 2))
    angle[:, : rotary // 2] = positions[0][:, None] * base ** (-2 * np.arange(rotary // 2) / rotary)
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _turned_on(x: np.ndarray, normed: np.ndarray) -> np.ndarray:
    """Keys rotated as if each were one token further."""
    T = len(x)
    moved = oracle.rope(
        np.concatenate([normed, normed[-1:]])[:T], np.stack([np.arange(T) + 1] * 4), *changes.ROPE
    )
    return moved


def _flat_split(_o, u):
    T, N, width = u.shape
    first, second = np.split(u.reshape(T, -1), 2, axis=-1)
    return first.reshape(T, N, width // 2), second.reshape(T, N, width // 2)


def _one(layer: int, pattern: str) -> str:
    return rf"blk\.{layer}\.{pattern}"


_NORMS = r"(attn_norm|post_attention_norm|attn_q_norm|attn_k_norm|output_norm)\.weight"
ALL_NORM_OPS = ("attn_norm", "norm")
SSM, ATT, NORM, FFN = ("ssm",), ("attention",), ("norm",), ("ffn",)
QKN = ("norm", "attention")
ACTIVATION = ("missing-silu",)

FAULTS: list[Fault] = [
    # --- norms
    Fault(
        "norm-offset-missing",
        "norm",
        weights(_NORMS, lambda w, *_: w - 1),
        ("attn_norm",),
        NORM,
        ("missing-norm-offset",),
    ),
    Fault(
        "norm-offset-doubled",
        "norm",
        weights(_NORMS, lambda w, *_: w + 1),
        ("attn_norm",),
        NORM,
        ("double-norm-offset",),
    ),
    Fault(
        "post-norm-offset-missing",
        "norm",
        weights("post_attention_norm", lambda w, *_: w - 1),
        ("attn_post_norm",),
        NORM,
        ("missing-norm-offset",),
    ),
    Fault(
        "final-norm-offset-doubled",
        "norm",
        weights("output_norm", lambda w, *_: w + 1),
        ("result_norm", "h_nextn"),
        NORM,
        ("double-norm-offset",),
    ),
    Fault(
        "eps-1e-5",
        "norm",
        function("rms", lambda o, x, eps: o(x, 1e-5)),
        ("attn_norm", "norm"),
        NORM,
        ("eps",),
    ),
    Fault(
        "eps-1e-3",
        "norm",
        function("rms", lambda o, x, eps: o(x, 1e-3)),
        ("attn_norm", "norm"),
        NORM,
        ("eps",),
    ),
    Fault(
        "rms-sum-for-mean",
        "norm",
        function("rms", lambda o, x, eps: oracle.l2(x, eps)),
        ("attn_norm", "norm"),
        NORM,
        ("sum-for-mean", "missing-scale"),
    ),
    Fault(
        "layer-norm",
        "norm",
        function("rms", lambda o, x, eps: o(x - x.mean(-1, keepdims=True), eps)),
        ("attn_norm", "norm"),
        NORM,
        ("layer-norm",),
    ),
    Fault(
        "q-norm-skipped",
        "norm",
        tap("Qcur_normed" + ANY, lambda x, get: get("Qcur_reshaped")),
        ("Qcur_normed",),
        QKN,
        ("missing-norm",),
    ),
    Fault(
        "q-norm-weight-skipped",
        "norm",
        weights("attn_q_norm", lambda w, *_: 0 * w + 1),
        ("Qcur_normed",),
        QKN,
        ("missing-norm-weight", "norm-weight"),
    ),
    Fault(
        "qk-norm-weights-swapped",
        "norm",
        weights(
            "attn_[qk]_norm",
            lambda w, n, all_: all_[
                n.replace("q_norm", "X").replace("k_norm", "q_norm").replace("X", "k_norm")
            ],
        ),
        ("Qcur_normed", "Kcur_normed"),
        QKN,
        ("wrong-weight", "norm-weight"),
    ),
    Fault(
        "k-norm-offset-missing",
        "norm",
        weights("attn_k_norm", lambda w, *_: w - 1),
        ("Kcur_normed",),
        QKN,
        ("missing-norm-offset", "norm-weight"),
    ),
    Fault(
        "one-layer-norm-of-the-next",
        "norm",
        weights(_one(1, "attn_norm"), lambda w, n, all_: all_["blk.2.attn_norm.weight"]),
        ("attn_norm",),
        NORM,
        ("wrong-weight", "norm-weight"),
        "one",
    ),
    Fault(
        "norm-weights-bf16",
        "norm",
        weights(_NORMS, lambda w, *_: 1 + bf16(w - 1)),
        ("attn_norm",),
        NORM,
        ("offset-precision", "weight-precision", "norm-weight"),
    ),
    # --- delta net
    Fault(
        "key-heads-repeated",
        "ssm",
        function("key_head", lambda o, v, k, n: v // (n // k)),
        ("new_state", "attn_output"),
        SSM,
        ("head-permutation",),
    ),
    Fault(
        "query-scale-missing",
        "ssm",
        function("query_scale", lambda o, D: 1.0),
        ("attn_output",),
        SSM,
        ("missing-scale",),
    ),
    Fault(
        "query-scale-twice",
        "ssm",
        function("query_scale", lambda o, D: 1 / D),
        ("attn_output",),
        SSM,
        ("double-scale", "missing-scale"),
    ),
    Fault(
        "l2-mean-form",
        "ssm",
        function("l2", lambda o, x, eps: oracle.rms(x, eps)),
        ("q_conv_predelta", "k_conv_predelta"),
        SSM,
        ("sum-for-mean", "missing-scale"),
        tokens=12,
    ),
    Fault(
        "l2-eps",
        "ssm",
        function("l2", lambda o, x, eps: o(x, 1e-3)),
        ("q_conv_predelta", "k_conv_predelta"),
        SSM,
        ("eps",),
    ),
    Fault(
        "key-norm-missing",
        "ssm",
        tap("k_conv_predelta" + ANY, lambda x, get: get("k_conv")),
        ("k_conv_predelta",),
        SSM,
        ("missing-norm",),
        tokens=6,
    ),
    Fault(
        "beta-sigmoid-missing",
        "ssm",
        tap("beta_sigmoid" + ANY, lambda x, get: get("beta")),
        ("beta_sigmoid",),
        SSM,
        ("missing-sigmoid",),
        tokens=20,
    ),
    Fault(
        "beta-doubled",
        "ssm",
        tap("beta_sigmoid" + ANY, lambda x, get: 2 * x),
        ("beta_sigmoid",),
        SSM,
        ("missing-scale", "twice-sigmoid", "gain"),
    ),
    Fault(
        "beta-ignored",
        "ssm",
        delta(lambda s, q, k, v, g, b: delta_step(s, q, k, v, g, 0 * b + 1)),
        ("new_state", "attn_output"),
        SSM,
        ("missing-beta",),
    ),
    Fault(
        "beta-squared",
        "ssm",
        delta(lambda s, q, k, v, g, b: delta_step(s, q, k, v, g, b * b)),
        ("new_state", "attn_output"),
        SSM,
        ("double-beta",),
    ),
    Fault(
        "dt-bias-missing",
        "ssm",
        weights(r"ssm_dt\.bias", lambda w, *_: 0 * w),
        ("a_softplus",),
        SSM,
        ("missing-bias",),
    ),
    Fault(
        "dt-bias-twice",
        "ssm",
        weights(r"ssm_dt\.bias", lambda w, *_: 2 * w),
        ("a_softplus",),
        SSM,
        ("double-bias", "missing-bias"),
    ),
    Fault(
        "softplus-relu",
        "ssm",
        function("softplus", lambda o, x: np.maximum(x, 0)),
        ("a_softplus",),
        SSM,
        ("relu-for-softplus",),
    ),
    Fault(
        "softplus-missing",
        "ssm",
        function("softplus", lambda o, x: x),
        ("a_softplus",),
        SSM,
        ("missing-softplus",),
        tokens=9,
    ),
    Fault(
        "a-log-used-raw",
        "ssm",
        weights("ssm_a$", lambda w, *_: -np.abs(np.log(-w))),
        ("gate",),
        SSM,
        ("decay", "head-gain", "channel-gain"),
    ),
    Fault(
        "a-exponentiated-again",
        "ssm",
        weights("ssm_a$", lambda w, *_: -np.exp(w)),
        ("gate",),
        SSM,
        ("decay", "head-gain", "channel-gain"),
    ),
    Fault(
        "decay-none",
        "ssm",
        delta(step(decay=lambda g: 0 * g + 1)),
        ("new_state", "attn_output"),
        SSM,
        ("decay",),
    ),
    Fault(
        "decay-after-update",
        "ssm",
        delta(step(late_decay=True)),
        ("new_state", "attn_output"),
        SSM,
        ("decay",),
    ),
    Fault(
        "decay-twice",
        "ssm",
        delta(step(decay=lambda g: np.exp(2 * g))),
        ("new_state", "attn_output"),
        SSM,
        ("decay",),
    ),
    Fault(
        "correction-missing",
        "ssm",
        delta(step(correct=False)),
        ("new_state", "attn_output"),
        SSM,
        ("missing-correction",),
    ),
    Fault(
        "output-before-update", "ssm", delta(step(read_first=True)), ("attn_output",), SSM, ("update-order",)
    ),
    Fault(
        "state-bf16", "ssm", delta(delta_step, bf16), ("new_state", "attn_output"), SSM, ("state-precision",)
    ),
    Fault(
        "state-f16", "ssm", delta(delta_step, f16), ("new_state", "attn_output"), SSM, ("state-precision",)
    ),
    Fault(
        "state-lost-at-chunks",
        "state",
        delta(delta_step, boundary=lambda s: 0 * s),
        ("new_state", "attn_output"),
        SSM,
        ("chunk-boundary",),
        tokens=90,
    ),
    Fault(
        "state-transposed-at-chunks",
        "state",
        delta(delta_step, boundary=lambda s: s.transpose(0, 2, 1)),
        ("new_state", "attn_output"),
        SSM,
        ("chunk-boundary", "state-transposed"),
        tokens=90,
    ),
    Fault(
        "conv-reversed",
        "ssm",
        function("causal_conv", lambda o, p, k: o(p, k[:, ::-1])),
        ("conv_output_raw",),
        SSM,
        ("conv-reversed",),
    ),
    Fault(
        "conv-late",
        "ssm",
        function("causal_conv", lambda o, p, k: o(np.concatenate([0 * p[:1], p[:-1]]), k)),
        ("conv_output_raw",),
        SSM,
        ("token-shift",),
    ),
    Fault(
        "conv-first-tap-lost",
        "ssm",
        function("causal_conv", lambda o, p, k: o(p, np.concatenate([0 * k[:, :1], k[:, 1:]], 1))),
        ("conv_output_raw",),
        SSM,
        ("conv-width",),
    ),
    Fault(
        "conv-silu-missing",
        "ssm",
        tap("conv_output_silu" + ANY, lambda x, get: get("conv_output_raw")),
        ("conv_output_silu",),
        SSM,
        ("missing-silu",),
    ),
    Fault(
        "conv-gelu",
        "ssm",
        tap("conv_output_silu" + ANY, lambda x, get: gelu(get("conv_output_raw"))),
        ("conv_output_silu",),
        SSM,
        ("gelu-for-silu",),
    ),
    Fault(
        "gated-norm-no-silu",
        "ssm",
        function("gated_norm", lambda o, x, w, z, eps: oracle.rms(x, eps) * w * z),
        ("final_output",),
        SSM,
        ("missing-silu",),
    ),
    Fault(
        "gated-norm-sigmoid",
        "ssm",
        function("gated_norm", lambda o, x, w, z, eps: oracle.rms(x, eps) * w * oracle.sigmoid(z)),
        ("final_output",),
        SSM,
        ("sigmoid-for-silu",),
    ),
    Fault(
        "gate-before-norm",
        "ssm",
        function("gated_norm", lambda o, x, w, z, eps: oracle.rms(x * oracle.silu(z), eps) * w),
        ("final_output",),
        SSM,
        ("norm-order",),
    ),
    Fault(
        "gated-norm-offset",
        "ssm",
        function("gated_norm", lambda o, x, w, z, eps: o(x, w + 1, z, eps)),
        ("final_output",),
        ("ssm", "norm"),
        ("double-norm-offset",),
    ),
    Fault(
        "gated-norm-over-all-heads",
        "ssm",
        function(
            "gated_norm",
            lambda o, x, w, z, eps: (
                oracle.rms(x.reshape(len(x), -1), eps).reshape(x.shape) * w * oracle.silu(z)
            ),
        ),
        ("final_output",),
        SSM,
        ("norm-axis",),
    ),
    Fault(
        "alpha-beta-swapped",
        "ssm",
        weights(
            r"ssm_(alpha|beta)\.weight",
            lambda w, n, all_: all_[n.replace("alpha", "X").replace("beta", "alpha").replace("X", "beta")],
        ),
        ("alpha", "beta"),
        SSM,
        ("wrong-weight",),
    ),
    Fault(
        "z-heads-grouped",
        "ssm",
        weights(r"attn_gate\.weight", lambda w, *_: tiled_to_grouped(w, 0, changes.KEYS, changes.DIM)),
        ("z",),
        SSM,
        ("head-permutation",),
    ),
    Fault(
        "out-columns-grouped",
        "ssm",
        weights(r"ssm_out\.weight", lambda w, *_: tiled_to_grouped(w, 1, changes.KEYS, changes.DIM)),
        ("linear_attn_out",),
        SSM,
        ("head-permutation",),
    ),
    Fault(
        "decay-heads-grouped",
        "ssm",
        weights(r"ssm_a$|ssm_dt\.bias", lambda w, *_: tiled_to_grouped(w, 0, changes.KEYS, 1)),
        ("a_softplus", "gate"),
        SSM,
        ("head-permutation", "missing-bias", "head-gain", "channel-gain"),
    ),
    Fault(
        "one-head-zero",
        "ssm",
        tap("final_output-0", lambda x, get: x * (np.arange(x.shape[1]) // changes.DIM != 2)),
        ("final_output",),
        SSM,
        ("zeros",),
        "one",
    ),
    Fault(
        "conv-state-tail",
        "state",
        tap("conv_output_raw" + ANY, lambda x, get: np.concatenate([x[:64], x[64:] * 0.5])),
        ("conv_output_raw",),
        SSM,
        ("chunk-boundary", "late-tokens", "token-gain"),
        tokens=90,
    ),
    # --- attention
    Fault(
        "kv-heads-tiled",
        "attention",
        function("kv_head", lambda o, q, n, k: q % k),
        ("kq", "attn_pregate"),
        ATT,
        ("head-permutation",),
    ),
    Fault(
        "gate-flat",
        "attention",
        function("query_and_gate", _flat_split),
        ("Qcur_reshaped", "gate_reshaped"),
        ATT,
        ("gate-layout",),
    ),
    Fault(
        "gate-swapped",
        "attention",
        function("query_and_gate", lambda o, u: o(u)[::-1]),
        ("Qcur_reshaped", "gate_reshaped"),
        ATT,
        ("gate-layout",),
    ),
    Fault(
        "gate-sigmoid-missing",
        "attention",
        tap("gate_sigmoid" + ANY, lambda x, get: get("gate_reshaped")),
        ("gate_sigmoid",),
        ATT,
        ("missing-sigmoid",),
    ),
    Fault(
        "gate-silu",
        "attention",
        tap("gate_sigmoid" + ANY, lambda x, get: x * get("gate_reshaped")),
        ("gate_sigmoid",),
        ATT,
        ("silu-for-sigmoid",),
    ),
    Fault(
        "gate-ignored",
        "attention",
        tap("attn_gated" + ANY, lambda x, get: get("attn_pregate")),
        ("attn_gated",),
        ATT,
        ("missing-gate",),
    ),
    Fault(
        "attention-scale-missing",
        "attention",
        softmax_with(lambda s: s * changes.HEAD**0.5),
        ("kq_soft_max",),
        ATT,
        ("missing-scale",),
    ),
    Fault(
        "attention-scale-twice",
        "attention",
        softmax_with(lambda s: s / changes.HEAD**0.5),
        ("kq_soft_max",),
        ATT,
        ("double-scale",),
    ),
    Fault(
        "mask-missing",
        "attention",
        softmax_with(visible=lambda t, s: (s >= 0) & (t >= 0)),
        ("kq_soft_max",),
        ATT,
        ("mask",),
    ),
    Fault(
        "mask-one-too-few",
        "attention",
        softmax_with(visible=lambda t, s: (s < t) | ((t == 0) & (s == 0))),
        ("kq_soft_max",),
        ATT,
        ("mask",),
    ),
    Fault(
        "window-16",
        "attention",
        softmax_with(visible=lambda t, s: (s <= t) & (s > t - 16)),
        ("kq_soft_max",),
        ATT,
        ("mask",),
    ),
    Fault(
        "soft-cap",
        "attention",
        softmax_with(lambda s: 50 * np.tanh(s / 50)),
        ("kq_soft_max",),
        ATT,
        ("soft-cap",),
    ),
    Fault("rope-pairing", "attention", _rope(_adjacent), ("Qcur", "Kcur"), ATT, ("rope-pairing",)),
    Fault(
        "rope-base",
        "attention",
        _rope(lambda o, x, p, r, s, b: o(x, p, r, s, 1e4)),
        ("Qcur", "Kcur"),
        ATT,
        ("rope-base",),
    ),
    Fault(
        "rope-base-odd",
        "attention",
        _rope(lambda o, x, p, r, s, b: o(x, p, r, s, 25000.0)),
        ("Qcur", "Kcur"),
        ATT,
        ("rope-base",),
    ),
    Fault("rope-whole-head", "attention", _rope(_whole_head), ("Qcur", "Kcur"), ATT, ("rope-partial",)),
    Fault(
        "rope-padded",
        "attention",
        _rope(_padded_tables),
        ("Qcur", "Kcur"),
        ATT,
        ("rope-partial", "rope-pairing"),
    ),
    Fault(
        "rope-half-dims",
        "attention",
        _rope(lambda o, x, p, r, s, b: _neox(x, p[0], r // 2, b)),
        ("Qcur", "Kcur"),
        ATT,
        ("rope-partial",),
    ),
    Fault("rope-missing", "attention", _rope(lambda o, x, *a: x), ("Qcur", "Kcur"), ATT, ("missing-rope",)),
    Fault(
        "rope-backwards",
        "attention",
        _rope(lambda o, x, p, *a: o(x, -p, *a)),
        ("Qcur", "Kcur"),
        ATT,
        ("rope-sign",),
    ),
    Fault(
        "rope-twice",
        "attention",
        _rope(lambda o, x, p, *a: o(x, 2 * p, *a)),
        ("Qcur", "Kcur"),
        ATT,
        ("double-rope", "rope-scale"),
    ),
    Fault(
        "key-positions-from-one",
        "attention",
        tap("Kcur" + ANY, lambda x, get: _turned_on(x, get("Kcur_normed"))),
        ("Kcur",),
        ATT,
        ("position-shift",),
    ),
    Fault(
        "keys-not-rotated",
        "attention",
        tap("Kcur" + ANY, lambda x, get: get("Kcur_normed")),
        ("Kcur",),
        ATT,
        ("missing-rope",),
    ),
    Fault(
        "rope-gain",
        "attention",
        tap("[QK]cur" + ANY, lambda x, get: x * 1.2773),
        ("Qcur", "Kcur"),
        ATT,
        ("gain", "missing-scale"),
    ),
    Fault(
        "values-late",
        "attention",
        tap("Vcur" + ANY, lambda x, get: late(x)),
        ("Vcur",),
        ATT,
        ("token-shift",),
    ),
    Fault(
        "output-columns-permuted",
        "attention",
        weights(r"blk\.\d+\.attn_output\.weight", lambda w, *_: np.roll(w, changes.HEAD, axis=1)),
        ("attn_output",),
        ATT,
        ("head-permutation",),
    ),
    Fault(
        "key-rows-permuted",
        "attention",
        weights(
            r"attn_k\.weight",
            lambda w, *_: w.reshape(-1, 2, changes.HEAD // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape),
        ),
        ("Kcur_normed",),
        ("attention", "norm"),
        ("channel-permutation",),
    ),
    Fault(
        "attention-zero",
        "attention",
        tap("attn_gated" + ANY, lambda x, get: 0 * x),
        ("attn_gated",),
        ATT,
        ("zeros",),
    ),
    # --- feed-forward and residuals
    Fault(
        "gate-up-swapped",
        "ffn",
        tap("ffn_swiglu" + ANY, lambda x, get: oracle.silu(get("ffn_up")) * get("ffn_gate")),
        ("ffn_swiglu",),
        FFN,
        ("swapped-gate-up",),
    ),
    Fault(
        "ffn-silu-missing",
        "ffn",
        tap("ffn_swiglu" + ANY, lambda x, get: get("ffn_up") * get("ffn_gate")),
        ("ffn_swiglu",),
        FFN,
        ("missing-silu",),
    ),
    Fault(
        "ffn-gelu",
        "ffn",
        tap("ffn_swiglu" + ANY, lambda x, get: get("ffn_up") * gelu(get("ffn_gate"))),
        ("ffn_swiglu",),
        FFN,
        ("gelu-for-silu",),
    ),
    Fault(
        "gate-up-weights-swapped",
        "ffn",
        weights(
            r"ffn_(gate|up)\.weight",
            lambda w, n, all_: all_[n.replace("gate", "X").replace("up", "gate").replace("X", "up")],
        ),
        ("ffn_gate", "ffn_up"),
        FFN,
        ("wrong-weight", "swapped-gate-up"),
    ),
    Fault(
        "ffn-reduced-twice",
        "ffn",
        tap("ffn_out" + ANY, lambda x, get: 2 * x),
        ("ffn_out",),
        FFN,
        ("missing-scale", "gain"),
    ),
    Fault("ffn-sign", "ffn", tap("ffn_out-2", lambda x, get: -x), ("ffn_out",), FFN, ("sign",), "one"),
    Fault(
        "ffn-clipped",
        "ffn",
        tap("ffn_swiglu" + ANY, lambda x, get: np.clip(x, -0.5, 0.5)),
        ("ffn_swiglu",),
        FFN,
        ("saturation",),
    ),
    Fault(
        "residual-missing",
        "ffn",
        tap("l_out-1", lambda x, get: get("ffn_out")),
        ("l_out",),
        FFN,
        ("missing-residual",),
        "one",
    ),
    Fault(
        "residual-after-norm",
        "ffn",
        tap("l_out" + ANY, lambda x, get: get("attn_post_norm") + get("ffn_out")),
        ("l_out",),
        FFN,
        ("residual-source",),
    ),
    Fault(
        "mixer-residual-missing",
        "ffn",
        tap("attn_residual-0", lambda x, get: get("linear_attn_out")),
        ("attn_residual",),
        SSM,
        ("missing-residual",),
        "one",
    ),
    Fault(
        "down-bias",
        "ffn",
        tap("ffn_out" + ANY, lambda x, get: x + 0.1 * np.cos(np.arange(x.shape[1]))),
        ("ffn_out",),
        FFN,
        ("missing-bias",),
    ),
    Fault(
        "ffn-f16",
        "ffn",
        tap("ffn_out" + ANY, lambda x, get: f16(x)),
        ("ffn_out",),
        FFN,
        ("output-precision",),
    ),
    Fault(
        "tile-tail",
        "ffn",
        tap("ffn_up-3", lambda x, get: np.concatenate([x[:, :-8], 0 * x[:, -8:]], 1)),
        ("ffn_up",),
        FFN,
        ("zeros", "channel-range"),
        "one",
    ),
    Fault(
        "nan",
        "ffn",
        tap("ffn_gate-2", lambda x, get: np.where(np.arange(len(x))[:, None] == 5, np.nan, x)),
        ("ffn_gate",),
        FFN,
        ("nan",),
        "one",
    ),
    # --- ends
    Fault(
        "embedding-scaled",
        "embedding",
        tap("model.input_embed", lambda x, get: x * x.shape[1] ** 0.5),
        ("model.input_embed",),
        ("embedding",),
        ("missing-scale", "gain", "embedding-scale"),
        "one",
    ),
    Fault(
        "embedding-next-token",
        "embedding",
        weights("token_embd", lambda w, *_: np.roll(w, -1, axis=0)),
        ("model.input_embed",),
        ("embedding",),
        ("token-offset",),
        "one",
    ),
    Fault(
        "head-transposed-order",
        "head",
        weights(r"^output\.weight", lambda w, *_: w[::-1]),
        ("result_output",),
        ("head",),
        ("channel-permutation",),
        "one",
    ),
    Fault(
        "head-tied",
        "head",
        weights(r"^output\.weight", lambda w, n, all_: all_["token_embd.weight"]),
        ("result_output",),
        ("head",),
        ("tied-head", "wrong-weight"),
        "one",
    ),
    Fault(
        "head-capped",
        "head",
        tap("result_output", lambda x, get: 30 * np.tanh(x / 30)),
        ("result_output",),
        ("head",),
        ("soft-cap",),
        "one",
    ),
]
