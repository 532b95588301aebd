"""qwen35: dense Qwen3.5, delta net layers with a gated attention layer every few (spec sections 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from scarlet_jax.config import Arch, Attention, Block, Config, DeltaNet, Dense, Metadata, MoE, Rope
from scarlet_jax.configs import common


def config(meta: Metadata) -> Config:
    """Read the metadata keys under `qwen35.`."""
    inner_widths = meta.integers("qwen35.feed_forward_length", meta.integer("qwen35.block_count"))
    return hybrid(meta, "qwen35", lambda i: Dense(inner_widths[i]))


def hybrid(
    meta: Metadata,
    arch: str,
    ffn: Callable[[int], Dense | MoE],
    *,
    rope: Callable[[int], Rope] | None = None,
    head_mapping: Literal["tile", "repeat"] = "tile",
    taps: tuple[tuple[str, str], ...] = (),
) -> Config:
    """A trunk of delta net and attention layers by the keys under `arch`, with the `ffn` of each block.

    `rope` gives the rotation of heads of so many dims: by default over sections, as Qwen3.5 has it.
    """
    rope = rope or (lambda head_dim: _imrope(meta, arch, head_dim))
    eps = meta.number(f"{arch}.attention.layer_norm_rms_epsilon")
    blocks = meta.integer(f"{arch}.block_count")
    trunk = blocks - meta.integer(f"{arch}.nextn_predict_layers", 0)  # block_count includes prediction blocks
    meta.require(0 < trunk <= blocks, f"{arch}.nextn_predict_layers", f"fewer than the {blocks} blocks")

    heads = meta.integers(f"{arch}.attention.head_count", blocks)
    kv_heads = heads
    if f"{arch}.attention.head_count_kv" in meta:
        kv_heads = meta.integers(f"{arch}.attention.head_count_kv", blocks)
    recurrent = _recurrent_layers(meta, arch, blocks, trunk)

    def block(i: int) -> Block:
        if recurrent[i]:
            return Block(_delta_net(meta, arch, eps, head_mapping), ffn(i), eps)
        return Block(_attention(meta, arch, eps, heads[i], kv_heads[i], rope), ffn(i), eps)

    every = tuple(block(i) for i in range(blocks))
    return Config(
        architecture=arch,
        name=meta.string("general.name", ""),
        context_length=meta.integer(f"{arch}.context_length"),
        embedding_length=meta.integer(f"{arch}.embedding_length"),
        vocabulary_size=len(meta.strings("tokenizer.ggml.tokens")),
        layer_norm_rms_epsilon=eps,
        blocks=every[:trunk],
        nextn=every[trunk:],
        taps=taps,
    )


def _recurrent_layers(meta: Metadata, arch: str, blocks: int, trunk: int) -> tuple[bool, ...]:
    """Which blocks are delta net: listed one by one in newer files, else all but every interval-th."""
    if f"{arch}.attention.recurrent_layers" in meta:
        listed = meta.integers(f"{arch}.attention.recurrent_layers", blocks)
        return tuple(bool(flag) and i < trunk for i, flag in enumerate(listed))
    interval = meta.integer(f"{arch}.full_attention_interval", 4)
    meta.require(interval > 0, f"{arch}.full_attention_interval", "1 or more")
    return tuple(i < trunk and (i + 1) % interval != 0 for i in range(blocks))


def _attention(
    meta: Metadata, arch: str, eps: float, heads: int, kv_heads: int, rope: Callable[[int], Rope]
) -> Attention:
    # No default for the head dim: the format's, width / heads, is wrong for every model of this family.
    head_dim = meta.integer(f"{arch}.attention.key_length")
    meta.require(
        meta.integer(f"{arch}.attention.value_length", head_dim) == head_dim,
        f"{arch}.attention.value_length",
        f"key_length, {head_dim}",
    )
    meta.require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"{arch}.attention.head_count",
        f"a multiple of {kv_heads} kv heads",
    )
    return Attention(heads, kv_heads, head_dim, rope(head_dim), eps, gated=True)


def _imrope(meta: Metadata, arch: str, head_dim: int) -> Rope:
    rotary = meta.integer(f"{arch}.rope.dimension_count", head_dim)
    sections = meta.integers(f"{arch}.rope.dimension_sections", 4)
    meta.require(
        0 < rotary <= head_dim and rotary % 2 == 0,
        f"{arch}.rope.dimension_count",
        f"even and at most {head_dim}",
    )
    meta.require(
        min(sections) >= 0 and sum(sections) > 0, f"{arch}.rope.dimension_sections", "counts of pairs"
    )
    base = meta.number(f"{arch}.rope.freq_base", 10000.0)
    return Rope("imrope", rotary, base, sections, scaling=common.rope_scaling(meta, arch))


def _delta_net(meta: Metadata, arch: str, eps: float, head_mapping: Literal["tile", "repeat"]) -> DeltaNet:
    cfg = DeltaNet(
        conv_kernel=meta.integer(f"{arch}.ssm.conv_kernel"),
        state_size=meta.integer(f"{arch}.ssm.state_size"),
        group_count=meta.integer(f"{arch}.ssm.group_count"),
        time_step_rank=meta.integer(f"{arch}.ssm.time_step_rank"),
        head_mapping=head_mapping,
        layer_norm_rms_epsilon=eps,
    )
    meta.require(cfg.conv_kernel > 0, f"{arch}.ssm.conv_kernel", "1 or more")
    meta.require(cfg.state_size > 0, f"{arch}.ssm.state_size", "1 or more")
    meta.require(
        cfg.group_count > 0 and cfg.time_step_rank % cfg.group_count == 0,
        f"{arch}.ssm.time_step_rank",
        f"a multiple of ssm.group_count, {cfg.group_count}",
    )
    inner = meta.integer(f"{arch}.ssm.inner_size")
    meta.require(
        inner == cfg.value_dim, f"{arch}.ssm.inner_size", f"time_step_rank x state_size, {cfg.value_dim}"
    )
    return cfg


ARCH = Arch(
    name="qwen35",
    config=config,
    # Activation-precision hints for kernels that compute in FP4: ours do not.
    ignored=(r".*\.input_scale",),
)
