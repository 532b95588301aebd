"""The model: embedding, blocks, head; and the boundary where Python meets compiled programs.

Step by step, a model is compiled piece by piece: one program for the embedding, one for each *kind* of block
(layers of the same shapes and quant types share it), one for the head; 24 unrolled layers would take six times
as long. Where whole layers are kernels there is little to compile, and one program for all blocks spares the
way through Python between them, which is a tenth of a small model's time a token.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from scarlet_jax import (
    attention,
    config,
    delta_net,
    ffn,
    mamba2,
    moe,
    mtp,
    parallel,
    sampling,
    sharding,
    short_conv,
)
from scarlet_jax.errors import BadInput
from scarlet_jax.ops import implementations, matmul, norm
from scarlet_jax.ops.gpu.planes import Planes
from scarlet_jax.ops.qtensor import QTensor
from scarlet_jax.span import Span
from scarlet_jax.taps import collect, tap
from scarlet_jax.types import Array, Weight

if TYPE_CHECKING:
    from scarlet_jax.gguf import Gguf
    from scarlet_jax.tokenizer import Tokenizer

# The module of each mixer: its Weights, State, shapes, init_state and mix.
MIXERS: dict[type, Any] = {
    config.Attention: attention,
    config.DeltaNet: delta_net,
    config.ShortConv: short_conv,
    config.Mamba2: mamba2,
    config.Parallel: parallel,
}
# The module of each feed-forward network: its Weights, shapes and feed_forward.
FEED_FORWARDS: dict[type, Any] = {config.Dense: ffn, config.MoE: moe}

PIECE = (
    512  # longest stretch of tokens computed at once: bounds the memory of attention scores and activations
)
BLOCK = 16  # tokens that generation makes on a device before the host looks at them, at most
BYTES_BETWEEN_LOOKS = 2_400_000_000  # of weights that a CPU reads meanwhile: a tenth of a second's or less
SLOTS = 256  # the smallest cache; larger ones double, so that few shapes are ever compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockWeights:
    """One layer: the norms before mixer and feed-forward network (D,), and their weights."""

    attn_norm: Array
    mixer: Any
    post_attention_norm: Array | None = None
    ffn: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """A whole model; `output` is `token_embd` itself where the head is tied.

    Each of `nextn` is a model of one block, a prediction block, with what `join`s its two inputs; what the file
    has no other of for it is the trunk's.
    """

    token_embd: Weight
    blocks: tuple[BlockWeights, ...]
    output_norm: Array
    output: Weight
    nextn: tuple[Weights, ...] = ()
    join: mtp.Weights | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a batch of sequences remembers: a mixer state a layer; tokens seen so far, int32 (B,).

    And `position` int32 (B,), where text would go on: the same number, until an image has been seen.
    """

    blocks: tuple[Any, ...]
    length: Array
    position: Array


class Traced(NamedTuple):
    """The outcome of a stretch of tokens: hidden states (B, T, D) before the final norm, state, and taps."""

    hidden: Array
    state: State
    taps: dict[str, Array]


def block(w: BlockWeights, x: Array, state: Any, span: Span, *, cfg: config.Block) -> tuple[Array, Any]:
    """One layer on the residual stream x f32 (B, T, D)."""
    normed = _norm(x, w.attn_norm, cfg.layer_norm_rms_epsilon, "attn_norm")
    mixed, state = MIXERS[type(cfg.mixer)].mix(w.mixer, normed, state, span, cfg=cfg.mixer)
    x = x + mixed
    if cfg.ffn is None:
        return tap("l_out", x), state
    assert w.post_attention_norm is not None
    x = tap("attn_residual", x)
    normed = _norm(x, w.post_attention_norm, cfg.layer_norm_rms_epsilon, "attn_post_norm")
    return tap("l_out", x + FEED_FORWARDS[type(cfg.ffn)].feed_forward(w.ffn, normed, cfg=cfg.ffn)), state


def _norm(x: Array, weight: Array, eps: float, name: str) -> Array:
    return tap(name, tap("norm", norm.rms(x, eps)) * weight)


