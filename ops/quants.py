"""The GGUF block formats: one short decode function a type, in one table.

Every function takes `blocks`, uint8 of shape (n, block bytes), and returns f32 of shape (n, elements),
bit for bit what ggml's reference decoder returns (spec section 9; a NaN stays a NaN, its payload may
differ). All are written in one grammar:

    split the block's fields, view them as numbers, unpack their bits, combine.

Two facts make bit-exactness hold under any compiler, and the tests check both for each type. First,
every product here is exact in f32 (an f16 has 11 significant bits, a sub-block's scale and a quant at
most 12 together), so that fusing a multiplication with an addition, or reordering a product, changes
nothing. Second, no f32 subnormal, which XLA:CPU and TPUs flush to zero, takes part in any arithmetic:
products step by no less than an eighth of the smallest f16, 2^-24; MXFP4, which goes down to 2^-128, is
put together from integers (`_ldexp`), and F32 and BF16 are moved as bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import chex
import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scarlet_jax.errors import BadInput
from scarlet_jax.ops.qtensor import block_size


def decode(blocks: jax.Array | np.ndarray, qtype: str) -> jax.Array:
    """Decode rows of blocks: uint8 (..., row bytes) -> f32 (..., elements).

    `qtype` is a GGUF type name, "Q4_K", or "F32", "F16" and "BF16", whose blocks are single elements.
    Raises BadInput for an unknown type and for rows that are not whole blocks.
    """
    if qtype not in DECODERS:
        raise BadInput(f"quant type {qtype}: not one of {', '.join(DECODERS)}")
    chex.assert_type(blocks, jnp.uint8)
    elements, size = block_size(qtype)
    *rows, row_bytes = blocks.shape
    if row_bytes % size:
        raise BadInput(f"{qtype} row of {row_bytes} bytes: expected whole blocks of {size} bytes")
    count = row_bytes // size
    values = DECODERS[qtype](jnp.reshape(blocks, (math.prod(rows) * count, size)))
    return values.reshape(*rows, count * elements)


# --- the grammar: n is the number of blocks, k any number of integers a block -----------------------


def _fields(x: jax.Array, *sizes: int) -> list[jax.Array]:
    """Split the last axis into consecutive fields of the given sizes, which must fill it."""
    ends = np.cumsum(sizes)
    assert ends[-1] == x.shape[-1], f"fields of {sizes} in {x.shape[-1]}"
    return [x[..., end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _view(x: jax.Array, dtype) -> jax.Array:
    """Reinterpret little-endian integers (n, k) as `dtype`, wider or equal: (n, k * old / new size)."""
    ratio = np.dtype(dtype).itemsize // x.dtype.itemsize
    if ratio > 1:
        x = x.reshape(*x.shape[:-1], x.shape[-1] // ratio, ratio)
    return lax.bitcast_convert_type(x, dtype)


def _f16(x: jax.Array) -> jax.Array:
    """The values of f16s, given as bytes or as words, in f32 (where an f16 subnormal is a normal number)."""
    return _view(x, jnp.float16).astype(jnp.float32)


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _u16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.uint16)


def _unpack(x: jax.Array, shifts: Sequence[int], mask: int, *, group: int) -> jax.Array:
    """The bits `mask` of each integer after each shift: (n, k) -> (n, k * number of shifts).

    Each `group` of integers yields its fields at the first shift, then those at the second, and so on.
    """
    planes = x.reshape(x.size // group, 1, group) >> np.array(shifts, x.dtype)[:, None]
    return (planes & mask).reshape(len(x), x.shape[1] * len(shifts))


def _nibbles(x: jax.Array, group: int) -> jax.Array:
    return _unpack(x, (0, 4), 0x0F, group=group)


def _pairs(x: jax.Array, group: int) -> jax.Array:
    return _unpack(x, (0, 2, 4, 6), 0x03, group=group)


def _bits(x: jax.Array, group: int) -> jax.Array:
    return _unpack(x, (0, 1, 2, 3, 4, 5, 6, 7), 0x01, group=group)


def _signs(x: jax.Array) -> jax.Array:
    """One sign a bit, lowest bit first, a set bit being minus: (n, k) bytes -> f32 (n, 8k)."""
    return 1 - 2 * _f32(_bits(x, 1))


def _spread(scales: jax.Array, count: int) -> jax.Array:
    """Each scale once for each of the `count` elements that it governs: (n, k) -> (n, k * count)."""
    return jnp.repeat(scales, count, axis=1)


def _lookup(table: np.ndarray, index: jax.Array) -> jax.Array:
    """Entries of a codebook (size, width) or (size,): indices (n, k) -> (n, k * width)."""
    entries = jnp.take(jnp.asarray(table), index, axis=0, mode="clip")
    return entries.reshape(len(index), math.prod(entries.shape[1:]))


def _ldexp(k: jax.Array, exponent: jax.Array) -> jax.Array:
    """`k * 2^exponent` in f32, built from integers alone, so that a subnormal result is not flushed.

    For int32 0 <= k < 2^24 and exponent >= -149, that of the smallest subnormal. Infinite if too large.
    """
    bits = _view(_f32(k), jnp.int32)
    field = (bits >> 23) + exponent
    normal = bits + (exponent << 23)
    subnormal = k << (exponent + 149)
    bits = jnp.where(field < 1, subnormal, jnp.where(field > 254, 0x7F800000, normal))
    return _view(jnp.where(k == 0, 0, bits), jnp.float32)


# --- codebooks, from the gguf package ---------------------------------------------------------------


@functools.cache
def _grid(qtype: str) -> np.ndarray:
    """The codebook of an IQ type: f32 (size, 8), or (size, 4) for the IQ3 types."""
    codec = getattr(gguf.quants, qtype)
    codec.init_grid()
    return codec.grid.reshape(codec.grid_shape)


# A 7-bit sign code stands for these eight bits: itself, and its parity as the eighth.
_SIGN_CODES = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
_IQ4_VALUES = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
_E2M1_DOUBLED = np.array(gguf.quants.MXFP4.kvalues, np.int32)


# --- plain floats -----------------------------------------------------------------------------------


def f32(blocks: jax.Array) -> jax.Array:
    """The four bytes themselves."""
    return _view(blocks, jnp.float32)


def f16(blocks: jax.Array) -> jax.Array:
    """The two bytes as an IEEE half."""
    return _f16(blocks)


def bf16(blocks: jax.Array) -> jax.Array:
    """The two bytes as the upper half of an f32."""
    return _view(_view(blocks, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)


# --- blocks of 32 with one scale --------------------------------------------------------------------


def q4_0(blocks: jax.Array) -> jax.Array:
    """`d (q - 8)`; the low nibbles are the first half of the block."""
    d, qs = _fields(blocks, 2, 16)
    return _f16(d) * (_f32(_nibbles(qs, 16)) - 8)


def q4_1(blocks: jax.Array) -> jax.Array:
    """`d q + m`."""
    d, m, qs = _fields(blocks, 2, 2, 16)
    return _f16(d) * _f32(_nibbles(qs, 16)) + _f16(m)


def q5_0(blocks: jax.Array) -> jax.Array:
    """`d (q - 16)`; the fifth bits are in element order."""
    d, qh, qs = _fields(blocks, 2, 4, 16)
    q = _nibbles(qs, 16) | (_bits(qh, 1) << 4)
    return _f16(d) * (_f32(q) - 16)


def q5_1(blocks: jax.Array) -> jax.Array:
    """`d q + m`; quants as in Q5_0."""
    d, m, qh, qs = _fields(blocks, 2, 2, 4, 16)
    q = _nibbles(qs, 16) | (_bits(qh, 1) << 4)
    return _f16(d) * _f32(q) + _f16(m)


def q8_0(blocks: jax.Array) -> jax.Array:
    """`d q`, q signed."""
    d, qs = _fields(blocks, 2, 32)
    return _f16(d) * _f32(_view(qs, jnp.int8))


# --- K-quants: 256 elements, sub-blocks with scales of their own ------------------------------------


def q2_k(blocks: jax.Array) -> jax.Array:
    """`d scale q - dmin min`; a byte of scale (low nibble) and min (high) per 16 elements."""
    scales, qs, d, dmin = _fields(blocks, 16, 64, 2, 2)
    scale = _f16(d) * _f32(scales & 0x0F)
    minimum = _f16(dmin) * _f32(scales >> 4)
    return _spread(scale, 16) * _f32(_pairs(qs, 32)) - _spread(minimum, 16)


def q3_k(blocks: jax.Array) -> jax.Array:
    """`d (scale - 32) (q - 4)`; the third bits are planes of 32, the 6-bit scales are split 4 + 2."""
    qh, qs, low, high, d = _fields(blocks, 32, 64, 8, 4, 2)
    scale = _nibbles(low, 8) | (_pairs(high, 4) << 4)
    q = _pairs(qs, 32) | (_bits(qh, 32) << 2)
    return _spread(_f16(d) * (_f32(scale) - 32), 16) * (_f32(q) - 4)


def _scales_and_mins(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The eight 6-bit scales and mins of Q4_K and Q5_K: uint8 (n, 12) -> two f32 (n, 8).

    The first four of each are the low six bits of their bytes. The last four have their low nibbles
    in the last bytes, and their top two bits above the first four's.
    """
    scale, minimum, low = _fields(packed, 4, 4, 4)
    scales = jnp.concatenate([scale & 0x3F, (low & 0x0F) | (scale >> 6 << 4)], axis=1)
    mins = jnp.concatenate([minimum & 0x3F, (low >> 4) | (minimum >> 6 << 4)], axis=1)
    return _f32(scales), _f32(mins)


