"""The forward pass, as functions of weights and state: embedding, blocks, head, and tokens made by them.

Step by step, a model is compiled piece by piece: one program for the embedding, one for each *kind* of block
(layers of the same shapes and quant types share it), one for the head; 24 unrolled layers would take six times
as long. Where whole layers are kernels there is little to compile, and one program for all blocks spares the
way through Python between them, which is a tenth of a small model's time a token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from scarlet_jax import attention, config, delta_net, ffn, mamba2, moe, mtp, parallel, sampling, short_conv
from scarlet_jax.ops import implementations, matmul, norm
from scarlet_jax.span import Span
from scarlet_jax.taps import collect, tap
from scarlet_jax.types import Array, Weight

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
def last_hidden(hidden: Array, count: Array, before: Array) -> Array:
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
        return run_trunk(*arguments, run_block_in_place if in_place else run_block)
    return (trunk_program_in_place if in_place else _trunk_program)(*arguments)


def has_layer_kernels(implementation: str) -> bool:
    """Whether all layers are kernels, so that all of a model is one program."""
    with implementations.use(implementation):
        return all(implementations.offered(operation) for operation in ("attention", "delta_net", "ffn"))


def run_trunk(weights, tokens, count, state, positions, hidden, cfg, tapped, implementation, step=run_block):
    """`trunk`, by `step` for each block; traced as a whole it is one program."""
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
_trunk_program = _jit_trunk(run_trunk)
trunk_program_in_place = _jit_trunk(run_trunk, donate_argnames="state")


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
    return (last_logits_in_place if in_place else last_logits_program)(*arguments)


def _last_logits(weights, tokens, count, state, before, positions, cfg, implementation, step=run_block):
    traced = run_trunk(weights, tokens, count, state, positions, None, cfg, False, implementation, step)
    hidden = last_hidden(traced.hidden, count, before)
    eps = cfg.layer_norm_rms_epsilon
    return head(weights.output_norm, weights.output, hidden, eps, False, implementation)[0], traced.state


_jit_last_logits = functools.partial(jax.jit, static_argnames=("cfg", "implementation"))
last_logits_program = _jit_last_logits(_last_logits)
last_logits_in_place = _jit_last_logits(_last_logits, donate_argnames="state")


def forward(weights, tokens, state, cfg) -> tuple[Array, State]:
    """The pure function whole: int32 (B, T), no padding -> logits f32 (B, T, V) and the state after them."""
    count = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    traced = trunk(weights, tokens, count, state, cfg)
    logits, _ = head(weights.output_norm, weights.output, traced.hidden, cfg.layer_norm_rms_epsilon)
    return logits, traced.state


def decode(weights, token, state, key, step, count, params, stops, cfg, block, implementation):
    """A static number of steps, of which those past the end are padding: a trip count that the device decides
    would bring the host back at every step. Tokens int32 (block,), meaningless past the end, and the state.
    """  # noqa: D205

    def advance(carry, i):
        token, state, going = carry
        going &= i < count
        traced = run_trunk(
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


decode_program = jax.jit(decode, static_argnames=("cfg", "block", "implementation"), donate_argnames="state")
