"""Hugging Face transformers as a reference engine: float32 on the CPU, eager attention.

PATH is a checkpoint directory (config.json and safetensors), or a qwen35 GGUF whose weights are put back into
the transformers model (transformers_model.py). Activations get llama.cpp's names where they mean the same,
with value heads in the order that a GGUF has.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.engines import steps
from scarlet_jax.tools.engines.transformers_model import Loaded, Order, libraries, load

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
    torch, transformers = libraries()
    loaded = load(Path(path))
    _check_tokens(tokens, loaded.model.config.vocab_size)
    passes = steps.split(tokens, decode)
    recorder = _Recorder(loaded, re.compile(select or ""))
    with torch.no_grad(), recorder.listening():
        joined = steps.join((len(part), recorder.record(part)) for part in passes)
    return joined, recorder.weights, f"transformers {transformers.__version__} (torch {torch.__version__})"


def logits(path: str | os.PathLike[str], tokens: Sequence[int]) -> np.ndarray:
    """The logits of every token, f32 (T, V)."""
    return taps(path, tokens, select="^result_output$")[0]["result_output"]


def _check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    if len(tokens) == 0:
        raise BadInput("no tokens: expected one or more")
    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        raise BadInput(f"token id {wrong[0]}: expected 0 to {vocabulary - 1}")


class _Call(NamedTuple):
    """One call of a module: its tensors (1, T, ...), the layer's cache by then, the scale in its weight."""

    input: Any
    output: Any
    cache: Any
    scale: float
    config: Any
    order: Order


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

    def __init__(self, loaded: Loaded, select: re.Pattern[str]) -> None:
        _, transformers = libraries()
        self.weights: dict[str, tuple[str, str]] = {}
        self._taps: dict[str, np.ndarray] = {}
        self._loaded = loaded
        self._cache = transformers.DynamicCache(config=loaded.model.config)
        self._order = Order.of(loaded.model.config)
        self._select = select

    def record(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Feeds `tokens` and returns their taps."""
        torch, _ = libraries()
        self._taps = {}
        self._loaded.model(torch.as_tensor(np.array([tokens])), past_key_values=self._cache, use_cache=True)
        return self._taps

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on every module that shows a tap, and an attention function that shows its own."""
        torch, transformers = libraries()
        tapped = functools.partial(_Recorder._attention, weakref.proxy(self))  # the registry outlives us
        transformers.AttentionInterface.register(_TAPPED, tapped)
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
                self._keep(tap + suffix, lambda fetch=fetch: fetch(call))
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
        self._keep(f"Qcur-{layer}", lambda: query.transpose(1, 2))
        self._keep(f"Kcur-{layer}", lambda: key[:, :, -T:].transpose(1, 2))
        self._keep(f"kq_soft_max-{layer}", lambda: weights.transpose(1, 2))
        self._keep(f"kqv-{layer}", lambda: heads)
        return heads, weights

    def _keep(self, tap: str, fetch: Callable[[], Any]) -> None:
        if self._select.search(tap):
            self._taps[tap] = np.array(fetch()[0].numpy(), np.float32, order="C")


def _shown(module: str) -> tuple[int | None, dict[str, Fetch]] | None:
    """The layer of a module, if it is in one, and the taps that it shows, if any."""
    if module in _MODEL_TAPS:
        return None, _MODEL_TAPS[module]
    match = re.fullmatch(r"model\.layers\.(\d+)\.?(.*)", module)
    return (int(match[1]), _LAYER_TAPS[match[2]]) if match and match[2] in _LAYER_TAPS else None
