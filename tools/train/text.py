"""From documents to rows of tokens: the tokenizer, trained on the corpus itself, and the batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.gguf import Metadata
from scarlet_jax.tokenizer import Tokenizer
from scarlet_jax.tools import synth_vocabulary
from scarlet_jax.tools.train import corpus
from scarlet_jax.tools.train.network import Batch

END = "<|endoftext|>"  # behind every document

# ChatML without thinking: a model this small has nothing to think.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# What is given counts little as a target: much of it is drawn at random and cannot be foreseen.
PROMPT_WEIGHT = 0.1


def vocabulary(size: int, seed: int) -> dict[str, Any]:
    """The `tokenizer.*` keys: byte-level BPE learnt from held-in documents, the family's special tokens."""
    documents = itertools.islice(corpus.documents(seed, corpus.TRAINING), 4000)
    texts = ("".join(turn.prompt + turn.answer for turn in document) for document in documents)
    return synth_vocabulary.metadata(size, texts) | {"tokenizer.chat_template": CHAT_TEMPLATE}


def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The engine's own tokenizer of these keys."""
    lists = ("tokenizer.ggml.token_type",)
    return Tokenizer(
        Metadata({k: np.array(v) if k in lists else v for k, v in metadata.items()}, "the tokenizer")
    )


class Encoder:
    """Documents as tokens; `end` is the token behind each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises BadInput for a vocabulary without the end token."""
        if END not in tokenizer.ids:
            raise BadInput(f"the vocabulary has no {END}; expected one made for this corpus")
        self._tokenizer = tokenizer
        self.end = tokenizer.ids[END]

    def turns(self, document: corpus.Document) -> list[tuple[list[int], list[int]]]:
        """The tokens of each turn's prompt and answer."""
        encode = self._tokenizer.encode
        return [(encode(turn.prompt), encode(turn.answer)) for turn in document]

    def encode(self, document: corpus.Document, told: float = 1.0) -> tuple[list[int], list[float]]:
        """A document's tokens, the end token among them, and how much each counts as a target.

        An answer counts 1. Of what is told without having been asked for, a token that was told before counts 1
        too, for it can be found again, and a new one `told`.
        """
        tokens: list[int] = []
        weight: list[float] = []
        for prompt, answer in self.turns(document):
            weight += [PROMPT_WEIGHT] * len(prompt)
            tokens += prompt
            for token in answer:
                weight.append(1.0 if prompt or token in tokens else told)
                tokens.append(token)
        return [*tokens, self.end], [*weight, 1.0]


def batch(
    encoder: Encoder, documents: Iterator[corpus.Document], rows: int, length: int, told: float = 1.0
) -> Batch:
    """`rows` rows of `length` + 1 tokens, each one document after another, the last cut off.

    The first row begins with the end token, as every document does that follows another, the next one without,
    as a prompt does that somebody types; and so on by turns.
    """
    encoded = [_row(encoder, documents, length + 1, told, marked=i % 2 == 0) for i in range(rows)]
    tokens, weight = zip(*encoded, strict=True)
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(weight, jnp.float32))


def _row(
    encoder: Encoder, documents: Iterator[corpus.Document], length: int, told: float, *, marked: bool
) -> tuple[list[int], list[float]]:
    tokens, weight = ([encoder.end], [0.0]) if marked else ([], [])
    while len(tokens) < length:
        more, counts = encoder.encode(next(documents), told)
        tokens += more
        weight += counts
    return tokens[:length], weight[:length]
