"""Mamba-2: causal convolution, a state space that chooses what to keep, a gate, a norm. Dao and Gu, 2024."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scarlet_jax import config
from scarlet_jax.ops import conv, norm, state_space
from scarlet_jax.ops.matmul import linear
from scarlet_jax.span import Span
from scarlet_jax.taps import tap
from scarlet_jax.types import Array, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Projections (out, in), the convolution's taps (C, W) and bias (C,), and what a head or a group has.

    `ssm_in` has the rows of the gate, of the convolution's channels, and of the time steps; `ssm_a` (H, 1) holds
    rates, which are negative.
    """

    ssm_in: Weight
    ssm_conv1d: Array
    ssm_conv1d_bias: Array
    ssm_dt_bias: Array
    ssm_a: Array
    ssm_d: Array
    ssm_out: Weight
    ssm_norm: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The last W-1 convolution inputs (B, W-1, C), oldest first; the state space's memory (B, H, P, N)."""

    conv: Array
    memory: Array


FUSED: dict[str, tuple[str, ...]] = {}


def shapes(cfg: config.Mamba2, width: int) -> dict[str, tuple[int, ...]]:
    """File tensor name -> shape, for model width D."""
    heads, groups = cfg.time_step_rank, cfg.group_count
    norms = ("ssm_norm.weight",) if cfg.norm else ()
    return {
        "ssm_in.weight": (cfg.inner_size + cfg.conv_channels + heads, width),
        "ssm_conv1d.weight": (cfg.conv_channels, cfg.conv_kernel),
        "ssm_conv1d.bias": (cfg.conv_channels,),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads, 1),
        "ssm_d": (heads, 1),
        "ssm_out.weight": (width, cfg.inner_size),
        **dict.fromkeys(norms, (groups, cfg.inner_size // groups)),
    }


def init_state(cfg: config.Mamba2, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> State:
    """Zeros before the first token; of one size for any `slots`, and f32 for any `dtype` (as the delta net's)."""
    del slots, dtype
    return State(
        conv=jnp.zeros((batch, cfg.conv_kernel - 1, cfg.conv_channels), jnp.float32),
        memory=jnp.zeros((batch, cfg.time_step_rank, cfg.head_dim, cfg.state_size), jnp.float32),
    )


def mix(w: Weights, x: Array, state: State, span: Span, *, cfg: config.Mamba2) -> tuple[Array, State]:
    """x f32 (B, T, D), normed -> f32 (B, T, D) and the state after the span's last real token."""
    projected = tap("ssm_in", linear(x, w.ssm_in))
    z, channels, dt = jnp.split(projected, [cfg.inner_size, cfg.inner_size + cfg.conv_channels], axis=-1)
    channels, history = _convolve(w, channels, state.conv, span, cfg)
    x, b, c = _split(channels, cfg)
    dt = jnp.where(span.real[:, :, None], tap("dt_softplus", jax.nn.softplus(dt + w.ssm_dt_bias)), 0)

    scan = state_space.recurrent if x.shape[1] == 1 else state_space.chunked
    y, memory = scan(x, dt, w.ssm_a[:, 0], b, c, tap("ssm_state_before", state.memory))
    memory = tap("ssm_state_after", memory)
    y = tap("mamba2_y_add_d", y + x * w.ssm_d)
    gated = y.reshape(z.shape) * jax.nn.silu(z)
    out = linear(gated if w.ssm_norm is None else _norm(gated, w.ssm_norm, cfg), w.ssm_out)
    return tap("mamba_out", out), State(history, memory)


def _convolve(
    w: Weights, channels: Array, history: Array, span: Span, cfg: config.Mamba2
) -> tuple[Array, Array]:
    """The convolution over channels (B, T, C), biased, its activation, and its next history."""
    inputs = jnp.concatenate([history, channels], axis=1)
    convolved = tap("ssm_conv", conv.causal_conv(inputs, w.ssm_conv1d) + w.ssm_conv1d_bias)
    return tap("ssm_conv_silu", jax.nn.silu(convolved)), conv.history(inputs, span.count, cfg.conv_kernel)


def _split(channels: Array, cfg: config.Mamba2) -> tuple[Array, Array, Array]:
    """Channels (B, T, C) -> x (B, T, H, P), and b and c (B, T, G, N)."""
    groups = cfg.group_count * cfg.state_size
    x, b, c = jnp.split(channels, [cfg.inner_size, cfg.inner_size + groups], axis=-1)
    x = x.reshape(*x.shape[:-1], cfg.time_step_rank, cfg.head_dim)
    b, c = (part.reshape(*part.shape[:-1], cfg.group_count, cfg.state_size) for part in (b, c))
    return x, b, c


def _norm(x: Array, weight: Array, cfg: config.Mamba2) -> Array:
    """Norm each group of x (B, T, H P)."""
    groups = x.reshape(*x.shape[:-1], cfg.group_count, -1)
    return (tap("norm", norm.rms(groups, cfg.layer_norm_rms_epsilon)) * weight).reshape(x.shape)
