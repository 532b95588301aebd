"""Faults, and ways to make them: small changes of the right float64 forward.

A fault changes a function of the oracle, a weight, or the value of a tap on its way; nothing here knows how the
analyzer works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import oracle

ANY = r"-\d+"  # of every layer

Change = Callable[[oracle.Model], contextlib.AbstractContextManager[oracle.Model]]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One mistake.

    `ops`: taps (without layer) that may rightly be called the first broken one; `classes` and `causes` likewise.
    `layers`: how many layers have it ("all" or "one").
    """

    name: str
    group: str
    change: Change
    ops: tuple[str, ...]
    classes: tuple[str, ...]
    causes: tuple[str, ...]
    layers: str = "all"
    tokens: int = 70


@dataclasses.dataclass(frozen=True)
class Place:
    """Where faults are made: their group, the taps that show them first, and the classes that may be said."""

    group: str
    ops: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __call__(
        self, name: str, change: Change, *causes: str, layers: str = "all", tokens: int = 70
    ) -> Fault:
        """A fault here, with the names that it may be given."""
        classes = self.classes or (self.group,)
        return Fault(name, self.group, change, self.ops, classes, causes, layers, tokens)


# --- ways to change a forward ---------------------------------------------------------------------------------


def function(name: str, replacement: Callable[..., Any]) -> Change:
    """Replace a function of the oracle; the replacement gets the original first."""

    @contextlib.contextmanager
    def change(model: oracle.Model) -> Iterator[oracle.Model]:
        original = getattr(oracle, name)
        setattr(oracle, name, lambda *args, **kw: replacement(original, *args, **kw))
        try:
            yield model
        finally:
            setattr(oracle, name, original)

    return change


def weights(
    pattern: str, replacement: Callable[[np.ndarray, str, Mapping[str, np.ndarray]], np.ndarray]
) -> Change:
    """Replace every weight whose name matches."""

    @contextlib.contextmanager
    def change(model: oracle.Model) -> Iterator[oracle.Model]:
        changed = {
            n: (replacement(w, n, model.weights) if re.search(pattern, n) else w)
            for n, w in model.weights.items()
        }
        yield dataclasses.replace(model, weights=changed)

    return change


def tap(pattern: str, replacement: Callable[[np.ndarray, Callable[[str], np.ndarray]], np.ndarray]) -> Change:
    """Change a value on its way; the replacement may ask for earlier taps of the layer."""

    @contextlib.contextmanager
    def change(model: oracle.Model) -> Iterator[oracle.Model]:
        original = oracle._Taps.__call__

        def call(self: Any, name: str, x: np.ndarray) -> np.ndarray:
            if re.fullmatch(pattern, name):
                layer = name.rpartition("-")[2]
                x = replacement(x, lambda other: self[f"{other}-{layer}" if "-" not in other else other])
            return original(self, name, x)

        oracle._Taps.__call__ = call
        try:
            yield model
        finally:
            oracle._Taps.__call__ = original

    return change


def both(*changes: Change) -> Change:
    """Several changes at once."""

    @contextlib.contextmanager
    def change(model: oracle.Model) -> Iterator[oracle.Model]:
        with contextlib.ExitStack() as stack:
            for one in changes:
                model = stack.enter_context(one(model))
            yield model

    return change


def told(make: Callable[[oracle.Model], Change]) -> Change:
    """A change that has to know the model."""

    @contextlib.contextmanager
    def change(model: oracle.Model) -> Iterator[oracle.Model]:
        with make(model)(model) as changed:
            yield changed

    return change


