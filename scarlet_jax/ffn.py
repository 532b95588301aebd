"""Dense feed-forward network: down(silu(gate x) * up x). Shazeer, 2020 (SwiGLU)."""

from __future__ import annotations

import dataclasses

import jax

from scarlet_jax import config, layers
from scarlet_jax.ops import implementations
from scarlet_jax.ops.matmul import is_bare, linear, linear_many
from scarlet_jax.taps import tap
from scarlet_jax.types import Array, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """gate and up (F, D), down (D, F)."""

    ffn_gate: Weight
    ffn_up: Weight
    ffn_down: Weight


FUSED: dict[str, tuple[str, ...]] = {}


def shapes(cfg: config.Dense, width: int) -> dict[str, tuple[int, ...]]:
    """File tensor name -> shape, for model width D."""
    inner = cfg.feed_forward_length
    return {
        "ffn_gate.weight": (inner, width),
        "ffn_up.weight": (inner, width),
        "ffn_down.weight": (width, inner),
    }


def feed_forward(w: Weights, x: Array, *, cfg: config.Dense) -> Array:
    """f32 (B, T, D), normed -> f32 (B, T, D)."""
    if not all(map(is_bare, (w.ffn_gate, w.ffn_up, w.ffn_down))):  # the kernels know no scales and biases
        return _by_steps(w, x, cfg=cfg)
    return layers.run("ffn", _at_once, _by_steps, w, x, cfg=cfg)


def _at_once(w: Weights, x: Array, *, cfg: config.Dense) -> Array:
    del cfg  # the weights' shapes say it all; an MoE's config says more
    return implementations.call("ffn", x, w.ffn_gate, w.ffn_up, w.ffn_down)


def _by_steps(w: Weights, x: Array, *, cfg: config.Dense) -> Array:
    del cfg
    gate, up = linear_many(x, w.ffn_gate, w.ffn_up)
    gate, up = tap("ffn_gate", gate), tap("ffn_up", up)
    return tap("ffn_out", linear(tap("ffn_swiglu", jax.nn.silu(gate) * up), w.ffn_down))
