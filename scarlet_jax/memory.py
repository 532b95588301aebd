"""How much of a device's memory a model takes, known from a file's header before any of it is read.

Weights and state are counted by their shapes as they will be held. What a prompt's activations take is asked of
the compiler: of one block of each kind, as the engine runs them one after another, on shapes alone and in the
portable code, whatever will run in the end. Devices round sizes up and keep a
little for themselves; that is not in these figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from scarlet_jax import config, model
from scarlet_jax.errors import BadInput
from scarlet_jax.ops import gpu, implementations
from scarlet_jax.ops.qtensor import QTensor
from scarlet_jax.span import Span


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes: weights, the state of all sequences, and what computing takes beside them."""

    weights: int
    state: int
    workspace: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.state + self.workspace


def need(
    weights: model.Weights, cfg: config.Config, *, batch: int, context: int, kv_dtype: Any, planes: bool
) -> Need:
    """What `batch` sequences of `context` tokens take; `planes`: with packed weights as a GPU holds them."""
    state = jax.eval_shape(lambda: model.init_state(cfg, batch, model.bucket(context), kv_dtype))
    return Need(
        weight_bytes(weights, planes=planes), _bytes(state), _workspace(weights, cfg, batch, context, state)
    )


def check(needed: Need, limit: int, what: str) -> None:
    """BadInput with the numbers if `limit` bytes of `what` are not enough."""
    if needed.total > limit:
        raise BadInput(
            f"{what} is {limit / 1e9:.2f} GB: {needed.total / 1e9:.2f} GB are needed, {needed.weights / 1e9:.2f} "
            f"for weights, {needed.state / 1e9:.2f} for the state and {needed.workspace / 1e9:.2f} to compute in"
        )


def limit_of(device: Any) -> int | None:
    """Bytes that an accelerator lets programs have; None where it does not say, as on a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None


def weight_bytes(weights: model.Weights, *, planes: bool) -> int:
    """Bytes of weights as a device holds them."""
    packed = lambda w: isinstance(w, QTensor)  # noqa: E731
    once = list(
        {id(w): w for w in jax.tree.leaves(weights, is_leaf=packed)}.values()
    )  # what is tied is held once
    with gpu.mode("elsewhere") if planes else contextlib.nullcontext():
        form = "gpu" if planes else "portable"
        return _bytes(jax.eval_shape(lambda w: implementations.prepared(w, form), once))


def _workspace(weights: model.Weights, cfg: config.Config, batch: int, context: int, state: Any) -> int:
    """The most that a block's program takes beside its arguments; the stream before and after it, and logits."""
    tokens = min(model.PIECE, 1 << (context - 1).bit_length())
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    x = jax.ShapeDtypeStruct((batch, tokens, cfg.embedding_length), jnp.float32)
    span = jax.eval_shape(lambda start, count: Span.text(start, count, tokens), row, row)
    kinds = {}
    for part in zip(jax.eval_shape(lambda w: w, weights.blocks), cfg.blocks, state.blocks, strict=True):
        leaves, structure = jax.tree.flatten(part[0])
        kinds[part[1], structure, *((leaf.shape, leaf.dtype) for leaf in leaves)] = part
    temporary = 0
    for w, block, block_state in kinds.values():
        program = model.run_block_in_place.lower(w, x, block_state, span, block, False, "portable").compile()
        plan = program.memory_analysis()
        assert plan is not None
        temporary = max(temporary, plan.temp_size_in_bytes)
    return temporary + 2 * _bytes(x) + 4 * batch * cfg.vocabulary_size


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
