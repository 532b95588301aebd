"""Gated delta net: causal convolution, delta rule, gated norm (spec section 4, "Delta net")."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from scarlet_jax import config, layers
from scarlet_jax.ops import conv, gated_delta, implementations, norm
from scarlet_jax.ops.matmul import linear, linear_many
from scarlet_jax.span import Span
from scarlet_jax.taps import tap
from scarlet_jax.types import Array, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Projections (out, in), the convolution's taps (C, W), and vectors a value head or a channel."""

    attn_qkv: Weight
    attn_gate: Weight
    ssm_conv1d: Array
    ssm_alpha: Weight
    ssm_beta: Weight
    ssm_dt_bias: Array
    ssm_a: Array
    ssm_norm: Array
    ssm_out: Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The last W-1 convolution inputs (B, W-1, C), oldest first; the delta rule's memory (B, Hv, Dv, Dk)."""

    conv: Array
    memory: Array


FUSED: dict[str, tuple[str, ...]] = {}


def shapes(cfg: config.DeltaNet, width: int) -> dict[str, tuple[int, ...]]:
    """File tensor name -> shape, for model width D."""
    heads = cfg.time_step_rank
    return {
        "attn_qkv.weight": (cfg.conv_channels, width),
        "attn_gate.weight": (cfg.value_dim, width),
        "ssm_conv1d.weight": (cfg.conv_channels, cfg.conv_kernel),
        "ssm_alpha.weight": (heads, width),
        "ssm_beta.weight": (heads, width),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads,),
        "ssm_norm.weight": (cfg.state_size,),
        "ssm_out.weight": (width, cfg.value_dim),
    }


