"""Small models for comparing engines: every axis of its own size, each option of a file used somewhere."""

from __future__ import annotations

import dataclasses

from scarlet_jax.tools.synth import Shape

# Rotary sizes and sections are such that each rotary pair is t's, h's or w's, as in every published model.
_BASE = Shape(
    block_count=4,
    context_length=512,
    embedding_length=80,
    feed_forward_length=112,
    vocab_size=300,
    head_count=10,
    head_count_kv=5,
    key_length=48,
    dimension_count=16,
    dimension_sections=(3, 3, 2, 0),
    freq_base=1e4,
    conv_kernel=4,
    state_size=32,
    group_count=2,
    time_step_rank=6,
    tied=False,
)

SHAPES = {
    "conv-3": dataclasses.replace(
        _BASE, conv_kernel=3, tied=True, fused_qkv=True, head_count=6, head_count_kv=3
    ),
    "conv-4": _BASE,
    "conv-5": dataclasses.replace(
        _BASE,
        conv_kernel=5,
        state_size=48,
        group_count=3,
        key_length=46,
        dimension_count=26,  # 46 * (26 / 46) < 26 in floats
        dimension_sections=(5, 4, 4, 0),
        recurrent_layers=(False, True, True, False),
        scales=True,
    ),
    "one-key-head": dataclasses.replace(
        _BASE,
        group_count=1,
        time_step_rank=5,
        head_count=4,
        head_count_kv=1,
        key_length=32,
        dimension_count=32,  # the whole head
        dimension_sections=(6, 5, 5, 0),
        full_attention_interval=2,
        block_count=3,
        nextn_predict_layers=1,
    ),
}

# Time has pairs 0, 3 and 6, height 1 and 4, width 2. The others belong to the fourth position, which stays 0
# for text: transformers has no such position.
FOURTH_POSITION = dataclasses.replace(_BASE, dimension_count=26, dimension_sections=(3, 2, 1, 7))
# The sections are fewer than the pairs, and repeat.
REPEATED_SECTIONS = dataclasses.replace(_BASE, dimension_count=24, dimension_sections=(2, 2, 1, 0))
# An epsilon that shows: 1e-6 is below what single precision resolves.
LARGE_EPSILON = dataclasses.replace(_BASE, layer_norm_rms_epsilon=0.02)
