"""qwen3moe: qwen3's attention, then a mixture of experts without a shared one (spec section 1)."""

from __future__ import annotations

from scarlet_jax.config import Block, Metadata
from scarlet_jax.configs import common, qwen35moe


def block(meta: Metadata, i: int) -> Block:
    """Layer i, from the keys under `qwen3moe.`."""
    mixer = common.attention(meta, "qwen3moe", i, "neox", head_norm=True)
    experts = qwen35moe.experts(meta, "qwen3moe", shared=False)
    return Block(mixer, experts, mixer.layer_norm_rms_epsilon)


ARCH = common.arch("qwen3moe", block)