def _run_block(w, x, state, span, cfg, tapped, implementation="auto"):
    with collect(tapped) as taps, implementations.use(implementation):
        x, state = block(w, x, state, span, cfg=cfg)
    return x, state, taps


_jit_block = functools.partial(jax.jit, static_argnames=("cfg", "tapped", "implementation"))
run_block = _jit_block(_run_block)
run_block_in_place = _jit_block(_run_block, donate_argnames="state")  # the caller gives its state up

embed = jax.jit(matmul.embed)


@functools.partial(jax.jit, static_argnames=("eps", "implementation"))
def join(w, token, hidden, eps, implementation):
    """`mtp.join`, by that implementation."""
    with implementations.use(implementation):
        return mtp.join(w, token, hidden, eps)


@functools.partial(jax.jit, static_argnames=("eps", "tapped", "implementation"))
def head(output_norm, output, hidden, eps, tapped=False, implementation="auto"):
    """Final norm and projection to logits: f32 (..., D) -> f32 (..., V), and taps."""
    with collect(tapped) as taps, implementations.use(implementation):
        x = _norm(hidden, output_norm, eps, "h_nextn")
        tap("result_norm", x)
        logits = tap("result_output", matmul.linear(x, output))
    return logits, taps


@jax.jit
def _last(hidden: Array, count: Array, before: Array) -> Array:
    """The hidden state of each sequence's last real token: (B, T, D) -> (B, D); `before` where it has none."""
    latest = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(count[:, None] > 0, latest, before)


@functools.partial(jax.jit, static_argnums=range(4))
def init_state(cfg: config.Config, batch: int, slots: int, kv_dtype: Any = jnp.float32) -> State:
    """The state of `batch` sequences before their first token, with room for `slots` tokens each."""
    blocks = tuple(MIXERS[type(b.mixer)].init_state(b.mixer, batch, slots, kv_dtype) for b in cfg.blocks)
    return State(blocks, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))


def trunk(
    weights: Weights,
    tokens: ArrayLike,
    count: ArrayLike,
    state: State,
    cfg: config.Config,
    *,
    tapped: bool = False,
    in_place: bool = False,
    positions: ArrayLike | None = None,
    hidden: ArrayLike | None = None,
    implementation: str = "auto",
) -> Traced:
    """Run tokens int32 (B, T), of which the first `count` (B,) of each row are real, through all blocks.

    With `in_place` the buffers of `state` are reused and `state` is gone. `positions` int32 (4, B, T)
    replaces those of plain text. `hidden` f32 (B, T, D), the normed states before the tokens, is what the blocks
    of a prediction model take beside them. `implementation` as in `ops.implementations`.
    """
    arguments = (weights, tokens, count, state, positions, hidden, cfg, tapped, implementation)
    if tapped or not has_layer_kernels(implementation):
        return _run_trunk(*arguments, run_block_in_place if in_place else run_block)
    return (trunk_program_in_place if in_place else _trunk_program)(*arguments)


def has_layer_kernels(implementation: str) -> bool:
    """Whether all layers are kernels, so that all of a model is one program."""
    with implementations.use(implementation):
        return all(implementations.offered(operation) for operation in ("attention", "delta_net", "ffn"))


def _run_trunk(weights, tokens, count, state, positions, hidden, cfg, tapped, implementation, step=run_block):
    span = Span.text(state.length, count, tokens.shape[1], state.position)
    if positions is not None:
        span = dataclasses.replace(span, positions=positions)
    x = embed(weights.token_embd, tokens)
    seen = OrderedDict({cfg.tap_name("model.input_embed"): x} if tapped else {})
    if weights.join is not None:
        x = join(weights.join, x, hidden, cfg.layer_norm_rms_epsilon, implementation)
    states = []
    for i, (w, mixer_state, block_cfg) in enumerate(
        zip(weights.blocks, state.blocks, cfg.blocks, strict=True)
    ):
        x, mixer_state, taps = step(w, x, mixer_state, span, block_cfg, tapped, implementation)
        states.append(mixer_state)
        seen.update((f"{cfg.tap_name(name)}-{i}", value) for name, value in taps.items())
    state = State(tuple(states), state.length + count, span.next_position(state.position))
    return Traced(x, state, seen)


