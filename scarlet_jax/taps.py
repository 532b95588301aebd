"""Taps: a look at any activation, free when nobody looks.

A layer says `x = tap("attn_norm", x)`. With no collector open that is `x` itself: the traced program is
the one without the call. A collector has to be open while the program is *traced*, inside the jitted
function, and what it caught has to be returned from that function; `forward.run_block` does both.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections import OrderedDict
from collections.abc import Iterator

from scarlet_jax.types import Array

_collector: contextvars.ContextVar[dict[str, Array] | None] = contextvars.ContextVar("taps", default=None)


def tap(name: str, x: Array) -> Array:
    """Return `x`, showing it to the open collector under llama.cpp's name for it, less the layer number."""
    taps = _collector.get()
    if taps is not None:
        taps.pop(name, None)  # a name that occurs twice keeps the last, at its own place in the order
        taps[name] = x
    return x


def listening() -> bool:
    """Whether a collector is open: then every step has to be taken by itself, to be seen."""
    return _collector.get() is not None


@contextlib.contextmanager
def collect(wanted: bool) -> Iterator[OrderedDict[str, Array]]:
    """Catch every tap of the code within, in order; with `wanted` false, none."""
    taps: OrderedDict[str, Array] = OrderedDict()  # jit returns the keys of a plain dict sorted
    token = _collector.set(taps if wanted else None)
    try:
        yield taps
    finally:
        _collector.reset(token)
