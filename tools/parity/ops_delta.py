"""The gated delta net: convolution, gates, the delta rule, the gated norm (fact sheet section 4, "Delta net")."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scarlet_jax.tools.parity import activations
from scarlet_jax.tools.parity import formulas as f
from scarlet_jax.tools.parity.arithmetic import ROUNDINGS, Rounding
from scarlet_jax.tools.parity.graph import Run, add, flat, heads, known
from scarlet_jax.tools.parity.ops_shared import EPS, delayed, elementwise, fit_gain, linear, nothing, sigmoid

linear("linear_attn_qkv_mixed", "ssm", "ssm", "attn_qkv", "attn_norm")
linear("z", "ssm", "ssm", "attn_gate", "attn_norm")
linear("alpha", "ssm", "ssm", "ssm_alpha", "attn_norm")
linear("linear_attn_out", "ssm", "ssm", "ssm_out", "final_output")
add("qkv_mixed_transposed", "ssm", "ssm", lambda v: v("linear_attn_qkv_mixed"), alias=True)
for _name in ("state_predelta", "conv_states_reshaped", "conv_states"):
    add(_name, "ssm", "ssm", nothing, source=True)
add(
    "beta",
    "ssm",
    "ssm",
    lambda v: v.linear("ssm_beta", v("attn_norm"))[..., None],
    weight="ssm_beta",
    linear=True,
)


def conv_input(v: Any) -> np.ndarray:
    """What the convolution runs over: W - 1 rows of the past, then one a token."""
    mixed = v("linear_attn_qkv_mixed")
    return np.concatenate([v.state("conv_states_reshaped", (v.facts.conv_kernel - 1, mixed.shape[1])), mixed])


def _conv(v: Any, padded: np.ndarray | None = None, kernel: np.ndarray | None = None) -> np.ndarray:
    return f.causal_conv(
        conv_input(v) if padded is None else padded, v.weight("ssm_conv1d") if kernel is None else kernel
    )


def _fit_conv(v: Any, y: np.ndarray) -> Mapping[str, np.ndarray]:
    padded, width = conv_input(v), v.facts.conv_kernel
    shifted = np.stack([padded[j : j + len(y)] for j in range(width)], axis=-1).transpose(
        1, 0, 2
    )  # (C, T, W)
    kernel = (np.linalg.pinv(shifted, rcond=1e-13) @ y.T[:, :, None])[..., 0]
    energy = (shifted**2).sum(axis=(1, 2))
    return {"ssm_conv1d": np.where(np.isnan(known(energy))[:, None], np.nan, kernel)}


def _shifted(v: Any, by: int) -> np.ndarray:
    padded = conv_input(v)
    return (
        np.roll(padded, by, axis=0) if by < 0 else np.concatenate([np.zeros_like(padded[:by]), padded[:-by]])
    )


def _fresh(v: Any, fill: str) -> np.ndarray:
    """The conv input with its history wrong: zeros although there was some, or the first row repeated."""
    padded, past = conv_input(v).copy(), v.facts.conv_kernel - 1
    padded[:past] = padded[past] if fill == "edge" else padded[:past][::-1] if fill == "reversed" else 0
    return padded


add("conv_input", "ssm", "ssm", conv_input, alias=True)
add(
    "conv_state_last",
    "ssm",
    "ssm",
    lambda v: conv_input(v)[1 - v.facts.conv_kernel :],
    variants={
        "token-shift": lambda v: conv_input(v)[-v.facts.conv_kernel : -1],
        "state-reversed": lambda v: conv_input(v)[1 - v.facts.conv_kernel :][::-1],
        "stale-state": lambda v: conv_input(v)[: v.facts.conv_kernel - 1],
    },
)
add("conv_state_update", "ssm", "ssm", lambda v: conv_input(v)[1 - v.facts.conv_kernel :], alias=True)
add(
    "conv_output_raw",
    "ssm",
    "ssm",
    _conv,
    weight="ssm_conv1d",
    fit=_fit_conv,
    variants={
        "conv-reversed": lambda v: _conv(v, kernel=v.weight("ssm_conv1d")[:, ::-1]),
        "token-shift": lambda v: _conv(v, padded=_shifted(v, 1)),
        "token-shift, -1": lambda v: _conv(v, padded=_shifted(v, -1)),
        "conv-state": lambda v: _conv(v, padded=_fresh(v, "zero")),
        "conv-state, first row repeated": lambda v: _conv(v, padded=_fresh(v, "edge")),
        "conv-state, rows reversed": lambda v: _conv(v, padded=_fresh(v, "reversed")),
        "missing-conv": lambda v: v("linear_attn_qkv_mixed"),
        "conv-width": lambda v: _conv(
            v,
            kernel=np.concatenate([0 * v.weight("ssm_conv1d")[:, :1], v.weight("ssm_conv1d")[:, 1:]], axis=1),
        ),
    },
)
elementwise("conv_output_silu", "ssm", "ssm", "silu", lambda v: v("conv_output_raw"))


def conv_by_chunk(
    v: Any, carry: Callable[[np.ndarray], np.ndarray] | None, first: int, period: int
) -> np.ndarray:
    """The convolution with the rows before each chunk mistreated; chunks start at `first`, then every `period`.

    Without `carry` the history is that of one token earlier.
    """
    padded, y, past = conv_input(v), _conv(v), v.facts.conv_kernel - 1
    for start in range(first, len(y), period):
        rows = slice(start, min(len(y), start + past))
        history = padded[start : start + past]
        history = padded[start - 1 : start - 1 + past] if carry is None else carry(history)
        part = np.concatenate([history, padded[start + past : rows.stop + past]])
        y[rows] = _conv(v, padded=part)
    return y


def _part(v: Any, which: str) -> np.ndarray:
    y, n = v("conv_output_silu"), v.facts
    key = n.key_heads * n.key_dim
    start, stop, dim = {
        "q": (0, key, n.key_dim),
        "k": (key, 2 * key, n.key_dim),
        "v": (2 * key, y.shape[1], n.value_dim),
    }[which]
    return heads(y[:, start:stop], dim)


def _vkq(v: Any, which: str) -> np.ndarray:
    """The parts taken from a v, k, q order."""
    y, n = v("conv_output_silu"), v.facts
    values, key = n.value_heads * n.value_dim, n.key_heads * n.key_dim
    start, size, dim = {
        "q": (values + key, key, n.key_dim),
        "k": (values, key, n.key_dim),
        "v": (0, values, n.value_dim),
    }[which]
    return heads(y[:, start : start + size], dim)


for _tap, _which in (("q_conv", "q"), ("k_conv", "k"), ("v_conv_predelta", "v")):
    add(
        _tap,
        "ssm",
        "ssm",
        lambda v, which=_which: _part(v, which),
        variants={
            "qkv-order": lambda v, which=_which: _vkq(v, which),
            **(
                {"swapped-q-k": lambda v, which=_which: _part(v, "k" if which == "q" else "q")}
                if _which != "v"
                else {}
            ),
        },
    )

_L2 = ({}, {"l2_floor": True}, {"eps": 1e-6}, {"eps": 1e-5})


def _l2(v: Any, x: np.ndarray) -> np.ndarray:
    if v.facts.l2_floor:
        return x / np.maximum(np.sqrt(np.sum(x * x, axis=-1, keepdims=True)), v.facts.eps)
    return f.l2(x, v.facts.eps)


for _name, _source in (("q_conv_predelta", "q_conv"), ("k_conv_predelta", "k_conv")):
    add(
        _name,
        "ssm",
        "ssm",
        lambda v, source=_source: _l2(v, v(source)),
        choices=_L2,
        normed=lambda v, source=_source: (v(source), 1.0),
        variants={
            "norm-axis, absolute values": lambda v, source=_source: (
                v(source) / np.abs(v(source)).sum(-1, keepdims=True)
            ),
            "sum-for-mean": lambda v, source=_source: f.rms(v(source), v.facts.eps),
            "missing-norm": lambda v, source=_source: v(source),
            "norm-axis": lambda v, source=_source: f.l2(flat(v(source)), v.facts.eps).reshape(
                v(source).shape
            ),
            "norm-axis, over the tokens": lambda v, source=_source: (
                v(source) / np.sqrt((v(source) ** 2).sum(axis=0, keepdims=True) + v.facts.eps)
            ),
            "missing-scale": lambda v, source=_source: (
                f.l2(v(source), v.facts.eps) * v(source).shape[-1] ** -0.5
            ),
            **{
                f"eps={eps:g}": (lambda v, source=_source, eps=eps: f.l2(v(source), eps))
                for eps in (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
            },
        },
    )


def _biased(v: Any) -> np.ndarray:
    return v("alpha") + v.weight("ssm_dt.bias")


def _rate(v: Any) -> np.ndarray:
    return f.softplus(_biased(v))


def _fit_bias(v: Any, y: np.ndarray) -> Mapping[str, np.ndarray]:
    before = y + np.log(-np.expm1(-np.maximum(y, 1e-30)))  # softplus undone
    return {"ssm_dt.bias": np.median(before - v("alpha"), axis=0)}


add(
    "a_softplus",
    "ssm",
    "ssm",
    _rate,
    weight="ssm_dt.bias",
    fit=_fit_bias,
    variants={
        "missing-bias": lambda v: f.softplus(v("alpha")),
        "double-bias": lambda v: f.softplus(v("alpha") + 2 * v.weight("ssm_dt.bias")),
        "bias-sign": lambda v: f.softplus(v("alpha") - v.weight("ssm_dt.bias")),
        "bias-after-softplus": lambda v: f.softplus(v("alpha")) + v.weight("ssm_dt.bias"),
        **{
            cause: (lambda v, change=change: change(_biased(v)))
            for cause, change in activations.mistaken("softplus").items()
        },
    },
    pointwise=lambda v: (_biased(v), 1.0),
)
add(
    "gate",
    "ssm",
    "ssm",
    lambda v: v("a_softplus") * v.weight("ssm_a"),
    weight="ssm_a",
    fit=fit_gain("ssm_a", lambda v: v("a_softplus")),
    variants={
        "decay, sign": lambda v: -v("a_softplus") * v.weight("ssm_a"),
        "decay, exponential taken again": lambda v: -v("a_softplus") * np.exp(v.weight("ssm_a")),
        "decay, logarithm of A": lambda v: v("a_softplus") * np.log(np.abs(v.weight("ssm_a")) + 1e-30),
        "decay, minus logarithm of A": lambda v: -v("a_softplus") * np.log(np.abs(v.weight("ssm_a")) + 1e-30),
        "decay, A left out": lambda v: -v("a_softplus"),
        "decay, exponentiated": lambda v: np.exp(v("a_softplus") * v.weight("ssm_a")),
        "decay, none": lambda v: 0 * v("a_softplus"),
    },
)
sigmoid("beta_sigmoid", "ssm", "ssm", "beta")

_DELTA_CHOICES = (
    {},
    {"head_mapping": "repeat"},
    {"head_mapping": "tile"},
    {"query_scaled": True},
    {"head_mapping": "repeat", "query_scaled": True},
    {"head_mapping": "tile", "query_scaled": True},
)


def _key_head(v: Any, keys: int, values: int, other: bool = False) -> np.ndarray:
    tile = (v.facts.head_mapping == "tile") != other
    head = np.arange(values)
    return head % keys if tile else head // (values // keys)


def delta(
    view: Any,
    /,
    *,
    out: int,
    scale: Any = None,
    other_heads: bool = False,
    read: np.ndarray | None = None,
    **twist: Any,
) -> np.ndarray:
    """Output (out=0) or last state (out=1) of the delta rule; keywords make the misread forms.

    `scale`, `beta`, `g`, `state`, `k`, `q`: functions from the right value to the one used; `read`: the key head
    of each value head.
    """
    change = {name: twist.pop(name, None) or (lambda x: x) for name in ("q", "k", "v", "g", "beta", "state")}
    values = heads(view("v_conv_predelta"), view.facts.value_dim)
    hv = values.shape[1]
    q, k = (heads(view(f"{part}_conv_predelta"), view.facts.key_dim) for part in "qk")
    read = _key_head(view, k.shape[1], hv, other_heads) if read is None else read
    factor = scale if scale is not None else 1.0 if view.facts.query_scaled else q.shape[-1] ** -0.5
    state = view.state("state_predelta", (hv, values.shape[-1], k.shape[-1]))
    rule = f.delta_rule_by_chunk if "chunk" in twist else f.delta_rule
    o, last = rule(
        change["q"](q[:, read] * q.dtype.type(factor)),
        change["k"](k[:, read]),
        change["v"](values),
        change["g"](flat(view("gate"))),
        change["beta"](flat(view("beta_sigmoid"))),
        change["state"](state),
        **twist,
    )
    return o if out == 0 else last


def key_heads(view: Any) -> tuple[np.ndarray, ...]:
    """Scaled queries, keys, log decay and write strength of every value head: (T, Hv, Dk) twice, (T, Hv) twice."""
    q, k = (heads(view(f"{part}_conv_predelta"), view.facts.key_dim) for part in "qk")
    g, beta = flat(view("gate")), flat(view("beta_sigmoid"))
    read = _key_head(view, k.shape[1], g.shape[1])
    factor = 1.0 if view.facts.query_scaled else q.shape[-1] ** -0.5
    return q[:, read] * factor, k[:, read], g, beta


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def by_chunk(
    v: Any, out: int, carry: Callable[[np.ndarray], np.ndarray], chunk: int = 64, first: int = 0
) -> np.ndarray:
    """The delta rule run chunk by chunk, the state between chunks mistreated; the first may have another length."""
    tokens = len(v("v_conv_predelta"))
    starts = [0, *range(first or chunk, tokens, chunk)]
    outputs, state = [], None
    for start, stop in itertools.pairwise([*starts, tokens]):
        part = _Rows(v, slice(start, stop), None if state is None else carry(state))
        outputs.append(delta(part, out=0))
        state = delta(part, out=1)
    return np.concatenate(outputs) if out == 0 else state


class _Rows:
    """A view of some token rows, starting from a given state."""

    def __init__(self, v: Any, rows: slice, state: np.ndarray | None):
        self._v, self._rows, self._state = v, rows, state
        self.facts = v.facts

    def __call__(self, name: str) -> np.ndarray:
        return self._v(name)[self._rows]

    def state(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._v.state(name, shape) if self._state is None else self._state


def _factor_as(rounding: Rounding) -> Rounding:
    """Log decays whose factors were rounded."""
    return lambda g: np.log(np.maximum(rounding(np.exp(g)), 1e-30))


def _delta_variants(out: int) -> dict[str, Run]:
    def twist(**changes: Any) -> Run:
        return lambda v: delta(v, out=out, **changes)

    def scaled(power: float) -> Run:
        return lambda v: delta(v, out=out, scale=v.facts.key_dim**power)

    variants = {
        "missing-scale": scaled(0.0),
        "double-scale": scaled(-1.0),
        "head-permutation": twist(other_heads=True),
        "decay, none": twist(g=lambda g: 0 * g),
        "decay, sign": twist(g=lambda g: -g),
        "decay, not exponentiated": twist(g=lambda g: np.log(np.maximum(np.abs(g), 1e-30))),
        "decay, one token late": twist(g=delayed),
        "decay, after the update": twist(decay_last=True),
        "decay, twice": twist(g=lambda g: 2 * g),
        "decay, half": twist(g=lambda g: g / 2),
        "decay, one for all heads": twist(
            g=lambda g: np.repeat(g.mean(axis=1, keepdims=True), g.shape[1], 1)
        ),
        "missing-beta": twist(beta=lambda b: np.ones_like(b)),
        "double-beta": twist(beta=lambda b: b * b),
        "twice-beta": twist(beta=lambda b: 2 * b),
        "missing-correction": twist(correct=False),
        "beta-order, of what is known only": twist(beta_on="known"),
        "beta-order, of what is new only": twist(beta_on="new"),
        "update-order, correction before the decay": twist(correct_first=True),
        "update-order": twist(read_first=True),
        "update-order, before the decay": twist(read_before=True),
        "state-transposed": twist(state=_transposed),
        "state-reset": twist(state=lambda s: 0 * s),
        **{f"state-precision, {label}": twist(rounding=to) for label, to in ROUNDINGS.items()},
        **{f"decay-precision, {label}": twist(g=_factor_as(to)) for label, to in ROUNDINGS.items()},
        "token-shift": twist(v=delayed),
        "token-shift, keys": twist(k=delayed),
        "swapped-q-k": lambda v: delta(_Swapped(v, "q_conv_predelta", "k_conv_predelta"), out=out),
        "missing-norm": lambda v: delta(
            _Renamed(v, {"q_conv_predelta": "q_conv", "k_conv_predelta": "k_conv"}), out=out
        ),
        "chunk-boundary": lambda v: by_chunk(v, out, carry=lambda s: 0 * s),
        "chunk-boundary, state transposed": lambda v: by_chunk(v, out, carry=_transposed),
        **({"state-transposed, as stored": lambda v: _transposed(delta(v, out=1))} if out else {}),
        **({"stale-state": lambda v: v.state("state_predelta", delta(v, out=1).shape)} if out else {}),
    }
    read_out = ("missing-scale", "double-scale", "update-order", "update-order, before the decay")
    return {label: run for label, run in variants.items() if not out or label not in read_out}


class _Renamed:
    """A view in which some taps go by another tap's name."""

    def __init__(self, v: Any, names: Mapping[str, str]):
        self._v, self._names = v, names
        self.facts, self.state = v.facts, v.state

    def __call__(self, name: str) -> np.ndarray:
        return self._v(self._names.get(name, name))