# Blocks of a kind are still traced and lowered once: `run_block` is a function within the program.
_jit_trunk = functools.partial(jax.jit, static_argnames=("cfg", "tapped", "implementation"))
_trunk_program = _jit_trunk(_run_trunk)
trunk_program_in_place = _jit_trunk(_run_trunk, donate_argnames="state")


def last_logits(
    weights: Weights,
    tokens: ArrayLike,
    count: ArrayLike,
    state: State,
    before: ArrayLike,
    cfg: config.Config,
    *,
    in_place: bool = False,
    positions: ArrayLike | None = None,
    implementation: str = "auto",
) -> tuple[Array, State]:
    """`trunk`, and the logits f32 (B, V) of each row's last real token; of `before` (B, D) where it has none.

    One program, since each start of one costs the threads that compute about as much as a small layer.
    """
    arguments = (weights, tokens, count, state, before, positions, cfg, implementation)
    if not has_layer_kernels(implementation):
        return _last_logits(*arguments, run_block_in_place if in_place else run_block)
    return (last_logits_in_place if in_place else _last_logits_program)(*arguments)


def _last_logits(weights, tokens, count, state, before, positions, cfg, implementation, step=run_block):
    traced = _run_trunk(weights, tokens, count, state, positions, None, cfg, False, implementation, step)
    hidden = _last(traced.hidden, count, before)
    eps = cfg.layer_norm_rms_epsilon
    return head(weights.output_norm, weights.output, hidden, eps, False, implementation)[0], traced.state


_jit_last_logits = functools.partial(jax.jit, static_argnames=("cfg", "implementation"))
_last_logits_program = _jit_last_logits(_last_logits)
last_logits_in_place = _jit_last_logits(_last_logits, donate_argnames="state")


def forward(weights, tokens, state, cfg) -> tuple[Array, State]:
    """The pure function whole: int32 (B, T), no padding -> logits f32 (B, T, V) and the state after them."""
    count = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    traced = trunk(weights, tokens, count, state, cfg)
    logits, _ = head(weights.output_norm, weights.output, traced.hidden, cfg.layer_norm_rms_epsilon)
    return logits, traced.state


def _decode(weights, token, state, key, step, count, params, stops, cfg, block, implementation):
    """A static number of steps, of which those past the end are padding: a trip count that the device decides
    would bring the host back at every step. Tokens int32 (block,), meaningless past the end, and the state.
    """  # noqa: D205

    def advance(carry, i):
        token, state, going = carry
        going &= i < count
        traced = _run_trunk(
            weights,
            token[None, None],
            going.astype(jnp.int32)[None],
            state,
            None,
            None,
            cfg,
            False,
            implementation,
        )
        eps = cfg.layer_norm_rms_epsilon
        logits, _ = head(weights.output_norm, weights.output, traced.hidden[:, 0], eps, False, implementation)
        drawn = sampling.sample(logits, jax.random.fold_in(key, step + i), params)[0]
        token = jnp.where(going, drawn, token)
        return (token, traced.state, going & ~jnp.any(token == stops)), token

    token = jnp.asarray(token, jnp.int32)
    (_, state, _), made = jax.lax.scan(advance, (token, state, jnp.bool_(True)), jnp.arange(block))
    return made, state


_decode_program = jax.jit(
    _decode, static_argnames=("cfg", "block", "implementation"), donate_argnames="state"
)