def attention_only(replacement: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A replacement for a tap whose name delta-net layers have too."""

    def change(x: np.ndarray, get: Callable[[str], np.ndarray]) -> np.ndarray:
        try:
            get("gate_reshaped")
        except KeyError:
            return x
        return replacement(x, get)

    return change


def product(replacement: Callable[..., np.ndarray]) -> Change:
    """Another product: replacement(original, model, name, x)."""

    @contextlib.contextmanager
    def change(model: oracle.Model) -> Iterator[oracle.Model]:
        original = oracle.Model.linear
        oracle.Model.linear = lambda self, name, x: replacement(original, self, name, x)
        try:
            yield model
        finally:
            oracle.Model.linear = original

    return change


def inputs(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """A weight whose inputs are changed: (out, in) -> (out, in)."""
    return lambda w, *_: change(w)


def on_operands(change: Callable[..., tuple]) -> Change:
    """The delta rule on other operands: change(q, k, v, g, beta) -> the same five."""
    return function("delta_rule", lambda original, *args: original(*change(*args)))


# --- what several collections need ------------------------------------------------------------------------------


def key(name: str, value: Any) -> Change:
    """Another value of a metadata key."""

    @contextlib.contextmanager
    def change(model: oracle.Model) -> Iterator[oracle.Model]:
        arch = model.metadata["general.architecture"]
        yield dataclasses.replace(model, metadata={**model.metadata, f"{arch}.{name}": value})

    return change


def late(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return (
        ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000)
        .astype(np.uint32)
        .view(np.float32)
        .astype(np.float64)
    )


def f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


def delta(
    step: Callable[..., Any], rounding: Callable = lambda s: s, boundary: Callable | None = None
) -> Change:
    """The delta rule with another step: step(state, q, k, v, g, beta) -> state, output."""

    def rule(_original, q, k, v, g, beta):
        T, Hv, Dv = v.shape
        states, outputs = np.zeros((T + 1, Hv, Dv, k.shape[-1])), np.empty_like(v)
        for t in range(T):
            state = states[t]
            if boundary is not None and t and t % 64 == 0:
                state = boundary(state)
            states[t + 1], outputs[t] = step(state, q[t], k[t], v[t], g[t], beta[t])
            states[t + 1] = rounding(states[t + 1])
        return outputs, states

    return function("delta_rule", rule)


def delta_step(state, q, k, v, g, beta, *, decay=np.exp, correct=True, late_decay=False, read_first=False):
    before = state
    if not late_decay:
        state = state * decay(g)[:, None, None]
    known = np.einsum("hvk,hk->hv", state, k) if correct else 0
    state = state + (beta[:, None] * (v - known))[:, :, None] * k[:, None]
    if late_decay:
        state = state * decay(g)[:, None, None]
    return state, np.einsum("hvk,hk->hv", before if read_first else state, q)


def step(**how: Any) -> Callable[..., Any]:
    """The right step but for `how`."""
    return lambda *args: delta_step(*args, **how)


def tiled_to_grouped(x: np.ndarray, axis: int, keys: int, dim: int) -> np.ndarray:
    """Value heads in the other of the two orders."""
    heads = x.shape[axis] // dim
    order = np.arange(heads).reshape(-1, keys).T.ravel()
    index = (order[:, None] * dim + np.arange(dim)).ravel()
    return np.take(x, index, axis=axis)


def silu_of(width: Callable[[np.ndarray], bool], other: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Another activation, where the argument has a given look (convolution, feed-forward, gate)."""
    return function("silu", lambda original, x: other(x) if width(x) else original(x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax_with(scores_to_scores: Callable = lambda s: s, visible: Callable | None = None) -> Change:
    def softmax(original, scores):
        T, _, S = scores.shape
        scores = scores_to_scores(scores)
        if visible is None:
            return original(scores)
        seen = visible(np.arange(T)[:, None], np.arange(S)[None])[:, None]
        e = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(axis=-1, keepdims=True)), 0)
        return e / e.sum(axis=-1, keepdims=True)

    return function("causal_softmax", softmax)


# --- the running model ------------------------------------------------------------------------------------------

KEYS = DIM = HEAD = 1  # the running model's Hk, Dk and H, set by `apply`
ROPE: tuple[Any, ...] = ()  # and its rotary dims, sections and base


@contextlib.contextmanager
def apply(fault: Fault, model: oracle.Model) -> Iterator[oracle.Model]:
    """The model with the fault, and the oracle with it while the context lasts."""
    global KEYS, DIM, HEAD, ROPE
    ROPE = tuple(model.key(f"rope.{name}") for name in ("dimension_count", "dimension_sections", "freq_base"))
    KEYS, DIM, HEAD = (
        model.key("ssm.group_count"),
        model.key("ssm.state_size"),
        model.key("attention.key_length"),
    )
    with fault.change(model) as changed:
        yield changed
