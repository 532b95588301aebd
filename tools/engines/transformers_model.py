"""Models of the transformers engine: a checkpoint directory, or a qwen35 GGUF put back.

Putting back undoes what llama.cpp's converter did (spec section 3), with weights decoded by gguf-py. Two
things are the transformers model's own whatever a file says: the epsilon of the delta net's query and key
norm, 1e-6, and that a rotary pair which no section claims turns with the time position. A GGUF with such
pairs is refused, as is rope scaling. The metadata is read here and not by the engine under test, so that the
two share no mistake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gguf
import numpy as np
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from scarlet_jax.errors import BadInput
from scarlet_jax.gguf import Gguf, Tensor, read
from scarlet_jax.tools.engines import ggml

MODEL_TYPE = "qwen3_5_text"  # transformers' name of the text model
ARCHITECTURE = "qwen35"  # the GGUF's


def libraries() -> tuple[ModuleType, ModuleType]:
    """torch and transformers, quiet. Raises BadInput when they are not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        install = "pip install 'scarlet_jax[transformers]'"
        raise BadInput(f"the transformers engine: {error}; {install}") from error
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    return torch, transformers


class Order(NamedTuple):
    """Where GGUF takes each value head, each of all their channels, and each channel of q, k and v from.

    transformers groups: value head g r + j belongs to key head g. GGUF tiles: that head is number j Hk + g.
    So `theirs[order]` is GGUF's and `ours[argsort(order)]` is transformers'.
    """

    heads: np.ndarray
    values: np.ndarray
    mixed: np.ndarray

    @classmethod
    def of(cls, config: Any) -> Order:
        """The order of a model with this transformers config."""
        Hk, Hv = config.linear_num_key_heads, config.linear_num_value_heads
        Dk, Dv = config.linear_key_head_dim, config.linear_value_head_dim
        heads = np.arange(Hv).reshape(Hk, Hv // Hk).T.ravel()
        values = np.arange(Hv * Dv).reshape(Hv, Dv)[heads].ravel()
        return cls(heads, values, np.concatenate([np.arange(2 * Hk * Dk), 2 * Hk * Dk + values]))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in float32, and by parameter: the file's name and type for it, and the scale folded into it."""

    model: Any
    origins: Mapping[str, tuple[str, str]]
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)


def load(path: Path) -> Loaded:
    """Raises BadInput for what is not such a model, whole."""
    return _load_checkpoint(path) if path.is_dir() else _load_gguf(read(path))


@contextlib.contextmanager
def _refusing(source: Path) -> Iterator[None]:
    """What transformers does not accept is bad input."""
    try:
        yield
    except BadInput:
        raise
    except (
        OSError,
        ValueError,
        ArithmeticError,
        RuntimeError,
        StrictDataclassError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{source}: transformers cannot load it: {reason}") from error


def _require(condition: bool, source: Path, problem: str) -> None:
    if not condition:
        raise BadInput(f"{source}: {problem}")


# --- A checkpoint -------------------------------------------------------------------------------------------


def _load_checkpoint(path: Path) -> Loaded:
    _, transformers = libraries()
    with _refusing(path):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
        kind = config.model_type
        _require(kind == MODEL_TYPE, path, f"model type {kind!r}, not {MODEL_TYPE!r}")
        return Loaded(_from_pretrained(path, path), _stored(path))


def _stored(path: Path) -> dict[str, tuple[str, str]]:
    """Parameter -> name and type in the checkpoint, where the text model may be part of one for images."""
    origins = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118, a mapping it is not
                kind = tensors.get_slice(name).get_dtype()
                origins[name.replace("model.language_model.", "model.")] = (name, kind)
    return {"lm_head.weight": origins["model.embed_tokens.weight"]} | origins


def _from_pretrained(source: Path, checkpoint: Path | None, **parts: Any) -> Any:
    """The model in float32, every parameter given by `source` and of the right shape."""
    torch, transformers = libraries()
    model, report = transformers.Qwen3_5ForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **parts,
    )
    for name in sorted(report["missing_keys"]):
        raise BadInput(f"{source}: weight {name} is missing")
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise BadInput(f"{source}: weight {name} has shape {tuple(found)}, expected {tuple(expected)}")
    return model.eval()


# --- A GGUF: its weights ------------------------------------------------------------------------------------


def _load_gguf(file: Gguf) -> Loaded:
    torch, _ = libraries()
    with _refusing(file.path):
        config = _text_config(file)
        order, shapes = Order.of(config), _shapes(config)
    state, origins, scales = {}, {}, {}
    for parameter, name, undo in _parameters(config):
        tensor, rows = _find(file, name, config)
        scales[parameter] = _separate_scale(file, tensor)
        values = _values(tensor)[rows]
        expected = _stored_shape(shapes[parameter])
        _require(values.shape == expected, file.path, f"tensor {name} is {values.shape}, expected {expected}")
        values = np.array(
            undo(values, order) * scales[parameter], np.float32
        )  # a copy: the file is read-only
        state[parameter] = torch.from_numpy(values.reshape(shapes[parameter]))
        origins[parameter] = (tensor.name, tensor.qtype)
    if config.tie_word_embeddings:
        origins["lm_head.weight"] = origins["model.embed_tokens.weight"]
    return Loaded(_from_pretrained(file.path, None, config=config, state_dict=state), origins, scales)


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter; nothing is allocated."""
    torch, transformers = libraries()
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same in a GGUF, which drops the middle of a convolution's (C, 1, W)."""
    return (shape[0], shape[2]) if len(shape) == 3 else shape


