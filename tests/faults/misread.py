"""Wrong decoders: packed blocks changed so that a right decoder reads what a wrong one would have read.

Each function takes blocks (n, block bytes) and returns changed ones. The reference is llama.cpp on the true file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gguf
import numpy as np
import oracle
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Bytes = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Misread:
    """A decoder's mistake with one quant type."""

    qtype: str
    name: str
    change: Bytes
    causes: tuple[str, ...]


def _planes(start: int, taken: Callable[[np.ndarray], np.ndarray]) -> Bytes:
    """Q5_K's 32 bytes of high bits at `start`: sub-block s reads bit taken(s)."""

    def change(blocks: np.ndarray) -> np.ndarray:
        blocks = blocks.copy()
        qh = blocks[:, start : start + 32]
        source = taken(np.arange(8))
        bits = [(qh >> source[s]) & 1 if source[s] >= 0 else 0 * qh for s in range(8)]
        blocks[:, start : start + 32] = sum(bit << s for s, bit in enumerate(bits))
        return blocks

    return change


def _set(columns: slice, value: Callable[[np.ndarray], np.ndarray]) -> Bytes:
    def change(blocks: np.ndarray) -> np.ndarray:
        blocks = blocks.copy()
        blocks[:, columns] = value(blocks[:, columns])
        return blocks

    return change


def _neighbours(start: int, size: int = 16) -> Bytes:
    """32-element blocks of nibbles: a byte's two nibbles read as neighbours."""

    def change(blocks: np.ndarray) -> np.ndarray:
        blocks = blocks.copy()
        for at in range(start, blocks.shape[1], size):
            qs = blocks[:, at : at + size]
            read = np.stack([qs & 15, qs >> 4], axis=-1).reshape(len(qs), -1)
            blocks[:, at : at + size] = read[:, :size] | (read[:, size:] << 4)
        return blocks

    return change


def _sub_blocks(change_scales: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Bytes:
    """Q4_K and Q5_K: other 6-bit scales and minima."""

    def change(blocks: np.ndarray) -> np.ndarray:
        blocks = blocks.copy()
        a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
        scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
        minima = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
        s, m = change_scales(scales, minima)
        blocks[:, 4:8] = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
        blocks[:, 8:12] = (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6)
        blocks[:, 12:16] = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
        return blocks

    return change


def _swap(x: np.ndarray) -> np.ndarray:
    return (x >> 4) | (x << 4)


MISREADS: list[Misread] = [
    Misread("Q5_K", "one mask, shift one", _planes(16, lambda s: s // 2), ("q5_k-high-bit",)),
    Misread("Q5_K", "one mask, shift two", _planes(16, lambda s: 2 * (s // 2)), ("q5_k-high-bit",)),
    Misread("Q5_K", "masks swapped", _planes(16, lambda s: s ^ 1), ("q5_k-high-bit",)),
    Misread("Q5_K", "high bits dropped", _planes(16, lambda s: 0 * s - 1), ("q5_k-high-bit",)),
    Misread("Q5_K", "an odd choice of masks", _planes(16, lambda s: (3 * s + 2) % 8), ("q5_k-high-bit",)),
    Misread("Q5_K", "minima dropped", _set(slice(2, 4), lambda x: 0 * x), ("q5_k-min",)),
    Misread("Q4_K", "minima dropped", _set(slice(2, 4), lambda x: 0 * x), ("q4_k-min",)),
    Misread(
        "Q4_K",
        "upper scales cut to four bits",
        _sub_blocks(
            lambda s, m: (np.where(np.arange(8) < 4, s, s & 15), np.where(np.arange(8) < 4, m, m & 15))
        ),
        ("q4_k-scale",),
    ),
    Misread("Q4_K", "scales and minima exchanged", _sub_blocks(lambda s, m: (m, s)), ("q4_k-scale",)),
    Misread(
        "Q4_K",
        "all scales from the first sub-block",
        _sub_blocks(lambda s, m: (0 * s + s[:, :1], 0 * m + m[:, :1])),
        ("q4_k-scale",),
    ),
    Misread("Q4_K", "nibbles swapped", _set(slice(16, None), _swap), ("nibble-order",)),
    Misread("Q4_0", "neighbours", _neighbours(2), ("nibble-order",)),
    Misread("Q4_1", "minimum dropped", _set(slice(2, 4), lambda x: 0 * x), ("q4_1-min",)),
    Misread("Q5_0", "high bits dropped", _set(slice(2, 6), lambda x: 0 * x), ("q5_0-high-bit",)),
    Misread("Q5_1", "nibbles swapped", _set(slice(8, None), _swap), ("nibble-order",)),
    Misread("Q6_K", "high bits dropped", _set(slice(128, 192), lambda x: 0 * x + 0xAA), ("q6_k-high-bit",)),
    Misread("Q6_K", "high pairs swapped", _set(slice(128, 192), _swap), ("q6_k-high-bit",)),
    Misread("Q3_K", "high bits inverted", _set(slice(0, 32), lambda x: ~x), ("q3_k-high-bit", "zero-point")),
    Misread("Q2_K", "minima dropped", _set(slice(82, 84), lambda x: 0 * x), ("q2_k-min",)),
    Misread("Q2_K", "scales late", _set(slice(0, 16), lambda x: np.roll(x, 1, axis=1)), ("q2_k-scale",)),
    Misread("IQ4_NL", "neighbours", _neighbours(2), ("nibble-order",)),
    Misread("IQ4_XS", "nibbles swapped", _set(slice(8, None), _swap), ("nibble-order",)),
    Misread("MXFP4", "neighbours", _neighbours(1), ("nibble-order",)),
    Misread("MXFP4", "exponent bias 125", _set(slice(0, 1), lambda x: x + 2), ("missing-scale",)),
]


class Weights(Mapping[str, np.ndarray]):
    """A file's weights with one quant type misread."""

    def __init__(self, inner: Any, misread: Misread):
        self._inner, self._misread = inner, misread
        self._kind = GGMLQuantizationType[misread.qtype]

    def __getitem__(self, name: str) -> np.ndarray:
        reader = self._inner._reader
        shape, type_id, offset = reader.infos[name]
        if type_id != self._kind:
            return self._inner[name]
        block, size = GGML_QUANT_SIZES[type_id]
        raw = np.array(reader.data[offset : offset + int(np.prod(shape)) // block * size]).reshape(-1, size)
        wrong = self._misread.change(raw)
        return gguf.quants.dequantize(wrong, self._kind).reshape(shape).astype(np.float64)

    def __contains__(self, name: object) -> bool:
        return name in self._inner

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)


def misread(model: oracle.Model, mistake: Misread) -> oracle.Model:
    """The model as the wrong decoder sees it."""
    return dataclasses.replace(model, weights=Weights(model.weights, mistake))
