"""Config: everything that shapes a model's computation, as frozen, hashable (jit-static) data.

A Config says what to compute, never whose model it is: nothing in the engine asks for the name of an
architecture. Field names are the words of the GGUF keys (`head_count_kv`, `dimension_sections`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A rotation stretched by `factor`, to a longer context than the model's training had.

    `linear` divides all frequencies; `yarn` only those that are slow beside `original_context_length` (see
    `ops.rope.yarn`), and makes what it turns larger. `attn_factor` multiplies what is turned by either.
    """

    type: Literal["linear", "yarn"] = "linear"
    factor: float = 1.0
    original_context_length: int = 0
    attn_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `dimension_count` dims of a head; the rest pass through.

    `kind` fixes the pairing of dims (norm: neighbours; the others: halves) and which component of a
    (time, height, width, extra) position turns which pair (spec section 4, "Rope"). `freq_factors`, one a
    pair where there are any, divide the frequencies.
    """

    kind: Literal["norm", "neox", "mrope", "imrope"]
    dimension_count: int
    freq_base: float
    dimension_sections: tuple[int, ...] = ()
    freq_factors: tuple[float, ...] = ()
    scaling: RopeScaling = RopeScaling()


@dataclasses.dataclass(frozen=True)
class Attention:
    """Full softmax attention with grouped key-value heads."""

    head_count: int
    head_count_kv: int
    key_length: int
    rope: Rope
    layer_norm_rms_epsilon: float
    gated: bool  # `attn_q` holds, per head, the query rows and then as many rows of output gate
    head_norm: bool = True  # an RMS norm on every query and key head


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Gated delta net: a short causal convolution, then linear attention with a decaying state."""

    conv_kernel: int
    state_size: int  # key and value head dim
    group_count: int  # key heads
    time_step_rank: int  # value heads
    head_mapping: Literal["tile", "repeat"]  # which key head a value head reads: h mod Hk, or h div r
    layer_norm_rms_epsilon: float

    @property
    def key_dim(self) -> int:
        """Width of all key heads together, Hk Dk."""
        return self.group_count * self.state_size

    @property
    def value_dim(self) -> int:
        """Width of all value heads together, Hv Dv."""
        return self.time_step_rank * self.state_size

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    def key_head_of_value_head(self) -> np.ndarray:
        """int (Hv,): the key head that each value head reads (spec section 3)."""
        value_heads = np.arange(self.time_step_rank)
        if self.head_mapping == "tile":
            return value_heads % self.group_count
        return value_heads // (self.time_step_rank // self.group_count)


@dataclasses.dataclass(frozen=True)
class ShortConv:
    """A short causal convolution of every channel, between two gates."""

    l_cache: int  # taps of the convolution
    embedding_length: int


@dataclasses.dataclass(frozen=True)
class Mamba2:
    """Mamba-2: a short causal convolution, then a state space whose decay every token chooses, then a gate."""

    conv_kernel: int
    inner_size: int  # all heads together
    state_size: int
    group_count: int  # of heads that share what they write at and read from, and a norm
    time_step_rank: int  # heads
    layer_norm_rms_epsilon: float
    norm: bool = True  # behind the gate

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.inner_size // self.time_step_rank

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: all heads, and where each group writes and reads."""
        return self.inner_size + 2 * self.group_count * self.state_size


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Attention and Mamba-2 on the same input, and the sum of both."""

    attention: Attention
    mamba2: Mamba2


@dataclasses.dataclass(frozen=True)
class Dense:
    """SwiGLU feed-forward network."""

    feed_forward_length: int


@dataclasses.dataclass(frozen=True)
class MoE:
    """Mixture of experts: a router gives every token to a few SwiGLU networks; one more may see them all."""

    expert_count: int
    expert_used_count: int
    expert_feed_forward_length: int
    expert_shared_feed_forward_length: int  # 0: there is no shared expert
    expert_weights_norm: bool = True  # the weights of the experts used sum to 1
    expert_weights_scale: float = 1.0  # and are then multiplied by this


@dataclasses.dataclass(frozen=True)
class Block:
    """One layer: a mixer over tokens, then a feed-forward network if there is one, each behind an RMS norm."""

    mixer: Attention | DeltaNet | ShortConv | Mamba2 | Parallel
    ffn: Dense | MoE | None
    layer_norm_rms_epsilon: float


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole model: the trunk's blocks in order, between an embedding and a head."""

    architecture: str
    name: str
    context_length: int
    embedding_length: int
    vocabulary_size: int
    layer_norm_rms_epsilon: float
    blocks: tuple[Block, ...]
    nextn: tuple[Block, ...] = ()  # prediction blocks (spec section 6), after the trunk's in the file
    taps: tuple[
        tuple[str, str], ...
    ] = ()  # our name of an activation, and this architecture's, where it differs

    def tap_name(self, name: str) -> str:
        """What an activation of this architecture is called in a dump."""
        return dict(self.taps).get(name, name)


class Metadata(Protocol):
    """What a config function asks of a file: typed look-ups that raise BadInput naming file and key."""

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer."""
        ...

    def number(self, key: str, default: float | None = None) -> float:
        """A float."""
        ...

    def string(self, key: str, default: str | None = None) -> str:
        """A string."""
        ...

    def integers(self, key: str, length: int, default: int | None = None) -> tuple[int, ...]:
        """`length` integers (or booleans as 0 and 1): an array, or one value for all."""
        ...

    def strings(self, key: str, default: list[str] | None = None) -> list[str]:
        """An array of strings."""
        ...

    def table(self, tensor: str, length: int) -> tuple[float, ...]:
        """The `length` values of a small tensor, or () where the file has none of that name."""
        ...

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        ...

    def require(self, condition: bool, key: str, expected: str) -> None:
        """Raise unless `condition` holds: for values that do not fit together."""
        ...

    def __contains__(self, key: object, /) -> bool:
        """Whether the file has this key."""
        ...


@dataclasses.dataclass(frozen=True)
class Arch:
    """An architecture as data: how its metadata becomes a Config, and what its tensors are called.

    `names` gives, for a tensor name within a block as the engine knows it, the file's own where the two
    differ; `ignored` are patterns of tensor names that a file may hold and no layer needs. `joined` gives,
    for a mixer's or a network's config, tensors that hold several weights with their rows in an order of the
    file's own: file name -> weight's name -> its rows.
    """

    name: str
    config: Callable[[Metadata], Config]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    joined: Callable[[Any], Mapping[str, Mapping[str, np.ndarray]]] = lambda _: {}


def as_dict(config: Any) -> dict[str, Any]:
    """A Config as plain JSON-ready data."""
    return dataclasses.asdict(config)
