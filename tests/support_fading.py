"""A model small enough to follow by hand, with the interface that generation needs."""

from __future__ import annotations

import types
from typing import Any

import jax.numpy as jnp
import numpy as np

DECAY = np.float32(0.7)
WIDTH = 5


def weights(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and head, f32 (V, WIDTH) each."""
    embedding, head = np.random.default_rng(0).normal(size=(2, vocabulary, WIDTH)).astype(np.float32)
    return embedding, head


class Fading:
    """It remembers a fading sum of embeddings; notes its work in `calls`; and spoils states given to it."""

    tokens_at_a_time = 1

    def __init__(self, embedding, head, context_length=100, stop=(), tokenizer=None, gguf=None):
        self.embedding, self.head = embedding, head
        self.context_length = context_length
        self.config = types.SimpleNamespace(vocabulary_size=len(embedding), name="fading")
        self.tokenizer = tokenizer or types.SimpleNamespace(eos_ids=frozenset(stop))
        self.gguf = gguf
        self.calls = []
        self.at_end = lambda: None

    def last_logits(self, tokens, state: Any = None, *, consume=False, positions=None):
        assert positions is None  # it knows no images
        self.calls.append(list(tokens))
        memory = jnp.zeros(WIDTH) if state is None else state + 0
        for token in tokens:
            memory = DECAY * memory + self.embedding[token]
        if consume and state is not None:
            state.delete()
        self.at_end()
        return self.head @ memory, memory