def init_state(cfg: config.DeltaNet, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> State:
    """The state before the first token, all zeros; of one size for any `slots`, and f32 for any `dtype`.

    A 16-bit memory would be rounded at every token, and the errors add up until the text falls apart.
    """
    del slots, dtype
    return State(
        conv=jnp.zeros((batch, cfg.conv_kernel - 1, cfg.conv_channels), jnp.float32),
        memory=jnp.zeros((batch, cfg.time_step_rank, cfg.state_size, cfg.state_size), jnp.float32),
    )


def mix(w: Weights, x: Array, state: State, span: Span, *, cfg: config.DeltaNet) -> tuple[Array, State]:
    """x f32 (B, T, D), normed -> f32 (B, T, D) and the state after the span's last real token."""
    return layers.run("delta_net", _mix_at_once, _mix_by_steps, w, x, state, span, cfg=cfg)


def _mix_at_once(
    w: Weights, x: Array, state: State, span: Span, *, cfg: config.DeltaNet
) -> tuple[Array, State]:
    """In three calls: the projections of x, all that follows them, and the last projection."""
    projected = linear_many(x, w.attn_qkv, w.attn_gate, w.ssm_alpha, w.ssm_beta)
    vectors = (w.ssm_conv1d, w.ssm_dt_bias, w.ssm_a, w.ssm_norm)
    out, history, memory = implementations.call(
        "delta_net",
        *(*projected, *vectors, state.conv, state.memory, span.count),
        key_head=cfg.key_head_of_value_head(),
        key_heads=cfg.group_count,
        eps=cfg.layer_norm_rms_epsilon,
    )
    return linear(out, w.ssm_out), State(history, memory)


def _mix_by_steps(
    w: Weights, x: Array, state: State, span: Span, cfg: config.DeltaNet
) -> tuple[Array, State]:
    mixed, z, alpha, beta = linear_many(x, w.attn_qkv, w.attn_gate, w.ssm_alpha, w.ssm_beta)
    qkv, history = _convolve(w, mixed, state.conv, span, cfg)
    q, k, v = _split_heads(qkv, cfg)
    g, beta = _gates(w, alpha, beta, span)

    q, k = _by_value_head(q, k, cfg)
    memory = tap("state_predelta", state.memory)
    o, memory = layers.run(
        "delta_rule",
        _rule_at_once,
        _rule_by_steps,
        q / math.sqrt(cfg.state_size),
        k,
        v,
        g,
        beta,
        memory,
        cfg=cfg,
    )
    memory = tap("new_state", memory)

    y = linear(_gated_norm(w, z, tap("attn_output", o), cfg), w.ssm_out)
    return tap("linear_attn_out", y), State(history, memory)


def _rule_at_once(*arrays: Array, cfg: config.DeltaNet) -> tuple[Array, Array]:
    del cfg
    return implementations.call("delta_rule", *arrays)


def _rule_by_steps(q: Array, *arrays: Array, cfg: config.DeltaNet) -> tuple[Array, Array]:
    del cfg
    rule = gated_delta.recurrent if q.shape[1] == 1 else gated_delta.chunked
    return rule(q, *arrays)


def _convolve(
    w: Weights, mixed: Array, history: Array, span: Span, cfg: config.DeltaNet
) -> tuple[Array, Array]:
    """Run the convolution over queries, keys and values (B, T, C), and keep its next history."""
    history = tap("conv_states_reshaped", tap("conv_states", history))
    mixed = tap("linear_attn_qkv_mixed", mixed)
    tap("qkv_mixed_transposed", mixed)  # a view in llama.cpp, which keeps time last here
    inputs = tap("conv_input", jnp.concatenate([history, mixed], axis=1))
    history = tap("conv_state_last", conv.history(inputs, span.count, cfg.conv_kernel))
    history = tap("conv_state_update", history)
    out = tap("conv_output_raw", conv.causal_conv(inputs, w.ssm_conv1d))
    return tap("conv_output_silu", jax.nn.silu(out)), history


def _split_heads(qkv: Array, cfg: config.DeltaNet) -> tuple[Array, Array, Array]:
    """q, k (B, T, Hk, Dk) of unit length and v (B, T, Hv, Dv), from channels (B, T, C)."""
    q, k, v = jnp.split(qkv, [cfg.key_dim, 2 * cfg.key_dim], axis=-1)
    q, k, v = (part.reshape(*part.shape[:-1], -1, cfg.state_size) for part in (q, k, v))
    eps = cfg.layer_norm_rms_epsilon
    q = tap("q_conv_predelta", norm.l2(tap("q_conv", q), eps))
    k = tap("k_conv_predelta", norm.l2(tap("k_conv", k), eps))
    return q, k, tap("v_conv_predelta", v)


def _by_value_head(q: Array, k: Array, cfg: config.DeltaNet) -> tuple[Array, Array]:
    """Queries and keys (B, T, Hk, Dk) that each value head reads, (B, T, Hv, Dk)."""
    heads = cfg.key_head_of_value_head()
    q, k = q[:, :, heads], k[:, :, heads]
    if cfg.head_mapping == "repeat":  # then llama.cpp has no broadcast for it, and shows them repeated
        tap("k_conv_predelta", k)
        tap("q_conv_predelta", q)
    return q, k


def _gates(w: Weights, alpha: Array, beta: Array, span: Span) -> tuple[Array, Array]:
    """Log decay g <= 0 and writing strength beta, (B, T, Hv); 0 for padding, so that it changes nothing."""
    alpha = tap("alpha", alpha)
    g = tap("gate", tap("a_softplus", jax.nn.softplus(alpha + w.ssm_dt_bias)) * w.ssm_a)
    beta = tap("beta", beta[..., None])  # llama.cpp's (B, T, Hv, 1)
    beta = tap("beta_sigmoid", jax.nn.sigmoid(beta))[..., 0]
    real = span.real[:, :, None]
    return jnp.where(real, g, 0), jnp.where(real, beta, 0)


def _gated_norm(w: Weights, z: Array, o: Array, cfg: config.DeltaNet) -> Array:
    """Norm each value head of o (B, T, Hv, Dv), then gate it by z: (B, T, Hv Dv)."""
    normed = tap("norm", norm.rms(o, cfg.layer_norm_rms_epsilon)) * w.ssm_norm
    z = tap("z", z)
    return tap("final_output", normed.reshape(z.shape) * jax.nn.silu(z))
