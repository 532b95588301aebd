"""Misreadings with something in them that only our output tells: which head, which rows, how large an eps.

A guess looks at a `Case` and yields a label, the output that it expects, and the rows to be scored on where what it
fitted is more than a few integers. Which guesses an operation gets depends on its form: a norm, a softmax, a
product, a rotation, something that looks back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from scarlet_jax.tools.parity import formulas as f
from scarlet_jax.tools.parity.case import Case, Hypothesis, listed, other_rows
from scarlet_jax.tools.parity.graph import FAILURES, Missing, flat

Guess = tuple[str, np.ndarray] | tuple[str, np.ndarray, Any]
Guesses = Callable[[Case], Iterator[Guess]]

GUESSES: dict[str, list[Guesses]] = {}


# Names that fit much stand back where a plainer one fits as well; those that only a known loop leaves come first.
_VAGUE = {
    **dict.fromkeys(("chunk-boundary", "rope-sections"), 0),
    **dict.fromkeys(("branch-gain", "residual-gain"), 3),
    **dict.fromkeys(("softmax-normalisation", "state-reset"), 4),
    **dict.fromkeys(("activation", "approximation"), 5),
    **dict.fromkeys(("block-scale", "block-minimum"), 6),
    **{"rope-angle": 6, "conv-kernel": 7},
}


def of(*ops: str) -> Callable[[Guesses], Guesses]:
    """Register a guess for the operations named; a kind after a colon limits it to layers of that kind."""

    def register(guess: Guesses) -> Guesses:
        for op in ops:
            GUESSES.setdefault(op, []).append(guess)
        return guess

    return register


def hypotheses(case: Case) -> list[Hypothesis]:
    """All guesses at a case."""
    if case.op is None or case.view is None or not np.isfinite(case.ours).all():
        return []
    looks = [*GUESSES.get(case.op.name, ()), *GUESSES.get(f"{case.op.name}:{case.op.kind}", ())]
    if case.op.normed is not None:
        looks += [_denominator, _few_channels]
    if case.op.pointwise is not None:
        looks += [_other_function, _of_two, _in_steps]
    if case.op.summed is not None:
        looks += [_other_sum]
    found = []
    for look in looks:
        try:
            with np.errstate(all="ignore"):
                found += [_scored(case, *guess) for guess in look(case)]
        except FAILURES:
            continue
    return found


def _scored(case: Case, label: str, candidate: np.ndarray, rows: Any = slice(None)) -> Hypothesis:
    candidate = np.asarray(candidate, np.float64).reshape(case.ours.shape)
    explained = case.share(candidate, rows)
    name, _, text = label.partition(", ")
    return Hypothesis(
        name, explained, f"{text or name}: {explained:.2%} explained", "variant", _VAGUE.get(name, 1)
    )


def per_group(case: Case, candidates: list[np.ndarray], axis: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """For each head (axis 1 of the arrays (T, N, ...)) the candidate that fits ours best; which, and all together."""
    stack = np.stack(candidates)
    ours = case.ours.reshape(stack.shape[1:])
    others = tuple(a for a in range(ours.ndim) if a != axis)
    chosen = ((stack - ours) ** 2).sum(axis=tuple(a + 1 for a in others)).argmin(axis=0)
    best = np.stack([np.take(stack[c], n, axis=axis) for n, c in enumerate(chosen)], axis=axis)
    return chosen, best


# --- norms: out = factor * x / sqrt(c sum(x^2) + eps) -----------------------------------------------------------


def _scale(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, factor, and 1/scale^2 of each row of x as our output shows it."""
    x, factor = case.op.normed(case.view)
    full = np.broadcast_to(factor, x.shape)
    unscaled, ours = x * full, case.ours.reshape(x.shape)
    scale = (ours * unscaled).sum(-1) / np.maximum((unscaled**2).sum(-1), 1e-300)
    return x, full, 1 / np.maximum(scale**2, 1e-300)


