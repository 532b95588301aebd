"""falcon-h1: attention and Mamba-2 beside each other in every layer, then a dense network.

The model's many scales are none of the file's: the converter multiplied them into the weights.
"""

from __future__ import annotations

import dataclasses

from scarlet_jax.config import Block, Config, Metadata, Parallel
from scarlet_jax.configs import common, mamba2

NAME = "falcon-h1"


def block(meta: Metadata, i: int) -> Block:
    """Layer i, from the keys under `falcon-h1.`."""
    state_space = mamba2.mixer(meta, NAME, norm=meta.has_tensor(f"blk.{i}.ssm_norm.weight"))
    plain = common.decoder_block(meta, NAME, i, "neox", head_norm=False)
    return dataclasses.replace(plain, mixer=Parallel(plain.mixer, state_space))


def config(meta: Metadata) -> Config:
    """Read the metadata keys under `falcon-h1.`."""
    return dataclasses.replace(common.config(meta, NAME, block), taps=TAPS)


# llama.cpp's names: `Qcur` is the projection, and `ssm_in` the input once more.
TAPS = (
    *common.TAPS,
    *((name, f"{name}-post-rope") for name in ("Qcur", "Kcur", "Vcur")),
    *(
        ("Qcur_reshaped", "Qcur"),
        ("attn_output", "attn_out"),
        ("ssm_in", "ssm_in_proj"),
        ("mamba_out", "ssm_out"),
    ),
)
ARCH = dataclasses.replace(
    common.arch(NAME, block),
    config=config,
    names={"post_attention_norm.weight": "ffn_norm"},  # as the converter has it, without its ending
)
