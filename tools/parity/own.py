"""Taps that only our dump has: steps between those that the reference shows.

A dump of modules or hidden states has a few taps a layer where ours has dozens. Where something went wrong
between two shared taps, ours are tried one by one: each against what the formula makes of its own inputs. That
alone is no evidence of a fault, for a tap may follow another convention; a shared tap after it has to diverge too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from scarlet_jax.tools.parity import align, graph, metrics
from scarlet_jax.tools.parity.dump import FORMAT, Dump
from scarlet_jax.tools.parity.local import Pair, judge_own
from scarlet_jax.tools.parity.verdict import FALSE_DISCOVERIES, Tap, discoveries, p_value
from scarlet_jax.tools.parity.view import Run

_READ = 6  # shared taps after one of ours that should show its fault
_SHARE = 0.01  # of its divergence, at least


def insert(taps: Sequence[Tap], pair: Pair, ours: Dump, names: Sequence[str], kinds: Mapping) -> list[Tap]:
    """All taps in order of execution, those among `names` with them that are broken and not seen by the reference."""
    if any(pair.sampled) or not any(tap.metrics.relative_l2 > 0 for tap in taps):
        return list(taps)
    pair = dataclasses.replace(pair, ours=whole_run(pair))
    judged = [tap for name in names if (tap := _judged(pair, ours, name, kinds)) is not None]
    found = discoveries(np.array([p_value(tap.local) for tap in judged]), FALSE_DISCOVERIES)
    places = _places(taps, ours)
    confirmed: set[str] = set()
    chosen = []
    for index in sorted(found):
        tap = judged[index]
        if tap.op in confirmed or _shows(tap, taps, places[tap.name]):
            confirmed.add(tap.op)
            tap.broken = True
            chosen.append(tap)
    for tap in chosen:
        _explained_by(tap, taps, places)
    order = {tap.name: float(i) for i, tap in enumerate(taps)}
    order |= {tap.name: places[tap.name] - 0.5 for tap in chosen}
    return sorted([*taps, *chosen], key=lambda tap: order[tap.name])


def whole_run(pair: Pair) -> Run:
    """Our run, less what engines may leave out of a tap."""
    return dataclasses.replace(pair.ours, taps=align.Whole(pair.ours.taps))


def _judged(pair: Pair, ours: Dump, name: str, kinds: Mapping) -> Tap | None:
    op_name, _, layer = name.rpartition("-")
    if not layer.isdigit() or int(layer) not in kinds:
        return None
    kind = kinds[int(layer)]
    op = graph.find(op_name, kind)
    if op is None or op.source or op.alias:
        return None
    local = judge_own(pair, op, int(layer), kind, name, strict=ours.format == FORMAT)
    if local is None:
        return None
    whole = np.asarray(pair.ours.taps[name], np.float64)
    measured = metrics.measure(whole, whole - local.ours_residual)
    local.residual = local.ours_residual = None
    weight, qtype = ours.weights.get(name, ("", ""))
    return Tap(
        name, op_name, int(layer), kind, op.klass, weight, qtype, "ours alone", measured, local, own=True
    )


def _places(taps: Sequence[Tap], ours: Dump) -> dict[str, int]:
    """For each tap of ours, the index of the next shared one."""
    shared = {tap.name: i for i, tap in enumerate(taps)}
    places, following = {}, len(taps)
    for name in reversed(list(ours)):
        following = shared.get(name, following)
        places[name] = following
    return places


def _shows(tap: Tap, taps: Sequence[Tap], place: int) -> bool:
    """Whether the shared taps that follow diverge as they must where this one is wrong."""
    after = [t for t in taps[place:] if not t.alias][:_READ]
    limit = max(_SHARE * min(1.0, tap.local.difference), 3e-7)  # some roundings of f32, at the least
    before = max((t.metrics.relative_l2 for t in taps[:place][-3:] if t.layer == tap.layer), default=0.0)
    return any(t.metrics.relative_l2 > max(limit, 2 * before) or t.metrics.not_finite[0] for t in after)


def _explained_by(tap: Tap, taps: Sequence[Tap], places: Mapping[str, int]) -> None:
    """A shared tap of the layer that was judged across this one is broken no more on its own."""
    for later in taps[places[tap.name] :]:
        if later.layer == tap.layer and later.broken and later.local.method != "formula":
            later.broken, later.note = False, f"follows from {tap.name}"