def _parameters(config: Any) -> Iterator[tuple[str, str, Undo]]:
    """Each parameter of the model, the name of the tensor that it is made from, and how."""
    for parameter, (name, undo) in _MODEL_WEIGHTS.items():
        if parameter != "lm_head.weight" or not config.tie_word_embeddings:
            yield parameter, name, undo
    for i, kind in enumerate(config.layer_types):
        for parameter, (name, undo) in (_LAYER_WEIGHTS | _MIXER_WEIGHTS[kind]).items():
            yield f"model.layers.{i}.{parameter}", f"blk.{i}.{name}", undo


def _find(file: Gguf, name: str, config: Any) -> tuple[Tensor, slice]:
    """A tensor, or the rows that stand for it in the fused query, key and value of full attention."""
    if name in file.tensors:
        return file.tensors[name], slice(None)
    block, _, stem = name.rpartition(".attn_")
    queries = 2 * config.num_attention_heads * config.head_dim  # and their gates
    keys = config.num_key_value_heads * config.head_dim
    starts = {"q.weight": (0, queries), "k.weight": (queries, keys), "v.weight": (queries + keys, keys)}
    fused = f"{block}.attn_qkv.weight"
    _require(stem in starts and fused in file.tensors, file.path, f"tensor {name} is missing")
    start, length = starts[stem]
    return file.tensors[fused], slice(start, start + length)


def _values(tensor: Tensor) -> np.ndarray:
    """f32 values, by the reference decoders."""
    if tensor.qtype in ("Q1_0", "Q2_0"):  # unknown to gguf-py
        return ggml.to_float(tensor.qtype, tensor.data)
    return gguf.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.qtype])


def _separate_scale(file: Gguf, tensor: Tensor) -> float:
    """What the file multiplies a product with this weight by (spec section 2)."""
    scale = file.tensors.get(tensor.name.removesuffix("weight") + "scale")
    return float(scale.array()[0]) if scale else 1.0


def _same(x: np.ndarray, _: Order) -> np.ndarray:
    return x


def _less_one(x: np.ndarray, _: Order) -> np.ndarray:
    return x - 1


def _by_head(x: np.ndarray, order: Order) -> np.ndarray:
    return x[np.argsort(order.heads)]


def _by_value(x: np.ndarray, order: Order) -> np.ndarray:
    return x[np.argsort(order.values)]


def _by_channel(x: np.ndarray, order: Order) -> np.ndarray:
    return x[np.argsort(order.mixed)]


def _log_decay(x: np.ndarray, order: Order) -> np.ndarray:
    return np.log(-_by_head(x, order))


def _columns_by_value(x: np.ndarray, order: Order) -> np.ndarray:
    return _by_value(x.T, order).T


# transformers' parameter -> GGUF's tensor, and what undoes the converter.
Undo = Callable[[np.ndarray, Order], np.ndarray]
_MODEL_WEIGHTS: dict[str, tuple[str, Undo]] = {
    "model.embed_tokens.weight": ("token_embd.weight", _same),
    "model.norm.weight": ("output_norm.weight", _less_one),
    "lm_head.weight": ("output.weight", _same),
}
_LAYER_WEIGHTS: dict[str, tuple[str, Undo]] = {
    "input_layernorm.weight": ("attn_norm.weight", _less_one),
    "post_attention_layernorm.weight": ("post_attention_norm.weight", _less_one),
    "mlp.gate_proj.weight": ("ffn_gate.weight", _same),
    "mlp.up_proj.weight": ("ffn_up.weight", _same),
    "mlp.down_proj.weight": ("ffn_down.weight", _same),
}
_MIXER_WEIGHTS: dict[str, dict[str, tuple[str, Undo]]] = {
    "full_attention": {
        "self_attn.q_proj.weight": ("attn_q.weight", _same),
        "self_attn.k_proj.weight": ("attn_k.weight", _same),
        "self_attn.v_proj.weight": ("attn_v.weight", _same),
        "self_attn.o_proj.weight": ("attn_output.weight", _same),
        "self_attn.q_norm.weight": ("attn_q_norm.weight", _less_one),
        "self_attn.k_norm.weight": ("attn_k_norm.weight", _less_one),
    },
    "linear_attention": {
        "linear_attn.in_proj_qkv.weight": ("attn_qkv.weight", _by_channel),
        "linear_attn.in_proj_z.weight": ("attn_gate.weight", _by_value),
        "linear_attn.in_proj_a.weight": ("ssm_alpha.weight", _by_head),
        "linear_attn.in_proj_b.weight": ("ssm_beta.weight", _by_head),
        "linear_attn.conv1d.weight": ("ssm_conv1d.weight", _by_channel),
        "linear_attn.dt_bias": ("ssm_dt.bias", _by_head),
        "linear_attn.A_log": ("ssm_a", _log_decay),
        "linear_attn.norm.weight": ("ssm_norm.weight", _same),
        "linear_attn.out_proj.weight": ("ssm_out.weight", _columns_by_value),
    },
}


