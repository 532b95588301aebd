"""One engine's run as the operations see it: its taps, the weights, and the arithmetic it computes in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from scarlet_jax.tools.parity import operations  # noqa: F401 - fills the table that `find` looks into
from scarlet_jax.tools.parity.arithmetic import KV_ROUNDING, bf16, f16, partner, tf32
from scarlet_jax.tools.parity.facts import Facts
from scarlet_jax.tools.parity.graph import Missing, Op, find
from scarlet_jax.tools.parity.weights import LARGE

Weights = Mapping[tuple[int | None, str], np.ndarray]
Taps = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How an engine rounds what it multiplies: "" for f32 all the way.

    `matmul`: "partner" (activations in the weight type's 8-bit partner), "bf16", "f16", "tf32" (both factors).
    `kv`: "f16", "bf16", "q8_0", "q4_0", of keys and values and of what meets them; "f16, stored" of the first alone.
    `loose_kv`: that of keys and values is known by its size only: the engine's errors are of that order, but
    repeating the rounding does not reproduce them.
    `unit`: the same of products: each output is off by about so much of what it is a sum of.
    """

    matmul: str = ""
    kv: str = ""
    loose_kv: bool = False
    unit: float = 0.0

    def __str__(self) -> str:
        """In words, empty for f32 all the way."""
        products = {"partner": "8-bit activations", "": ""}.get(self.matmul, f"factors in {self.matmul}")
        cache = (
            f"keys and values {'about as coarse as' if self.loose_kv else 'in'} {self.kv}" if self.kv else ""
        )
        unit = f"products off by about {self.unit:.1g} of their size" if self.unit else ""
        return ", ".join(part for part in (products, cache, unit) if part)

    def strict(self) -> Arithmetic:
        """What of it can be imitated."""
        return Arithmetic(self.matmul, "" if self.loose_kv else self.kv)


@dataclasses.dataclass(frozen=True)
class Run:
    """One side of a comparison.

    Attributes:
        taps: name -> array, aligned.
        kinds: layer -> "ssm" or "attention".
        before: layer -> the name of the tap with the residual stream that enters it; None: the last layer's.
        learned: weights nobody gave, as read off the reference: (layer, stem) -> array.
        given: the model's own weights, or None.
        qtypes: (layer, stem) -> quant type, for the partner arithmetic.
        unsure: of a learned weight, how far it moves for each unit of the taps' relative rounding.
    """

    taps: Taps
    kinds: Mapping[int, str]
    before: Mapping[int | None, str]
    facts: Facts
    learned: dict[tuple[int | None, str], np.ndarray]
    given: Weights | None
    qtypes: Mapping[tuple[int | None, str], str]
    unsure: dict[tuple[int | None, str], np.ndarray] = dataclasses.field(default_factory=dict)

    def view(self, layer: int | None, kind: str, facts: Facts | None = None, **options: Any) -> LayerView:
        """The run around one layer; None is the end of the model."""
        return LayerView(self, layer, kind, facts or self.facts, **options)

    def columns(self, tap: str, key: tuple[int | None, str], part: slice) -> Run:
        """The run with some columns of the product `tap`, and of its weight the rows that make them."""
        given = None if self.given is None else SomeRows(self.given, key, part)
        return dataclasses.replace(self, taps=SomeColumns(self.taps, tap, part), given=given)


