"""Room for copies of weights."""

import mmap

import numpy as np
import pytest

from scarlet_jax import huge_pages

LACKING = {
    "nothing": (),
    "huge pages": ("MADV_HUGEPAGE",),
    "all that Windows lacks": ("MADV_HUGEPAGE", "MAP_PRIVATE", "MAP_ANONYMOUS"),
}


@pytest.fixture(params=LACKING.values(), ids=LACKING)
def system(request, monkeypatch):
    for name in request.param:
        monkeypatch.delattr(mmap, name, raising=False)


@pytest.mark.parametrize("chunk", [64, 1000, 2**22])
def test_copies_stand_apart(system, chunk, monkeypatch):
    """Of any size and type, each where XLA takes it in place, none over another."""
    monkeypatch.setattr(huge_pages, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, np.uint8) for shape in [(3, 18), (1,), (0, 5), (700, 30), (64,)]]
    arrays += [rng.standard_normal((5, 4), np.float32)[:, 1:3], rng.standard_normal(7).astype(np.float16)]
    room = huge_pages.Room()
    copies = [room.copy(a) for a in arrays]
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(copy, array, strict=True)
        assert copy.ctypes.data % huge_pages.ALIGNMENT == 0 or not copy.size
        assert copy.flags.c_contiguous
        assert not copy.flags.writeable


def test_a_kernel_that_refuses():
    class Memory:
        def madvise(self, advice):
            raise OSError("Invalid argument")

    huge_pages.advise(Memory())
