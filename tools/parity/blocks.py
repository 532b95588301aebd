"""Quantised blocks taken apart: the integers, bit planes, scales and minima that a decoder puts together.

Every block format of the nibble family and the K family is  w = scale * (value(low + step * high) - zero) - min.
With the parts apart, a decoder's known mistakes are one line each: another bit plane, another order of the
nibbles, another scale. Layouts: fact sheet section 9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Parts:
    """Blocks of E elements, n of them.

    Attributes:
        low: integers from the main bits, (n, E).
        planes: every high part stored for an element's lane, (n, E, P); P = 0 where there are none.
        own: which of the planes is the element's, (E,).
        step: what one unit of the high part is worth.
        scale: (n, E), the product of all scales.
        minimum: (n, E), subtracted; None where the format has none.
        zero: subtracted from the integer.
        table: code -> value, where the integers are codes.
        group: elements that share one scale.
        packed: the packed sub-block scales, as stored, for mistakes in unpacking them.
    """

    low: np.ndarray
    planes: np.ndarray
    own: np.ndarray
    step: int
    scale: np.ndarray
    minimum: np.ndarray | None = None
    zero: float = 0.0
    table: np.ndarray | None = None
    group: int = 32
    packed: Packed | None = None

    @property
    def high(self) -> np.ndarray:
        """Each element's own high part, (n, E)."""
        if not self.planes.shape[-1]:
            return np.zeros_like(self.low)
        return np.take_along_axis(self.planes, self.own[None, :, None].repeat(len(self.low), 0), -1)[..., 0]

    def decode(self, **change: np.ndarray | float | None) -> np.ndarray:
        """The weights (n, E), with any part replaced: `low`, `high`, `scale`, `minimum`, `zero`."""
        parts = {"low": self.low, "scale": self.scale, "minimum": self.minimum, "zero": self.zero} | change
        integer = parts["low"] + self.step * change.get("high", self.high)
        value = self.table[integer] if self.table is not None else integer.astype(np.float32)
        weights = parts["scale"] * (value - np.float32(parts["zero"]))
        return weights if parts["minimum"] is None else weights - parts["minimum"]


@dataclasses.dataclass(frozen=True)
class Packed:
    """The 12 bytes of 6-bit scales and minima of Q4_K and Q5_K, (n, 12), and the block's d and dmin, (n, 1)."""

    bytes: np.ndarray
    d: np.ndarray
    dmin: np.ndarray


def take_apart(blocks: np.ndarray, qtype: str) -> Parts | None:
    """The parts of blocks (n, block bytes) uint8; None for formats that are not of these families."""
    reader = _READERS.get(qtype)
    return reader(np.ascontiguousarray(blocks)) if reader else None


