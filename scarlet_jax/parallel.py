"""Attention and Mamba-2 beside each other, on the same input: what they give is added (Falcon-H1)."""

from __future__ import annotations

import dataclasses

import jax

from scarlet_jax import attention, config, mamba2
from scarlet_jax.span import Span
from scarlet_jax.taps import tap
from scarlet_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights(attention.Weights, mamba2.Weights):
    """Those of both."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Those of both."""

    attention: attention.State
    mamba2: mamba2.State


FUSED = attention.FUSED | mamba2.FUSED


def shapes(cfg: config.Parallel, width: int) -> dict[str, tuple[int, ...]]:
    """File tensor name -> shape, for model width D."""
    return attention.shapes(cfg.attention, width) | mamba2.shapes(cfg.mamba2, width)


def init_state(cfg: config.Parallel, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> State:
    """An empty cache for `slots` tokens a sequence, and an empty memory."""
    return State(
        attention.init_state(cfg.attention, batch, slots, dtype),
        mamba2.init_state(cfg.mamba2, batch, slots, dtype),
    )


def mix(w: Weights, x: Array, state: State, span: Span, *, cfg: config.Parallel) -> tuple[Array, State]:
    """x f32 (B, T, D), normed -> f32 (B, T, D) and the states after the span's last real token."""
    attended, cache = attention.mix(w, x, state.attention, span, cfg=cfg.attention)
    scanned, memory = mamba2.mix(w, x, state.mamba2, span, cfg=cfg.mamba2)
    return tap("layer_out", attended + scanned), State(cache, memory)
