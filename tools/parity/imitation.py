"""Which arithmetic each engine computes in, found by imitation.

A rounding is believed only when repeating it explains most of what the exact formula leaves over, in the median
of the operations it would touch: that cannot happen by chance, and no fault looks like it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from scarlet_jax.tools.parity import graph, local
from scarlet_jax.tools.parity.arithmetic import KV_ROUNDING, Rounding, bf16, f16
from scarlet_jax.tools.parity.dump import Dump
from scarlet_jax.tools.parity.view import Arithmetic

_CACHES = (*KV_ROUNDING, *(f"{kind}, stored" for kind in KV_ROUNDING))
# What shows how keys and values are kept: attention itself, or the nearest that was dumped.
_ATTENDED = (("kq", "kqv", "attn_pregate"), ("attn_gated",), ("attn_output",), ("attn_residual",), ("l_out",))
_SAMPLED = 10  # operations looked at for each kind of rounding
_EXPLAINED = 0.5  # share of the residual's norm that may be left
_LIKE = (0.3, 3.0)  # a residual of this many times a rounding's own effect is of its size


@dataclasses.dataclass(frozen=True)
class Place:
    """A tap of one side, where its layer is of a known kind."""

    name: str
    op: str
    layer: int | None
    kind: str


def infer(pair: local.Pair, taps: Sequence, dumps: tuple[Dump, Dump], only_ours: Sequence[str] = ()) -> None:
    """Set `pair.arithmetic` and `pair.may_round` for both sides; `only_ours` are taps of ours to look at besides."""
    shown = [t.name for t in taps if t.metrics.norm > 0 and t.op not in ("ffn_moe_topk", "ffn_moe_argsort")]
    few = shown[:: max(1, len(shown) // 24)]
    if not any(pair.sampled):
        pair.grain = (grain(pair.ours.taps, few), grain(pair.reference.taps, few))
    places = [Place(t.name, t.op, t.layer, t.kind) for t in taps]
    own = [*places, *_places(only_ours, pair.ours.kinds)]
    pair.arithmetic = (_arithmetic(pair, 0, own), _arithmetic(pair, 1, places))
    pair.may_round = tuple(
        arithmetic.matmul == "partner" or not dump.engine or "llama" in dump.engine.lower()
        for arithmetic, dump in zip(pair.arithmetic, dumps, strict=True)
    )


def _places(names: Sequence[str], kinds: Mapping[int, str]) -> list[Place]:
    parts = [(name, *name.rpartition("-")[::2]) for name in names]
    return [
        Place(name, op, int(layer), kinds[int(layer)])
        for name, op, layer in parts
        if layer.isdigit() and int(layer) in kinds
    ]


def _arithmetic(pair: local.Pair, side: int, places: Sequence[Place]) -> Arithmetic:
    """What one side computes in; exact for a log's few entries, which tell nothing."""
    if pair.sampled[side]:
        return Arithmetic()
    if any(pair.sampled):
        whole = pair.whole[side]
        pair = dataclasses.replace(pair, ours=whole, reference=whole)
    products = [p for p in places if _op(p) is not None and _op(p).linear]
    attending = [p for p in places if p.kind.startswith("attention")]
    groups = ([p for p in attending if p.op in ops] for ops in _ATTENDED)
    attended = next((group for group in groups if group), [])
    matmul, loose = _best(pair, side, products, [Arithmetic(matmul=m) for m in ("partner", "bf16", "tf32")])
    kv, loose_kv = _best(pair, side, attended, [Arithmetic(kv=k) for k in _CACHES])
    names = tuple(name for name, is_loose in (("matmul", loose), ("kv", loose_kv)) if is_loose)
    return Arithmetic(matmul.matmul, kv.kv, names)


def _op(tap) -> graph.Op | None:
    return graph.find(tap.op, tap.kind)


