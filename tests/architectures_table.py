"""Writes the table in docs/architectures.md: what each architecture comes to, asked of its own config.

python tests/architectures_table.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scarlet_jax import configs, gguf
from scarlet_jax.config import Attention, Config, DeltaNet, Mamba2, MoE, Parallel, ShortConv
from scarlet_jax.errors import BadInput
from scarlet_jax.tools import synth, synth_vocabulary

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
HEAD = """| `general.architecture` | mixers | rotation | networks | prediction blocks | lines of config |
|---|---|---|---|---|---|
"""


def table() -> str:
    """A row an architecture, in the order of their names."""
    return HEAD + "".join(map(row, sorted(configs.ARCHITECTURES)))


def row(name: str) -> str:
    """From the Config of its "tiny" model."""
    cfg = config(name, 0)
    mixers = [block.mixer for block in cfg.blocks]
    parts = [mixer.attention if isinstance(mixer, Parallel) else mixer for mixer in mixers]
    rotations = [part.rope.kind for part in parts if isinstance(part, Attention)]
    lines = len((ROOT / "configs" / f"{name.replace('-', '_')}.py").read_text().splitlines())
    cells = [
        f"`{name}`",
        ", ".join(dict.fromkeys(map(mixer_words, mixers))),
        ", ".join(dict.fromkeys(rotations)) or "none",
        ", ".join(dict.fromkeys(network_words(block.ffn) for block in cfg.blocks)),
        "yes" if predicts(name) else "refused",
        str(lines),
    ]
    return f"| {' | '.join(cells)} |\n"


def config(name: str, prediction_blocks: int) -> Config:
    """What the engine makes of the keys of that architecture's tiny model, and so many prediction blocks."""
    shape = synth.SIZES[name, "tiny"]
    keys = synth.metadata(shape, "F32", name, synth_vocabulary.metadata(shape.vocab_size))
    for key, value in keys.items():
        if isinstance(value, list) and not isinstance(value[0], str):
            keys[key] = np.array(value)  # as the reader gives arrays of numbers
    keys[f"{name}.block_count"] += prediction_blocks
    keys[f"{name}.nextn_predict_layers"] = prediction_blocks
    return configs.find(name).config(gguf.Metadata(keys, name))


def predicts(name: str) -> bool:
    """Whether it takes a file with a prediction block."""
    try:
        return len(config(name, 1).nextn) == 1
    except BadInput:
        return False


def mixer_words(mixer: object) -> str:
    """What a mixer is, sizes left out."""
    if isinstance(mixer, Attention):
        return ("gated " if mixer.gated else "") + "attention" + (" with head norms" * mixer.head_norm)
    if isinstance(mixer, Parallel):
        return f"{mixer_words(mixer.attention)} beside {mixer_words(mixer.mamba2)}"
    if isinstance(mixer, DeltaNet):
        return f"delta net (key heads: {mixer.head_mapping})"
    return {ShortConv: "gated short convolution", Mamba2: "Mamba-2"}[type(mixer)]


def network_words(network: object) -> str:
    """What a feed-forward network is, sizes left out."""
    if isinstance(network, MoE):
        return "experts" + (" and a shared one" * bool(network.expert_shared_feed_forward_length))
    return "none" if network is None else "dense"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