def _Swapped(v: Any, a: str, b: str) -> _Renamed:  # noqa: N802 - reads as the class it returns
    return _Renamed(v, {a: b, b: a})


add(
    "attn_output",
    "ssm",
    "ssm",
    lambda v: delta(v, out=0),
    choices=_DELTA_CHOICES,
    variants=_delta_variants(0),
)
add("new_state", "ssm", "ssm", lambda v: delta(v, out=1), choices=_DELTA_CHOICES, variants=_delta_variants(1))


def _out_norm(v: Any) -> tuple[np.ndarray, np.ndarray]:
    """The delta rule's output per head, and its gate's input."""
    return heads(v("attn_output"), v.facts.value_dim), heads(v("z"), v.facts.value_dim)


def _gated_norm(v: Any, change: Callable[..., np.ndarray] | None = None) -> np.ndarray:
    o, z = _out_norm(v)
    if change is not None:
        return flat(change(o, z, v.weight("ssm_norm"), v.facts.eps))
    return flat(f.rms(o, v.facts.eps) * v.weight("ssm_norm") * f.silu(z))


def _fit_out_norm(v: Any, y: np.ndarray) -> Mapping[str, np.ndarray]:
    o, z = _out_norm(v)
    x = f.rms(o, v.facts.eps) * f.silu(z)
    return {"ssm_norm": (x * y.reshape(x.shape)).sum(axis=(0, 1)) / known((x * x).sum(axis=(0, 1)))}


