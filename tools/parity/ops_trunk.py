"""The ends of the model, and what every layer has: norms before its two halves, and the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from scarlet_jax.tools.parity.graph import add
from scarlet_jax.tools.parity.ops_shared import bare_norm, linear, norm, residual


def _embed(v: Any, offset: int = 0) -> np.ndarray:
    ids = np.asarray(v.facts.tokens)[slice(*v.facts.kept)]
    return v.rows("token_embd", ids + offset)


add(
    "model.input_embed",
    "",
    "embedding",
    _embed,
    weight="token_embd",
    source=True,
    variants={
        "embedding-scale": lambda v: _embed(v) * _embed(v).shape[1] ** 0.5,
        "token-offset": lambda v: _embed(v, 1),
        "token-offset, -1": lambda v: _embed(v, -1),
    },
)
bare_norm("norm", "end", lambda v: v.before())
norm("result_norm", "end", lambda v: v.before(), "output_norm")
norm("h_nextn", "end", lambda v: v.before(), "output_norm", alias=True)


def _head(v: Any) -> np.ndarray:
    return v.linear("output", v("result_norm"))


add(
    "result_output",
    "end",
    "head",
    _head,
    weight="output",
    linear=True,
    variants={
        "tied-head": lambda v: v("result_norm") @ v.weight("token_embd").T,
        "missing-norm": lambda v: v.linear("output", v.before()),
        "soft-cap": lambda v: 30 * np.tanh(_head(v) / 30),
    },
)

norm("attn_norm", "", lambda v: v.before(), "attn_norm")
norm("attn_post_norm", "", lambda v: v("attn_residual"), "post_attention_norm")
norm("ffn_norm", "", lambda v: v("attn_residual"), "ffn_norm")
bare_norm("norm", "", lambda v: v("attn_residual"))


def _mixed(*branches: str) -> Callable[[Any], np.ndarray]:
    """What a layer's mixer gives: the first of these taps that was dumped, else the first as it is computed."""
    return lambda v: v(next((name for name in branches if v.has(name)), branches[0]))


# A layer's mixer by its kind; in a parallel one attention and a state space add up.
_MIXERS = {
    "ssm": ("linear_attn_out", "mamba_out", "conv_out_proj"),
    "attention": ("attn_output",),
    "parallel": ("layer_out",),
}
for _kind, _branch in ((kind, _mixed(*branches)) for kind, branches in _MIXERS.items()):
    residual(
        "attn_residual",
        _kind,
        "attention" if _kind == "parallel" else _kind,
        lambda v: v.before(),
        _branch,
        residual_source=lambda v, branch=_branch: v("attn_norm") + branch(v),
    )
add("layer_out", "parallel", "attention", lambda v: v("attn_output") + v("mamba_out"))
linear("ssm_in", "", "ssm", "ssm_in", "attn_norm")
linear("ssm_in_proj", "", "ssm", "ssm_in", "attn_norm")
linear("conv_in_proj", "", "ssm", "shortconv.in_proj", "attn_norm")
residual(
    "l_out",
    "",
    "ffn",
    lambda v: v("attn_residual"),
    lambda v: v("ffn_out"),
    residual_source=lambda v: v("attn_post_norm") + v("ffn_out"),
    residual_before_mixer=lambda v: v.before() + v("ffn_out"),
)