def q4_k(blocks: jax.Array) -> jax.Array:
    """`d scale q - dmin min`; each 32 bytes are a sub-block of low nibbles and one of high ones."""
    d, dmin, packed, qs = _fields(blocks, 2, 2, 12, 128)
    scales, mins = _scales_and_mins(packed)
    return _spread(_f16(d) * scales, 32) * _f32(_nibbles(qs, 32)) - _spread(_f16(dmin) * mins, 32)


def q5_k(blocks: jax.Array) -> jax.Array:
    """`d scale q - dmin min`; sub-block b takes its fifth bits from bit b of the 32 bytes `qh`."""
    d, dmin, packed, qh, qs = _fields(blocks, 2, 2, 12, 32, 128)
    scales, mins = _scales_and_mins(packed)
    q = _nibbles(qs, 32) | (_bits(qh, 32) << 4)
    return _spread(_f16(d) * scales, 32) * _f32(q) - _spread(_f16(dmin) * mins, 32)


def q6_k(blocks: jax.Array) -> jax.Array:
    """`d scale (q - 32)`; a signed byte of scale per 16 elements, quants split 4 + 2."""
    ql, qh, scales, d = _fields(blocks, 128, 64, 16, 2)
    q = _nibbles(ql, 64) | (_pairs(qh, 32) << 4)
    return _spread(_f16(d) * _f32(_view(scales, jnp.int8)), 16) * (_f32(q) - 32)


