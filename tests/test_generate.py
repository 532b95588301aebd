"""Generation with a model small enough to follow by hand, and with a real tiny one."""

from __future__ import annotations

import contextlib
import itertools
import random
import types
from typing import Any

import jax.numpy as jnp
import models
import numpy as np
import pytest
from support_fading import DECAY, Fading, weights

from scarlet_jax.errors import BadInput
from scarlet_jax.generate import StateCache, Stats, generate, stream_text

V = 23
EMBEDDING, HEAD = weights(V)
PROMPT = [3, 1, 4, 1, 5]


def fading(embedding=EMBEDDING, **options) -> Any:
    return Fading(embedding, HEAD, **options)


def logits_after(tokens):
    memory = np.zeros(EMBEDDING.shape[1], np.float32)
    for token in tokens:
        memory = DECAY * memory + EMBEDDING[token]
    return HEAD @ memory


def greedy(tokens, count):
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[-count:]


def take(iterator, count):
    """The first `count`, and then no more: the iterator is closed, as by a caller who leaves a loop."""
    with contextlib.closing(iterator):
        return list(itertools.islice(iterator, count))


# --- Tokens -------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_most_likely_token_each_time():
    assert list(generate(fading(), PROMPT, max_tokens=12)) == greedy(PROMPT, 12)


def test_a_prompt_may_be_any_array_of_ids():
    for prompt in (np.array(PROMPT), jnp.array(PROMPT), tuple(PROMPT)):
        assert list(generate(fading(), prompt, max_tokens=3)) == greedy(PROMPT, 3)


def test_a_real_model_continues_as_its_logits_say():
    model = models.model(models.SHAPES["untied"])
    prompt = models.tokens(models.SHAPES["untied"], 10).tolist()
    tokens = [*prompt, *model.generate(prompt, max_tokens=6, stop=())]
    logits, _ = model.forward(tokens[:-1])
    assert tokens[len(prompt) :] == np.asarray(logits)[len(prompt) - 1 :].argmax(-1).tolist()


def test_a_seed_fixes_the_tokens_and_another_changes_them():
    def tokens(seed):
        return list(generate(fading(), PROMPT, max_tokens=20, temperature=1.5, seed=seed))

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(8)}) == 8
    assert len({tokens(seed)[0] for seed in range(8)}) > 1  # the first token too


def test_without_a_seed_one_is_drawn_and_reported():
    first, again = Stats(), Stats()
    tokens = list(generate(fading(), PROMPT, max_tokens=20, temperature=1.5, stats=first))
    assert tokens != list(generate(fading(), PROMPT, max_tokens=20, temperature=1.5, stats=again))
    assert first.seed != again.seed
    assert tokens == list(generate(fading(), PROMPT, max_tokens=20, temperature=1.5, seed=first.seed))


def test_sampling_goes_by_the_filters():
    allowed = set(np.argsort(-logits_after(PROMPT))[:3].tolist())
    firsts = {next(generate(fading(), PROMPT, temperature=9.0, top_k=3, seed=seed)) for seed in range(40)}
    assert firsts == allowed


def test_a_stop_token_ends_it_and_is_not_part_of_it():
    expected = greedy(PROMPT, 8)
    stop = expected[5]
    before = expected[: expected.index(stop)]
    for model, stops in ((fading(stop=[stop]), None), (fading(stop=[0]), [stop])):
        stats = Stats()
        assert list(generate(model, PROMPT, stop=stops, stats=stats)) == before
        assert (stats.finish, stats.tokens) == ("stop", len(before))


def test_it_ends_after_max_tokens_or_with_the_context():
    stats = Stats()
    assert len(list(generate(fading(), PROMPT, max_tokens=4, stats=stats))) == 4
    assert stats.finish == "length"
    assert len(list(generate(fading(context_length=12), PROMPT, max_tokens=40, stats=stats))) == 7
    assert stats.finish == "context"
    model = fading(context_length=12)
    assert list(generate(model, PROMPT, max_tokens=0)) == []
    assert model.calls == []


def test_stats_count_what_went_through_the_model():
    stats = Stats()
    assert (stats.prefill_tps, stats.decode_tps) == (None, None)
    model = fading()
    list(generate(model, PROMPT, max_tokens=6, stats=stats))
    assert [len(call) for call in model.calls] == [5, 1, 1, 1, 1, 1]
    assert (stats.prompt_tokens, stats.reused_tokens, stats.tokens, stats.decode_steps) == (5, 0, 6, 4)
    assert stats.prefill_tps == 5 / stats.prefill_s
    assert stats.decode_tps == 4 / stats.decode_s


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": []}, "prompt: empty, expected at least one token"),
        ({"tokens": [1] * 100}, "prompt: 100 tokens, expected fewer than the context of 100"),
        ({"tokens": [1, V]}, "prompt: token 23 is outside the vocabulary, expected 0 to 22"),
        ({"tokens": [-1]}, "prompt: token -1 is outside the vocabulary"),
        ({"max_tokens": -1}, "max_tokens is -1, expected 0 or more"),
        ({"seed": -1}, "seed is -1, expected 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"temperature": -1}, "temperature is -1.0"),
        ({"top_p": 7}, "top_p is 7.0"),
    ],
)
def test_bad_requests_are_refused_at_once(options, message):
    with pytest.raises(BadInput, match=message):
        generate(fading(), **{"tokens": PROMPT, **options})


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("spoilt", [0, 2])
def test_logits_that_are_not_numbers_end_it_with_a_reason(temperature, spoilt):
    answer = greedy(PROMPT, 5)
    embedding = EMBEDDING.copy()
    embedding[[PROMPT[-1], *answer][spoilt]] = np.nan
    seen = len(PROMPT) + spoilt
    ids = generate(fading(embedding), PROMPT, temperature=temperature, top_k=1)
    with pytest.raises(BadInput, match=f"the logits after token {seen} are not finite numbers"):
        list(ids)


