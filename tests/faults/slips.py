"""A third collection: slips of those who write an engine, made without a look at how the analyzer names them.

Where `ports.py` is about parts, this is more about how kernels are built: chunks and their solves, caches in few
bits, shards whose sums were not added, tiles, tables, operands. Expected names are those that a person would use.
"""

from __future__ import annotations

import numpy as np
import oracle
from faults import changes, kernels
from faults.changes import (
    ANY,
    Fault,
    Place,
    attention_only,
    bf16,
    delta,
    delta_step,
    f16,
    function,
    gelu,
    inputs,
    late,
    on_operands,
    step,
    tap,
    told,
    weights,
)

_FFN = ("ffn", "moe")  # one class or the other, by the model
_ATTN_NORM = Place("norm", ("attn_norm",))
_POST_NORM = Place("norm", ("attn_post_norm",))
_LAST_NORM = Place("norm", ("result_norm", "h_nextn", "norm"))
_QUERY_NORM = Place("norm", ("Qcur_normed",), ("norm", "attention"))
_KEY_NORM = Place("norm", ("Kcur_normed",), ("norm", "attention"))
_CONV = Place("ssm", ("conv_output_raw",))
_CONV_SILU = Place("ssm", ("conv_output_silu",))
_L2 = Place("ssm", ("q_conv_predelta", "k_conv_predelta"))
_RATE = Place("ssm", ("a_softplus",))
_DECAY = Place("ssm", ("gate",))
_DELTA = Place("ssm", ("new_state", "attn_output"))
_STATE = Place("state", ("new_state", "attn_output"), ("ssm",))
_CONV_STATE = Place("state", ("conv_output_raw",), ("ssm",))
_GATED_NORM = Place("ssm", ("final_output",), ("ssm", "norm"))
_SSM_OUT = Place("ssm", ("linear_attn_out",))
_MIXED_IN = Place("ssm", ("attn_residual",))
_SCORES = Place("attention", ("kq",))
_SOFTMAX = Place("attention", ("kq_soft_max",))
_MIX = Place("attention", ("kqv",))
_ROPE = Place("attention", ("Qcur", "Kcur"))
_VALUES = Place("attention", ("Vcur",))
_GATE = Place("attention", ("gate_reshaped",))
_GATE_SIGMOID = Place("attention", ("gate_sigmoid",))
_OUT = Place("attention", ("attn_output",))
_FFN_IN = Place("ffn", ("ffn_gate", "ffn_up"), _FFN)
_SWIGLU = Place("ffn", ("ffn_swiglu",), _FFN)
_DOWN = Place("ffn", ("ffn_out",), _FFN)
_STREAM = Place("ffn", ("l_out",), _FFN)
_EMBED = Place("embedding", ("model.input_embed",))
_HEAD = Place("head", ("result_output",))