class LayerView:
    """A `graph.View` of one layer of a run.

    Args:
        run: the side.
        layer: its layer, None after the last.
        kind: "ssm", "attention" or "end".
        facts: may differ from the run's when conventions are tried.
        dtype: the float type to compute in.
        jitter: standard deviation of random relative perturbations of every tap (a condition estimate), 0 for none.
        arithmetic: roundings to imitate.
        absolute: absolute size of random perturbations, for taps that were rounded to decimals.
        seed: of the perturbations.
    """

    def __init__(
        self,
        run: Run,
        layer: int | None,
        kind: str,
        facts: Facts,
        dtype: Any = np.float64,
        jitter: float = 0.0,
        absolute: float = 0.0,
        arithmetic: Arithmetic | None = None,
        seed: int = 0,
    ):
        self.run, self.layer, self.kind, self.facts = run, layer, kind, facts
        self.dtype = np.dtype(dtype)
        self.arithmetic = arithmetic or Arithmetic()
        self.used: list[str] = []
        self.computed: list[Op] = []  # operations whose taps were not dumped
        self.instead: dict[str, Any] = {}  # formulas to use for some of them
        self._jitter, self._absolute = jitter, absolute
        self._rng = np.random.default_rng(seed)
        self._known: dict[str, np.ndarray] = {}
        self._stack: list[str] = []

    def fresh(self) -> LayerView:
        """The same view with nothing computed yet."""
        return LayerView(self.run, self.layer, self.kind, self.facts, self.dtype, arithmetic=self.arithmetic)

    def tap_name(self, name: str) -> str:
        """The dump's name of this layer's `name`."""
        return name if self.layer is None or name == "model.input_embed" else f"{name}-{self.layer}"

    def has(self, name: str) -> bool:
        """Whether the tap was dumped."""
        return self.tap_name(name) in self.run.taps

    def __call__(self, name: str) -> np.ndarray:
        """The tap, dumped or computed from others."""
        if name not in self._known:
            full = self.tap_name(name)
            if full in self.run.taps:
                self.used.append(full)
                self._known[name] = self._prepare(self.run.taps[full])
            else:
                self._known[name] = self._compute(name)
        return self._known[name]

    def replace(self, name: str, value: np.ndarray) -> None:
        """Let every reader of `name` get `value`."""
        self._known[name] = value

    def _compute(self, name: str) -> np.ndarray:
        op = find(name, self.kind)
        if op is None or name in self._stack:
            raise Missing(self.tap_name(name))
        self._stack.append(name)
        self.computed.append(op)
        try:
            return self.instead.get(name, op.run)(self)
        finally:
            self._stack.pop()

    def _prepare(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, self.dtype)
        if self._jitter:
            uniform = self._rng.random(x.shape, np.float32).astype(self.dtype) - 0.5
            x = x + x * (uniform * (self._jitter * 12**0.5))
        if self._absolute:
            x = x + self._absolute * self._rng.uniform(-1, 1, x.shape).astype(self.dtype)
        return x

    def before(self) -> np.ndarray:
        """The residual stream that enters this layer."""
        name = self.run.before.get(self.layer)
        if name is None or name not in self.run.taps:
            raise Missing("the residual stream before this layer")
        if "before" not in self._known:
            self.used.append(name)
            self._known["before"] = self._prepare(self.run.taps[name])
        return self._known["before"]

    def state(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A state tap, or zeros."""
        if self.facts.cut:
            raise Missing("the rows before those compared")
        if not self.has(name):
            return np.zeros(shape, self.dtype)
        state = self(name)
        if state.shape != shape:
            raise Missing(f"{self.tap_name(name)} of shape {shape}")
        return state

    def weight(self, stem: str) -> np.ndarray:
        """A weight: the model's, or what the reference's own taps say it must be."""
        key = weight_key(self.layer, stem)
        if _is_large(self.run.given, key):
            raise Missing(f"{stem} whole")
        if self.run.given is not None and key in self.run.given:
            return self.run.given[key].astype(self.dtype, copy=False)
        if key in self.run.learned:
            return self._learned(key).astype(self.dtype, copy=False)
        raise Missing(stem)

    def _learned(self, key: tuple[int | None, str]) -> np.ndarray:
        """What was read off taps, moved with them: a channel that was almost still tells its weight badly."""
        value = self.run.learned[key]
        return (
            value + self._jitter * self.run.unsure[key] if self._jitter and key in self.run.unsure else value
        )

    def rows(self, stem: str, ids: np.ndarray) -> np.ndarray:
        """Some rows of a table, decoded alone."""
        given = self.run.given
        if given is not None and hasattr(given, "rows") and (None, stem) in given:
            return given.rows((None, stem), ids).astype(self.dtype, copy=False)
        table = self.weight(stem)
        return table[np.asarray(ids) % len(table)]

    def linear(self, stem: str, x: np.ndarray) -> np.ndarray:
        """x W^T, in the arithmetic to imitate."""
        x, key = self._activation(stem, x), weight_key(self.layer, stem)
        if key[0] is None and _is_large(self.run.given, key):
            made = self.run.given.product(key, x, _FACTORS.get(self.arithmetic.matmul))
            return self._unsure(made, x, np.ones(1)) + self._bias(key)
        weight = self.weight(stem)
        if weight.shape[-1] != x.shape[-1]:
            raise Missing(f"{stem} with {x.shape[-1]} inputs")
        return self._multiply(x, weight) + self._bias(key)

    def _bias(self, key: tuple[int | None, str]) -> np.ndarray:
        """What the model adds to a product with this weight."""
        given, name = self.run.given, (key[0], f"{key[1]}.bias")
        return (
            given[name].astype(self.dtype) if given is not None and name in given else np.zeros(1, self.dtype)
        )

    def expert(self, stem: str, expert: int, x: np.ndarray) -> np.ndarray:
        """x (n, in) by one expert's matrix of the weight `stem` (E, out, in)."""
        given = self.run.given
        if given is None or (self.layer, stem) not in given:
            raise Missing(stem)
        ids = np.array([expert])
        whole = (
            given.rows((self.layer, stem), ids) if hasattr(given, "rows") else given[self.layer, stem][ids]
        )
        return self._multiply(self._activation(stem, x), whole[0].astype(self.dtype, copy=False))

    def _activation(self, stem: str, x: np.ndarray) -> np.ndarray:
        how = self.arithmetic.matmul
        if how == "partner":
            rounding = partner(self.run.qtypes.get(weight_key(self.layer, stem), ""))
        else:
            rounding = _FACTORS.get(how)
        return x if rounding is None else rounding(x)

    def _multiply(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        rounding = _FACTORS.get(self.arithmetic.matmul)
        made = x @ (weight if rounding is None else rounding(weight)).T
        return self._unsure(made, x, weight) if self.arithmetic.unit else made

    def _unsure(self, made: np.ndarray, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """A product with random errors of `unit`, of the size that independent errors of its terms have."""
        if not self.arithmetic.unit:
            return made
        rows, columns = (np.sqrt((a * a).sum(-1)) for a in (x, weight))
        size = rows[..., None] * columns
        size = size * (np.sqrt((made * made).mean()) / max(float(np.sqrt((size * size).mean())), 1e-300))
        noise = self._rng.standard_normal(made.shape).astype(self.dtype)
        return made + self.arithmetic.unit * size * noise

    def kv(self, x: np.ndarray, *, stored: bool = False) -> np.ndarray:
        """Keys and values as the cache holds them; queries and probabilities as the engine makes them to meet those."""
        kind, comma, _ = self.arithmetic.kv.partition(",")
        rounding = KV_ROUNDING.get(kind)
        return x if rounding is None or (comma and not stored) else rounding(x)


# Roundings of both factors of a product.
_FACTORS = {"bf16": bf16, "f16": f16, "tf32": tf32}


def _is_large(given: Any, key: tuple[int | None, str]) -> bool:
    return hasattr(given, "product") and key in given and given.elements(key) > LARGE


class _SameNames(Mapping[str, np.ndarray]):
    """Taps under the names that others have."""

    def __init__(self, taps: Taps):
        self._taps = taps

    def __contains__(self, name: object) -> bool:
        return name in self._taps

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __len__(self) -> int:
        return len(self._taps)


class SomeColumns(_SameNames):
    """Taps of which one, `tap`, has some of its columns."""

    def __init__(self, taps: Taps, tap: str, part: slice):
        super().__init__(taps)
        self._tap, self._part = tap, part

    def __getitem__(self, name: str) -> np.ndarray:
        return self._taps[name][:, self._part] if name == self._tap else self._taps[name]


class SomeRows(Mapping[tuple[int | None, str], np.ndarray]):
    """A model's weights of which one, `key`, has some of its rows; what else the weights can do they still can."""

    def __init__(self, weights: Any, key: tuple[int | None, str], part: slice):
        self._weights, self._key, self._part = weights, key, part
        self._rows: np.ndarray | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def elements(self, key: tuple[int | None, str]) -> int:
        """How many numbers a weight holds."""
        return self[key].size if key == self._key else self._weights.elements(key)

    def __getitem__(self, key: tuple[int | None, str]) -> np.ndarray:
        if key != self._key:
            return self._weights[key]
        if self._rows is None:
            some = getattr(self._weights, "some", None)
            self._rows = self._weights[key][self._part] if some is None else some(key, self._part)
        return self._rows

    def __contains__(self, key: object) -> bool:
        return key in self._weights

    def __iter__(self) -> Iterator[tuple[int | None, str]]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class Window(_SameNames):
    """Some token rows of every tap that has them all: what a large dump is judged on."""

    def __init__(self, taps: Taps, tokens: int, rows: slice):
        super().__init__(taps)
        self._tokens, self.rows = tokens, rows

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._taps[name]
        if array.ndim < 2 or len(array) != self._tokens:
            return array
        kept = array[self.rows]
        if kept.ndim == 3 and array.shape[2] == self._tokens and not self.rows.start:  # keys of a prefix
            return kept[:, :, self.rows]
        return kept


_GLOBAL = ("token_embd", "output", "output_norm")


def weight_key(layer: int | None, stem: str) -> tuple[int | None, str]:
    """Where a weight that a layer uses is found: its own, or the model's."""
    return (None if stem in _GLOBAL else layer), stem


def residual_stream(layers: Sequence[int]) -> dict[int | None, str]:
    """For each layer (and None, the end), the tap that holds the residual stream entering it."""
    stream: dict[int | None, str] = {}
    previous = "model.input_embed"
    for layer in layers:
        stream[layer] = previous if layer == 0 or previous.endswith(f"-{layer - 1}") else ""
        previous = f"l_out-{layer}"
    stream[None] = previous
    return stream
