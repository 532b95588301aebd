"""llama: attention in every layer, neighbouring dims rotated together (spec section 1).

The converter permuted the rows of queries and keys for that. `rope_freqs.weight`, where a file has it (Llama
3.1 and later), divides the frequencies.
"""

from __future__ import annotations

import dataclasses

from scarlet_jax.config import Attention, Block, Metadata
from scarlet_jax.configs import common


def block(meta: Metadata, i: int) -> Block:
    """Layer i, from the keys under `llama.`."""
    mixer = common.attention(meta, "llama", i, "norm", head_norm=False)
    return Block(_with_factors(meta, mixer), common.dense(meta, "llama", i), mixer.layer_norm_rms_epsilon)


def _with_factors(meta: Metadata, mixer: Attention) -> Attention:
    factors = meta.table("rope_freqs.weight", mixer.rope.dimension_count // 2)
    return dataclasses.replace(mixer, rope=dataclasses.replace(mixer.rope, freq_factors=factors))


_PLAIN = common.arch("llama", block)
ARCH = dataclasses.replace(
    _PLAIN,
    config=lambda meta: dataclasses.replace(
        _PLAIN.config(meta), taps=(*common.TAPS, ("attn_output", "attn_out"))
    ),
    ignored=(*_PLAIN.ignored, r"rope_freqs\.weight"),  # it is in the config
)
