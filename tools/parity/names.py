"""Other engines' names for the same taps.

A map sends a source's name to ours, with `{}` for the layer number. Built-in maps are chosen by what the dump
says of its engine, or by what its names look like; `--map` adds to them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity.dump import Dump

# ik_llama.cpp (fact sheet section 5, "IK").
IK_LLAMA = {
    "qkv_mixed-{}": "linear_attn_qkv_mixed-{}",
    "q_fused-{}": "q_conv_predelta-{}",
    "k_fused-{}": "k_conv_predelta-{}",
    "q_conv_normed-{}": "q_conv_predelta-{}",
    "k_conv_normed-{}": "k_conv_predelta-{}",
    "ssm_output-{}": "attn_residual-{}",
    "Qaux-{}": "Qcur_full-{}",
    "Qcur_cont-{}": "Qcur_reshaped-{}",
    "gate_cont-{}": "gate_reshaped-{}",
    "Qcur_roped-{}": "Qcur-{}",
    "Kcur_roped-{}": "Kcur-{}",
    "fa-{}": "attn_pregate-{}",
    "qkv_gated-{}": "attn_gated-{}",
    "attn_out-{}": "attn_output-{}",
    "ffn_up_gate-{}": "ffn_swiglu-{}",
    "inp_embd": "model.input_embed",
}

LLAMA = {
    "inp_embd": "model.input_embed",
    "model.embed_tokens": "model.input_embed",
    "embd": "model.input_embed",
    "ffn_inp-{}": "attn_residual-{}",
    "kqv_out-{}": "attn_pregate-{}",
    "linear_attn_qkv_mixed (reshaped)-{}": "linear_attn_qkv_mixed-{}",
}

# transformers' module paths, with or without a leading "model." and "_out"/".output".
TRANSFORMERS = {
    "embed_tokens": "model.input_embed",
    "norm": "result_norm",
    "lm_head": "result_output",
    "layers.{}": "l_out-{}",
    "layers.{}.input_layernorm": "attn_norm-{}",
    "layers.{}.post_attention_layernorm": "attn_post_norm-{}",
    "layers.{}.linear_attn": "linear_attn_out-{}",
    "layers.{}.linear_attn.in_proj_qkv": "linear_attn_qkv_mixed-{}",
    "layers.{}.linear_attn.in_proj_z": "z-{}",
    "layers.{}.linear_attn.in_proj_b": "beta-{}",
    "layers.{}.linear_attn.in_proj_a": "alpha-{}",
    "layers.{}.linear_attn.norm": "final_output-{}",
    "layers.{}.linear_attn.out_proj": "linear_attn_out-{}",
    "layers.{}.self_attn": "attn_output-{}",
    "layers.{}.linear_attn.in_proj_qkvz": "in_proj_qkvz-{}",
    "layers.{}.linear_attn.in_proj_ba": "in_proj_ba-{}",
    "layers.{}.self_attn.qkv_proj": "wqkv-{}",
    "layers.{}.self_attn.q_proj": "Qcur_full-{}",
    "layers.{}.self_attn.v_proj": "Vcur-{}",
    "layers.{}.self_attn.k_proj": "Kcur_projected-{}",
    "layers.{}.self_attn.q_norm": "Qcur_normed-{}",
    "layers.{}.self_attn.k_norm": "Kcur_normed-{}",
    "layers.{}.self_attn.o_proj": "attn_output-{}",
    "layers.{}.mlp": "ffn_out-{}",
    "layers.{}.mlp.gate_proj": "ffn_gate-{}",
    "layers.{}.mlp.up_proj": "ffn_up-{}",
    "layers.{}.mlp.gate_up_proj": "ffn_gate_up-{}",
    "layers.{}.mlp.down_proj": "ffn_out-{}",
    "layers.{}.mlp.gate": "ffn_moe_logits-{}",
    "layers.{}.mlp.shared_expert_gate": "shared_expert_gate-{}",
    "layers.{}.mlp.shared_expert": "ffn_shexp-{}",
}


def rename(dump: Dump, mapping: Mapping[str, str] | str | os.PathLike[str] | None = None) -> Dump:
    """The dump under our names; a name that no map knows stays."""
    table = _built_in(dump) | _scaled(dump) | _given(mapping)
    pairs: dict[str, str] = {}  # ours -> theirs
    for name in dump:
        new = translate(name, table)
        if new not in pairs or name == new:
            pairs[new] = name
    if all(new == old for new, old in pairs.items()):
        return dump
    back = {old: new for new, old in pairs.items()}
    return dataclasses.replace(
        dump,
        taps=_Renamed(dump.taps, pairs),
        order=[back[name] for name in dump.order if name in back],
        weights={back.get(tap, tap): weight for tap, weight in dump.weights.items()},
    )


def _scaled(dump: Dump) -> dict[str, str]:
    """Where a product and the same times the weight's own scale are both taps, the latter is the product."""
    table = {}
    for name in dump:
        op, _, layer = name.rpartition("-")
        plain = next((op.removesuffix(end) for end in ("_scaled", "_s") if op.endswith(end)), "")
        if layer.isdigit() and plain.startswith("ffn_") and plain != "ffn_moe_weights":
            table |= {f"{op}-{{}}": f"{plain}-{{}}", f"{plain}-{{}}": f"{plain}_unscaled-{{}}"}
    return table


