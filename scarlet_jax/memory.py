"""How much of a device's memory a model takes, known from a file's header before any of it is read.

Weights and state are counted by their shapes as they will be held. What computing takes beside them is asked of
the compiler, on shapes alone: of the very programs that a prompt and a token run here. For a GPU that is not here
they are those of the portable code. Devices round sizes up and keep a little for themselves; that is not in these
figures, nor is what the CPU kernels hold on their own, a few megabytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from scarlet_jax import config, forward
from scarlet_jax.batch import PIECE, SLOTS, bucket
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
    weights: forward.Weights,
    cfg: config.Config,
    *,
    batch: int,
    context: int,
    kv_dtype: Any,
    planes: bool,
    implementation: str = "auto",
) -> Need:
    """What `batch` sequences of `context` tokens take; `planes`: with packed weights as a GPU holds them."""
    if planes and gpu.unavailable():
        implementation = "portable"
    slots = bucket(context)
    state, smaller = (
        jax.eval_shape(lambda n=n: forward.init_state(cfg, batch, n, kv_dtype)) for n in (slots, slots // 2)
    )
    held = jax.eval_shape(lambda w: implementations.prepared(w, implementation), weights)
    longest = min(PIECE, 1 << (context - 1).bit_length())
    workspaces = [_bytes(smaller)] if slots > SLOTS else []  # a cache that grows is there twice
    workspaces += [_workspace(held, cfg, tokens, state, implementation) for tokens in {longest, 1}]
    return Need(weight_bytes(weights, planes=planes), _bytes(state), max(workspaces))


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


def weight_bytes(weights: forward.Weights, *, planes: bool) -> int:
    """Bytes of weights as a device holds them."""
    packed = lambda w: isinstance(w, QTensor)  # noqa: E731
    once = list(
        {id(w): w for w in jax.tree.leaves(weights, is_leaf=packed)}.values()
    )  # what is tied is held once
    with gpu.mode("elsewhere") if planes else contextlib.nullcontext():
        form = "gpu" if planes else "portable"
        return _bytes(jax.eval_shape(lambda w: implementations.prepared(w, form), once))


def _workspace(
    weights: forward.Weights, cfg: config.Config, tokens: int, state: forward.State, implementation: str
) -> int:
    """What a stretch of `tokens` of each sequence takes beside weights and state: in one program, or in several."""
    ids = jax.ShapeDtypeStruct((len(state.length), tokens), jnp.int32)
    last = jax.ShapeDtypeStruct((len(ids), cfg.embedding_length), jnp.float32)
    if forward.has_layer_kernels(implementation):
        run = forward.last_logits_in_place
        return _beside(
            run, weights, ids, state.length, state, last, None, cfg, implementation, of=(ids, last)
        )
    return max(
        _blocks(weights, cfg, tokens, state, implementation),
        _beside(
            forward.head, weights.output_norm, weights.output, last, 1e-6, False, implementation, of=last
        ),
    )


def _blocks(
    weights: forward.Weights, cfg: config.Config, tokens: int, state: forward.State, implementation: str
) -> int:
    """The most that a block's program takes: one of each kind is asked."""
    row = state.length
    x = jax.ShapeDtypeStruct((len(row), tokens, cfg.embedding_length), jnp.float32)
    span = jax.eval_shape(lambda start, count: Span.text(start, count, tokens), row, row)
    kinds = {}
    for part in zip(weights.blocks, cfg.blocks, state.blocks, strict=True):
        leaves, structure = jax.tree.flatten(part[0])
        kinds[part[1], structure, *((leaf.shape, leaf.dtype) for leaf in leaves)] = part
    run = forward.run_block_in_place
    return max(
        _beside(run, w, x, held, span, block, False, implementation, of=(x, span))
        for w, block, held in kinds.values()
    )


def _beside(program: Any, *arguments: Any, of: Any) -> int:
    """Bytes that a jitted function takes: those arguments, what it gives that is no argument's, what it works in."""
    plan = program.lower(*arguments).compile().memory_analysis()
    assert plan is not None
    given = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return _bytes(of) + given + plan.temp_size_in_bytes


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