def _denominator(case: Case) -> Iterator[Guess]:
    """Another eps, or another multiple of the sum of squares."""
    x, factor, inverse = _scale(case)
    energy = (x * x).sum(-1)
    rows = np.stack([energy.ravel(), np.ones(energy.size)], axis=1) / inverse.ravel()[:, None]
    (c, eps), *_ = np.linalg.lstsq(rows, np.ones(energy.size), rcond=None)
    candidate = factor * x / np.sqrt(c * energy + eps)[..., None]
    n = x.shape[-1]
    usual = min((1.0, 1 / n), key=lambda known: abs(np.log(abs(c) / known)))
    if abs(c / usual - 1) < 1e-3:
        yield f"eps, an eps of {eps:.3g} instead of {case.view.facts.eps:g}", candidate
    elif abs(c * (n - 1) - 1) < 1e-3:
        yield f"sum-for-mean, a mean over {n - 1} instead of {n}", candidate


def _few_channels(case: Case) -> Iterator[Guess]:
    """The sum of squares over the first channels only, divided by all or by their number."""
    x, factor, inverse = _scale(case)
    n, right = x.shape[-1], f.rms(x[:1], 0.0)
    mean = float((right**2).sum(-1).flat[0]) > 1.5
    sums = np.cumsum(x * x, axis=-1)[..., :-1]
    for counted in (False, True) if mean else (False,):
        divisor = np.arange(1, n) if counted else (n if mean else 1)
        expected = sums / divisor
        error = np.median(np.abs(np.log(expected / inverse[..., None])).reshape(-1, n - 1), axis=0)
        k = int(error.argmin())
        text = f"norm-axis, the sum of squares over the first {k + 1} of {n} channels only"
        yield text, factor * x / np.sqrt(expected[..., k] + case.view.facts.eps)[..., None]


# --- elementwise functions: out = factor * g(x) ----------------------------------------------------------------


class _Samples(NamedTuple):
    """A function of one input as the even tokens show it: (n,) arrays in order of x, and x and factor everywhere.

    `ours` and `right` are what the two functions give, the factor taken out.
    """

    known: np.ndarray
    ours: np.ndarray
    right: np.ndarray
    x: np.ndarray
    factor: np.ndarray


def _samples(case: Case) -> _Samples:
    x, factor = (np.broadcast_to(part, case.ours.shape) for part in _shaped(case))
    fit, held = case.halves()
    usable = (np.abs(factor) > 1e-3 * np.abs(factor).max())[fit]
    known = x[fit][usable]
    if known.size < 64 or fit == held:
        raise Missing("enough inputs")
    order = np.argsort(known)
    ours, right = (y[fit][usable][order] / factor[fit][usable][order] for y in (case.ours, case.right))
    return _Samples(known[order], ours, right, x, factor)


def _other_function(case: Case) -> Iterator[Guess]:
    """Some other function of the same input, read off the even tokens and tried on the odd ones."""
    seen = _samples(case)
    candidate = seen.factor * np.interp(seen.x, seen.known, seen.ours)
    at = np.quantile(seen.known, (0.1, 0.5, 0.9))
    values = np.interp(at, seen.known, seen.ours)
    shown = ", ".join(f"g({a:.2g}) = {v:.3g}" for a, v in zip(at, values, strict=True))
    name = "approximation" if _close(candidate, case.right) else "activation"
    yield f"{name}, another function of the same input: {shown}", candidate, case.halves()[1]


def _in_steps(case: Case) -> Iterator[Guess]:
    """A function that stays where it is and then jumps: a table of which the nearest entry is taken.

    Where it jumps is known no better than the inputs lie apart: one that is held out may be on either side.
    """
    seen = _samples(case)
    still = np.abs(np.diff(seen.ours)) < 0.01 * np.abs(np.diff(seen.right))
    if still.mean() < 0.5:
        return
    above = np.clip(np.searchsorted(seen.known, seen.x), 1, len(seen.known) - 1)
    either = [seen.factor * seen.ours[side] for side in (above - 1, above)]
    nearest = np.abs(case.ours - either[0]) < np.abs(case.ours - either[1])
    text = f"approximation, a function in steps, of {_distinct(seen.ours)} values"
    yield text, np.where(nearest, *either), case.halves()[1]


def _distinct(y: np.ndarray) -> int:
    """How many values there are, those as near as f32 can tell being one."""
    return 1 + int((np.diff(np.sort(y)) > 1e-6 * np.abs(y).max()).sum())


def _close(candidate: np.ndarray, right: np.ndarray) -> bool:
    """Whether a function is the right one but for a few percent."""
    return bool(np.linalg.norm(candidate - right) < _COARSE * np.linalg.norm(right))


_COARSE = 0.05


