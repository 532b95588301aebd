"""The model: where Python meets compiled programs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from scarlet_jax import config, sampling, sharding
from scarlet_jax.batch import SLOTS, Batch, Piece, bucket
from scarlet_jax.errors import BadInput
from scarlet_jax.forward import State, Traced, Weights, has_layer_kernels, last_hidden
from scarlet_jax.ops import implementations, norm
from scarlet_jax.programs import Programs, SpreadPrograms
from scarlet_jax.types import Array

if TYPE_CHECKING:
    from scarlet_jax.gguf import Gguf
    from scarlet_jax.tokenizer import Tokenizer

BLOCK = 16  # tokens that generation makes on a device before the host looks at them, at most
BYTES_BETWEEN_LOOKS = 2_400_000_000  # of weights that a CPU reads meanwhile: a tenth of a second's or less


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
            last = last_hidden(hidden, piece.count, last)
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
