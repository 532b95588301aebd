"""Pairs without a fault: two engines, or one engine two ways, on every block format and many settings.

    OMP_NUM_THREADS=1 python tests/faults/clean.py [--types F32,Q4_K] [--keep FOLDER]

Every pair is compared twice, with the dumps alone and with the model's weights too. Prints every comparison that
was called broken or void; there must be none.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
import numpy as np
from faults.dress import DRESSES

import scarlet_jax
from scarlet_jax.batch import Batch, Piece
from scarlet_jax.tools import synth
from scarlet_jax.tools.engines import llama_cpp, scarlet
from scarlet_jax.tools.parity import Dump, compare, read_dump, write_dump
from scarlet_jax.tools.parity.names import rename
from scarlet_jax.tools.parity.weights import ModelWeights
from scarlet_jax.tools.taps import source

TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "Q4_K_M", "Q5_K_M"),
)
# Formats of every kind, for what does not depend on each: mixtures of experts, and our engine against itself.
KINDS = ("F32", "BF16", "Q8_0", "Q4_K", "MXFP4", "Q4_K_M")

SHAPES = {
    "dense": (models.PACKABLE, TYPES),
    "experts": (models.PACKABLE_EXPERTS, KINDS),
    "fused": (dataclasses.replace(models.PACKABLE, block_count=2, fused_qkv=True), KINDS),
}

# The reference's settings: llama.cpp's caches, attentions and batches.
LLAMA: dict[str, dict[str, Any]] = {
    "f32 cache": {},
    "f16 cache": {"type_k": "F16", "type_v": "F16"},
    "flash attention, f32 cache": {"flash_attention": True},
    "flash attention, f16 cache": {"type_k": "F16", "type_v": "F16", "flash_attention": True},
    "flash attention, q8_0 cache": {"type_k": "Q8_0", "type_v": "Q8_0", "flash_attention": True},
}

Pair = tuple[str, Dump, Dump]


class Engines:
    """Runs of one file, each kept as a dump in `folder` and read from there."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.about, self._folder = path, source(path), folder

    def dump(self, engine: str, tokens: Sequence[int], decode: int = 0, **options: Any) -> Dump:
        """One run."""
        words = (engine, len(tokens), tokens[0], decode, *(f"{k}={options[k]}" for k in sorted(options)))
        file = self._folder / f"{self.path.stem} {' '.join(map(str, words))}.dump"
        if not file.exists():
            run = {"scarlet": _ours, "llama.cpp": llama_cpp.taps}[engine]
            taps, weights, version = run(self.path, tokens, None, decode, **options)
            about = {"engine": version, "model": self.about.name, "arch": self.about.arch}
            write_dump(file, taps, tokens=tokens, weights=weights, config=self.about.config, **about)
        return read_dump(file)


def _ours(path: Path, tokens: Sequence[int], select: None, decode: int, **options: Any) -> Any:
    """As `scarlet.taps`, and with `beside`: another sequence of so many tokens in the same batch, before this one."""
    beside, cache = options.pop("beside", 0), options.pop("cache", "float32")
    if not beside and cache == "float32":
        return scarlet.taps(path, tokens, select, decode, **options)
    rows = [tokens] if not beside else [_tokens(beside, seed=1), tokens]
    model = scarlet_jax.load(path, kv_dtype=cache)
    batch = Batch.of(rows, model.config.vocabulary_size)
    state = model.init_state(len(rows), batch.tokens.shape[1])
    piece = Piece(batch.tokens, batch.lengths, batch.tokens.shape[1])
    hidden, _, taps = model.programs.trunk(piece.tokens, piece.count, state, tapped=True)
    _, head = model.programs.head(hidden, tapped=True)
    whole = {name: np.asarray(x[-1]) for name, x in (taps | head).items()}
    seen = {name: scarlet._seen_keys(name, x, batch.tokens.shape[1]) for name, x in whole.items()}
    qtypes = {name: tensor.qtype for name, tensor in model.gguf.tensors.items()}
    return seen, scarlet._weights(seen, qtypes), "scarlet_jax in another way"


def _tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, models.PACKABLE.vocab_size, length).tolist()


