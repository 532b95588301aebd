"""Taps of a sequence that was fed in several steps, joined as if it had been fed at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from scarlet_jax.errors import BadInput

# Taps without a token axis: what the mixer remembered before the tokens, and after them. The last two are
# what llama.cpp called the two before them until the summer of 2026.
_CONV_BEFORE = {"conv_states", "conv_states_reshaped"}
_CONV_AFTER = {"conv_state_last", "conv_state_update", "last_conv_states", "state_update_target"}
CONV_STATES = _CONV_BEFORE | _CONV_AFTER
BEFORE = _CONV_BEFORE | {"state_predelta"}
AFTER = _CONV_AFTER | {"new_state"}
HISTORY_AND_TOKENS = {"conv_input"}  # rows of the step before, then one a token
KEYS_LAST = {"kq", "kq_soft_max"}  # (T, N, S): later steps see more keys


def stem(name: str) -> str:
    """A tap's name without its layer: "Qcur-3" -> "Qcur"."""
    head, _, layer = name.rpartition("-")
    return head if layer.isdigit() else name


def split(tokens: Sequence[int], decode: int) -> list[Sequence[int]]:
    """The passes: all tokens but the last `decode` at once, then those one by one."""
    if not 0 <= decode < max(len(tokens), 1):
        raise BadInput(f"--decode {decode}: expected fewer than the {len(tokens)} tokens")
    prompt = len(tokens) - decode
    return [tokens[:prompt], *(tokens[i : i + 1] for i in range(prompt, len(tokens)))]


def join(steps: Iterable[tuple[int, Mapping[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Steps (number of tokens, taps) -> the taps of all tokens together, in the first step's order.

    Arrays are laid end to end along the token axis. States are those before the first step and after the last.
    Attention scores of keys that were not there yet are 0. Where parts do not fit, the last is kept.
    """
    joined: dict[str, list[np.ndarray]] = {}
    for count, taps in steps:
        for name, array in taps.items():
            parts = joined.setdefault(name, [])
            kind = stem(name)
            if kind in AFTER:
                parts[:] = [array]
            elif kind in BEFORE:
                parts[:] = parts or [array]
            else:
                parts.append(array[-count:] if parts and kind in HISTORY_AND_TOKENS else array)
    return {name: _concatenated(parts, stem(name)) for name, parts in joined.items()}


def _concatenated(parts: list[np.ndarray], kind: str) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    if kind in KEYS_LAST:
        keys = max(part.shape[-1] for part in parts)
        parts = [np.pad(part, [(0, 0), (0, 0), (0, keys - part.shape[-1])]) for part in parts]
    fit = len({part.shape[1:] for part in parts}) == 1
    return np.concatenate(parts) if fit else parts[-1]
