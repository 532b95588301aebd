"""The token mixers between their projections, each in one call of the compiled kernels."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np


def delta_net(
    qkv: jax.Array,
    z: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    conv1d: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    norm: jax.Array,
    history: jax.Array,
    memory: jax.Array,
    count: jax.Array,
    *,
    key_head: np.ndarray,
    key_heads: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Convolution, SiLU, unit queries and keys, gates, the delta rule, gated norm.

    All f32: products of the input qkv (B, T, C), z (B, T, Hv Dv), alpha and beta (B, T, Hv); weights conv1d
    (C, W), dt and a (Hv,), norm (Dv,); state history (B, W-1, C) and memory (B, Hv, Dv, Dk). `count` int32
    (B,): how many of the T tokens are real; `key_head` int (Hv,): the key head that each value head reads.
    Returns f32 (B, T, Hv Dv), zero for padding, and the state after the last real token, in place where the
    caller gives the old one up.
    """
    out = jax.ShapeDtypeStruct(z.shape, jnp.float32)
    state = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (history, memory))
    run = _call("scarlet_delta_net", (out, *state), aliases={8: 1, 9: 2})
    inputs = (qkv, z, alpha, beta, conv1d, dt, a, norm, history, memory, count)
    return run(
        *inputs, key_head=key_head.astype(np.int32), key_heads=np.int64(key_heads), eps=np.float32(eps)
    )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    angle: jax.Array,
    start: jax.Array,
    count: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    gated: bool,
    adjacent: bool,
    eps: float,
    magnitude: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Head norms, rotation, the new keys and values into the cache, causal softmax attention, output gate.

    q f32 (B, T, N H), or `gated`, a head's H of query before its H of gate, (B, T, N 2H); k and v (B, T, K H);
    q_norm and k_norm (H,), or (0,) for heads without a norm; angle (B, T, M) for the first 2M dims, turned as by
    `rope.rotate`; int32 (B,) `start`, the slot of the first token, and `count`, how many of the T are real;
    caches (B, S, K, H) of f32, f16 or bf16, with room for them all. Returns f32 (B, T, N H), zero for padding,
    and the caches, in place where the caller gives the old ones up.
    """
    chex.assert_equal_shape((k_cache, v_cache))
    dim = k_cache.shape[-1]
    out = jax.ShapeDtypeStruct((*q.shape[:-1], q.shape[-1] // (2 if gated else 1)), jnp.float32)
    caches = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cache, v_cache))
    run = _call("scarlet_attention", (out, *caches), aliases={8: 1, 9: 2})
    options = {
        "gated": gated,
        "adjacent": adjacent,
        "eps": np.float32(eps),
        "magnitude": np.float32(magnitude),
    }
    inputs = (q, k, v, q_norm, k_norm, angle, start, count, k_cache, v_cache)
    return run(*inputs, scale=np.float32(1 / math.sqrt(dim)), **options)


def _call(name: str, results, aliases: dict[int, int]):
    from scarlet_jax.ops import cpu

    cpu._library()
    return jax.ffi.ffi_call(name, results, input_output_aliases=aliases)