# --- States that are used again -----------------------------------------------------------------------------


def test_a_longer_prompt_goes_on_from_the_answer_before():
    model, cache, stats = fading(), StateCache(), Stats()
    answer = list(generate(model, PROMPT, max_tokens=4, cache=cache))
    longer = [*PROMPT, *answer, 9, 2]
    model.calls.clear()
    again = list(generate(model, longer, max_tokens=4, cache=cache, stats=stats))
    assert again == greedy(longer, 4)
    assert model.calls[0] == [answer[-1], 9, 2]  # the last token was never put through
    assert (stats.reused_tokens, stats.prompt_tokens) == (8, 3)


def test_a_rewritten_answer_goes_on_from_the_steady_part():
    model, cache = fading(), StateCache()
    list(generate(model, PROMPT, max_tokens=4, cache=cache, steady=3))
    rewritten = [*PROMPT[:3], 8, 8, 8]
    model.calls.clear()
    assert list(generate(model, rewritten, max_tokens=4, cache=cache, steady=5)) == greedy(rewritten, 4)
    assert model.calls[:2] == [[8, 8], [8]]


def test_another_prompt_begins_anew():
    model, cache = fading(), StateCache()
    list(generate(model, PROMPT, max_tokens=4, cache=cache, steady=3))
    for other in ([7, *PROMPT], PROMPT[:2], PROMPT[:3]):  # of the last, all is known, but not its logits
        model.calls.clear()
        assert list(generate(model, other, max_tokens=2, cache=cache)) == greedy(other, 2)
        assert model.calls[0] == other


def test_the_same_prompt_again_gives_the_same_answer():
    model, cache = fading(), StateCache()
    for _ in range(3):
        assert list(generate(model, PROMPT, max_tokens=4, cache=cache, steady=4)) == greedy(PROMPT, 4)


def test_a_caller_may_leave_and_the_state_is_kept():
    model, cache = fading(), StateCache()
    answer = take(generate(model, PROMPT, cache=cache), 3)
    model.calls.clear()
    longer = [*PROMPT, *answer, 6]
    assert list(generate(model, longer, max_tokens=3, cache=cache)) == greedy(longer, 3)
    assert model.calls[0] == [answer[-1], 6]


@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_interrupted_step_leaves_no_spoilt_state(call):
    model, cache = fading(), StateCache()

    def interrupt():
        if len(model.calls) == call:
            model.at_end = lambda: None
            raise KeyboardInterrupt

    model.at_end = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(generate(model, PROMPT, cache=cache, steady=3))
    longer = [*PROMPT, *greedy(PROMPT, 4)]
    assert list(generate(model, longer, max_tokens=3, cache=cache)) == greedy(longer, 3)


def test_random_conversations_read_as_without_a_cache():
    rng = random.Random(4)
    model, cache, tokens = fading(), StateCache(), [1]
    for _ in range(40):
        tokens = [*tokens[: rng.randint(1, len(tokens))], *rng.choices(range(V), k=rng.randint(1, 4))][:60]
        steady = rng.randint(0, len(tokens) + 2)
        answer = take(generate(model, tokens, cache=cache, steady=steady), rng.randint(0, 5))
        assert answer == greedy(tokens, len(answer)) if answer else True
        tokens = [*tokens, *answer]


# --- Text ---------------------------------------------------------------------------------------------------


def letters(pieces) -> Any:
    """A tokenizer whose tokens are these pieces of bytes."""
    return types.SimpleNamespace(piece=lambda id, special=True: pieces[id])


def streamed(pieces, stop=()):
    return list(stream_text(letters(pieces), range(len(pieces)), stop=stop))


def test_text_comes_with_each_token():
    assert streamed([b"a", b"bc", b"", b"d"]) == ["a", "bc", "d"]
    assert streamed([b"\xc3", b"\xa9", b"\xe2\x82"]) == ["\xe9", "\ufffd"]
    assert streamed([]) == []


def test_text_ends_before_a_stop_string_wherever_tokens_part_it():
    for pieces in ([b"one END two"], [b"one E", b"ND two"], [*map(bytes, zip(b"one END two", strict=True))]):
        assert "".join(streamed(pieces, ["END"])) == "one "
    assert "".join(streamed([b"a<b", b"c>"], ["<bd", "c>"])) == "a<b"


def test_what_may_begin_a_stop_string_waits_and_no_more():
    assert streamed([b"a", b"b<", b"/", b"x", b"<"], ["</s>"]) == ["a", "b", "</x", "<"]
    assert streamed([b"aab"], ["aab"]) == []
    assert streamed([b"aa", b"ab"], ["aab"]) == ["a"]


def test_no_token_is_asked_for_after_a_stop_string():
    pieces = iter(range(9))
    assert "".join(stream_text(letters([b"x"] * 3 + [b"#"] * 9), pieces, stop=["#"])) == "xxx"
    assert next(pieces) == 4


def test_random_pieces_stop_where_a_stop_string_is_first_complete():
    rng = random.Random(2)
    for _ in range(400):
        pieces = ["".join(rng.choices("ab\xe9", k=rng.randint(0, 3))) for _ in range(8)]
        stop = ["".join(rng.choices("ab\xe9", k=rng.randint(1, 4))) for _ in range(2)]
        expected = ""
        for piece in pieces:
            expected += piece
            if any(marker in expected for marker in stop):
                expected = expected[: min(expected.find(marker) % 99 for marker in stop)]  # -1 becomes 98
                break
        assert "".join(streamed([piece.encode() for piece in pieces], stop)) == expected
