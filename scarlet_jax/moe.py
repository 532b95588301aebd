"""Mixture of experts: a router, a few of many SwiGLU networks a token, and one for all (spec section 4)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scarlet_jax import config, ffn, layers
from scarlet_jax.ops import implementations
from scarlet_jax.ops.matmul import is_bare, linear, linear_experts
from scarlet_jax.taps import tap
from scarlet_jax.types import Array, Weight

SMALLEST_SUM = 2.0**-14  # of an expert's weights, before they are divided by it: llama.cpp's smallest f16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Router (E, D); experts' gate and up (E, F, D) and down (E, D, F); the shared expert's, if there is one."""

    ffn_gate_inp: Weight
    ffn_gate_exps: Weight
    ffn_up_exps: Weight
    ffn_down_exps: Weight
    ffn_gate_inp_shexp: Array | None = None
    ffn_gate_shexp: Weight | None = None
    ffn_up_shexp: Weight | None = None
    ffn_down_shexp: Weight | None = None


FUSED = {"ffn_gate_up_exps.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight")}


def shapes(cfg: config.MoE, width: int) -> dict[str, tuple[int, ...]]:
    """File tensor name -> shape, for model width D."""
    experts, inner, shared = (
        cfg.expert_count,
        cfg.expert_feed_forward_length,
        cfg.expert_shared_feed_forward_length,
    )
    routed = {
        "ffn_gate_inp.weight": (experts, width),
        "ffn_gate_exps.weight": (experts, inner, width),
        "ffn_up_exps.weight": (experts, inner, width),
        "ffn_down_exps.weight": (experts, width, inner),
    }
    for_all = {
        "ffn_gate_inp_shexp.weight": (width,),
        "ffn_gate_shexp.weight": (shared, width),
        "ffn_up_shexp.weight": (shared, width),
        "ffn_down_shexp.weight": (width, shared),
    }
    return routed | for_all if shared else routed


def feed_forward(w: Weights, x: Array, *, cfg: config.MoE) -> Array:
    """f32 (B, T, D), normed -> f32 (B, T, D)."""
    ids, weights = route(tap("ffn_moe_logits", linear(x, w.ffn_gate_inp)), cfg)
    routed = tap("ffn_moe_out", _experts(w, x, ids, weights, cfg=cfg))
    return tap("ffn_out", routed + _shared(w, x, cfg)) if cfg.expert_shared_feed_forward_length else routed


def route(logits: Array, cfg: config.MoE) -> tuple[Array, Array]:
    """Router logits f32 (B, T, E) -> each token's experts, best first, int32 (B, T, k), and their weights."""
    probabilities = tap("ffn_moe_probs", jax.nn.softmax(logits))
    tap("ffn_moe_argsort", jnp.argsort(probabilities, descending=True))
    best, ids = jax.lax.top_k(probabilities, cfg.expert_used_count)
    ids = tap("ffn_moe_topk", ids)
    weights = tap("ffn_moe_weights", best[..., None])[..., 0]  # llama.cpp's (B, T, k, 1)
    if cfg.expert_weights_norm:
        total = tap("ffn_moe_weights_sum", weights.sum(axis=-1, keepdims=True))
        total = tap("ffn_moe_weights_sum_clamped", jnp.maximum(total, SMALLEST_SUM))
        weights = tap("ffn_moe_weights_norm", weights / total)
    if cfg.expert_weights_scale != 1:
        weights = tap("ffn_moe_weights_scaled", (weights * cfg.expert_weights_scale)[..., None])[..., 0]
    return ids, weights


def _experts(w: Weights, x: Array, ids: Array, weights: Array, *, cfg: config.MoE) -> Array:
    """The weighted sum of each token's experts; only those that some token was given to are read."""
    if not all(map(is_bare, (w.ffn_gate_exps, w.ffn_up_exps, w.ffn_down_exps))):
        return _by_steps(w, x, ids, weights, cfg=cfg)
    return layers.run("ffn_experts", _at_once, _by_steps, w, x, ids, weights, cfg=cfg)


def _at_once(w: Weights, x: Array, ids: Array, weights: Array, *, cfg: config.MoE) -> Array:
    rows, k = x.reshape(-1, x.shape[-1]), cfg.expert_used_count
    matrices = w.ffn_gate_exps, w.ffn_up_exps, w.ffn_down_exps
    slots = ids.reshape(-1, k), weights.reshape(-1, k)
    return implementations.call("ffn_experts", rows, *matrices, *slots).reshape(x.shape)


def _by_steps(w: Weights, x: Array, ids: Array, weights: Array, *, cfg: config.MoE) -> Array:
    del cfg
    row = x[..., None, :]
    up = tap("ffn_moe_up", linear_experts(row, w.ffn_up_exps, ids))
    gate = tap("ffn_moe_gate", linear_experts(row, w.ffn_gate_exps, ids))
    gated = tap("ffn_moe_swiglu", jax.nn.silu(gate) * up)
    outputs = tap("ffn_moe_down", linear_experts(gated, w.ffn_down_exps, ids))
    return tap("ffn_moe_weighted", outputs * weights[..., None]).sum(axis=-2)


def _shared(w: Weights, x: Array, cfg: config.MoE) -> Array:
    """The expert that sees every token, behind a gate of one value a token."""
    assert w.ffn_gate_shexp is not None
    assert w.ffn_up_shexp is not None
    assert w.ffn_down_shexp is not None
    assert w.ffn_gate_inp_shexp is not None
    dense = ffn.Weights(w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp)
    y = ffn.feed_forward(dense, x, cfg=config.Dense(cfg.expert_shared_feed_forward_length))
    gate = tap("shared_expert_gate", linear(x, w.ffn_gate_inp_shexp[None]))
    return tap(
        "ffn_shexp_gated", tap("ffn_shexp", y) * tap("shared_expert_gate_sigmoid", jax.nn.sigmoid(gate))
    )