def _f16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """(n, ..., b) -> (n, ..., 2b): all low nibbles, then all high ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1).astype(np.int32)


def _none(n: int, elements: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, elements, 0), np.int32), np.zeros(elements, np.int64)


def _simple(low: np.ndarray, scale: np.ndarray, **rest) -> Parts:
    n, elements = low.shape
    planes, own = _none(n, elements)
    wide = np.broadcast_to(scale, (n, elements))
    minimum = rest.pop("minimum", None)
    minimum = None if minimum is None else np.broadcast_to(minimum, (n, elements))
    return Parts(
        low, rest.pop("planes", planes), rest.pop("own", own), rest.pop("step", 0), wide, minimum, **rest
    )


def _bits32(qh: np.ndarray) -> dict:
    """The 32 high bits of Q5_0 and Q5_1: any bit could be taken for any element."""
    word = np.ascontiguousarray(qh).view(np.uint32)
    bits = ((word >> np.arange(32, dtype=np.uint32)) & 1).astype(np.int32)  # (n, 32)
    return {"planes": np.repeat(bits[:, None], 32, axis=1), "own": np.arange(32), "step": 16}


def _q4_0(b: np.ndarray) -> Parts:
    return _simple(_nibbles(b[:, 2:]), _f16(b[:, :2]), zero=8.0)


def _q4_1(b: np.ndarray) -> Parts:
    return _simple(_nibbles(b[:, 4:]), _f16(b[:, :2]), minimum=-_f16(b[:, 2:4]))


def _q5_0(b: np.ndarray) -> Parts:
    return _simple(_nibbles(b[:, 6:]), _f16(b[:, :2]), zero=16.0, **_bits32(b[:, 2:6]))


def _q5_1(b: np.ndarray) -> Parts:
    return _simple(_nibbles(b[:, 8:]), _f16(b[:, :2]), minimum=-_f16(b[:, 2:4]), **_bits32(b[:, 4:8]))


def _q8_0(b: np.ndarray) -> Parts:
    return _simple(b[:, 2:].view(np.int8).astype(np.int32), _f16(b[:, :2]))


def six_bits(sc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 12 packed bytes (n, 12) -> 8 scales and 8 minima."""
    a, b, c = sc[:, :4], sc[:, 4:8], sc[:, 8:]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _wide(x: np.ndarray, elements: int = 256) -> np.ndarray:
    return np.repeat(x, elements // x.shape[1], axis=1)


def _lanes(qs: np.ndarray) -> np.ndarray:
    """(n, 128) -> (n, 256): 64 elements a run of 32 bytes, low nibbles first."""
    return _nibbles(qs.reshape(len(qs), 4, 32)).reshape(len(qs), 256)


def _q4_k(b: np.ndarray) -> Parts:
    d, dmin, packed = _f16(b[:, :2]), _f16(b[:, 2:4]), b[:, 4:16]
    scales, minima = six_bits(packed)
    return _simple(
        _lanes(b[:, 16:]), _wide(d * scales), minimum=_wide(dmin * minima), packed=Packed(packed, d, dmin)
    )


def _q5_k(b: np.ndarray) -> Parts:
    d, dmin, packed, qh = _f16(b[:, :2]), _f16(b[:, 2:4]), b[:, 4:16], b[:, 16:48]
    scales, minima = six_bits(packed)
    bits = ((qh[:, :, None] >> np.arange(8, dtype=np.uint8)) & 1).astype(np.int32)  # (n, 32 lanes, 8)
    return _simple(
        _lanes(b[:, 48:]),
        _wide(d * scales),
        minimum=_wide(dmin * minima),
        planes=np.tile(bits, (1, 8, 1)),
        own=np.repeat(np.arange(8), 32),
        step=16,
        packed=Packed(packed, d, dmin),
    )


def _q6_k(b: np.ndarray) -> Parts:
    n = len(b)
    ql, qh, sc, d = (
        b[:, :128].reshape(n, 2, 64),
        b[:, 128:192].reshape(n, 2, 32),
        b[:, 192:208],
        _f16(b[:, 208:]),
    )
    low = np.concatenate([ql & 15, ql >> 4], axis=2).reshape(n, 256).astype(np.int32)
    pairs = ((qh[..., None] >> (2 * np.arange(4, dtype=np.uint8))) & 3).astype(np.int32)  # (n, 2, 32, 4)
    planes = np.tile(pairs, (1, 1, 4, 1)).reshape(n, 256, 4)
    own = np.tile(np.repeat(np.arange(4), 32), 2)
    scale = _wide(d * sc.view(np.int8).astype(np.float32))
    return _simple(low, scale, zero=32.0, planes=planes, own=own, step=16, group=16)


def _q2_k(b: np.ndarray) -> Parts:
    sc, qs, d, dmin = b[:, :16], b[:, 16:80], _f16(b[:, 80:82]), _f16(b[:, 82:84])
    low = _two_bits(qs)
    scale, minimum = _wide(d * (sc & 15)), _wide(dmin * (sc >> 4))
    return _simple(low, scale.astype(np.float32), minimum=minimum.astype(np.float32), group=16)


def _two_bits(qs: np.ndarray) -> np.ndarray:
    lanes = qs.reshape(len(qs), 2, 1, 32) >> (2 * np.arange(4, dtype=np.uint8))[None, None, :, None]
    return (lanes & 3).reshape(len(qs), 256).astype(np.int32)


def _q3_k(b: np.ndarray) -> Parts:
    hm, qs, sc, d = b[:, :32], b[:, 32:96], b[:, 96:108], _f16(b[:, 108:110])
    j = np.arange(16)
    low = np.concatenate([sc[:, :8] & 15, sc[:, :8] >> 4], axis=1)
    scales = (low | (((sc[:, 8 + j % 4] >> (2 * (j // 4)).astype(np.uint8)) & 3) << 4)).astype(
        np.int8
    ) - np.int8(32)
    bits = ((hm[:, :, None] >> np.arange(8, dtype=np.uint8)) & 1).astype(np.int32)
    return _simple(
        _two_bits(qs),
        _wide(d * scales.astype(np.float32)),
        zero=4.0,
        planes=np.tile(bits, (1, 8, 1)),
        own=np.repeat(np.arange(8), 32),
        step=4,
        group=16,
    )


_CODES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # IQ4_NL's levels
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _iq4_nl(b: np.ndarray) -> Parts:
    return _simple(_nibbles(b[:, 2:]), _f16(b[:, :2]), table=_CODES)


def _iq4_xs(b: np.ndarray) -> Parts:
    n = len(b)
    d, sh, sl = _f16(b[:, :2]), np.ascontiguousarray(b[:, 2:4]).view(np.uint16), b[:, 4:8]
    j = np.arange(8)
    low = (sl[:, j // 2] >> (4 * (j % 2)).astype(np.uint8)) & 15
    high = (sh >> (2 * j).astype(np.uint16)) & 3
    scales = (low | (high << 4)).astype(np.int32) - 32
    codes = _nibbles(b[:, 8:].reshape(n, 8, 16)).reshape(n, 256)
    return _simple(codes, _wide(d * scales.astype(np.float32)), table=_CODES)


def _mxfp4(b: np.ndarray) -> Parts:
    scale = np.exp2(b[:, :1].astype(np.float32) - 127)
    return _simple(_nibbles(b[:, 1:]), scale, table=_E2M1)


_READERS: dict[str, Callable[[np.ndarray], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
