"""qwen3: attention in every layer, with a norm on each query and key head (spec section 1)."""

from __future__ import annotations

from scarlet_jax.config import Block, Metadata
from scarlet_jax.configs import common


def block(meta: Metadata, i: int) -> Block:
    """Layer i, from the keys under `qwen3.`."""
    return common.decoder_block(meta, "qwen3", i, "neox", head_norm=True)


ARCH = common.arch("qwen3", block)
