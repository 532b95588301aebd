"""qwen35: dense Qwen3.5, delta net layers with a gated attention layer every few (spec sections 1 and 2)."""

from __future__ import annotations

from scarlet_jax.config import Arch, Attention, Block, Config, DeltaNet, Dense, Metadata, Rope


def config(meta: Metadata) -> Config:
    """Read the metadata keys under `qwen35.`."""
    eps = meta.number("qwen35.attention.layer_norm_rms_epsilon")
    blocks = meta.integer("qwen35.block_count")
    trunk = blocks - meta.integer("qwen35.nextn_predict_layers", 0)  # block_count includes prediction blocks
    meta.require(0 < trunk <= blocks, "qwen35.nextn_predict_layers", f"fewer than the {blocks} blocks")

    heads = meta.integers("qwen35.attention.head_count", blocks)
    kv_heads = heads
    if "qwen35.attention.head_count_kv" in meta:
        kv_heads = meta.integers("qwen35.attention.head_count_kv", blocks)
    inner_widths = meta.integers("qwen35.feed_forward_length", blocks)
    recurrent = _recurrent_layers(meta, blocks, trunk)

    def block(i: int) -> Block:
        mixer = _delta_net(meta, eps) if recurrent[i] else _attention(meta, eps, heads[i], kv_heads[i])
        return Block(mixer, Dense(inner_widths[i]), eps)

    every = tuple(block(i) for i in range(blocks))
    return Config(
        architecture="qwen35",
        name=meta.string("general.name", ""),
        context_length=meta.integer("qwen35.context_length"),
        embedding_length=meta.integer("qwen35.embedding_length"),
        vocabulary_size=len(meta.strings("tokenizer.ggml.tokens")),
        layer_norm_rms_epsilon=eps,
        blocks=every[:trunk],
        nextn=every[trunk:],
    )


def _recurrent_layers(meta: Metadata, blocks: int, trunk: int) -> tuple[bool, ...]:
    """Which blocks are delta net: listed one by one in newer files, else all but every interval-th."""
    if "qwen35.attention.recurrent_layers" in meta:
        listed = meta.integers("qwen35.attention.recurrent_layers", blocks)
        return tuple(bool(flag) and i < trunk for i, flag in enumerate(listed))
    interval = meta.integer("qwen35.full_attention_interval", 4)
    meta.require(interval > 0, "qwen35.full_attention_interval", "1 or more")
    return tuple(i < trunk and (i + 1) % interval != 0 for i in range(blocks))


def _attention(meta: Metadata, eps: float, heads: int, kv_heads: int) -> Attention:
    # No default for the head dim: the format's, width / heads, is wrong for every model of this family.
    head_dim = meta.integer("qwen35.attention.key_length")
    rotary = meta.integer("qwen35.rope.dimension_count", head_dim)
    sections = meta.integers("qwen35.rope.dimension_sections", 4)
    meta.require(
        meta.integer("qwen35.attention.value_length", head_dim) == head_dim,
        "qwen35.attention.value_length",
        f"key_length, {head_dim}",
    )
    meta.require(
        kv_heads > 0 and heads % kv_heads == 0,
        "qwen35.attention.head_count",
        f"a multiple of {kv_heads} kv heads",
    )
    meta.require(
        0 < rotary <= head_dim and rotary % 2 == 0,
        "qwen35.rope.dimension_count",
        f"even and at most {head_dim}",
    )
    meta.require(
        min(sections) >= 0 and sum(sections) > 0, "qwen35.rope.dimension_sections", "counts of pairs"
    )
    meta.require(
        meta.string("qwen35.rope.scaling.type", "none") in ("none", "linear")
        and meta.number("qwen35.rope.scaling.factor", 1.0) == 1.0,
        "qwen35.rope.scaling.type",
        "no scaling (a factor of 1)",
    )
    rope = Rope("imrope", rotary, meta.number("qwen35.rope.freq_base", 10000.0), sections)
    return Attention(heads, kv_heads, head_dim, rope, eps, gated=True)


def _delta_net(meta: Metadata, eps: float) -> DeltaNet:
    cfg = DeltaNet(
        conv_kernel=meta.integer("qwen35.ssm.conv_kernel"),
        state_size=meta.integer("qwen35.ssm.state_size"),
        group_count=meta.integer("qwen35.ssm.group_count"),
        time_step_rank=meta.integer("qwen35.ssm.time_step_rank"),
        head_mapping="tile",
        layer_norm_rms_epsilon=eps,
    )
    meta.require(cfg.conv_kernel > 0, "qwen35.ssm.conv_kernel", "1 or more")
    meta.require(cfg.state_size > 0, "qwen35.ssm.state_size", "1 or more")
    meta.require(
        cfg.group_count > 0 and cfg.time_step_rank % cfg.group_count == 0,
        "qwen35.ssm.time_step_rank",
        f"a multiple of ssm.group_count, {cfg.group_count}",
    )
    inner = meta.integer("qwen35.ssm.inner_size")
    meta.require(
        inner == cfg.value_dim, "qwen35.ssm.inner_size", f"time_step_rank x state_size, {cfg.value_dim}"
    )
    return cfg


ARCH = Arch(
    name="qwen35",
    config=config,
    # Activation-precision hints for kernels that compute in FP4: ours do not.
    ignored=(r".*\.input_scale",),
)