# --- codebook types: 256 elements, indices into a grid of 8 (or 4) magnitudes -----------------------


def iq2_xxs(blocks: jax.Array) -> jax.Array:
    """`d (1/2 + s) / 4 * grid * sign`; per 32: four indices, then a word of four sign codes and s."""
    d, qs = _fields(blocks, 2, 64)
    index, codes = _fields(qs.reshape(len(qs), 8, 8), 4, 4)
    codes = _view(codes, jnp.uint32).reshape(len(qs), 8)
    scale = _f16(d) * (_f32(codes >> 28) + 0.5) * 0.25
    signs = _signs(_lookup(_SIGN_CODES, _unpack(codes, (0, 7, 14, 21), 0x7F, group=1)))
    return _spread(scale, 32) * _lookup(_grid("IQ2_XXS"), index) * signs


def iq2_xs(blocks: jax.Array) -> jax.Array:
    """`d (1/2 + s) / 4 * grid * sign`; words of 9 bits of index and 7 of sign code; s per 16."""
    d, qs, scales = _fields(blocks, 2, 64, 8)
    words = _view(qs, jnp.uint16)
    scale = _f16(d) * (_f32(_nibbles(scales, 1)) + 0.5) * 0.25
    signs = _signs(_lookup(_SIGN_CODES, words >> 9))
    return _spread(scale, 16) * _lookup(_grid("IQ2_XS"), words & 0x1FF) * signs


