"""From logits to the next token: temperature, top-k, top-p and min-p, on the device.

The filters mean what they mean in llama.cpp, in the order of its default chain: top-k on the logits, top-p
on the softmax of what is left, min-p against the most likely token, and the temperature last, so that it
reshapes the choice among the survivors and not who survives. Of equal logits the lower id comes first.

A vocabulary of 250,000 is dear to sort on a CPU (55 ms, against 1 ms for its 1,024 largest), and rarely
needs to be: `sample` looks at the largest few alone wherever nothing beyond them can survive.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.types import Array

CANDIDATES = 1024
INVALID = -1  # in place of an id: the logits were NaN, infinite, or all minus infinity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose; the defaults always choose the most likely token.

    `temperature` 0 is greedy; `top_k` 0 or less, `top_p` 1 and `min_p` 0 switch their filters off. A pytree
    of four numbers: under jit, other values do not recompile.
    """

    temperature: float | Array = 0.0
    top_k: int | Array = 0
    top_p: float | Array = 1.0
    min_p: float | Array = 0.0

    def checked(self) -> Sampling:
        """Itself, or BadInput naming the first number that is out of range."""
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k < 2**31, "a number of tokens, or 0 for all"),
            ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not fits:
                raise BadInput(f"{name} is {getattr(self, name)}, expected {expected}")
        return self


@functools.partial(jax.jit, static_argnames="candidates")
def sample(logits: Array, key: Array, params: Sampling, *, candidates: int = CANDIDATES) -> Array:
    """One token a row: logits f32 (B, V), a PRNG key -> int32 (B,), `INVALID` where there is no distribution.

    `candidates`: how many of the largest logits are tried before all are sorted. It decides the cost, never
    the distribution; which draw a key stands for may depend on it.
    """
    best = logits.max(axis=-1, keepdims=True)  # finite if, and only if, there is a distribution
    unfiltered = (params.top_k <= 0) & (params.top_p >= 1) & (params.min_p <= 0)
    ids = jax.lax.switch(
        jnp.select([params.temperature <= 0, unfiltered], [0, 1], 2),
        (
            lambda: _first(logits, best),
            lambda: jax.random.categorical(key, logits / params.temperature).astype(jnp.int32),
            lambda: _filtered(logits, key, params, candidates),
        ),
    )
    return jnp.where(jnp.isfinite(best[:, 0]), ids, INVALID)


def most_likely(logits: Array) -> np.ndarray:
    """What `sample` gives at temperature 0, f32 (..., V) -> int32 (...), by the host.

    On a CPU numpy is far ahead of an XLA program here, and there is none to compile.
    """
    values = np.asarray(logits)
    ids = values.argmax(axis=-1)  # of what is not a number, if anything is
    best = np.take_along_axis(values, ids[..., None], axis=-1)[..., 0]
    return np.where(np.isfinite(best), ids, INVALID).astype(np.int32)


def _first(logits: Array, value: Array) -> Array:
    """Where each row has its value (B, 1) first -> (B,): on a CPU two reductions are eight times as fast as argmax."""
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(logits == value, places, logits.shape[-1]).min(axis=-1)


def _filtered(logits: Array, key: Array, params: Sampling, candidates: int) -> Array:
    """Sort as many of the logits (B, V) as it takes, filter them and draw -> ids (B,)."""
    vocabulary = logits.shape[-1]
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # XLA has a quick way to the largest few, which it forgets when it sees what they are used for. (A barrier for
    # each: in a program for several devices one for both crashes the compiler of jaxlib 0.10.2.)
    largest, ids = map(jax.lax.optimization_barrier, jax.lax.top_k(logits, min(candidates, vocabulary)))
    return jax.lax.cond(
        _holds_all_survivors(largest, total, params, vocabulary),
        lambda: _draw(largest, ids, total, key, params),
        lambda: _draw(*jax.lax.top_k(logits, vocabulary), total, key, params),
    )


def _draw(sorted_logits: Array, ids: Array, total: Array, key: Array, params: Sampling) -> Array:
    """Filter and draw: the largest logits (B, C), descending, and their ids -> ids (B,).

    `total` (B, 1) is the logsumexp of all V logits, of which these may be a part.
    """
    kept = _survivors(sorted_logits, total, params)
    place = jax.random.categorical(key, jnp.where(kept, sorted_logits / params.temperature, -jnp.inf))
    return jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0]


def _survivors(sorted_logits: Array, total: Array, params: Sampling) -> Array:
    """bool (B, C): which of the largest logits, descending, pass all filters. The first always does."""
    rank = jnp.arange(sorted_logits.shape[-1])
    top_k = (params.top_k <= 0) | (rank < params.top_k)
    of_top_k = jax.nn.logsumexp(sorted_logits, axis=-1, where=top_k, keepdims=True)
    probability = jnp.exp(sorted_logits - jnp.where(params.top_k <= 0, total, of_top_k))
    before = jnp.cumsum(probability, axis=-1) - probability
    top_p = (params.top_p >= 1) | (before < params.top_p)  # up to and with the token that reaches top_p
    min_p = sorted_logits >= sorted_logits[:, :1] + jnp.log(params.min_p)
    return (top_k & top_p & min_p) | (rank == 0)


def _holds_all_survivors(sorted_logits: Array, total: Array, params: Sampling, vocabulary: int) -> Array:
    """bool (): whether no token outside the largest C could pass the filters, in any row."""
    count = sorted_logits.shape[-1]
    by_top_k = (params.top_k > 0) & (params.top_k <= count)
    by_top_p = (params.top_p < 1) & (jnp.exp(sorted_logits - total).sum(axis=-1) >= params.top_p)
    by_min_p = sorted_logits[:, -1] < sorted_logits[:, 0] + jnp.log(params.min_p)
    # A larger top-k needs its own sum of probabilities, which these cannot give.
    within = by_top_k | (params.top_k <= 0) & (by_top_p | by_min_p)
    return (count == vocabulary) | jnp.all(within)
