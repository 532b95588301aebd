"""How much of its corpus a model can do: exact answers on held-out documents, and perplexity of their text.

A greedy answer is exact just when every token of the right one is the most likely after those before it, so
one pass over a document scores all of its turns.

example: python -m scarlet_jax.tools.train.skills box.gguf
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys

import jax
import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.load import load
from scarlet_jax.model import Model
from scarlet_jax.tools import common
from scarlet_jax.tools.train import corpus, text

ROWS = 32  # documents at a time


@dataclasses.dataclass(frozen=True)
class Score:
    """Turns of one kind that were answered exactly, of how many, and perplexity over all text of its answers.

    A story's own text counts as no turn: it is told, not asked for.
    """

    kind: str
    right: int
    turns: int
    perplexity: float


def score(model: Model, kind: str, documents: int, seed: int = 0) -> Score:
    """Score `documents` held-out documents of a kind."""
    encoder = text.Encoder(model.tokenizer)
    drawn = itertools.islice(corpus.documents(seed, corpus.HELD_OUT, kind=kind), documents)
    turns: list[_Turn] = []
    while part := list(itertools.islice(drawn, ROWS)):
        turns += _score_part(model, encoder, part)
    asked = [turn for turn in turns if turn.asked]
    nats = sum(turn.nats for turn in turns) / sum(turn.tokens for turn in turns)
    return Score(kind, sum(turn.exact for turn in asked), len(asked), math.exp(nats))


@dataclasses.dataclass(frozen=True)
class _Turn:
    asked: bool
    exact: bool
    nats: float
    tokens: int


def _score_part(model: Model, encoder: text.Encoder, documents: list[corpus.Document]) -> list[_Turn]:
    encoded = [encoder.turns(document) for document in documents]
    rows = [[encoder.end, *itertools.chain.from_iterable(p + a for p, a in turns)] for turns in encoded]
    logits, _ = model.forward(rows)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    return [turn for row, turns in zip(log_p, encoded, strict=True) for turn in score_row(row, turns)]


def score_row(log_p: np.ndarray, turns: list[tuple[list[int], list[int]]]) -> list[_Turn]:
    """`log_p` f32 (T, V): row i foresees token i of the document, for the end token stands before it."""
    scored, start = [], 0
    for prompt, answer in turns:
        start += len(prompt)
        rows = log_p[start : start + len(answer)]
        nats = -float(rows[np.arange(len(answer)), answer].sum())
        exact = bool((rows.argmax(axis=-1) == answer).all())
        scored.append(_Turn(bool(prompt), exact, nats, len(answer)))
        start += len(answer)
    return scored


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scarlet_jax.tools.train.skills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a .gguf that `scarlet_jax.tools.train` wrote")
    parser.add_argument("--documents", metavar="N", type=int, default=400, help="of each kind (400)")
    common.add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        _run(args)
    except BadInput as error:
        print(f"skills: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.documents < 1:
        raise BadInput(f"--documents {args.documents}: expected 1 or more")
    model = load(args.model)
    scores = []
    for kind in corpus.KINDS:
        with common.waiting(kind):
            scores.append(score(model, kind, args.documents))
        s = scores[-1]
        exact = f"{100 * s.right / s.turns:5.1f} % of {s.turns} exact"
        print(f"{kind:<12} {exact}, perplexity of answers {s.perplexity:.3f}")
    if args.json:
        common.write_json(args.json, [dataclasses.asdict(s) for s in scores])


if __name__ == "__main__":
    sys.exit(main())
