"""Elementwise functions that engines mistake for one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.special import erf

from scarlet_jax.tools.parity import formulas as f

Function = Callable[[np.ndarray], np.ndarray]

FUNCTIONS: Mapping[str, Function] = {
    "silu": f.silu,
    "sigmoid": f.sigmoid,
    "softplus": f.softplus,
    "gelu": f.gelu,
    "gelu, by erf": lambda x: 0.5 * x * (1 + erf(x / 2**0.5)),
    "gelu, quick": lambda x: x * f.sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "squared-relu": lambda x: np.maximum(x, 0) ** 2,
    "tanh": np.tanh,
    "exp": np.exp,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "mish": lambda x: x * np.tanh(f.softplus(x)),
    "hard-swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "hard-sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard-sigmoid, slope a fifth": lambda x: np.clip(x / 5 + 0.5, 0, 1),
    "softmax": lambda x: f.softmax(x.reshape(len(x), -1)).reshape(x.shape),
}


def mistaken(right: str) -> dict[str, Function]:
    """Fault name -> what is computed instead of the function `right`."""
    function = FUNCTIONS[right]
    return {
        f"missing-{right}": lambda x: x,
        f"double-{right}": lambda x: function(function(x)),
        f"{right}-sign": lambda x: function(-x),
        f"twice-{right}": lambda x: 2 * function(x),
        f"{right}-threshold, passed through above 0": lambda x: np.where(x > 0, x, function(x)),
        f"{right}-threshold, passed through above 1": lambda x: np.where(x > 1, x, function(x)),
        **{_name(other, right): g for other, g in FUNCTIONS.items() if other != right},
    }


def _name(other: str, right: str) -> str:
    short, comma, how = other.partition(", ")
    return f"{short}-for-{right}{comma}{how}"
