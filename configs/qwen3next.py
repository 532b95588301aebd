"""qwen3next: Qwen3-Next, qwen35moe's layers with plain rotation, value heads beside their key head in the file.

Spec sections 1 to 3. What the file joins, it joins a key head at a time: of beta and alpha `ssm_ba`, and in
older files of queries, keys, values and output gate `ssm_in`.
"""

from __future__ import annotations

import functools

import numpy as np

from scarlet_jax.config import Arch, Config, DeltaNet, Metadata
from scarlet_jax.configs import common, qwen35, qwen35moe

# llama.cpp's names of activations.
TAPS = (
    *(("model.input_embed", "model.embed_tokens"), ("Qcur_reshaped", "Qcur_view"), ("gate_reshaped", "gate")),
    *(("alpha", "a"), ("beta", "b")),
)


def config(meta: Metadata) -> Config:
    """Read the metadata keys under `qwen3next.`."""
    ffn = qwen35moe.experts(meta, "qwen3next", shared=True)
    rope = functools.partial(common.rope, meta, "qwen3next", "neox")
    return qwen35.hybrid(meta, "qwen3next", lambda _: ffn, rope=rope, head_mapping="repeat", taps=TAPS)


def joined(cfg: object) -> dict[str, dict[str, np.ndarray]]:
    """The rows of each weight in the tensors that hold several: a key head's part of every one, in turn."""
    if not isinstance(cfg, DeltaNet):
        return {}
    heads = cfg.time_step_rank // cfg.group_count
    size, values = cfg.state_size, heads * cfg.state_size
    q, k, v, z = _rows(cfg.group_count, size, size, values, values)
    beta, alpha = _rows(cfg.group_count, heads, heads)
    return {
        "ssm_in.weight": {"attn_qkv.weight": np.concatenate([q, k, v]), "attn_gate.weight": z},
        "ssm_ba.weight": {"ssm_beta.weight": beta, "ssm_alpha.weight": alpha},
    }


def _rows(groups: int, *counts: int) -> list[np.ndarray]:
    """Where the rows of each part are, if every group has `counts` of them one after another."""
    rows = np.arange(groups * sum(counts)).reshape(groups, -1)
    return [part.ravel() for part in np.split(rows, np.cumsum(counts)[:-1], axis=1)]


ARCH = Arch(name="qwen3next", config=config, joined=joined, ignored=qwen35.ARCH.ignored)
