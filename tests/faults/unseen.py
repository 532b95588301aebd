"""A fourth collection, run once before anything was changed for it: how the analyzer does on the unknown."""

from __future__ import annotations

import numpy as np
import oracle
from faults import changes, kernels
from faults.changes import ANY, Fault, Place, both, function, on_operands, tap, told, weights

_FFN = ("ffn", "moe")
_GENERAL = ("channel-permutation", "weight-layout", "head-permutation")
_PRECISION = ("input-precision", "output-precision", "low-precision")


def _early(x):
    return np.concatenate([x[1:], 0 * x[:1]])


def _clipped_decay(state, q, k, v, g, beta):
    return changes.delta_step(state, q, k, v, np.maximum(g, np.log(0.5)), beta)


def _shared_state(state, q, k, v, g, beta):
    state = state.copy()
    state[1] = state[0]
    return changes.delta_step(state, q, k, v, g, beta)


def _sums_never_reset(model):
    """Log decays summed from the start of the text, not of the chunk."""

    def rule(original, q, k, v, g, beta):
        total = np.cumsum(g, axis=0)
        o, states = original(q, k, v, g, beta)
        o = o.copy()
        for start in range(32, len(v), 32):
            rows = slice(start, start + 32)
            inside = np.exp(total[rows] - total[start - 1])
            read = np.einsum("hvk,thk->thv", states[start], q[rows])
            o[rows] += (np.exp(total[rows]) - inside)[..., None] * read
        return o, states

    return function("delta_rule", rule)


def _mirrored(_original, x, positions, rotary, sections, base, *rest):
    half = rotary // 2
    angle = oracle.rope_angles(positions, rotary, sections, base, *rest)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b, passed = np.split(x, [half, rotary], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos - a * sin, passed], axis=-1)


