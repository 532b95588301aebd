"""Writes docs/quant-quality.md: what each quant type costs a trained model, ours and llama.cpp's engine on it.

python tests/quality_table.py box-F32.gguf [WINDOWS]
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle
from support import relative_l2
from test_model_quantised import SLOW, TYPES

import scarlet_jax
from scarlet_jax.tools import perplexity, requantise, synth
from scarlet_jax.tools.train import corpus, network, text

LENGTH = 256  # tokens of a window
WINDOWS = 24
MIX = "Q4_K_M"  # whose distance is explained

HEAD = """# What each quant type costs

The trained model that the package carries (docs/training.md), its F32 weights packed by llama.cpp's quantiser:
each type by itself, with what llama.cpp's recipes keep in others (norms, and the head of some), and its stock
mixes, without importance matrices. Measured on {tokens:,} predictions, of {windows} windows of {length} tokens of
held-out documents. Each file is run by scarlet_jax, by llama.cpp (flash attention off, F32 cache, CPU) and by the
float64 forward of `tests/oracle.py`; the last is the truth of *that* file, and its loss is the quantiser's alone.

KL is a mean in nats a token, from the reference's prediction to the engine's. Bits are of the whole file. Half of
a story's words are drawn evenly and cannot be foreseen: which of them is best, a little noise decides.

Made by `python tests/quality_table.py box-F32.gguf`.

| | | perplexity | | | KL to F32's truth | | | KL to the file's truth | | same best as F32 |
|---|---|---|---|---|---|---|---|---|---|---|
| type | bits a weight | truth | ours | llama.cpp | truth | ours | llama.cpp | ours | llama.cpp | ours |
"""

WHY = """
## Why llama.cpp is further off

Logits of the first window, distance to the float64 forward of the {mix} file (`||logits - truth|| / ||truth||`).
Given the very same weights unpacked into an F32 file, llama.cpp agrees with that truth as closely as we do: what
sets it off on the packed file is not the weights, but that it rounds activations to 8 bits before each product
with them.

| weights of {mix} | scarlet_jax | llama.cpp |
|---|---|---|
"""


class Known:
    """An engine for `perplexity.score` whose logits of each window are computed once."""

    def __init__(self, engine: perplexity.Engine) -> None:
        self._engine = engine
        self._seen: dict[bytes, np.ndarray] = {}

    def logits(self, window: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """As in `perplexity.Engine`."""
        key = window.tobytes()
        if key not in self._seen:
            self._seen[key] = np.concatenate(list(self._engine.logits(window, 0)))
        yield self._seen[key][first:]


class Truth:
    """The float64 forward."""

    def __init__(self, path: Path) -> None:
        model = oracle.load(path)
        self._model = oracle.Model(model.metadata, dict(model.weights))  # dequantised once

    def logits(self, window: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """As in `perplexity.Engine`."""
        yield oracle.forward(self._model, window)[0][first:-1]


def engines(path: Path) -> tuple[Known, Known, Known]:
    """The truth of a file, ours and llama.cpp's."""
    theirs = perplexity.LlamaCpp(path, LENGTH, None, None)
    return Known(Truth(path)), Known(perplexity.Ours(scarlet_jax.load(path))), Known(theirs)


def row(path: Path, name: str, windows: np.ndarray, f32: Known) -> str:
    """A line of the table."""
    truth, ours, theirs = engines(path)

    def figures(engine: Known, base: Known) -> dict:
        return perplexity.summary(perplexity.score(windows, 0, engine, base))

    to_f32 = [figures(engine, f32) for engine in (truth, ours, theirs)]
    to_truth = [figures(engine, truth) for engine in (ours, theirs)]
    weights = sum(x.size for x in oracle.load(path).weights.values())
    cells = [name, f"{8 * path.stat().st_size / weights:.2f}"]
    cells += [f"{f['perplexity']:.4f}" for f in to_f32]
    cells += [f"{f['kl_mean']:.1e}" for f in to_f32 + to_truth]
    cells += [f"{100 * to_f32[1]['top1_agreement']:.2f} %"]
    print(*cells, file=sys.stderr, flush=True)
    return f"| {' | '.join(cells)} |\n"


def distances(path: Path, label: str, window: np.ndarray, truth: np.ndarray) -> str:
    """A line of the second table."""
    _, *both = engines(path)
    ours, theirs = (relative_l2(next(engine.logits(window, 0)), truth) for engine in both)
    return f"| {label} | {ours:.1e} | {theirs:.1e} |\n"


def quants() -> list[str]:
    """Every type and stock mix but F32."""
    quick = [quant for quant in TYPES if isinstance(quant, str)]
    return quick + sorted((SLOW | synth.MIXES.keys()) - set(quick))


def main(source: Path, count: int = WINDOWS) -> None:
    """Measure, and write the page."""
    encoder = text.Encoder(scarlet_jax.load(source).tokenizer)
    documents = corpus.documents(0, corpus.HELD_OUT)
    windows = np.asarray(text.batch(encoder, documents, count, LENGTH - 1).tokens)
    f32 = Known(Truth(source))
    shape = dataclasses.replace(network.SHAPE, nextn_predict_layers=1)
    page = HEAD.format(tokens=count * (LENGTH - 1), windows=count, length=LENGTH)
    lines = [row(source, "F32", windows, f32)]
    with tempfile.TemporaryDirectory() as folder:
        for quant in quants():
            path = Path(folder) / f"{quant}.gguf"
            types = {tensor.name: tensor.qtype for tensor in synth.plan(shape, quant)}
            requantise.write(source, path, lambda name, _: types[name])  # noqa: B023
            lines.append(row(path, quant, windows, f32))
        page += "".join(lines) + WHY.format(mix=MIX)
        packed, unpacked = Path(folder) / f"{MIX}.gguf", Path(folder) / "unpacked.gguf"
        requantise.write(packed, unpacked, lambda _name, _type: "F32")
        truth = next(Truth(packed).logits(windows[0], 0))
        page += distances(packed, "packed", windows[0], truth) + distances(
            unpacked, "as F32", windows[0], truth
        )
    (Path(__file__).parent.parent / "docs" / "quant-quality.md").write_text(page)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
