"""Operations that several layers share in form: products, norms, residual sums, gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scarlet_jax.tools.parity import activations
from scarlet_jax.tools.parity import formulas as f
from scarlet_jax.tools.parity.arithmetic import bf16
from scarlet_jax.tools.parity.graph import Fit, Missing, Run, add, flat, known

EPS = ({}, {"eps": 1e-6}, {"eps": 1e-5})


def nothing(v: Any) -> np.ndarray:
    """A tap that follows from nothing in this run: a state that it started from."""
    raise Missing(f"what layer {v.layer} started from")


def linear(name: str, kind: str, klass: str, stem: str, source: str | Run) -> None:
    """One product: the tap `source`, or what it gives, by the weight `stem`."""
    entering = (lambda v: v(source)) if isinstance(source, str) else source
    add(name, kind, klass, lambda v: v.linear(stem, entering(v)), weight=stem, linear=True)


def normed(v: Any) -> np.ndarray:
    """What enters a feed-forward network: `ffn_norm` where the norm goes by that name."""
    return v("ffn_norm" if v.has("ffn_norm") else "attn_post_norm")


def fit_gain(stem: str, source: Callable[[Any], np.ndarray]) -> Fit:
    """The per-channel weight that turns `source` into the output, least squares over tokens and heads."""

    def fit(v: Any, y: np.ndarray) -> Mapping[str, np.ndarray]:
        x = source(v).reshape(-1, y.shape[-1])
        energy = (x * x).sum(axis=0)
        return {stem: (x * y.reshape(x.shape)).sum(axis=0) / known(energy)}

    return fit


def _norm_variants(source: Callable[[Any], np.ndarray], stem: str) -> dict[str, Run]:
    def with_eps(eps: float) -> Run:
        return lambda v: f.rms(source(v), eps) * v.weight(stem)

    def unweighted(v: Any) -> np.ndarray:
        return f.rms(source(v), v.facts.eps)

    def centred(v: Any) -> np.ndarray:
        x = source(v)
        return f.rms(x - x.mean(axis=-1, keepdims=True), v.facts.eps) * v.weight(stem)

    def outside(v: Any) -> np.ndarray:
        x = source(v)
        root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
        return x / (root + v.facts.eps) * v.weight(stem)

    def over_tokens(v: Any) -> np.ndarray:
        x = source(v)
        return x / np.sqrt(np.mean(x * x, axis=0, keepdims=True) + v.facts.eps) * v.weight(stem)

    def over_all_heads(v: Any) -> np.ndarray:
        x = source(v)
        return f.rms(flat(x), v.facts.eps).reshape(x.shape) * v.weight(stem)

    return {
        "missing-norm-offset": lambda v: unweighted(v) * (v.weight(stem) - 1),
        "double-norm-offset": lambda v: unweighted(v) * (v.weight(stem) + 1),
        "missing-norm-weight": unweighted,
        "double-norm-weight": lambda v: unweighted(v) * v.weight(stem) ** 2,
        "missing-norm": lambda v: source(v) * v.weight(stem),
        "missing-norm, missing-norm-weight": source,
        "layer-norm": centred,
        "sum-for-mean": lambda v: f.l2(source(v), v.facts.eps) * v.weight(stem),
        "norm-axis": over_all_heads,
        "norm-axis, over the tokens": over_tokens,
        "norm-order, the weight before the norm": lambda v: f.rms(source(v) * v.weight(stem), v.facts.eps),
        "weight-precision": lambda v: unweighted(v) * bf16(v.weight(stem)),
        "offset-precision": lambda v: unweighted(v) * (1 + bf16(v.weight(stem) - 1)),
        "eps": outside,
        **{f"eps={eps:g}": with_eps(eps) for eps in (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)},
    }


def norm(name: str, kind: str, source: Callable[[Any], np.ndarray], stem: str, **rest: Any) -> None:
    """RMS norm of `source` with the weight `stem`, and its misreadings."""
    add(
        name,
        kind,
        "norm",
        lambda v: f.rms(source(v), v.facts.eps) * v.weight(stem),
        weight=stem,
        fit=fit_gain(stem, lambda v: f.rms(source(v), v.facts.eps)),
        choices=EPS,
        variants=_norm_variants(source, stem),
        normed=lambda v: (source(v), v.weight(stem)),
        **rest,
    )


def bare_norm(name: str, kind: str, source: Callable[[Any], np.ndarray]) -> None:
    """RMS norm of `source` before its weight."""
    add(
        name,
        kind,
        "norm",
        lambda v: f.rms(source(v), v.facts.eps),
        choices=EPS,
        alias=True,
        normed=lambda v: (source(v), 1.0),
        variants={
            "sum-for-mean": lambda v: f.l2(source(v), v.facts.eps),
            "missing-norm": source,
            **{
                f"eps={eps:g}": (lambda v, eps=eps: f.rms(source(v), eps))
                for eps in (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
            },
        },
    )


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


def residual(name: str, kind: str, klass: str, stream, branch, **more: Run) -> None:
    """A residual sum, and what may be added instead; `more` are variants."""
    variants = {key.replace("_", "-"): run for key, run in more.items()}
    add(
        name,
        kind,
        klass,
        lambda v: stream(v) + branch(v),
        variants={**_residual_variants(stream, branch), **variants},
        summed=lambda v: (stream(v), branch(v)),
    )


def elementwise(
    name: str, kind: str, klass: str, function: str, x: Run, factor: Run | None = None, **rest: Any
) -> None:
    """An elementwise `function` of x, times a factor, and what may be taken for that function."""

    def times(change: activations.Function) -> Run:
        return lambda v: change(x(v)) if factor is None else change(x(v)) * factor(v)

    variants = {cause: times(change) for cause, change in activations.mistaken(function).items()}
    variants |= rest.pop("variants", {})
    add(
        name,
        kind,
        klass,
        times(activations.FUNCTIONS[function]),
        variants=variants,
        pointwise=lambda v: (x(v), 1.0 if factor is None else factor(v)),
        **rest,
    )


def sigmoid(name: str, kind: str, klass: str, source: str) -> None:
    """A sigmoid gate of `source`."""
    elementwise(name, kind, klass, "sigmoid", lambda v: v(source))


def swiglu(name: str, kind: str, klass: str, gate: str, up: str) -> None:
    """SiLU of one tap times another."""
    elementwise(
        name,
        kind,
        klass,
        "silu",
        lambda v: v(gate),
        lambda v: v(up),
        variants={
            "swapped-gate-up": lambda v: v(gate) * f.silu(v(up)),
            "missing-gate": lambda v: v(up),
            "missing-up": lambda v: f.silu(v(gate)),
            "up-offset": lambda v: f.silu(v(gate)) * (v(up) + 1),
            "activation-order": lambda v: f.silu(v(gate) * v(up)),
        },
    )


def delayed(x: np.ndarray) -> np.ndarray:
    """Rows one token late, zeros first."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])
