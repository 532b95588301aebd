"""qwen35moe: Qwen3.5 with a mixture of experts, and a shared one, in every block (spec sections 1 and 2)."""

from __future__ import annotations

from scarlet_jax.config import Arch, Config, Metadata, MoE
from scarlet_jax.configs import qwen35


def config(meta: Metadata) -> Config:
    """Read the metadata keys under `qwen35moe.`."""
    ffn = experts(meta, "qwen35moe", shared=True)
    return qwen35.hybrid(meta, "qwen35moe", lambda _: ffn)


def experts(meta: Metadata, arch: str, *, shared: bool) -> MoE:
    """The mixture in every block; widths that are left out follow from a dense network's (spec section 1)."""
    count, used = (meta.integer(f"{arch}.{key}") for key in ("expert_count", "expert_used_count"))
    meta.require(count > 0, f"{arch}.expert_count", "1 or more")
    meta.require(0 < used <= count, f"{arch}.expert_used_count", f"1 to expert_count, {count}")
    dense = meta.integer(f"{arch}.feed_forward_length", 0)
    inner = meta.integer(f"{arch}.expert_feed_forward_length", dense // used)
    meta.require(inner > 0, f"{arch}.expert_feed_forward_length", "1 or more")
    inner_shared = meta.integer(f"{arch}.expert_shared_feed_forward_length", dense) if shared else 0
    meta.require(inner_shared > 0 or not shared, f"{arch}.expert_shared_feed_forward_length", "1 or more")
    return MoE(count, used, inner, inner_shared)


ARCH = Arch(name="qwen35moe", config=config, ignored=qwen35.ARCH.ignored)