def _of_two(case: Case) -> Iterator[Guess]:
    """Some other function of the same two inputs, read off the even tokens and tried on the odd ones."""
    from scipy.interpolate import LinearNDInterpolator

    x, factor = (np.broadcast_to(part, case.ours.shape) for part in _shaped(case))
    fit, held = case.halves()
    points = np.stack([x[fit].ravel(), factor[fit].ravel()], axis=1)
    if fit == held or len(points) < 512 or np.ptp(points[:, 1]) == 0:
        return
    step = max(1, len(points) // _POINTS)
    known = LinearNDInterpolator(points[::step], case.ours[fit].ravel()[::step])
    candidate = case.ours.copy()
    told = known(np.stack([x[held].ravel(), factor[held].ravel()], axis=1)).reshape(case.ours[held].shape)
    inside = np.isfinite(told)
    if inside.mean() < 0.9:
        return
    candidate[held] = np.where(inside, told, case.ours[held])
    text = "activation, another function of the same two inputs"
    yield text, candidate, held


_POINTS = 8192  # of a function of two inputs that are looked at


def _shaped(case: Case) -> tuple[np.ndarray, np.ndarray]:
    x, factor = case.op.pointwise(case.view)
    return x.reshape(case.ours.shape), np.broadcast_to(factor, x.shape).reshape(case.ours.shape)


# --- sums: out = stream + branch --------------------------------------------------------------------------------


def _other_sum(case: Case) -> Iterator[Guess]:
    """Either part with a factor of its own, fitted on the even tokens."""
    stream, branch = (x.reshape(case.ours.shape) for x in case.op.summed(case.view))
    fit, held = case.halves()
    parts = np.stack([stream[fit].ravel(), branch[fit].ravel()], axis=1)
    (a, b), *_ = np.linalg.lstsq(parts, case.ours[fit].ravel(), rcond=None)
    name = "branch-gain" if abs(a - 1) < abs(b - 1) else "residual-gain"
    yield f"{name}, {a:.4g} times the stream and {b:.4g} times the branch", a * stream + b * branch, held


# --- softmax: out = exp(scores) over their sum -----------------------------------------------------------------


@of("kq_soft_max", "ffn_moe_probs")
def _temperature(case: Case) -> Iterator[Guess]:
    """All scores times one factor."""
    ours, right = (np.maximum(x, 1e-300) for x in (case.ours, case.right))
    seen = (case.ours > 1e-20) & (case.right > 1e-20)
    a, b = (_centred(np.log(x), seen) for x in (ours, right))
    factor = float((a * b).sum() / max((b * b).sum(), 1e-300))
    scores = np.where(case.right > 0, factor * np.log(right), -np.inf)
    yield f"missing-scale, the scores times {factor:.4g}", f.softmax(scores)


@of("kq_soft_max", "ffn_moe_probs")
def _other_exponential(case: Case) -> Iterator[Guess]:
    """Another function in place of the exponential, of what a score lies below the largest that is seen."""
    below = np.log(np.maximum(case.right, 1e-30) / np.maximum(case.right.max(axis=-1, keepdims=True), 1e-30))
    yield from exponential_of(case, below, "scores below the largest seen")


def exponential_of(case: Case, x: np.ndarray, word: str) -> Iterator[Guess]:
    """Another function of `x` in place of the exponential, read off the even rows and tried on the odd ones."""
    fit, held = case.halves()
    seen = (case.right > 0) & (case.ours > 0)
    if seen[fit].sum() < 64 or fit == held:
        return
    error = np.log(np.where(seen, case.ours, 1) / np.where(seen, case.right, 1))
    factor = np.exp(_curve(x, error, seen, fit))
    made = np.where(seen, case.right * factor, 0)
    candidate = made / np.maximum(made.sum(axis=-1, keepdims=True), 1e-300)
    if _close(candidate, case.right):
        yield f"approximation, another function in place of the exponential, of {word}", candidate, held


def _curve(x: np.ndarray, error: np.ndarray, seen: np.ndarray, fit: slice) -> np.ndarray:
    """The function of x that the errors are, but for a constant in every row: what the row's sum is off by.

    Function and constants are found in turn, on some of the rows in `fit`.
    """
    rows = slice(None, None, 1 + (x[fit].size >> 16))
    known, wrong, told = (part[fit][rows] for part in (x, error, seen))
    order = np.argsort(known[told])
    at, constant = known[told][order], 0.0
    for _ in range(_TURNS):
        y = (wrong + constant)[told][order]
        constant = _mean(np.interp(known, at, y) - wrong, told)
    return np.interp(x, at, y)


_TURNS = 100


def _mean(x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.where(seen, x, 0).sum(-1, keepdims=True) / np.maximum(seen.sum(-1, keepdims=True), 1)


def _centred(x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.where(seen, x - _mean(x, seen), 0)


@of("kq_soft_max", "ffn_moe_probs")
def _total(case: Case) -> Iterator[Guess]:
    """Right but for the number that each row is divided by."""
    if case.ours.shape[-1] < 4:
        return
    half = np.arange(case.ours.shape[-1]) % 2 == 0
    right, ours = (np.where(half, x, 0).sum(-1, keepdims=True) for x in (case.right, case.ours))
    total = np.divide(ours, right, out=np.ones_like(ours), where=right > 0)
    text = f"softmax-normalisation, each row sums to another total, {case.ours.sum(-1).min():.3g} to "
    yield text + f"{case.ours.sum(-1).max():.3g}", total * case.right


@of("ffn_moe_weights_norm")
def _other_divisor(case: Case) -> Iterator[Guess]:
    """The chosen weights over something else than their sum: a multiple of it and a constant."""
    weights = flat(case.view("ffn_moe_weights")).astype(np.float64)
    ours, total = case.ours.reshape(weights.shape), weights.sum(axis=-1, keepdims=True)
    fit, held = case.halves()
    terms = np.stack([(ours * total)[fit].ravel(), ours[fit].ravel()], axis=1)
    (a, b), *_ = np.linalg.lstsq(terms, weights[fit].ravel(), rcond=None)
    yield (
        f"router, the weights are divided by {a:.4g} times their sum plus {b:.4g}",
        weights / (a * total + b),
        held,
    )


# --- tables: out = table[ids] ----------------------------------------------------------------------------------


@of("model.input_embed")
def _other_rows(case: Case) -> Iterator[Guess]:
    """Wrong rows that are those of other ids."""
    view = case.view
    if view.run.given is None or case.hit is None:
        return
    table = view.weight("token_embd")
    wrong = case.hit[0][:64]
    if table.size > 1 << 26:
        return
    ids = np.asarray(view.facts.tokens)[slice(*view.facts.kept)]
    read = np.array([((table - case.ours[t]) ** 2).sum(axis=1).argmin() for t in wrong])
    candidate = case.right.copy()
    candidate[wrong] = table[read]
    pairs = ", ".join(f"{a} reads {b}" for a, b in list(zip(ids[wrong], read, strict=True))[:4])
    yield f"{other_rows(ids[wrong], read)}, ids read the rows of others: {pairs}", candidate


# --- products: out = x W^T -------------------------------------------------------------------------------------

_INPUTS = 2048  # wider products are not taken apart input by input


class _Product(NamedTuple):
    """One matrix and the rows of a case that it makes: all, or those of one expert. x (rows, in), w (out, in)."""

    rows: np.ndarray
    x: np.ndarray
    w: np.ndarray


def inputs_alone(case: Case) -> list[Hypothesis]:
    """Some inputs of a product left out, counted twice, or taken in another order, read off by least squares."""
    found: list[Hypothesis] = []
    if case.op is None or case.view is None or not case.op.weight or not np.isfinite(case.ours).all():
        return found
    try:
        products = _products(case)
        looks = [_missing_inputs(case, products)]
        if len(products) == 1:
            looks += [look(case, products[0].x, products[0].w) for look in (_permuted_inputs, _blocks)]
        for guess in itertools.chain(*looks):
            found.append(_scored(case, *guess))
    except FAILURES:
        pass
    return found


def _products(case: Case) -> list[_Product]:
    """The products that the operation is, a matrix each."""
    made: list[tuple[np.ndarray, np.ndarray]] = []
    asked: list[np.ndarray] = []  # rows of each expert
    view, linear, expert = case.view.fresh(), case.view.linear, case.view.expert

    def by_matrix(stem: str, x: np.ndarray) -> np.ndarray:
        if stem == case.op.weight:
            made.append((x, view.weight(stem)))
        return linear(stem, x)

    def by_expert(stem: str, number: int, x: np.ndarray) -> np.ndarray:
        if stem == case.op.weight:
            made.append((x, view.weight(stem)[number]))
            asked.append(np.flatnonzero(case.experts == number))
        return expert(stem, number, x)

    view.linear, view.expert = by_matrix, by_expert
    case.op.run(view)
    if not made or (not asked and len(made) > 1):
        raise Missing(case.op.weight)
    rows = asked or [np.arange(len(case.ours))]
    products = [
        _Product(at, flat(x).astype(np.float64), w.astype(np.float64))
        for at, (x, w) in zip(rows, made, strict=True)
    ]
    for at, x, w in products:
        if w.ndim != 2 or w.shape[1] > _INPUTS or x.shape != (len(at), w.shape[1]):
            raise Missing(case.op.weight)
    return products


def _missing_inputs(case: Case, products: list[_Product]) -> Iterator[Guess]:
    fit, held = case.halves()
    residual, right = (x.reshape(len(case.ours), -1) for x in (case.residual, case.right))
    fitted = np.zeros(len(residual), bool)
    fitted[fit] = True
    gram, seen = 0.0, 0.0
    for rows, x, w in products:
        use = fitted[rows]
        gram = gram + (x[use].T @ x[use]) * (w.T @ w)
        seen = seen + ((x[use].T @ residual[rows[use]]) * w.T).sum(1)
    counted, *_ = np.linalg.lstsq(gram, seen, rcond=1e-12)
    candidate = right.copy()
    for rows, x, w in products:
        candidate[rows] += (x * counted) @ w.T
    off = np.flatnonzero(np.abs(counted) > 0.05)
    if not len(off) or len(off) > 0.5 * len(counted):
        return
    gain = float(np.median(counted[off]))
    name = (
        "missing-inputs" if abs(gain + 1) < 0.1 else "double-inputs" if abs(gain - 1) < 0.1 else "input-gain"
    )
    word = {"missing-inputs": "left out", "double-inputs": "counted twice"}.get(name, "scaled otherwise")
    yield f"{name}, inputs {listed(off)} of {len(counted)} are {word}", candidate, held


_BLOCKS = (8, 16, 32, 64, 128, 256)
_ROWS = 192  # of a weight that are looked at: what is wrong with its blocks is so in every row


def _blocks(case: Case, x: np.ndarray, w: np.ndarray) -> Iterator[Guess]:
    """Blocks of a weight's rows with another scale or another minimum each, as wrongly read ones have."""
    fit, held = case.halves()
    rows = np.linspace(0, len(w) - 1, min(_ROWS, len(w))).astype(int)
    residual = case.residual.reshape(len(x), -1)[:, rows]
    for size in (n for n in _BLOCKS if w.shape[1] % n == 0):
        count = w.shape[1] // size
        if count < 2 or 2 * count > len(x[fit]):
            continue
        inputs, blocks = x.reshape(len(x), count, size), w[rows].reshape(len(rows), count, size)
        scaled = np.einsum("tbi,obi->otb", inputs, blocks)
        shifted = np.broadcast_to(inputs.sum(axis=-1), scaled.shape)
        for name, word, terms in (("block-scale", "scale", scaled), ("block-minimum", "minimum", shifted)):
            found = np.linalg.pinv(terms[:, fit], rcond=1e-9) @ residual[fit].T[..., None]
            candidate = case.ours.reshape(len(x), -1).copy()
            candidate[:, rows] = case.right.reshape(len(x), -1)[:, rows] + (terms @ found)[..., 0].T
            yield f"{name}, every block of {size} weights has another {word}", candidate, held


def _permuted_inputs(case: Case, x: np.ndarray, w: np.ndarray) -> Iterator[Guess]:
    from scipy.optimize import linear_sum_assignment

    y = case.ours.reshape(len(x), -1)
    back = y @ w @ np.linalg.inv(w.T @ w + 1e-3 * np.trace(w.T @ w) / len(w.T) * np.eye(len(w.T)))
    score = (back.T @ x) / np.maximum(
        np.linalg.norm(back, axis=0)[:, None] * np.linalg.norm(x, axis=0), 1e-300
    )
    order = linear_sum_assignment(-score)[1]
    if (order == np.arange(len(order))).all():
        return
    yield f"input-permutation, inputs are exchanged: 0.. are the right {listed(order)}", x[:, order] @ w.T
