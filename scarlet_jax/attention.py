"""Full softmax attention, gated or not, with or without norms on its heads (spec section 4)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from scarlet_jax import config, layers
from scarlet_jax.ops import attention as ops
from scarlet_jax.ops import implementations, norm, rope
from scarlet_jax.ops.matmul import linear, linear_many
from scarlet_jax.span import Span
from scarlet_jax.taps import tap
from scarlet_jax.types import Array, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Projections (out, in) and per-head norms (H,), where there are any."""

    attn_q: Weight
    attn_k: Weight
    attn_v: Weight
    attn_output: Weight
    attn_q_norm: Array | None = None
    attn_k_norm: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The cache: keys (after rope) and values of every token so far, (B, S, K, H)."""

    k: Array
    v: Array


# One file tensor that may hold several of ours, row after row.
FUSED = {"attn_qkv.weight": ("attn_q.weight", "attn_k.weight", "attn_v.weight")}


def shapes(cfg: config.Attention, width: int) -> dict[str, tuple[int, ...]]:
    """File tensor name -> shape, for model width D."""
    queries = cfg.head_count * cfg.key_length
    keys = cfg.head_count_kv * cfg.key_length
    norms = ("attn_q_norm.weight", "attn_k_norm.weight") if cfg.head_norm else ()
    return {
        "attn_q.weight": (queries * (2 if cfg.gated else 1), width),
        "attn_k.weight": (keys, width),
        "attn_v.weight": (keys, width),
        "attn_output.weight": (width, queries),
        **dict.fromkeys(norms, (cfg.key_length,)),
    }


def init_state(cfg: config.Attention, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> State:
    """An empty cache for `slots` tokens a sequence."""
    shape = (batch, slots, cfg.head_count_kv, cfg.key_length)
    return State(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def mix(w: Weights, x: Array, state: State, span: Span, *, cfg: config.Attention) -> tuple[Array, State]:
    """x f32 (B, T, D), normed -> f32 (B, T, D) and the cache with this call's keys and values in it."""
    return layers.run("attention", _mix_at_once, _mix_by_steps, w, x, state, span, cfg=cfg)


def _mix_at_once(
    w: Weights, x: Array, state: State, span: Span, cfg: config.Attention
) -> tuple[Array, State]:
    """In three calls: the projections of x, all that follows them, and the last projection."""
    projected = linear_many(x, w.attn_q, w.attn_k, w.attn_v)
    norms = (w.attn_q_norm, w.attn_k_norm) if cfg.head_norm else (jnp.zeros(0),) * 2
    out, k, v = implementations.call(
        "attention",
        *(*projected, *norms, _angles(span.positions, cfg.rope), span.start, span.count, state.k, state.v),
        gated=cfg.gated,
        adjacent=cfg.rope.kind == "norm",
        magnitude=_magnitude(cfg.rope.scaling),
        eps=cfg.layer_norm_rms_epsilon,
    )
    return linear(out, w.attn_output), State(k, v)


def _mix_by_steps(
    w: Weights, x: Array, state: State, span: Span, cfg: config.Attention
) -> tuple[Array, State]:
    q, k, v = linear_many(x, w.attn_q, w.attn_k, w.attn_v)
    q, gate = _queries(w, q, cfg)
    angle = _angles(span.positions, cfg.rope)
    turn = {"adjacent": cfg.rope.kind == "norm", "magnitude": _magnitude(cfg.rope.scaling)}
    q = tap("Qcur", rope.rotate(q, angle, **turn))

    v = tap("Vcur", _heads(tap("Vcur", v), cfg.head_count_kv))
    k = _head_norm(
        _heads(tap("Kcur", k), cfg.head_count_kv), w.attn_k_norm, cfg.layer_norm_rms_epsilon, "Kcur_normed"
    )
    k = tap("Kcur", rope.rotate(k, angle, **turn))
    state = _store(state, k, v, span)

    out = layers.run("attend", _attend_at_once, _attend_by_steps, q, state.k, state.v, span.slots, cfg=cfg)
    out = tap("attn_pregate", out.reshape(*x.shape[:-1], -1))
    if gate is not None:
        gate = tap("gate_reshaped", gate.reshape(out.shape))
        out = tap("attn_gated", out * tap("gate_sigmoid", jax.nn.sigmoid(gate)))
    return tap("attn_output", linear(out, w.attn_output)), state


def _attend_at_once(q: Array, k: Array, v: Array, slots: Array, cfg: config.Attention) -> Array:
    return implementations.call("attend", q, k, v, slots, scale=1 / math.sqrt(cfg.key_length))


def _attend_by_steps(q: Array, k: Array, v: Array, slots: Array, cfg: config.Attention) -> Array:
    products = tap("kq", ops.scores(q, k))
    probabilities = tap("kq_soft_max", ops.softmax(products, slots, 1 / math.sqrt(cfg.key_length)))
    return tap("kqv", ops.mix(probabilities, v))


def _queries(w: Weights, full: Array, cfg: config.Attention) -> tuple[Array, Array | None]:
    """Normed queries (B, T, N, H), and the output gate if there is one: the file interleaves them by head."""
    q, *gate = jnp.split(_heads(tap("Qcur_full", full), cfg.head_count), 2 if cfg.gated else 1, axis=-1)
    q = _head_norm(tap("Qcur_reshaped", q), w.attn_q_norm, cfg.layer_norm_rms_epsilon, "Qcur_normed")
    return q, gate[0] if gate else None


def _heads(x: Array, heads: int) -> Array:
    """(B, T, heads H) -> (B, T, heads, H)."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _head_norm(x: Array, weight: Array | None, eps: float, name: str) -> Array:
    """Heads (..., H) normed, if they have a norm."""
    return x if weight is None else tap(name, tap("norm", norm.rms(x, eps)) * weight)


def _angles(positions: Array, cfg: config.Rope) -> Array:
    """f32 (B, T, M): what each pair of dims is turned by."""
    frequency = rope.frequencies(cfg.dimension_count, cfg.freq_base, cfg.freq_factors)
    scaling = cfg.scaling
    if scaling.type == "yarn":
        frequency = rope.yarn(
            frequency,
            scaling.factor,
            base=cfg.freq_base,
            context_length=scaling.original_context_length,
            beta_fast=scaling.yarn_beta_fast,
            beta_slow=scaling.yarn_beta_slow,
        )
    else:
        frequency = frequency / scaling.factor
    component = rope.components(cfg.kind, cfg.dimension_sections, len(frequency))
    return rope.angles(positions, frequency, component)


def _magnitude(cfg: config.RopeScaling) -> float:
    """What rotated dims are multiplied by."""
    return cfg.attn_factor * (rope.yarn_magnitude(cfg.factor) if cfg.type == "yarn" else 1.0)


def _store(state: State, k: Array, v: Array, span: Span) -> State:
    """Write k and v into their slots; padding is sent to a slot that does not exist, and dropped."""
    slots = jnp.where(span.real, span.slots, state.k.shape[1])
    sequence = jnp.arange(k.shape[0])[:, None]

    def write(cache: Array, new: Array) -> Array:
        return cache.at[sequence, slots].set(new.astype(cache.dtype), mode="drop")

    return State(write(state.k, k), write(state.v, v))
