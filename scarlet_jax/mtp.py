"""Multi-token prediction: how a token meets the state before it, at the foot of a prediction block (spec section 6)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scarlet_jax.ops import norm
from scarlet_jax.ops.matmul import linear
from scarlet_jax.taps import tap
from scarlet_jax.types import Array, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """The joint projection (D, 2 D), and the norms (D,) of the token's embedding and of the state."""

    eh_proj: Weight
    enorm: Array
    hnorm: Array


FUSED: dict[str, tuple[str, ...]] = {}


def shapes(cfg: object, width: int) -> dict[str, tuple[int, ...]]:
    """File tensor name, after `nextn.`, -> shape, for model width D."""
    del cfg  # a model's width says it all
    return {"eh_proj.weight": (width, 2 * width), "enorm.weight": (width,), "hnorm.weight": (width,)}


def join(w: Weights, token: Array, hidden: Array, eps: float) -> Array:
    """Embedded tokens and the normed states that came before each, both f32 (B, T, D) -> f32 (B, T, D)."""
    e = tap("mtp_enorm", norm.rms(token, eps) * w.enorm)
    h = tap("mtp_hnorm", norm.rms(hidden, eps) * w.hnorm)
    return tap("mtp_eh_proj", linear(jnp.concatenate([e, h], axis=-1), w.eh_proj))
