"""Generation: prefill, then token by token until something ends it; and its text as it comes."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from scarlet_jax import hosts
from scarlet_jax.errors import BadInput
from scarlet_jax.sampling import INVALID, Sampling, most_likely, sample
from scarlet_jax.tokenizer import Detokenizer, Tokenizer, held_back
from scarlet_jax.types import Array

if TYPE_CHECKING:
    from scarlet_jax.model import Model


@dataclasses.dataclass
class Stats:
    """What a generation did, filled in as it goes.

    `prompt_tokens` went through the model in `prefill_s` seconds, beside `reused_tokens` that a `StateCache`
    had; `tokens` were generated. The first program of decoding may be compiled, so `decode_s` is the time of
    the `decode_steps` after it. `seed` is the one that was used, `finish` what ended it: a stop token, the
    number of tokens asked for, or a full context; None if the caller left.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_s: float = 0.0
    tokens: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0
    seed: int | None = None
    finish: Literal["stop", "length", "context"] | None = None

    @property
    def prefill_tps(self) -> float | None:
        """Prompt tokens a second, compilation included."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else None

    @property
    def decode_tps(self) -> float | None:
        """Generated tokens a second; None before the second step."""
        return self.decode_steps / self.decode_s if self.decode_s else None


class StateCache:
    """States of texts that the model has been through, for a later prompt to go on from.

    Two are held: that of the last prompt's steady part (what the next prompt will begin with even if the
    template rewrites the answer), and that of the last prompt with its answer.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[list[int], Any]] = {}

    def keep(self, place: Literal["prompt", "answer"], tokens: Sequence[int], state: Any) -> None:
        """Hold the state after `tokens`, in place of the last one there."""
        self._entries[place] = (list(tokens), state)

    def find(self, tokens: Sequence[int]) -> tuple[int, Any]:
        """The longest known beginning of `tokens`, short of all: its length, and the state after it."""
        fitting = [
            (len(seen), state)
            for seen, state in self._entries.values()
            if len(seen) < len(tokens) and seen == list(tokens[: len(seen)])
        ]
        return max(fitting, key=lambda entry: entry[0], default=(0, None))


def generate(
    model: Model,
    tokens: Sequence[int] | np.ndarray | Array,
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Collection[int] | None = None,
    cache: StateCache | None = None,
    steady: int = 0,
    stats: Stats | None = None,
    block: int | None = None,
    positions: np.ndarray | None = None,
) -> Generator[int, None, None]:
    """Continue `tokens`, yielding ids until one of `stop` (not yielded), `max_tokens` or a full context.

    The filters are those of `scarlet_jax.sampling`; temperature 0 is greedy. The same `seed` gives the same
    tokens; None draws one. `stop` defaults to the tokenizer's `eos_ids`. With a `cache`, the part of the
    prompt that it knows is not computed again, and the states after the first `steady` tokens and at the end
    are kept in it. `block` tokens are made on the device between two looks at them (by default the model's
    `tokens_at_a_time`): the same tokens. `positions` of a prompt with images, (3 or 4, T) as `Model.forward`
    takes them; a cache does not look at them, so it cannot be had as well. Raises BadInput at once for an empty
    prompt, one that the context cannot hold, an id outside the vocabulary or a number out of range; and later if
    the logits are not numbers.
    """
    prompt = np.asarray(tokens).tolist()
    _check_prompt(model, prompt)
    if max_tokens is not None and max_tokens < 0:
        raise BadInput(f"max_tokens is {max_tokens}, expected 0 or more")
    if seed is not None and not 0 <= seed < 2**32:
        raise BadInput(f"seed is {seed}, expected 0 to {2**32 - 1}")
    params = Sampling(float(temperature), int(top_k), float(top_p), float(min_p)).checked()
    if block is None:
        block = model.tokens_at_a_time
    if block < 1:
        raise BadInput(f"block is {block}, expected 1 or more")
    if positions is not None and cache is not None:
        raise BadInput("positions: a cache knows a prompt by its tokens; expected one or the other")
    stats = Stats() if stats is None else stats
    stats.seed = hosts.agreed(secrets.randbits(32)) if seed is None else seed
    run = _Run(model, prompt, positions, jax.random.key(stats.seed), params, cache or StateCache(), stats)
    stop = model.tokenizer.eos_ids if stop is None else stop
    return run.ids(max_tokens, frozenset(stop), min(steady, len(prompt) - 1), block)


def _check_prompt(model: Model, prompt: list[int]) -> None:
    if not prompt:
        raise BadInput("prompt: empty, expected at least one token")
    size, context = model.config.vocabulary_size, model.context_length
    if len(prompt) >= context:
        raise BadInput(f"prompt: {len(prompt)} tokens, expected fewer than the context of {context}")
    outside = next((id for id in prompt if not 0 <= id < size), None)
    if outside is not None:
        raise BadInput(f"prompt: token {outside} is outside the vocabulary, expected 0 to {size - 1}")


