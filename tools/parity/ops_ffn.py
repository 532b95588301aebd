"""Feed-forward networks: dense, and a mixture of experts with a shared one (fact sheet section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scarlet_jax.tools.parity import formulas as f
from scarlet_jax.tools.parity.graph import Missing, add, flat
from scarlet_jax.tools.parity.ops_shared import linear, normed, sigmoid, swiglu

linear("ffn_gate", "", "ffn", "ffn_gate", normed)
linear("ffn_up", "", "ffn", "ffn_up", normed)
linear("ffn_out", "", "ffn", "ffn_down", "ffn_swiglu")


swiglu("ffn_swiglu", "", "ffn", "ffn_gate", "ffn_up")


# --- mixture of experts: layers of kind "moe" ------------------------------------------------------------------

linear("ffn_moe_logits", "moe", "moe", "ffn_gate_inp", normed)


_SMALLEST = 2.0**-14  # f16's smallest normal number, which llama.cpp clamps the sum of weights to


def _chosen(v: Any, scores: np.ndarray | None = None) -> np.ndarray:
    """Indices of the k largest, largest first, (T, k)."""
    scores = v("ffn_moe_probs") if scores is None else scores
    if not v.facts.experts_used:
        raise Missing("how many experts are used")
    return np.argsort(-scores, axis=-1, kind="stable")[:, : v.facts.experts_used]


def _experts(v: Any) -> np.ndarray:
    return np.rint(v("ffn_moe_topk")).astype(np.int64)


def _weights(v: Any) -> np.ndarray:
    return np.take_along_axis(v("ffn_moe_probs"), _experts(v), axis=-1)


def _normalised(v: Any) -> np.ndarray:
    weights = flat(v("ffn_moe_weights"))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), weights.dtype.type(_SMALLEST))


def _by_expert(v: Any, stem: str, x: np.ndarray) -> np.ndarray:
    """Each token's inputs (T, D), or (T, k, F) one an expert, by its experts' matrices -> (T, k, out)."""
    chosen = _experts(v)
    y: np.ndarray | None = None
    for expert in np.unique(chosen):
        token, slot = np.nonzero(chosen == expert)
        rows = x[token] if x.ndim == 2 else x[token, slot]
        part = v.expert(stem, int(expert), rows)
        if y is None:
            y = np.zeros((*chosen.shape, part.shape[-1]), part.dtype)
        y[token, slot] = part
    if y is None:
        raise Missing("experts")
    return y


add(
    "ffn_moe_probs",
    "moe",
    "moe",
    lambda v: f.softmax(v("ffn_moe_logits")),
    variants={
        "router": lambda v: f.sigmoid(v("ffn_moe_logits")),
        "router, missing softmax": lambda v: v("ffn_moe_logits"),
    },
)
add(
    "ffn_moe_topk",
    "moe",
    "moe",
    _chosen,
    variants={
        "router, smallest": lambda v: _chosen(v, -v("ffn_moe_probs")),
        "router, in order of index": lambda v: np.sort(_chosen(v), axis=-1),
        "router, next after the best": lambda v: np.argsort(-v("ffn_moe_probs"), axis=-1)[
            :, 1 : v.facts.experts_used + 1
        ],
    },
)
add(
    "ffn_moe_weights",
    "moe",
    "moe",
    _weights,
    variants={"router": lambda v: np.take_along_axis(v("ffn_moe_logits"), _experts(v), axis=-1)},
)


def _gate_and_up(v: Any) -> np.ndarray:
    return _by_expert(v, "ffn_gate_up_exps", flat(normed(v)))


add(
    "ffn_moe_argsort",
    "moe",
    "moe",
    lambda v: np.argsort(-v("ffn_moe_probs"), axis=-1, kind="stable"),
    alias=True,
)
add("ffn_moe_gate_up", "moe", "moe", _gate_and_up, weight="ffn_gate_up_exps")
add(
    "ffn_moe_weights_sum",
    "moe",
    "moe",
    lambda v: flat(v("ffn_moe_weights")).sum(axis=-1, keepdims=True),
    alias=True,
)
add(
    "ffn_moe_weights_sum_clamped",
    "moe",
    "moe",
    lambda v: np.maximum(flat(v("ffn_moe_weights")).sum(axis=-1, keepdims=True), _SMALLEST),
    alias=True,
)
add(
    "ffn_moe_weights_norm",
    "moe",
    "moe",
    _normalised,
    variants={
        "router": lambda v: flat(v("ffn_moe_weights")),
        "router, softmax again": lambda v: f.softmax(flat(v("ffn_moe_weights"))),
    },
)


def _fit_scale(v: Any, y: np.ndarray) -> Mapping[str, np.ndarray]:
    x = flat(_before_scale(v))
    return {"expert_weights_scale": (x * y.reshape(x.shape)).sum() / np.maximum((x * x).sum(), 1e-300)}


def _before_scale(v: Any) -> np.ndarray:
    return v("ffn_moe_weights_norm" if v.has("ffn_moe_weights_norm") else "ffn_moe_weights")


def _last_weights(v: Any) -> np.ndarray:
    """(T, k): what experts' outputs are multiplied by."""
    return flat(v("ffn_moe_weights_scaled" if v.has("ffn_moe_weights_scaled") else "ffn_moe_weights_norm"))


