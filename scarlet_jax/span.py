"""Span: which tokens of which sequences a call holds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scarlet_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
    """T tokens of each of B sequences, right-padded to a common length.

    `start` int32 (B,): tokens already in the state, so the cache slot of the first new one.
    `count` int32 (B,): how many of the T are real; the rest is padding and leaves no trace in any state.
    `positions` int32 (4, B, T): (time, height, width, extra) for rope.
    """

    start: Array
    count: Array
    positions: Array

    @classmethod
    def text(cls, start: Array, count: Array, tokens: int, position: Array | None = None) -> Span:
        """A stretch of plain text: time, height and width advance together, extra stays 0.

        They go on from `position` int32 (B,): by default from `start`, where all before it was text too.
        """
        first = start if position is None else position
        position = first[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        return cls(start, count, jnp.stack([position, position, position, jnp.zeros_like(position)]))

    @property
    def slots(self) -> Array:
        """int32 (B, T): the place of each token in its sequence."""
        return self.start[:, None] + jnp.arange(self.positions.shape[-1], dtype=jnp.int32)

    def next_position(self, before: Array) -> Array:
        """int32 (B,): where text goes on, past the greatest time, height or width so far; `before` till now."""
        greatest = jnp.where(self.real, self.positions[:3].max(axis=0), -1).max(axis=-1)
        return jnp.maximum(before, greatest + 1)

    @property
    def real(self) -> Array:
        """bool (B, T): false for padding."""
        return jnp.arange(self.positions.shape[-1]) < self.count[:, None]
