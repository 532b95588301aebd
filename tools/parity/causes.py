"""The name of a fault, from the shape of what it left behind.

Three kinds of hypothesis compete to explain the first broken tap: the operation's known misreadings re-run on our
engine's own inputs, structures that any operation may show (a gain, a permutation, a shift, a period), and, for a
product with a quantised weight, misread bits of its blocks. What a hypothesis has to fit is fitted on every other
token and its share of the residual is measured on the tokens held back. A name is given only where the held-out
share leaves little to chance; otherwise the cause stays unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scarlet_jax.tools.parity import bits, graph, guess, operands, own, structure, swaps
from scarlet_jax.tools.parity import guess_mixers as _guess_mixers  # noqa: F401 - registers its guesses
from scarlet_jax.tools.parity.case import PLACES, Case, Hypothesis
from scarlet_jax.tools.parity.local import Pair, judge_whole, some_tokens
from scarlet_jax.tools.parity.verdict import Tap, family

ENOUGH = 0.90  # held-out share of the residual's energy that a hypothesis must explain
CERTAIN = 0.999  # and the share above which nothing simpler is looked for


def name(pair: Pair, taps: Sequence[Tap], first: Tap, weights: Any = None) -> dict[str, Any] | None:
    """The cause of the first broken tap, or None where nothing explains it.

    Where only the place of the error shows at the first tap, later taps broken the same way (one operation,
    or one quant type) may show more.
    """
    alike = [t for t in taps if t.broken and t is not first and _alike(t, first)]
    best: Hypothesis | None = None
    for tap in [first, *alike[:2]]:
        found = _explain(pair, tap, weights)
        if found is not None and (best is None or _rank(found) < _rank(best)):
            best = found
        if best is not None and best.name not in PLACES:
            break
    return best.as_cause() if best else None


def _alike(tap: Tap, first: Tap) -> bool:
    """Whether a later tap is broken the same way: another half of one operation, the operation, the type."""
    same_place = tap.layer == first.layer and family(tap) == family(first)
    return same_place or tap.op == first.op or bool(tap.qtype and tap.qtype == first.qtype)


def _rank(found: Hypothesis) -> tuple[bool, int]:
    return found.name in PLACES, found.simplicity


def _explain(pair: Pair, tap: Tap, weights: Any) -> Hypothesis | None:
    with np.errstate(all="ignore"):
        pair = some_tokens(pair, graph.find(tap.op, tap.kind), tap.name, _first_wrong(tap))
        case = _case(pair, tap)
    if tap.metrics.not_finite[0]:
        return _not_finite(case)
    found = [*_variants(case), *_inner_variants(case), *structure.hypotheses(case, pair, Hypothesis)]
    found += [*guess.hypotheses(case), *guess.inputs_alone(case), *_in_part(case, pair)]
    found += [*swaps.other_taps(case, pair, Hypothesis), *swaps.other_inputs(case, Hypothesis)]
    found += operands.hypotheses(case)
    found += [*swaps.unknown_matrix(case, pair, Hypothesis), *swaps.tied_head(case, pair, Hypothesis)]
    known = weights if weights is not None else pair.reference.learned
    found += swaps.other_weights(case, known, Hypothesis)
    if case.op is not None and case.op.weight:
        found += bits.hypotheses(case, weights, Hypothesis) if weights is not None and tap.qtype else []
    enough = [h for h in found if h.explained >= ENOUGH]
    causes, places = ([h for h in enough if (h.name in PLACES) == place] for place in (False, True))
    return (
        _best(causes) or _best(structure.hypotheses(case, pair, Hypothesis, structure.LAST)) or _best(places)
    )


def _first_wrong(tap: Tap) -> int:
    """The first token whose divergence is of the order of the worst one's."""
    curve = tap.local.tokens if tap.local else tap.metrics.tokens
    return int(np.argmax(curve > 0.1 * np.max(curve, initial=0.0))) if len(curve) else 0


def _in_part(case: Case, pair: Pair) -> Iterator[Hypothesis]:
    """What the wrong tokens, heads or channels have among themselves, where the rest is right."""
    part = case.part()
    if part is None:
        return
    for found in structure.hypotheses(part, pair, Hypothesis, structure.IN_PART):
        where = case.where()
        name = f"{where.split('s ')[0]}-gain" if found.name in ("gain", "missing-scale") else found.name
        yield dataclasses.replace(
            found, name=name, evidence=f"{where}: {found.evidence}", simplicity=found.simplicity + 1
        )


def _best(found: Sequence[Hypothesis]) -> Hypothesis | None:
    """What explains most; among those that explain practically all, the simplest; None of none."""
    if not found:
        return None
    top = max(h.explained for h in found)
    slack = 0.02 if top < CERTAIN else max(1e-3, 0.1 * (1 - top))
    close = [h for h in found if h.explained >= top - slack]
    return min(close, key=lambda h: (h.simplicity, -h.explained))


