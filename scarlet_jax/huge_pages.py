"""Memory in huge pages, for what is read whole again and again.

Each token reads every weight. In pages of 4 KiB that is a walk through the page tables for each, in pages of 2 MiB one
for 512 of them. Where a system has none to give, memory is as ever.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

PAGE = 2**21
ALIGNMENT = 64  # bytes: what XLA:CPU uses in place starts on such a boundary
_CHUNK = 2**28  # address space taken at a time


class Room:
    """Space for arrays, one behind another; the system gives a page when it is first written to."""

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)

    def copy(self, array: np.ndarray) -> np.ndarray:
        """The array, C-contiguous, aligned and read-only."""
        taken = -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if taken > len(self._left):
            self._left = _pages(max(taken, _CHUNK))
        made = self._left[: array.nbytes].view(array.dtype).reshape(array.shape)
        self._left = self._left[taken:]
        np.copyto(made, array)
        made.flags.writeable = False
        return made


def advise(memory: mmap.mmap) -> None:
    """Ask for huge pages: of memory yet to be written, or of a file yet to be read."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)


def _pages(size: int) -> np.ndarray:
    """Bytes that begin with a huge page."""
    memory = _private(size + PAGE)
    advise(memory)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % PAGE
    return whole[start : start + size]


def _private(size: int) -> mmap.mmap:
    # Shared memory, Python's default, has a rule of its own for huge pages: mostly "never".
    shared = not hasattr(mmap, "MAP_PRIVATE")  # Windows
    return mmap.mmap(-1, size) if shared else mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
