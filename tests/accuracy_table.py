"""Writes docs/accuracy.md: our logits' and llama.cpp's distance to the float64 truth, for every type.

python tests/accuracy_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import oracle
from models import PACKABLE, model, path, tokens
from support import relative_l2
from test_model_quantised import SLOW, TYPES, llama_cpp_logits

HEAD = """# Accuracy: distance to the float64 truth

Logits of a tiny random qwen35 model (4 layers, width 256), stored in each type by llama.cpp's own
quantiser, after each of 64 tokens. The truth is a float64 forward over the very same stored weights
(`tests/oracle.py`); the figure is `||logits - truth|| / ||truth||`. llama.cpp (flash attention off, F32
cache, CPU) rounds the *activations* to 8 or 16 bits before each product with packed weights; we keep them
in f32. The fast mode rounds them too, to 8 bits with a scale for each sub-block of weights (AVX-512 VNNI).

Made by `python tests/accuracy_table.py`.

| stored as | scarlet_jax | llama.cpp | times closer | `--precision fast` |
|---|---|---|---|---|
"""


def row(quant: str) -> str:
    ids = tokens(PACKABLE, 64)
    truth, _ = oracle.forward(path(PACKABLE, quant), ids)
    ours = relative_l2(model(PACKABLE, quant).forward(ids)[0], truth)
    theirs = relative_l2(llama_cpp_logits(path(PACKABLE, quant), ids), truth)
    fast = relative_l2(model(PACKABLE, quant, implementation="cpu-fast").forward(ids)[0], truth)
    print(quant, ours, theirs, fast, file=sys.stderr)
    return f"| {quant} | {ours:.1e} | {theirs:.1e} | {theirs / ours:,.0f} | {fast:.1e} |\n"


if __name__ == "__main__":
    quants = ["F32", *(quant for quant in TYPES if isinstance(quant, str)), *sorted(SLOW)]
    target = Path(__file__).parent.parent / "docs" / "accuracy.md"
    target.write_text(HEAD + "".join(map(row, quants)))