def _slow_pairs_scaled(original, x, positions, rotary, sections, base, factors=1):
    slow = np.where(np.arange(rotary // 2) < rotary // 4, 1, 4)
    return original(x, positions, rotary, sections, base, factors * slow)


def _last_head(x, instead):
    return np.concatenate([x[:, :-1], instead[:, -1:]], axis=1)


def _late_values(x, get):
    value = np.concatenate([0 * get("Vcur")[:1], get("Vcur")[:-1]])
    read = oracle.kv_head(np.arange(x.shape[1]), x.shape[1], value.shape[1])
    return np.einsum("tns,snh->tnh", get("kq_soft_max"), value[:, read])


def _own_key_stale(x, _get):
    """A token's own key is not in the cache yet: the slot holds the key before."""
    x, t = x.copy(), np.arange(1, len(x))
    x[t, :, t] = x[t, :, t - 1]
    return x


def _fused_dealt(part):
    """Rows of gate and up interleaved in one matrix, read as two halves."""

    def change(w, name, all_):
        gate, up = (
            all_[name.replace("ffn_gate", "@").replace("ffn_up", "@").replace("@", s)]
            for s in ("ffn_gate", "ffn_up")
        )
        mixed = np.stack([gate, up], axis=1).reshape(-1, w.shape[1])
        return mixed[: len(w)] if part == 0 else mixed[len(w) :]

    return change


def _rows(rows, change):
    def apply(x, _get):
        x = x.copy()
        x[rows] = change(x[rows])
        return x

    return apply


def _buffer_of_64(x, _get):
    x = x.copy()
    x[64:] = x[: len(x) - 64]
    return x


def _shard_scaled(table, *_):
    return np.where(np.arange(len(table))[:, None] >= len(table) // 2, 2 * table, table)


def _head_weights_by_head(x, get):
    """The norm's weight indexed by head."""
    weight = (x / oracle.rms(get("Qcur_reshaped"), 1e-6))[0, 0]
    return oracle.rms(get("Qcur_reshaped"), 1e-6) * weight[: x.shape[1], None]


def _minor(w, *_):
    return w.reshape(len(w), -1, changes.HEAD).swapaxes(1, 2).reshape(w.shape)


def _expert_gate_in_fp8(original, model, stem, x, *rest):
    return original(model, stem, kernels.significant(x, 4) if stem == "ffn_gate_exps" else x, *rest)


_NORM = Place("norm", ("attn_norm", "norm"))
_QKV_SILU, _V = Place("ssm", ("conv_output_silu",)), Place("ssm", ("v_conv_predelta",))
_STATES = Place("ssm", ("new_state", "attn_output"))
_GATED = Place("ssm", ("final_output",), ("ssm", "norm"))
_SCORES, _SOFT, _MIX = (Place("attention", (op,)) for op in ("kq", "kq_soft_max", "kqv"))
_ROPE, _GATE = Place("attention", ("Qcur", "Kcur")), Place("attention", ("attn_gated",))
_OUT, _SWIGLU, _DOWN = (
    Place("attention", ("attn_output",)),
    Place("ffn", ("ffn_swiglu",), _FFN),
    Place("ffn", ("ffn_out",), _FFN),
)

UNSEEN: list[Fault] = [
    _NORM("norm-of-f16-inputs", function("rms", lambda o, x, e: o(changes.f16(x), e)), *_PRECISION),
    _NORM(
        "mean-over-the-padded-width",
        function("rms", lambda o, x, e: x / np.sqrt((x * x).sum(-1, keepdims=True) / (x.shape[-1] + 16) + e)),
        "gain",
        "missing-scale",
        "sum-for-mean",
        "norm-axis",
    ),
    _NORM(
        "rms-of-the-token-before",
        function(
            "rms",
            lambda o, x, e: x / np.sqrt(np.mean(np.concatenate([x[:1], x[:-1]]) ** 2, -1, keepdims=True) + e),
        ),
        "token-gain",
        "token-shift",
        "norm-axis",
    ),
    Place("norm", ("Qcur_normed",), ("norm", "attention"))(
        "query-norm-weight-by-head",
        tap("Qcur_normed" + ANY, _head_weights_by_head),
        "norm-weight",
        "weight-layout",
        "wrong-weight",
    ),
    Place("norm", ("attn_post_norm",))(
        "post-norm-weight-lost-once",
        weights(r"blk\.1\.post_attention", lambda w, *_: 0 * w + 1),
        "missing-norm-weight",
        layers="one",
    ),
    Place("ssm", ("conv_output_raw",))(
        "conv-kernel-in-bf16",
        weights("ssm_conv1d", lambda w, *_: changes.bf16(w)),
        "weight-precision",
        *_PRECISION,
        "conv-kernel",
    ),
    Place("ssm", ("conv_output_raw",))(
        "conv-bias",
        tap("conv_output_raw" + ANY, lambda x, get: x + 0.1 * np.sin(np.arange(x.shape[1]))),
        "missing-bias",
    ),
    _QKV_SILU(
        "conv-sigmoid",
        tap("conv_output_silu" + ANY, lambda x, get: oracle.sigmoid(get("conv_output_raw"))),
        "sigmoid-for-silu",
    ),
    _STATES("decay-not-below-a-half", changes.delta(_clipped_decay), "decay", "saturation"),
    Place("ssm", ("attn_output", "new_state"))(
        "decay-sums-never-reset", told(_sums_never_reset), "decay", "chunk-boundary"
    ),
    _STATES(
        "keys-one-token-early", on_operands(lambda q, k, v, g, b: (q, _early(k), v, g, b)), "token-shift"
    ),
    _STATES(
        "two-heads-one-state",
        changes.delta(_shared_state),
        "head-permutation",
        "stale-state",
        "state-aliasing",
    ),
    _V(
        "value-dims-reversed",
        tap("v_conv_predelta" + ANY, lambda x, get: x[..., ::-1]),
        "channel-permutation",
    ),
    Place("ssm", ("q_conv_predelta", "k_conv_predelta"))(
        "l2-over-the-tokens",
        function("l2", lambda o, x, e: x / np.sqrt((x * x).sum(0, keepdims=True) + e)),
        "norm-axis",
    ),
    _GATED(
        "gate-one-token-late",
        function("gated_norm", lambda o, x, w, z, e: o(x, w, np.concatenate([0 * z[:1], z[:-1]]), e)),
        "token-shift",
    ),
    _GATED(
        "gate-is-softplus",
        function("gated_norm", lambda o, x, w, z, e: oracle.rms(x, e) * w * np.logaddexp(0, z)),
        "softplus-for-silu",
    ),
    Place("ssm", ("linear_attn_out",))(
        "out-of-another-layer",
        weights(
            r"blk\.0\.ssm_out",
            lambda w, n, all_: all_.get(n.replace("blk.0", "blk.1"), all_.get(n.replace("blk.0", "blk.2"))),
        ),
        "wrong-weight",
        layers="one",
    ),
    _SOFT(
        "attention-scale-of-the-rotary-dims",
        function("attention_scale", lambda o, H: changes.ROPE[0] ** -0.5),
        "missing-scale",
        "double-scale",
        "attention-scale",
        "gain",
    ),
    _ROPE(
        "keys-of-another-base",
        tap(
            "Kcur" + ANY,
            lambda x, get: oracle.rope(
                get("Kcur_normed"), np.stack([np.arange(len(x))] * 4), *changes.ROPE[:2], 1e6
            ),
        ),
        "rope-base",
    ),
    _ROPE(
        "last-query-head-not-rotated",
        tap("Qcur" + ANY, lambda x, get: _last_head(x, get("Qcur_normed"))),
        "missing-rope",
    ),
    _ROPE(
        "rope-slow-pairs-scaled",
        function("rope", _slow_pairs_scaled),
        "rope-angle",
        "rope-scale",
        "rope-frequencies",
        "rope-base",
    ),
    _ROPE("rope-mirrored", function("rope", _mirrored), "rope-sign", "rope-pairing"),
    _SOFT("first-key-never-seen", kernels.seen(lambda t, n, s: (s <= t) & ((s > 0) | (t == 0))), "mask"),
    _SOFT(
        "prefix-sees-all-of-itself", kernels.seen(lambda t, n, s: (s <= t) | ((t < 16) & (s < 16))), "mask"
    ),
    _SOFT(
        "exp-of-two",
        function("causal_softmax", lambda o, s: o(s * np.log(2))),
        "missing-scale",
        "gain",
        "attention-scale",
    ),
    _MIX(
        "one-head-dropped",
        tap("kqv" + ANY, lambda x, get: x * (np.arange(x.shape[1]) != 2)[:, None]),
        "zeros",
    ),
    _MIX("value-slots-one-late", tap("kqv" + ANY, _late_values), "token-shift", "kv-cache"),
    _SCORES("own-key-not-stored-yet", tap("kq" + ANY, _own_key_stale), "kv-cache", "stale-row"),
    _GATE(
        "gate-applied-twice", tap("attn_gated" + ANY, lambda x, get: x * get("gate_sigmoid")), "double-gate"
    ),
    _OUT(
        "heads-minor-into-the-output", weights(r"attn_output\.weight", _minor), *_GENERAL, "input-permutation"
    ),
    Place("attention", ("Qcur_reshaped", "Qcur_full"), ("attention",))(
        "query-bias",
        function(
            "query_and_gate", lambda o, u: (o(u)[0] + 0.2 * np.cos(np.arange(u.shape[2] // 2)), o(u)[1])
        ),
        "missing-bias",
    ),
    Place("ffn", ("ffn_gate", "ffn_up"), _FFN)(
        "gate-and-up-dealt-wrongly",
        both(weights(r"ffn_gate\.weight", _fused_dealt(0)), weights(r"ffn_up\.weight", _fused_dealt(1))),
        "weight-layout",
        "channel-permutation",
        "wrong-weight",
        "swapped-gate-up",
    ),
    _SWIGLU(
        "swiglu-limited",
        tap(
            "ffn_swiglu" + ANY,
            lambda x, get: oracle.silu(np.minimum(get("ffn_gate"), 0.7)) * np.clip(get("ffn_up"), -0.7, 0.7),
        ),
        "saturation",
        "activation",
    ),
    _SWIGLU(
        "leaky-relu",
        tap(
            "ffn_swiglu" + ANY,
            lambda x, get: np.where(get("ffn_gate") > 0, 1, 0.01) * get("ffn_gate") * get("ffn_up"),
        ),
        "leaky-relu-for-silu",
        "relu-for-silu",
        "activation",
    ),
    _DOWN(
        "one-tile-of-rows-halved",
        weights(
            r"blk\.1\.ffn_down\.weight",
            lambda w, *_: np.where((np.arange(len(w)) // 16 == 1)[:, None], 0.5 * w, w),
        ),
        "gain",
        "missing-scale",
        "channel-gain",
        layers="one",
    ),
    _DOWN("odd-tokens-empty", tap("ffn_out" + ANY, _rows(slice(1, None, 2), lambda x: 0 * x)), "zeros"),
    _DOWN(
        "a-buffer-of-64-tokens", tap("ffn_out" + ANY, _buffer_of_64), "stale-row", "some-tokens", tokens=90
    ),
    Place("ssm", ("attn_residual",))(
        "first-sum-in-bf16",
        tap("attn_residual-0", lambda x, get: changes.bf16(x)),
        "output-precision",
        layers="one",
    ),
    Place("ffn", ("l_out",), _FFN)(
        "stream-normed",
        tap("l_out-0", lambda x, get: oracle.rms(x, 1e-6)),
        "extra-norm",
        "token-gain",
        "double-norm",
        layers="one",
    ),
    Place("embedding", ("model.input_embed",))(
        "embedding-shard-doubled",
        weights("token_embd", _shard_scaled),
        "gain",
        "token-gain",
        "missing-scale",
        layers="one",
    ),
    Place("head", ("result_output",))(
        "logits-of-the-last-token",
        tap("result_output", lambda x, get: 0 * x + x[-1:]),
        "stale-row",
        "broadcast",
        layers="one",
    ),
    Place("head", ("result_output",))(
        "head-weights-in-fp8",
        weights(r"^output\.weight", lambda w, *_: kernels.significant(w, 4)),
        "weight-precision",
        "low-precision",
        layers="one",
    ),
    Place("head", ("result_output",))(
        "head-input-halves-swapped",
        weights(r"^output\.weight", lambda w, *_: np.roll(w, w.shape[1] // 2, axis=1)),
        "input-permutation",
        *_GENERAL,
        layers="one",
    ),
    Place("moe", ("ffn_moe_weights_norm",))(
        "weights-over-their-sum-plus-one",
        tap(
            "ffn_moe_weights_norm" + ANY,
            lambda x, get: get("ffn_moe_weights")[..., 0] / (1 + get("ffn_moe_weights_sum")),
        ),
        "router",
        "token-gain",
    ),
    Place("moe", ("ffn_out",))(
        "both-parts-halved", tap("ffn_out" + ANY, lambda x, get: 0.5 * x), "gain", "missing-scale"
    ),
    Place("moe", ("ffn_moe_up",))(
        "up-experts-one-on-once",
        weights(r"blk\.1\.ffn_up_exps", lambda w, *_: np.roll(w, 1, axis=0)),
        "expert-permutation",
        "wrong-expert",
        layers="one",
    ),
    Place("moe", ("ffn_moe_gate",))(
        "expert-gate-fp8-inputs", function("expert_product", _expert_gate_in_fp8), *_PRECISION
    ),
    Place("moe", ("ffn_moe_weights_norm",))(
        "weights-of-the-token-before",
        tap("ffn_moe_weights_norm" + ANY, lambda x, get: np.concatenate([x[:1], x[:-1]])),
        "token-shift",
        "stale-row",
        "router",
    ),
]