def _case(pair: Pair, tap: Tap) -> Case:
    op = graph.find(tap.op, tap.kind)
    if tap.own:
        return _own_case(pair, tap, op)
    tap = dataclasses.replace(tap, local=judge_whole(pair, op, tap.layer, tap.kind, tap.name))
    if any(pair.sampled):
        return _sampled_case(pair, tap, op)
    ours = np.asarray(pair.ours.taps[tap.name], np.float64)
    reference = np.asarray(pair.reference.taps[tap.name], np.float64)
    facts = pair.chosen.get((tap.kind, tap.op), pair.reference.facts)
    view = pair.ours.view(tap.layer, tap.kind, facts, arithmetic=pair.arithmetic[0].strict()) if op else None
    floor = (tap.local.floor if tap.local else 0.0) * float(np.linalg.norm(reference))
    right = reference
    if tap.local is not None and tap.local.method in ("formula", "span"):
        right = ours - tap.local.ours_residual
        if tap.local.method == "formula" and tap.local.ours < 0.3 * tap.local.reference:
            # Our engine follows the formula and the reference does not: explain the reference's departure.
            view = pair.reference.view(tap.layer, tap.kind, facts, arithmetic=pair.arithmetic[1].strict())
            right, ours = reference - (tap.local.ours_residual - tap.local.residual), reference
    return _laid_out(Case(ours, right.reshape(ours.shape), floor, view, op, tap))


def _own_case(pair: Pair, tap: Tap, op: graph.Op) -> Case:
    """A tap that only our dump has: against what its own inputs give."""
    run, facts, arithmetic = own.whole_run(pair), tap.local.facts, pair.arithmetic[0].strict()
    ours = np.asarray(run.taps[tap.name], np.float64)
    view, again = (run.view(tap.layer, tap.kind, facts, arithmetic=arithmetic) for _ in range(2))
    right = np.asarray(op.run(again), np.float64).reshape(ours.shape)
    return _laid_out(Case(ours, right, tap.local.floor * _norm(ours), view, op, tap))


def _laid_out(case: Case) -> Case:
    """Heads of one value as channels, and every expert's row of a token as a row of its own."""
    shape, experts = case.ours.shape, None
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 3 and case.tap.klass == "moe":
        experts = _experts_asked(case, shape[0] * shape[1])
        shape = (-1, shape[2])
    return dataclasses.replace(
        case, ours=case.ours.reshape(shape), right=case.right.reshape(shape), experts=experts
    )


def _experts_asked(case: Case, rows: int) -> np.ndarray | None:
    """Which expert each row is of."""
    if case.view is None or not case.view.has("ffn_moe_topk"):
        return None
    asked = np.rint(case.view("ffn_moe_topk")).astype(np.int64).ravel()
    return asked if len(asked) == rows else None


def _sampled_case(pair: Pair, tap: Tap, op: graph.Op | None) -> Case:
    """A log against a dump: the dump against the formula, or else the few entries that both have."""
    floor = tap.local.floor if tap.local else 0.0
    if tap.local is not None and tap.local.method == "formula" and pair.whole is not None:
        run = pair.whole[1 if pair.sampled[0] else 0]
        ours = np.asarray(run.taps[tap.name], np.float64)
        view = run.view(tap.layer, tap.kind, tap.local.facts)
        return Case(ours, ours - tap.local.ours_residual, floor * _norm(ours), view, op, tap)
    ours, reference = (np.asarray(run.taps[tap.name], np.float64) for run in (pair.ours, pair.reference))
    return Case(ours, reference, floor * _norm(reference), None, None, tap)


def _norm(x: np.ndarray) -> float:
    return float(np.sqrt(np.vdot(x, x)))


def _not_finite(case: Case) -> Hypothesis:
    bad = np.argwhere(~np.isfinite(case.ours))
    share = len(bad) / max(1, case.ours.size)
    at = tuple(int(i) for i in bad[0]) if len(bad) else ()
    return Hypothesis("nan", 1.0, f"{share:.1%} of the elements are NaN or infinite, first at {at}", "nan")


def _variants(case: Case) -> list[Hypothesis]:
    """The operation's known misreadings, re-run; where only a part is wrong, in that part too."""
    if case.op is None or case.view is None:
        return []
    found = []
    for label, run in case.op.variants.items():
        candidate = _candidate(case, run, case.view)
        if candidate is not None:
            found += _scored(case, candidate, label, f"re-run as '{label}'")
    return found


def _candidate(case: Case, run: graph.Run, view: Any) -> np.ndarray | None:
    """What a formula gives, in the case's shape; None where it cannot be run."""
    try:
        with np.errstate(all="ignore"):
            candidate = np.asarray(run(view), np.float64)
    except graph.FAILURES:
        return None
    return candidate.reshape(case.ours.shape) if candidate.size == case.ours.size else None


def _scored(
    case: Case, candidate: np.ndarray, label: str, text: str, simplicity: int = 0, op: graph.Op | None = None
) -> Iterator[Hypothesis]:
    short = label.split(",")[0].split("=")[0].strip()
    explained = case.share(candidate)
    yield Hypothesis(short, explained, f"{text}: {explained:.2%} explained", "variant", simplicity, op)
    if case.hit is not None:
        explained = case.share(case.within(candidate))
        text = f"{case.where()}: {text}: {explained:.2%} explained"
        yield Hypothesis(short, explained, text, "variant", simplicity + 1, op)


def _inner_variants(case: Case) -> list[Hypothesis]:
    """Misreadings of the operations between the last dumped taps and this one."""
    if case.op is None or case.view is None:
        return []
    probe = case.view.fresh()
    try:
        case.op.run(probe)
    except graph.FAILURES:
        return []
    found = []
    for op in probe.computed:
        for label, run in op.variants.items():
            view = case.view.fresh()
            view.instead[op.name] = run
            candidate = _candidate(case, case.op.run, view)
            if candidate is not None:
                found += _scored(case, candidate, label, f"re-run with {op.name} as '{label}'", 1, op)
    return found