class Programs:
    """The compiled programs of one model, on one device."""

    def __init__(self, cfg: config.Config, weights: Weights, implementation: str) -> None:
        self._cfg, self._implementation = cfg, implementation
        # One after another, so that no more than one matrix is on the device in both forms.
        one = lambda prepare, w: jax.block_until_ready(prepare(w))  # noqa: E731
        self.weights = _placed(implementations.prepared(weights, implementation, one))

    def init_state(self, batch: int, slots: int, kv_dtype: Any) -> State:
        """As the function of that name."""
        return init_state(self._cfg, batch, slots, kv_dtype)

    def trunk(self, tokens: ArrayLike, count: ArrayLike, state: State, **options: Any) -> Traced:
        """As the function of that name."""
        options["implementation"] = self._implementation
        return trunk(self.weights, tokens, count, state, self._cfg, **options)

    def last_logits(
        self, tokens: ArrayLike, count: ArrayLike, state: State, before: ArrayLike, **options: Any
    ) -> tuple[Array, State]:
        """As the function of that name."""
        options["implementation"] = self._implementation
        return last_logits(self.weights, tokens, count, state, before, self._cfg, **options)

    def head(self, hidden: ArrayLike, tapped: bool = False) -> tuple[Array, dict[str, Array]]:
        """As the function of that name."""
        w, eps = self.weights, self._cfg.layer_norm_rms_epsilon
        return head(w.output_norm, w.output, hidden, eps, tapped, self._implementation)

    def decode(self, *arguments: Any, block: int) -> tuple[Array, State]:
        """`_decode`: token, state, key, step, count, params, stops."""
        return _decode_program(self.weights, *arguments, self._cfg, block, self._implementation)

    @functools.cache  # noqa: B019 - tracing a state takes longer than a token; lives as long as the model
    def leaf_shapes(self, *state: Any) -> list[tuple[int, ...]]:
        """The shape of each array of `init_state(*state)`."""
        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda: self.init_state(*state)))]

    @functools.cache  # noqa: B019 - as above
    def leaf_sizes(self, *state: Any) -> list[int]:
        """Its elements."""
        return [math.prod(shape) for shape in self.leaf_shapes(*state)]


def _placed(weights: Weights) -> Weights:
    """Weights of the host on the device, each once: a tied head stays tied."""
    seen: dict[int, Any] = {}

    def place(w: Any) -> Any:
        if id(w) not in seen:
            seen[id(w)] = jax.device_put(w)
        return seen[id(w)]

    return jax.tree.map(place, weights, is_leaf=lambda w: isinstance(w, QTensor | Planes))


class SpreadPrograms(Programs):
    """The same on a mesh: every device runs them on its share of the weights (see `sharding`)."""

    def __init__(self, spread: sharding.Spread, implementation: str) -> None:
        spread = spread.prepared(implementation)
        self._cfg, self._implementation, self._spread = spread.config, implementation, spread
        self.weights = spread.weights
        self._state = State(spread.state, sharding.WHOLE, sharding.WHOLE)

        whole, w, eps = sharding.WHOLE, spread.specs, self._cfg.layer_norm_rms_epsilon

        def run(weights, tokens, count, state, positions):
            return _run_trunk(
                weights, tokens, count, state, positions, None, self._cfg, False, implementation
            )

        def logits(output_norm, output, hidden):
            return head(output_norm, output, hidden, eps, False, implementation)[0]

        takes, gives = (w, whole, whole, self._state, whole), Traced(whole, self._state, OrderedDict())
        self._trunk = spread.program(run, takes, gives)
        self._trunk_in_place = spread.program(run, takes, gives, donate_argnums=3)
        self._head = spread.program(logits, (w.output_norm, w.output, whole), whole)

    @functools.cache  # noqa: B019 - as above
    def _init_state(self, *size: Any) -> Callable[[], State]:
        return self._spread.program(lambda: init_state(self._cfg, *size), (), self._state)

    def init_state(self, batch: int, slots: int, kv_dtype: Any) -> State:
        """Each device holds the state of its own heads."""
        return self._init_state(batch, slots, kv_dtype)()

    def trunk(self, tokens: ArrayLike, count: ArrayLike, state: State, **options: Any) -> Traced:
        """Nobody sees a device's share of an activation."""
        if options.get("tapped"):
            raise BadInput(f"taps: the model is spread over {self._spread.mesh.size} devices; expected one")
        run = self._trunk_in_place if options.get("in_place") else self._trunk
        return run(self.weights, tokens, count, state, options.get("positions"))

    def last_logits(
        self, tokens: ArrayLike, count: ArrayLike, state: State, before: ArrayLike, **options: Any
    ) -> tuple[Array, State]:
        """As the function of that name, in three programs."""
        traced = self.trunk(tokens, count, state, **options)
        return self.head(_last(traced.hidden, count, before))[0], traced.state

    def head(self, hidden: ArrayLike, tapped: bool = False) -> tuple[Array, dict[str, Array]]:
        """Logits of all of the vocabulary, on every device."""
        return self._head(self.weights.output_norm, self.weights.output, hidden), {}

    def decode(self, *arguments: Any, block: int) -> tuple[Array, State]:
        """Every device draws the same tokens."""
        return self._decode(block)(self.weights, *arguments)

    @functools.cache  # noqa: B019 - as above
    def _decode(self, block: int) -> Callable:
        whole = sharding.WHOLE
        run = functools.partial(_decode, cfg=self._cfg, block=block, implementation=self._implementation)
        takes = (self._spread.specs, whole, self._state, *[whole] * 5)
        return self._spread.program(run, takes, (whole, self._state), donate_argnums=2)


