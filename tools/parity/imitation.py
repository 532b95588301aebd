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
_STEP_F16 = 2.0**-24  # between numbers below 2^-14
_OWN = 10  # a product's difference of so many times what its inputs explain is its own
_FIRST = 16  # products looked at for how far two engines' differ
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
    shown = [t.name for t in taps if t.metrics.norm > 0 and t.op not in local.CHOSEN]
    few = shown[:: max(1, len(shown) // 24)]
    if not any(pair.sampled):
        pair.grain = (grain(pair.ours.taps, few), grain(pair.reference.taps, few))
        # Below its normal numbers, half precision has a fixed step.
        pair.resolution = tuple(
            max(known, _STEP_F16 / 2 if grain == 2.0**-12 else 0.0)
            for known, grain in zip(pair.resolution, pair.grain, strict=True)
        )
    places = [Place(t.name, t.op, t.layer, t.kind) for t in taps]
    own = [*places, *_places(only_ours, pair.ours.kinds)]
    pair.arithmetic = (_arithmetic(pair, 0, own), _arithmetic(pair, 1, places))
    if pair.ours.given is None and not any(pair.sampled):
        pair.unit = _difference(pair, [p for p in places if (op := _op(p)) is not None and op.linear])
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
    attending = [p for p in places if "attention" in p.kind.split()]
    groups = ([p for p in attending if p.op in ops] for ops in _ATTENDED)
    attended = next((group for group in groups if group), [])
    matmul = _best(pair, side, products, [Arithmetic(matmul=m) for m in ("partner", "bf16", "f16", "tf32")])
    kv = _best(pair, side, attended, [Arithmetic(kv=k) for k in _CACHES])
    loose = kv is None
    if loose:
        kv = _of_its_size(pair, side, attended, [Arithmetic(kv=k) for k in _CACHES])
    unit = _unit(pair, side, products) if matmul is None else 0.0
    return Arithmetic(matmul.matmul if matmul else "", kv.kv, loose and bool(kv.kv), unit)


def _op(tap) -> graph.Op | None:
    return graph.find(tap.op, tap.kind)


def grain(taps: Mapping[str, np.ndarray], names: Sequence[str]) -> float:
    """The relative rounding that values show: of bf16 or f16 where most taps hold such numbers, else f32's.

    An engine that computes in 16 bits keeps some things in f32: states, a router's scores.
    """
    for rounding, unit in ((bf16, 2.0**-9), (f16, 2.0**-12)):
        if names and sum(_is_rounded(taps[name], rounding) for name in names) > 0.6 * len(names):
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


def _all_fits(
    pair: local.Pair, side: int, taps: Sequence, candidates: Sequence[Arithmetic]
) -> dict[Arithmetic, list[_Fit]]:
    """Each candidate on some of the taps; candidates that fit nowhere are left out, and so are exact taps."""
    step = max(1, len(taps) // _SAMPLED)
    fits: dict[Arithmetic, list[_Fit]] = {c: [] for c in candidates}
    for tap in taps[::step][: _SAMPLED + 1]:
        for candidate, fit in _fits(pair, side, tap, candidates).items():
            fits[candidate].append(fit)
    return {c: f for c, f in fits.items() if f}


def _best(pair: local.Pair, side: int, taps: Sequence, candidates: Sequence[Arithmetic]) -> Arithmetic | None:
    """The candidate that explains most; exact arithmetic where nothing is left, None where nothing explains it."""
    fits = {c: [fit for fit in f if fit.size] for c, f in _all_fits(pair, side, taps, candidates).items()}
    left = {c: float(np.median([fit.left for fit in f])) for c, f in fits.items() if f}
    if not left:
        return Arithmetic()
    if min(left.values()) >= _EXPLAINED:
        return None
    return next(c for c, share in left.items() if share <= 1.2 * min(left.values()) + 1e-3)


def _of_its_size(pair: local.Pair, side: int, taps: Sequence, candidates: Sequence[Arithmetic]) -> Arithmetic:
    """The first candidate whose size and evenness fit, else exact arithmetic."""
    fits = {c: [fit for fit in f if fit.size] for c, f in _all_fits(pair, side, taps, candidates).items()}
    sized = [c for c, f in fits.items() if all(fit.even and _LIKE[0] < fit.size < _LIKE[1] for fit in f)]
    return sized[0] if sized else Arithmetic()


def _unit(pair: local.Pair, side: int, products: Sequence) -> float:
    """The usual relative error of this side's products, where they all have one of about that size; else 0."""
    probe = Arithmetic(unit=1.0)
    return _usual([(fit.size, fit.even) for fit in _all_fits(pair, side, products, [probe]).get(probe, [])])


def _usual(errors: Sequence[tuple[float, bool]]) -> float:
    """The usual one of products' relative errors, each with whether it looks like noise.

    An arithmetic shows in most products, as noise of one size, and of no more than a few bits leave. A fault does
    not: it is in some of them, or large, or has a structure.
    """
    noisy = [error for error, noise in errors if noise and error > 0]
    if len(noisy) < max(0.35 * len(errors), min(3, max(1, len(errors)))):
        return 0.0
    usual = float(np.median(noisy))
    alike = sum(usual / local.UNSURE < error < local.UNSURE * usual for error in noisy)
    return usual if usual <= local.ROUNDED and alike >= 0.8 * len(noisy) else 0.0


def _difference(pair: local.Pair, products: Sequence[Place]) -> float:
    """The usual relative difference of the two runs' products by matrices that nobody gave; else 0."""
    errors = []
    for place in products[:_FIRST]:  # further down, what the inputs bring hides it
        if local.is_wide(pair, _op(place), place.name):
            continue
        with np.errstate(all="ignore"):
            found = local.judge_whole(pair, _op(place), place.layer, place.kind, place.name)
        if found.method != "span" or found.residual is None:
            continue
        if found.ratio > _OWN:
            x, y = (np.asarray(pair.reference.taps[n], np.float64) for n in (found.inputs[0], place.name))
            noise = _noise_like(_rows(found.residual), _rows(x), found.residual, y, _independent(x))
            errors.append((found.difference, noise))
        elif found.floor < 3 * found.f32_floor:
            errors.append((0.0, True))
    return _usual(errors)


def _noise_like(
    rows: np.ndarray, expected: np.ndarray, residual: np.ndarray, exact: np.ndarray, terms: float = np.inf
) -> bool:
    """Whether a residual is spread over tokens as a rounding's effect is, in most elements, and unlike the output.

    Chance alone makes n independent numbers alike by 1/sqrt(n); a product has no more of them than `terms`.
    """
    ratio = rows[expected > 0] / expected[expected > 0]
    typical = float(np.median(ratio)) if ratio.size else 0.0
    even = typical > 0 and float(np.mean((ratio < 4 * typical) & (ratio > typical / 4))) > 0.9
    alike = abs(float(np.vdot(residual, exact))) / max(_norm(residual) * _norm(exact), 1e-300)
    return even and _in_most(residual[exact != 0]) and alike < max(0.3, 2 / min(residual.size, terms) ** 0.5)


def _in_most(residual: np.ndarray) -> bool:
    """Whether hardly an element is exact: rounding leaves few as they were, a wrong slot or channel all others."""
    return (
        residual.size > 0
        and float(np.mean(np.abs(residual) > 1e-3 * _norm(residual) / residual.size**0.5)) > 0.5
    )


def _independent(x: np.ndarray) -> float:
    """How many numbers of as many as there are in the rows of `x` weigh in its products: its participation ratio."""
    squares = x.reshape(len(x), -1) ** 2
    whole, fourth = squares.sum(axis=1), (squares**2).sum(axis=1)
    return max(1.0, float((whole[fourth > 0] ** 2 / fourth[fourth > 0]).sum()))


def _fits(pair: local.Pair, side: int, tap, candidates: Sequence[Arithmetic]) -> dict[Arithmetic, _Fit]:
    """Each candidate on one tap, of size 0 where it is exact already; nothing for taps that cannot be re-run."""
    op = _op(tap)
    pair = local.some_tokens(pair, op, tap.name)
    run = (pair.ours, pair.reference)[side]
    y = np.asarray(run.taps[tap.name], np.float64)
    y = graph.visible(y) if tap.op == "kq" else y

    def value(arithmetic: Arithmetic) -> np.ndarray:
        view = run.view(tap.layer, tap.kind, run.facts, arithmetic=arithmetic)
        return np.asarray(op.run(view), np.float64).reshape(y.shape)

    try:
        with np.errstate(all="ignore"):
            exact = value(Arithmetic())
            residual = y - exact
            if not _norm(y) or not np.isfinite(residual).all():
                return {}
            if _norm(residual) <= 30 * local.EPS32 * _norm(y):
                return dict.fromkeys(candidates, _Fit(0.0, 0.0, True))
            return {c: _fit(residual, y - value(c), exact) for c in candidates}
    except graph.FAILURES:
        return {}


def _fit(residual: np.ndarray, left: np.ndarray, exact: np.ndarray) -> _Fit:
    effect = residual - left
    if not _norm(effect):
        return _Fit(1.0, np.inf, False)
    even = _noise_like(_rows(residual), _rows(effect), residual, exact)
    return _Fit(_norm(left) / _norm(residual), _norm(residual) / _norm(effect), even)


def _norm(x: np.ndarray) -> float:
    return float(np.sqrt(np.vdot(x, x)))


def _rows(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(len(x), -1)
    return np.sqrt(np.einsum("ij,ij->i", flat, flat))