def grain(taps: Mapping[str, np.ndarray], names: Sequence[str]) -> float:
    """The relative rounding that every value shows: of bf16 or f16 where all of them are such numbers, else f32's."""
    for rounding, unit in ((bf16, 2.0**-9), (f16, 2.0**-12)):
        if names and all(_is_rounded(taps[name], rounding) for name in names):
            return unit
    return local.EPS32


def _is_rounded(x: np.ndarray, rounding: Rounding) -> bool:
    sample = np.asarray(x.reshape(-1)[:: max(1, x.size // 4096)], np.float32)
    return bool((rounding(sample) == sample).all())


@dataclasses.dataclass(frozen=True)
class _Fit:
    """How one candidate does on one tap.

    `left`: share of the exact formula's residual that it leaves. `size`: |residual| over the candidate's own
    effect. `even`: whether the residual is spread over tokens as that effect is, and unlike the output itself:
    the look of rounding noise.
    """

    left: float
    size: float
    even: bool


def _best(
    pair: local.Pair, side: int, taps: Sequence, candidates: Sequence[Arithmetic]
) -> tuple[Arithmetic, bool]:
    """The candidate that explains most, else one whose size and evenness fit (True), else exact arithmetic."""
    step = max(1, len(taps) // _SAMPLED)
    fits: dict[Arithmetic, list[_Fit]] = {c: [] for c in candidates}
    for tap in taps[::step][: _SAMPLED + 1]:
        for candidate, fit in _fits(pair, side, tap, candidates).items():
            fits[candidate].append(fit)
    fits = {c: f for c, f in fits.items() if f}
    if not fits:
        return Arithmetic(), False
    left = {c: float(np.median([fit.left for fit in f])) for c, f in fits.items()}
    if min(left.values()) < _EXPLAINED:
        return next(c for c, share in left.items() if share <= 1.2 * min(left.values()) + 1e-3), False
    sized = [c for c, f in fits.items() if all(fit.even and _LIKE[0] < fit.size < _LIKE[1] for fit in f)]
    return (sized[0], True) if sized else (Arithmetic(), False)


def _fits(pair: local.Pair, side: int, tap, candidates: Sequence[Arithmetic]) -> dict[Arithmetic, _Fit]:
    """Each candidate on one tap; nothing for taps that are exact already or cannot be re-run."""
    run, op = (pair.ours, pair.reference)[side], _op(tap)
    y = np.asarray(run.taps[tap.name], np.float64)
    y = graph.visible(y) if tap.op == "kq" else y

    def value(arithmetic: Arithmetic) -> np.ndarray:
        view = run.view(tap.layer, tap.kind, run.facts, arithmetic=arithmetic)
        return np.asarray(op.run(view), np.float64).reshape(y.shape)

    try:
        with np.errstate(all="ignore"):
            exact = value(Arithmetic())
            residual = y - exact
            if _norm(residual) <= 30 * local.EPS32 * _norm(y):
                return {}
            return {c: _fit(residual, y - value(c), exact) for c in candidates}
    except graph.FAILURES:
        return {}


def _fit(residual: np.ndarray, left: np.ndarray, exact: np.ndarray) -> _Fit:
    effect = residual - left
    if not _norm(effect):
        return _Fit(1.0, np.inf, False)
    by_token, expected = _rows(residual), _rows(effect)
    ratio = by_token[expected > 0] / expected[expected > 0]
    typical = float(np.median(ratio)) if ratio.size else 0.0
    even = typical > 0 and float(np.mean((ratio < 4 * typical) & (ratio > typical / 4))) > 0.9
    alike = abs(float(np.vdot(residual, exact))) / max(_norm(residual) * _norm(exact), 1e-300)
    return _Fit(_norm(left) / _norm(residual), _norm(residual) / _norm(effect), even and alike < 0.1)


def _norm(x: np.ndarray) -> float:
    return float(np.sqrt(np.vdot(x, x)))


def _rows(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(len(x), -1)
    return np.sqrt(np.einsum("ij,ij->i", flat, flat))