# --- A GGUF: its config -------------------------------------------------------------------------------------


def _text_config(file: Gguf) -> Any:
    """The transformers config of a GGUF; every constant comes from the file."""
    _, transformers = libraries()
    arch = file.architecture
    _require(arch == ARCHITECTURE, file.path, f"architecture {arch!r}, expected {ARCHITECTURE!r}")
    layer_types = _layer_types(file)
    every = range(len(layer_types))
    full = [i for i in every if layer_types[i] == "full_attention"] or every
    head_dim = _integer(file, "attention.key_length")
    return transformers.Qwen3_5TextConfig(
        vocab_size=len(file.metadata.strings("tokenizer.ggml.tokens")),
        hidden_size=_integer(file, "embedding_length"),
        intermediate_size=_one_for(file, "feed_forward_length", every),
        num_hidden_layers=len(layer_types),
        layer_types=layer_types,
        num_attention_heads=_one_for(file, "attention.head_count", full),
        num_key_value_heads=_one_for(file, "attention.head_count_kv", full),
        head_dim=head_dim,
        linear_conv_kernel_dim=_integer(file, "ssm.conv_kernel"),
        linear_num_key_heads=_integer(file, "ssm.group_count"),
        linear_num_value_heads=_integer(file, "ssm.time_step_rank"),
        linear_key_head_dim=_integer(file, "ssm.state_size"),
        linear_value_head_dim=_integer(file, "ssm.inner_size") // _integer(file, "ssm.time_step_rank"),
        max_position_embeddings=_integer(file, "context_length"),
        rms_norm_eps=file.metadata.number(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope_parameters(file, head_dim),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def _integer(file: Gguf, key: str, default: int | None = None) -> int:
    return file.metadata.integer(f"{ARCHITECTURE}.{key}", default)


def _one_for(file: Gguf, key: str, layers: Sequence[int]) -> int:
    """The value that the given layers share: transformers has one for all."""
    values = file.metadata.integers(f"{ARCHITECTURE}.{key}", _integer(file, "block_count"))
    shared = {values[i] for i in layers}
    _require(len(shared) == 1, file.path, f"{key} differs between layers, which transformers cannot express")
    return shared.pop()


def _layer_types(file: Gguf) -> list[str]:
    """The mixers of the trunk: `block_count` counts multi-token-prediction blocks too (spec section 1)."""
    blocks = _integer(file, "block_count")
    _require(blocks <= len(file.tensors), file.path, f"block_count {blocks}, more than there are tensors")
    listed = f"{ARCHITECTURE}.attention.recurrent_layers"
    if listed in file.metadata:
        recurrent = file.metadata.integers(listed, blocks)
    else:
        interval = _integer(file, "full_attention_interval", 4)
        recurrent = [(i + 1) % interval for i in range(blocks)]
    trunk = recurrent[: blocks - _integer(file, "nextn_predict_layers", 0)]
    return ["linear_attention" if is_recurrent else "full_attention" for is_recurrent in trunk]


def _rope_parameters(file: Gguf, head_dim: int) -> dict[str, Any]:
    rotary = _integer(file, "rope.dimension_count", head_dim)
    sections = file.metadata.integers(f"{ARCHITECTURE}.rope.dimension_sections", 4)
    turns = [i % sum(sections) for i in range(rotary // 2)]
    unclaimed = [i for i, j in enumerate(turns) if j >= 3 * sections[j % 3]]
    _require(
        not unclaimed,
        file.path,
        f"rope sections {sections} leave rotary pairs {unclaimed} to a position that transformers lacks",
    )
    scaling = file.metadata.string(f"{ARCHITECTURE}.rope.scaling.type", "linear")
    factor = file.metadata.number(f"{ARCHITECTURE}.rope.scaling.factor", 1.0)
    is_plain = scaling == "none" or (scaling == "linear" and factor in (0, 1))
    _require(is_plain, file.path, f"rope scaling {scaling!r} by {factor}, expected none")
    return {
        "rope_type": "default",
        "rope_theta": file.metadata.number(f"{ARCHITECTURE}.rope.freq_base", 10000.0),
        # transformers truncates head_dim * factor: one step up, so that rounding cannot lose a dimension
        "partial_rotary_factor": math.nextafter(rotary / head_dim, 1.0),
        "mrope_section": list(sections[:3]),
        "mrope_interleaved": True,
    }
