"""Blocks taken apart, against the real quantiser's bytes and the reference decoder."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scarlet_jax.ops.qtensor import block_size
from scarlet_jax.tools.engines import ggml
from scarlet_jax.tools.parity import arithmetic, blocks
from scarlet_jax.tools.parity.weights import decode

TYPES = list(blocks._READERS)


@pytest.mark.parametrize("qtype", TYPES)
def test_parts_put_together_are_the_weights(qtype):
    elements, size = block_size(qtype)
    raw = np.random.default_rng(0).integers(0, 256, (50, size), np.uint8)
    raw[:10] = ggml.quantize(
        np.random.default_rng(1).standard_normal((10, elements)).astype(np.float32), qtype
    )
    if qtype == "MXFP4":
        raw[:, 0] = 90 + raw[:, 0] % 60  # exponents whose products stay within f32
    kind = gguf.GGMLQuantizationType[qtype]
    with np.errstate(all="ignore"):
        parts = blocks.take_apart(raw, qtype)
        np.testing.assert_array_equal(parts.decode(), gguf.quants.dequantize(raw, kind))


def test_unknown_types_have_no_parts():
    assert blocks.take_apart(np.zeros((1, 4), np.uint8), "F32") is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_q8_0_is_that_of_ggml(seed, scale):
    x = (scale * np.random.default_rng(seed).standard_normal((3, 64))).astype(np.float32)
    np.testing.assert_array_equal(arithmetic.q8_0(x), ggml.to_float("Q8_0", ggml.quantize(x, "Q8_0")))


def test_roundings():
    x = np.array([1.0, 1 + 2**-9, 1 + 2**-11, -3.1415926, 0, 1e-3], np.float32)
    np.testing.assert_array_equal(arithmetic.bf16(x)[:3], [1, 1, 1])
    np.testing.assert_array_equal(arithmetic.f16(x), x.astype(np.float16).astype(np.float32))
    zeros = np.zeros((2, 256), np.float32)
    for rounding in (arithmetic.q8_0, arithmetic.q8_k, arithmetic.q4_0):
        assert not rounding(zeros).any()
    y = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    assert 0.002 < np.linalg.norm(arithmetic.q8_k(y) - y) / np.linalg.norm(y) < 0.02
    back = arithmetic.rotated(lambda x: x)(y)
    np.testing.assert_allclose(back, y, atol=1e-6)  # a rotation and back, in f32 products of 64 terms


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16", "Q4_K", "Q1_0"])
def test_reference_decoder(qtype):
    elements, size = block_size(qtype)
    raw = np.random.default_rng(0).integers(0, 120, (3, 4 * size), np.uint8)
    assert decode(raw, qtype).shape == (3, 4 * elements)
