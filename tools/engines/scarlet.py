"""Our own engine, asked for its activations the way the reference engines are."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import scarlet_jax
from scarlet_jax.tools.engines import steps

# Taps that are one weight's product -> the weight, where the layer has it.
_PRODUCTS = {
    "linear_attn_qkv_mixed": "attn_qkv",
    "z": "attn_gate",
    "alpha": "ssm_alpha",
    "beta": "ssm_beta",
    "linear_attn_out": "ssm_out",
    "Qcur_full": "attn_q",
    "Vcur": "attn_v",
    "attn_output": "attn_output",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_out": "ffn_down",
}


def taps(
    path: str | os.PathLike[str],
    tokens: Sequence[int],
    select: str | None = None,
    decode: int = 0,
    implementation: str | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, str]], str]:
    """Runs `tokens` and returns (taps, weights, the engine's name and version).

    Taps are name -> f32, token axis first, in execution order; `select` is a regular expression that a name
    has to contain a match of. Weights are tap -> (name, quant type). The last `decode` tokens are fed one at a
    time, the others in one pass; `steps.join` puts the parts together. `implementation` is Model's. Raises BadInput as
    `scarlet_jax.load`.
    """
    passes = steps.split(tokens, decode)
    model = scarlet_jax.load(Path(path), implementation=implementation)
    parts = []
    state, seen = None, 0
    for part in passes:
        seen += len(part)
        _, state, caught = model.forward_with_taps(part, state, select)
        parts.append((len(part), {name: _seen_keys(name, array, seen) for name, array in caught.items()}))
    joined = steps.join(parts)
    qtypes = {name: tensor.qtype for name, tensor in model.gguf.tensors.items()}
    return joined, _weights(joined, qtypes), f"scarlet_jax {importlib.metadata.version('scarlet_jax')}"


def _seen_keys(name: str, array: np.ndarray, seen: int) -> np.ndarray:
    """Attention scores without the cache's empty slots."""
    return array[..., :seen] if steps.stem(name) in steps.KEYS_LAST else array


def _weights(taps: Mapping[str, Any], qtypes: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Tap -> (weight name, quant type), for the taps that are one weight's product."""
    head = "output.weight" if "output.weight" in qtypes else "token_embd.weight"
    names = {"result_output": head, "model.input_embed": "token_embd.weight"}
    for tap in taps:
        kind, layer = steps.stem(tap), tap.rpartition("-")[2]
        if kind in _PRODUCTS:
            names[tap] = f"blk.{layer}.{_PRODUCTS[kind]}.weight"
    return {tap: (name, qtypes[name]) for tap, name in names.items() if tap in taps and name in qtypes}
