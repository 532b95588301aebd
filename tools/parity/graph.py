"""The operations of the family: for every tap, how it follows from others.

An operation is a function of a `View`, which hands out one engine's taps of one layer (`v("attn_norm")`), its
weights and the facts of the model. Where a tap was not dumped the view computes it by its own operation, so the
same table serves dumps that hold every node and dumps that hold a few.

`variants` are the operation's known misreadings, each under the name of the fault it is: the same mathematics
with one step missing, doubled, swapped or out of order. They are what causes are named by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from scarlet_jax.tools.parity import formulas as f
from scarlet_jax.tools.parity.arithmetic import bf16, f16


class Missing(LookupError):
    """A tap, weight or fact that an operation needs and nobody gave."""


class View(Protocol):
    """One engine's activations around one layer, as an operation sees them."""

    facts: Any
    layer: int | None
    dtype: np.dtype

    def __call__(self, name: str) -> np.ndarray:
        """The tap `name` of this layer, dumped or computed."""
        ...

    def before(self) -> np.ndarray:
        """The residual stream that enters this layer, (T, D)."""
        ...

    def has(self, name: str) -> bool:
        """Whether the tap was dumped."""
        ...

    def state(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A state tap, zeros where it was not dumped."""
        ...

    def weight(self, stem: str) -> np.ndarray:
        """A weight of this layer (or of the model), (out, in) or a vector."""
        ...

    def linear(self, stem: str, x: np.ndarray) -> np.ndarray:
        """x (T, in) -> (T, out) by the weight `stem`."""
        ...

    def kv(self, x: np.ndarray) -> np.ndarray:
        """Keys or values as the engine's cache holds them."""
        ...


Run = Callable[[Any], np.ndarray]
Fit = Callable[[Any, np.ndarray], Mapping[str, np.ndarray]]
Choices = Sequence[Mapping[str, Any]] | Callable[[Any, np.ndarray], Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Op:
    """How one tap is computed.

    Attributes:
        name: the tap, without the layer number.
        kind: the layers it belongs to: "ssm", "attention", or "" for any.
        klass: the report's class.
        run: the formula.
        weight: the weight it applies, as a GGUF stem, or "".
        fit: for weights nobody gave: what they must be, from the reference's own inputs and output.
        choices: facts to try where the model does not say, or a function of the reference's view and output that
            lists them: the first that explains the reference is kept.
        variants: fault name -> formula with that fault.
        linear: whether it is one product with `weight`.
        source: it follows from nothing in this run (an embedding without its table, a carried state).
        alias: the same array as another tap, or one that nothing reads.
    """

    name: str
    kind: str
    klass: str
    run: Run
    weight: str = ""
    fit: Fit | None = None
    choices: Choices = ({},)
    variants: Mapping[str, Run] = dataclasses.field(default_factory=dict)
    linear: bool = False
    source: bool = False
    alias: bool = False


_EPS = ({}, {"eps": 1e-6}, {"eps": 1e-5})

OPS: dict[tuple[str, str], Op] = {}


def find(name: str, kind: str) -> Op | None:
    """The operation of tap `name` in a layer of `kind`."""
    return OPS.get((kind, name)) or OPS.get(("", name))


def _add(name: str, kind: str, klass: str, run: Run, **rest: Any) -> None:
    OPS[kind, name] = Op(name, kind, klass, run, **rest)


def _linear(name: str, kind: str, klass: str, stem: str, source: str) -> None:
    _add(name, kind, klass, lambda v: v.linear(stem, v(source)), weight=stem, linear=True)


# --- shapes ---------------------------------------------------------------------------------------------------


def heads(x: np.ndarray, dim: int) -> np.ndarray:
    """(T, ...) -> (T, heads, dim)."""
    return x.reshape(len(x), -1, dim)


def flat(x: np.ndarray) -> np.ndarray:
    """(T, ...) -> (T, everything else)."""
    return x.reshape(len(x), -1)


def _nothing(v: Any) -> np.ndarray:
    raise Missing("whatever this run started from")


# --- norms ----------------------------------------------------------------------------------------------------


def known(energy: np.ndarray) -> np.ndarray:
    """Energies to divide by; NaN where there is too little to learn a weight from: its channel is not judged."""
    return np.where(energy > 1e-10 * max(float(np.mean(energy)), 1e-300), energy, np.nan)


def _fit_gain(stem: str, source: Callable[[Any], np.ndarray]) -> Fit:
    """The per-channel weight that turns `source` into the output, least squares over tokens and heads."""

    def fit(v: Any, y: np.ndarray) -> Mapping[str, np.ndarray]:
        x = source(v).reshape(-1, y.shape[-1])
        energy = (x * x).sum(axis=0)
        return {stem: (x * y.reshape(x.shape)).sum(axis=0) / known(energy)}

    return fit


def _norm_variants(source: Callable[[Any], np.ndarray], stem: str) -> dict[str, Run]:
    def with_eps(eps: float) -> Run:
        return lambda v: f.rms(source(v), eps) * v.weight(stem)

    def normed(v: Any) -> np.ndarray:
        return f.rms(source(v), v.facts.eps)

    def centred(v: Any) -> np.ndarray:
        x = source(v)
        return f.rms(x - x.mean(axis=-1, keepdims=True), v.facts.eps) * v.weight(stem)

    def outside(v: Any) -> np.ndarray:
        x = source(v)
        root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
        return x / (root + v.facts.eps) * v.weight(stem)

    def over_all_heads(v: Any) -> np.ndarray:
        x = source(v)
        return f.rms(flat(x), v.facts.eps).reshape(x.shape) * v.weight(stem)

    return {
        "missing-norm-offset": lambda v: normed(v) * (v.weight(stem) - 1),
        "double-norm-offset": lambda v: normed(v) * (v.weight(stem) + 1),
        "missing-norm-weight": normed,
        "double-norm-weight": lambda v: normed(v) * v.weight(stem) ** 2,
        "missing-norm": lambda v: source(v) * v.weight(stem),
        "missing-norm, missing-norm-weight": source,
        "layer-norm": centred,
        "sum-for-mean": lambda v: f.l2(source(v), v.facts.eps) * v.weight(stem),
        "norm-axis": over_all_heads,
        "weight-precision": lambda v: normed(v) * bf16(v.weight(stem)),
        "offset-precision": lambda v: normed(v) * (1 + bf16(v.weight(stem) - 1)),
        "eps": outside,
        **{f"eps={eps:g}": with_eps(eps) for eps in (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)},
    }


def _norm(name: str, kind: str, source: Callable[[Any], np.ndarray], stem: str, **rest: Any) -> None:
    _add(
        name,
        kind,
        "norm",
        lambda v: f.rms(source(v), v.facts.eps) * v.weight(stem),
        weight=stem,
        fit=_fit_gain(stem, lambda v: f.rms(source(v), v.facts.eps)),
        choices=_EPS,
        variants=_norm_variants(source, stem),
        **rest,
    )


def _bare_norm(name: str, kind: str, source: Callable[[Any], np.ndarray]) -> None:
    _add(
        name,
        kind,
        "norm",
        lambda v: f.rms(source(v), v.facts.eps),
        choices=_EPS,
        alias=True,
        variants={
            "sum-for-mean": lambda v: f.l2(source(v), v.facts.eps),
            "missing-norm": source,
            **{
                f"eps={eps:g}": (lambda v, eps=eps: f.rms(source(v), eps))
                for eps in (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
            },
        },
    )


# --- ends of the model ----------------------------------------------------------------------------------------


def _embed(v: Any, offset: int = 0) -> np.ndarray:
    ids = np.asarray(v.facts.tokens)[slice(*v.facts.kept)]
    return v.rows("token_embd", ids + offset)


_add(
    "model.input_embed",
    "",
    "embedding",
    _embed,
    weight="token_embd",
    source=True,
    variants={
        "embedding-scale": lambda v: _embed(v) * _embed(v).shape[1] ** 0.5,
        "token-offset": lambda v: _embed(v, 1),
        "token-offset, -1": lambda v: _embed(v, -1),
    },
)
_bare_norm("norm", "end", lambda v: v.before())
_norm("result_norm", "end", lambda v: v.before(), "output_norm")
_norm("h_nextn", "end", lambda v: v.before(), "output_norm", alias=True)


def _head(v: Any) -> np.ndarray:
    return v.linear("output", v("result_norm"))


_add(
    "result_output",
    "end",
    "head",
    _head,
    weight="output",
    linear=True,
    variants={
        "tied-head": lambda v: v("result_norm") @ v.weight("token_embd").T,
        "missing-norm": lambda v: v.linear("output", v.before()),
        "soft-cap": lambda v: 30 * np.tanh(_head(v) / 30),
    },
)

# --- both kinds of layer --------------------------------------------------------------------------------------

_norm("attn_norm", "", lambda v: v.before(), "attn_norm")
_norm("attn_post_norm", "", lambda v: v("attn_residual"), "post_attention_norm")
_norm("ffn_norm", "", lambda v: v("attn_residual"), "ffn_norm")
_bare_norm("norm", "", lambda v: v("attn_residual"))


def _residual_variants(
    stream: Callable[[Any], np.ndarray], branch: Callable[[Any], np.ndarray]
) -> dict[str, Run]:
    return {
        "missing-residual": branch,
        "missing-branch": stream,
        "double-residual": lambda v: 2 * stream(v) + branch(v),
        "double-branch": lambda v: stream(v) + 2 * branch(v),
        "residual-sign": lambda v: stream(v) - branch(v),
    }


def _residual(name: str, kind: str, klass: str, stream, branch, **more: Run) -> None:
    variants = {key.replace("_", "-"): run for key, run in more.items()}
    _add(
        name,
        kind,
        klass,
        lambda v: stream(v) + branch(v),
        variants={**_residual_variants(stream, branch), **variants},
    )


for _kind, _branch in (("ssm", "linear_attn_out"), ("attention", "attn_output")):
    _residual(
        "attn_residual",
        _kind,
        _kind,
        lambda v: v.before(),
        lambda v, branch=_branch: v(branch),
        residual_source=lambda v, branch=_branch: v("attn_norm") + v(branch),
    )
_residual(
    "l_out",
    "",
    "ffn",
    lambda v: v("attn_residual"),
    lambda v: v("ffn_out"),
    residual_source=lambda v: v("attn_post_norm") + v("ffn_out"),
    residual_before_mixer=lambda v: v.before() + v("ffn_out"),
)

# --- delta net ------------------------------------------------------------------------------------------------

_linear("linear_attn_qkv_mixed", "ssm", "ssm", "attn_qkv", "attn_norm")
_linear("z", "ssm", "ssm", "attn_gate", "attn_norm")
_linear("alpha", "ssm", "ssm", "ssm_alpha", "attn_norm")
_linear("linear_attn_out", "ssm", "ssm", "ssm_out", "final_output")
_add("qkv_mixed_transposed", "ssm", "ssm", lambda v: v("linear_attn_qkv_mixed"), alias=True)
for _name in ("state_predelta", "conv_states_reshaped"):
    _add(_name, "ssm", "ssm", _nothing, source=True)
_add(
    "beta",
    "ssm",
    "ssm",
    lambda v: v.linear("ssm_beta", v("attn_norm"))[..., None],
    weight="ssm_beta",
    linear=True,
)


def _padded(v: Any) -> np.ndarray:
    mixed = v("linear_attn_qkv_mixed")
    return np.concatenate([v.state("conv_states_reshaped", (v.facts.conv_kernel - 1, mixed.shape[1])), mixed])


def _conv(v: Any, padded: np.ndarray | None = None, kernel: np.ndarray | None = None) -> np.ndarray:
    return f.causal_conv(
        _padded(v) if padded is None else padded, v.weight("ssm_conv1d") if kernel is None else kernel
    )


def _fit_conv(v: Any, y: np.ndarray) -> Mapping[str, np.ndarray]:
    padded, width = _padded(v), v.facts.conv_kernel
    shifted = np.stack([padded[j : j + len(y)] for j in range(width)], axis=-1).transpose(
        1, 0, 2
    )  # (C, T, W)
    kernel = (np.linalg.pinv(shifted, rcond=1e-9) @ y.T[:, :, None])[..., 0]
    energy = (shifted**2).sum(axis=(1, 2))
    return {"ssm_conv1d": np.where(np.isnan(known(energy))[:, None], np.nan, kernel)}


def _shifted(v: Any, by: int) -> np.ndarray:
    padded = _padded(v)
    return (
        np.roll(padded, by, axis=0) if by < 0 else np.concatenate([np.zeros_like(padded[:by]), padded[:-by]])
    )


def _fresh(v: Any, fill: str) -> np.ndarray:
    """The conv input with its history wrong: zeros although there was some, or the first row repeated."""
    padded, past = _padded(v).copy(), v.facts.conv_kernel - 1
    padded[:past] = padded[past] if fill == "edge" else padded[:past][::-1] if fill == "reversed" else 0
    return padded


_add("conv_input", "ssm", "ssm", _padded, alias=True)
_add(
    "conv_state_last",
    "ssm",
    "ssm",
    lambda v: _padded(v)[1 - v.facts.conv_kernel :],
    variants={
        "token-shift": lambda v: _padded(v)[-v.facts.conv_kernel : -1],
        "state-reversed": lambda v: _padded(v)[1 - v.facts.conv_kernel :][::-1],
        "stale-state": lambda v: _padded(v)[: v.facts.conv_kernel - 1],
    },
)
_add(
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
_add(
    "conv_output_silu",
    "ssm",
    "ssm",
    lambda v: f.silu(v("conv_output_raw")),
    variants={
        "missing-silu": lambda v: v("conv_output_raw"),
        "sigmoid-for-silu": lambda v: f.sigmoid(v("conv_output_raw")),
        "gelu-for-silu": lambda v: f.gelu(v("conv_output_raw")),
        "relu-for-silu": lambda v: np.maximum(v("conv_output_raw"), 0),
        "double-silu": lambda v: f.silu(f.silu(v("conv_output_raw"))),
    },
)


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
    _add(
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
    _add(
        _name,
        "ssm",
        "ssm",
        lambda v, source=_source: _l2(v, v(source)),
        choices=_L2,
        variants={
            "sum-for-mean": lambda v, source=_source: f.rms(v(source), v.facts.eps),
            "missing-norm": lambda v, source=_source: v(source),
            "norm-axis": lambda v, source=_source: f.l2(flat(v(source)), v.facts.eps).reshape(
                v(source).shape
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


def _rate(v: Any) -> np.ndarray:
    return f.softplus(v("alpha") + v.weight("ssm_dt.bias"))


def _fit_bias(v: Any, y: np.ndarray) -> Mapping[str, np.ndarray]:
    before = y + np.log(-np.expm1(-np.maximum(y, 1e-30)))  # softplus undone
    return {"ssm_dt.bias": np.median(before - v("alpha"), axis=0)}


_add(
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
        "missing-softplus": lambda v: v("alpha") + v.weight("ssm_dt.bias"),
        "relu-for-softplus": lambda v: np.maximum(v("alpha") + v.weight("ssm_dt.bias"), 0),
        "sigmoid-for-softplus": lambda v: f.sigmoid(v("alpha") + v.weight("ssm_dt.bias")),
        "double-softplus": lambda v: f.softplus(_rate(v)),
    },
)
_add(
    "gate",
    "ssm",
    "ssm",
    lambda v: v("a_softplus") * v.weight("ssm_a"),
    weight="ssm_a",
    fit=_fit_gain("ssm_a", lambda v: v("a_softplus")),
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
_SIGMOID_VARIANTS = {
    "missing-sigmoid": lambda x: x,
    "double-sigmoid": lambda x: f.sigmoid(f.sigmoid(x)),
    "silu-for-sigmoid": f.silu,
    "sigmoid-sign": lambda x: f.sigmoid(-x),
    "twice-sigmoid": lambda x: 2 * f.sigmoid(x),
    "tanh-for-sigmoid": np.tanh,
    "softmax-for-sigmoid": lambda x: f.softmax(flat(x)).reshape(x.shape),
}


def _sigmoid(name: str, kind: str, klass: str, source: str) -> None:
    _add(
        name,
        kind,
        klass,
        lambda v: f.sigmoid(v(source)),
        variants={
            cause: (lambda v, change=change: change(v(source))) for cause, change in _SIGMOID_VARIANTS.items()
        },
    )


_sigmoid("beta_sigmoid", "ssm", "ssm", "beta")

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
    view: Any, /, *, out: int, scale: Any = None, other_heads: bool = False, **twist: Any
) -> np.ndarray:
    """Output (out=0) or last state (out=1) of the delta rule; keywords make the misread forms.

    `scale`, `beta`, `g`, `state`, `k`, `q`: functions from the right value to the one used.
    """
    change = {name: twist.pop(name, None) or (lambda x: x) for name in ("q", "k", "v", "g", "beta", "state")}
    values = heads(view("v_conv_predelta"), view.facts.value_dim)
    hv = values.shape[1]
    q, k = (heads(view(f"{part}_conv_predelta"), view.facts.key_dim) for part in "qk")
    read = _key_head(view, k.shape[1], hv, other_heads)
    factor = scale if scale is not None else 1.0 if view.facts.query_scaled else q.shape[-1] ** -0.5
    state = view.state("state_predelta", (hv, values.shape[-1], k.shape[-1]))
    o, last = f.delta_rule(
        change["q"](q[:, read] * q.dtype.type(factor)),
        change["k"](k[:, read]),
        change["v"](values),
        change["g"](flat(view("gate"))),
        change["beta"](flat(view("beta_sigmoid"))),
        change["state"](state),
        **twist,
    )
    return o if out == 0 else last


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def _delayed(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def _by_chunk(v: Any, out: int, carry: Callable[[np.ndarray], np.ndarray], chunk: int = 64) -> np.ndarray:
    """The delta rule run chunk by chunk, the state between chunks mistreated."""
    outputs, state = [], None
    for start in range(0, len(v("v_conv_predelta")), chunk):
        part = _Rows(v, slice(start, start + chunk), None if state is None else carry(state))
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


def _delta_variants(out: int) -> dict[str, Run]:
    def twist(**changes: Any) -> Run:
        return lambda v: delta(v, out=out, **changes)

    def scaled(power: float) -> Run:
        return lambda v: delta(v, out=out, scale=v.facts.key_dim**power)

    return {
        "missing-scale": scaled(0.0),
        "double-scale": scaled(-1.0),
        "head-permutation": twist(other_heads=True),
        "decay, none": twist(g=lambda g: 0 * g),
        "decay, sign": twist(g=lambda g: -g),
        "decay, not exponentiated": twist(g=lambda g: np.log(np.maximum(np.abs(g), 1e-30))),
        "decay, one token late": twist(g=_delayed),
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
        "update-order": twist(read_first=True),
        "update-order, before the decay": twist(read_before=True),
        "state-transposed": twist(state=_transposed),
        "state-reset": twist(state=lambda s: 0 * s),
        "state-precision, bf16": twist(rounding=bf16),
        "state-precision, f16": twist(rounding=f16),
        "token-shift": twist(v=_delayed),
        "token-shift, keys": twist(k=_delayed),
        "swapped-q-k": lambda v: delta(_Swapped(v, "q_conv_predelta", "k_conv_predelta"), out=out),
        "missing-norm": lambda v: delta(
            _Renamed(v, {"q_conv_predelta": "q_conv", "k_conv_predelta": "k_conv"}), out=out
        ),
        "chunk-boundary": lambda v: _by_chunk(v, out, carry=lambda s: 0 * s),
        "chunk-boundary, state transposed": lambda v: _by_chunk(v, out, carry=_transposed),
        **({"state-transposed, as stored": lambda v: _transposed(delta(v, out=1))} if out else {}),
        **({"stale-state": lambda v: v.state("state_predelta", delta(v, out=1).shape)} if out else {}),
    }


class _Renamed:
    """A view in which some taps go by another tap's name."""

    def __init__(self, v: Any, names: Mapping[str, str]):
        self._v, self._names = v, names
        self.facts, self.state = v.facts, v.state

    def __call__(self, name: str) -> np.ndarray:
        return self._v(self._names.get(name, name))


def _Swapped(v: Any, a: str, b: str) -> _Renamed:  # noqa: N802 - reads as the class it returns
    return _Renamed(v, {a: b, b: a})


_add(
    "attn_output",
    "ssm",
    "ssm",
    lambda v: delta(v, out=0),
    choices=_DELTA_CHOICES,
    variants=_delta_variants(0),
)
_add(
    "new_state", "ssm", "ssm", lambda v: delta(v, out=1), choices=_DELTA_CHOICES, variants=_delta_variants(1)
)


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
    "missing-silu": lambda o, z, w, eps: f.rms(o, eps) * w * z,
    "sigmoid-for-silu": lambda o, z, w, eps: f.rms(o, eps) * w * f.sigmoid(z),
    "gelu-for-silu": lambda o, z, w, eps: f.rms(o, eps) * w * f.gelu(z),
    "missing-gate": lambda o, z, w, eps: f.rms(o, eps) * w,
    "norm-order": lambda o, z, w, eps: f.rms(o * f.silu(z), eps) * w,
    "missing-norm": lambda o, z, w, eps: o * w * f.silu(z),
    "missing-norm-weight": lambda o, z, w, eps: f.rms(o, eps) * f.silu(z),
    "double-norm-offset": lambda o, z, w, eps: f.rms(o, eps) * (w + 1) * f.silu(z),
    "missing-norm-offset": lambda o, z, w, eps: f.rms(o, eps) * (w - 1) * f.silu(z),
    "sum-for-mean": lambda o, z, w, eps: f.l2(o, eps) * w * f.silu(z),
    "norm-axis": lambda o, z, w, eps: f.rms(flat(o), eps).reshape(o.shape) * w * f.silu(z),
    "layer-norm": lambda o, z, w, eps: f.rms(o - o.mean(-1, keepdims=True), eps) * w * f.silu(z),
    "double-silu": lambda o, z, w, eps: f.rms(o, eps) * w * f.silu(f.silu(z)),
    **{
        f"eps={eps:g}": (lambda o, z, w, _, eps=eps: f.rms(o, eps) * w * f.silu(z))
        for eps in (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
    },
}
_add(
    "final_output",
    "ssm",
    "ssm",
    _gated_norm,
    weight="ssm_norm",
    fit=_fit_out_norm,
    choices=_EPS,
    variants={
        cause: (lambda v, change=change: _gated_norm(v, change))
        for cause, change in _GATED_NORM_FAULTS.items()
    },
)

# --- attention ------------------------------------------------------------------------------------------------

_linear("Qcur_full", "attention", "attention", "attn_q", "attn_norm")
_linear("attn_output", "attention", "attention", "attn_output", "attn_gated")
_add(
    "Vcur",
    "attention",
    "attention",
    lambda v: heads(v.linear("attn_v", v("attn_norm")), v.facts.head_dim),
    weight="attn_v",
    linear=True,
)
_add(  # the key projection: llama.cpp's name for it is taken over by the rotated keys
    "Kcur_projected",
    "attention",
    "attention",
    lambda v: heads(v.linear("attn_k", v("attn_norm")), v.facts.head_dim),
    weight="attn_k",
    linear=True,
)


def _query_and_gate(v: Any, part: int) -> np.ndarray:
    return heads(v("Qcur_full"), 2 * v.facts.head_dim).reshape(len(v("Qcur_full")), -1, 2, v.facts.head_dim)[
        :, :, part
    ]


def _split_flat(v: Any, part: int) -> np.ndarray:
    """The gate as the second half of the whole projection."""
    return heads(np.split(v("Qcur_full"), 2, axis=-1)[part], v.facts.head_dim)


def _interleaved(v: Any, part: int) -> np.ndarray:
    return heads(v("Qcur_full")[:, part::2], v.facts.head_dim)


for _name, _index, _shape in (("Qcur_reshaped", 0, lambda x: x), ("gate_reshaped", 1, flat)):
    _add(
        _name,
        "attention",
        "attention",
        lambda v, i=_index, shape=_shape: shape(_query_and_gate(v, i)),
        variants={
            "gate-layout": lambda v, i=_index, shape=_shape: shape(_split_flat(v, i)),
            "gate-layout, swapped": lambda v, i=_index, shape=_shape: shape(_query_and_gate(v, 1 - i)),
            "gate-layout, flat and swapped": lambda v, i=_index, shape=_shape: shape(_split_flat(v, 1 - i)),
            "gate-layout, element by element": lambda v, i=_index, shape=_shape: shape(_interleaved(v, i)),
        },
    )
_sigmoid("gate_sigmoid", "attention", "attention", "gate_reshaped")
_norm("Qcur_normed", "attention", lambda v: v("Qcur_reshaped"), "attn_q_norm")
_norm("Kcur_normed", "attention", lambda v: v("Kcur_projected"), "attn_k_norm")


def angles(v: Any, tokens: int) -> np.ndarray:
    """(T, M): from the model's facts, or what the reference's own rotation says."""
    facts = v.facts
    if not facts.rope_base:
        return v.weight("rope.angle")
    i = np.arange(facts.rotary // 2)
    turning = np.array([facts.rope_turns(pair) for pair in i])
    frequency = facts.rope_base ** (-2.0 * i / facts.rotary) * turning
    if v.dtype == np.float32:  # as engines build it: one f32 product after another
        ratio = np.float32(facts.rope_base ** (-2.0 / facts.rotary))
        frequency = (
            np.cumprod(np.concatenate([[np.float32(1)], np.full(len(i) - 1, ratio)]), dtype=np.float32)
            * turning
        )
    position = np.arange(facts.first_position, facts.first_position + tokens)
    return position[:, None].astype(v.dtype) * frequency.astype(v.dtype)


def _rope(v: Any, name: str, **change: Any) -> np.ndarray:
    x = heads(v(f"{name}_normed"), v.facts.head_dim)
    angle = angles(v, len(x))
    angle = change["angle"](angle) if "angle" in change else angle
    return f.rotate(x, angle, adjacent=v.facts.adjacent != change.get("other_pairing", False))


def _fit_rope(name: str) -> Fit:
    def fit(v: Any, y: np.ndarray) -> Mapping[str, np.ndarray]:
        x = heads(v(f"{name}_normed"), v.facts.head_dim)
        return {"rope.angle": fitted_angles(x, y.reshape(x.shape), v.facts.rotary // 2, v.facts.adjacent)}

    return fit


def fitted_angles(x: np.ndarray, y: np.ndarray, pairs: int, adjacent: bool) -> np.ndarray:
    """(T, M): the angles that turn x (T, N, H) into y, least squares over heads."""
    first, second = f.pair_dims(pairs, adjacent)
    a, b, c, d = x[..., first], x[..., second], y[..., first], y[..., second]
    return np.arctan2((a * d - b * c).sum(axis=1), (a * c + b * d).sum(axis=1))


def _full_rotation(v: Any, name: str) -> np.ndarray:
    """Every dim of the head rotated, the frequencies spread over all of them."""
    x = heads(v(f"{name}_normed"), v.facts.head_dim)
    i = np.arange(x.shape[-1] // 2)
    angle = np.arange(v.facts.first_position, v.facts.first_position + len(x))[:, None] * _base(v) ** (
        -2.0 * i / x.shape[-1]
    )
    return f.rotate(x, angle, adjacent=v.facts.adjacent)


def _padded_rotation(v: Any, name: str) -> np.ndarray:
    """Right angles, but halves of the whole head paired: what padding the tables to the head dim gives."""
    x = heads(v(f"{name}_normed"), v.facts.head_dim)
    angle = angles(v, len(x))
    missing = x.shape[-1] // 2 - angle.shape[1]
    return f.rotate(x, np.pad(angle, ((0, 0), (0, missing))), adjacent=v.facts.adjacent)


def _half_rotary(v: Any, name: str) -> np.ndarray:
    facts = dataclasses.replace(v.facts, rotary_dims=max(2, v.facts.rotary // 2), sections=())
    return _rope(_WithFacts(v, facts), name)


def _base(v: Any) -> float:
    if not v.facts.rope_base:
        raise Missing("rope base")
    return v.facts.rope_base


class _WithFacts:
    """A view with other facts."""

    def __init__(self, v: Any, facts: Any):
        self._v, self.facts, self.dtype = v, facts, v.dtype
        self.weight = v.weight

    def __call__(self, name: str) -> np.ndarray:
        return self._v(name)


def _other_base(v: Any, name: str, base: float) -> np.ndarray:
    _base(v)
    return _rope(_WithFacts(v, dataclasses.replace(v.facts, rope_base=base)), name)


def _moved(v: Any, name: str, by: int) -> np.ndarray:
    _base(v)
    facts = dataclasses.replace(v.facts, first_position=v.facts.first_position + by)
    return _rope(_WithFacts(v, facts), name)


_BASES = (1e4, 5e5, 1e6, 1e7, 1e5, 5e6, 1e8, 1.5e5)


def _rope_choices(name: str) -> Callable[[Any, np.ndarray], Sequence[Mapping[str, Any]]]:
    """What the facts say; else the rotation seen in the reference: how many dims move, paired either way."""

    def choices(v: Any, y: np.ndarray) -> Sequence[Mapping[str, Any]]:
        x = heads(v(f"{name}_normed"), v.facts.head_dim)
        moved = np.abs(y.reshape(x.shape) - x).max(axis=(0, 1)) > 1e-5 * np.abs(x).max()
        dims = int(np.flatnonzero(moved).max(initial=-1)) + 1
        dims += dims % 2
        seen = [{"rotary_dims": dims, "adjacent": adjacent, "sections": ()} for adjacent in (False, True)]
        based = [
            {**fact, "rope_base": base}
            for fact in seen
            if (base := _seen_base(x, y.reshape(x.shape), dims, fact["adjacent"]))
        ]
        return ({}, *based, *({**fact, "rope_base": 0.0} for fact in seen))

    return choices


def _seen_base(x: np.ndarray, y: np.ndarray, dims: int, adjacent: bool) -> float:
    """The rope base that turns x into y, from the second pair's angle over the first few tokens; 0 for none."""
    if dims < 4 or len(x) < 2:
        return 0.0
    angle = fitted_angles(x[:2], y[:2], dims // 2, adjacent)
    turn = float(angle[1, 1] - angle[0, 1])
    return float(f"{turn ** (-dims / 2):.3g}") if 0 < turn < 1 else 0.0


for _name in ("Qcur", "Kcur"):
    _add(
        _name,
        "attention",
        "attention",
        lambda v, name=_name: _rope(v, name),
        fit=_fit_rope(_name),
        choices=_rope_choices(_name),
        variants={
            "missing-rope": lambda v, name=_name: heads(v(f"{name}_normed"), v.facts.head_dim),
            "rope-pairing": lambda v, name=_name: _rope(v, name, other_pairing=True),
            "rope-sign": lambda v, name=_name: _rope(v, name, angle=lambda a: -a),
            "double-rope": lambda v, name=_name: _rope(v, name, angle=lambda a: 2 * a),
            "rope-scale": lambda v, name=_name: _rope(v, name, angle=lambda a: a / 2),
            "rope-partial": lambda v, name=_name: _full_rotation(v, name),
            "rope-partial, halves of the whole head paired": lambda v, name=_name: _padded_rotation(v, name),
            "rope-partial, half as many dims": lambda v, name=_name: _half_rotary(v, name),
            "position-shift": lambda v, name=_name: _moved(v, name, 1),
            "position-shift, -1": lambda v, name=_name: _moved(v, name, -1),
            **{
                f"rope-base={base:g}": (lambda v, name=_name, base=base: _other_base(v, name, base))
                for base in _BASES
            },
        },
    )


def _read(v: Any, queries: int, kvs: int, other: bool = False) -> np.ndarray:
    head = np.arange(queries)
    return head % kvs if other else head // (queries // kvs)


def _qkv(v: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(heads(v(name), v.facts.head_dim) for name in ("Qcur", "Kcur", "Vcur"))


def _all_scores(v: Any, other_heads: bool = False) -> np.ndarray:
    if v.facts.cut or v.facts.first_position:
        raise Missing("the keys of earlier tokens")
    q, k = heads(v("Qcur"), v.facts.head_dim), heads(v("Kcur"), v.facts.head_dim)
    return f.scores(v.kv(q), v.kv(k), _read(v, q.shape[1], k.shape[1], other_heads))


def _kq(v: Any, other_heads: bool = False) -> np.ndarray:
    return visible(_all_scores(v, other_heads))


def visible(kq: np.ndarray) -> np.ndarray:
    """Scores (T, N, S) with those of keys to come set to zero: engines may or may not compute them."""
    if kq.ndim != 3 or kq.shape[0] != kq.shape[2]:
        return kq
    return np.where(f.causal_mask(len(kq), len(kq))[:, None], kq, kq.dtype.type(0))


def _probabilities(v: Any, *, scale: float | None = None, mask: Callable | None = None) -> np.ndarray:
    """Softmax of the scores; another `mask` (of the scores, to bool (T, S)) may see keys to come."""
    kq = v("kq") if mask is None else _all_scores(v)
    scale = v.facts.head_dim**-0.5 if scale is None else scale
    seen = f.causal_mask(kq.shape[0], kq.shape[2]) if mask is None else mask(kq)
    return f.softmax(np.where(seen[:, None], kq * kq.dtype.type(scale), -np.inf))


def _window(kq: np.ndarray, width: int) -> np.ndarray:
    causal = f.causal_mask(kq.shape[0], kq.shape[2])
    return causal & ~np.tril(causal, kq.shape[2] - kq.shape[0] - width)


def _values(v: Any, other_heads: bool = False) -> np.ndarray:
    if v.facts.cut or v.facts.first_position:
        raise Missing("the values of earlier tokens")
    p, values = v("kq_soft_max"), heads(v("Vcur"), v.facts.head_dim)
    return f.mix(
        v.kv(p[:, :, : len(values)]), v.kv(values), _read(v, p.shape[1], values.shape[1], other_heads)
    )


_SOFTMAX_FAULTS: dict[str, Run] = {
    "missing-scale": lambda v: _probabilities(v, scale=1.0),
    "double-scale": lambda v: _probabilities(v, scale=1 / v.facts.head_dim),
    "mask": lambda v: _probabilities(v, mask=lambda kq: np.ones((kq.shape[0], kq.shape[2]), bool)),
    "mask, one key too few": lambda v: _probabilities(v, mask=_strict),
    "mask, one key too many": lambda v: _probabilities(v, mask=_lax),
    "missing-softmax": lambda v: np.where(
        f.causal_mask(v("kq").shape[0], v("kq").shape[2])[:, None], v("kq") * v.facts.head_dim**-0.5, 0
    ),
    "soft-cap": lambda v: f.softmax(
        np.where(
            f.causal_mask(v("kq").shape[0], v("kq").shape[2])[:, None],
            50 * np.tanh(v("kq") * v.facts.head_dim**-0.5 / 50),
            -np.inf,
        )
    ),
    **{
        f"mask, window {width}": (lambda v, width=width: _probabilities(v, mask=lambda kq: _window(kq, width)))
        for width in (4, 8, 16, 32, 64, 128, 256, 512, 1024)
    },
}


def _strict(kq: np.ndarray) -> np.ndarray:
    """Keys before the query only; the first query keeps its own."""
    causal = f.causal_mask(kq.shape[0], kq.shape[2])
    strict = np.roll(causal, 1, axis=0)
    strict[0] = causal[0]
    return strict


def _lax(kq: np.ndarray) -> np.ndarray:
    causal = f.causal_mask(kq.shape[0], kq.shape[2])
    return np.concatenate([causal[1:], causal[-1:]])


_add(
    "kq",
    "attention",
    "attention",
    _kq,
    variants={
        "head-permutation": lambda v: _kq(v, other_heads=True),
        "missing-scale": lambda v: _kq(v) * v.facts.head_dim**-0.5,
    },
)
_add("kq_soft_max", "attention", "attention", _probabilities, variants=_SOFTMAX_FAULTS)
_VALUE_FAULTS: dict[str, Run] = {
    "head-permutation": lambda v: _values(v, other_heads=True),
    "token-shift": lambda v: _values(_Mapped(v, "Vcur", _delayed)),
}


class _Mapped:
    """A view in which one tap is changed."""

    def __init__(self, v: Any, name: str, change: Callable[[np.ndarray], np.ndarray]):
        self._v, self._name, self._change = v, name, change
        self.facts, self.kv, self.dtype = v.facts, v.kv, v.dtype

    def __call__(self, name: str) -> np.ndarray:
        return self._change(self._v(name)) if name == self._name else self._v(name)


_add("kqv", "attention", "attention", _values, variants=_VALUE_FAULTS)


class _Recomputed:
    """A view that computes scores, probabilities and mix itself, one of them by another formula."""

    def __init__(self, v: Any, changes: Mapping[str, Run]):
        self._v, self._changes = v, changes
        self.facts, self.kv, self.dtype = v.facts, v.kv, v.dtype
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, name: str) -> np.ndarray:
        if name not in ("kq", "kq_soft_max", "kqv"):
            return self._v(name)
        if name not in self._known:
            self._known[name] = (self._changes.get(name) or OPS["attention", name].run)(self)
        return self._known[name]


def _attend(**changes: Run) -> Run:
    return lambda v: flat(_Recomputed(v, changes)("kqv"))


_add(
    "attn_pregate",
    "attention",
    "attention",
    lambda v: flat(v("kqv")),
    variants={
        **{cause: _attend(kq_soft_max=run) for cause, run in _SOFTMAX_FAULTS.items()},
        "head-permutation": _attend(
            kq=lambda v: _kq(v, other_heads=True), kqv=lambda v: _values(v, other_heads=True)
        ),
        "head-permutation, keys": _attend(kq=lambda v: _kq(v, other_heads=True)),
        "head-permutation, values": _attend(kqv=lambda v: _values(v, other_heads=True)),
        "token-shift": _attend(kqv=_VALUE_FAULTS["token-shift"]),
    },
)
_add(
    "attn_gated",
    "attention",
    "attention",
    lambda v: flat(v("attn_pregate")) * flat(v("gate_sigmoid")),
    variants={
        "missing-gate": lambda v: flat(v("attn_pregate")),
        "missing-sigmoid": lambda v: flat(v("attn_pregate")) * flat(v("gate_reshaped")),
        "silu-for-sigmoid": lambda v: flat(v("attn_pregate")) * f.silu(flat(v("gate_reshaped"))),
        "double-sigmoid": lambda v: flat(v("attn_pregate")) * f.sigmoid(flat(v("gate_sigmoid"))),
        "double-gate": lambda v: flat(v("attn_pregate")) * flat(v("gate_sigmoid")) ** 2,
        "gate-layout": lambda v: flat(v("attn_pregate")) * f.sigmoid(flat(_split_flat(v, 1))),
        "gate-layout, the query": lambda v: flat(v("attn_pregate")) * f.sigmoid(flat(_query_and_gate(v, 0))),
    },
)

# --- feed-forward ---------------------------------------------------------------------------------------------

_linear("ffn_gate", "", "ffn", "ffn_gate", "attn_post_norm")
_linear("ffn_up", "", "ffn", "ffn_up", "attn_post_norm")
_linear("ffn_out", "", "ffn", "ffn_down", "ffn_swiglu")


def _swiglu(name: str, kind: str, klass: str, gate: str, up: str) -> None:
    _add(
        name,
        kind,
        klass,
        lambda v: f.silu(v(gate)) * v(up),
        variants={
            "swapped-gate-up": lambda v: v(gate) * f.silu(v(up)),
            "missing-silu": lambda v: v(gate) * v(up),
            "gelu-for-silu": lambda v: f.gelu(v(gate)) * v(up),
            "relu-for-silu": lambda v: np.maximum(v(gate), 0) * v(up),
            "sigmoid-for-silu": lambda v: f.sigmoid(v(gate)) * v(up),
            "missing-gate": lambda v: v(up),
            "missing-up": lambda v: f.silu(v(gate)),
            "double-silu": lambda v: f.silu(f.silu(v(gate))) * v(up),
        },
    )


_swiglu("ffn_swiglu", "", "ffn", "ffn_gate", "ffn_up")
