"""Hugging Face transformers as a reference engine: float32 on the CPU, eager attention.

PATH is a checkpoint directory (config.json and safetensors), or a qwen35 GGUF whose weights are put back into
the transformers model by undoing what llama.cpp's converter did (spec section 3). Activations get llama.cpp's
names where they mean the same, with value heads in the order that a GGUF has. Two things are the model's own
whatever a file says: the epsilon of the delta net's query and key norm, 1e-6, and that a rotary pair which no
section claims turns with the time position. A GGUF with such pairs, or with rope scaling, is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open

from scarlet_jax.errors import BadInput
from scarlet_jax.gguf import Gguf, Tensor, read
from scarlet_jax.tools.engines import ggml, steps

MODEL_TYPE = "qwen3_5_text"  # transformers' name of the text model
ARCHITECTURE = "qwen35"  # the GGUF's
_TAPPED = "scarlet_tapped_eager"  # our attention function in transformers' registry


def taps(
    path: str | os.PathLike[str], tokens: Sequence[int], select: str | None = None, decode: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, str]], str]:
    """Runs `tokens` and returns (taps, weights, the engine's name and version).

    Taps are name -> f32, token axis first, in execution order; `select` is a regular expression, searched
    for in names. Weights are tap -> (weight name, type), for taps that are one weight's product. The last
    `decode` tokens are fed one at a time, the others in one pass; `steps.join` puts the parts together.
    Raises BadInput for what cannot be read or run, and when torch or transformers is not installed.
    """
    torch, transformers = _libraries()
    loaded = _load(Path(path))
    _check_tokens(tokens, loaded.model.config.vocab_size)
    passes = steps.split(tokens, decode)
    recorder = _Recorder(loaded, re.compile(select or ""))
    with torch.no_grad(), recorder.listening():
        joined = steps.join((len(part), recorder.record(part)) for part in passes)
    return joined, recorder.weights, f"transformers {transformers.__version__} (torch {torch.__version__})"


def logits(path: str | os.PathLike[str], tokens: Sequence[int]) -> np.ndarray:
    """The logits of every token, f32 (T, V)."""
    return taps(path, tokens, select="^result_output$")[0]["result_output"]


def _libraries() -> tuple[ModuleType, ModuleType]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise BadInput(
            f"the transformers engine: {error}; pip install 'scarlet_jax[transformers]'"
        ) from error
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    return torch, transformers


def _check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    if len(tokens) == 0:
        raise BadInput("no tokens: expected one or more")
    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        raise BadInput(f"token id {wrong[0]}: expected 0 to {vocabulary - 1}")


class _Order(NamedTuple):
    """Where GGUF takes each value head, each of all their channels, and each channel of q, k and v from.

    transformers groups: value head g r + j belongs to key head g. GGUF tiles: that head is number j Hk + g.
    So `theirs[order]` is GGUF's and `ours[argsort(order)]` is transformers'.
    """

    heads: np.ndarray
    values: np.ndarray
    mixed: np.ndarray

    @classmethod
    def of(cls, config: Any) -> _Order:
        """The order of a model with this transformers config."""
        Hk, Hv = config.linear_num_key_heads, config.linear_num_value_heads
        Dk, Dv = config.linear_key_head_dim, config.linear_value_head_dim
        heads = np.arange(Hv).reshape(Hk, Hv // Hk).T.ravel()
        values = np.arange(Hv * Dv).reshape(Hv, Dv)[heads].ravel()
        return cls(heads, values, np.concatenate([np.arange(2 * Hk * Dk), 2 * Hk * Dk + values]))


# --- Loading ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A model, and by parameter: the name and type of what it was made from, and the scale folded into it."""

    model: Any
    origins: Mapping[str, tuple[str, str]]
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _load(path: Path) -> _Loaded:
    return _load_checkpoint(path) if path.is_dir() else _load_gguf(read(path))


def _load_checkpoint(path: Path) -> _Loaded:
    _, transformers = _libraries()
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
        _require(
            config.model_type == MODEL_TYPE, path, f"model type {config.model_type!r}, not {MODEL_TYPE!r}"
        )
        return _Loaded(_from_pretrained(path, path), _stored(path))
    except BadInput:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(
            f"{path}: transformers cannot load it: {str(error).strip().splitlines()[0]}"
        ) from error


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
    torch, transformers = _libraries()
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


def _require(condition: bool, source: Path, problem: str) -> None:
    if not condition:
        raise BadInput(f"{source}: {problem}")


# --- A GGUF put back ----------------------------------------------------------------------------------------


def _same(x: np.ndarray, _: _Order) -> np.ndarray:
    return x


def _less_one(x: np.ndarray, _: _Order) -> np.ndarray:
    return x - 1


def _by_head(x: np.ndarray, order: _Order) -> np.ndarray:
    return x[np.argsort(order.heads)]


def _by_value(x: np.ndarray, order: _Order) -> np.ndarray:
    return x[np.argsort(order.values)]


def _by_channel(x: np.ndarray, order: _Order) -> np.ndarray:
    return x[np.argsort(order.mixed)]


def _log_decay(x: np.ndarray, order: _Order) -> np.ndarray:
    return np.log(-_by_head(x, order))


def _kernel(x: np.ndarray, order: _Order) -> np.ndarray:
    return _by_channel(x, order)[:, None]


def _columns_by_value(x: np.ndarray, order: _Order) -> np.ndarray:
    return _by_value(x.T, order).T


# transformers' parameter -> GGUF's tensor, and what undoes the converter.
Undo = Callable[[np.ndarray, _Order], np.ndarray]
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
        "linear_attn.conv1d.weight": ("ssm_conv1d.weight", _kernel),
        "linear_attn.dt_bias": ("ssm_dt.bias", _by_head),
        "linear_attn.A_log": ("ssm_a", _log_decay),
        "linear_attn.norm.weight": ("ssm_norm.weight", _same),
        "linear_attn.out_proj.weight": ("ssm_out.weight", _columns_by_value),
    },
}


