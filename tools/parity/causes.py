"""The name of a fault, from the shape of what it left behind.

Three kinds of hypothesis compete to explain the first broken tap: the operation's known misreadings re-run on our
engine's own inputs, structures that any operation may show (a gain, a permutation, a shift, a period), and, for a
product with a quantised weight, misread bits of its blocks. What a hypothesis has to fit is fitted on every other
token and its share of the residual is measured on the tokens held back. A name is given only where the held-out
share leaves little to chance; otherwise the cause stays unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from scarlet_jax.tools.parity import bits, graph, structure, swaps
from scarlet_jax.tools.parity.local import Pair, judge
from scarlet_jax.tools.parity.verdict import Tap
from scarlet_jax.tools.parity.view import LayerView

ENOUGH = 0.90  # held-out share of the residual's energy that a hypothesis must explain
CERTAIN = 0.999  # and the share above which nothing simpler is looked for


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One explanation: its name, how much it explains on held-out tokens, and in words why."""

    name: str
    explained: float
    evidence: str
    kind: str
    simplicity: int = 0  # lower is simpler: breaks ties
    op: graph.Op | None = None  # the operation at fault, where it is one that was not dumped

    def as_cause(self) -> dict[str, Any]:
        """The report's `cause`, and `kind` for the verdict."""
        return {
            "name": self.name,
            "evidence": self.evidence,
            "confidence": round(float(max(0.0, min(1.0, self.explained))), 4),
            "kind": "place" if self.name in _PLACES else self.kind,
            "class": self.op.klass if self.op else None,
        }


@dataclasses.dataclass(frozen=True)
class Case:
    """What a hypothesis is judged on.

    `ours` is the broken output, `right` what the formula makes of our engine's inputs (or the reference's output
    where there is no formula), both (T, ...) float64; `floor` the expected error of each element.
    """

    ours: np.ndarray
    right: np.ndarray
    floor: float
    view: LayerView | None
    op: graph.Op | None
    tap: Tap

    @property
    def residual(self) -> np.ndarray:
        """What has to be explained."""
        return self.ours - self.right


def name(pair: Pair, taps: Sequence[Tap], first: Tap, weights: Any = None) -> dict[str, Any] | None:
    """The cause of the first broken tap, or None where nothing explains it.

    Where only the place of the error shows at the first tap, later taps broken the same way (one operation,
    or one quant type) may show more.
    """
    alike = [
        t
        for t in taps
        if t.broken and t is not first and (t.op == first.op or (t.qtype and t.qtype == first.qtype))
    ]
    best: Hypothesis | None = None
    for tap in [first, *alike[:2]]:
        found = _explain(pair, tap, weights)
        if found is not None and (best is None or found.simplicity < best.simplicity):
            best = found
        if best is not None and best.simplicity <= 4:
            break
    return best.as_cause() if best else None


# Findings that say where the error sits, which is no cause: told in words beside it.
_PLACES = ("some-tokens", "some-heads", "channel-range", "channel-period", "late-tokens", "early-tokens")


def _explain(pair: Pair, tap: Tap, weights: Any) -> Hypothesis | None:
    case = _case(pair, tap)
    if tap.metrics.not_finite[0]:
        return _not_finite(case)
    found = [*_variants(case), *_inner_variants(case), *structure.hypotheses(case, pair, Hypothesis)]
    found += [*swaps.other_taps(case, pair, Hypothesis), *swaps.other_inputs(case, Hypothesis)]
    if weights is not None and case.op is not None and case.op.weight:
        found += swaps.other_weights(case, weights, Hypothesis)
        found += bits.hypotheses(case, weights, Hypothesis) if tap.qtype else []
    good = [h for h in found if h.explained >= ENOUGH]
    return _best(good) if good else None


def _best(found: Sequence[Hypothesis]) -> Hypothesis:
    """What explains most; among those that explain practically all, the simplest."""
    top = max(h.explained for h in found)
    slack = 0.02 if top < CERTAIN else max(1e-3, 0.1 * (1 - top))
    close = [h for h in found if h.explained >= top - slack]
    return min(close, key=lambda h: (h.simplicity, -h.explained))


def _case(pair: Pair, tap: Tap) -> Case:
    op = graph.find(tap.op, tap.kind)
    with np.errstate(all="ignore"):
        tap = dataclasses.replace(tap, local=judge(pair, op, tap.layer, tap.kind, tap.name))
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
    return Case(ours, right.reshape(ours.shape), floor, view, op, tap)


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


def share(case: Case, candidate: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
    """The part of the residual's energy that `candidate` in place of the right output explains, on `rows`."""
    left = (case.ours - candidate)[rows]
    energy = float((case.residual[rows] ** 2).sum())
    if not energy or not np.isfinite(left).all():
        return 0.0
    size = case.residual.size / max(1, case.residual[rows].size)
    return 1.0 - max(0.0, float((left**2).sum()) - case.floor**2 / size) / energy


def _variants(case: Case) -> list[Hypothesis]:
    """The operation's known misreadings, re-run."""
    if case.op is None or case.view is None:
        return []
    found = []
    for label, run in case.op.variants.items():
        try:
            with np.errstate(all="ignore"):
                candidate = np.asarray(run(case.view), np.float64)
        except (graph.Missing, ValueError, IndexError, KeyError, ZeroDivisionError, np.linalg.LinAlgError):
            continue
        if candidate.size != case.ours.size:
            continue
        explained = share(case, candidate.reshape(case.ours.shape))
        short = label.split(",")[0].split("=")[0].strip()
        found.append(
            Hypothesis(short, explained, f"re-run as '{label}': {explained:.2%} explained", "variant")
        )
    return found


def _inner_variants(case: Case) -> list[Hypothesis]:
    """Misreadings of the operations between the last dumped taps and this one."""
    if case.op is None or case.view is None:
        return []
    probe = case.view.fresh()
    try:
        case.op.run(probe)
    except (graph.Missing, ValueError):
        return []
    found = []
    for op in probe.computed:
        for label, run in op.variants.items():
            view = case.view.fresh()
            view.instead[op.name] = run
            try:
                with np.errstate(all="ignore"):
                    candidate = np.asarray(case.op.run(view), np.float64)
            except (graph.Missing, ValueError, IndexError, KeyError, AttributeError, np.linalg.LinAlgError):
                continue
            if candidate.size == case.ours.size:
                explained = share(case, candidate.reshape(case.ours.shape))
                text = f"re-run with {op.name} as '{label}': {explained:.2%} explained"
                found.append(Hypothesis(label.split(",")[0].split("=")[0], explained, text, "variant", 1, op))
    return found
