"""How a layer is computed: at once, by kernels, or step by step, so that every step can be seen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from scarlet_jax import taps
from scarlet_jax.ops import implementations


def run(operation: str, at_once: Callable, by_steps: Callable, *arguments: Any, cfg: Any) -> Any:
    """The layer's function of arrays: `at_once` if somebody offers the operation that it needs, else `by_steps`.

    Both take `arguments` and `cfg` and agree to a few roundings. Where a tap listens it is `by_steps`. The
    gradient is that of `by_steps`, from the arguments: kernels have none of their own.
    """
    if taps.listening() or not implementations.offered(operation):
        return by_steps(*arguments, cfg=cfg)
    layer = jax.custom_vjp(functools.partial(at_once, cfg=cfg))

    def backward(saved: Any, cotangents: Any) -> Any:
        return jax.vjp(functools.partial(by_steps, cfg=cfg), *saved)[1](cotangents)

    layer.defvjp(lambda *saved: (layer(*saved), saved), backward)
    return layer(*arguments)
