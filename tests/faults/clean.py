"""Pairs without a fault: two engines, or one engine two ways, on every block format and many settings.

    OMP_NUM_THREADS=1 python tests/faults/clean.py [--types F32,Q4_K] [--json F]

Prints every pair that was called broken; there must be none.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
import numpy as np

from scarlet_jax.tools import synth
from scarlet_jax.tools.engines import llama_cpp, scarlet
from scarlet_jax.tools.parity import Dump, compare
from scarlet_jax.tools.parity.weights import ModelWeights
from scarlet_jax.tools.taps import source

TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "Q4_K_M", "Q5_K_M"),
)

# Mixtures of experts, in formats of every kind.
EXPERTS = ("F32", "Q8_0", "Q4_K", "MXFP4", "Q4_K_M")

# The reference's settings: llama.cpp's caches, attentions and batches.
LLAMA: dict[str, dict[str, Any]] = {
    "f32 cache": {},
    "f16 cache": {"type_k": "F16", "type_v": "F16"},
    "flash attention, f16 cache": {"type_k": "F16", "type_v": "F16", "flash_attention": True},
    "flash attention, q8_0 cache": {"type_k": "Q8_0", "type_v": "Q8_0", "flash_attention": True},
}


class Engines:
    """Runs of one file, kept while its pairs are compared."""

    def __init__(self, path: Path):
        self.path, self.about, self._kept = path, source(path), {}

    def dump(self, engine: str, tokens: tuple[int, ...], decode: int = 0, **options: Any) -> Dump:
        """One run."""
        key = (engine, tokens, decode, tuple(sorted(options.items())))
        if key not in self._kept:
            module = scarlet if engine == "scarlet" else llama_cpp
            taps, weights, version = module.taps(self.path, tokens, None, decode, **options)
            self._kept[key] = Dump(
                taps,
                version,
                self.about.name,
                self.about.arch,
                list(tokens),
                list(taps),
                weights,
                self.about.config,
            )
        return self._kept[key]


def pairs(engines: Engines, quick: bool) -> Iterator[tuple[str, Dump, Dump]]:
    """Name, ours and reference."""
    vocabulary = models.PACKABLE.vocab_size
    for length in (1, 21, 70):
        tokens = tuple(int(t) for t in np.random.default_rng(length).integers(0, vocabulary, length))
        mine = engines.dump("scarlet", tokens)
        for name, options in LLAMA.items():
            if length == 21 or (name == "f32 cache" and not quick):
                yield f"{length} tokens, {name}", mine, engines.dump("llama.cpp", tokens, **options)
    tokens = tuple(range(5, 73))
    yield (
        "decode against llama.cpp's prefill",
        engines.dump("scarlet", tokens, 4),
        engines.dump("llama.cpp", tokens),
    )
    if not quick:
        yield "prefill against decode", engines.dump("scarlet", tokens, 4), engines.dump("scarlet", tokens)
        portable = engines.dump("scarlet", tokens, implementation="portable")
        yield "kernels against portable code", engines.dump("scarlet", tokens), portable


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--quick", action="store_true", help="fewer settings a type")
    args = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        types = args.types.split(",")
        shapes = [(models.PACKABLE, qtype) for qtype in types]
        shapes += [(models.PACKABLE_EXPERTS, qtype) for qtype in EXPERTS if qtype in types]
        for shape, qtype in shapes:
            path = synth.write(Path(folder) / f"{shape.arch}-{qtype}.gguf", shape, qtype, seed=7)
            engines, weights = Engines(path), ModelWeights(path)
            for (name, ours, reference), model in itertools.product(
                pairs(engines, args.quick), (None, weights)
            ):
                report = compare(ours, reference, model=model)
                counts[report["verdict"]] += 1
                if report["exit"]:
                    how = "with the file" if model else "dumps only"
                    said = f"{report['verdict']} {report['first']} {report['cause']} {report['why']}"
                    print(f"ALARM {shape.arch} {qtype}, {name}, {how}: {said}", flush=True)
            print(f"{shape.arch} {qtype}: {dict(counts)} after {time.time() - start:.0f} s", flush=True)
            path.unlink()
    print(f"{sum(counts.values())} clean pairs: {dict(counts)}")


if __name__ == "__main__":
    main()
