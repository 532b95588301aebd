"""qwen2: attention in every layer; queries, keys and values have biases, heads have no norm (spec section 1)."""

from __future__ import annotations

from scarlet_jax.config import Block, Metadata
from scarlet_jax.configs import common


def block(meta: Metadata, i: int) -> Block:
    """Layer i, from the keys under `qwen2.`; a bias is added wherever the file has one beside a weight."""
    return common.decoder_block(meta, "qwen2", i, "neox", head_norm=False)


ARCH = common.arch("qwen2", block)
