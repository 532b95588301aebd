"""Gated short convolution (LFM2): out(c * conv(b * x)), with b, c and x projections of the input."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scarlet_jax import config
from scarlet_jax.ops import conv
from scarlet_jax.ops.matmul import linear
from scarlet_jax.span import Span
from scarlet_jax.taps import tap
from scarlet_jax.types import Array, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Projections (3D, D), rows of b before those of c and of x, and (D, D); the convolution's taps (D, W)."""

    shortconv_in_proj: Weight
    shortconv_conv: Array
    shortconv_out_proj: Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The last W-1 inputs of the convolution, (B, W-1, D), oldest first."""

    conv: Array


FUSED: dict[str, tuple[str, ...]] = {}


def shapes(cfg: config.ShortConv, width: int) -> dict[str, tuple[int, ...]]:
    """File tensor name -> shape, for model width D."""
    return {
        "shortconv.in_proj.weight": (3 * width, width),
        "shortconv.conv.weight": (width, cfg.l_cache),
        "shortconv.out_proj.weight": (width, width),
    }


def init_state(cfg: config.ShortConv, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> State:
    """Zeros before the first token; of one size for any `slots`, and f32 for any `dtype`."""
    del slots, dtype
    return State(jnp.zeros((batch, cfg.l_cache - 1, cfg.embedding_length), jnp.float32))


def mix(w: Weights, x: Array, state: State, span: Span, *, cfg: config.ShortConv) -> tuple[Array, State]:
    """x f32 (B, T, D), normed -> f32 (B, T, D) and the state after the span's last real token."""
    b, c, x = jnp.split(tap("conv_in_proj", linear(x, w.shortconv_in_proj)), 3, axis=-1)
    inputs = jnp.concatenate([state.conv, b * x], axis=1)
    convolved = tap("conv_conv", conv.causal_conv(inputs, w.shortconv_conv))
    y = tap("conv_out_proj", linear(c * convolved, w.shortconv_out_proj))
    return y, State(conv.history(inputs, span.count, cfg.l_cache))
