"""The one-flag routine: run a model in two engines on prompts that reach every path, and compare."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity.compare import Comparison
from scarlet_jax.tools.parity.dump import read_dump, write_dump
from scarlet_jax.tools.parity.weights import ModelWeights

ENGINES = ("llama.cpp", "transformers", "scarlet")

# What goes wrong only at a certain length: a single token; a whole chunk of the delta rule (64) with one more;
# several chunks. And the same text fed in two ways must end in the same activations.
LENGTHS = (1, 65, 150)
DECODED = 5
_SEVERITY = ("clean", "noise", "inconclusive", "invalid", "single-op", "systematic")


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt, run by both engines."""

    name: str
    model: Path
    runs: tuple[tuple[str, int], tuple[str, int]]  # engine and decoded tokens, ours and the reference's
    tokens: Sequence[int]
    weights: ModelWeights
    folder: Path
    lib: str | None

    def compare(self) -> Comparison:
        """Run both engines, one after the other, and read their dumps back from disk."""
        dumps = []
        for side, (engine, decode) in enumerate(self.runs):
            path = self.folder / f"{self.name.replace(' ', '_')}-{side}.dump"
            capture(engine, self.model, self.tokens, decode, self.lib, path)
            dumps.append(read_dump(path))
        return Comparison(dumps[0], dumps[1], self.weights)


def capture(
    engine: str, model: Path, tokens: Sequence[int], decode: int, lib: str | None, path: Path
) -> None:
    """Run one engine and write its dump: what `scarlet taps` does."""
    from scarlet_jax.tools import taps

    about = taps.source(model)
    arrays, weights, version = taps.ENGINES[engine](model, tokens, None, decode, lib)
    write_dump(
        path,
        arrays,
        engine=version,
        model=about.name,
        arch=about.arch,
        tokens=tokens,
        weights=weights,
        config=about.config,
    )


def cases(
    model: str | None,
    engine: str,
    *,
    prompt: str | None = None,
    tokens: str | None = None,
    lib: str | None = None,
) -> Iterator[Case]:
    """The comparisons to make: the given prompt, or the set."""
    from scarlet_jax import hub
    from scarlet_jax.tools import taps

    path = hub.resolve(model)
    weights = ModelWeights(path)
    about = taps.source(path)
    vocabulary = _vocabulary(weights.metadata, path)
    with tempfile.TemporaryDirectory(prefix="scarlet-parity-") as folder:

        def case(name: str, ids: Sequence[int], ours: tuple[str, int], theirs: tuple[str, int]) -> Case:
            return Case(name, path, (ours, theirs), list(ids), weights, Path(folder), lib)

        if prompt is not None or tokens is not None:
            ids = taps.parse_tokens(tokens) if tokens is not None else about.encode(prompt or "")
            if not ids:
                raise BadInput("-p: the prompt is empty; expected one token or more")
            yield case(f"{len(ids)} tokens", ids, ("scarlet", 0), (engine, 0))
            return
        rng = np.random.default_rng(0)
        for length in LENGTHS:
            ids = rng.integers(0, vocabulary, length).tolist()
            yield case(f"{length} tokens", ids, ("scarlet", 0), (engine, 0))
        ids = rng.integers(0, vocabulary, LENGTHS[1] + DECODED).tolist()
        yield case(f"prefill against decode of {DECODED}", ids, ("scarlet", DECODED), ("scarlet", 0))


def _vocabulary(metadata: Mapping[str, Any], path: Path) -> int:
    words = metadata.get("tokenizer.ggml.tokens")
    if words is None or not len(words):
        raise BadInput(
            f"{path}: tokenizer.ggml.tokens is missing; expected the vocabulary, to draw tokens from"
        )
    return len(words)


def worse(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether report `a` is the one to tell of rather than `b`."""
    return _SEVERITY.index(a["verdict"]) > _SEVERITY.index(b["verdict"])
