"""Dumps to compare in tests: the float64 oracle on a tiny model, cast to f32, and what may be done to them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from faults import catalogue, changes, run, tiny

from scarlet_jax.tools.parity import Dump


@functools.cache
def model(size: str = "a", seed: int = 97):
    return tiny.make(size, seed)


def tokens(length: int = 40, size: str = "a", seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tiny.SIZES[size]["V"], length)


@functools.cache
def reference(length: int = 40, size: str = "a", noise: int = 1) -> Dump:
    """The right forward, with rounding errors of seed `noise`."""
    return run.dump(model(size), tokens(length, size), noise)


def ours(length: int = 40, size: str = "a") -> Dump:
    return reference(length, size, 2)


def faulty(name: str, size: str = "a") -> tuple[Dump, Dump]:
    """A fault of the catalogue: ours and the reference."""
    fault = next(f for f in catalogue.FAULTS if f.name == name)
    ids = tokens(fault.tokens, size)
    with changes.apply(fault, model(size)) as broken:
        wrong = run.dump(broken, ids, 2)
    return wrong, run.dump(model(size), ids, 1)


def changed(dump: Dump, change: Callable[[str, np.ndarray], np.ndarray | None], **fields) -> Dump:
    """Another dump: every tap through `change`, which drops those it gives None for."""
    taps = {name: change(name, dump[name]) for name in dump}
    kept = {name: x for name, x in taps.items() if x is not None}
    known = dict(engine=dump.engine, model=dump.model, arch=dump.arch, tokens=dump.tokens, order=list(kept))
    return Dump(kept, **(known | fields))
