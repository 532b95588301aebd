"""Packed weights as planes: every block format in one form that a vector unit reads without shuffling.

A value of any format here is

    unit * d * sub * value(code)  -  dmin * submin

where `code` has one to eight bits, and `value` subtracts a constant or looks into a table of at most sixteen
signed bytes. Rows are cut into stretches of 256 elements, and a stretch into eight parts of 32. The codes lie
in planes of 4, 2 and 1 bits (or one of 8): part p is in bytes 32 (p mod b) to 32 (p mod b) + 31 of a stretch of
the plane of b bits, shifted left by b (p div b). So a part is one slice, one shift and one mask away, and all
of its bytes are neighbours. A row that is no multiple of 256 is filled up with zeros, whose `d` is 0.

Values are those of ops.quants bit for bit, but for steps of MXFP4 below 2^-126, which a machine may flush.
The large codebooks (IQ1, IQ2, IQ3) are looked up when a weight is packed: their codes are then the 6 to 16
different signed magnitudes, 3 or 4 bits for 1.6 to 3.4 in the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scarlet_jax.ops import quants as q
from scarlet_jax.ops.qtensor import QTensor, block_size

STRETCH, PARTS, PART = 256, 8, 32


class Fields(NamedTuple):
    """What a block holds: codes int (n, elements) and its scales (n, k), each for elements / k of them."""

    code: jax.Array
    d: jax.Array  # f16, or bf16 where f16 has no such exponents
    sub: jax.Array | None = None  # int8
    dmin: jax.Array | None = None  # f16
    submin: jax.Array | None = None  # int8


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the planes of a format are read: their widths in bits, lowest first, and what a code means."""

    fields: Callable[[jax.Array], Fields]
    widths: tuple[int, ...]
    offset: int = 0
    table: tuple[int, ...] = ()  # the values of the codes, ascending; in place of `offset`
    unit: float = 1.0  # a power of two, so that it rounds nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planes:
    """A weight (out, in) in planes: arrays (out, stretches, ...), `scale` and `bias` as in QTensor.

    `codes` are uint8 (..., 32 b), a plane for each width; the scales (..., k) with k of 1, 8 or 16.
    """

    codes: tuple[jax.Array, ...]
    d: jax.Array
    sub: jax.Array | None
    dmin: jax.Array | None
    submin: jax.Array | None
    qtype: str = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})
    scale: Any = None
    bias: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape (out, in)."""
        return (*self.d.shape[:-2], self.width)


def pack(w: QTensor) -> Planes:
    """Rearrange packed blocks (out, row bytes) into planes; nothing is rounded. On the device that holds them."""
    elements, size = block_size(w.qtype)
    out, row_bytes = w.blocks.shape
    width = row_bytes // size * elements
    layout = LAYOUTS[w.qtype]
    fields = layout.fields(jnp.reshape(jnp.asarray(w.blocks), (-1, size)))

    def stretches(x: jax.Array | None) -> jax.Array | None:
        """(blocks, k) -> (out, stretches, k a stretch), filled up with zeros."""
        if x is None:
            return None
        x = _at_least_a_part(x, elements).reshape(out, -1)
        a_stretch = x.shape[1] * STRETCH // width
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % a_stretch))).reshape(out, -1, a_stretch)

    code = stretches(fields.code.astype(jnp.uint8))
    assert code is not None
    code = code.reshape(*code.shape[:2], PARTS, PART)
    return Planes(
        codes=_split(code, layout.widths),
        d=stretches(fields.d),
        sub=stretches(fields.sub),
        dmin=stretches(fields.dmin),
        submin=stretches(fields.submin),
        qtype=w.qtype,
        width=width,
        scale=w.scale,
        bias=w.bias,
    )


def _at_least_a_part(x: jax.Array, elements: int) -> jax.Array:
    """Scales (n, k) of blocks of 64 or 128 elements, repeated until there is one for each 32."""
    if elements >= STRETCH:
        return x
    return jnp.repeat(x, max(1, elements // PART // x.shape[1]), axis=1)


def _split(code: jax.Array, widths: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Codes uint8 (out, n, PARTS, PART) -> a plane (out, n, 32 b) for each width b, the lowest bits first."""
    planes, low = [], 0
    for bits in widths:
        field = (code >> low) & (2**bits - 1)
        field = field.reshape(*code.shape[:2], PARTS // bits, bits, PART)  # part p is [p div b, p mod b]
        shifts = (bits * np.arange(PARTS // bits, dtype=np.uint8))[:, None, None]
        planes.append((field << shifts).sum(axis=2, dtype=jnp.uint8).reshape(*code.shape[:2], bits * PART))
        low += bits
    return tuple(planes)


def part(w: Any, at: tuple, p: int, qtype: str) -> jax.Array:
    """The weights of part p, f32 (rows, stretches, 32): of Planes, or of references to its arrays.

    `at` are the two leading indices, ranges both: slices, or `pallas.ds`. Written for arrays and for kernels
    alike, in operations that every Pallas backend has.
    """
    layout = LAYOUTS[qtype]
    code, low = None, 0
    for plane, bits in zip(w.codes, layout.widths, strict=True):
        start = PART * (p % bits)
        field = plane[(*at, slice(start, start + PART))].astype(jnp.int32)
        field = ((field >> (bits * (p // bits))) & (2**bits - 1)) << low
        code = field if code is None else code | field
        low += bits
    value = _from_table(code, layout.table) if layout.table else code - layout.offset
    scaled = value.astype(jnp.float32) * _over_part(_scale(w.d, w.sub, at, p) * layout.unit)
    return scaled if w.dmin is None else scaled - _over_part(_scale(w.dmin, w.submin, at, p))


def _scale(d: Any, sub: Any, at: tuple, p: int) -> jax.Array:
    """The scales of part p, f32 (rows, stretches, 1 or 2)."""
    scale = _of_part(d, at, p)
    return scale if sub is None else scale * _of_part(sub, at, p)


def _of_part(x: Any, at: tuple, p: int) -> jax.Array:
    count = x.shape[-1]
    each = max(1, count // PARTS)
    start = each * p if count > 1 else 0
    return x[(*at, slice(start, start + each))].astype(jnp.float32)


def _over_part(scale: jax.Array) -> jax.Array:
    """(rows, stretches, k) -> (rows, stretches, 32)."""
    each = PART // scale.shape[-1]
    spread = jnp.broadcast_to(scale[..., None], (*scale.shape, each))
    return spread.reshape(*scale.shape[:-1], PART)


def _from_table(code: jax.Array, table: tuple[int, ...]) -> jax.Array:
    """Entries of a table of up to 16 signed bytes, held in four words: a look-up without memory."""
    padded = np.zeros(16, np.int8)
    padded[: len(table)] = table
    words = padded.view("<i4").tolist()
    word = jnp.full_like(code, words[0])
    for i in range(1, -(-len(table) // 4)):
        word = jnp.where(code >> 2 == i, jnp.int32(words[i]), word)
    return (word << (24 - 8 * (code & 3))) >> 24  # the shift back fills in the sign


def values(w: Planes) -> jax.Array:
    """All of a weight, f32 (out, in)."""
    everything = (slice(None), slice(None))
    parts = jnp.stack([part(w, everything, p, w.qtype) for p in range(PARTS)], axis=2)
    return parts.reshape(parts.shape[0], -1)[:, : w.width]


# --- from blocks to fields: the formats once more (see ops.quants), but with the scales left apart ---


def _half(x: jax.Array) -> jax.Array:
    return q._view(x, jnp.float16)


def _i8(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int8)


def _index(values: jax.Array, table: tuple[int, ...]) -> jax.Array:
    """The codes of values that all occur in an ascending table."""
    return jnp.searchsorted(jnp.array(table, jnp.float32), values.astype(jnp.float32))


def _q4_0(blocks):
    d, qs = q._fields(blocks, 2, 16)
    return Fields(q._nibbles(qs, 16), _half(d))


def _q4_1(blocks):
    d, m, qs = q._fields(blocks, 2, 2, 16)
    return Fields(q._nibbles(qs, 16), _half(d), dmin=-_half(m))


def _q5_0(blocks):
    d, qh, qs = q._fields(blocks, 2, 4, 16)
    return Fields(q._nibbles(qs, 16) | (q._bits(qh, 1) << 4), _half(d))


def _q5_1(blocks):
    d, m, qh, qs = q._fields(blocks, 2, 2, 4, 16)
    return Fields(q._nibbles(qs, 16) | (q._bits(qh, 1) << 4), _half(d), dmin=-_half(m))


def _q8_0(blocks):
    d, qs = q._fields(blocks, 2, 32)
    return Fields(qs ^ 0x80, _half(d))  # two's complement plus 128


def _q2_k(blocks):
    scales, qs, d, dmin = q._fields(blocks, 16, 64, 2, 2)
    return Fields(q._pairs(qs, 32), _half(d), _i8(scales & 0x0F), _half(dmin), _i8(scales >> 4))


def _q3_k(blocks):
    qh, qs, low, high, d = q._fields(blocks, 32, 64, 8, 4, 2)
    scale = q._nibbles(low, 8) | (q._pairs(high, 4) << 4)
    return Fields(q._pairs(qs, 32) | (q._bits(qh, 32) << 2), _half(d), _i8(scale) - 32)


def _q4_k(blocks):
    d, dmin, packed, qs = q._fields(blocks, 2, 2, 12, 128)
    scales, mins = q._scales_and_mins(packed)
    return Fields(q._nibbles(qs, 32), _half(d), _i8(scales), _half(dmin), _i8(mins))


def _q5_k(blocks):
    d, dmin, packed, qh, qs = q._fields(blocks, 2, 2, 12, 32, 128)
    scales, mins = q._scales_and_mins(packed)
    code = q._nibbles(qs, 32) | (q._bits(qh, 32) << 4)
    return Fields(code, _half(d), _i8(scales), _half(dmin), _i8(mins))


def _q6_k(blocks):
    ql, qh, scales, d = q._fields(blocks, 128, 64, 16, 2)
    return Fields(q._nibbles(ql, 64) | (q._pairs(qh, 32) << 4), _half(d), q._view(scales, jnp.int8))


def _iq2_xxs(blocks):
    d, qs = q._fields(blocks, 2, 64)
    index, codes = q._fields(qs.reshape(len(qs), 8, 8), 4, 4)
    codes = q._view(codes, jnp.uint32).reshape(len(qs), 8)
    signs = q._signs(q._lookup(q._SIGN_CODES, q._unpack(codes, (0, 7, 14, 21), 0x7F, group=1)))
    code = _index(q._lookup(q._grid("IQ2_XXS"), index) * signs, _IQ2)
    return Fields(code, _half(d), _i8(2 * (codes >> 28) + 1))


def _iq2_xs(blocks):
    d, qs, scales = q._fields(blocks, 2, 64, 8)
    words = q._view(qs, jnp.uint16)
    signs = q._signs(q._lookup(q._SIGN_CODES, words >> 9))
    code = _index(q._lookup(q._grid("IQ2_XS"), words & 0x1FF) * signs, _IQ2)
    return Fields(code, _half(d), _i8(2 * q._nibbles(scales, 1) + 1))


def _iq2_s(blocks):
    d, low, signs, high, scales = q._fields(blocks, 2, 32, 32, 8, 8)
    index = q._u16(low) | (q._u16(q._pairs(high, 1)) << 8)
    code = _index(q._lookup(q._grid("IQ2_S"), index) * q._signs(signs), _IQ2)
    return Fields(code, _half(d), _i8(2 * q._nibbles(scales, 1) + 1))


def _iq3_xxs(blocks):
    d, index, codes = q._fields(blocks, 2, 64, 32)
    codes = q._view(codes, jnp.uint32)
    signs = q._signs(q._lookup(q._SIGN_CODES, q._unpack(codes, (0, 7, 14, 21), 0x7F, group=1)))
    code = _index(q._lookup(q._grid("IQ3_XXS"), index) * signs, _IQ3_XXS)
    return Fields(code, _half(d), _i8(2 * (codes >> 28) + 1))


def _iq3_s(blocks):
    d, low, high, signs, scales = q._fields(blocks, 2, 64, 8, 32, 4)
    index = q._u16(low) | (q._u16(q._bits(high, 1)) << 8)
    code = _index(q._lookup(q._grid("IQ3_S"), index) * q._signs(signs), _IQ3_S)
    return Fields(code, _half(d), _i8(2 * q._nibbles(scales, 1) + 1))


def _iq1_s(blocks):
    d, low, words = q._fields(blocks, 2, 32, 16)
    words = q._view(words, jnp.uint16)
    index = q._u16(low) | (q._unpack(words, (0, 3, 6, 9), 0x07, group=1) << 8)
    eighth = q._spread(1 - 2 * (words >> 15).astype(jnp.float32), 32)
    code = _index(8 * q._lookup(q._grid("IQ1_S"), index) + eighth, _IQ1)
    return Fields(code, _half(d), _i8(2 * ((words >> 12) & 0x07) + 1))


def _iq1_m(blocks):
    low, high, words = q._fields(blocks, 32, 16, 8)
    high, words = q._nibbles(high, 1), q._view(words, jnp.uint16)
    d = ((words >> 12) << np.array([0, 4, 8, 12], np.uint16)).sum(axis=1, keepdims=True, dtype=jnp.uint16)
    index = q._u16(low) | (q._u16(high & 0x07) << 8)
    eighth = q._spread(1 - 2 * (high >> 3).astype(jnp.float32), 8)
    code = _index(8 * q._lookup(q._grid("IQ1_M"), index) + eighth, _IQ1)
    scales = q._unpack(words, (0, 3, 6, 9), 0x07, group=1)
    return Fields(code, jax.lax.bitcast_convert_type(d, jnp.float16), _i8(2 * scales + 1))


def _iq4_xs(blocks):
    d, high, low, qs = q._fields(blocks, 2, 2, 4, 128)
    scale = q._nibbles(low, 1) | (q._pairs(high, 1) << 4)
    return Fields(q._nibbles(qs, 16), _half(d), _i8(scale) - 32)


def _tq1_0(blocks):
    first, second, third, d = q._fields(blocks, 32, 16, 4, 2)
    trits = [q._trits(first, 5), q._trits(second, 5), q._trits(third, 4)]
    return Fields(jnp.concatenate(trits, axis=1), _half(d))


def _tq2_0(blocks):
    qs, d = q._fields(blocks, 64, 2)
    return Fields(q._pairs(qs, 32), _half(d))


def _q1_0(blocks):
    d, qs = q._fields(blocks, 2, 16)
    return Fields(q._bits(qs, 1), _half(d))


def _q2_0(blocks):
    d, qs = q._fields(blocks, 2, 16)
    return Fields(q._pairs(qs, 1), _half(d))


def _mxfp4(blocks):
    e, qs = q._fields(blocks, 1, 16)
    d = q._ldexp(jnp.ones(e.shape, jnp.int32), e.astype(jnp.int32) - 128)
    bits = jax.lax.bitcast_convert_type(d, jnp.uint32) >> 16  # not a conversion, which may flush 2^-128
    return Fields(q._nibbles(qs, 16), jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16))


def _nvfp4(blocks):
    scales, qs = q._fields(blocks, 4, 32)
    return Fields(q._nibbles(qs, 8), (q._ue4m3(scales) * 2**-10).astype(jnp.float16))


def _signed(magnitudes: Any) -> tuple[int, ...]:
    """A table of both signs of whole magnitudes, ascending."""
    return tuple(sorted({int(s * m) for m in np.unique(magnitudes) for s in (1, -1)}))


_IQ2 = _signed(q._grid("IQ2_XXS"))
_IQ3_XXS = _signed(q._grid("IQ3_XXS"))
_IQ3_S = _signed(q._grid("IQ3_S"))
_IQ1 = _signed([1, 7, 9])  # eighths: -1, 0 and 1, an eighth to either side
_IQ4 = tuple(int(v) for v in q._IQ4_VALUES)
_E2M1 = tuple(int(v) for v in q._E2M1_DOUBLED)

LAYOUTS = {
    "Q4_0": Layout(_q4_0, (4,), offset=8),
    "Q4_1": Layout(_q4_1, (4,)),
    "Q5_0": Layout(_q5_0, (4, 1), offset=16),
    "Q5_1": Layout(_q5_1, (4, 1)),
    "Q8_0": Layout(_q8_0, (8,), offset=128),
    "Q2_K": Layout(_q2_k, (2,)),
    "Q3_K": Layout(_q3_k, (2, 1), offset=4),
    "Q4_K": Layout(_q4_k, (4,)),
    "Q5_K": Layout(_q5_k, (4, 1)),
    "Q6_K": Layout(_q6_k, (4, 2), offset=32),
    "IQ2_XXS": Layout(_iq2_xxs, (2, 1), table=_IQ2, unit=0.125),
    "IQ2_XS": Layout(_iq2_xs, (2, 1), table=_IQ2, unit=0.125),
    "IQ2_S": Layout(_iq2_s, (2, 1), table=_IQ2, unit=0.125),
    "IQ3_XXS": Layout(_iq3_xxs, (4,), table=_IQ3_XXS, unit=0.25),
    "IQ3_S": Layout(_iq3_s, (4,), table=_IQ3_S),
    "IQ1_S": Layout(_iq1_s, (2, 1), table=_IQ1, unit=0.125),
    "IQ1_M": Layout(_iq1_m, (2, 1), table=_IQ1, unit=0.125),
    "IQ4_NL": Layout(_q4_0, (4,), table=_IQ4),
    "IQ4_XS": Layout(_iq4_xs, (4,), table=_IQ4),
    "TQ1_0": Layout(_tq1_0, (2,), offset=1),
    "TQ2_0": Layout(_tq2_0, (2,), offset=1),
    "Q1_0": Layout(_q1_0, (1,), table=(-1, 1)),
    "Q2_0": Layout(_q2_0, (2,), offset=1),
    "MXFP4": Layout(_mxfp4, (4,), table=_E2M1),
    "NVFP4": Layout(_nvfp4, (4,), table=_E2M1),
}
