"""Full attention: the split of queries and gates, norms, rotation, scores, mix (fact sheet section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from scarlet_jax.tools.parity import activations
from scarlet_jax.tools.parity import formulas as f
from scarlet_jax.tools.parity.arithmetic import bf16, f16
from scarlet_jax.tools.parity.graph import OPS, Fit, Missing, Run, add, flat, heads, visible
from scarlet_jax.tools.parity.ops_shared import delayed, linear, norm, sigmoid

linear("Qcur_full", "attention", "attention", "attn_q", "attn_norm")
linear("attn_output", "attention", "attention", "attn_output", "attn_gated")
add(
    "Vcur",
    "attention",
    "attention",
    lambda v: heads(v.linear("attn_v", v("attn_norm")), v.facts.head_dim),
    weight="attn_v",
    linear=True,
)
add(  # the key projection: llama.cpp's name for it is taken over by the rotated keys
    "Kcur_projected",
    "attention",
    "attention",
    lambda v: heads(v.linear("attn_k", v("attn_norm")), v.facts.head_dim),
    weight="attn_k",
    linear=True,
)


def _gated(v: Any) -> bool:
    """Whether the query projection holds gates too: it is wider than what the heads give."""
    width = flat(v("Qcur_full")).shape[1]
    for name in ("Qcur_reshaped", "Qcur_normed", "Qcur", "attn_pregate"):
        if v.has(name):
            shape = v.run.taps[v.tap_name(name)].shape
            return int(np.prod(shape[1:])) < width
    return True


def _query_and_gate(v: Any, part: int) -> np.ndarray:
    if not part and not _gated(v):
        return heads(v("Qcur_full"), v.facts.head_dim)
    return heads(v("Qcur_full"), 2 * v.facts.head_dim).reshape(len(v("Qcur_full")), -1, 2, v.facts.head_dim)[
        :, :, part
    ]


def _split_flat(v: Any, part: int) -> np.ndarray:
    """The gate as the second half of the whole projection."""
    return heads(np.split(v("Qcur_full"), 2, axis=-1)[part], v.facts.head_dim)


def _interleaved(v: Any, part: int) -> np.ndarray:
    return heads(v("Qcur_full")[:, part::2], v.facts.head_dim)


for _name, _index, _shape in (("Qcur_reshaped", 0, lambda x: x), ("gate_reshaped", 1, flat)):
    add(
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
sigmoid("gate_sigmoid", "attention", "attention", "gate_reshaped")
norm("Qcur_normed", "attention", lambda v: v("Qcur_reshaped"), "attn_q_norm")
norm("Kcur_normed", "attention", lambda v: v("Kcur_projected"), "attn_k_norm")


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
    adjacent = v.facts.adjacent != change.get("other_pairing", False)
    return f.rotate(x, angle, adjacent=adjacent, tables=change.get("tables", lambda table: table))


def _rope_first(v: Any, name: str) -> np.ndarray:
    """Turned, then normed."""
    raw, stem = ("Qcur_reshaped", "attn_q_norm") if name == "Qcur" else ("Kcur_projected", "attn_k_norm")
    x = heads(v(raw), v.facts.head_dim)
    turned = f.rotate(x, angles(v, len(x)), adjacent=v.facts.adjacent)
    return f.rms(turned, v.facts.eps) * v.weight(stem)


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


def _last_dims(v: Any, name: str) -> np.ndarray:
    """The last dims of a head turned instead of the first."""
    x = heads(v(f"{name}_normed"), v.facts.head_dim)
    turned = f.rotate(np.roll(x, v.facts.rotary, axis=-1), angles(v, len(x)), adjacent=v.facts.adjacent)
    return np.roll(turned, -v.facts.rotary, axis=-1)


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
    add(
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
            "rope-precision, angles in bf16": lambda v, name=_name: _rope(v, name, angle=bf16),
            "rope-precision, angles in f16": lambda v, name=_name: _rope(v, name, angle=f16),
            "rope-precision, tables in bf16": lambda v, name=_name: _rope(v, name, tables=bf16),
            "rope-precision, tables in f16": lambda v, name=_name: _rope(v, name, tables=f16),
            "norm-order, rotated before the norm": lambda v, name=_name: _rope_first(v, name),
            "rope-partial": lambda v, name=_name: _full_rotation(v, name),
            "rope-partial, halves of the whole head paired": lambda v, name=_name: _padded_rotation(v, name),
            "rope-partial, the last dims of a head": lambda v, name=_name: _last_dims(v, name),
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


def all_scores(v: Any, other_heads: bool = False) -> np.ndarray:
    """Scores of every query and key, those to come too; (T, N, S)."""
    if v.facts.cut or v.facts.first_position:
        raise Missing("the keys of earlier tokens")
    q, k = heads(v("Qcur"), v.facts.head_dim), heads(v("Kcur"), v.facts.head_dim)
    return f.scores(v.kv(q), v.kv(k, stored=True), _read(v, q.shape[1], k.shape[1], other_heads))


def _kq(v: Any, other_heads: bool = False) -> np.ndarray:
    return visible(all_scores(v, other_heads))


def _probabilities(v: Any, *, scale: float | None = None, mask: Callable | None = None) -> np.ndarray:
    """Softmax of the scores; another `mask` (of the scores, to bool (T, S)) may see keys to come."""
    kq = v("kq") if mask is None else all_scores(v)
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
        v.kv(p[:, :, : len(values)]),
        v.kv(values, stored=True),
        _read(v, p.shape[1], values.shape[1], other_heads),
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
        f"mask, window {width}": (
            lambda v, width=width: _probabilities(v, mask=lambda kq: _window(kq, width))
        )
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


add(
    "kq",
    "attention",
    "attention",
    _kq,
    variants={
        "head-permutation": lambda v: _kq(v, other_heads=True),
        "missing-scale": lambda v: _kq(v) * v.facts.head_dim**-0.5,
    },
)
add("kq_soft_max", "attention", "attention", _probabilities, variants=_SOFTMAX_FAULTS)
_VALUE_FAULTS: dict[str, Run] = {
    "head-permutation": lambda v: _values(v, other_heads=True),
    "token-shift": lambda v: _values(_Mapped(v, "Vcur", delayed)),
}


class _Mapped:
    """A view in which one tap is changed."""

    def __init__(self, v: Any, name: str, change: Callable[[np.ndarray], np.ndarray]):
        self._v, self._name, self._change = v, name, change
        self.facts, self.kv, self.dtype = v.facts, v.kv, v.dtype

    def __call__(self, name: str) -> np.ndarray:
        return self._change(self._v(name)) if name == self._name else self._v(name)


add("kqv", "attention", "attention", _values, variants=_VALUE_FAULTS)


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


add(
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
add(
    "attn_gated",
    "attention",
    "attention",
    lambda v: flat(v("attn_pregate")) * flat(v("gate_sigmoid")),
    variants={
        "missing-gate": lambda v: flat(v("attn_pregate")),
        **{
            cause: (lambda v, change=change: flat(v("attn_pregate")) * change(flat(v("gate_reshaped"))))
            for cause, change in activations.mistaken("sigmoid").items()
        },
        "double-gate": lambda v: flat(v("attn_pregate")) * flat(v("gate_sigmoid")) ** 2,
        "gate-layout": lambda v: flat(v("attn_pregate")) * f.sigmoid(flat(_split_flat(v, 1))),
        "gate-layout, the query": lambda v: flat(v("attn_pregate")) * f.sigmoid(flat(_query_and_gate(v, 0))),
    },
)