add(
    "ffn_moe_weights_scaled",
    "moe",
    "moe",
    lambda v: flat(_before_scale(v)) * v.weight("expert_weights_scale"),
    fit=_fit_scale,
)
for _part in ("gate", "up"):
    add(
        f"ffn_moe_{_part}",
        "moe",
        "moe",
        lambda v, part=_part: _by_expert(v, f"ffn_{part}_exps", flat(normed(v))),
        weight=f"ffn_{_part}_exps",
        variants={
            "swapped-gate-up": lambda v, part=_part: _by_expert(
                v, f"ffn_{'up' if part == 'gate' else 'gate'}_exps", flat(normed(v))
            )
        },
    )
swiglu("ffn_moe_swiglu", "moe", "moe", "ffn_moe_gate", "ffn_moe_up")
add(
    "ffn_moe_down",
    "moe",
    "moe",
    lambda v: _by_expert(v, "ffn_down_exps", v("ffn_moe_swiglu")),
    weight="ffn_down_exps",
)
add(
    "ffn_moe_weighted",
    "moe",
    "moe",
    lambda v: v("ffn_moe_down") * _last_weights(v)[..., None],
    variants={
        "router": lambda v: v("ffn_moe_down") * flat(v("ffn_moe_weights"))[..., None],
        "router, weights left out": lambda v: v("ffn_moe_down"),
        "router, weights in reverse": lambda v: (
            v("ffn_moe_down") * flat(v("ffn_moe_weights_norm"))[:, ::-1, None]
        ),
    },
)
add(
    "ffn_moe_out",
    "moe",
    "moe",
    lambda v: v("ffn_moe_weighted").sum(axis=1),
    variants={
        "missing-expert": lambda v: v("ffn_moe_weighted")[:, :-1].sum(axis=1),
        "missing-scale": lambda v: v("ffn_moe_weighted").mean(axis=1),
    },
)
linear("ffn_gate", "moe", "moe", "ffn_gate_shexp", normed)
linear("ffn_up", "moe", "moe", "ffn_up_shexp", normed)
swiglu("ffn_swiglu", "moe", "moe", "ffn_gate", "ffn_up")
linear("ffn_shexp", "moe", "moe", "ffn_down_shexp", "ffn_swiglu")


def _shared_gate(v: Any) -> np.ndarray:
    return flat(normed(v)) @ v.weight("ffn_gate_inp_shexp").reshape(-1, 1)


add("shared_expert_gate", "moe", "moe", _shared_gate, weight="ffn_gate_inp_shexp", linear=True)
sigmoid("shared_expert_gate_sigmoid", "moe", "moe", "shared_expert_gate")
add(
    "ffn_shexp_gated",
    "moe",
    "moe",
    lambda v: v("ffn_shexp") * v("shared_expert_gate_sigmoid").reshape(-1, 1),
    variants={
        "shared-expert-gain": lambda v: v("ffn_shexp"),
        "shared-expert-gain, raw gate": lambda v: v("ffn_shexp") * v("shared_expert_gate").reshape(-1, 1),
    },
)
add(
    "ffn_out",
    "moe",
    "moe",
    lambda v: v("ffn_moe_out") + v("ffn_shexp_gated"),
    summed=lambda v: (v("ffn_moe_out"), v("ffn_shexp_gated")),
    variants={
        "missing-shared-expert": lambda v: v("ffn_moe_out"),
        "missing-experts": lambda v: v("ffn_shexp_gated"),
        "shared-expert-gain": lambda v: v("ffn_moe_out") + v("ffn_shexp"),
        "shared-expert-gain, twice": lambda v: v("ffn_moe_out") + 2 * v("ffn_shexp_gated"),
        "shared-expert-gain, four times": lambda v: v("ffn_moe_out") + 4 * v("ffn_shexp_gated"),
        "shared-expert-gain, eight times": lambda v: v("ffn_moe_out") + 8 * v("ffn_shexp_gated"),
        "shared-expert-gain, half": lambda v: v("ffn_moe_out") + v("ffn_shexp_gated") / 2,
    },
)