def _load_gguf(file: Gguf) -> _Loaded:
    torch, _ = _libraries()
    config = _text_config(file)
    order = _Order.of(config)
    state, origins, scales = {}, {}, {}
    for parameter, name, undo in _parameters(config):
        tensor, rows = _find(file, name, config)
        scales[parameter] = _separate_scale(file, tensor)
        values = undo(_values(tensor)[rows], order) * scales[parameter]
        state[parameter] = torch.from_numpy(
            np.array(values, np.float32)
        )  # a copy: the file's map is read-only
        origins[parameter] = (tensor.name, tensor.qtype)
    if config.tie_word_embeddings:
        origins["lm_head.weight"] = origins["model.embed_tokens.weight"]
    return _Loaded(_from_pretrained(file.path, None, config=config, state_dict=state), origins, scales)


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


def _text_config(file: Gguf) -> Any:
    """The transformers config of a GGUF; every constant comes from the file."""
    _, transformers = _libraries()
    _require(
        file.architecture == ARCHITECTURE, file.path, f"{file.architecture!r}, expected {ARCHITECTURE!r}"
    )
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
    _require(
        scaling == "none" or (scaling == "linear" and factor in (0, 1)),
        file.path,
        "rope scaling is unsupported",
    )
    return {
        "rope_type": "default",
        "rope_theta": file.metadata.number(f"{ARCHITECTURE}.rope.freq_base", 10000.0),
        # transformers truncates head_dim * factor: one step up, so that rounding cannot lose a dimension
        "partial_rotary_factor": math.nextafter(rotary / head_dim, 1.0),
        "mrope_section": list(sections[:3]),
        "mrope_interleaved": True,
    }


# --- Taps ---------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One call of a module: its tensors (1, T, ...), the layer's cache by then, the scale in its weight."""

    input: Any
    output: Any
    cache: Any
    scale: float
    config: Any
    order: _Order


Fetch = Callable[[_Call], Any]


def _output(call: _Call) -> Any:
    return call.output


def _input(call: _Call) -> Any:
    return call.input


def _unscaled(call: _Call) -> Any:
    """llama.cpp names these products before it applies the weight's separate scale."""
    return call.output / call.scale


def _value_heads(x: Any, call: _Call) -> Any:
    """(T Hv, Dv), as the norm behind the delta rule sees it, -> (1, T, Hv, Dv)."""
    return x.reshape(1, -1, call.config.linear_num_value_heads, x.shape[-1])