SLIPS: list[Fault] = [
    # --- norms
    _KEY_NORM(
        "key-norm-of-the-queries",
        weights("attn_k_norm", kernels.of("k_norm", "q_norm")),
        "wrong-weight",
        "norm-weight",
    ),
    _QUERY_NORM(
        "query-norm-over-all-heads",
        tap(
            "Qcur_normed" + ANY,
            lambda x, get: (
                x
                * np.sqrt(np.mean(get("Qcur_reshaped") ** 2, axis=2, keepdims=True))
                / np.sqrt(np.mean(get("Qcur_reshaped") ** 2, axis=(1, 2), keepdims=True))
            ),
        ),
        "norm-axis",
    ),
    _KEY_NORM(
        "key-norm-eps-1e-1",
        tap(
            "Kcur_normed" + ANY,
            lambda x, get: (
                x / np.sqrt(1 + 0.1 * np.mean((x / np.sqrt(np.mean(x**2))) ** 2, -1, keepdims=True))
            ),
        ),
        *("eps", "token-gain", "gain", "head-gain"),
    ),
    _ATTN_NORM(
        "rms-squares-in-few-bits",
        function(
            "rms", lambda o, x, e: x / np.sqrt(kernels.significant(np.mean(x * x, -1, keepdims=True), 6) + e)
        ),
        *("token-gain", "output-precision", "norm-precision", "approximation"),
    ),
    _POST_NORM(
        "post-norm-with-the-first-norms-weight",
        weights("post_attention_norm", kernels.of("post_attention_norm", "attn_norm")),
        *("wrong-weight", "norm-weight"),
    ),
    _LAST_NORM(
        "last-norm-left-out",
        told(lambda m: tap("norm", lambda x, get: get(f"l_out-{m.trunk_layers - 1}"))),
        "missing-norm",
        layers="one",
    ),
    _LAST_NORM(
        "last-norm-twice",
        weights("output_norm", lambda w, *_: w * w),
        *("double-norm", "double-norm-weight", "norm-weight", "channel-gain"),
        layers="one",
    ),
    _ATTN_NORM("first-norm-in-bf16", tap("attn_norm" + ANY, lambda x, get: bf16(x)), "output-precision"),
    _ATTN_NORM(
        "norm-weights-absolute",
        weights(r"attn_norm\.weight", lambda w, *_: np.where(np.arange(len(w)) % 3 == 0, -w, w)),
        *("norm-weight", "channel-gain", "sign"),
    ),
    # --- the convolution
    _CONV(
        "conv-without-the-present",
        function("causal_conv", lambda o, p, k: o(p, np.concatenate([k[:, :-1], 0 * k[:, -1:]], 1))),
        *("conv-width", "conv-kernel"),
    ),
    _CONV(
        "conv-kernel-read-transposed",
        weights("ssm_conv1d", lambda w, *_: w.reshape(w.shape[::-1]).T),
        *("conv-kernel", "weight-layout", "wrong-weight"),
    ),
    _CONV(
        "silu-before-the-conv",
        function("causal_conv", lambda o, p, k: o(oracle.silu(p), k)),
        *("activation-order", "extra-silu", "silu-before-conv", "double-silu", "norm-order"),
    ),
    _CONV(
        "conv-looks-ahead",
        function("causal_conv", lambda o, p, k: o(np.concatenate([p[1:], 0 * p[:1]]), k)),
        *("token-shift",),
    ),
    _CONV_SILU(
        "conv-silu-twice", tap("conv_output_silu" + ANY, lambda x, get: oracle.silu(x)), "double-silu"
    ),
    _CONV_STATE(
        "conv-history-one-column-short",
        kernels.carried(lambda rows: np.concatenate([0 * rows[:1], rows[1:]])),
        *("chunk-boundary", "conv-state"),
    ),
    _CONV_STATE(
        "conv-history-of-the-first-chunk",
        kernels.carried(lambda rows: rows * 0 + rows.mean(axis=0)),
        *("chunk-boundary", "conv-state"),
    ),
    # --- the delta net's operands
    _L2(
        "l2-over-all-heads",
        function("l2", lambda o, x, e: x / np.sqrt(np.sum(x * x, axis=(1, 2), keepdims=True) + e)),
        "norm-axis",
    ),
    _L2(
        "l2-not-on-the-last-head",
        tap("k_conv_predelta" + ANY, lambda x, get: np.concatenate([x[:, :-1], get("k_conv")[:, -1:]], 1)),
        *("missing-norm", "head-gain", "some-heads"),
        tokens=20,
    ),
    _L2(
        "l2-eps-outside-the-root",
        function("l2", lambda o, x, e: x / (np.sqrt(np.sum(x * x, -1, keepdims=True)) + 0.05)),
        *("eps", "token-gain"),
    ),
    _DELTA(
        "keys-scaled-too",
        on_operands(lambda q, k, v, g, b: (q, k * k.shape[-1] ** -0.5, v, g, b)),
        "missing-scale",
        "double-scale",
        "key-scale",
    ),
    _DELTA(
        "beta-one-token-late",
        on_operands(lambda q, k, v, g, b: (q, k, v, g, late(b))),
        "token-shift",
        "beta-order",
        "missing-beta",
    ),
    _DELTA("values-one-token-late", on_operands(lambda q, k, v, g, b: (q, k, late(v), g, b)), "token-shift"),
    _DELTA(
        "decay-one-token-late",
        on_operands(lambda q, k, v, g, b: (q, k, v, late(g), b)),
        "decay",
        "token-shift",
    ),
    _DELTA("decay-base-two", on_operands(lambda q, k, v, g, b: (q, k, v, g * np.log(2), b)), "decay"),
    _DELTA(
        "decay-factor-in-bf16",
        delta(step(decay=lambda g: bf16(np.exp(g)))),
        "decay",
        "state-precision",
        "decay-precision",
    ),
    _DELTA(
        "decay-averaged-over-heads",
        on_operands(lambda q, k, v, g, b: (q, k, v, 0 * g + g.mean(1, keepdims=True), b)),
        "decay",
    ),
    _DELTA(
        "beta-averaged-over-heads",
        on_operands(lambda q, k, v, g, b: (q, k, v, g, 0 * b + b.mean(1, keepdims=True))),
        "missing-beta",
        "head-permutation",
        "beta-heads",
        "one-for-all-heads",
    ),
    _DELTA(
        "keys-in-bf16",
        on_operands(lambda q, k, v, g, b: (q, bf16(k), v, g, b)),
        "input-precision",
        "state-precision",
    ),
    _DELTA(
        "queries-and-keys-exchanged",
        on_operands(lambda q, k, v, g, b: (k * k.shape[-1] ** -0.5, q * q.shape[-1] ** 0.5, v, g, b)),
        "swapped-q-k",
    ),
    # --- its chunks and state
    _STATE(
        "solve-truncated",
        kernels.chunked(solve=kernels.truncated),
        "chunk-solve",
        "chunk-boundary",
        "missing-correction",
        "approximation",
    ),
    _STATE(
        "solve-left-out",
        kernels.chunked(solve=lambda a, b: b),
        "chunk-solve",
        "chunk-boundary",
        "missing-correction",
    ),
    _STATE(
        "start-state-not-decayed-in-the-chunk", kernels.chunked(start_decays=False), "decay", "chunk-boundary"
    ),
    _STATE(
        "decay-sums-in-f16",
        kernels.chunked(64, sums=lambda g: f16(np.cumsum(g, axis=0))),
        "decay",
        "state-precision",
        "decay-precision",
        "output-precision",
    ),
    _STATE(
        "chunk-mask-without-the-diagonal",
        kernels.chunked(scores=lambda s: s * (1 - np.eye(s.shape[-1]))),
        "update-order",
        "mask",
        "chunk-mask",
    ),
    _STATE(
        "carry-one-chunk-behind",
        kernels.chunked(32, carry=lambda after, before: before),
        "chunk-boundary",
        "stale-state",
    ),
    _STATE(
        "carry-of-the-next-head",
        kernels.chunked(32, carry=lambda after, before: np.roll(after, 1, axis=0)),
        "chunk-boundary",
        "head-permutation",
    ),
    _STATE(
        "carry-in-eight-bits",
        kernels.chunked(32, carry=lambda after, before: kernels.int8(after)),
        "chunk-boundary",
        "state-precision",
    ),
    _STATE("state-in-fp8", delta(delta_step, lambda s: kernels.significant(s, 4)), "state-precision"),
    # --- gates and decay
    _RATE(
        "dt-bias-of-the-next-head",
        weights(r"ssm_dt\.bias", lambda w, *_: np.roll(w, 1)),
        "head-permutation",
        "missing-bias",
        "channel-permutation",
        "wrong-weight",
        "bias-permutation",
    ),
    _RATE(
        "sigmoid-for-softplus", function("softplus", lambda o, x: oracle.sigmoid(x)), "sigmoid-for-softplus"
    ),
    _RATE("dt-bias-subtracted", weights(r"ssm_dt\.bias", lambda w, *_: -w), "bias-sign", "missing-bias"),
    _DECAY(
        "decay-of-another-layer",
        weights(r"blk\.1\.ssm_a$", kernels.of("blk.1.", "blk.0.")),
        "wrong-weight",
        "decay",
        "head-gain",
        "channel-gain",
        layers="one",
    ),
    _DECAY(
        "decay-not-negative",
        weights("ssm_a$", lambda w, *_: -w),
        "sign",
        "decay",
        "missing-negative",
        tokens=6,
    ),
    _DECAY(
        "decay-all-heads-alike",
        weights("ssm_a$", lambda w, *_: 0 * w + w.mean()),
        "decay",
        "head-gain",
        "channel-gain",
    ),
    # --- the gated norm and what leaves the mixer
    _GATED_NORM(
        "gated-norm-weight-left-out",
        weights("ssm_norm", lambda w, *_: 0 * w + 1),
        "missing-norm-weight",
        "norm-weight",
    ),
    _GATED_NORM(
        "gated-norm-weight-reversed",
        weights("ssm_norm", lambda w, *_: w[::-1]),
        "norm-weight",
        "wrong-weight",
        "channel-permutation",
        "weight-layout",
    ),
    _GATED_NORM(
        "gated-norm-centred",
        function("gated_norm", lambda o, x, w, z, e: o(x - x.mean(-1, keepdims=True), w, z, e)),
        "layer-norm",
    ),
    _GATED_NORM(
        "gate-and-value-exchanged",
        function("gated_norm", lambda o, x, w, z, e: o(z, w, x, e)),
        "swapped-gate",
        "wrong-tap",
        "norm-order",
        "swapped-gate-up",
        "swapped-inputs",
    ),
    _GATED_NORM(
        "gated-norm-gate-normed-too",
        function("gated_norm", lambda o, x, w, z, e: o(x, w, oracle.rms(z, e), e)),
        "gate-normed",
        "norm-order",
        "token-gain",
        "extra-norm",
    ),
    _GATED_NORM(
        "gate-left-out", function("gated_norm", lambda o, x, w, z, e: oracle.rms(x, e) * w), "missing-gate"
    ),
    _SSM_OUT(
        "mixer-sum-of-one-shard",
        weights(r"ssm_out\.weight", inputs(kernels.half_the_inputs)),
        "missing-inputs",
        "partial-sum",
    ),
    _SSM_OUT(
        "mixer-reduced-twice", tap("linear_attn_out" + ANY, lambda x, get: 2 * x), "gain", "missing-scale"
    ),
    _SSM_OUT(
        "mixer-odd-token-stale",
        tap("linear_attn_out" + ANY, kernels.stale_last),
        "stale-row",
        "some-tokens",
        "token-shift",
        "late-tokens",
        tokens=41,
    ),
    _SSM_OUT(
        "mixer-out-eight-bit-inputs",
        kernels.input_of("ssm_out", kernels.int8),
        "input-precision",
        "output-precision",
        "low-precision",
    ),
    _MIXED_IN(
        "mixer-added-to-the-norm",
        tap("attn_residual-0", lambda x, get: get("attn_norm") + get("linear_attn_out")),
        "residual-source",
        "wrong-tap",
        layers="one",
    ),
    _MIXED_IN(
        "mixer-branch-halved",
        tap("attn_residual-0", lambda x, get: x - 0.5 * get("linear_attn_out")),
        "residual-scale",
        "branch-gain",
        "missing-branch",
        "gain",
        layers="one",
    ),
    _MIXED_IN(
        "mixer-branch-lost",
        tap("attn_residual-0", lambda x, get: x - get("linear_attn_out")),
        "missing-branch",
        layers="one",
    ),
    # --- attention
    _VALUES(
        "value-bias",
        tap(
            "Vcur" + ANY,
            lambda x, get: x + 0.2 * np.sin(np.arange(x.shape[1] * x.shape[2])).reshape(x.shape[1:]),
        ),
        "missing-bias",
    ),
    _KEY_NORM(
        "key-heads-in-reverse",
        weights(
            r"attn_k\.weight", lambda w, *_: w.reshape(-1, changes.HEAD, w.shape[1])[::-1].reshape(w.shape)
        ),
        "head-permutation",
        "channel-permutation",
    ),
    _GATE(
        "gate-of-the-next-head",
        tap("gate_reshaped" + ANY, lambda x, get: np.roll(x, changes.HEAD, axis=1)),
        "head-permutation",
        "gate-layout",
        "channel-permutation",
    ),
    _GATE_SIGMOID(
        "gate-hard-sigmoid",
        tap("gate_sigmoid" + ANY, lambda x, get: np.clip(get("gate_reshaped") / 6 + 0.5, 0, 1)),
        "hard-sigmoid-for-sigmoid",
        "approximation",
    ),
    _GATE_SIGMOID(
        "gate-tanh",
        tap("gate_sigmoid" + ANY, lambda x, get: np.tanh(get("gate_reshaped"))),
        "tanh-for-sigmoid",
    ),
    _GATE_SIGMOID(
        "gate-softsign",
        tap(
            "gate_sigmoid" + ANY,
            lambda x, get: 0.5 + 0.5 * get("gate_reshaped") / (1 + np.abs(get("gate_reshaped"))),
        ),
        "softsign-for-sigmoid",
        "approximation",
        "activation",
    ),
    _GATE_SIGMOID(
        "gate-sigmoid-twice",
        tap("gate_sigmoid" + ANY, lambda x, get: oracle.sigmoid(x)),
        "twice-sigmoid",
        "double-sigmoid",
    ),
    _ROPE("query-rotated-before-its-norm", told(kernels.rope_before_norm), "norm-order", "rope-order"),
    _ROPE(
        "rope-tables-in-bf16",
        function("rope", kernels.coarse_tables),
        "rope-precision",
        "output-precision",
        "rope-angle",
    ),
    _ROPE(
        "positions-divided-by-four", function("rope", lambda o, x, p, *rest: o(x, p / 4, *rest)), "rope-scale"
    ),
    _ROPE(
        "rope-two-dims-less",
        function("rope", lambda o, x, p, r, *rest: o(x, p, r - 2, *rest)),
        "rope-partial",
        "rope-dims",
    ),
    _ROPE("queries-one-position-back", kernels.turned("Q", lambda t: t - 1), "position-shift"),
    _ROPE(
        "keys-at-position-zero",
        kernels.turned("K", lambda t: 0 * t + 7),
        "missing-rope",
        "position-shift",
        "position-reset",
        "stale-position",
    ),
    _ROPE(
        "rope-frequencies-from-one",
        function("rope", lambda o, x, p, r, s, b: o(x, p * b ** (-2 / r), r, s, b)),
        "rope-scale",
        "rope-frequencies",
        "rope-base",
    ),
    _SCORES(
        "key-cache-in-eight-bits",
        kernels.reread(kernels.int8)[0],
        "kv-cache",
        "kv-precision",
        "input-precision",
        "output-precision",
    ),
    _SCORES("key-cache-a-ring-of-64", tap("kq" + ANY, kernels.wrapped), "kv-cache", "stale-row", tokens=100),
    _SOFTMAX(
        "second-chunk-blind-to-the-first",
        kernels.seen(lambda t, n, s: (s <= t) & (s // 32 == t // 32)),
        "mask",
        "chunk-boundary",
    ),
    _SOFTMAX(
        "one-head-with-a-window", kernels.seen(lambda t, n, s: (s <= t) & ((s > t - 16) | (n != 1))), "mask"
    ),
    _SOFTMAX("chunk-sees-all-of-itself", kernels.seen(lambda t, n, s: s // 8 <= t // 8), "mask"),
    _SOFTMAX(
        "probabilities-in-bf16",
        tap("kq_soft_max" + ANY, lambda x, get: bf16(x)),
        "output-precision",
    ),
    _SOFTMAX(
        "softmax-quick-exp",
        function(
            "causal_softmax",
            lambda o, s: (lambda e: e / e.sum(-1, keepdims=True))(
                np.where(
                    np.arange(len(s)) <= np.arange(len(s))[:, None, None],
                    kernels.quick_exp(s - s.max(-1, keepdims=True)),
                    0,
                )
            ),
        ),
        "approximation",
        "output-precision",
    ),
    _MIX(
        "value-cache-in-fp8",
        kernels.reread(lambda v: kernels.significant(v, 4))[1],
        "kv-cache",
        "kv-precision",
        "input-precision",
        "output-precision",
    ),
    _MIX("values-of-another-head", tap("kqv" + ANY, kernels.mixed_with_other_heads), "head-permutation"),
    _OUT(
        "attention-sum-of-one-shard",
        weights(r"attn_output\.weight", inputs(kernels.half_the_inputs)),
        "missing-inputs",
        "partial-sum",
    ),
    _OUT(
        "attention-odd-token-stale",
        tap("attn_output" + ANY, attention_only(kernels.stale_last)),
        "stale-row",
        "some-tokens",
        "token-shift",
        "late-tokens",
        tokens=41,
    ),
    # --- the feed-forward network and the stream
    _FFN_IN(
        "up-of-the-layer-before",
        weights(r"blk\.2\.ffn_up\.weight", kernels.of("blk.2.", "blk.1.")),
        "wrong-weight",
        layers="one",
    ),
    _FFN_IN(
        "up-shards-interleaved",
        weights(r"ffn_up\.weight", inputs(kernels.shards_interleaved)),
        "channel-permutation",
        "weight-layout",
    ),
    _FFN_IN(
        "gate-every-eighth-input-negative",
        weights(r"ffn_gate\.weight", inputs(kernels.every_eighth_negative)),
        "input-gain",
        "input-sign",
        "sign",
        "channel-period",
    ),
    _FFN_IN(
        "up-eight-bit-inputs",
        function(
            "ffn_half",
            lambda o, m, stem, h, *rest: o(m, stem, kernels.int8(h) if stem == "ffn_up" else h, *rest),
        ),
        "input-precision",
        "output-precision",
        "low-precision",
    ),
    _SWIGLU(
        "ffn-relu",
        tap("ffn_swiglu" + ANY, lambda x, get: np.maximum(get("ffn_gate"), 0) * get("ffn_up")),
        "relu-for-silu",
    ),
    _SWIGLU(
        "up-plus-one", tap("ffn_swiglu" + ANY, lambda x, get: x + oracle.silu(get("ffn_gate"))), "up-offset"
    ),
    _SWIGLU(
        "ffn-sigmoid",
        tap("ffn_swiglu" + ANY, lambda x, get: oracle.sigmoid(get("ffn_gate")) * get("ffn_up")),
        "sigmoid-for-silu",
    ),
    _SWIGLU(
        "silu-quick-exp",
        tap(
            "ffn_swiglu" + ANY,
            lambda x, get: get("ffn_gate") / (1 + kernels.quick_exp(-get("ffn_gate"))) * get("ffn_up"),
        ),
        "approximation",
        "output-precision",
        "input-precision",
        "activation",
    ),
    _SWIGLU(
        "silu-of-the-product",
        tap("ffn_swiglu" + ANY, lambda x, get: oracle.silu(get("ffn_gate") * get("ffn_up"))),
        "activation-order",
        "swapped-gate-up",
    ),
    _DOWN(
        "down-sum-of-one-shard",
        weights(r"blk\.1\.ffn_down\.weight", inputs(kernels.half_the_inputs)),
        "missing-inputs",
        "partial-sum",
        layers="one",
    ),
    _DOWN(
        "down-sums-in-bf16",
        told(kernels.down_in_bf16),
        "output-precision",
        "accumulator-precision",
        "input-precision",
        "low-precision",
    ),
    _DOWN(
        "down-eight-bit-inputs",
        kernels.input_of("ffn_down", kernels.int8),
        "input-precision",
        "output-precision",
        "low-precision",
    ),
    _DOWN(
        "down-weights-in-bf16",
        weights(r"ffn_down\.weight", inputs(bf16)),
        "weight-precision",
        "low-precision",
    ),
    _DOWN(
        "down-scales-of-the-next-block",
        weights(r"ffn_down\.weight", inputs(kernels.next_block_scale)),
        "block-scale",
        "weight-layout",
        "wrong-weight",
    ),
    _DOWN(
        "down-without-minimum",
        weights(r"ffn_down\.weight", inputs(kernels.without_minimum)),
        "zero-point",
        "missing-bias",
        "block-minimum",
    ),
    _DOWN(
        "down-tile-of-garbage",
        tap("ffn_out-2", kernels.tile(slice(16, 32), slice(8, 24))),
        "some-tokens",
        "channel-range",
        "tile",
        "sparse",
        "garbage",
        layers="one",
    ),
    _DOWN(
        "down-one-row-of-garbage",
        tap("ffn_out-1", kernels.tile(slice(5, 6), slice(None))),
        "some-tokens",
        "stale-row",
        "garbage",
        layers="one",
    ),
    _DOWN("down-late", tap("ffn_out-0", lambda x, get: late(x)), "token-shift", layers="one"),
    _STREAM(
        "ffn-branch-halved",
        tap("l_out" + ANY, lambda x, get: 0.5 * (x + get("attn_residual"))),
        "residual-scale",
        "branch-gain",
        "missing-branch",
        "gain",
    ),
    _STREAM(
        "ffn-branch-lost", tap("l_out-2", lambda x, get: get("attn_residual")), "missing-branch", layers="one"
    ),
    _STREAM("stream-clipped", tap("l_out-1", lambda x, get: np.clip(x, -2, 2)), "saturation", layers="one"),
    # --- both ends
    _EMBED(
        "embedding-second-shard-empty",
        weights("token_embd", kernels.second_shard_of_ids),
        "zeros",
        layers="one",
    ),
    _EMBED(
        "embedding-in-eight-bits",
        weights("token_embd", inputs(kernels.int8)),
        "weight-precision",
        "output-precision",
        layers="one",
    ),
    _EMBED("embedding-late", tap("model.input_embed", lambda x, get: late(x)), "token-shift", layers="one"),
    _EMBED(
        "embedding-normed",
        tap("model.input_embed", lambda x, get: oracle.rms(x, 1e-6)),
        "embedding-norm",
        "token-gain",
        "double-norm",
        layers="one",
    ),
    _HEAD(
        "head-without-the-last-norm",
        told(
            lambda m: tap(
                "result_output",
                lambda x, get: get(f"l_out-{m.trunk_layers - 1}") @ m.weights["output.weight"].T,
            )
        ),
        "missing-norm",
        "wrong-input",
        layers="one",
    ),
    _HEAD("head-late", tap("result_output", lambda x, get: late(x)), "token-shift", layers="one"),
    _HEAD(
        "head-in-bf16",
        tap("result_output", lambda x, get: bf16(x)),
        "output-precision",
        layers="one",
    ),
    _HEAD(
        "head-last-rows-of-garbage",
        tap("result_output", kernels.tile(slice(None), slice(-5, None))),
        "channel-range",
        "garbage",
        layers="one",
    ),
    _HEAD(
        "head-inputs-tail",
        weights(r"^output\.weight", inputs(lambda w: np.where(np.arange(w.shape[1]) < w.shape[1] - 4, w, 0))),
        "missing-inputs",
        "partial-sum",
        layers="one",
    ),
]

_ROUTER = Place("moe", ("ffn_moe_logits",))
_CHOICE = Place("moe", ("ffn_moe_topk", "ffn_moe_argsort"))
_EXPERT_IN = Place("moe", ("ffn_moe_gate", "ffn_moe_up"))
_EXPERT_SWIGLU = Place("moe", ("ffn_moe_swiglu",))
_EXPERT_DOWN = Place("moe", ("ffn_moe_down",))
_WEIGHTED = Place("moe", ("ffn_moe_weighted",))
_WEIGHTS = Place("moe", ("ffn_moe_weights_norm",))
_SHARED_GATE = Place("moe", ("shared_expert_gate",))
_SHARED_SIGMOID = Place("moe", ("shared_expert_gate_sigmoid",))

# On models with experts only.
EXPERT_SLIPS: list[Fault] = [
    _ROUTER("router-in-bf16", tap("ffn_moe_logits" + ANY, lambda x, get: bf16(x)), "output-precision"),
    _ROUTER(
        "router-before-the-norm",
        told(kernels.router_before_the_norm),
        "wrong-input",
        "missing-norm",
        "router",
    ),
    _CHOICE(
        "choice-of-the-token-before",
        tap("ffn_moe_topk" + ANY, lambda x, get: np.concatenate([x[:1], x[:-1]])),
        "token-shift",
        "stale-row",
        "router",
    ),
    _EXPERT_IN(
        "expert-stride-one-row-short",
        weights("ffn_up_exps", kernels.expert_stride),
        "expert-stride",
        "wrong-expert",
        "weight-layout",
        "wrong-weight",
    ),
    _EXPERT_IN(
        "expert-weight-on-its-input",
        tap("ffn_moe_(gate|up)" + ANY, lambda x, get: x * get("ffn_moe_weights_norm")[..., None]),
        "router",
        "weight-order",
        "token-gain",
    ),
    _EXPERT_SWIGLU(
        "expert-gelu",
        tap("ffn_moe_swiglu" + ANY, lambda x, get: gelu(get("ffn_moe_gate")) * get("ffn_moe_up")),
        "gelu-for-silu",
    ),
    _EXPERT_DOWN(
        "expert-down-tail",
        weights("ffn_down_exps", lambda w, *_: np.concatenate([w[..., :-6], 0 * w[..., -6:]], -1)),
        "missing-inputs",
        "partial-sum",
    ),
    _EXPERT_DOWN(
        "expert-down-slots-exchanged",
        tap("ffn_moe_down" + ANY, lambda x, get: x[:, [1, 0, *range(2, x.shape[1])]]),
        "slot-permutation",
        "expert-permutation",
        "wrong-expert",
        "router",
        "head-permutation",
    ),
    _EXPERT_DOWN(
        "last-expert-never-written",
        tap("ffn_moe_down" + ANY, lambda x, get: np.where((get("ffn_moe_topk") == 6)[..., None], 0, x)),
        "zeros",
        "missing-expert",
        "missing-experts",
        "expert-gain",
    ),
    _WEIGHTED(
        "weights-squared",
        tap("ffn_moe_weighted" + ANY, lambda x, get: x * get("ffn_moe_weights_norm")[..., None]),
        "router",
        "double-weight",
        "token-gain",
    ),
    _WEIGHTED(
        "weights-before-normalisation",
        tap("ffn_moe_weighted" + ANY, lambda x, get: get("ffn_moe_down") * get("ffn_moe_weights")),
        "router",
        "token-gain",
    ),
    _WEIGHTS(
        "weights-softmaxed-again",
        tap("ffn_moe_weights_norm" + ANY, lambda x, get: oracle.softmax(get("ffn_moe_weights")[..., 0])),
        "router",
    ),
    _SHARED_GATE(
        "shared-gate-of-the-first-token",
        tap("shared_expert_gate" + ANY, lambda x, get: 0 * x + x[:1]),
        "stale-row",
        "broadcast",
        "token-gain",
    ),
    _SHARED_SIGMOID(
        "shared-gate-sigmoid-twice",
        tap("shared_expert_gate_sigmoid" + ANY, lambda x, get: oracle.sigmoid(x)),
        "twice-sigmoid",
        "double-sigmoid",
    ),
    _SHARED_SIGMOID(
        "shared-gate-silu",
        tap("shared_expert_gate_sigmoid" + ANY, lambda x, get: x * get("shared_expert_gate")),
        "silu-for-sigmoid",
    ),
]
