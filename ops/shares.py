"""Weights of which this device holds a share: what a product with one still needs from the other devices.

A program that is spread over the devices (`scarlet_jax.sharding`) is written as if for one, whose model is
smaller. A weight whose products are whole there, a projection to this device's own heads for instance, is a
plain one. Where they are not, the weight is wrapped in one of these, and `ops.matmul` does the rest: no layer asks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

AXIS = "parts"  # the one axis of the mesh that such programs run on


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summed:
    """Some columns of a matrix, or some of all experts: a product is this device's term of a sum over all."""

    part: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of this device's part."""
        return self.part.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """Some rows of a matrix (or table) of `rows` in all: products are joined, in the order of the devices."""

    part: Any
    rows: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of this device's part."""
        return self.part.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """Some of the experts, as many on every device, in order: a product with another device's is zero."""

    part: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of this device's part."""
        return self.part.shape


Share = Summed | Stacked | Experts


def sum_up(y: jax.Array) -> jax.Array:
    """The sum over all devices, on each of them."""
    return jax.lax.psum(y, AXIS)


def join(y: jax.Array, rows: int) -> jax.Array:
    """The last axes of all devices' y, one after another, less the padding beyond `rows`."""
    return jax.lax.all_gather(y, AXIS, axis=y.ndim - 1, tiled=True)[..., :rows]


def here(ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Of ids into an axis of which every device holds `count`: their places here, and which are here at all.

    The place of one that is not here is 0.
    """
    local = ids - jax.lax.axis_index(AXIS).astype(ids.dtype) * count
    held = (local >= 0) & (local < count)
    return jnp.where(held, local, 0), held