def iq2_s(blocks: jax.Array) -> jax.Array:
    """`d (1/2 + s) / 4 * grid * sign`; indices split 8 + 2, one sign bit an element, s per 16."""
    d, low, signs, high, scales = _fields(blocks, 2, 32, 32, 8, 8)
    index = _u16(low) | (_u16(_pairs(high, 1)) << 8)
    scale = _f16(d) * (_f32(_nibbles(scales, 1)) + 0.5) * 0.25
    return _spread(scale, 16) * _lookup(_grid("IQ2_S"), index) * _signs(signs)


def iq3_xxs(blocks: jax.Array) -> jax.Array:
    """`d (1/2 + s) / 2 * grid * sign`; indices of 4 elements, then words as in IQ2_XXS."""
    d, index, codes = _fields(blocks, 2, 64, 32)
    codes = _view(codes, jnp.uint32)
    scale = _f16(d) * (_f32(codes >> 28) + 0.5) * 0.5
    signs = _signs(_lookup(_SIGN_CODES, _unpack(codes, (0, 7, 14, 21), 0x7F, group=1)))
    return _spread(scale, 32) * _lookup(_grid("IQ3_XXS"), index) * signs


def iq3_s(blocks: jax.Array) -> jax.Array:
    """`d (1 + 2s) * grid * sign`; indices of 4 elements split 8 + 1, s per 32."""
    d, low, high, signs, scales = _fields(blocks, 2, 64, 8, 32, 4)
    index = _u16(low) | (_u16(_bits(high, 1)) << 8)
    scale = _f16(d) * (_f32(_nibbles(scales, 1)) * 2 + 1)
    return _spread(scale, 32) * _lookup(_grid("IQ3_S"), index) * _signs(signs)


def iq1_s(blocks: jax.Array) -> jax.Array:
    """`d (2s + 1) (grid +- 1/8)`; per 32 a word: four index tops of 3 bits, s of 3, the sign of 1/8."""
    d, low, words = _fields(blocks, 2, 32, 16)
    words = _view(words, jnp.uint16)
    index = _u16(low) | (_unpack(words, (0, 3, 6, 9), 0x07, group=1) << 8)
    scale = _f16(d) * (_f32((words >> 12) & 0x07) * 2 + 1)
    delta = 0.125 - 0.25 * _f32(words >> 15)
    return _spread(scale, 32) * (_lookup(_grid("IQ1_S"), index) + _spread(delta, 32))


def iq1_m(blocks: jax.Array) -> jax.Array:
    """`d (2s + 1) (grid +- 1/8)`; a nibble of index top and sign per 8, s of 3 bits per 16.

    The four words of scales keep the f16 d in their top nibbles, lowest first.
    """
    low, high, words = _fields(blocks, 32, 16, 8)
    high, words = _nibbles(high, 1), _view(words, jnp.uint16)
    d = ((words >> 12) << np.array([0, 4, 8, 12], np.uint16)).sum(axis=1, keepdims=True, dtype=jnp.uint16)
    index = _u16(low) | (_u16(high & 0x07) << 8)
    scale = _f16(d) * (_f32(_unpack(words, (0, 3, 6, 9), 0x07, group=1)) * 2 + 1)
    delta = 0.125 - 0.25 * _f32(high >> 3)
    return _spread(scale, 16) * (_lookup(_grid("IQ1_M"), index) + _spread(delta, 8))


def iq4_nl(blocks: jax.Array) -> jax.Array:
    """`d value[q]`, 16 unevenly spaced values."""
    d, qs = _fields(blocks, 2, 16)
    return _f16(d) * _lookup(_IQ4_VALUES, _nibbles(qs, 16))