class _Run:
    """One generation: what the model has seen, its state after that, and the logits of what comes next."""

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        positions: np.ndarray | None,
        key: Array,
        params: Sampling,
        cache: StateCache,
        stats: Stats,
    ) -> None:
        self.model, self.prompt, self.positions = model, prompt, positions
        self.key, self.params, self.cache, self.stats = key, params, cache, stats
        self.seen: list[int] = []
        self.state: Any = None

    def ids(
        self, max_tokens: int | None, stop: frozenset[int], steady: int, block: int
    ) -> Generator[int, None, None]:
        """The generated ids, with `stats` and `cache` kept up to date wherever the caller stops."""
        room = self.model.context_length - len(self.prompt)
        limit = room if max_tokens is None else min(max_tokens, room)
        try:
            if limit:
                token = self._prefill(steady)
            ready: list[int] = []  # tokens that the device has made and nobody has seen
            for step in range(limit):
                if step and block > 1:
                    ready = ready or self._decode_block(token, step, stop, min(block, limit - step), block)
                    token = ready.pop(0)
                elif step:
                    token = self._decode(token, step)
                if token in stop:
                    self.stats.finish = "stop"
                    return
                self.stats.tokens += 1
                yield token
            self.stats.finish = "context" if limit == room else "length"
        finally:
            if self.state is not None:
                self.cache.keep("answer", self.seen, self.state)

    def _prefill(self, steady: int) -> int:
        """Everything of the prompt that the cache does not know; the first token."""
        began = time.perf_counter()
        reused, self.state = self.cache.find(self.prompt)
        self.seen = self.prompt[:reused]
        if steady > reused:
            self._read(steady)
            self.cache.keep("prompt", self.seen, self.state)
        token = self._sample(self._read(len(self.prompt)), 0)
        self.stats.reused_tokens, self.stats.prompt_tokens = reused, len(self.prompt) - reused
        self.stats.prefill_s = time.perf_counter() - began
        return token

    def _read(self, end: int) -> Array:
        """The prompt from where we are to `end`; the logits after it."""
        part = slice(len(self.seen), end)
        positions = None if self.positions is None else np.asarray(self.positions)[..., part]
        return self._advance(self.prompt[part], own=False, positions=positions)

    def _decode(self, token: int, step: int) -> int:
        began = time.perf_counter()
        token = self._sample(self._advance([token], own=True), step)
        if step > 1:
            self.stats.decode_steps += 1
            self.stats.decode_s += time.perf_counter() - began
        return token

    def _decode_block(self, token: int, step: int, stop: frozenset[int], count: int, block: int) -> list[int]:
        """The next `count` tokens, or fewer if one of `stop` is among them, which is then the last."""
        began = time.perf_counter()
        state, self.state = self.state, None
        made, state = self.model.decode_block(
            token, state, self.key, step, self.params, stop=sorted(stop), count=count, block=block
        )
        self.seen += [token, *made[:-1]]
        self.state = state
        if made[-1] == INVALID:
            raise self._not_finite()
        if step > 1:
            self.stats.decode_steps += len(made)
            self.stats.decode_s += time.perf_counter() - began
        return made

    def _advance(self, tokens: list[int], *, own: bool, positions: np.ndarray | None = None) -> Array:
        """Put tokens through the model. `own`: nobody else holds the state, so its buffers may be reused."""
        state, self.state = self.state, None  # until the call is through there is no state to keep
        logits, state = self.model.last_logits(tokens, state, consume=own, positions=positions)
        self.seen += tokens
        self.state = state
        return logits

    def _sample(self, logits: Array, step: int) -> int:
        greedy = self.params.temperature <= 0
        token = int(most_likely(logits) if greedy else _next_token(logits, self.key, step, self.params))
        if token == INVALID:
            raise self._not_finite()
        return token

    def _not_finite(self) -> BadInput:
        return BadInput(
            f"the logits after token {len(self.seen)} are not finite numbers: "
            "a weight of this model is NaN or infinite, or an activation overflowed"
        )


@jax.jit
def _next_token(logits: Array, key: Array, step: int | Array, params: Sampling) -> Array:
    """Logits f32 (V,) -> int32 (): the draw number `step` of a generation."""
    return sample(logits[None], jax.random.fold_in(key, step), params)[0]


def stream_text(
    tokenizer: Tokenizer, ids: Iterable[int], *, stop: Sequence[str] = (), special: bool = False
) -> Iterator[str]:
    """The text of ids as they come, never half a character, up to the `stop` string that is complete first.

    What may turn out to be the beginning of a stop string is held back. `special`: whether control tokens
    show.
    """
    detokenizer = Detokenizer(tokenizer, special)
    waiting = ""
    for id in ids:
        waiting += detokenizer.push(id)
        found = [at for at in map(waiting.find, stop) if at >= 0]
        certain = min(found) if found else len(waiting) - held_back(waiting, stop)
        if certain:
            yield waiting[:certain]
        if found:
            return
        waiting = waiting[certain:]
    if rest := waiting + detokenizer.flush():
        yield rest
