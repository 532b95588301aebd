"""The prediction block (MTP, spec section 6), which drafts a token from one token and the trunk's state before it.

Trained behind a finished trunk, whose parameters and so whose text stay what they are.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from scarlet_jax import forward
from scarlet_jax.config import Config
from scarlet_jax.ops import implementations, norm
from scarlet_jax.ops.matmul import linear
from scarlet_jax.span import Span
from scarlet_jax.tools.train import loop, network
from scarlet_jax.types import Array


def recipe(trunk: loop.Recipe, steps: int) -> loop.Recipe:
    """How a block behind a trunk of that recipe is trained: on text of the later mix, its rates soon falling."""
    shape = dataclasses.replace(trunk.shape, nextn_predict_layers=1)
    return dataclasses.replace(trunk, shape=shape, steps=steps, turn=0, warmup=10, decay=0.5)


def logits(parameters: network.Parameters, tokens: Array, cfg: Config) -> Array:
    """int32 (B, T) -> f32 (B, T, V): row p foresees token p + 1 from token p and the trunk's row p - 1."""
    w = network.weights(parameters, cfg)
    eps = cfg.layer_norm_rms_epsilon
    with implementations.use(network.PRODUCTS):
        known = norm.rms(network.hidden(w, tokens, cfg), eps) * w.output_norm
        before = jnp.pad(known, ((0, 0), (1, 0), (0, 0)))[:, :-1]  # zeros before the first
        drafted = _block(parameters, tokens, before, cfg)
        last = parameters[f"blk.{len(cfg.blocks)}.nextn.shared_head_norm.weight"]
        return linear(norm.rms(drafted, eps) * last, w.output)


def _block(parameters: network.Parameters, tokens: Array, before: Array, cfg: Config) -> Array:
    """The block's output f32 (B, T, D), before its last norm."""
    index, eps = len(cfg.blocks), cfg.layer_norm_rms_epsilon
    enorm, hnorm, joining = (
        parameters[f"blk.{index}.nextn.{stem}.weight"] for stem in ("enorm", "hnorm", "eh_proj")
    )
    embedded = parameters["token_embd.weight"][tokens]
    pair = [norm.rms(embedded, eps) * enorm, norm.rms(before, eps) * hnorm]
    x = linear(jnp.concatenate(pair, axis=-1), joining)
    batch, length = tokens.shape
    block = cfg.nextn[0]
    state = forward.MIXERS[type(block.mixer)].init_state(block.mixer, batch, length, jnp.float32)
    span = Span.text(jnp.zeros(batch, jnp.int32), jnp.full(batch, length, jnp.int32), length)
    return forward.block(network.block_weights(parameters, index, cfg), x, state, span, cfg=block)[0]


def loss(parameters: network.Parameters, batch: network.Batch, cfg: Config) -> Array:
    """Mean weighted cross-entropy of the next token as the block foresees it, in nats."""
    return network.cross_entropy(logits(parameters, batch.tokens[:, :-1], cfg), batch)
