"""Alignment: which tap of one dump is which of the other, and how its axes have to be turned to meet.

Shapes alone decide wherever they can; only where they leave a choice do the values. What was done to each tap is
in its `how`, and a tap that finds no partner is listed. An array whose shape already fits is never rearranged:
that would hide a permutation, which is a fault.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from scarlet_jax.tools.parity.dump import FORMAT, Dump
from scarlet_jax.tools.parity.graph import visible
from scarlet_jax.tools.parity.logs import Sampled

Change = Callable[[np.ndarray], np.ndarray]
_SAMPLE = 1 << 16  # elements compared when values have to choose between arrangements


@dataclasses.dataclass(frozen=True)
class Match:
    """One tap in both dumps: how to read each side, and what was done, in a word."""

    name: str
    ours: Change
    reference: Change
    how: str


@dataclasses.dataclass(frozen=True)
class Alignment:
    """All matches in the reference's execution order, and the names without one."""

    matches: dict[str, Match]
    only_ours: list[str]
    only_reference: list[str]


class Aligned(Mapping[str, np.ndarray]):
    """One dump's matched taps, in the common arrangement, fetched when asked for."""

    def __init__(self, dump: Mapping[str, np.ndarray], matches: Mapping[str, Match], side: str):
        self._dump, self._matches, self._side = dump, matches, side

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._matches:
            return self._dump[name]
        return getattr(self._matches[name], self._side)(self._dump[name])

    def __contains__(self, name: object) -> bool:
        return name in self._matches or name in self._dump

    def __iter__(self) -> Iterator[str]:
        return iter(self._matches)

    def __len__(self) -> int:
        return len(self._matches)


class Whole(Mapping[str, np.ndarray]):
    """A dump as it is, but for what engines may leave out of it."""

    def __init__(self, dump: Mapping[str, np.ndarray]):
        self._dump = dump

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._dump[name]
        return visible(array) if name.startswith("kq-") and not isinstance(array, Sampled) else array

    def __contains__(self, name: object) -> bool:
        return name in self._dump

    def __iter__(self) -> Iterator[str]:
        return iter(self._dump)

    def __len__(self) -> int:
        return len(self._dump)


def align(ours: Dump, reference: Dump) -> Alignment:
    """Match the taps of two dumps by name, then by shape."""
    matches = {}
    fixed = ours.format == reference.format == FORMAT  # our own format says how a state lies
    lead = ours.format == FORMAT != reference.format  # the layout that operations are written for is kept
    for name in reference:
        if name in ours:
            match = _match(name, ours[name], reference[name], lead)
            if match is not None and not fixed and name.rpartition("-")[0] in _STATES:
                match = _other_way_round(match, ours[name], reference[name])
            if match is not None:
                matches[name] = match
    return Alignment(
        matches,
        [name for name in ours if name not in matches],
        [name for name in reference if name not in matches],
    )


# Square in every known model, so that no shape tells which of the two axes is which.
_STATES = ("state_predelta", "new_state")


def _other_way_round(match: Match, ours: np.ndarray, reference: np.ndarray) -> Match:
    """A state stored with keys and values exchanged, as some engines do."""
    if (
        match.how == "sampled"
        or ours.ndim < 2
        or ours.shape[-1] != ours.shape[-2]
        or ours.shape != reference.shape
    ):
        return match
    turned = np.swapaxes(ours, -1, -2)
    if _error(ours, reference) < 0.1 or _error(turned, reference) > 0.1:
        return match
    return dataclasses.replace(match, ours=lambda x: np.swapaxes(x, -1, -2), how="transpose")


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _match(name: str, ours: np.ndarray, reference: np.ndarray, lead: bool) -> Match | None:
    match = _by_shape(name, ours, reference, lead)
    if match is None or not name.startswith("kq-") or match.how.startswith("sampled"):
        return match
    return dataclasses.replace(
        match, ours=lambda x: visible(match.ours(x)), reference=lambda x: visible(match.reference(x))
    )


