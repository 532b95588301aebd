"""How much of its corpus a model can do: exact answers on held-out documents, and perplexity of their text.

A greedy answer is exact just when every token of the right one is the most likely after those before it, so
one pass over a document scores all of its turns. In the same pass a prediction block drafts every token of an
answer one ahead of the trunk, and a draft is accepted where it is the trunk's most likely token.

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

    A story's own text counts as no turn: it is told, not asked for. `accepted` is the share of the drafts of all
    that text which the trunk would accept, None of a model without a prediction block.
    """

    kind: str
    right: int
    turns: int
    perplexity: float
    accepted: float | None


def score(model: Model, kind: str, documents: int, seed: int = 0) -> Score:
    """Score `documents` held-out documents of a kind."""
    encoder = text.Encoder(model.tokenizer)
    drawn = itertools.islice(corpus.documents(seed, corpus.HELD_OUT, kind=kind), documents)
    turns: list[_Turn] = []
    while part := list(itertools.islice(drawn, ROWS)):
        turns += _score_part(model, encoder, part)
    asked = [turn for turn in turns if turn.asked]
    tokens = sum(turn.tokens for turn in turns)
    nats = sum(turn.nats for turn in turns) / tokens
    accepted = sum(turn.accepted for turn in turns) / tokens if model.config.nextn else None
    return Score(kind, sum(turn.exact for turn in asked), len(asked), math.exp(nats), accepted)


@dataclasses.dataclass(frozen=True)
class _Turn:
    asked: bool
    exact: bool
    nats: float
    tokens: int
    accepted: int  # of the tokens, those that a prediction block drafts as the trunk would


def _score_part(model: Model, encoder: text.Encoder, documents: list[corpus.Document]) -> list[_Turn]:
    encoded = [encoder.turns(document) for document in documents]
    rows = [[encoder.end, *itertools.chain.from_iterable(p + a for p, a in turns)] for turns in encoded]
    hidden = model.hidden(rows)
    log_p = np.asarray(jax.nn.log_softmax(model.logits(hidden)))
    drafts = _drafts(model, rows, hidden) if model.config.nextn else [None] * len(rows)
    scored = (score_row(*row) for row in zip(log_p, encoded, drafts, strict=True))
    return list(itertools.chain.from_iterable(scored))


def _drafts(model: Model, rows: list[list[int]], hidden: jax.Array) -> np.ndarray:
    """Of each token int (B, T) the next one that the block drafts from it and the trunk's state before it."""
    before = np.pad(model.normed(hidden), ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return np.asarray(model.forward_mtp(rows, before)[0]).argmax(axis=-1)


def score_row(
    log_p: np.ndarray, turns: list[tuple[list[int], list[int]]], drafts: np.ndarray | None = None
) -> list[_Turn]:
    """`log_p` f32 (T, V): row i foresees token i of the document, for the end token stands before it.

    `drafts` int (T,) are the prediction block's of the same tokens.
    """
    scored, start = [], 0
    for prompt, answer in turns:
        start += len(prompt)
        rows = log_p[start : start + len(answer)]
        nats = -float(rows[np.arange(len(answer)), answer].sum())
        best = rows.argmax(axis=-1)
        accepted = 0 if drafts is None else int((drafts[start : start + len(answer)] == best).sum())
        scored.append(_Turn(bool(prompt), bool((best == answer).all()), nats, len(answer), accepted))
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
        drafted = "" if s.accepted is None else f", {100 * s.accepted:.1f} % of drafts accepted"
        print(f"{kind:<12} {exact}, perplexity of answers {s.perplexity:.3f}{drafted}")
    if args.json:
        common.write_json(args.json, [dataclasses.asdict(s) for s in scores])


if __name__ == "__main__":
    sys.exit(main())