def two_engines(engines: Engines) -> Iterator[Pair]:
    """Ours against llama.cpp: lengths, caches, attentions, prefill and decode."""
    for length in (1, 21, 70):
        mine = engines.dump("scarlet", _tokens(length))
        for name, options in LLAMA.items():
            if length == 21 or name == "f32 cache":
                yield f"{length} tokens, {name}", mine, engines.dump("llama.cpp", _tokens(length), **options)
    decoded = engines.dump("scarlet", _tokens(70), 4)
    yield "decode against llama.cpp's prefill", decoded, engines.dump("llama.cpp", _tokens(70))


def two_ways(engines: Engines) -> Iterator[Pair]:
    """Ours against itself: fed and computed in another way."""
    for length in (21, 70):
        tokens = _tokens(length)
        once = engines.dump("scarlet", tokens)
        yield (
            f"{length} tokens, two sequences against one",
            engines.dump("scarlet", tokens, beside=length),
            once,
        )
        yield f"{length} tokens, padded rows", engines.dump("scarlet", tokens, beside=length + 9), once
        yield f"{length} tokens, recurrent against chunked", engines.dump("scarlet", tokens, length - 1), once
        portable = engines.dump("scarlet", tokens, implementation="portable")
        yield f"{length} tokens, kernels against portable code", once, portable
    once = engines.dump("scarlet", _tokens(21))
    half = engines.dump("scarlet", _tokens(21), cache="float16")
    yield "f16 cache against f32", half, once
    f16 = LLAMA["flash attention, f16 cache"]
    yield "f16 cache against llama.cpp's", half, engines.dump("llama.cpp", _tokens(21), **f16)
    yield "prefill against decode", once, engines.dump("scarlet", _tokens(21), 4)


def sparse(engines: Engines) -> Iterator[Pair]:
    """The reference's dump as other tools would have written it: less of it, or rounded, by an unknown engine."""
    for length, name in ((21, "flash attention, q8_0 cache"), (70, "f32 cache")):
        reference = engines.dump("llama.cpp", _tokens(length), **LLAMA[name])
        ours = engines.dump("scarlet", _tokens(length))
        for dress in ("log", "modules", "stream", "halves"):
            dressed = dataclasses.replace(DRESSES[dress](reference), engine="")
            yield f"{length} tokens, {name}, as {dress}", ours, rename(dressed)


def fused(engines: Engines) -> Iterator[Pair]:
    """A reference that has queries, keys and values as one tap, where ours has them apart."""
    for length in (21, 70):
        reference = engines.dump("llama.cpp", _tokens(length))
        parts = ("Qcur_full", "Qcur_reshaped", "Vcur")
        kept = {name: reference[name] for name in reference if name.rpartition("-")[0] not in parts}
        assert any(name.startswith("wqkv-") for name in kept)
        whole = dataclasses.replace(reference, taps=kept)
        yield f"{length} tokens, fused attention", engines.dump("scarlet", _tokens(length)), whole


def pairs(shape: str, qtype: str, engines: Engines) -> Iterator[Pair]:
    """Name, ours and reference."""
    if shape == "fused":
        yield from fused(engines)
        return
    yield from two_engines(engines)
    yield from sparse(engines)
    if qtype in KINDS:
        yield from two_ways(engines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--only", default="", help="pairs whose name contains this")
    parser.add_argument("--keep", metavar="FOLDER", help="runs are kept there, and used again")
    args = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    compared, start = 0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(args.keep or folder)
        for name in args.shapes.split(","):
            shape, known = SHAPES[name]
            for qtype in [q for q in args.types.split(",") if q in known]:
                path = synth.write(Path(folder) / f"{name}-{qtype}.gguf", shape, qtype, seed=7)
                weights = ModelWeights(path)
                for pair, ours, reference in pairs(name, qtype, Engines(path, keep)):
                    if args.only not in pair:
                        continue
                    compared += 1
                    for model in (None, weights):
                        report = compare(ours, reference, model=model)
                        counts[report["verdict"]] += 1
                        if report["exit"]:
                            how = "with the file" if model else "dumps only"
                            said = f"{report['verdict']} {report['first']} {report['cause']} {report['why']}"
                            print(f"ALARM {name} {qtype}, {pair}, {how}: {said}", flush=True)
                print(f"{name} {qtype}: {dict(counts)} after {time.time() - start:.0f} s", flush=True)
                path.unlink()
    print(f"{compared} pairs, {sum(counts.values())} comparisons: {dict(counts)}")


if __name__ == "__main__":
    main()
