import numpy as np
import pytest
from support import relative_l2

from scarlet_jax.ops import conv


@pytest.mark.parametrize("width", [1, 3, 4, 5])
def test_causal_conv_against_numpy_convolve(width):
    rng = np.random.default_rng(width)
    batch, tokens, channels = 2, 11, 7
    inputs = rng.standard_normal((batch, width - 1 + tokens, channels)).astype(np.float32)
    kernel = rng.standard_normal((channels, width)).astype(np.float32)
    expected = np.empty((batch, tokens, channels))
    for b in range(batch):
        for c in range(channels):
            # np.convolve flips its second argument; ours has the current token last.
            expected[b, :, c] = np.convolve(
                inputs[b, :, c].astype(float), kernel[c, ::-1].astype(float), "valid"
            )
    # Up to five products and sums in f32.
    assert relative_l2(conv.causal_conv(inputs, kernel), expected) < 3e-7


def test_history_ignores_padding():
    width, tokens, channels = 4, 6, 2
    inputs = np.arange(2 * (width - 1 + tokens) * channels, dtype=np.float32).reshape(2, -1, channels)
    history = np.asarray(conv.history(inputs, np.array([6, 2], np.int32), width))
    np.testing.assert_array_equal(history[0], inputs[0, 6:9])
    np.testing.assert_array_equal(history[1], inputs[1, 2:5])


def test_no_new_token_keeps_the_history():
    width, channels = 3, 2
    inputs = np.arange(1 * (width - 1 + 4) * channels, dtype=np.float32).reshape(1, -1, channels)
    history = np.asarray(conv.history(inputs, np.array([0], np.int32), width))
    np.testing.assert_array_equal(history[0], inputs[0, : width - 1])
