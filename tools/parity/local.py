"""Local evidence: what each operation added to the divergence, with what it inherited taken out.

Both engines' outputs are predicted from their *own* inputs by the same float64 formula. An engine that computes
the operation rightly leaves a residual of its arithmetic's size, however far upstream activations have drifted;
one that does not leaves its fault. The difference of the two residuals is the local divergence, and what rounding
alone would leave is computed beside it by running the formula again in the engine's arithmetic.

Where a weight is not given it is read off the reference's own inputs and output (a norm's gain, a bias, a
convolution's kernel, a rotation's angles). A matrix cannot be read off so few tokens; there the inputs of our
engine are written as combinations of the reference's, and the outputs must be the same combinations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scarlet_jax.tools.parity.arithmetic import partner
from scarlet_jax.tools.parity.facts import Facts
from scarlet_jax.tools.parity.graph import FAILURES, Missing, Op
from scarlet_jax.tools.parity.logs import Sampled
from scarlet_jax.tools.parity.view import Arithmetic, LayerView, Run, Window, weight_key

EPS32 = 2.0**-24  # the relative error of one rounding to f32

# An engine's sums run in another order and its exponentials differ in the last bits; measured on clean pairs of
# engines, the formula's own f32 error times this covers the spread of those choices.
SPREAD = 2.0


@dataclasses.dataclass
class Local:
    """What is known about one tap's own operation.

    Residuals and floors are relative to the reference's norm. `method` is "formula" (re-run on the engine's own
    inputs), "span" (a product with an unknown matrix), "direct" (no inputs: equal or not) or "propagated"
    (nothing but the inputs' divergence to compare with), "alone" (not even that).
    """

    method: str
    difference: float
    ours: float
    reference: float
    floor: float
    ratio: float
    tokens: np.ndarray
    inputs: tuple[str, ...]
    f32_floor: float
    facts: Facts
    sums: _Sums
    residual: np.ndarray | None = None
    ours_residual: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Sums of squares of each token's row, (T,): of the residuals, of what they may be, and of the reference itself.

    They add up over columns: a wide tap is judged piece by piece.
    """

    difference: np.ndarray
    ours: np.ndarray
    reference: np.ndarray
    noise: np.ndarray
    f32: np.ndarray
    whole: np.ndarray

    def __add__(self, other: _Sums) -> _Sums:
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return _Sums(*(a + b for a, b in both))


@dataclasses.dataclass
class Pair:
    """The two runs, with what was found out about them."""

    ours: Run
    reference: Run
    arithmetic: tuple[Arithmetic, Arithmetic]
    resolution: tuple[float, float] = (0.0, 0.0)
    may_round: tuple[bool, bool] = (False, False)
    grain: tuple[float, float] = (EPS32, EPS32)
    whole: tuple[Run, Run] | None = None
    sampled: tuple[bool, bool] = (False, False)
    chosen: dict[tuple[str, str], Facts] = dataclasses.field(default_factory=dict)
    unit: float = 0.0  # how far, of their own size, the two runs' products differ in general


@dataclasses.dataclass
class _Prediction:
    value: np.ndarray
    noise: np.ndarray  # expected absolute error of each element
    noise_f32: np.ndarray
    inputs: tuple[str, ...]


def judge(pair: Pair, op: Op | None, layer: int | None, kind: str, tap: str) -> Local:
    """The local evidence on `tap`, by the best method that the dumps and the model allow.

    The columns of a wide product, such as a vocabulary's logits, are judged some at a time and keep no residual.
    """
    if not is_wide(pair, op, tap):
        return judge_whole(pair, op, layer, kind, tap)
    assert op is not None
    key, shape = weight_key(layer, op.weight), pair.reference.taps[tap].shape
    width, step = shape[1], max(256, min(_PIECE, (_PIECE << 8) // shape[0]))
    parts = [slice(start, min(start + step, width)) for start in range(0, width, step)]
    found = [judge_whole(_columns(pair, tap, key, part), op, layer, kind, tap) for part in parts]
    sums = functools.reduce(operator.add, (part.sums for part in found))
    return _summed(found[0].method, sums, found[0].inputs, found[0].facts)


WIDE, _PIECE = 1 << 15, 1 << 12  # columns: those of a product with more are judged so many at a time


def is_wide(pair: Pair, op: Op | None, tap: str) -> bool:
    """Whether a product has so many outputs that neither it nor its weight should be held at once."""
    if op is None or not op.linear or any(pair.sampled) or tap not in pair.reference.taps:
        return False
    shape = pair.reference.taps[tap].shape
    return len(shape) == 2 and shape[1] > WIDE


def some_tokens(pair: Pair, op: Op | None, tap: str, at: int = 0) -> Pair:
    """The pair with as few tokens as a wide product is looked into with, `at` among them; others as they are."""
    if not is_wide(pair, op, tap):
        return pair
    tokens, width = pair.reference.taps[tap].shape
    count = min(tokens, max(4, _LOOKED_INTO // width))
    return windowed(pair, tokens, max(0, min(at - count // 4, tokens - count)), count)


_LOOKED_INTO = 1 << 20  # elements: dozens of arrays of that size are made to find a cause


def windowed(pair: Pair, tokens: int, start: int, count: int) -> Pair:
    """The pair with `count` rows from `start` on of every tap that has all `tokens`."""
    known, rows = pair.reference.facts, slice(start, start + count)
    first = known.kept[0] + start
    known = dataclasses.replace(
        known,
        kept=(first, first + count),
        cut=known.cut or start > 0,
        first_position=known.first_position + start,
    )
    runs = (
        dataclasses.replace(run, taps=Window(run.taps, tokens, rows), facts=known)
        for run in (pair.ours, pair.reference)
    )
    return dataclasses.replace(pair, ours=next(runs), reference=next(runs), chosen={})


def _columns(pair: Pair, tap: str, key: tuple[int | None, str], part: slice) -> Pair:
    """The pair with some columns of a product, and of its weight the rows that make them."""
    runs = (run.columns(tap, key, part) for run in (pair.ours, pair.reference))
    return dataclasses.replace(pair, ours=next(runs), reference=next(runs))


def judge_whole(pair: Pair, op: Op | None, layer: int | None, kind: str, tap: str) -> Local:
    """The local evidence on all of a tap at once, with the residuals."""
    if any(pair.sampled):
        return _one_sided(pair, op, layer, kind, tap)
    ours, reference = (np.asarray(run.taps[tap], np.float64) for run in (pair.ours, pair.reference))
    if op is None:
        return _propagated(pair, tap, ours, reference, (), pair.reference.facts)
    facts = _facts(pair, op, layer, kind, reference)
    inputs: tuple[str, ...] = ()
    try:
        predicted = _predict(pair, 1, op, layer, kind, facts, reference.shape)
        own = _predict(pair, 0, op, layer, kind, facts, reference.shape)
        return _formula(pair, own, predicted, ours, reference, facts)
    except FAILURES:  # something is not there, or not in the shape that the formula takes
        pass
    inputs, product = _inputs(pair, op, layer, kind, facts)
    if op.source:
        return _direct(pair, ours, reference, facts)
    if op.linear and len(inputs) == 1 and _shared(pair, inputs[0], len(reference)):
        return _span(pair, op, layer, inputs[0], ours, reference, facts)
    return _propagated(pair, tap, ours, reference, inputs, facts, product)


def _formula(
    pair: Pair,
    own: _Prediction,
    predicted: _Prediction,
    ours: np.ndarray,
    reference: np.ndarray,
    facts: Facts,
) -> Local:
    told = np.isfinite(own.value) & np.isfinite(predicted.value)  # else a weight could not be learned there
    left, right = (np.where(told, y - p.value, 0) for y, p in ((ours, own), (reference, predicted)))
    noise = np.where(told, np.hypot(own.noise, predicted.noise), 0)
    noise = np.hypot(noise, max(pair.resolution) / 3**0.5)
    f32 = np.where(told, np.hypot(own.noise_f32, predicted.noise_f32), 0)
    # A formula that fits neither engine is not theirs: how far it errs on both may move with the inputs.
    unmodelled = min(_norm(left), _norm(right))
    if unmodelled > 10 * _norm(noise):
        moved = _norm((own.value - predicted.value)[told]) / max(_norm(predicted.value[told]), 1e-300)
        noise = np.hypot(noise, unmodelled / max(1, noise.size) ** 0.5 * min(1.0, 3 * moved + 1e-6))
    # What only one side shows, the other computes from taps that it has: both are read.
    inputs = tuple(dict.fromkeys((*own.inputs, *predicted.inputs)))
    return _local(
        "formula", left - right, left, right, noise, f32, reference, inputs, facts, ours_residual=left
    )


def _one_sided(pair: Pair, op: Op | None, layer: int | None, kind: str, tap: str) -> Local:
    """One dump holds only some entries: the other is held against the formula, where it needs nothing learned."""
    ours, reference = (np.asarray(run.taps[tap], np.float64) for run in (pair.ours, pair.reference))
    facts = pair.reference.facts
    if op is not None and op.source:
        return _direct(pair, ours, reference, facts)
    if op is not None and not all(pair.sampled):
        side = 1 if pair.sampled[0] else 0
        alone = _alone(dataclasses.replace(pair, ours=pair.whole[side], reference=pair.whole[side]), side)
        plain = dataclasses.replace(op, fit=None)
        try:
            whole = np.asarray(alone.ours.taps[tap], np.float64)
            facts = _facts(alone, plain, layer, kind, whole)
            found = _against_formula(alone, plain, layer, kind, facts, whole)
            if not _departs_too(pair, side, tap, found, ours - reference):
                return found
        except FAILURES:
            facts = pair.reference.facts
    known = op is not None and not all(pair.sampled)
    inputs, product = _inputs(alone, op, layer, kind, facts) if known else ((), True)
    return _propagated(pair, tap, ours, reference, inputs, facts, product)


def _departs_too(pair: Pair, side: int, tap: str, found: Local, difference: np.ndarray) -> bool:
    """Whether the few entries that the other run shows depart from the formula as this one's do."""
    assert pair.whole is not None
    assert found.residual is not None
    few = pair.whole[1 - side].taps[tap]
    if not isinstance(few, Sampled) or few.size != found.residual.size:
        return False
    left = _norm(few.of(found.residual))
    return left > 3 * max(pair.resolution) * difference.size**0.5 and _norm(difference) < 0.3 * left


def _alone(pair: Pair, side: int) -> Pair:
    """One side's run against itself."""
    run, arithmetic = (pair.ours, pair.reference)[side], pair.arithmetic[side]
    resolution = 0.0 if any(pair.sampled) else pair.resolution[side]
    return dataclasses.replace(
        pair, ours=run, reference=run, arithmetic=(arithmetic,) * 2, resolution=(resolution,) * 2,
        grain=(pair.grain[side],) * 2, sampled=(False, False), chosen={},
    )  # fmt: skip


def _against_formula(
    alone: Pair, op: Op, layer: int | None, kind: str, facts: Facts, whole: np.ndarray
) -> Local:
    """One dump's tap against what its own inputs give."""
    own = _predict(alone, 0, op, layer, kind, facts, whole.shape)
    left = whole - own.value
    return _local(
        "formula",
        left,
        left,
        0 * left,
        own.noise,
        own.noise_f32,
        own.value,
        own.inputs,
        facts,
        ours_residual=left,
    )


def judge_own(pair: Pair, op: Op, layer: int | None, kind: str, tap: str, strict: bool) -> Local | None:
    """The evidence on a tap that only our dump has: its own inputs, and the formula; None where that needs more.

    Conventions are those found at the reference, or with `strict` off those that explain our tap.
    """
    alone, plain = _alone(pair, 0), dataclasses.replace(op, fit=None)
    whole = np.asarray(pair.ours.taps[tap], np.float64)
    try:
        with np.errstate(all="ignore"):
            facts = pair.chosen.get((kind, op.name), pair.reference.facts)
            facts = facts if strict else _facts(alone, plain, layer, kind, whole)
            return _against_formula(alone, plain, layer, kind, facts, whole)
    except FAILURES:
        return None


def _direct(pair: Pair, ours: np.ndarray, reference: np.ndarray, facts: Facts) -> Local:
    noise = np.abs(reference) * max(pair.grain) + 1.5 * max(pair.resolution)
    return _local("direct", ours - reference, ours - reference, 0 * ours, noise, noise, reference, (), facts)


def _span(
    pair: Pair, op: Op, layer: int | None, source: str, ours: np.ndarray, reference: np.ndarray, facts: Facts
) -> Local:
    """A product with an unknown matrix: outputs must combine as the inputs do."""
    x, x_ref = (np.asarray(run.taps[source], np.float64) for run in (pair.ours, pair.reference))
    x, x_ref = x.reshape(len(x), -1), x_ref.reshape(len(x_ref), -1)
    one = np.full((len(x), 1), _norm(x_ref) / len(x_ref) ** 0.5)  # of a bias there are as many on either side
    x, x_ref = np.hstack([x, one]), np.hstack([x_ref, one])
    y, y_ref = ours.reshape(len(ours), -1), reference.reshape(len(reference), -1)
    moved = x - x_ref
    gram = x_ref @ x_ref.T
    ridge = 1e-10 * max(np.trace(gram) / max(len(gram), 1), 1e-300)
    mixing = moved @ x_ref.T @ np.linalg.inv(gram + ridge * np.eye(len(gram)))
    left_over = moved - mixing @ x_ref
    difference = (y - y_ref) - mixing @ y_ref
    gain = _norm(y_ref) / max(_norm(x_ref), 1e-300)
    size = y_ref.shape[1] ** 0.5
    rounding = np.zeros(len(x))
    for side, inputs in ((0, x), (1, x_ref)):
        if pair.may_round[side]:
            run = (pair.ours, pair.reference)[side]
            how = partner(run.qtypes.get((layer, op.weight), "" if run.qtypes else "Q4_K"))
            if how is not None:
                rounding = np.hypot(rounding, _rows(how(inputs[:, :-1]) - inputs[:, :-1]))
    rounding = np.hypot(rounding, UNSURE * pair.unit * _rows(x_ref) / 1.5)
    # A matrix may answer an arbitrary direction more than the directions that its inputs take.
    per_token = 1.5 * gain * np.hypot(_rows(left_over), rounding) / size
    depth = (x.shape[1] - 1) ** 0.5
    f32 = (
        EPS32
        * depth
        * np.hypot(_rows(y_ref), np.abs(mixing).sum(axis=1) * _norm(y_ref) / len(y) ** 0.5)
        / size
    )
    f32 = f32 + max(pair.resolution) + 2 * max(pair.grain) * (max(pair.grain) > EPS32) * _rows(y_ref) / size
    shape = (-1, *([1] * (reference.ndim - 1)))
    noise = np.broadcast_to(np.hypot(per_token, f32).reshape(shape), reference.shape)
    local = _local(
        "span",
        difference.reshape(reference.shape),
        ours - reference,
        0 * reference,
        noise,
        np.broadcast_to(f32.reshape(shape), reference.shape),
        reference,
        (source,),
        facts,
    )
    local.ours_residual = local.residual
    return local


def _propagated(
    pair: Pair,
    tap: str,
    ours: np.ndarray,
    reference: np.ndarray,
    inputs: tuple[str, ...],
    facts: Facts,
    product: bool = True,
) -> Local:
    """Nothing to re-run: only a jump far beyond the inputs' own divergence counts.

    `product`: whether there may be one on the way from the inputs, which an engine may round.
    """
    inherited, exchanged, beside = 0.0, np.zeros(()), False
    for name in inputs or _neighbours(pair, tap):
        if not all(name in run.taps for run in (pair.ours, pair.reference)):
            continue
        a, b = (np.asarray(run.taps[name], np.float64) for run in (pair.ours, pair.reference))
        if a.shape != b.shape:
            continue
        beside = True
        if name.rpartition("-")[0] in CHOSEN:
            exchanged = _exchanged(a, b, reference.shape)
        else:
            inherited = max(inherited, _norm(a - b) / max(_norm(b), 1e-300))
    rounds = any(pair.may_round) or (
        product and len(reference) == 1
    )  # of one token nothing tells the engines' ways
    rounded = ROUNDED if rounds else UNSURE * _usual_error(pair) if product else 0.0
    relative = math.hypot(5 * inherited, rounded) + 30 * EPS32 + 3 * max(pair.grain)
    # Another expert's output has nothing of the one's that it stands in for.
    noise = np.hypot(relative, 2.0 * exchanged) * _norm(reference) / max(1, reference.size) ** 0.5
    noise = np.broadcast_to(noise + max(pair.resolution), reference.shape)
    difference = ours - reference
    method = "propagated" if beside else "alone"
    return _local(method, difference, difference, 0 * reference, noise, noise, reference, inputs, facts)


def _exchanged(ours: np.ndarray, reference: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """bool, to go with `shape`: where other experts (T, k) were chosen, or for which tokens."""
    other = np.rint(ours) != np.rint(reference)
    other = other.reshape(len(other), -1)
    if shape[:1] != other.shape[:1]:
        return other.any()
    if other.shape != shape[:2]:
        other = other.any(axis=1)
    return other.reshape(*other.shape, *[1] * (len(shape) - other.ndim))


def _usual_error(pair: Pair) -> float:
    """What the two engines' arithmetics make products differ by, relative to them."""
    units = [max(side.unit, _UNITS.get(side.matmul, 0.0)) for side in pair.arithmetic]
    return max(pair.unit, *units)


CHOSEN = ("ffn_moe_topk", "ffn_moe_argsort")  # taps that hold experts' numbers
_UNITS = {"partner": 0.005, "bf16": 2.0**-9, "f16": 2.0**-12, "tf32": 2.0**-12}
ROUNDED = 0.02  # what 8-bit activations can do to one product


def _shared(pair: Pair, name: str, rows: int) -> bool:
    """Whether both sides have a tap, for the rows that are compared."""
    if not all(name in run.taps for run in (pair.ours, pair.reference)):
        return False
    a, b = pair.ours.taps[name].shape, pair.reference.taps[name].shape
    return a == b and len(a) > 1 and a[0] == rows


def _neighbours(pair: Pair, tap: str) -> tuple[str, ...]:
    """The taps just before in execution order, for an operation that is not in the table."""
    names = list(pair.reference.taps)
    at = names.index(tap)
    return tuple(names[max(0, at - 3) : at])


def _local(
    method: str,
    difference: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    noise: np.ndarray,
    f32: np.ndarray,
    reference: np.ndarray,
    inputs: tuple[str, ...],
    facts: Facts,
    ours_residual: np.ndarray | None = None,
) -> Local:
    sums = _Sums(*(_squares(x) for x in (difference, left, right, noise, f32, reference)))
    local = _summed(method, sums, inputs, facts)
    local.residual, local.ours_residual = difference, left if ours_residual is None else ours_residual
    return local


def _summed(method: str, sums: _Sums, inputs: tuple[str, ...], facts: Facts) -> Local:
    """Local evidence from the squares of every token's row."""
    whole = [math.sqrt(x.sum()) for x in dataclasses.astuple(sums)]
    difference, left, right, noise, f32, scale = *whole[:5], max(whole[5], 1e-300)
    floor = noise + 4 * EPS32 * 1e-3 * scale
    by_token, noise_by_token, reference_by_token = (
        np.sqrt(x) for x in (sums.difference, sums.noise, sums.whole)
    )
    typical = floor / max(1, len(by_token)) ** 0.5
    # One broken token or head among many must not drown in the whole; 2 pays for looking at every one.
    token_ratio = float((by_token / (2 * np.hypot(noise_by_token, 0.3 * typical))).max(initial=0.0))
    relative = np.divide(
        by_token, reference_by_token, out=np.zeros_like(by_token), where=reference_by_token > 0
    )
    return Local(
        method,
        difference / scale,
        left / scale,
        right / scale,
        floor / scale,
        max(difference / floor, token_ratio),
        relative,
        inputs,
        f32 / scale,
        facts,
        sums,
    )


def _facts(pair: Pair, op: Op, layer: int | None, kind: str, reference: np.ndarray) -> Facts:
    """The conventions under which the formula explains the reference; chosen at an operation's first layer."""
    key = (kind, op.name)
    if key in pair.chosen:
        return pair.chosen[key]
    facts = pair.reference.facts
    if op.choices == ({},):
        return facts
    best, chosen = np.inf, facts
    for choice in _choices(pair, op, layer, kind, reference):
        candidate = dataclasses.replace(facts, **choice)
        pair.reference.learned.pop((layer, "rope.angle"), None)
        try:
            predicted = _run(pair, 1, op, layer, kind, candidate, reference.shape)
        except FAILURES:
            continue
        error = _norm(reference - predicted)
        if error < 0.5 * best:
            best, chosen = error, candidate
        if best <= 1e-5 * _norm(reference):
            break
    pair.reference.learned.pop((layer, "rope.angle"), None)
    if np.isfinite(best):
        pair.chosen[key] = chosen
    return chosen


def _choices(
    pair: Pair, op: Op, layer: int | None, kind: str, reference: np.ndarray
) -> Sequence[Mapping[str, Any]]:
    if not callable(op.choices):
        return op.choices
    try:
        return op.choices(_view(pair, 1, layer, kind, pair.reference.facts), reference)
    except FAILURES:
        return ({},)


def _view(pair: Pair, side: int, layer: int | None, kind: str, facts: Facts, **options: Any) -> LayerView:
    run = (pair.ours, pair.reference)[side]
    return run.view(layer, kind, facts, arithmetic=pair.arithmetic[side].strict(), **options)


def _run(
    pair: Pair,
    side: int,
    op: Op,
    layer: int | None,
    kind: str,
    facts: Facts,
    shape: tuple[int, ...],
    used: list[str] | None = None,
    **options: Any,
) -> np.ndarray:
    """The formula's value on one side, float64, in the dump's shape; `used` gets the taps it read."""
    view = _view(pair, side, layer, kind, facts, **options)
    try:
        value = op.run(view)
    except Missing:
        if op.fit is None or side == 0:
            raise
        _learn(pair, op, layer, kind, facts)
        view = _view(pair, side, layer, kind, facts, **options)
        value = op.run(view)
    if value.ndim and shape and len(value) > shape[0] > 0 and value[0].size == int(np.prod(shape[1:])):
        value = value[-shape[0] :]  # an engine that kept its last rows only
    if value.size != int(np.prod(shape)):
        raise Missing(f"{op.name}: the formula gives {value.shape}, the dump {shape}")
    if used is not None:
        used += view.used
    return np.asarray(value, np.float64).reshape(shape)


def _learn(pair: Pair, op: Op, layer: int | None, kind: str, facts: Facts) -> None:
    """Read a weight nobody gave off the reference, for both sides to use, and how far rounding may have moved it."""
    view = _view(pair, 1, layer, kind, facts)
    shaken = _view(pair, 1, layer, kind, facts, jitter=EPS32, seed=4)
    target = np.asarray(pair.reference.taps[view.tap_name(op.name)], np.float64)
    rounded = target * (1 + EPS32 * np.random.default_rng(5).standard_normal(target.shape))
    try:
        learned, again = op.fit(view, target), op.fit(shaken, rounded)
    except ValueError:  # other rows than the inputs have
        raise Missing(op.weight) from None
    for stem, value in learned.items():
        key = (None if stem in ("output_norm",) else layer, stem)
        for run in (pair.reference, pair.ours):
            run.learned[key] = value
            run.unsure[key] = (again[stem] - value) / EPS32


def _predict(
    pair: Pair, side: int, op: Op, layer: int | None, kind: str, facts: Facts, shape: tuple[int, ...]
) -> _Prediction:
    """The output from the side's own inputs, with the error that its arithmetic may leave in each element."""
    used: list[str] = []
    value = _run(pair, side, op, layer, kind, facts, shape, used=used)
    single = _run(pair, side, op, layer, kind, facts, shape, dtype=np.float32)
    shaken = value if op.linear else _run(pair, side, op, layer, kind, facts, shape, jitter=EPS32, seed=1)
    noise = SPREAD * np.hypot(single - value, shaken - value) + 0.5 * EPS32 * np.abs(value)
    f32, grain = noise, pair.grain[side]
    if grain > EPS32:  # taps kept in 16 bits: what went in and what came out were rounded, and steps between
        coarse = _run(pair, side, op, layer, kind, facts, shape, jitter=grain, seed=3)
        noise = np.hypot(noise, np.hypot(SPREAD * (coarse - value), grain * np.abs(value)))
    if pair.resolution[side]:
        rough = _run(pair, side, op, layer, kind, facts, shape, absolute=pair.resolution[side], seed=2)
        noise = np.hypot(noise, 2 * (rough - value))
    arithmetic = pair.arithmetic[side]
    loosely = dataclasses.replace(arithmetic, unit=0.0)
    unsure = dataclasses.replace(arithmetic.strict(), unit=arithmetic.unit)
    for other, weight in ((Arithmetic(), IMITATION), (loosely, LOOSE), (unsure, UNSURE)):
        if other != arithmetic.strict():
            run = (pair.ours, pair.reference)[side]
            rounded = op.run(run.view(layer, kind, facts, arithmetic=other))
            noise = np.hypot(noise, weight * (np.asarray(rounded, np.float64).reshape(shape) - value))
    return _Prediction(value, noise, f32, tuple(dict.fromkeys(used)))


# Share of a rounding's effect that its imitation may miss: ties broken otherwise, sums kept in half precision.
IMITATION = 0.15
# The same for an arithmetic known by its size only.
LOOSE = 2.0
# And for products whose errors' usual size is known: one product's may be larger than another's.
UNSURE = 4.0


def _inputs(pair: Pair, op: Op, layer: int | None, kind: str, facts: Facts) -> tuple[tuple[str, ...], bool]:
    """The taps that the operation reached for before something was missing; whether by way of a product."""
    view = _view(pair, 1, layer, kind, facts)
    with contextlib.suppress(*FAILURES):
        op.run(view)
    return tuple(dict.fromkeys(view.used)), any(step.linear for step in (op, *view.computed))


def _norm(x: np.ndarray) -> float:
    flat = x.reshape(-1)
    return float(np.sqrt(flat @ flat))


def _rows(x: np.ndarray) -> np.ndarray:
    return np.sqrt(_squares(x))


def _squares(x: np.ndarray) -> np.ndarray:
    """Each row's sum of squares."""
    flat = x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1)
    return np.vecdot(flat, flat)
