"""Blocks that try a decoder, and the comparison bit by bit: for every implementation of the block formats."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import gguf
import numpy as np

from scarlet_jax.ops.qtensor import block_size
from scarlet_jax.tools.engines import ggml


class Layout(NamedTuple):
    """Where a block keeps its f16 scales (byte offsets) and its sub-blocks' scales and mins (byte range)."""

    f16: tuple[int, ...] = ()
    scales: slice = slice(0)


# Written from the fact sheet's table (section 9), not from the decoders.
LAYOUTS = {
    **{"F32": Layout(), "F16": Layout((0,)), "BF16": Layout()},
    **{"Q4_0": Layout((0,)), "Q4_1": Layout((0, 2)), "Q5_0": Layout((0,)), "Q5_1": Layout((0, 2))},
    **{"Q8_0": Layout((0,)), "Q1_0": Layout((0,)), "Q2_0": Layout((0,)), "IQ4_NL": Layout((0,))},
    **{"Q2_K": Layout((80, 82), slice(16)), "Q3_K": Layout((108,), slice(96, 108))},
    **{"Q4_K": Layout((0, 2), slice(4, 16)), "Q5_K": Layout((0, 2), slice(4, 16))},
    **{"Q6_K": Layout((208,), slice(192, 208)), "IQ2_XXS": Layout((0,), slice(2, 66))},
    **{"IQ2_XS": Layout((0,), slice(66, 74)), "IQ2_S": Layout((0,), slice(74, 82))},
    **{"IQ3_XXS": Layout((0,), slice(66, 98)), "IQ3_S": Layout((0,), slice(106, 110))},
    **{"IQ1_S": Layout((0,), slice(34, 50)), "IQ1_M": Layout((), slice(48, 56))},
    **{"IQ4_XS": Layout((0,), slice(2, 8)), "TQ1_0": Layout((52,)), "TQ2_0": Layout((64,))},
    **{"MXFP4": Layout((), slice(1)), "NVFP4": Layout((), slice(4))},
}
QTYPES = tuple(LAYOUTS)
LEFT_TO_GGML = ("Q1_0", "Q2_0")  # gguf-py cannot decode these

# Both zeros, the least and greatest subnormal, the least normal, one, an odd one, the greatest; each with
# both signs; the infinities; quiet and signalling NaNs.
SPECIAL_F16 = [0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x3555, 0x7BFF, 0x7C00, 0x7C01, 0x7E00]
SPECIAL_F16 += [bits | 0x8000 for bits in SPECIAL_F16]
SPECIAL_F32 = [0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000]
SPECIAL_F32 += [0x7F800001, 0x7F80FFFF, *(bits | 0x80000000 for bits in SPECIAL_F32)]


def _put_f16(blocks: np.ndarray, offset: int, bits) -> None:
    blocks[:, offset : offset + 2] = np.asarray(bits, "<u2").reshape(-1, 1).view(np.uint8)


def with_scale(qtype: str, blocks: np.ndarray, bits: int = 0x3C00) -> np.ndarray:
    """The same blocks with their f16 scales all `bits`, 1.0 unless told; other kinds of scale 1.0."""
    blocks = blocks.copy()
    for offset in LAYOUTS[qtype].f16:
        _put_f16(blocks, offset, bits)
    if qtype == "IQ1_M":  # a nibble in each of the four words, lowest first
        for word in range(4):
            high = blocks[:, 49 + 2 * word]
            high[:] = high & 0x0F | (bits >> 4 * word & 0x0F) << 4
    if qtype in ("F32", "BF16"):
        blocks[:] = np.array([0x3F800000], "<u4").view(np.uint8)[-blocks.shape[1] :]
    if qtype in ("MXFP4", "NVFP4"):
        blocks[:, LAYOUTS[qtype].scales] = {"MXFP4": 127, "NVFP4": 7 << 3}[qtype]
    return blocks


def random_blocks(qtype: str, count: int, seed: int = 0) -> np.ndarray:
    """Uniformly random bytes, half of them with scales of 1: uint8 (count, block bytes)."""
    rng = np.random.default_rng([seed, QTYPES.index(qtype)])
    blocks = rng.integers(0, 256, (count, block_size(qtype)[1]), np.uint8)
    blocks[::2] = with_scale(qtype, blocks[::2])
    return blocks


