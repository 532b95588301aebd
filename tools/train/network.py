"""The network that is trained: the engine's own pure functions over parameters by their GGUF names.

Parameters are a flat dict, GGUF tensor name -> f32 array of the file's shape, with one exception: a delta
net's `ssm_a`, which is negative in a file, is trained as log(-ssm_a) so that no step can turn its sign.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scarlet_jax import configs, ffn
from scarlet_jax import gguf as reader
from scarlet_jax.config import Config
from scarlet_jax.errors import BadInput
from scarlet_jax.forward import MIXERS, BlockWeights, Weights, head, init_state, trunk
from scarlet_jax.gguf import Metadata
from scarlet_jax.ops import implementations
from scarlet_jax.ops.quants import decode
from scarlet_jax.tools import synth
from scarlet_jax.tools.train import products
from scarlet_jax.types import Array

Parameters = dict[str, Array]

PRODUCTS = "train"  # whose products are used
implementations.OPT_IN[PRODUCTS] = products

# Every row is a multiple of 256 long, so that all K-quants fit, and no two axes are of one size if it can be.
SHAPE = synth.Shape(
    block_count=4,
    context_length=512,
    embedding_length=256,
    feed_forward_length=768,
    vocab_size=2048,
    head_count=4,
    head_count_kv=2,
    key_length=64,
    dimension_count=32,
    dimension_sections=(6, 5, 5, 0),
    full_attention_interval=2,
    state_size=64,
    group_count=2,
    time_step_rank=4,
)


def config(shape: synth.Shape, tokenizer: dict[str, Any]) -> Config:
    """The Config that a file of this shape and these `tokenizer.*` keys will be read as."""
    values = synth.ARCHS[shape.arch].metadata(shape) | tokenizer
    as_read = {key: value if _is_text(value) else np.array(value) for key, value in values.items()}
    return configs.find(shape.arch).config(Metadata(as_read, "the model in training"))


def _is_text(value: Any) -> bool:
    """Whether a GGUF reader gives the value as it is: not so an array of numbers."""
    return not isinstance(value, list) or isinstance(value[0], str)


def initial(shape: synth.Shape, seed: int) -> Parameters:
    """Fresh parameters: matrices of gain one, branches that end small, decays as the delta net papers start."""
    rng = np.random.default_rng(seed)
    tensors = synth.ARCHS[shape.arch].tensors(shape)
    return {name: jnp.asarray(_draw(name, dims, draw, shape, rng)) for name, dims, draw in tensors}


def _draw(
    name: str, dims: tuple[int, ...], draw: synth.Draw, shape: synth.Shape, rng: np.random.Generator
) -> np.ndarray:
    if name.endswith("ssm_a"):
        return np.log(-draw(rng, dims))
    if name.endswith("ssm_dt.bias"):
        return draw(rng, dims)
    if len(dims) == 1:
        return np.ones(dims, np.float32)  # norms
    ends_branch = name.endswith(("attn_output.weight", "ssm_out.weight", "ffn_down.weight"))
    gain = 1 / math.sqrt(2 * shape.block_count) if ends_branch else 1.0
    return rng.standard_normal(dims, np.float32) * np.float32(gain / math.sqrt(dims[-1]))


def tensors(parameters: Parameters) -> Parameters:
    """The tensors of the file."""
    return {name: -jnp.exp(x) if name.endswith("ssm_a") else x for name, x in parameters.items()}


def read(path: Path, shape: synth.Shape, tokenizer: dict[str, Any]) -> Parameters:
    """The parameters of a file, unpacked from whatever types it has; of a prediction block those that it has.

    Raises BadInput for a file of another shape or vocabulary.
    """
    file = reader.read(path)
    tokens = tokenizer["tokenizer.ggml.tokens"]
    if file.metadata.get("tokenizer.ggml.tokens") != tokens:
        raise BadInput(f"{path}: of another vocabulary; expected one learnt from the same seed")
    values = {}
    for name, dims, _ in synth.ARCHS[shape.arch].tensors(shape):
        tensor = file.tensors.get(name)
        if tensor is None and name.startswith(f"blk.{shape.block_count}."):
            continue
        if tensor is None or tensor.shape != dims:
            raise BadInput(f"{path}: {name}: {tensor and tensor.shape}; expected {dims}")
        x = decode(np.asarray(tensor.data), tensor.qtype)
        values[name] = jnp.log(-x) if name.endswith("ssm_a") else x
    return values


def weights(parameters: Parameters, cfg: Config) -> Weights:
    """The engine's weight pytree, head tied to the embedding."""
    by_name = tensors(parameters)
    table = by_name["token_embd.weight"]
    blocks = tuple(block_weights(by_name, i, cfg) for i in range(len(cfg.blocks)))
    return Weights(table, blocks, by_name["output_norm.weight"], table)


def block_weights(by_name: Parameters, index: int, cfg: Config) -> BlockWeights:
    """A block of the trunk, or behind it a prediction block, from tensors of the file."""
    block, prefix = (cfg.blocks + cfg.nextn)[index], f"blk.{index}."

    def group(module: Any, part: Any) -> Any:
        names = module.shapes(part, cfg.embedding_length)
        return module.Weights(**{_field(name): by_name[prefix + name] for name in names})

    return BlockWeights(
        attn_norm=by_name[prefix + "attn_norm.weight"],
        mixer=group(MIXERS[type(block.mixer)], block.mixer),
        post_attention_norm=by_name[prefix + "post_attention_norm.weight"],
        ffn=group(ffn, block.ffn),
    )


def _field(name: str) -> str:
    """The attribute of a tensor within its layer, as `scarlet_jax.load` names it."""
    return name.removesuffix(".weight").replace(".", "_")


def hidden(w: Weights, tokens: Array, cfg: Config) -> Array:
    """What the trunk makes of int32 (B, T) from an empty state, before the last norm: f32 (B, T, D)."""
    batch, length = tokens.shape
    count = jnp.full(batch, length, jnp.int32)
    return trunk(w, tokens, count, init_state(cfg, batch, length), cfg, implementation=PRODUCTS).hidden


def logits(parameters: Parameters, tokens: Array, cfg: Config) -> Array:
    """int32 (B, T) -> f32 (B, T, V), from an empty state."""
    w = weights(parameters, cfg)
    eps = cfg.layer_norm_rms_epsilon
    return head(w.output_norm, w.output, hidden(w, tokens, cfg), eps, implementation=PRODUCTS)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of text: tokens int32 (B, T + 1), and how much each one counts as a target, f32 (B, T + 1)."""

    tokens: Array
    weight: Array


def loss(parameters: Parameters, batch: Batch, cfg: Config) -> Array:
    """Mean weighted cross-entropy of the next token, in nats."""
    return cross_entropy(logits(parameters, batch.tokens[:, :-1], cfg), batch)


def cross_entropy(logits: Array, batch: Batch) -> Array:
    """Mean weighted nats of tokens 1 to T, each foreseen by the row of logits (B, T, V) before it."""
    target, weight = batch.tokens[:, 1:], batch.weight[:, 1:]
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * weight) / jnp.sum(weight)
