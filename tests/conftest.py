"""Strict settings for every test."""

import gc

import jax
import pytest

# Mixing dtypes (bf16 with f32, int with float) is an error rather than a silent promotion.
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def programs_of_this_file():
    """Drops what a file compiled when its tests are done.

    A program on the CPU keeps several memory maps, and Linux grants a process 65,530 (`vm.max_map_count`): with those
    of every test in one process, LLVM aborts.
    """
    yield
    jax.clear_caches()
    gc.collect()
