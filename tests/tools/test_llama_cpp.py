"""llama.cpp as a reference: its coding of blocks, its engine, its taps."""

import gguf
import numpy as np
import pytest
from numpy._core import _multiarray_umath

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.engines import ggml

NOT_IN_GGUF_PY = {"Q1_0", "Q2_0"}  # it cannot decode these

# relative_l2 of coding normal numbers, as measured, plus a tenth. A guard against feeding the quantiser
# wrong rows: garbage would give about 1.4. TQ1_0 and TQ2_0 are ternary: they suit other distributions.
CODING_ERROR = {"F32": 0, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 6e-3, "Q6_K": 0.02, "Q5_K": 0.041, "Q4_K": 0.08}


@pytest.mark.parametrize("qtype", ggml.TYPE_IDS)
def test_blocks_decode_as_gguf_py_decodes_them(qtype):
    x = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    blocks = ggml.quantize(x, qtype)
    y = ggml.to_float(qtype, blocks)
    assert y.shape == x.shape
    error = np.linalg.norm(y - x) / np.linalg.norm(x)
    assert error <= CODING_ERROR.get(qtype, 0.9)
    if qtype not in NOT_IN_GGUF_PY:
        stored = blocks.view(np.float32) if qtype == "F32" else blocks
        expected = gguf.dequantize(stored, gguf.GGMLQuantizationType[qtype])
        np.testing.assert_array_equal(y, expected.astype(np.float32))


@pytest.mark.parametrize("qtype", NOT_IN_GGUF_PY)
def test_one_and_two_bit_blocks_decode_as_the_format_says(qtype):
    """The layouts of spec section 9, by arithmetic: bits lowest first, one F16 scale a block."""
    bits, elements = {"Q1_0": (1, 128), "Q2_0": (2, 64)}[qtype]
    rng = np.random.default_rng(2)
    scale = rng.standard_normal((5, 1)).astype(np.float16)
    packed = rng.integers(0, 256, (5, elements * bits // 8), np.uint8)
    blocks = np.concatenate([scale.view(np.uint8), packed], axis=1)
    codes = (packed[:, :, None] >> np.arange(0, 8, bits)) & (2**bits - 1)
    level = codes.reshape(5, elements).astype(np.float32)
    level = 2 * level - 1 if qtype == "Q1_0" else level - 1
    np.testing.assert_array_equal(ggml.to_float(qtype, blocks), scale.astype(np.float32) * level)


def test_leading_axes_are_kept_and_empty_is_fine():
    blocks = ggml.quantize(np.ones((6, 64), np.float32), "Q4_0")
    assert ggml.to_float("Q4_0", blocks.reshape(2, 3, 36)).shape == (2, 3, 64)
    assert ggml.to_float("Q4_0", blocks[:0]).shape == (0, 64)


@pytest.mark.parametrize("qtype", ["Q8_K", "Q8_1", "I32", "Q9_9"])
def test_a_type_that_is_no_weight_type_is_refused(qtype):
    with pytest.raises(BadInput, match=qtype):
        ggml.quantize(np.zeros((1, 256), np.float32), qtype)


def test_rows_must_be_whole_blocks():
    with pytest.raises(BadInput, match="Q4_K: rows of 128 elements are not whole blocks of 256"):
        ggml.quantize(np.zeros((1, 128), np.float32), "Q4_K")
    with pytest.raises(BadInput, match="Q4_K: rows of 143 bytes are not whole blocks of 144"):
        ggml.to_float("Q4_K", np.zeros((1, 143), np.uint8))


def test_a_library_that_is_not_llama_cpp_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        ggml.library(tmp_path / "libllama.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(BadInput, match=r"text\.so: cannot load it as a llama\.cpp library"):
        ggml.library(tmp_path / "text.so")
    with pytest.raises(BadInput, match=r"not a usable llama\.cpp library: it lacks ggml_"):
        ggml.library(_multiarray_umath.__file__)  # an extension module with other symbols