_GATED_NORM_FAULTS: dict[str, Callable[..., np.ndarray]] = {
    "missing-gate": lambda o, z, w, eps: f.rms(o, eps) * w,
    "norm-order": lambda o, z, w, eps: f.rms(o * f.silu(z), eps) * w,
    "missing-norm": lambda o, z, w, eps: o * w * f.silu(z),
    "missing-norm-weight": lambda o, z, w, eps: f.rms(o, eps) * f.silu(z),
    "double-norm-offset": lambda o, z, w, eps: f.rms(o, eps) * (w + 1) * f.silu(z),
    "missing-norm-offset": lambda o, z, w, eps: f.rms(o, eps) * (w - 1) * f.silu(z),
    "sum-for-mean": lambda o, z, w, eps: f.l2(o, eps) * w * f.silu(z),
    "norm-axis": lambda o, z, w, eps: f.rms(flat(o), eps).reshape(o.shape) * w * f.silu(z),
    "layer-norm": lambda o, z, w, eps: f.rms(o - o.mean(-1, keepdims=True), eps) * w * f.silu(z),
    **{
        cause: (lambda o, z, w, eps, change=change: f.rms(o, eps) * w * change(z))
        for cause, change in activations.mistaken("silu").items()
    },
    **{
        f"eps={eps:g}": (lambda o, z, w, _, eps=eps: f.rms(o, eps) * w * f.silu(z))
        for eps in (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
    },
}
add(
    "final_output",
    "ssm",
    "ssm",
    _gated_norm,
    weight="ssm_norm",
    fit=_fit_out_norm,
    choices=EPS,
    variants={
        cause: (lambda v, change=change: _gated_norm(v, change))
        for cause, change in _GATED_NORM_FAULTS.items()
    },
    pointwise=lambda v: (_out_norm(v)[1], f.rms(_out_norm(v)[0], v.facts.eps) * v.weight("ssm_norm")),
    normed=lambda v: (_out_norm(v)[0], v.weight("ssm_norm") * f.silu(_out_norm(v)[1])),
)
