"""The compiled programs of one model: on one device, or on a mesh of several."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

from scarlet_jax import config, forward, sharding
from scarlet_jax.errors import BadInput
from scarlet_jax.forward import State, Traced, Weights
from scarlet_jax.ops import implementations
from scarlet_jax.ops.gpu.planes import Planes
from scarlet_jax.ops.qtensor import QTensor
from scarlet_jax.types import Array


class Programs:
    """The compiled programs of one model, on one device."""

    def __init__(self, cfg: config.Config, weights: Weights, implementation: str) -> None:
        self._cfg, self._implementation = cfg, implementation
        # One after another, so that no more than one matrix is on the device in both forms.
        one = lambda prepare, w: jax.block_until_ready(prepare(w))  # noqa: E731
        self.weights = _placed(implementations.prepared(weights, implementation, one))

    def init_state(self, batch: int, slots: int, kv_dtype: Any) -> State:
        """As the function of that name."""
        return forward.init_state(self._cfg, batch, slots, kv_dtype)

    def trunk(self, tokens: ArrayLike, count: ArrayLike, state: State, **options: Any) -> Traced:
        """As the function of that name."""
        options["implementation"] = self._implementation
        return forward.trunk(self.weights, tokens, count, state, self._cfg, **options)

    def last_logits(
        self, tokens: ArrayLike, count: ArrayLike, state: State, before: ArrayLike, **options: Any
    ) -> tuple[Array, State]:
        """As the function of that name."""
        options["implementation"] = self._implementation
        return forward.last_logits(self.weights, tokens, count, state, before, self._cfg, **options)

    def head(self, hidden: ArrayLike, tapped: bool = False) -> tuple[Array, dict[str, Array]]:
        """As the function of that name."""
        w, eps = self.weights, self._cfg.layer_norm_rms_epsilon
        return forward.head(w.output_norm, w.output, hidden, eps, tapped, self._implementation)

    def decode(self, *arguments: Any, block: int) -> tuple[Array, State]:
        """`forward.decode`: token, state, key, step, count, params, stops."""
        return forward.decode_program(self.weights, *arguments, self._cfg, block, self._implementation)

    @functools.cache  # noqa: B019 - tracing a state takes longer than a token; lives as long as the model
    def leaf_shapes(self, *state: Any) -> list[tuple[int, ...]]:
        """The shape of each array of `init_state(*state)`."""
        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda: self.init_state(*state)))]

    @functools.cache  # noqa: B019 - as above
    def leaf_sizes(self, *state: Any) -> list[int]:
        """Its elements."""
        return [math.prod(shape) for shape in self.leaf_shapes(*state)]


class SpreadPrograms(Programs):
    """The same on a mesh: every device runs them on its share of the weights (see `sharding`)."""

    def __init__(self, spread: sharding.Spread, implementation: str) -> None:
        spread = spread.prepared(implementation)
        self._cfg, self._implementation, self._spread = spread.config, implementation, spread
        self.weights = spread.weights
        self._state = State(spread.state, sharding.WHOLE, sharding.WHOLE)

        whole, w, eps = sharding.WHOLE, spread.specs, self._cfg.layer_norm_rms_epsilon

        def run(weights, tokens, count, state, positions):
            return forward.run_trunk(
                weights, tokens, count, state, positions, None, self._cfg, False, implementation
            )

        def logits(output_norm, output, hidden):
            return forward.head(output_norm, output, hidden, eps, False, implementation)[0]

        takes, gives = (w, whole, whole, self._state, whole), Traced(whole, self._state, OrderedDict())
        self._trunk = spread.program(run, takes, gives)
        self._trunk_in_place = spread.program(run, takes, gives, donate_argnums=3)
        self._head = spread.program(logits, (w.output_norm, w.output, whole), whole)

    @functools.cache  # noqa: B019 - as above
    def _init_state(self, *size: Any) -> Callable[[], State]:
        return self._spread.program(lambda: forward.init_state(self._cfg, *size), (), self._state)

    def init_state(self, batch: int, slots: int, kv_dtype: Any) -> State:
        """Each device holds the state of its own heads."""
        return self._init_state(batch, slots, kv_dtype)()

    def trunk(self, tokens: ArrayLike, count: ArrayLike, state: State, **options: Any) -> Traced:
        """Nobody sees a device's share of an activation."""
        if options.get("tapped"):
            raise BadInput(f"taps: the model is spread over {self._spread.mesh.size} devices; expected one")
        run = self._trunk_in_place if options.get("in_place") else self._trunk
        return run(self.weights, tokens, count, state, options.get("positions"))

    def last_logits(
        self, tokens: ArrayLike, count: ArrayLike, state: State, before: ArrayLike, **options: Any
    ) -> tuple[Array, State]:
        """As the function of that name, in three programs."""
        traced = self.trunk(tokens, count, state, **options)
        return self.head(forward.last_hidden(traced.hidden, count, before))[0], traced.state

    def head(self, hidden: ArrayLike, tapped: bool = False) -> tuple[Array, dict[str, Array]]:
        """Logits of all of the vocabulary, on every device."""
        return self._head(self.weights.output_norm, self.weights.output, hidden), {}

    def decode(self, *arguments: Any, block: int) -> tuple[Array, State]:
        """Every device draws the same tokens."""
        return self._decode(block)(self.weights, *arguments)

    @functools.cache  # noqa: B019 - as above
    def _decode(self, block: int) -> Callable:
        whole = sharding.WHOLE
        run = functools.partial(
            forward.decode, cfg=self._cfg, block=block, implementation=self._implementation
        )
        takes = (self._spread.specs, whole, self._state, *[whole] * 5)
        return self._spread.program(run, takes, (whole, self._state), donate_argnums=2)


def _placed(weights: Weights) -> Weights:
    """Weights of the host on the device, each once: a tied head stays tied."""
    seen: dict[int, Any] = {}

    def place(w: Any) -> Any:
        if id(w) not in seen:
            seen[id(w)] = jax.device_put(w)
        return seen[id(w)]

    return jax.tree.map(place, weights, is_leaf=lambda w: isinstance(w, QTensor | Planes))
