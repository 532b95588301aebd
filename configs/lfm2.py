"""lfm2: gated short convolutions, with attention where a layer has key-value heads."""

from __future__ import annotations

import dataclasses

from scarlet_jax.config import Block, Config, Metadata, ShortConv
from scarlet_jax.configs import common


def block(meta: Metadata, i: int) -> Block:
    """Layer i, from the keys under `lfm2.`."""
    if meta.integers("lfm2.attention.head_count_kv", meta.integer("lfm2.block_count"))[i]:
        return common.decoder_block(meta, "lfm2", i, "neox", head_norm=True)
    l_cache = meta.integer("lfm2.shortconv.l_cache")
    meta.require(l_cache > 1, "lfm2.shortconv.l_cache", "2 or more")
    mixer = ShortConv(l_cache, meta.integer("lfm2.embedding_length"))
    return Block(mixer, common.dense(meta, "lfm2", i), meta.number("lfm2.attention.layer_norm_rms_epsilon"))


def config(meta: Metadata) -> Config:
    """Read the metadata keys under `lfm2.`."""
    return dataclasses.replace(common.config(meta, "lfm2", block), taps=TAPS)


# llama.cpp's names, which are transformers' for the most part: there `Qcur` is the projection, before norm and
# rotation (so is `Kcur`, which is not tapped here), and the norm that is called `ffn_norm` is called again.
TAPS = (
    ("model.input_embed", "model.embed_tokens"),
    *(
        (ours, f"model.layers.{{}}.{theirs}")
        for ours, theirs in (
            ("attn_norm", "operator_norm"),
            ("conv_in_proj", "conv.in_proj"),
            ("conv_conv", "conv.conv"),
            ("conv_out_proj", "conv.out_proj"),
            ("Qcur_normed", "self_attn.q_layernorm"),
            ("Kcur_normed", "self_attn.k_layernorm"),
            ("attn_output", "self_attn.out_proj"),
            ("attn_post_norm", "ffn_out"),
        )
    ),
    *(("Qcur_reshaped", "Qcur"), ("Qcur", "Qcur_rope"), ("Kcur", "Kcur_rope"), ("attn_pregate", "kqv_out")),
)
# What is called an embedding's norm is the last one.
ARCH = dataclasses.replace(
    common.arch("lfm2", block),
    config=config,
    names=common.NAMES | {"output_norm.weight": "token_embd_norm.weight"},
)
