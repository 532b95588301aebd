"""What a caller passes, checked, in shapes of which few are ever compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from scarlet_jax.errors import BadInput

PIECE = (
    512  # longest stretch of tokens computed at once: bounds the memory of attention scores and activations
)
SLOTS = 256  # the smallest cache; larger ones double


def bucket(slots: int) -> int:
    """The next size of cache: SLOTS, doubled as often as needed."""
    return max(SLOTS, 1 << (slots - 1).bit_length())


class Piece(NamedTuple):
    """A stretch of a batch, padded to a length that is compiled once: tokens (B, bucket), real ones (B,)."""

    tokens: np.ndarray
    count: np.ndarray
    width: int  # the longest count
    positions: np.ndarray | None = None  # (4, B, bucket), where they are not plain text's


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a caller passed: int32 tokens (B, T), zero-padded, lengths (B,), whether it was one row, positions."""

    tokens: np.ndarray
    lengths: np.ndarray
    single: bool
    positions: np.ndarray | None = None  # int32 (4, B, T)

    @classmethod
    def of(cls, tokens: Any, vocabulary_size: int, positions: Any = None) -> Batch:
        """Check ids, lengths and positions; BadInput for an empty sequence or an id outside the vocabulary."""
        single = np.ndim(tokens[0]) == 0 if len(tokens) else True
        rows = [np.asarray(row) for row in ([tokens] if single else tokens)]
        if not all(row.size for row in rows):
            raise BadInput("tokens: empty; expected at least one token")
        for row in rows:
            _check_ids(row, vocabulary_size)
        padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        return cls(padded, lengths, single, _components(positions, padded.shape, single))

    def pieces(self) -> Iterator[Piece]:
        """At most PIECE tokens at a time, padded to a power of two."""
        for start in range(0, self.tokens.shape[1], PIECE):
            part = self.tokens[:, start : start + PIECE]
            width = part.shape[1]
            padding = (1 << (width - 1).bit_length()) - width
            pad = lambda x, padding=padding: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])  # noqa: E731
            yield Piece(
                pad(part),
                np.clip(self.lengths - start, 0, width).astype(np.int32),
                width,
                None if self.positions is None else pad(self.positions[..., start : start + width]),
            )


def _check_ids(row: np.ndarray, vocabulary_size: int) -> None:
    if not np.issubdtype(row.dtype, np.integer):
        raise BadInput(f"tokens: of type {row.dtype}; expected integers")
    outside = row[(row < 0) | (row >= vocabulary_size)]
    if outside.size:
        raise BadInput(
            f"tokens: id {outside[0]} is outside the vocabulary; expected 0 to {vocabulary_size - 1}"
        )


def _components(positions: Any, shape: tuple[int, int], single: bool) -> np.ndarray | None:
    """Positions (3 or 4, T), or (3 or 4, B, T) for tokens of that shape, as int32 (4, B, T): a fourth is zero."""
    if positions is None:
        return None
    given = np.asarray(positions)
    each = shape[1:] if single else shape
    if given.shape not in {(3, *each), (4, *each)} or not np.issubdtype(given.dtype, np.integer):
        raise BadInput(
            f"positions: {given.dtype} of shape {given.shape}; expected integers (time, height, width, and maybe a "
            f"fourth) of shape {(3, *each)} or {(4, *each)}"
        )
    if given.min() < 0:
        raise BadInput(f"positions: {given.min()}; expected 0 and above")
    whole = np.zeros((4, *shape), np.int32)
    whole[: len(given)] = given.reshape(len(given), *shape)
    return whole