def translate(name: str, table: Mapping[str, str]) -> str:
    """One name through a table with `{}` for the layer number."""
    plain = re.sub(r"(_out|\.output)$", "", re.sub(r"^(model\.|language_model\.|transformer\.)+", "", name))
    for candidate in (name, plain):
        for number in ("", *re.findall(r"\d+", candidate)):
            pattern = candidate if number == "" else _with_hole(candidate, number)
            if pattern in table:
                return table[pattern].replace("{}", number)
    return name


def _with_hole(name: str, number: str) -> str:
    return re.sub(rf"(?<!\d){number}(?!\d)", "{}", name, count=1)


class _Renamed(Mapping[str, Any]):
    def __init__(self, taps: Mapping[str, Any], names: Mapping[str, str]):
        self._taps, self._names = taps, names

    def __getitem__(self, name: str) -> Any:
        return self._taps[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# llama.cpp's lfm2: transformers' modules, where the layer's number was meant to be put into the name; `Qcur` and
# `Kcur` are the projections.
_LFM2_MODULES = {
    "operator_norm": "attn_norm",
    "ffn_out": "attn_post_norm",
    "self_attn.q_layernorm": "Qcur_normed",
    "self_attn.k_layernorm": "Kcur_normed",
    "self_attn.out_proj": "attn_output",
    **{f"conv.{part}": f"conv_{part}" for part in ("in_proj", "conv", "out_proj")},
}
_PROJECTED = {"Qcur-{}": "Qcur_reshaped-{}", "Kcur-{}": "Kcur_projected-{}", "Vcur-{}": "Vcur_projected-{}"}
LFM2 = {f"model.layers.{{}}.{theirs}-{{}}": f"{ours}-{{}}" for theirs, ours in _LFM2_MODULES.items()} | {
    **{f"{head}-{{}}": _PROJECTED[f"{head}-{{}}"] for head in ("Qcur", "Kcur")},
    **{f"{head}_rope-{{}}": f"{head}-{{}}" for head in ("Qcur", "Kcur")},
}
# llama.cpp's falcon-h1: `Qcur` and its like are the projections too, and `ssm_in` is the input once more.
FALCON_H1 = {
    **_PROJECTED,
    **{f"{head}-post-rope-{{}}": f"{head}-{{}}" for head in ("Qcur", "Kcur", "Vcur")},
    **{"attn_out-{}": "attn_output-{}", "ssm_out-{}": "mamba_out-{}"},
}


def _built_in(dump: Dump) -> dict[str, str]:
    if any(name.startswith("model.layers.{}") for name in dump):
        return LLAMA | LFM2
    if any(name.startswith("Qcur-post-rope-") for name in dump):
        return LLAMA | FALCON_H1
    modules = any(re.search(r"layers\.\d+", name) for name in dump)
    if modules:
        return dict(TRANSFORMERS)
    fused = any(name.startswith(("Qaux-", "fa-", "ffn_up_gate-", "q_fused-", "Qcur_roped-")) for name in dump)
    return dict(LLAMA) | (IK_LLAMA if fused or "ik" in dump.engine.lower().split("_")[0] else {})


def _given(mapping: Mapping[str, str] | str | os.PathLike[str] | None) -> dict[str, str]:
    if mapping is None or isinstance(mapping, Mapping):
        return dict(mapping or {})
    try:
        table = json.loads(Path(mapping).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"--map {mapping}: not readable as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise BadInput(f"--map {mapping}: expected a JSON object of tap name -> tap name")
    return table
