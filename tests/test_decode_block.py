"""Blocks of tokens made on the device: the same tokens as one at a time, and the same state."""

from __future__ import annotations

import jax
import models
import numpy as np
import pytest
from support import relative_l2

from scarlet_jax import model as engine
from scarlet_jax.errors import BadInput
from scarlet_jax.generate import StateCache, Stats, generate
from scarlet_jax.ops import cpu

SHAPE = models.SHAPES["untied"]
PROMPT = models.tokens(SHAPE, 9).tolist()
SAMPLINGS = [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "seed": 5}]


def run(block: int | None, **options) -> tuple[list[int], Stats, StateCache]:
    stats, cache = Stats(), StateCache()
    options = {"max_tokens": 11, "stop": ()} | options
    model = models.model(SHAPE)
    return list(generate(model, PROMPT, block=block, stats=stats, cache=cache, **options)), stats, cache


# 11 tokens, of which the prompt gives the first: two full blocks and a half, and more than all.
@pytest.mark.parametrize("block", [4, 16, None])
@pytest.mark.parametrize("options", SAMPLINGS)
def test_the_same_tokens_as_one_at_a_time(block, options):
    tokens, stats, cache = run(block, **options)
    one_by_one, _, other = run(1, **options)
    assert tokens == one_by_one
    assert (stats.tokens, stats.finish) == (11, "length")
    (seen, state), (expected_seen, expected) = cache._entries["answer"], other._entries["answer"]
    assert seen == expected_seen == [*PROMPT, *tokens[:-1]]
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert relative_l2(ours, theirs) < 1e-5  # the same steps, compiled in another program


def test_what_comes_after_the_end_leaves_no_trace():
    free, _, _ = run(1, **SAMPLINGS[1])
    stop = free[6]
    end = free.index(stop)
    tokens, stats, cache = run(16, **SAMPLINGS[1] | {"stop": (stop,)})
    assert tokens == free[:end]
    assert stats.finish == "stop"
    seen, state = cache._entries["answer"]
    assert seen == [*PROMPT, *free[:end]]
    assert np.asarray(state.length).tolist() == [len(seen)]
    _, _, again = run(1, **SAMPLINGS[1] | {"stop": (stop,)})
    for ours, theirs in zip(
        jax.tree.leaves(state), jax.tree.leaves(again._entries["answer"][1]), strict=True
    ):
        assert relative_l2(ours, theirs) < 1e-5


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no kernels here: {cpu.unavailable()}")
def test_how_many_at_a_time_follows_from_what_a_token_reads(monkeypatch):
    small = models.model(SHAPE)
    assert small.tokens_at_a_time == engine.BLOCK
    reads = small.weight_bytes_per_token
    for between_looks, expected in ((5 * reads, 5), (reads // 2, 1)):
        monkeypatch.setattr(engine, "BYTES_BETWEEN_LOOKS", between_looks)
        assert models.changed(small).tokens_at_a_time == expected
    monkeypatch.undo()
    assert models.model(SHAPE, implementation="portable").tokens_at_a_time == 1


def test_a_block_of_none_is_refused():
    with pytest.raises(BadInput, match="block is 0, expected 1 or more"):
        run(0)