def _by_shape(name: str, ours: np.ndarray, reference: np.ndarray, lead: bool) -> Match | None:
    """As the shapes allow; where both could be turned, the reference is turned if ours is to `lead`."""
    if isinstance(ours, Sampled) or isinstance(reference, Sampled):
        return _sampled(name, ours, reference)
    if ours.shape == reference.shape:
        return Match(name, _same, _same, "as-is")
    if ours.size == reference.size:
        if lead:
            how, change = _rearrange(reference, ours)
            return Match(name, _same, change, how)
        how, change = _rearrange(ours, reference)
        return Match(name, change, _same, how)
    return _rows(name, ours, reference, lead) or _padded(name, ours, reference)


def _sampled(name: str, ours: np.ndarray | Sampled, reference: np.ndarray | Sampled) -> Match | None:
    """A log's few entries: the other side is read at the same places."""
    if ours.size != reference.size:
        return None
    if isinstance(ours, Sampled) and isinstance(reference, Sampled):
        if ours.values.shape != reference.values.shape or ours.shape != reference.shape:
            return None
        return Match(name, lambda x: x.values, lambda x: x.values, "sampled")
    few, side = (ours, "ours") if isinstance(ours, Sampled) else (reference, "reference")
    assert isinstance(few, Sampled)
    changes = {"ours": few.of, "reference": few.of} | {side: lambda x: x.values}
    return Match(name, changes["ours"], changes["reference"], "sampled")


def _rearrange(ours: np.ndarray, reference: np.ndarray) -> tuple[str, Change]:
    """The order of axes that fits the reference's shape; several fit, the values choose, a plain reshape first."""
    shape = reference.shape
    squeezed = ours.reshape([n for n in ours.shape if n != 1])
    options: list[tuple[str, Change]] = [("reshape", lambda x: x.reshape(shape))]
    target = [n for n in shape if n != 1]
    for order in itertools.permutations(range(squeezed.ndim)):
        turned = [squeezed.shape[axis] for axis in order]
        if list(order) != sorted(order) and _folds(turned, target):
            options.append(
                ("transpose", lambda x, o=order, s=squeezed.shape: x.reshape(s).transpose(o).reshape(shape))
            )
    if len(options) == 1 or not _splits(squeezed.shape, target):
        options = options[1:] if len(options) > 1 and not _splits(squeezed.shape, target) else options
    errors = [_error(change(ours), reference) for _, change in options]
    best = int(np.argmin(errors))
    return options[best if errors[best] < 0.5 * errors[0] else 0]


def _folds(source: list[int], target: list[int]) -> bool:
    """Whether `source` becomes `target` by joining or splitting neighbouring axes."""
    return _boundaries(target) <= _boundaries(source) or _boundaries(source) <= _boundaries(target)


def _splits(source: tuple[int, ...], target: list[int]) -> bool:
    return _folds(list(source), target)


def _boundaries(shape: list[int]) -> set[int]:
    return set(np.cumprod(shape).tolist())


def _rows(name: str, ours: np.ndarray, reference: np.ndarray, lead: bool) -> Match | None:
    """Token rows that one engine left out: the last ones (output rows only) or a padded tail."""
    if (
        not (ours.ndim and reference.ndim)
        or ours[:1].size != reference[:1].size
        or not (len(ours) and len(reference))
    ):
        return None
    short = min(len(ours), len(reference))
    target = (short, *(ours if lead else reference).shape[1:])
    last: Change = lambda x: x[-short:].reshape(target)  # noqa: E731
    first: Change = lambda x: x[:short].reshape(target)  # noqa: E731
    picks = {f"last {short} rows": last, f"first {short} rows": first}
    errors = {how: _error(pick(ours), pick(reference)) for how, pick in picks.items()}
    how = min(errors, key=lambda key: errors[key])
    return Match(name, picks[how], picks[how], how)


def _padded(name: str, ours: np.ndarray, reference: np.ndarray) -> Match | None:
    """The last axis padded on one side (key slots of a cache)."""
    if ours.ndim != reference.ndim or ours.shape[:-1] != reference.shape[:-1] or ours.ndim < 3:
        return None
    short = min(ours.shape[-1], reference.shape[-1])

    def crop(x: np.ndarray) -> np.ndarray:
        return x[..., :short]

    return Match(name, crop, crop, f"first {short} slots")


def _error(a: np.ndarray, b: np.ndarray) -> float:
    """Relative difference of a sample."""
    step = max(1, a.size // _SAMPLE)
    a, b = a.reshape(-1)[::step].astype(np.float64), b.reshape(-1)[::step].astype(np.float64)
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))
