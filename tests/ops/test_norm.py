import numpy as np
import pytest
from support import relative_l2

from scarlet_jax.ops import norm

# One f32 sum of 96 squares and one square root: a few units in the last place (6e-8 each).
TOLERANCE = 3e-7


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e6])
def test_rms_and_l2_against_float64(size):
    x = (np.random.default_rng(0).standard_normal((3, 5, 96)) * size).astype(np.float32)
    exact = x.astype(np.float64)
    eps = 1e-6
    assert (
        relative_l2(norm.rms(x, eps), exact / np.sqrt((exact**2).mean(-1, keepdims=True) + eps)) < TOLERANCE
    )
    assert relative_l2(norm.l2(x, eps), exact / np.sqrt((exact**2).sum(-1, keepdims=True) + eps)) < TOLERANCE


def test_zero_rows_stay_zero():
    assert not np.asarray(norm.rms(np.zeros((2, 8), np.float32), 1e-6)).any()
    assert not np.asarray(norm.l2(np.zeros((2, 8), np.float32), 1e-6)).any()
