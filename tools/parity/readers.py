"""Dumps in the formats people have in hand."""

from __future__ import annotations

import os

from scarlet_jax.tools.parity.dump import Dump, read_dump


def read(path: str | os.PathLike[str]) -> Dump:
    """Open a dump of any known format."""
    return read_dump(path)
