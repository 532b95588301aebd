"""Positions of a text with images: where time, height and width part ways (spec section 6, "Positions")."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from scarlet_jax.errors import BadInput


def with_images(
    tokens: Sequence[int] | np.ndarray,
    grids: Sequence[tuple[int, int, int]] | np.ndarray,
    *,
    pads: Collection[int],
    spatial_merge_size: int = 2,
) -> np.ndarray:
    """The time, height and width of each of `tokens` (T,), int32 (3, T), as `Model.forward` takes them.

    `pads` are the ids that stand for a piece of an image or a video. `grids`: frames, and rows and columns of
    patches, of every image and video in order, of which the encoder merges `spatial_merge_size` by as many into
    one token. Each frame of a video is an image of its own, with or without text between. Raises BadInput where
    the grids and the runs of `pads` do not fit together.
    """
    is_pad = np.isin(np.asarray(tokens), list(pads))
    frames = _frames(grids, spatial_merge_size)
    stretches, start, position = [], 0, 0
    while start < len(is_pad):
        length = _run(is_pad[start:])
        stretch = _frame(next(frames, None), length, start) if is_pad[start] else _text(length)
        stretches.append(position + stretch)
        start += stretch.shape[1]
        position += stretch.max() + 1
    if rest := list(frames):
        raise BadInput(f"grids: {len(rest)} more frames than the tokens have room for")
    return np.concatenate(stretches, axis=1).astype(np.int32) if stretches else np.zeros((3, 0), np.int32)


def _frames(grids: Sequence[tuple[int, int, int]] | np.ndarray, merge: int) -> Iterator[tuple[int, int]]:
    """Rows and columns of tokens of each frame."""
    for time, height, width in np.asarray(grids, int).reshape(-1, 3).tolist():
        if min(time, height, width) < 1 or height % merge or width % merge:
            raise BadInput(
                f"grids: {(time, height, width)}; expected multiples of {merge} rows and columns, {merge} or more"
            )
        yield from [(height // merge, width // merge)] * time


def _run(values: np.ndarray) -> int:
    """How many of the first of `values` are alike."""
    changes = np.flatnonzero(values != values[0])
    return int(changes[0]) if len(changes) else len(values)


def _text(length: int) -> np.ndarray:
    """Positions (3, length) of text, from its first token."""
    return np.tile(np.arange(length), (3, 1))


def _frame(size: tuple[int, int] | None, room: int, start: int) -> np.ndarray:
    """Positions (3, rows x columns) of a frame's tokens, row by row, from its first; there is `room` for so many."""
    if size is None:
        raise BadInput(f"tokens: an image begins at {start}, and there is no grid left for it")
    if size[0] * size[1] > room:
        raise BadInput(
            f"tokens: {room} for an image in a row at {start}; expected {size[0]} x {size[1]}, as in its grid"
        )
    return np.indices((1, *size)).reshape(3, -1)