class Piece(NamedTuple):
    """A stretch of a batch, padded to a length that is compiled once: tokens (B, bucket), real ones (B,)."""

    tokens: np.ndarray
    count: np.ndarray
    width: int  # the longest count
    positions: np.ndarray | None = None  # (4, B, bucket), where they are not plain text's


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a caller passed: int32 tokens (B, T), zero-padded, lengths (B,), whether it was one row, positions."""

    tokens: np.ndarray
    lengths: np.ndarray
    single: bool
    positions: np.ndarray | None = None  # int32 (4, B, T)

    @classmethod
    def of(cls, tokens: Any, vocabulary_size: int, positions: Any = None) -> Batch:
        """Check ids, lengths and positions; BadInput for an empty sequence or an id outside the vocabulary."""
        single = np.ndim(tokens[0]) == 0 if len(tokens) else True
        rows = [np.asarray(row) for row in ([tokens] if single else tokens)]
        if not all(row.size for row in rows):
            raise BadInput("tokens: empty; expected at least one token")
        for row in rows:
            _check_ids(row, vocabulary_size)
        padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        return cls(padded, lengths, single, _components(positions, padded.shape, single))

    def pieces(self) -> Iterator[Piece]:
        """At most PIECE tokens at a time, padded to a power of two."""
        for start in range(0, self.tokens.shape[1], PIECE):
            part = self.tokens[:, start : start + PIECE]
            width = part.shape[1]
            padding = (1 << (width - 1).bit_length()) - width
            pad = lambda x, padding=padding: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])  # noqa: E731
            yield Piece(
                pad(part),
                np.clip(self.lengths - start, 0, width).astype(np.int32),
                width,
                None if self.positions is None else pad(self.positions[..., start : start + width]),
            )


def _check_ids(row: np.ndarray, vocabulary_size: int) -> None:
    if not np.issubdtype(row.dtype, np.integer):
        raise BadInput(f"tokens: of type {row.dtype}; expected integers")
    outside = row[(row < 0) | (row >= vocabulary_size)]
    if outside.size:
        raise BadInput(
            f"tokens: id {outside[0]} is outside the vocabulary; expected 0 to {vocabulary_size - 1}"
        )


def _components(positions: Any, shape: tuple[int, int], single: bool) -> np.ndarray | None:
    """Positions (3 or 4, T), or (3 or 4, B, T) for tokens of that shape, as int32 (4, B, T): a fourth is zero."""
    if positions is None:
        return None
    given = np.asarray(positions)
    each = shape[1:] if single else shape
    if given.shape not in {(3, *each), (4, *each)} or not np.issubdtype(given.dtype, np.integer):
        raise BadInput(
            f"positions: {given.dtype} of shape {given.shape}; expected integers (time, height, width, and maybe a "
            f"fourth) of shape {(3, *each)} or {(4, *each)}"
        )
    if given.min() < 0:
        raise BadInput(f"positions: {given.min()}; expected 0 and above")
    whole = np.zeros((4, *shape), np.int32)
    whole[: len(given)] = given.reshape(len(given), *shape)
    return whole


class Model:
    """A loaded model: `.config`, `.weights`, `.tokenizer`, and functions from tokens to logits.

    Tokens are one sequence of ids, (T,), or several: an int array (B, T), or lists of different lengths.
    A state returned by one call continues the text in the next; it is a snapshot that any number of
    continuations may start from, unless a call is told to consume it.
    """

    def __init__(
        self,
        gguf: Gguf,
        cfg: config.Config,
        weights: Weights,
        *,
        context_length: int | None = None,
        kv_dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: str | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """`mesh`: one axis of devices that share the model (`sharding.mesh_of`); `weights` are then the host's.

        `implementation`: whose operations (see `ops.implementations`), "auto" for the best of each.

        By default what the environment variable SCARLET_IMPLEMENTATION says, or else "auto". Raises
        BadInput, with its own reason, for one that cannot run here.
        """
        self.gguf = gguf
        self.config = cfg
        self.context_length = context_length or cfg.context_length
        self.kv_dtype = kv_dtype
        self.implementation = implementations.check(
            implementation or os.environ.get("SCARLET_IMPLEMENTATION") or "auto"
        )
        if mesh is None:
            self.programs = Programs(cfg, weights, self.implementation)
        else:
            trunk = dataclasses.replace(weights, nextn=())
            self.programs = SpreadPrograms(sharding.spread(trunk, cfg, mesh), self.implementation)

    @property
    def weights(self) -> Weights:
        """The weights where they are."""
        return self.programs.weights

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file."""
        from scarlet_jax.tokenizer import Tokenizer

        return Tokenizer.from_gguf(self.gguf)

    def forward(
        self, tokens: Any, state: State | None = None, *, consume: bool = False, positions: Any = None
    ) -> tuple[Array, State]:
        """Logits after every token, f32 (T, V), or (B, T, V) for several sequences, and the state.

        Rows past the end of a shorter sequence are undefined. With `consume` the buffers of `state` are reused,
        which spares a copy of the cache; it is gone after. `positions`, integers (3 or 4, T) or (3 or 4, B, T),
        are each token's time, height and width, and perhaps a fourth component, where there is more than text
        (`positions.with_images` makes them). Without them it is text, which goes on past all positions before it.
        """
        own = state is None or consume  # nobody else holds it: its buffers may be reused
        batch, state = self._enter(tokens, state, positions)
        logits = []
        for piece in batch.pieces():
            hidden, state, _ = self._trunk(piece, state, in_place=own)
            own = True
            logits.append(self._head(hidden)[0][:, : piece.width])
        joined = jnp.concatenate(logits, axis=1)
        return (joined[0] if batch.single else joined), state

    def last_logits(
        self, tokens: Any, state: State | None = None, *, consume: bool = False, positions: Any = None
    ) -> tuple[Array, State]:
        """Logits after the last token only, f32 (V,) or (B, V), and the state: what generation needs.

        `consume` and `positions` as in `forward`.
        """
        own = state is None or consume
        batch, state = self._enter(tokens, state, positions)
        last = np.zeros((len(batch.lengths), self.config.embedding_length), np.float32)
        *pieces, end = batch.pieces()
        for piece in pieces:
            hidden, state, _ = self._trunk(piece, state, in_place=own)
            own = True
            last = _last(hidden, piece.count, last)
        logits, state = self.programs.last_logits(
            end.tokens, end.count, state, last, in_place=own, positions=end.positions
        )
        return (logits[0] if batch.single else logits), state

    def hidden(self, tokens: Any) -> Array:
        """Hidden states before the final norm, f32 (T, D) or (B, T, D): for logits of some tokens only."""
        batch, state = self._enter(tokens, None)
        parts = []
        for piece in batch.pieces():
            hidden, state, _ = self._trunk(piece, state, in_place=True)
            parts.append(hidden[:, : piece.width])
        joined = jnp.concatenate(parts, axis=1)
        return joined[0] if batch.single else joined

    def logits(self, hidden: ArrayLike) -> Array:
        """Logits of hidden states: f32 (..., D) -> f32 (..., V)."""
        return self._head(hidden)[0]

    def normed(self, hidden: ArrayLike) -> Array:
        """The final norm of hidden states f32 (..., D): what `forward_mtp` takes."""
        return norm.rms(jnp.asarray(hidden), self.config.layer_norm_rms_epsilon) * self.weights.output_norm

    def forward_mtp(
        self,
        tokens: Any,
        hidden: ArrayLike,
        state: State | None = None,
        *,
        block: int = 0,
        positions: Any = None,
    ) -> tuple[Array, Array, State]:
        """What prediction block number `block` makes of tokens and of the states before them (spec section 6).

        `hidden` f32 (T, D), or (B, T, D): of each token the `normed` hidden state of the one before it, zeros
        before a text's first. Logits (T, V) or (B, T, V) after each token, of the token after the next; the
        block's own normed hidden states (T, D) or (B, T, D), which a longer draft goes on from; and its state,
        which is not the trunk's. `positions` as in `forward`. Raises BadInput where the file has no such block, or
        `hidden` another shape.
        """
        predictor = self._predictors[block] if 0 <= block < len(self._predictors) else None
        if predictor is None:
            raise BadInput(f"{self.gguf.path}: no prediction block {block}; it has {len(self._predictors)}")
        batch, state = predictor._enter(tokens, state, positions)
        before = jnp.asarray(hidden, jnp.float32)
        expected = (*batch.tokens.shape, self.config.embedding_length)[batch.single :]
        if before.shape != expected:
            raise BadInput(f"hidden: of shape {before.shape}; expected {expected}, a state a token")
        before, start = before.reshape(*batch.tokens.shape, -1), 0
        logits, states = [], []
        for piece in batch.pieces():
            part = before[:, start : start + piece.width]
            part = jnp.pad(part, ((0, 0), (0, piece.tokens.shape[1] - piece.width), (0, 0)))
            start += piece.width
            x, state, _ = predictor._trunk(piece, state, hidden=part)
            logits.append(predictor._head(x)[0][:, : piece.width])
            states.append(predictor.normed(x)[:, : piece.width])
        joined = [jnp.concatenate(parts, axis=1) for parts in (logits, states)]
        after, normed = (x[0] for x in joined) if batch.single else joined
        return after, normed, state

    @functools.cached_property
    def _predictors(self) -> list[Model]:
        """Models whose trunk is one prediction block each; none where many devices share the weights."""
        predictors = []
        for block, weights in zip(self.config.nextn, self.weights.nextn, strict=False):
            predictor = copy.copy(self)
            predictor.config = dataclasses.replace(self.config, blocks=(block,), nextn=())
            predictor.programs = Programs(predictor.config, weights, self.implementation)
            predictors.append(predictor)
        return predictors

    @functools.cached_property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that a decoding step reads: all but the embedding, of which it needs one row.

        Of a mixture's experts, those that a token is given to.
        """
        w = self.weights
        unused = sum(
            _nbytes((block.ffn.ffn_gate_exps, block.ffn.ffn_up_exps, block.ffn.ffn_down_exps))
            * (cfg.ffn.expert_count - cfg.ffn.expert_used_count)
            // cfg.ffn.expert_count
            for block, cfg in zip(w.blocks, self.config.blocks, strict=True)
            if isinstance(cfg.ffn, config.MoE)
        )
        return _nbytes((w.blocks, w.output_norm, w.output)) - unused

    @functools.cached_property
    def tokens_at_a_time(self) -> int:
        """Tokens that generation makes by default between two looks at them.

        A look costs a CPU more than a millisecond, most of it for handing a program hundreds of weights that the
        caches have lost; with 4 in a program a step of 15 ms takes a tenth less. So many as still come smoothly
        then; one where layers are not kernels, since to compile them all in one program takes too long.
        """
        if jax.default_backend() != "cpu":
            return BLOCK
        if isinstance(self.programs, SpreadPrograms) or not has_layer_kernels(self.implementation):
            return 1
        return min(BLOCK, max(1, BYTES_BETWEEN_LOOKS // self.weight_bytes_per_token))

    def decode_block(
        self,
        token: int,
        state: State,
        key: Array,
        step: int,
        params: Any,
        *,
        stop: Sequence[int],
        count: int,
        block: int,
    ) -> tuple[list[int], State]:
        """Put one token through the model, sample the next, and so on `count` times (at most `block`), on the device.

        Draw number `step` + i has the key `fold_in(key, step + i)`. The first of `stop`, or of sampling.INVALID,
        is the last token returned. `state` is gone after, whatever became of the tokens.
        """
        length = int(state.length[0])
        if length + count > self.context_length:
            raise BadInput(f"tokens: {length + count} in all; the context holds {self.context_length}")
        state = self._grown(state, length + count)
        stops = jnp.array([sampling.INVALID, *stop], jnp.int32)
        made, state = self.programs.decode(token, state, key, step, count, params, stops, block=block)
        made = np.asarray(made)
        ends = np.flatnonzero(np.isin(made[:count], [sampling.INVALID, *stop]))
        return made[: ends[0] + 1 if len(ends) else count].tolist(), state

    def taps(self, tokens: Any, select: str | None = None) -> dict[str, np.ndarray]:
        """Every activation of one sequence under llama.cpp's name, in execution order, token axis first.

        `select` is a regular expression that a name has to contain a match of.
        """
        return self.forward_with_taps(tokens, None, select)[2]

    def forward_with_taps(
        self, tokens: Any, state: State | None = None, select: str | None = None
    ) -> tuple[Array, State, dict[str, np.ndarray]]:
        """`forward` of one sequence, unpadded and in one piece, and its taps."""
        batch, state = self._enter(tokens, state)
        if not batch.single:
            raise BadInput("tokens: several sequences; expected one, to tap its activations")
        hidden, state, taps = self._trunk(
            Piece(batch.tokens, batch.lengths, batch.tokens.shape[1]), state, tapped=True
        )
        logits, head_taps = self._head(hidden, tapped=True)
        wanted = re.compile(select or "")
        named = {name: np.asarray(x[0]) for name, x in (taps | head_taps).items() if wanted.search(name)}
        return logits[0], state, named

    def generate(self, tokens: Any, **options: Any) -> Iterator[int]:
        """Continue one sequence, token by token: see `scarlet_jax.generate.generate`."""
        from scarlet_jax.generate import generate

        return generate(self, tokens, **options)

    def init_state(self, batch: int = 1, slots: int = SLOTS) -> State:
        """An empty state, with room for `slots` tokens a sequence (it grows when they run out)."""
        return self.programs.init_state(batch, bucket(slots), self.kv_dtype)

    def _enter(self, tokens: Any, state: State | None, positions: Any = None) -> tuple[Batch, State]:
        """The checked batch, and a state with room for it."""
        batch = Batch.of(tokens, self.config.vocabulary_size, positions)
        rows = len(batch.lengths)
        if state is None:
            state = self.init_state(rows, int(batch.lengths.max()))
        if len(state.length) != rows:
            raise BadInput(f"tokens: {rows} sequences; expected {len(state.length)}, as in the state")
        needed = int((np.asarray(state.length) + batch.lengths).max())
        if needed > self.context_length:
            raise BadInput(
                f"tokens: {needed} with those before them; the context holds {self.context_length}"
            )
        return batch, self._grown(state, needed)

    def _grown(self, state: State, needed: int) -> State:
        """`state` with room for `needed` tokens a sequence, its caches copied into larger ones if need be."""
        size = (len(state.length), bucket(needed), self.kv_dtype)
        leaves, structure = jax.tree.flatten(state)
        if all(new <= old.size for new, old in zip(self.programs.leaf_sizes(*size), leaves, strict=True)):
            return state
        return jax.tree.unflatten(structure, map(_extended, leaves, self.programs.leaf_shapes(*size)))

    def _trunk(self, piece: Piece, state: State, **options: Any) -> Traced:
        return self.programs.trunk(piece.tokens, piece.count, state, positions=piece.positions, **options)

    def _head(self, hidden: ArrayLike, tapped: bool = False) -> tuple[Array, dict[str, Array]]:
        return self.programs.head(hidden, tapped)


def _nbytes(weights: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


def _extended(array: Array, shape: tuple[int, ...]) -> Array:
    """With zeros after the end of each axis that is longer in `shape`: an empty cache is zeros."""
    more = [max(0, new - old) for new, old in zip(shape, array.shape, strict=True)]
    return jnp.pad(array, [(0, n) for n in more]) if any(more) else array


def bucket(slots: int) -> int:
    """The next size of cache: SLOTS, doubled as often as needed."""
    return max(SLOTS, 1 << (slots - 1).bit_length())
