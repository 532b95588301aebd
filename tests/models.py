"""Tiny random models, every axis of another size, made once a run."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np

import scarlet_jax
from scarlet_jax.config import Config
from scarlet_jax.forward import Weights
from scarlet_jax.tools import synth
from scarlet_jax.tools.synth import Shape

# No size occurs twice within a shape where a swap could hide: head counts, head dims, widths, conv width.
SHAPES = {
    "untied": Shape(
        block_count=6, full_attention_interval=3, embedding_length=80, feed_forward_length=112,
        vocab_size=331, tied=False, head_count=6, head_count_kv=2, key_length=48,
        dimension_count=16, dimension_sections=(3, 3, 2, 0), freq_base=1e4,
        conv_kernel=4, state_size=32, group_count=2, time_step_rank=6, nextn_predict_layers=1,
    ),
    "tied": Shape(
        block_count=4, recurrent_layers=(True, False, True, True), embedding_length=96,
        feed_forward_length=64, vocab_size=347, tied=True, head_count=4, head_count_kv=4, key_length=32,
        dimension_count=24, dimension_sections=(4, 4, 4, 0), freq_base=5e5,
        conv_kernel=3, state_size=48, group_count=3, time_step_rank=3, fused_qkv=True, alignment=128,
    ),
    "scaled": Shape(
        block_count=4, full_attention_interval=2, embedding_length=64, feed_forward_length=144,
        vocab_size=353, tied=False, head_count=3, head_count_kv=1, key_length=64,
        dimension_count=64, dimension_sections=(11, 11, 10, 0), freq_base=1e7, layer_norm_rms_epsilon=1e-5,
        conv_kernel=5, state_size=16, group_count=1, time_step_rank=4, scales=True,
    ),
}  # fmt: skip

# Attention and a dense network in every layer, a bias wherever llama.cpp takes one.
DENSE_SHAPES = {
    "qwen3": Shape(
        arch="qwen3", block_count=3, embedding_length=80, feed_forward_length=112, vocab_size=331, tied=False,
        head_count=6, head_count_kv=2, key_length=48, dimension_count=48, freq_base=1e4,
    ),
    "qwen2": Shape(
        arch="qwen2", block_count=2, embedding_length=96, feed_forward_length=64, vocab_size=347, tied=True,
        head_count=3, head_count_kv=1, key_length=32, dimension_count=32, freq_base=5e5,
        biases=("attn_q", "attn_k", "attn_v"), alignment=128,
    ),
    "qwen2-fused": Shape(
        arch="qwen2", block_count=1, embedding_length=120, feed_forward_length=144, vocab_size=353, tied=False,
        head_count=5, head_count_kv=5, key_length=24, dimension_count=24, fused_qkv=True, biases=("attn_qkv",),
    ),
    "llama": Shape(
        arch="llama", block_count=3, embedding_length=64, feed_forward_length=144, vocab_size=359, tied=False,
        head_count=4, head_count_kv=2, key_length=40, dimension_count=40, freq_base=5e5, freq_factors=True,
        biases=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    ),
    "llama-tied": Shape(
        arch="llama", block_count=2, embedding_length=72, feed_forward_length=96, vocab_size=367, tied=True,
        head_count=3, head_count_kv=3, key_length=24, dimension_count=24, layer_norm_rms_epsilon=1e-5,
    ),
}  # fmt: skip

# Rotations stretched to a longer context; YaRN's ramp begins and ends within the pairs.
_YARN = (("type", "yarn"), ("factor", 4.0), ("original_context_length", 96))
DENSE_SHAPES |= {
    "qwen3-yarn": dataclasses.replace(DENSE_SHAPES["qwen3"], block_count=2, rope_scaling=_YARN),
    "llama-linear": dataclasses.replace(
        DENSE_SHAPES["llama"], block_count=2, rope_scaling=(("type", "linear"), ("factor", 2.5)),
    ),
}  # fmt: skip
SCALED_ROPE = dataclasses.replace(
    SHAPES["untied"], block_count=3, dimension_count=32, dimension_sections=(6, 5, 5, 0),
    rope_scaling=(*_YARN, ("attn_factor", 1.25)),
)  # fmt: skip

# Layers with a memory of fixed size, alone or among those with attention.
RECURRENT_SHAPES = {
    "lfm2": Shape(
        arch="lfm2", block_count=4, embedding_length=96, feed_forward_length=112, vocab_size=331, tied=True,
        head_count=6, head_count_kv=2, key_length=16, dimension_count=16, freq_base=1e4,
        conv_kernel=3, recurrent_layers=(True, True, False, True),
    ),
    "lfm2-untied": Shape(
        arch="lfm2", block_count=3, embedding_length=80, feed_forward_length=144, vocab_size=347, tied=False,
        head_count=2, head_count_kv=2, key_length=40, dimension_count=40, freq_base=1e6,
        conv_kernel=5, recurrent_layers=(False, True, True), layer_norm_rms_epsilon=1e-5,
    ),
    "mamba2": Shape(
        arch="mamba2", block_count=3, embedding_length=48, feed_forward_length=0, vocab_size=353, tied=False,
        conv_kernel=4, state_size=20, group_count=2, time_step_rank=6, ssm_head_length=16,
    ),
    "falcon-h1": Shape(
        arch="falcon-h1", block_count=3, embedding_length=80, feed_forward_length=112, vocab_size=349, tied=False,
        head_count=6, head_count_kv=2, key_length=16, dimension_count=16, freq_base=1e4,
        conv_kernel=4, state_size=20, group_count=2, time_step_rank=6, ssm_head_length=24, ssm_norm=False,
    ),
    "falcon-h1-norm": Shape(
        arch="falcon-h1", block_count=2, embedding_length=72, feed_forward_length=96, vocab_size=367, tied=True,
        head_count=3, head_count_kv=3, key_length=40, dimension_count=40, freq_base=1e11,
        conv_kernel=3, state_size=32, group_count=1, time_step_rank=5, ssm_head_length=8,
        layer_norm_rms_epsilon=1e-5,
    ),
    "mamba2-tied": Shape(
        arch="mamba2", block_count=2, embedding_length=60, feed_forward_length=0, vocab_size=337, tied=True,
        conv_kernel=4, state_size=32, group_count=1, time_step_rank=5, ssm_head_length=24,
        layer_norm_rms_epsilon=1e-5,
    ),
}  # fmt: skip

# Experts of every kind: with a shared one of another size, with gate and up in one tensor, with scales.
_EXPERTS = dataclasses.replace(
    SHAPES["untied"], arch="qwen35moe", block_count=3, expert_count=11, expert_used_count=3,
    expert_feed_forward_length=56, expert_shared_feed_forward_length=72, feed_forward_length=0,
)  # fmt: skip
MOE_SHAPES = {
    "experts": _EXPERTS,
    "gate-up-fused": dataclasses.replace(
        _EXPERTS, fused_gate_up=True, tied=True, expert_count=7, expert_used_count=7, nextn_predict_layers=0,
    ),
    "experts-scaled": dataclasses.replace(_EXPERTS, scales=True, expert_used_count=2, nextn_predict_layers=0),
}  # fmt: skip
# Without a shared expert; and one expert a token, whose weight is 1 whatever the router says.
_PLAIN_EXPERTS = dataclasses.replace(
    DENSE_SHAPES["qwen3"], arch="qwen3moe", block_count=2, expert_count=9, expert_used_count=4,
    expert_feed_forward_length=56, feed_forward_length=0,
)  # fmt: skip
MOE_SHAPES |= {
    "qwen3moe": _PLAIN_EXPERTS,
    "one-expert-a-token": dataclasses.replace(
        _PLAIN_EXPERTS, expert_used_count=1, tied=True, fused_qkv=True, expert_feed_forward_length=40,
    ),
}  # fmt: skip

# Value heads beside their key head; beta and alpha joined, and in older files all that the convolution takes.
_GROUPED = dataclasses.replace(
    _EXPERTS,
    arch="qwen3next",
    state_size=40,
    time_step_rank=8,
    nextn_predict_layers=0,
)
MOE_SHAPES |= {
    "qwen3next": _GROUPED,
    "qwen3next-legacy": dataclasses.replace(
        _GROUPED, legacy_ssm_in=True, state_size=24, group_count=3, time_step_rank=12, conv_kernel=3, tied=True,
        fused_qkv=True,
    ),
    "qwen3next-one-to-one": dataclasses.replace(_GROUPED, group_count=5, time_step_rank=5, fused_gate_up=True),
}  # fmt: skip

# Rows of a multiple of 256, so that every block format fits.
PACKABLE = Shape(
    block_count=4, full_attention_interval=2, embedding_length=256, feed_forward_length=512,
    vocab_size=421, tied=False, head_count=4, head_count_kv=2, key_length=64,
    dimension_count=32, dimension_sections=(6, 5, 5, 0),
    conv_kernel=4, state_size=32, group_count=2, time_step_rank=8,
)  # fmt: skip

PACKABLE_RECURRENT = {
    "lfm2": dataclasses.replace(
        RECURRENT_SHAPES["lfm2"], block_count=2, embedding_length=256, feed_forward_length=512, head_count=4,
        key_length=64, dimension_count=64, recurrent_layers=(True, False),
    ),
    "mamba2": dataclasses.replace(
        RECURRENT_SHAPES["mamba2"], block_count=2, embedding_length=256, time_step_rank=8, ssm_head_length=64,
    ),
    "falcon-h1": dataclasses.replace(
        RECURRENT_SHAPES["falcon-h1"], block_count=2, embedding_length=256, feed_forward_length=512, head_count=4,
        key_length=64, dimension_count=64, time_step_rank=8, ssm_head_length=64,
    ),
}  # fmt: skip

PACKABLE_EXPERTS = dataclasses.replace(
    PACKABLE, arch="qwen35moe", block_count=2, expert_count=6, expert_used_count=2,
    expert_feed_forward_length=256, expert_shared_feed_forward_length=512, feed_forward_length=0,
)  # fmt: skip

PACKABLE_GROUPED = dataclasses.replace(PACKABLE_EXPERTS, arch="qwen3next", legacy_ssm_in=True)

PACKABLE_PLAIN_EXPERTS = dataclasses.replace(
    PACKABLE_EXPERTS, arch="qwen3moe", dimension_count=64, expert_shared_feed_forward_length=0,
)  # fmt: skip


@functools.cache
def folder() -> Path:
    """A folder for this run's files, removed at its end."""
    keeper = tempfile.TemporaryDirectory()
    folder.keeper = keeper  # lives as long as the function
    return Path(keeper.name)


@functools.cache
def path(shape: Shape, quant: str = "F32", seed: int = 1) -> Path:
    """A file of that shape."""
    return synth.write(
        folder() / f"{hash((shape, quant, seed)) & 0xFFFFFFFF:08x}.gguf", shape, quant, seed=seed
    )


@functools.cache
def model(
    shape: Shape, quant: str = "F32", seed: int = 1, implementation: str | None = None
) -> scarlet_jax.Model:
    """Our engine over that file."""
    return scarlet_jax.load(path(shape, quant, seed), implementation=implementation)


def changed(
    model: scarlet_jax.Model, *, config: Config | None = None, weights: Weights | None = None
) -> scarlet_jax.Model:
    """The same model of another config, or with other weights: to make a mistake."""
    return scarlet_jax.Model(
        model.gguf, config or model.config, weights or model.weights, implementation=model.implementation
    )


def tokens(shape: Shape, count: int, seed: int = 0) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng([count, seed]).integers(0, shape.vocab_size, count)
