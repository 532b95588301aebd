"""The right operation with another weight, the output of another tap, a product's inputs in another order."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from scarlet_jax.tools.parity.arithmetic import ROUNDINGS
from scarlet_jax.tools.parity.graph import FAILURES, find
from scarlet_jax.tools.parity.operands import channel_orders, inputs_read, same_array
from scarlet_jax.tools.parity.weights import LARGE

Make = Callable[..., Any]

# Pairs of taps whose exchange has a name of its own.
_NAMED = {
    frozenset(("ffn_gate", "ffn_up")): "swapped-gate-up",
    frozenset(("ffn_moe_gate", "ffn_moe_up")): "swapped-gate-up",
}


_COPY = 0.99  # of the residual: below that it is like the other tap, and something else


def other_taps(case: Any, pair: Any, make: Make) -> list[Any]:
    """Our output is what the reference calls by another name in the same layer."""
    found, op, layer = [], case.tap.op, case.tap.layer
    for name in pair.reference.taps:
        other, _, number = name.rpartition("-")
        if layer is None or number != str(layer) or other == op:
            continue
        if case.op is not None and other in same_array(op):
            continue
        candidate = np.asarray(pair.reference.taps[name], np.float64)
        if candidate.size != case.ours.size or candidate.dtype.kind != "f":
            continue
        explained = case.share(candidate.reshape(case.ours.shape))
        cause = _NAMED.get(
            frozenset((op, other)), "wrong-weight" if _both_products(case, other) else "wrong-tap"
        )
        if explained > _COPY:
            text = f"ours is the reference's {name}: {explained:.2%}"
            found.append(make(cause, explained, text, "structure", 4))
        if cause in ("wrong-weight", "swapped-gate-up"):
            found += _dealt(case, name, candidate.reshape(len(case.ours), -1), make)
    return found


def _dealt(case: Any, name: str, other: np.ndarray, make: Make) -> Iterator[Any]:
    """Two products stored as one and taken apart the wrong way: row by row for half by half, or the reverse."""
    own = case.right.reshape(len(case.ours), -1)
    for parts in ((own, other), (other, own)):
        whole, mixed = np.concatenate(parts, axis=1), np.stack(parts, axis=-1).reshape(len(own), -1)
        n = own.shape[1]
        for label, x in (("every other row", whole[:, 0::2]), ("every other row", whole[:, 1::2]),
                         ("half", mixed[:, :n]), ("half", mixed[:, n:])):  # fmt: skip
            explained = case.share(x.reshape(case.ours.shape))
            text = f"ours is {label} of this product and {name} together: {explained:.2%}"
            yield make("weight-layout", explained, text, "structure", 4)


def _both_products(case: Any, other: str) -> bool:
    """Whether both taps are products of one input: then it is the weight that was exchanged."""
    found = find(other, case.tap.kind)
    if case.op is None or found is None or case.view is None:
        return False
    return (
        case.op.linear and found.linear and inputs_read(case.view, case.op) == inputs_read(case.view, found)
    )


def other_weights(case: Any, weights: Mapping, make: Make) -> list[Any]:
    """The operation re-run with every other weight of the same shape in this layer, and its own of other layers.

    Its weight, or one of an operation before it that was not dumped.
    """
    if case.view is None or case.op is None:
        return []
    probe = case.view.fresh()
    with contextlib.suppress(*FAILURES):
        case.op.run(probe)
    stems = dict.fromkeys(op.weight for op in (case.op, *probe.computed) if op.weight)
    return [found for stem in stems for found in _other_weight(case, stem, weights, make)]


def _other_weight(case: Any, stem: str, weights: Mapping, make: Make) -> Iterator[Any]:
    layer = case.tap.layer
    key = (layer if (layer, stem) in weights else None, stem)
    if key not in weights or (hasattr(weights, "elements") and weights.elements(key) > LARGE):
        return
    shape = np.shape(weights[key])
    for other, label in _candidates(weights, key):
        if np.shape(weights[other]) != shape:
            continue
        explained = _rerun(case, stem, np.asarray(weights[other]))
        cause = _NAMED.get(frozenset((stem, other[1])), "wrong-weight")
        yield make(cause, explained, f"re-run with {label}: {explained:.2%} explained", "swap", 1)
    own = np.asarray(weights[key])
    for label, change in _rearrangements(case, stem, shape):
        explained = _rerun(case, stem, change(own))
        vector = len(shape) < 2 and shape != (case.view.facts.value_heads,)
        cause = "head-permutation" if "heads" in label and not vector else "weight-layout"
        yield make(cause, explained, f"re-run with the weight {label}: {explained:.2%}", "swap", 3)
    for label, rounding in ROUNDINGS.items():
        explained = _rerun(case, stem, rounding(own))
        text = f"re-run with the weight rounded to {label}: {explained:.2%} explained"
        yield make("weight-precision", explained, text, "swap", 3)


def _candidates(
    weights: Mapping, key: tuple[int | None, str]
) -> Iterator[tuple[tuple[int | None, str], str]]:
    layer, stem = key
    if layer is None:
        for other in ("token_embd", "output"):
            if other != stem and (None, other) in weights:
                yield (None, other), other
        return
    for other in _STEMS:
        if other != stem and (layer, other) in weights:
            yield (layer, other), f"{other} of this layer"
    for by in (1, -1, 2, -2, 3, -3):
        if (layer + by, stem) in weights:
            yield (layer + by, stem), f"{stem} of layer {layer + by}"


_STEMS = (
    "attn_norm",
    "post_attention_norm",
    "attn_q_norm",
    "attn_k_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_gate",
    "ssm_alpha",
    "ssm_beta",
    "ffn_gate",
    "ffn_up",
)


def _rearrangements(
    case: Any, stem: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    facts = case.view.facts
    rows = shape[0] if shape else 0
    for dim in sorted({1, facts.value_dim} - {0}) if case.tap.klass in ("ssm", "attention") else ():
        for label, order in _head_orders(dim, facts):
            index = order(rows)
            if index is not None:
                yield f"with its rows' heads of {dim} {label}", lambda w, index=index: w[index]
    if len(shape) == 2:
        yield "transposed and reshaped", lambda w: w.T.reshape(w.shape)
        yield "with rows reversed", lambda w: w[::-1]


def _rerun(case: Any, stem: str, weight: np.ndarray) -> float:
    view = case.view.fresh()
    original = view.weight
    view.weight = lambda name: weight.astype(view.dtype) if name == stem else original(name)
    try:
        with np.errstate(all="ignore"):
            value = np.asarray(case.op.run(view), np.float64)
    except FAILURES:
        return 0.0
    return case.share(value.reshape(case.ours.shape)) if value.size == case.ours.size else 0.0


def other_inputs(case: Any, make: Make) -> list[Any]:
    """A product whose input (or weight columns) has its heads in another order."""
    if (
        case.op is None
        or not case.op.linear
        or case.view is None
        or case.tap.klass not in ("ssm", "attention")
    ):
        return []
    facts, found = case.view.facts, []
    for dim in sorted({facts.value_dim, facts.head_dim, facts.key_dim} - {0, 1}):
        for label, order in _head_orders(dim, facts):
            explained = _reordered(case, order)
            if explained is not None:
                text = f"re-run with the input's heads of {dim} {label}: {explained:.2%} explained"
                found.append(make("head-permutation", explained, text, "swap", 1))
    return found


def unknown_matrix(case: Any, pair: Any, make: Make) -> list[Any]:
    """A product with a matrix that nobody gave: on other inputs than it should have, or with another layer's matrix.

    The inputs as supposed are combined from the reference's, and the outputs must be the same combination. What
    is outside the span of the reference's inputs nobody can foretell: where that is much, nothing is said.
    """
    tap = case.tap
    if case.op is None or not case.op.linear or tap.local is None or tap.local.method != "span":
        return []
    (source,) = tap.local.inputs
    x, y = _rows_of(pair.ours, source), _rows_of(pair.ours, tap.name)
    known = _Matrix(_rows_of(pair.reference, source), _rows_of(pair.reference, tap.name))
    supposed = itertools.chain(
        _supposed_inputs(x, pair.reference.facts), _other_inputs(case, pair, source, x)
    )
    found = [make(*guess, "swap", 5) for guess in _foretold(case, known, supposed, y)]
    for layer in (tap.layer + by for by in (-1, 1, -2, 2)) if tap.layer is not None else ():
        names = [f"{name.rpartition('-')[0]}-{layer}" for name in (source, tap.name)]
        if all(name in pair.reference.taps for name in names):
            other = _Matrix(*(_rows_of(pair.reference, name) for name in names))
            guess = [("wrong-weight", f"the matrix is that of layer {layer}", x)]
            found += [make(*told, "swap", 5) for told in _foretold(case, other, guess, y)]
    return found


def _rows_of(run: Any, name: str) -> np.ndarray:
    x = np.asarray(run.taps[name], np.float64)
    return x.reshape(len(x), -1)


class _Matrix:
    """A matrix as far as inputs x (T, in) and outputs y (T, out) tell."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        self.x, self.y = x, y
        gram = x @ x.T
        self._solve = x.T @ np.linalg.inv(gram + 1e-10 * np.trace(gram) / len(gram) * np.eye(len(gram)))
        self._gain = float((y**2).sum() / max((x**2).sum(), 1e-300))

    def times(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """Its product with other inputs, and the energy of what they have beyond those known."""
        mixing = x @ self._solve
        return mixing @ self.y, self._gain * float(((x - mixing @ self.x) ** 2).sum())


def _foretold(
    case: Any, known: _Matrix, supposed: Iterable[tuple[str, str, np.ndarray]], y: np.ndarray
) -> Iterator[tuple[str, float, str]]:
    """(name, explained, text) of each of the (name, text, inputs) supposed."""
    energy = min(float((case.residual**2).sum()), float((y**2).sum()))
    for name, text, inputs in supposed:
        told, unseen = known.times(inputs)
        if unseen > _UNSEEN * energy or not energy:
            continue
        left = float(((y - told) ** 2).sum())
        explained = 1 - max(0.0, left - 1.3 * unseen - case.floor**2) / energy
        yield name, explained, f"{text}: {explained:.2%} explained"


# A wrong guess leaves about as much as there is to explain: with half of that unseen it is still not taken for right.
_UNSEEN = 0.5


def _other_inputs(case: Any, pair: Any, source: str, x: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """Other taps of our engine's that the product may have read, of the layer or entering it."""
    layer = str(case.tap.layer)
    entering = pair.ours.before.get(case.tap.layer)
    for name in pair.ours.taps:
        if (name.rpartition("-")[2] == layer or name == entering) and name not in (source, case.tap.name):
            other = pair.ours.taps[name]
            if other.size == x.size and len(other) == len(x):
                yield "wrong-input", f"{name} in place of {source}", _rows_of(pair.ours, name)


def _supposed_inputs(x: np.ndarray, facts: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    """What a product may have taken for its input x (T, in)."""
    n = x.shape[1]
    for dim in sorted({facts.value_dim, facts.head_dim, facts.key_dim} - {0, 1}):
        for label, order in _head_orders(dim, facts):
            index = order(n)
            if index is not None and not (index == np.arange(n)).all():
                yield "head-permutation", f"the input's heads of {dim} are {label}", x[:, index]
    for label, index in channel_orders(n).items():
        yield "input-permutation", f"the input's channels are {label}", x[:, index]
    for count in range(1, n // 2 + 1) if n <= 1024 else ():
        for label, part in (("last", slice(n - count, n)), ("first", slice(0, count))):
            for name, times, word in (
                ("missing-inputs", 0, "are left out"),
                ("double-inputs", 2, "count twice"),
            ):
                changed = x.copy()
                changed[:, part] *= times
                yield name, f"the {label} {count} of {n} inputs {word}", changed


def tied_head(case: Any, pair: Any, make: Make) -> list[Any]:
    """Logits made with the embedding's table: the rows of it that the prompt shows are enough to tell."""
    tokens, names = np.asarray(pair.reference.facts.tokens), ("model.input_embed", "result_norm")
    if case.tap.op != "result_output" or not all(n in pair.ours.taps for n in names) or not len(tokens):
        return []
    table, x = (np.asarray(pair.ours.taps[n], np.float64) for n in names)
    ids = tokens[: len(table)]
    if (
        len(ids) != len(table)
        or len(x) != len(case.ours)
        or ids.max() >= case.ours.shape[-1]
        or ids.min() < 0
    ):
        return []
    right, ours = case.right[:, ids], case.ours[:, ids]
    left = ((ours - x @ table.T) ** 2).sum()
    explained = 1 - float(left) / max(float(((ours - right) ** 2).sum()), 1e-300)
    text = f"logits of the prompt's own tokens are those of the embedding's rows: {explained:.2%} explained"
    return [make("wrong-weight", explained, text, "swap", 1)]


def _head_orders(dim: int, facts: Any) -> Iterator[tuple[str, Callable[[int], np.ndarray | None]]]:
    def of(arrange: Callable[[int], np.ndarray | None]) -> Callable[[int], np.ndarray | None]:
        def order(width: int) -> np.ndarray | None:
            if width % dim or width == dim:
                return None
            heads = arrange(width // dim)
            return None if heads is None else (heads[:, None] * dim + np.arange(dim)).ravel()

        return order

    def regroup(rows: int) -> Callable[[int], np.ndarray | None]:
        return lambda n: np.arange(n).reshape(rows, -1).T.ravel() if rows and n % rows == 0 else None

    yield "grouped for tiled", of(lambda n: regroup(facts.key_heads)(n))
    yield "tiled for grouped", of(lambda n: regroup(n // facts.key_heads)(n) if facts.key_heads else None)
    yield "laid out head-minor", lambda n: _minor(n, dim)
    yield "laid out head-major for head-minor", lambda n: _minor(n, n // dim)
    yield "one late", of(lambda n: np.roll(np.arange(n), 1))
    yield "one early", of(lambda n: np.roll(np.arange(n), -1))
    yield "reversed", of(lambda n: np.arange(n)[::-1])
    yield "halves swapped", of(lambda n: np.roll(np.arange(n), n // 2))


def _minor(width: int, dim: int) -> np.ndarray | None:
    return (
        np.arange(width).reshape(-1, dim).T.ravel() if dim > 1 and width % dim == 0 and width > dim else None
    )


def _reordered(case: Any, order: Callable[[int], np.ndarray | None]) -> float | None:
    view, original = case.view, case.view.linear
    applied = []

    def linear(stem: str, x: np.ndarray) -> np.ndarray:
        index = order(x.shape[-1]) if stem == case.op.weight else None
        applied.append(index is not None)
        return original(stem, x if index is None else x[..., index])

    view.linear = linear
    try:
        value = np.asarray(case.op.run(view), np.float64)
    except FAILURES:
        return None
    finally:
        del view.linear
    return case.share(value.reshape(case.ours.shape)) if any(applied) else None
