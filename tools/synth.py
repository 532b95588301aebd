"""Writes a random model of a real shape, quantised by llama.cpp's own quantiser.

Weights are scaled so that activations stay of order one through every layer and logits are spread as a
trained model's are. The same seed gives the same weights whatever the quant type, so that an F32 file is the
truth behind a Q4_K_M one.

example: scarlet synth tiny.gguf --size tiny --quant Q4_K_M
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from rich.console import Console
from rich.progress import Progress

from scarlet_jax.errors import BadInput
from scarlet_jax.tools import synth_vocabulary
from scarlet_jax.tools.engines import ggml

CHUNK_ELEMENTS = 1 << 20  # weights drawn and packed at a time: a few MiB a thread, whatever the model


@dataclasses.dataclass(frozen=True)
class Shape:
    """Every size of a model, by the words of its GGUF keys; the default is "tiny".

    All axes are free. `recurrent_layers`, where given, lists the delta net layers, and then
    `full_attention_interval` is not written. `fused_qkv` stores a full attention layer's q, k and v as one
    tensor; `scales` adds an `X.scale` tensor to each weight; `nextn_predict_layers` adds prediction blocks
    after the `block_count` trunk layers (the file's own count is their sum). With an `expert_count` the
    feed-forward networks are mixtures of experts, with a shared one if that has a size;
    `own_head` gives a prediction block its own embedding and head, and no norm before the head.
    `fused_gate_up` stores the experts' gate and up as one tensor. `legacy_ssm_in` stores a qwen3next delta
    net's queries, keys, values and gate as one. `ssm_norm` is Mamba-2's, which falcon-h1 may do without.
    `biases` are the roles that have one; `freq_factors` adds the table that divides llama's rotary
    frequencies; `rope_scaling` are keys under `rope.scaling` and their values.
    """

    arch: str = "qwen35"
    block_count: int = 4
    context_length: int = 4096
    embedding_length: int = 256
    feed_forward_length: int = 1024
    vocab_size: int = 512
    head_count: int = 8
    head_count_kv: int = 2
    key_length: int = 64
    dimension_count: int = 32
    dimension_sections: tuple[int, int, int, int] = (6, 5, 5, 0)
    freq_base: float = 1e7
    layer_norm_rms_epsilon: float = 1e-6
    full_attention_interval: int = 4
    recurrent_layers: tuple[bool, ...] | None = None
    conv_kernel: int = 4
    state_size: int = 128
    group_count: int = 2
    time_step_rank: int = 6
    ssm_head_length: int = 0
    ssm_norm: bool = True
    nextn_predict_layers: int = 0
    own_head: bool = False
    tied: bool = True
    expert_count: int = 0
    expert_used_count: int = 0
    expert_feed_forward_length: int = 0
    expert_shared_feed_forward_length: int = 0
    fused_gate_up: bool = False
    fused_qkv: bool = False
    legacy_ssm_in: bool = False
    scales: bool = False
    biases: tuple[str, ...] = ()
    freq_factors: bool = False
    rope_scaling: tuple[tuple[str, str | int | float], ...] = ()
    alignment: int = 32

    @property
    def inner_size(self) -> int:
        """Width of the delta net's values, Hv Dv, or of Mamba-2's heads."""
        return self.time_step_rank * (self.ssm_head_length or self.state_size)

    @property
    def conv_channels(self) -> int:
        """Channels of the delta net's convolution: q, k and v."""
        return 2 * self.group_count * self.state_size + self.inner_size

    def is_recurrent(self, block: int) -> bool:
        """Whether trunk layer `block` is a delta net; prediction blocks never are."""
        if block >= self.block_count:
            return False
        if self.recurrent_layers is not None:
            return self.recurrent_layers[block]
        return (block + 1) % self.full_attention_interval != 0


def _published(
    layers: int, width: int, ffn: int, heads: int, heads_kv: int, value_heads: int, *, tied: bool
) -> Shape:
    return Shape(
        block_count=layers,
        context_length=262144,
        embedding_length=width,
        feed_forward_length=ffn,
        vocab_size=248320,
        head_count=heads,
        head_count_kv=heads_kv,
        key_length=256,
        dimension_count=64,
        dimension_sections=(11, 11, 10, 0),
        group_count=16,
        time_step_rank=value_heads,
        tied=tied,
    )


def _with_experts(
    dense: Shape, experts: int, used: int, inner: int, *, arch: str = "qwen35moe", shared: bool = True
) -> Shape:
    """The same with a mixture of experts, perhaps a shared one of their size, in place of each dense network."""
    return dataclasses.replace(
        dense,
        arch=arch,
        expert_count=experts,
        expert_used_count=used,
        expert_feed_forward_length=inner,
        expert_shared_feed_forward_length=inner if shared else 0,
    )


# Spec section 1, "Published sizes", without the prediction block (most published files lack it).
SIZES = {
    ("qwen35", "tiny"): Shape(),
    ("qwen35", "0.8b"): _published(24, 1024, 3584, 8, 2, 16, tied=True),
    ("qwen35", "2b"): _published(24, 2048, 6144, 8, 2, 16, tied=True),
    ("qwen35", "4b"): _published(32, 2560, 9216, 16, 4, 32, tied=True),
    ("qwen35", "9b"): _published(32, 4096, 12288, 16, 4, 32, tied=False),
    ("qwen35", "27b"): _published(64, 5120, 17408, 24, 4, 48, tied=False),
    ("qwen3", "tiny"): Shape(arch="qwen3", dimension_count=64),
    ("qwen3moe", "tiny"): _with_experts(
        Shape(dimension_count=64, feed_forward_length=0), 16, 4, 256, arch="qwen3moe", shared=False
    ),
    ("qwen2", "tiny"): Shape(
        arch="qwen2", head_count=4, dimension_count=64, biases=("attn_q", "attn_k", "attn_v")
    ),
    ("llama", "tiny"): Shape(arch="llama", head_count=4, dimension_count=64, tied=False, freq_factors=True),
    ("lfm2", "tiny"): Shape(arch="lfm2", head_count=4, dimension_count=64, full_attention_interval=3),
    ("mamba2", "tiny"): Shape(
        arch="mamba2", feed_forward_length=0, state_size=64, time_step_rank=8, ssm_head_length=64
    ),
    ("falcon-h1", "tiny"): Shape(
        arch="falcon-h1",
        dimension_count=64,
        state_size=64,
        time_step_rank=8,
        ssm_head_length=64,
        ssm_norm=False,
    ),
    ("qwen35moe", "tiny"): _with_experts(Shape(), 16, 4, 256),
    ("qwen3next", "tiny"): _with_experts(Shape(), 16, 4, 256, arch="qwen3next"),
    ("qwen35moe", "35b-a3b"): _with_experts(_published(40, 2048, 0, 16, 2, 32, tied=False), 256, 8, 512),
    # A fifth of its layers, half of its experts: what a token does in a layer is the same, and it fits anywhere.
    ("qwen35moe", "35b-a3b-cut"): dataclasses.replace(
        _with_experts(_published(8, 2048, 0, 16, 2, 32, tied=False), 128, 8, 512), vocab_size=32768
    ),
    ("qwen35moe", "122b-a10b"): _with_experts(_published(48, 3072, 0, 32, 2, 64, tied=False), 256, 8, 1024),
    ("qwen35moe", "397b-a17b"): _with_experts(_published(60, 4096, 0, 32, 2, 64, tied=False), 512, 10, 1024),
}


# ------------------------------------------------------------------------------
# What the weights are
# ------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]  # (generator, shape) -> f32 array


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written: row-major shape, and how a part of its rows is drawn."""

    name: str
    shape: tuple[int, ...]
    draw: Draw
    qtype: str = "F32"

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        elements, size = ggml.library().block_size(self.qtype)
        return self.shape[-1] // elements * size

    @property
    def rows(self) -> int:
        """Rows of all leading axes together."""
        return math.prod(self.shape[:-1])


def _matrix(gain: float = 1.0) -> Draw:
    """Weights that map inputs of order one to outputs of order `gain`, with somewhat heavy tails."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape, np.float32)
        tail = 0.05  # of each value's cube: kurtosis 5 instead of 3
        stretched = np.square(x)
        stretched *= tail
        stretched += 1
        x *= stretched
        row_norms = np.exp(
            0.2 * rng.standard_normal((*shape[:-1], 1), np.float32)
        )  # rows differ, as trained ones do
        variance = (1 + 6 * tail + 15 * tail**2) * math.exp(2 * 0.2**2) * shape[-1]
        x *= row_norms * np.float32(gain / math.sqrt(variance))
        return x

    return draw


def _around(mean: float, spread: float = 0.2) -> Draw:
    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.float32(mean) * (1 + np.float32(spread) * rng.standard_normal(shape, np.float32))

    return draw


def _spread(deviation: float) -> Draw:
    return lambda rng, shape: np.float32(deviation) * rng.standard_normal(shape, np.float32)


def _decay(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """ssm_a = -exp(A_log), with exp(A_log) uniform in 1 to 16 as the delta net papers start it."""
    return -rng.uniform(1, 16, shape).astype(np.float32)


def _time_step_bias(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse softplus of time steps spread evenly in logarithm from 0.001 to 0.1."""
    step = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), shape))
    return np.log(np.expm1(step)).astype(np.float32)


def _constant(value: float) -> Draw:
    return lambda _rng, shape: np.full(shape, value, np.float32)


WEIGHT_SCALE = 0.75  # the value of every `X.scale`, where there are any; experts have it on average

Stems = dict[str, tuple[tuple[int, ...], Draw]]  # tensor name within a block -> shape, draw


def _attention(s: Shape, out_gain: float) -> Stems:
    """Gated full attention: per head, the query rows and then the gate rows."""
    d, width = s.key_length, s.embedding_length
    q, kv = 2 * s.head_count * d, s.head_count_kv * d
    rows = {"attn_qkv": q + 2 * kv} if s.fused_qkv else {"attn_q": q, "attn_k": kv, "attn_v": kv}
    return {
        **{f"{stem}.weight": ((n, width), _matrix()) for stem, n in rows.items()},
        "attn_q_norm.weight": ((d,), _around(1.5)),  # above one: attention that chooses
        "attn_k_norm.weight": ((d,), _around(1.5)),
        "attn_output.weight": ((width, s.head_count * d), _matrix(out_gain)),
    }


def _delta_net(s: Shape, out_gain: float) -> Stems:
    """Gated delta net (spec section 2, "recurrent")."""
    width, heads = s.embedding_length, s.time_step_rank
    return {
        "attn_qkv.weight": ((s.conv_channels, width), _matrix()),
        "attn_gate.weight": ((s.inner_size, width), _matrix()),
        "ssm_conv1d.weight": ((s.conv_channels, s.conv_kernel), _matrix(1.5)),
        "ssm_alpha.weight": ((heads, width), _matrix()),
        "ssm_beta.weight": ((heads, width), _matrix()),
        "ssm_dt.bias": ((heads,), _time_step_bias),
        "ssm_a": ((heads,), _decay),
        "ssm_norm.weight": ((s.state_size,), _around(1.0)),
        "ssm_out.weight": ((width, s.inner_size), _matrix(out_gain)),
    }


def _grouped_delta_net(s: Shape, out_gain: float) -> Stems:
    """As qwen3next has it: what is joined is so a key head at a time, which random rows need not know."""
    stems, width = _delta_net(s, out_gain), s.embedding_length
    parts = ("attn_qkv", "attn_gate") if s.legacy_ssm_in else ()
    rows = sum(stems[f"{part}.weight"][0][0] for part in parts)
    joined: Stems = {"ssm_ba.weight": ((2 * s.time_step_rank, width), _matrix())}
    joined |= {"ssm_in.weight": ((rows, width), _matrix())} if parts else {}
    for part in ("ssm_alpha", "ssm_beta", *parts):
        del stems[f"{part}.weight"]
    return joined | stems


def _dense_ffn(s: Shape, out_gain: float) -> Stems:
    width, inner = s.embedding_length, s.feed_forward_length
    return {
        "ffn_gate.weight": ((inner, width), _matrix()),
        "ffn_up.weight": ((inner, width), _matrix()),
        "ffn_down.weight": ((width, inner), _matrix(out_gain)),
    }


def _moe_ffn(s: Shape, out_gain: float) -> Stems:
    """Router, experts and the shared expert (spec section 2, "MoE")."""
    width, experts, inner = s.embedding_length, s.expert_count, s.expert_feed_forward_length
    rows = {"gate_up": 2 * inner} if s.fused_gate_up else {"gate": inner, "up": inner}
    stems: Stems = {
        "ffn_gate_inp.weight": ((experts, width), _matrix(1.5)),  # a router that chooses
        **{f"ffn_{part}_exps.weight": ((experts, n, width), _matrix()) for part, n in rows.items()},
        "ffn_down_exps.weight": ((experts, width, inner), _matrix(out_gain)),
    }
    if shared := s.expert_shared_feed_forward_length:
        stems |= {
            "ffn_gate_inp_shexp.weight": ((width,), _matrix()),
            "ffn_gate_shexp.weight": ((shared, width), _matrix()),
            "ffn_up_shexp.weight": ((shared, width), _matrix()),
            "ffn_down_shexp.weight": ((width, shared), _matrix(out_gain)),
        }
    return stems


def _prediction(s: Shape) -> Stems:
    """What a multi-token-prediction block has beside a full attention layer."""
    width = s.embedding_length
    norms = ("enorm", "hnorm") if s.own_head else ("enorm", "hnorm", "shared_head_norm")
    tables = ("embed_tokens", "shared_head_head") if s.own_head else ()
    return {
        "nextn.eh_proj.weight": ((width, 2 * width), _matrix()),
        **{f"nextn.{norm}.weight": ((width,), _around(1.0)) for norm in norms},
        **{f"nextn.{table}.weight": ((s.vocab_size, width), _matrix(LOGIT_SPREAD)) for table in tables},
    }


LOGIT_SPREAD = 3.0  # standard deviation of the logits: about a trained model's
RESIDUAL = 2.0  # what the residual stream grows to


def _hybrid_tensors(
    s: Shape, delta_net: Callable[[Shape, float], Stems] = _delta_net
) -> Iterator[tuple[str, tuple[int, ...], Draw]]:
    """Every tensor of the file, in its order: name, shape, draw."""
    width = s.embedding_length
    head = _matrix(LOGIT_SPREAD)
    # The branches outweigh the embedding, or a tied head would find the token just read in the residual
    # stream and repeat it. Doubled, because what they end with (gated, swiglu) is only about half.
    out_gain = 2 * RESIDUAL / math.sqrt(2 * s.block_count)
    yield "token_embd.weight", (s.vocab_size, width), head
    for i in range(s.block_count + s.nextn_predict_layers):
        mixer = (delta_net if s.is_recurrent(i) else _attention)(s, out_gain)
        norms = {f"{stem}.weight": ((width,), _around(1.0)) for stem in ("attn_norm", "post_attention_norm")}
        ffn = _moe_ffn(s, out_gain) if s.expert_count else _dense_ffn(s, out_gain)
        extra = _prediction(s) if i >= s.block_count else {}
        for stem, (shape, draw) in (norms | mixer | ffn | extra).items():
            yield f"blk.{i}.{stem}", shape, draw
    yield "output_norm.weight", (width,), _around(1.0)
    if not s.tied:
        yield "output.weight", (s.vocab_size, width), head


def _hybrid_metadata(s: Shape) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "block_count": s.block_count + s.nextn_predict_layers,
        "context_length": s.context_length,
        "embedding_length": s.embedding_length,
        "attention.head_count": s.head_count,
        "attention.head_count_kv": s.head_count_kv,
        "attention.key_length": s.key_length,
        "attention.value_length": s.key_length,
        "attention.layer_norm_rms_epsilon": s.layer_norm_rms_epsilon,
        "rope.dimension_count": s.dimension_count,
        "rope.dimension_sections": list(s.dimension_sections),
        "rope.freq_base": s.freq_base,
        "ssm.conv_kernel": s.conv_kernel,
        "ssm.state_size": s.state_size,
        "ssm.group_count": s.group_count,
        "ssm.time_step_rank": s.time_step_rank,
        "ssm.inner_size": s.inner_size,
    }
    if s.feed_forward_length:
        keys["feed_forward_length"] = s.feed_forward_length
    if s.nextn_predict_layers:
        keys["nextn_predict_layers"] = s.nextn_predict_layers
    if s.recurrent_layers is None:
        keys["full_attention_interval"] = s.full_attention_interval
    else:
        keys["attention.recurrent_layers"] = [s.is_recurrent(i) for i in range(keys["block_count"])]
    return {f"{s.arch}.{key}": value for key, value in (keys | _moe_metadata(s) | _rope_scaling(s)).items()}


def _rope_scaling(s: Shape) -> dict[str, Any]:
    return {f"rope.scaling.{key}": value for key, value in s.rope_scaling}


def _grouped_metadata(s: Shape) -> dict[str, Any]:
    """qwen3next knows no sections of positions."""
    keys = _hybrid_metadata(s)
    del keys[f"{s.arch}.rope.dimension_sections"]
    return keys


def _moe_metadata(s: Shape) -> dict[str, Any]:
    """The keys of experts, where there are any."""
    lengths = ("expert_feed_forward_length", "expert_shared_feed_forward_length")
    keys = ("expert_count", "expert_used_count", *lengths)
    return {key: getattr(s, key) for key in keys if getattr(s, key)}


@dataclasses.dataclass(frozen=True)
class Arch:
    """An architecture that can be made: its metadata and its tensors, each a function of a Shape."""

    metadata: Callable[[Shape], dict[str, Any]]
    tensors: Callable[[Shape], Iterator[tuple[str, tuple[int, ...], Draw]]]


def _plain_attention(s: Shape, out_gain: float, *, head_norm: bool) -> Stems:
    """Attention without an output gate."""
    d, width = s.key_length, s.embedding_length
    q, kv = s.head_count * d, s.head_count_kv * d
    rows = {"attn_qkv": q + 2 * kv} if s.fused_qkv else {"attn_q": q, "attn_k": kv, "attn_v": kv}
    norms = ("attn_q_norm.weight", "attn_k_norm.weight") if head_norm else ()
    return {
        **{f"{stem}.weight": ((n, width), _matrix()) for stem, n in rows.items()},
        **{name: ((d,), _around(1.5)) for name in norms},
        "attn_output.weight": ((width, q), _matrix(out_gain)),
    }


def _with_biases(s: Shape, stems: Stems) -> Stems:
    """And a bias beside each weight of those roles."""
    biases = {f"{role}.bias": ((stems[f"{role}.weight"][0][0],), _spread(0.5)) for role in s.biases}
    return stems | biases


def _short_conv(s: Shape, out_gain: float) -> Stems:
    """A gated short convolution: three products of the input are multiplied, so each is not far from one."""
    width = s.embedding_length
    return {
        "shortconv.in_proj.weight": ((3 * width, width), _matrix()),
        "shortconv.conv.weight": ((width, s.conv_kernel), _matrix(1.5)),
        "shortconv.out_proj.weight": ((width, width), _matrix(out_gain)),
    }


def _mamba2(s: Shape, _i: int, out_gain: float) -> Stems:
    width, heads, groups, inner = s.embedding_length, s.time_step_rank, s.group_count, s.inner_size
    channels = inner + 2 * groups * s.state_size
    return {
        "ssm_in.weight": ((inner + channels + heads, width), _matrix()),
        "ssm_conv1d.weight": ((channels, s.conv_kernel), _matrix(1.5)),
        "ssm_conv1d.bias": ((channels,), _spread(0.5)),
        "ssm_dt.bias": ((heads,), _time_step_bias),
        "ssm_a": ((heads, 1), _decay),
        "ssm_d": ((heads, 1), _around(1.0)),
        **({"ssm_norm.weight": ((groups, inner // groups), _around(1.0))} if s.ssm_norm else {}),
        "ssm_out.weight": ((width, inner), _matrix(out_gain)),
    }


Mixer = Callable[[Shape, int, float], Stems]  # (shape, layer, out_gain) -> its tensors


def _every_layer(head_norm: bool) -> Mixer:
    return lambda s, _i, out_gain: _plain_attention(s, out_gain, head_norm=head_norm)


def _lfm2_layer(s: Shape, i: int, out_gain: float) -> Stems:
    return _short_conv(s, out_gain) if s.is_recurrent(i) else _plain_attention(s, out_gain, head_norm=True)


def _parallel(s: Shape, i: int, out_gain: float) -> Stems:
    return _plain_attention(s, out_gain, head_norm=False) | _mamba2(s, i, out_gain)


def _decoder_tensors(
    s: Shape, mixer: Mixer, output_norm: str = "output_norm", ffn_norm: str = "ffn_norm.weight"
) -> Iterator[tuple[str, tuple[int, ...], Draw]]:
    """A mixer in every layer, and a dense network or a mixture of experts where it has a size."""
    width = s.embedding_length
    out_gain = 2 * RESIDUAL / math.sqrt(2 * s.block_count)
    yield "token_embd.weight", (s.vocab_size, width), _matrix(LOGIT_SPREAD)
    if s.freq_factors:
        yield "rope_freqs.weight", (s.dimension_count // 2,), _around(3.0)
    for i in range(s.block_count):
        ffn = _moe_ffn(s, out_gain) if s.expert_count else _dense_ffn(s, out_gain)
        ffn = ffn if s.expert_count or s.feed_forward_length else {}
        names = ("attn_norm.weight", ffn_norm) if ffn else ("attn_norm.weight",)
        norms = {name: ((width,), _around(1.0)) for name in names}
        layer = mixer(s, i, out_gain) | ffn
        for stem, (shape, draw) in (norms | _with_biases(s, layer)).items():
            yield f"blk.{i}.{stem}", shape, draw
    yield f"{output_norm}.weight", (width,), _around(1.0)
    if not s.tied:
        yield "output.weight", (s.vocab_size, width), _matrix(LOGIT_SPREAD)


def _decoder_metadata(s: Shape) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "block_count": s.block_count,
        "context_length": s.context_length,
        "embedding_length": s.embedding_length,
        "attention.head_count": s.head_count,
        "attention.head_count_kv": s.head_count_kv,
        "attention.key_length": s.key_length,
        "attention.value_length": s.key_length,
        "attention.layer_norm_rms_epsilon": s.layer_norm_rms_epsilon,
        "rope.dimension_count": s.dimension_count,
        "rope.freq_base": s.freq_base,
    }
    if s.feed_forward_length:
        keys["feed_forward_length"] = s.feed_forward_length
    return {f"{s.arch}.{key}": value for key, value in (keys | _moe_metadata(s) | _rope_scaling(s)).items()}


def _decoder(*, head_norm: bool) -> Arch:
    return Arch(_decoder_metadata, lambda s: _decoder_tensors(s, _every_layer(head_norm)))


def _mamba2_metadata(s: Shape) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "block_count": s.block_count,
        "context_length": s.context_length,
        "embedding_length": s.embedding_length,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": s.layer_norm_rms_epsilon,
    }
    return {f"{s.arch}.{key}": value for key, value in keys.items()} | _ssm_metadata(s)


def _ssm_metadata(s: Shape) -> dict[str, Any]:
    sizes = ("conv_kernel", "inner_size", "state_size", "group_count", "time_step_rank")
    return {f"{s.arch}.ssm.{size}": getattr(s, size) for size in sizes}


def _lfm2_metadata(s: Shape) -> dict[str, Any]:
    kv_heads = [0 if s.is_recurrent(i) else s.head_count_kv for i in range(s.block_count)]
    special = {"shortconv.l_cache": s.conv_kernel, "attention.head_count_kv": kv_heads}
    return _decoder_metadata(s) | {f"lfm2.{key}": value for key, value in special.items()}


ARCHS = {
    "qwen35": Arch(_hybrid_metadata, _hybrid_tensors),
    "qwen35moe": Arch(_hybrid_metadata, _hybrid_tensors),
    "qwen3next": Arch(_grouped_metadata, lambda s: _hybrid_tensors(s, _grouped_delta_net)),
    "qwen3": _decoder(head_norm=True),
    "qwen3moe": _decoder(head_norm=True),
    "qwen2": _decoder(head_norm=False),
    "llama": _decoder(head_norm=False),
    "mamba2": Arch(_mamba2_metadata, lambda s: _decoder_tensors(s, _mamba2)),
    "lfm2": Arch(_lfm2_metadata, lambda s: _decoder_tensors(s, _lfm2_layer, "token_embd_norm")),
    "falcon-h1": Arch(
        lambda s: _decoder_metadata(s) | _ssm_metadata(s),
        lambda s: _decoder_tensors(s, _parallel, ffn_norm="ffn_norm"),
    ),
}


# ------------------------------------------------------------------------------
# Which type each is stored in: llama.cpp's recipes
# ------------------------------------------------------------------------------

When = Callable[[int, int], bool]  # (which of the tensors of this role, how many there are) -> chosen?


def _always(_i: int, _n: int) -> bool:
    return True


def _first_eighth(i: int, n: int) -> bool:
    return i < n // 8


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth, and every third between: the layers that llama.cpp gives more bits."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclasses.dataclass(frozen=True)
class Mix:
    """A recipe: the type of most matrices, and for some roles other types, the first that applies."""

    base: str
    roles: Mapping[str, tuple[tuple[str, When], ...]] = dataclasses.field(default_factory=dict)


_MORE_Q6 = (("Q6_K", _more_bits),)
MIXES = {
    "Q2_K": Mix("Q2_K", {role: (("Q3_K", _always),) for role in ("attn_v", "ffn_down", "attn_output")}),
    "Q3_K_S": Mix("Q3_K"),
    "Q3_K_M": Mix(
        "Q3_K",
        {
            "attn_v": (("Q5_K", lambda i, _: i < 2), ("Q4_K", _always)),
            "ffn_down": (("Q5_K", lambda i, n: i < n // 16), ("Q4_K", _always)),
            "attn_output": (("Q4_K", _always),),
            "attn_qkv": (("Q4_K", _always),),
        },
    ),
    "Q3_K_L": Mix(
        "Q3_K",
        {role: (("Q5_K", _always),) for role in ("attn_v", "ffn_down", "attn_output")}
        | {"attn_qkv": (("Q4_K", _always),)},
    ),
    "Q4_K_S": Mix(
        "Q4_K", {"attn_v": (("Q5_K", lambda i, _: i < 4),), "ffn_down": (("Q5_K", _first_eighth),)}
    ),
    "Q4_K_M": Mix("Q4_K", {"attn_v": _MORE_Q6, "ffn_down": _MORE_Q6, "attn_qkv": (("Q5_K", _always),)}),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix("Q5_K", {"attn_v": _MORE_Q6, "ffn_down": _MORE_Q6, "attn_qkv": (("Q6_K", _always),)}),
    "IQ4_XS": Mix("IQ4_XS", {"ffn_down": (("Q5_K", _first_eighth),)}),
    "IQ4_NL": Mix("IQ4_NL", {"ffn_down": (("Q5_K", _first_eighth),)}),
}

# The head, and a table that is also the head, get more bits than so coarse a type; so does the table alone.
_TINY_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_HEAD: dict[str, str] = {qtype: qtype for qtype in ("F32", "F16", "BF16", "Q8_0")}
_HEAD |= dict.fromkeys(_TINY_TYPES, "Q5_K")
_TABLE = dict.fromkeys(_TINY_TYPES, "Q2_K") | {
    "IQ2_S": "IQ3_S",
    "IQ3_XXS": "IQ3_S",
    "TQ1_0": "Q4_K",
    "TQ2_0": "Q4_K",
}

# Where rows are not whole blocks of a type.
_FALLBACK = {
    "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL",
}  # fmt: skip


def _stays_f32(name: str, shape: tuple[int, ...]) -> bool:
    """What llama.cpp's quantiser leaves alone (spec section 2)."""
    return (
        len(shape) == 1
        or not name.endswith(".weight")
        or name.endswith("_norm.weight")
        or "ssm_conv1d" in name
        or "shortconv.conv" in name
        or "ffn_gate_inp" in name
    )


def _role(name: str) -> str:
    """What a tensor is for, whichever block it is in: "blk.3.attn_v.weight" -> "attn_v"."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def _recipe(role: str, mix: Mix, index: int, count: int, *, tied: bool) -> str:
    """The type that llama.cpp's quantiser chooses for the `index`-th of `count` matrices of a role."""
    if role == "output" or (role == "token_embd" and tied):
        return _HEAD.get(mix.base, "Q6_K")
    if role == "token_embd":
        return _TABLE.get(mix.base, mix.base)
    role = re.sub(r"_(sh)?exps?$", "", role)  # an expert's weights are treated as a dense network's
    return next((qtype for qtype, when in mix.roles.get(role, ()) if when(index, count)), mix.base)


def _fitting(qtype: str, row_length: int) -> str:
    """`qtype`, or what llama.cpp falls back to for rows of this length."""
    choices = (qtype, _FALLBACK.get(qtype, "F16"), "F16")
    return next(choice for choice in choices if row_length % ggml.library().block_size(choice)[0] == 0)


def plan(shape: Shape, quant: str = "F32", types: Mapping[str, str] | None = None) -> list[Tensor]:
    """The tensors of the file, in order. `types` overrules the recipe: pattern of a whole name -> type."""
    if quant not in MIXES and quant not in ggml.TYPE_IDS:
        raise BadInput(f"--quant {quant}: expected one of {', '.join([*ggml.TYPE_IDS, *MIXES])}")
    mix = MIXES.get(quant, Mix(quant))
    bare = list(ARCHS[shape.arch].tensors(shape))
    roles = collections.Counter(_role(name) for name, _, _ in bare)
    seen: collections.Counter[str] = collections.Counter()
    tensors = []
    for name, dims, draw in bare:
        role = _role(name)
        qtype = (
            "F32" if _stays_f32(name, dims) else _recipe(role, mix, seen[role], roles[role], tied=shape.tied)
        )
        seen[role] += 1
        for pattern, wanted in (types or {}).items():
            qtype = wanted if re.fullmatch(pattern, name) else qtype
        tensors.append(Tensor(name, dims, draw, _fitting(qtype, dims[-1])))
    return [part for tensor in tensors for part in _scaled(tensor, shape)]


def _scaled(tensor: Tensor, shape: Shape) -> list[Tensor]:
    """A block's weight and its `X.scale`, if the shape asks for them; else the tensor as it is."""
    if not shape.scales or _stays_f32(tensor.name, tensor.shape) or not tensor.name.startswith("blk."):
        return [tensor]
    if "gate_up_exps" in tensor.name:  # llama.cpp has no scale for both in one
        return [tensor]
    name = tensor.name.removesuffix(".weight") + ".scale"
    experts = tensor.shape[:-2]
    scale = (
        Tensor(name, experts, _around(WEIGHT_SCALE))
        if experts
        else Tensor(name, (1,), _constant(WEIGHT_SCALE))
    )
    return [dataclasses.replace(tensor, draw=_larger(tensor.draw)), scale]


def _larger(draw: Draw) -> Draw:
    """Weights that a separate scale will bring back to size."""
    return lambda rng, shape: draw(rng, shape) / np.float32(WEIGHT_SCALE)


# ------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    shape: Shape | None = None,
    quant: str = "F32",
    *,
    seed: int = 0,
    types: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Path:
    """Writes a random model to `path`: whole, or not at all.

    Holds a few chunks of rows, never a whole tensor. `quant` is a type or one of MIXES; `types` overrules it
    for some tensors (pattern of a whole name -> type). Raises BadInput for a shape that cannot be and where
    the file cannot be written.
    """
    path, shape = Path(path), shape or Shape()
    tensors = plan(shape, quant, types)
    vocabulary = synth_vocabulary.metadata(shape.vocab_size)
    keys = metadata(shape, quant, f"synth {shape.arch}", vocabulary)
    try:
        with _replacing(path) as temporary:
            _write_header(temporary, shape, keys, tensors)
            with open(temporary, "ab") as file, _bar(tensors, path, progress) as advance:
                _write_data(file, tensors, seed, shape.alignment, advance)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}") from error
    return path


def metadata(shape: Shape, quant: str, name: str, vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of a file: its name and type, the shape's, and the vocabulary's `tokenizer.*`."""
    kinds = gguf.LlamaFileType.__members__
    kind = kinds.get(f"MOSTLY_{quant}", kinds["ALL_F32"] if quant == "F32" else kinds["GUESSED"])
    return {
        "general.name": name,
        "general.file_type": int(kind),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **ARCHS[shape.arch].metadata(shape),
        **vocabulary,
    }


def _write_header(path: Path, shape: Shape, metadata: Mapping[str, Any], tensors: list[Tensor]) -> None:
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_custom_alignment(shape.alignment)
    add_metadata(writer, metadata)
    for tensor in tensors:
        size = tensor.rows * tensor.row_bytes
        number: Any = ggml.TYPE_IDS[tensor.qtype]  # gguf-py has no name for every one of them
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Each key in the format's type for its python type."""
    for key, value in metadata.items():
        _GGUF_ADD[type(value)](writer, key, value)


_GGUF_ADD: dict[type, Callable[[gguf.GGUFWriter, str, Any], None]] = {
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
}


def _write_data(
    file: BinaryIO, tensors: list[Tensor], seed: int, alignment: int, advance: Callable[[int], None]
) -> None:
    """Every tensor's rows, drawn and packed on all cores, written in order, each tensor aligned."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[tuple[Tensor, int, Any]] = collections.deque()
        for tensor, start, chunk in _chunks(tensors):
            waiting.append((tensor, start, pool.submit(_packed, tensor, start, chunk, seed)))
            if len(waiting) > 2 * workers:
                _write_chunk(file, *waiting.popleft(), alignment, advance)
        while waiting:
            _write_chunk(file, *waiting.popleft(), alignment, advance)
    file.write(b"\0" * (-file.tell() % alignment))


def _write_chunk(
    file: BinaryIO, tensor: Tensor, start: int, chunk: Any, alignment: int, advance: Any
) -> None:
    if start == 0:
        file.write(b"\0" * (-file.tell() % alignment))
    blocks = chunk.result()
    file.write(blocks)
    advance(len(blocks) * tensor.shape[-1])


def _chunks(tensors: list[Tensor]) -> Iterator[tuple[Tensor, int, int]]:
    """Each tensor's rows in parts: tensor, first row, number of rows."""
    for tensor in tensors:
        step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            yield tensor, start, min(step, tensor.rows - start)


def _packed(tensor: Tensor, start: int, rows: int, seed: int) -> np.ndarray:
    """Rows `start` to `start + rows`, drawn from their own generator: results depend on no order of work."""
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode()), start])
    drawn = (
        tensor.draw(rng, (rows, tensor.shape[-1]))
        if len(tensor.shape) > 1
        else tensor.draw(rng, tensor.shape)
    )
    return ggml.quantize(drawn.reshape(rows, -1), tensor.qtype)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when all went well, and is removed when not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _bar(tensors: list[Tensor], path: Path, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr that counts weights; silent when stderr is not a terminal."""
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    with Progress(console=Console(stderr=True), disable=not (wanted and sys.stderr.isatty())) as progress:
        task = progress.add_task(path.name, total=total)
        yield lambda elements: progress.advance(task, elements)


# ------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    sizes = ", ".join(dict.fromkeys(size for _, size in SIZES))
    parser.add_argument("out", metavar="OUT.gguf", help="the file to write")
    parser.add_argument("--arch", default="qwen35", help=f"architecture: {', '.join(ARCHS)} (default qwen35)")
    parser.add_argument("--size", default="tiny", help=f"published size: {sizes} (default tiny)")
    parser.add_argument("--quant", default="F32", help="a quant type or a mix such as Q4_K_M (default F32)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same weights (default 0)")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    shape = SIZES.get((args.arch, args.size.lower()))
    if shape is None:
        known = ", ".join(f"{arch} {size}" for arch, size in SIZES)
        raise BadInput(f"--arch {args.arch} --size {args.size}: expected one of {known}")
    if args.seed < 0:
        raise BadInput(f"--seed {args.seed}: expected 0 or more")
    write(args.out, shape, args.quant, seed=args.seed, progress=True)