def iq4_xs(blocks: jax.Array) -> jax.Array:
    """`d (scale - 32) value[q]`; 6-bit scales per 32, split 4 + 2."""
    d, high, low, qs = _fields(blocks, 2, 2, 4, 128)
    scale = _nibbles(low, 1) | (_pairs(high, 1) << 4)
    return _spread(_f16(d) * (_f32(scale) - 32), 32) * _lookup(_IQ4_VALUES, _nibbles(qs, 16))


# --- ternary, binary and two-bit --------------------------------------------------------------------


def _trits(x: jax.Array, count: int) -> jax.Array:
    """The first `count` ternary digits of each byte: (n, k) -> (n, count * k), all first digits first.

    A byte is a fraction of 256. Times 3^i modulo 256 drops i digits; times 3 then carries out the next.
    """
    fraction = x[:, None] * np.array([3**i for i in range(count)], np.uint8)[:, None]
    return (_u16(fraction) * 3 >> 8).reshape(len(x), count * x.shape[1])


def tq1_0(blocks: jax.Array) -> jax.Array:
    """`d (t - 1)`; five ternary digits a byte over 32 and 16 bytes, four over the last 4."""
    first, second, third, d = _fields(blocks, 32, 16, 4, 2)
    t = jnp.concatenate([_trits(first, 5), _trits(second, 5), _trits(third, 4)], axis=1)
    return _f16(d) * (_f32(t) - 1)


def tq2_0(blocks: jax.Array) -> jax.Array:
    """`d (t - 1)`, t of two bits."""
    qs, d = _fields(blocks, 64, 2)
    return _f16(d) * (_f32(_pairs(qs, 32)) - 1)


def q1_0(blocks: jax.Array) -> jax.Array:
    """`d` for a set bit, `-d` for a clear one, in element order."""
    d, qs = _fields(blocks, 2, 16)
    return _f16(d) * (_f32(_bits(qs, 1)) * 2 - 1)


def q2_0(blocks: jax.Array) -> jax.Array:
    """`d (q - 1)`, q of two bits, in element order."""
    d, qs = _fields(blocks, 2, 16)
    return _f16(d) * (_f32(_pairs(qs, 1)) - 1)


# --- four-bit floats --------------------------------------------------------------------------------


def mxfp4(blocks: jax.Array) -> jax.Array:
    """`2^(e - 127) E2M1[q]` (OCP Microscaling 1.0), from integers: its steps go down to 2^-128."""
    e, qs = _fields(blocks, 1, 16)
    doubled = _lookup(_E2M1_DOUBLED, _nibbles(qs, 16))
    magnitude = _ldexp(abs(doubled), e.astype(jnp.int32) - 128)
    return jnp.where(doubled < 0, -magnitude, magnitude)


def _ue4m3(x: jax.Array) -> jax.Array:
    """An unsigned E4M3 byte, bias 7, in units of its smallest step 2^-9: uint8 -> f32 integers.

    Bit 7 is ignored; the NaN code 0x7F stands for zero.
    """
    exponent, mantissa = (x >> 3).astype(jnp.int32) & 0x0F, x.astype(jnp.int32) & 0x07
    steps = jnp.where(exponent == 0, mantissa, (mantissa + 8) << (exponent - 1))
    return _f32(jnp.where(x == 0x7F, 0, steps))


def nvfp4(blocks: jax.Array) -> jax.Array:
    """`scale E2M1[q]`, a UE4M3 scale per 16 elements; the tensor's own scale stays outside."""
    scales, qs = _fields(blocks, 4, 32)
    doubled = _f32(_lookup(_E2M1_DOUBLED, _nibbles(qs, 8)))
    return _spread(_ue4m3(scales) * 2**-10, 16) * doubled


DECODERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **{"F32": f32, "F16": f16, "BF16": bf16},
    **{"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0},
    **{"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k},
    **{"IQ2_XXS": iq2_xxs, "IQ2_XS": iq2_xs, "IQ2_S": iq2_s, "IQ3_XXS": iq3_xxs, "IQ3_S": iq3_s},
    **{"IQ1_S": iq1_s, "IQ1_M": iq1_m, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs},
    **{"TQ1_0": tq1_0, "TQ2_0": tq2_0, "Q1_0": q1_0, "Q2_0": q2_0, "MXFP4": mxfp4, "NVFP4": nvfp4},
}
