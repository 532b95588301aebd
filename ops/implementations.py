"""Which code does the work: the implementations of the operations, best first, and the choice among them.

An implementation is a module with `unavailable()`, which says why it cannot run on this machine, in a line, or
None; and with any of these operations, each of which raises NotImplementedError, saying why, for what it
does not cover (weights' own scales, `QTensor.scale`, are the caller's):

    qmatmul(x, w)                   a product with a weight, packed or not
    qmatmul_many(x, ws)             several products of one input
    qmatmul_experts(x, w, ids)      a product of each row with its own few of many weights
    ffn(x, gate, up, down)          a feed-forward network
    ffn_experts(x, gate, up, down, ids, shares)  a mixture of each row's own few of many
    delta_net(...), attention(...)  a token mixer between its projections (see `ops.cpu.mixers`)
    delta_rule(q, k, v, g, beta, state)  the delta rule alone (see `ops.gated_delta`)
    attend(q, k, v, position, scale=...)  softmax attention over a cache alone (see `ops.attention`)
    solve(lower, columns)           the delta rule's (I + lower) x = columns (see `ops.gated_delta`)

and, optionally, `prepare(w)`: a packed weight in the form that its products are quickest with, made once at load
time. The portable one has the products alone, of any weight, and is what the others are compared with. What nobody
offers, a layer does step by step. An implementation that gives up exactness for speed is in OPT_IN: it works
only where it is asked for by name.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

from scarlet_jax.errors import BadInput
from scarlet_jax.ops import cpu, gpu, portable
from scarlet_jax.ops.cpu import fast
from scarlet_jax.ops.qtensor import QTensor

IMPLEMENTATIONS: dict[str, Any] = {"cpu": cpu, "gpu": gpu, "portable": portable}
OPT_IN: dict[str, Any] = {"cpu-fast": fast}

_chosen: contextvars.ContextVar[str] = contextvars.ContextVar("implementation", default="auto")


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within, that implementation alone does the work; with "auto", the best that can.

    Has to be open while a program is traced, inside the jitted function. Raises BadInput as `check` does.
    """
    check(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def check(name: str) -> str:
    """The name itself; BadInput if there is no such implementation, or with its reason if it cannot run."""
    if name == "auto":
        return name
    every = IMPLEMENTATIONS | OPT_IN
    if name not in every:
        raise BadInput(f"implementation {name}: expected auto or one of {', '.join(every)}")
    if reason := every[name].unavailable():
        raise BadInput(f"implementation {name}: {reason}")
    return name


def offered(operation: str) -> bool:
    """Whether `call` has somebody to ask for the operation."""
    return any(hasattr(module, operation) for module in _candidates("auto").values())


def call(operation: str, *args: Any, implementation: str = "auto", **options: Any) -> Any:
    """Have the operation done by the implementation of that name, or by the first that covers it.

    Raises BadInput, with its own reason, if an implementation chosen by name does not; NotImplementedError
    if nobody does.
    """
    candidates = _candidates(implementation)
    for name, module in candidates.items():
        try:
            if hasattr(module, operation):
                return getattr(module, operation)(*args, **options)
        except NotImplementedError as error:
            if len(candidates) == 1:
                raise BadInput(f"implementation {name}: {error}") from error
    raise NotImplementedError(f"{operation} is not covered by {', '.join(candidates)}")


def prepared(
    weights: Any, implementation: str, run: Callable[[Callable, QTensor], Any] = lambda prepare, w: prepare(w)
) -> Any:
    """A pytree of weights, its matrices in the form that the implementation who will multiply them prefers.

    `run(prepare, w)`: how to make a matrix so, where its parts lie on several devices.
    """
    best = next(iter(_candidates(implementation).values()))
    if not hasattr(best, "prepare"):
        return weights
    matrix = lambda w: isinstance(w, QTensor)  # noqa: E731
    seen: dict[int, Any] = {}  # a tied head stays tied

    def prepare(w: Any) -> Any:
        if not matrix(w) or len(w.shape) != 2:
            return w
        if id(w) not in seen:
            seen[id(w)] = run(best.prepare, w)
        return seen[id(w)]

    return jax.tree.map(prepare, weights, is_leaf=matrix)


def _candidates(implementation: str) -> dict[str, Any]:
    """Who may do the work, best first: the one chosen by name, here or by `use`, or all that can run."""
    name = check(_chosen.get() if implementation == "auto" else implementation)
    if name != "auto":
        return {name: (IMPLEMENTATIONS | OPT_IN)[name]}
    return {name: module for name, module in IMPLEMENTATIONS.items() if module.unavailable() is None}
