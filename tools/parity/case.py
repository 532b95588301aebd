"""One broken tap as its explanations see it, and what an explanation says."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from scarlet_jax.tools.parity import graph
from scarlet_jax.tools.parity.verdict import Tap
from scarlet_jax.tools.parity.view import LayerView

# Findings that say where the error sits, which is no cause: told in words beside it.
PLACES = (
    *("some-tokens", "some-heads", "channel-range", "channel-period", "late-tokens", "early-tokens"),
    "scattered",
)


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
            "kind": "place" if self.name in PLACES else self.kind,
            "class": self.op.klass if self.op else None,
        }


@dataclasses.dataclass(frozen=True)
class Case:
    """What a hypothesis is judged on.

    `ours` is the broken output, `right` what the formula makes of our engine's inputs (or the reference's output
    where there is no formula), both (T, ...) float64; `floor` the expected error of the whole array. `experts`:
    whose each row is, where a token has a row from each of its experts.
    """

    ours: np.ndarray
    right: np.ndarray
    floor: float
    view: LayerView | None
    op: graph.Op | None
    tap: Tap
    experts: np.ndarray | None = None

    @functools.cached_property
    def residual(self) -> np.ndarray:
        """What has to be explained."""
        return self.ours - self.right

    def share(self, candidate: np.ndarray, rows: Any = slice(None)) -> float:
        """The part of the residual's energy that `candidate` in place of the right output explains, on `rows`.

        Where our output is next to nothing it is that which has to be met: anything small would explain the residual.
        """
        whole, left = self.residual[rows], (self.ours - candidate)[rows]
        energy = min(float((whole**2).sum()), float((self.ours[rows] ** 2).sum()))
        expected = self.floor**2 * whole.size / max(1, self.residual.size)
        if energy <= expected or not np.isfinite(left).all():
            return 0.0
        return 1.0 - max(0.0, float((left**2).sum()) - expected) / energy

    def halves(self) -> tuple[slice, slice]:
        """Fitting rows and held-out rows; with a single row both are it."""
        return (slice(0, None, 2), slice(1, None, 2)) if len(self.ours) > 1 else (slice(None), slice(None))

    @functools.cached_property
    def hit(self) -> tuple[np.ndarray, ...] | None:
        """Indices of the tokens, heads and channels that are wrong, an array an axis; None where nearly all are."""
        if self.ours.ndim < 2 or not np.isfinite(self.residual).all():
            return None
        energy = self.residual**2
        found = tuple(
            self._above(energy.sum(axis=tuple(a for a in range(energy.ndim) if a != axis)))
            for axis in range(energy.ndim)
        )
        whole = all(len(at) >= 0.9 * n for at, n in zip(found, self.ours.shape, strict=False))
        return None if whole or not all(len(at) for at in found) else found

    @functools.cached_property
    def wrong(self) -> np.ndarray:
        """bool, which elements are wrong."""
        energy = self.residual**2
        return energy > max((10 * self.floor) ** 2 / max(1, energy.size), 1e-9 * energy.max(initial=0))

    def _above(self, energy: np.ndarray) -> np.ndarray:
        floor = (10 * self.floor) ** 2 / max(1, len(energy))
        return np.flatnonzero(energy > max(floor, 1e-6 * energy.max(initial=0)))

    def within(self, candidate: np.ndarray) -> np.ndarray:
        """`candidate` where our output is wrong, the right output elsewhere."""
        assert self.hit is not None
        mixed = self.right.copy()
        mixed[np.ix_(*self.hit)] = candidate[np.ix_(*self.hit)]
        return mixed

    def part(self) -> Case | None:
        """The wrong part alone, for structures that one head or a few tokens have; None where all is wrong."""
        if self.hit is None:
            return None
        at = np.ix_(*self.hit)
        ours, right = self.ours[at], self.right[at]
        floor = self.floor * (ours.size / self.ours.size) ** 0.5
        return dataclasses.replace(self, ours=ours, right=right, floor=floor, view=None, experts=None)

    def where(self) -> str:
        """The wrong part in words."""
        assert self.hit is not None
        words = ("tokens", "heads", "channels") if self.ours.ndim == 3 else ("tokens", "channels")
        parts = [
            (word, at, n)
            for at, n, word in zip(self.hit, self.ours.shape, words, strict=False)
            if len(at) < 0.9 * n
        ]
        broken = self._broken_experts()
        if broken is not None:
            parts[0] = ("experts", broken, int(self.experts.max()) + 1)
        return " and ".join(f"{word} {listed(at)} of {n}" for word, at, n in parts)

    def _broken_experts(self) -> np.ndarray | None:
        """The experts whose rows are wrong, all of them and no others; None where that is not how it is."""
        if self.experts is None or self.hit is None or len(self.hit[0]) >= 0.9 * len(self.ours):
            return None
        broken = np.unique(self.experts[self.hit[0]])
        return broken if np.isin(self.experts, broken).sum() == len(self.hit[0]) else None


def other_rows(ids: np.ndarray, read: np.ndarray) -> str:
    """What a person calls it when tokens `ids` find the rows of the ids `read`."""
    if len(np.unique(read)) == 1 < len(np.unique(ids)):
        return "token-clamp"
    return "token-offset" if len(np.unique(read - ids)) == 1 else "wrong-row"


def listed(values: np.ndarray) -> str:
    """Integers as a short list: runs as "3 to 9", at most six pieces."""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1) if len(values) else []
    pieces = [str(int(r[0])) if len(r) == 1 else f"{int(r[0])} to {int(r[-1])}" for r in runs]
    return ", ".join(pieces[:6]) + (", ..." if len(pieces) > 6 else "")
