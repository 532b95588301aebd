"""The ends of the model, and what every layer has: norms before its two halves, and the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from scarlet_jax.tools.parity.graph import add
from scarlet_jax.tools.parity.ops_shared import bare_norm, norm, residual


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


for _kind, _branch in (("ssm", "linear_attn_out"), ("attention", "attn_output")):
    residual(
        "attn_residual",
        _kind,
        _kind,
        lambda v: v.before(),
        lambda v, branch=_branch: v(branch),
        residual_source=lambda v, branch=_branch: v("attn_norm") + v(branch),
    )
residual(
    "l_out",
    "",
    "ffn",
    lambda v: v("attn_residual"),
    lambda v: v("ffn_out"),
    residual_source=lambda v: v("attn_post_norm") + v("ffn_out"),
    residual_before_mixer=lambda v: v.before() + v("ffn_out"),
)
