"""What decoder architectures say in the same words: heads, widths, rotation, and the blocks' frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from scarlet_jax.config import Arch, Attention, Block, Config, Dense, Metadata, Rope, RopeScaling

# Most architectures: the file's name of the norm before the feed-forward network, and llama.cpp's of activations.
NAMES = {"post_attention_norm.weight": "ffn_norm.weight"}
TAPS = (
    *(("model.input_embed", "embd"), ("attn_pregate", "kqv_out")),
    *(("attn_residual", "ffn_inp"), ("attn_post_norm", "ffn_norm")),
)


def arch(name: str, block: Callable[[Metadata, int], Block]) -> Arch:
    """An architecture of the usual frame and names, `block` saying what its i-th layer is."""
    return Arch(name, lambda meta: config(meta, name, block), NAMES, ignored=(r".*\.input_scale",))


def config(meta: Metadata, name: str, block: Callable[[Metadata, int], Block]) -> Config:
    """The whole model, from the keys under the architecture's name."""
    blocks = meta.integer(f"{name}.block_count")
    meta.require(blocks > 0, f"{name}.block_count", "1 or more")
    _refuse_unsupported(meta, name)
    return Config(
        architecture=name,
        name=meta.string("general.name", ""),
        context_length=meta.integer(f"{name}.context_length"),
        embedding_length=meta.integer(f"{name}.embedding_length"),
        vocabulary_size=len(meta.strings("tokenizer.ggml.tokens")),
        layer_norm_rms_epsilon=meta.number(f"{name}.attention.layer_norm_rms_epsilon"),
        blocks=tuple(block(meta, i) for i in range(blocks)),
        taps=TAPS,
    )


# Keys of these architectures that ask for maths which is not written here, unless they hold a zero.
_UNSUPPORTED = {
    "attention.scale": "none: attention scales other than 1/sqrt(key_length) are not supported",
    "attention.sliding_window": "none: sliding-window attention is not supported",
    "attention.clamp_kqv": "none: clamped queries, keys and values are not supported",
    "nextn_predict_layers": "none: prediction blocks are not supported in this architecture",
}


def _refuse_unsupported(meta: Metadata, name: str) -> None:
    """What would run wrongly is refused by name."""
    for feature, expected in _UNSUPPORTED.items():
        meta.require(meta.number(f"{name}.{feature}", 0.0) == 0, f"{name}.{feature}", expected)
    causal = f"{name}.attention.causal"
    meta.require(causal not in meta or meta.integers(causal, 1)[0] == 1, causal, "true, or absent")


def attention(
    meta: Metadata, name: str, i: int, kind: Literal["norm", "neox"], *, head_norm: bool
) -> Attention:
    """The attention of block i, without an output gate: heads of width / heads unless the file says more."""
    blocks = meta.integer(f"{name}.block_count")
    heads = meta.integers(f"{name}.attention.head_count", blocks)[i]
    kv_heads = meta.integers(f"{name}.attention.head_count_kv", blocks, heads)[i]
    meta.require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"{name}.attention.head_count",
        f"a multiple of {kv_heads} kv heads",
    )
    key_length = f"{name}.attention.key_length"
    head_dim = meta.integer(key_length, meta.integer(f"{name}.embedding_length") // heads)
    meta.require(head_dim > 0 and head_dim % 2 == 0, key_length, "an even number")
    meta.require(
        meta.integer(f"{name}.attention.value_length", head_dim) == head_dim,
        f"{name}.attention.value_length",
        f"key_length, {head_dim}",
    )
    eps = meta.number(f"{name}.attention.layer_norm_rms_epsilon")
    return Attention(
        heads, kv_heads, head_dim, rope(meta, name, kind, head_dim), eps, gated=False, head_norm=head_norm
    )


def rope(meta: Metadata, name: str, kind: Literal["norm", "neox"], head_dim: int) -> Rope:
    """Rotation of the first dims of a head, all of them unless the file says how many."""
    rotary = meta.integer(f"{name}.rope.dimension_count", head_dim)
    meta.require(
        0 < rotary <= head_dim and rotary % 2 == 0,
        f"{name}.rope.dimension_count",
        f"even and at most {head_dim}",
    )
    return Rope(
        kind, rotary, meta.number(f"{name}.rope.freq_base", 10000.0), scaling=rope_scaling(meta, name)
    )


def rope_scaling(meta: Metadata, name: str) -> RopeScaling:
    """How the rotation is stretched, if it is; what a file does not say as llama.cpp has it.

    The limits of YaRN's ramp, which llama.cpp reads in few architectures, are a file's wherever it has them.
    """
    key = f"{name}.rope.scaling"
    kind = meta.string(f"{key}.type", "linear")
    meta.require(kind in ("none", "linear", "yarn"), f"{key}.type", "none, linear or yarn")
    for refused, usual in (("alpha", 0.0), ("yarn_log_multiplier", 0.0), ("yarn_ext_factor", 1.0)):
        meta.require(
            meta.number(f"{key}.{refused}", usual) == usual, f"{key}.{refused}", f"{usual}, or absent"
        )
    factor = meta.number(f"{key}.factor", meta.number(f"{name}.rope.scale_linear", 1.0)) or 1.0
    meta.require(factor > 0, f"{key}.factor", "above 0")
    trained = meta.integer(f"{key}.original_context_length", meta.integer(f"{name}.context_length"))
    meta.require(trained > 0, f"{key}.original_context_length", "1 or more")
    scaling = RopeScaling(
        type="yarn" if kind == "yarn" else "linear",
        factor=1.0 if kind == "none" else factor,
        original_context_length=trained if kind == "yarn" else 0,
        attn_factor=meta.number(f"{key}.attn_factor", 1.0),
        yarn_beta_fast=meta.number(f"{key}.yarn_beta_fast", 32.0),
        yarn_beta_slow=meta.number(f"{key}.yarn_beta_slow", 1.0),
    )
    meta.require(
        0 < scaling.yarn_beta_slow < scaling.yarn_beta_fast,
        f"{key}.yarn_beta_slow",
        "above 0, below yarn_beta_fast",
    )
    return scaling


def dense(meta: Metadata, name: str, i: int) -> Dense:
    """The feed-forward network of block i, in an architecture that has no other kind."""
    meta.require(
        meta.integer(f"{name}.expert_count", 0) == 0,
        f"{name}.expert_count",
        "none: mixtures of experts are not supported in this architecture",
    )
    return Dense(meta.integers(f"{name}.feed_forward_length", meta.integer(f"{name}.block_count"))[i])


def decoder_block(
    meta: Metadata, name: str, i: int, kind: Literal["norm", "neox"], *, head_norm: bool
) -> Block:
    """Attention, then a dense network."""
    mixer = attention(meta, name, i, kind, head_norm=head_norm)
    return Block(mixer, dense(meta, name, i), mixer.layer_norm_rms_epsilon)
