"""Several processes, each with some of the devices: JAX's own distributed runtime, started and agreed with.

Every process runs the same program on the same input, and sees the same tokens; the first one alone prints.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from scarlet_jax.errors import BadInput


def start(coordinator: str | None, process: str | None) -> None:
    """Wait for the others; from then on `jax.devices()` are those of all. Before anything is computed.

    `coordinator` is HOST:PORT of the first process, `process` "I/N", the number of this one, from 0, and how many
    there are. Neither is needed where JAX finds out by itself (Slurm, Open MPI, Cloud TPU): pass "auto".
    """
    if coordinator == "auto":
        _initialize()
        return
    match = re.fullmatch(r"(\d+)/(\d+)", process or "")
    if not coordinator or not match or not int(match[1]) < int(match[2]):
        raise BadInput(
            f"--coordinator {coordinator} --process {process}: expected HOST:PORT of the first process and I/N, "
            "this one's number from 0 and how many there are; or --coordinator auto"
        )
    _initialize(coordinator_address=coordinator, process_id=int(match[1]), num_processes=int(match[2]))


def _initialize(**options: Any) -> None:
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        raise BadInput(
            f"--coordinator: the processes do not meet ({' '.join(str(error).split())})"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return jax.process_index() == 0


def agreed(number: int) -> int:
    """The first process's number, everywhere: for what each of them has drawn. Below 2^32."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.uint32(number)))
