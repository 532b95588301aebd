"""What the operations have to know about a model: from a dump's config, from a GGUF's metadata, or from shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scarlet_jax.tools.parity.dump import Dump


@dataclasses.dataclass(frozen=True)
class Facts:
    """Sizes and conventions; zero or empty where nobody says.

    Attributes:
        tokens: the token ids of the run.
        eps: of every RMS norm and of the delta net's L2 norm.
        head_dim: H of full attention.
        rotary_dims: dims of a head that are rotated; 0 for all.
        rope_base: 0 where unknown: then the angles are read off the reference.
        sections: pairs turned by time, height, width, extra (fact sheet section 4); empty for all by time.
        adjacent: pairs of neighbouring dims instead of halves.
        first_position: rope position of the first token.
        key_heads: Hk.
        value_heads: Hv.
        key_dim: Dk.
        value_dim: Dv.
        conv_kernel: W.
        head_mapping: which key head a value head reads: "tile" (h mod Hk) or "repeat" (h div r).
        query_scaled: queries of the delta rule were tapped after their scale.
        l2_floor: the L2 norm is x / max(|x|, eps).
        experts_used: k of the router.
        kept: first and last (exclusive) of the token rows that are looked at.
        cut: the compared rows are not all rows of the run: nothing that looks back can be re-run.
    """

    tokens: tuple[int, ...] = ()
    eps: float = 1e-6
    head_dim: int = 0
    rotary_dims: int = 0
    rope_base: float = 0.0
    sections: tuple[int, ...] = ()
    adjacent: bool = False
    first_position: int = 0
    key_heads: int = 0
    value_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    conv_kernel: int = 4
    head_mapping: str = "tile"
    query_scaled: bool = False
    l2_floor: bool = False
    experts_used: int = 0
    cut: bool = False
    kept: tuple[int, int | None] = (0, None)

    @property
    def rotary(self) -> int:
        """Dims of a head that are rotated."""
        return self.rotary_dims or self.head_dim

    def rope_turns(self, pair: int) -> float:
        """1 where a text position turns rotary pair `pair`, 0 where the (zero) extra component does (IMROPE)."""
        if sum(self.sections) == 0:
            return 1.0
        t, h, w = self.sections[:3]
        j = pair % sum(self.sections)
        return float(any(j % 3 == c and j < 3 * length for c, length in enumerate((t, h, w))))


def gather(dumps: Sequence[Dump], metadata: Mapping[str, Any] | None) -> Facts:
    """The facts of a comparison: the model file's word first, then the dumps' configs, then their shapes."""
    known: dict[str, Any] = {}
    for dump in reversed(dumps):
        known |= from_shapes(dump)
    for dump in reversed(dumps):
        known |= from_config(dump.config)
    if metadata:
        known |= from_metadata(metadata)
    tokens = next((tuple(d.tokens) for d in dumps if len(d.tokens)), ())
    names = {field.name for field in dataclasses.fields(Facts)}
    return Facts(tokens=tokens, **{k: v for k, v in known.items() if k in names and k != "tokens"})


def from_shapes(dump: Dump) -> dict[str, Any]:
    """Head counts and dims, as the shapes of the dump's taps show them."""
    known: dict[str, Any] = {}
    for name in dump:
        op, _, layer = name.rpartition("-")
        if not layer.isdigit() or op not in _SHAPES or known.keys() >= set(_SHAPES[op]):
            continue
        shape = dump[name].shape
        if len(shape) == 3:
            known |= {key: int(shape[axis]) for key, axis in _SHAPES[op].items()}
        elif op == "conv_states_reshaped" and len(shape) == 2:
            known["conv_kernel"] = int(shape[0]) + 1
        elif op == "ffn_moe_topk" and len(shape) == 2:
            known["experts_used"] = int(shape[1])
    return known


_SHAPES = {
    "q_conv": {"key_heads": 1, "key_dim": 2},
    "k_conv": {"key_heads": 1, "key_dim": 2},
    "k_conv_predelta": {"key_heads": 1, "key_dim": 2},
    "v_conv_predelta": {"value_heads": 1, "value_dim": 2},
    "Kcur": {"head_dim": 2},
    "Qcur": {"head_dim": 2},
    "Qcur_normed": {"head_dim": 2},
    "conv_states_reshaped": {"conv_kernel": 0},
    "ffn_moe_topk": {"experts_used": 1},
}


def from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Facts from GGUF keys (fact sheet section 1)."""
    arch = metadata.get("general.architecture", "")
    names = {
        "eps": "attention.layer_norm_rms_epsilon",
        "head_dim": "attention.key_length",
        "rotary_dims": "rope.dimension_count",
        "rope_base": "rope.freq_base",
        "key_heads": "ssm.group_count",
        "value_heads": "ssm.time_step_rank",
        "key_dim": "ssm.state_size",
        "conv_kernel": "ssm.conv_kernel",
        "experts_used": "expert_used_count",
        "sections": "rope.dimension_sections",
    }
    found = {fact: metadata.get(f"{arch}.{key}") for fact, key in names.items()}
    known = {fact: value for fact, value in found.items() if value is not None}
    if "sections" in known:
        known["sections"] = tuple(int(n) for n in np.ravel(known["sections"]))
    if known.get("value_heads") and f"{arch}.ssm.inner_size" in metadata:
        known["value_dim"] = int(metadata[f"{arch}.ssm.inner_size"]) // int(known["value_heads"])
    if arch == "qwen3next":
        known |= {"head_mapping": "repeat", "sections": ()}
    known["adjacent"] = arch == "llama"
    return known


# Words of engines' configs -> facts. A config may nest; the first scalar under the word counts.
_CONFIG_WORDS = {
    "layer_norm_rms_epsilon": "eps",
    "rms_norm_eps": "eps",
    "key_length": "head_dim",
    "head_dim": "head_dim",
    "dimension_count": "rotary_dims",
    "freq_base": "rope_base",
    "rope_theta": "rope_base",
    "dimension_sections": "sections",
    "group_count": "key_heads",
    "linear_num_key_heads": "key_heads",
    "time_step_rank": "value_heads",
    "linear_num_value_heads": "value_heads",
    "state_size": "key_dim",
    "linear_key_head_dim": "key_dim",
    "linear_value_head_dim": "value_dim",
    "conv_kernel": "conv_kernel",
    "linear_conv_kernel_dim": "conv_kernel",
    "head_mapping": "head_mapping",
    "expert_used_count": "experts_used",
    "num_experts_per_tok": "experts_used",
}


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts from a dump's config: ours (GGUF words) or a transformers one, however nested."""
    known: dict[str, Any] = {}
    for word, value in _walk(config):
        fact = _CONFIG_WORDS.get(word.rsplit(".", 1)[-1])
        if fact == "sections" and isinstance(value, list | tuple):
            known.setdefault(fact, tuple(int(n) for n in value))
        elif fact and isinstance(value, int | float | str) and not isinstance(value, bool) and value:
            known.setdefault(fact, value)
        elif word == "kind" and value == "norm":
            known.setdefault("adjacent", True)
        elif word == "kind" and value == "neox":
            known["sections"] = ()
    return known


def _walk(node: Any):
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield str(key), value
            yield from _walk(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _walk(value)