def _each_bit(background: np.ndarray) -> np.ndarray:
    """The background (block bytes,) and all its neighbours at a distance of one bit."""
    bits = np.unpackbits(background)
    return np.packbits(np.vstack([bits, bits ^ np.eye(bits.size, dtype=np.uint8)]), axis=1)


def single_bits(qtype: str) -> np.ndarray:
    """Each bit alone: over zeros, over unit scales with zero quants, over a random block of unit scale."""
    zeros = np.zeros((1, block_size(qtype)[1]), np.uint8)
    units = with_scale(qtype, zeros)
    units[:, LAYOUTS[qtype].scales] = 0x11
    units = with_scale(qtype, units)
    backgrounds = [zeros, units, with_scale(qtype, random_blocks(qtype, 1, seed=1))]
    return np.concatenate([_each_bit(background[0]) for background in backgrounds])


def extreme_blocks(qtype: str) -> np.ndarray:
    """Every special scale with every special min, over quants and sub-block scales at their extremes."""
    layout, size = LAYOUTS[qtype], block_size(qtype)[1]
    payloads = [
        np.full((1, size), byte, np.uint8) for byte in (0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F, 0x55, 0xAA)
    ]
    for byte in (0x00, 0xFF, 0x0F, 0xF0, 0x3F, 0xC0, 0x80, 0x7F):
        payloads.append(random_blocks(qtype, 1, seed=byte))
        payloads[-1][:, layout.scales] = byte
    blocks = []
    for payload in payloads if layout.f16 or qtype == "IQ1_M" else []:
        for scales in itertools.product(SPECIAL_F16, repeat=max(1, len(layout.f16))):
            block = with_scale(qtype, payload, scales[0])
            for offset, bits in zip(layout.f16, scales, strict=False):
                _put_f16(block, offset, bits)
            blocks.append(block)
    return np.concatenate([*payloads, *blocks])


def every_value(qtype: str) -> np.ndarray:
    """All there is to decode where that is little: plain floats, and the scales of MXFP4 and NVFP4."""
    if qtype in ("F16", "BF16"):
        return np.arange(65536, dtype="<u2").reshape(-1, 1).view(np.uint8)
    if qtype == "F32":
        return np.array(SPECIAL_F32, "<u4").reshape(-1, 1).view(np.uint8)
    blocks = np.zeros((0, block_size(qtype)[1]), np.uint8)
    if qtype in ("MXFP4", "NVFP4"):
        blocks = random_blocks(qtype, 256, seed=2)
        blocks[:, LAYOUTS[qtype].scales] = np.arange(256, dtype=np.uint8)[:, None]
        blocks[:, -16:] = np.arange(16, dtype=np.uint8) * 0x11  # every quant, in both nibbles
    return blocks


@functools.cache
def trial_blocks(qtype: str) -> np.ndarray:
    """Everything above: uint8 (some thousands, block bytes)."""
    return np.concatenate(
        [random_blocks(qtype, 1024), single_bits(qtype), extreme_blocks(qtype), every_value(qtype)]
    )


def by_gguf_py(qtype: str, blocks: np.ndarray) -> np.ndarray:
    """gguf-py's decoder, or ggml's for the two types it lacks: (n, block bytes) -> f32 (n, elements)."""
    if qtype in LEFT_TO_GGML:
        return ggml.to_float(qtype, blocks)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[qtype])


@functools.cache
def expected_values(qtype: str) -> np.ndarray:
    """What `trial_blocks(qtype)` decode to."""
    return by_gguf_py(qtype, trial_blocks(qtype))


def differing(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Where two f32 arrays differ in any bit; two NaNs agree whatever their payloads."""
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    assert got.dtype == expected.dtype == np.float32
    same = got.view(np.uint32) == expected.view(np.uint32)
    return ~(same | np.isnan(got) & np.isnan(expected))


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.argwhere(differing(got, expected))
    if len(wrong):
        block, element = wrong[0]
        raise AssertionError(
            f"{len(wrong)} of {got.size} values differ, first element {element} of block {block}: "
            f"{got[block, element]!r}, expected {expected[block, element]!r}"
        )