# Module -> the taps that its call shows, (1, T, ...), states (1, ...). The last of a matrix is its product.
_MODEL_TAPS: dict[str, dict[str, Fetch]] = {
    "model.embed_tokens": {"model.input_embed": _output},
    "model.norm": {"result_norm": _output},
    "lm_head": {"result_output": _output},
}
_LAYER_TAPS: dict[str, dict[str, Fetch]] = {
    "input_layernorm": {"attn_norm": _output},
    "linear_attn.in_proj_qkv": {"linear_attn_qkv_mixed": lambda call: call.output[..., call.order.mixed]},
    "linear_attn.in_proj_z": {"z": lambda call: call.output[..., call.order.values]},
    "linear_attn.in_proj_b": {"beta": lambda call: call.output[..., call.order.heads, None]},
    "linear_attn.in_proj_a": {"alpha": lambda call: call.output[..., call.order.heads]},
    "linear_attn.norm": {
        "conv_state_last": lambda call: call.cache.conv_states[0][:, call.order.mixed, 1:].mT,
        "new_state": lambda call: call.cache.recurrent_states[0][:, call.order.heads].mT,
        "attn_output": lambda call: _value_heads(call.input, call)[:, :, call.order.heads],
    },
    "linear_attn.out_proj": {
        "final_output": lambda call: call.input[..., call.order.values],
        "linear_attn_out": _output,
    },
    "self_attn.q_proj": {"Qcur_full": _output},
    "self_attn.q_norm": {"Qcur_reshaped": _input, "Qcur_normed": _output},
    "self_attn.k_norm": {"Kcur_normed": _output},
    "self_attn.v_proj": {"Vcur": lambda call: call.output.unflatten(-1, (-1, call.config.head_dim))},
    "self_attn.o_proj": {"attn_gated": _input, "attn_output": _output},
    "post_attention_layernorm": {"attn_residual": _input, "attn_post_norm": _output},
    "mlp.gate_proj": {"ffn_gate": _unscaled},
    "mlp.up_proj": {"ffn_up": _unscaled},
    "mlp.down_proj": {"ffn_swiglu": _input, "ffn_out": _output},
    "": {"l_out": _output},
}


class _Recorder:
    """Runs a model over one sequence, pass by pass, and collects the taps."""

    def __init__(self, loaded: _Loaded, select: re.Pattern[str]) -> None:
        _, transformers = _libraries()
        self.weights: dict[str, tuple[str, str]] = {}
        self._taps: dict[str, np.ndarray] = {}
        self._loaded = loaded
        self._cache = transformers.DynamicCache(config=loaded.model.config)
        self._order = _Order.of(loaded.model.config)
        self._select = select

    def record(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Feeds `tokens` and returns their taps."""
        torch, _ = _libraries()
        self._taps = {}
        self._loaded.model(torch.as_tensor(np.array([tokens])), past_key_values=self._cache, use_cache=True)
        return self._taps

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on every module that shows a tap, and an attention function that shows its own."""
        torch, transformers = _libraries()
        transformers.AttentionInterface.register(_TAPPED, self._attention)
        transformers.AttentionMaskInterface.register(_TAPPED, transformers.masking_utils.eager_mask)
        self._loaded.model.set_attn_implementation(_TAPPED)
        hooks = []
        for name, module in self._loaded.model.named_modules():
            if shown := _shown(name):
                is_product = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
                hooks.append(module.register_forward_hook(self._hook(name, *shown, is_product)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(
        self, name: str, layer: int | None, shown: dict[str, Fetch], is_product: bool
    ) -> Callable[..., None]:
        suffix = "" if layer is None else f"-{layer}"
        product = list(shown)[-1] + suffix

        def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            cache = None if layer is None else self._cache.layers[layer]
            scale = self._loaded.scales.get(f"{name}.weight", 1.0)
            call = _Call(inputs[0], output, cache, scale, self._loaded.model.config, self._order)
            for tap, fetch in shown.items():
                self._record(tap + suffix, lambda fetch=fetch: fetch(call))
            if is_product and product in self._taps:
                self.weights[product] = self._loaded.origins[f"{name}.weight"]

        return hook

    def _attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> tuple[Any, Any]:
        """transformers' own eager attention: query (1, N, T, H), key and value (1, K, S, H)."""
        from transformers.models.qwen3_5.modeling_qwen3_5 import eager_attention_forward

        layer, T = module.layer_idx, query.shape[2]
        heads, weights = eager_attention_forward(module, query, key, value, mask, **options)
        self._record(f"Qcur-{layer}", lambda: query.transpose(1, 2))
        self._record(f"Kcur-{layer}", lambda: key[:, :, -T:].transpose(1, 2))
        self._record(f"kq_soft_max-{layer}", lambda: weights.transpose(1, 2))
        self._record(f"kqv-{layer}", lambda: heads)
        return heads, weights

    def _record(self, tap: str, fetch: Callable[[], Any]) -> None:
        if self._select.search(tap):
            self._taps[tap] = np.array(fetch()[0].numpy(), np.float32, order="C")


def _shown(module: str) -> tuple[int | None, dict[str, Fetch]] | None:
    """The layer of a module, if it is in one, and the taps that it shows, if any."""
    if module in _MODEL_TAPS:
        return None, _MODEL_TAPS[module]
    match = re.fullmatch(r"model\.layers\.(\d+)\.?(.*)", module)
    return (int(match[1]), _LAYER_TAPS[match[2]]) if match and match[2] in _LAYER_TAPS else None
