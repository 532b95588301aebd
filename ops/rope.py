"""Rotary position embedding, with angles that stay exact at any position.

Su et al., 2021 (RoFormer); the multi-component variants as in spec section 4, "Rope".
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

TIME, HEIGHT, WIDTH, EXTRA = range(4)


def frequencies(dimension_count: int, base: float, factors: tuple[float, ...] = ()) -> np.ndarray:
    """float64 (M,): radians a position turns each pair of dims by, base^(-2i / dimension_count) / factor."""
    exponents = -np.arange(0, dimension_count, 2, dtype=np.float64) / dimension_count
    return base**exponents / np.array(factors or 1.0)


def yarn(
    frequency: np.ndarray,
    factor: float,
    *,
    base: float,
    context_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> np.ndarray:
    """`frequency` (M,), stretched for a context `factor` times the `context_length` of the training.

    Pairs that turn more than `beta_fast` times in that context keep their frequency, those that turn less than
    `beta_slow` times have it divided by `factor`, and those between have a mean of both. Peng et al., 2023
    (YaRN); the ends of the ramp are whole pairs, as in its authors' code, llama.cpp and transformers.
    """
    pairs = len(frequency)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(context_length / (times * 2 * math.pi)) / math.log(base)

    first = max(0, math.floor(pair_that_turns(beta_fast)))
    last = min(2 * pairs - 1, math.ceil(pair_that_turns(beta_slow)))
    stretched = np.clip((np.arange(pairs) - first) / max(last - first, 1e-3), 0, 1)
    return frequency * (1 - stretched + stretched / factor)


def yarn_magnitude(factor: float) -> float:
    """What YaRN multiplies rotated queries and keys by, so that attention over more tokens stays as sharp."""
    return 1 + 0.1 * math.log(max(1.0, factor))


def components(kind: str, sections: tuple[int, ...], pairs: int) -> np.ndarray:
    """int (M,): which component of a position (time, height, width, extra) turns each pair.

    `sections` counts the pairs of each component; beyond their sum they start over.
    """
    if kind in ("norm", "neox"):
        return np.full(pairs, TIME)
    index = np.arange(pairs) % sum(sections)
    if kind == "mrope":
        return np.searchsorted(np.cumsum(sections), index, side="right")
    interleaved = np.full(pairs, EXTRA)
    for component in (TIME, HEIGHT, WIDTH):
        interleaved[(index % 3 == component) & (index < 3 * sections[component])] = component
    return interleaved


def angles(positions: jax.Array, frequency: np.ndarray, component: np.ndarray) -> jax.Array:
    """The angle of each pair at each token, f32 (B, T, M) in [-pi, pi), from int32 positions (4, B, T).

    position * frequency would lose the angle to rounding: at position 262,143 an f32 product is off by
    1e-2 rad. Whole turns do not matter, so the product is taken modulo one turn in integers, where wrapping
    is exact: the frequency as a fraction of a turn in 48 bits, for an error of 2^-48 turns a position (6e-9
    rad at position 262,143), and 2e-7 rad of rounding.
    """
    turns = np.modf(frequency / (2 * np.pi))[0]
    high = np.floor(turns * 2.0**32)
    low = np.floor((turns * 2.0**32 - high) * 2.0**16)
    position = positions[component].astype(jnp.uint32)  # (M, B, T)
    high, low = (jnp.asarray(part.astype(np.uint32))[:, None, None] for part in (high, low))
    carried = (position >> 16) * low + (((position & 0xFFFF) * low) >> 16)  # position * low / 2^16
    turn = position * high + carried
    signed = jax.lax.bitcast_convert_type(turn, jnp.int32).astype(jnp.float32)
    return jnp.moveaxis(signed * np.float32(2 * np.pi / 2.0**32), 0, -1)


def rotate(x: jax.Array, angle: jax.Array, *, adjacent: bool, magnitude: float = 1.0) -> jax.Array:
    """Turn the first 2M dims of every head of x (B, T, N, H) by angle (B, T, M); the rest pass through.

    `adjacent` pairs dims 2i and 2i+1 (kind norm); otherwise dims i and i+M (neox and the mropes). What is
    turned is also multiplied by `magnitude`.
    """
    pairs = angle.shape[-1]
    chex.assert_equal_shape_prefix((x, angle), 2)
    rotary, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    axis = -1 if adjacent else -2
    split = (pairs, 2) if adjacent else (2, pairs)
    a, b = jnp.moveaxis(rotary.reshape(*x.shape[:-1], *split), axis, 0)
    cos, sin = (magnitude * f(angle)[:, :, None] for f in (jnp.cos, jnp.sin))
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=axis)
    return jnp.concatenate([turned.reshape(rotary.shape), rest], axis=-1)
