"""The operations of the family: for every tap, how it follows from others.

An operation is a function of a `View`, which hands out one engine's taps of one layer (`v("attn_norm")`), its
weights and the facts of the model. Where a tap was not dumped the view computes it by its own operation, so the
same table serves dumps that hold every node and dumps that hold a few.

`variants` are the operation's known misreadings, each under the name of the fault it is: the same mathematics
with one step missing, doubled, swapped or out of order. They are what causes are named by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from scarlet_jax.tools.parity import formulas as f


class Missing(LookupError):  # noqa: N818 - nothing went wrong: it is how a dump says that it has less
    """A tap, weight or fact that an operation needs and nobody gave."""


# How a formula says that it cannot be run on what was dumped: something is missing, or lies in another shape.
FAILURES = (
    Missing,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
    np.linalg.LinAlgError,
)


class View(Protocol):
    """One engine's activations around one layer, as an operation sees them."""

    facts: Any
    layer: int | None
    dtype: np.dtype

    def __call__(self, name: str) -> np.ndarray:
        """The tap `name` of this layer, dumped or computed."""
        ...

    def before(self) -> np.ndarray:
        """The residual stream that enters this layer, (T, D)."""
        ...

    def has(self, name: str) -> bool:
        """Whether the tap was dumped."""
        ...

    def state(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A state tap, zeros where it was not dumped."""
        ...

    def weight(self, stem: str) -> np.ndarray:
        """A weight of this layer (or of the model), (out, in) or a vector."""
        ...

    def linear(self, stem: str, x: np.ndarray) -> np.ndarray:
        """x (T, in) -> (T, out) by the weight `stem`."""
        ...

    def kv(self, x: np.ndarray, *, stored: bool = False) -> np.ndarray:
        """Keys or values as the engine's cache holds them (`stored`), or what it multiplies by them."""
        ...


Run = Callable[[Any], np.ndarray]
Fit = Callable[[Any, np.ndarray], Mapping[str, np.ndarray]]
Parts = Callable[[Any], tuple[np.ndarray, np.ndarray | float]]
Choices = Sequence[Mapping[str, Any]] | Callable[[Any, np.ndarray], Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Op:
    """How one tap is computed.

    Attributes:
        name: the tap, without the layer number.
        kind: the layers it belongs to: "ssm", "attention", or "" for any.
        klass: the report's class.
        run: the formula.
        weight: the weight it applies, as a GGUF stem, or "".
        fit: for weights nobody gave: what they must be, from the reference's own inputs and output.
        choices: facts to try where the model does not say, or a function of the reference's view and output that
            lists them: the first that explains the reference is kept.
        variants: fault name -> formula with that fault.
        linear: whether it is one product with `weight`.
        source: it follows from nothing in this run (an embedding without its table, a carried state).
        alias: the same array as another tap, or one that nothing reads.
        pointwise: view -> x and factor, where the tap is factor * g(x) with a function g of single elements.
        summed: view -> the two arrays, where it is their sum.
        normed: view -> x and factor, where it is factor * x over the root of x's squares along the last axis.
    """

    name: str
    kind: str
    klass: str
    run: Run
    weight: str = ""
    fit: Fit | None = None
    choices: Choices = ({},)
    variants: Mapping[str, Run] = dataclasses.field(default_factory=dict)
    linear: bool = False
    source: bool = False
    alias: bool = False
    pointwise: Parts | None = None
    normed: Parts | None = None
    summed: Parts | None = None


OPS: dict[tuple[str, str], Op] = {}


def find(name: str, kind: str) -> Op | None:
    """The operation of tap `name` in a layer of `kind`, which may be of several kinds: "ssm moe"."""
    kinds = (*reversed(kind.split()), "")
    return next((OPS[k, name] for k in kinds if (k, name) in OPS), None)


def add(name: str, kind: str, klass: str, run: Run, **rest: Any) -> None:
    """Enter an operation into the table."""
    OPS[kind, name] = Op(name, kind, klass, run, **rest)


def heads(x: np.ndarray, dim: int) -> np.ndarray:
    """(T, ...) -> (T, heads, dim)."""
    return x.reshape(len(x), -1, dim)


def flat(x: np.ndarray) -> np.ndarray:
    """(T, ...) -> (T, everything else)."""
    return x.reshape(len(x), -1)


def known(energy: np.ndarray) -> np.ndarray:
    """Energies to divide by; NaN where there is too little to learn a weight from: its channel is not judged."""
    return np.where(energy > 1e-10 * max(float(np.mean(energy)), 1e-300), energy, np.nan)


def visible(kq: np.ndarray) -> np.ndarray:
    """Scores (T, N, S) with those of keys to come set to zero: engines may or may not compute them."""
    if kq.ndim != 3 or kq.shape[0] != kq.shape[2]:
        return kq
    return np.where(f.causal_mask(len(kq), len(kq))[:, None], kq, kq.dtype.type(0))
