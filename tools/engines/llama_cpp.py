"""llama.cpp as a reference engine: any libllama, by default the one in the xllamacpp wheel.

It runs on the CPU with an F32 cache and without flash attention unless told otherwise, so that what it
computes is as near to the truth as it can be.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.engines import ggml, steps
from scarlet_jax.tools.engines.ggml import quantize, to_float

__all__ = ["Engine", "Model", "Node", "quantize", "taps", "to_float"]

_DTYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 26: np.dtype(np.int32)}  # of activations


class Model:
    """A GGUF opened by llama.cpp: its vocabulary and, unless `vocab_only`, its weights, on the CPU.

    A context manager. Raises BadInput if llama.cpp refuses the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_only: bool = False,
        prediction: bool = False,
        lib: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.lib = ggml.library(lib)
        if not self.path.is_file():
            raise BadInput(f"{path}: no such file")
        params = self.lib.llama_model_default_params()
        params.devices = (ctypes.c_void_p * 1)()  # no device but the CPU
        params.vocab_only = vocab_only
        params.flags[ggml.LOAD_MTP] = prediction
        self.lib.errors.clear()
        self.handle = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise BadInput(f"{path}: llama.cpp cannot load it: {self.lib.last_error()}")
        self._vocab = self.lib.llama_model_get_vocab(self.handle)
        self.vocab_size: int = self.lib.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        if self.handle:
            self.lib.llama_model_free(self.handle)
        self.handle = None

    def metadata(self, key: str) -> str | None:
        """A metadata value as llama.cpp prints it, or None."""
        buffer = ctypes.create_string_buffer(4096)
        length = self.lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else None

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.metadata("general.architecture") or ""

    def tokenize(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Text to token ids; nothing is added at either end."""
        raw = text.encode()
        room = len(raw) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self._vocab, raw, len(raw), tokens, room, False, parse_special)
        if count < 0:
            raise BadInput(f"{self.path}: llama.cpp cannot tokenize this text: {self.lib.last_error()}")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; special tokens as their own text."""
        buffer = ctypes.create_string_buffer(1024)
        length = self.lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(length, 0)]


@dataclasses.dataclass(frozen=True)
class Node:
    """A tensor of llama.cpp's graph at the moment it was computed.

    `array` is in C order with axes slow to fast, the reverse of GGML's ne, all four of them. `weight` is the
    weight (name, quant type) if the tensor is that weight's product.
    """

    name: str
    array: np.ndarray
    weight: tuple[str, str] | None


class Engine:
    """A model with a context: feeds tokens, gives the logits of each, shows every tensor on the way.

    `observe(node)`, if given, is called for each graph node whose name `wants(name)`. `n_ubatch` tokens go
    through the graph at a time. `sequences` independent ones share the context, of `n_ctx` tokens each.
    With `prediction` it is the prediction block that runs, and `decode` takes the states before the tokens.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int = 512,
        n_ubatch: int = 512,
        sequences: int = 1,
        threads: int | None = None,
        flash_attention: bool = False,
        type_k: str = "F32",
        type_v: str = "F32",
        prediction: bool = False,
        observe: Callable[[Node], None] | None = None,
        wants: Callable[[str], bool] = lambda _name: True,
        lib: str | None = None,
    ) -> None:
        self.lib = ggml.library(lib)
        types = self.lib.type_id(type_k), self.lib.type_id(type_v)
        self.model = Model(path, prediction=prediction, lib=lib)
        self._n_ctx = n_ctx
        self._lengths = [0] * sequences
        self._observe, self._wants = observe, wants
        self._failure: Exception | None = None
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx * sequences
        params.n_ubatch = min(n_ubatch, params.n_batch)
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads or os.cpu_count() or 1
        params.flash_attn_type = int(flash_attention)
        params.type_k, params.type_v = types
        self._callback = ggml.EvalCallback(self._on_node)  # kept: llama.cpp holds only a pointer
        if prediction:
            params.ctx_type = ggml.CONTEXT_TYPE_MTP
        if observe:
            params.cb_eval = self._callback
        self._context = self._new_context(params)

    def _new_context(self, params: Any) -> int:
        self.lib.errors.clear()
        context = self.lib.llama_init_from_model(self.model.handle, params)
        if not context:
            self.model.close()
            raise BadInput(f"{self.model.path}: llama.cpp cannot make a context: {self.lib.last_error()}")
        asked = (params.n_seq_max, params.n_ubatch)
        if asked != (self.lib.llama_n_seq_max(context), self.lib.llama_n_ubatch(context)):
            raise BadInput(f"{self.lib.path}: llama_context_params has a layout that is not known here")
        return context

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the context and the model."""
        if self._context:
            self.lib.llama_free(self._context)
        self._context = None
        self.model.close()

    def clear(self) -> None:
        """Forgets every sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self._context), True)
        self._lengths = [0] * len(self._lengths)

    def decode(
        self,
        tokens: Sequence[int],
        *,
        sequences: Sequence[int] | None = None,
        hidden: np.ndarray | None = None,
        last: bool = False,
    ) -> np.ndarray:
        """Feeds tokens, each at the end of its sequence (0 by default) -> the logits after each, f32 (T, V).

        With `last`, only those after the last token are computed: (1, V). `hidden` f32 (T, D) is for prediction.
        Raises BadInput for no tokens, ids outside the vocabulary, and more tokens than the context holds.
        """
        sequences = [0] * len(tokens) if sequences is None else sequences
        self._check(tokens)
        wanted = [not last] * (len(tokens) - 1) + [True]
        batch, _alive = _batch(tokens, self._positions(sequences), sequences, wanted)
        if hidden is not None:
            hidden = np.ascontiguousarray(hidden, np.float32)
            batch.embd = hidden.ctypes.data
        self.lib.errors.clear()
        status = self.lib.llama_decode(self._context, batch)
        failure, self._failure = self._failure, None
        if failure:
            raise failure
        if status:
            raise BadInput(f"{self.model.path}: llama.cpp cannot decode: {self.lib.last_error()} ({status})")
        logits = self.lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (sum(wanted), self.model.vocab_size)).copy()

    def _check(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise BadInput("no tokens: expected one or more")
        for token in tokens:
            if not 0 <= token < self.model.vocab_size:
                raise BadInput(f"token id {token}: expected 0 to {self.model.vocab_size - 1}")

    def _positions(self, sequences: Sequence[int]) -> list[int]:
        """The next position of each token's sequence."""
        lengths = self._lengths.copy()
        positions = []
        for sequence in sequences:
            positions.append(lengths[sequence])
            lengths[sequence] += 1
        if max(lengths) > self._n_ctx:
            raise BadInput(f"{max(lengths)} tokens: expected {self._n_ctx} or fewer, the context's length")
        self._lengths = lengths
        return positions

    def _on_node(self, tensor: int, ask: bool, _user_data: int) -> bool:
        """llama.cpp's evaluation callback. An exception ends the evaluation; `decode` raises it again."""
        try:
            name = self.lib.ggml_get_name(tensor).decode()
            if ask:
                return self._wants(name)
            if self._observe:
                self._observe(self._node(tensor, name))
            return True
        except Exception as error:
            self._failure = error
            return False

    def _node(self, tensor: int, name: str) -> Node:
        struct = ggml.TensorStruct.from_address(tensor)
        return Node(name, self._array(tensor, struct), self._weight(struct))

    def _array(self, tensor: int, struct: ggml.TensorStruct) -> np.ndarray:
        """A copy of the tensor's values, read through its strides wherever they are kept."""
        size = self.lib.ggml_nbytes(tensor)
        raw = np.empty(size, np.uint8)
        self.lib.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, size)
        dtype = _DTYPES[struct.type]
        return np.ascontiguousarray(np.ndarray(struct.ne[::-1], dtype, raw, strides=struct.nb[::-1]))

    def _weight(self, struct: ggml.TensorStruct) -> tuple[str, str] | None:
        """The weight that `struct` is the product of, seen through a change of shape or a separate scale."""
        op = self.lib.ggml_op_name(struct.op).decode()
        if not struct.src[0]:
            return None
        source = ggml.TensorStruct.from_address(struct.src[0])
        source_name = self.lib.ggml_get_name(struct.src[0]).decode()
        if op in ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS") and source_name.endswith(".weight"):
            return source_name, self.lib.ggml_type_name(source.type).decode().upper()
        scaled = op == "MUL" and self.lib.ggml_get_name(struct.src[1]).decode().endswith(".scale")
        return self._weight(source) if op == "RESHAPE" or scaled else None


def _batch(
    tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
) -> tuple[ggml.Batch, Any]:
    """The tokens as llama.cpp takes them, `wanted` logits, and what must live as long as the batch."""
    count = len(tokens)
    ints = ctypes.c_int32 * count
    owners = ints(*sequences)
    each = [ctypes.pointer(ctypes.c_int32.from_buffer(owners, 4 * i)) for i in range(count)]
    columns = {
        "token": ints(*tokens),
        "pos": ints(*positions),
        "n_seq_id": ints(*[1] * count),
        "seq_id": (ctypes.POINTER(ctypes.c_int32) * count)(*each),
        "logits": (ctypes.c_int8 * count)(*wanted),
    }
    fields: Any = ggml.Batch._fields_
    kinds = dict(fields)
    pointers = {name: ctypes.cast(column, kinds[name]) for name, column in columns.items()}
    return ggml.Batch(n_tokens=count, **pointers), (columns, owners)


# ------------------------------------------------------------------------------
# Taps, as a dump has them
# ------------------------------------------------------------------------------

# What the axes of a tensor are, slow to fast, where they are not (tokens, ...) already or where a token or a
# head more or less would change how many there are. T is what comes first in a dump: tokens, or for states of
# the convolution the time before them.
_AXES = (
    dict.fromkeys(("kq", "kq_soft_max", "kqv"), "NTS")
    | dict.fromkeys(("qkv_mixed_transposed", "conv_input"), "CT")
    | dict.fromkeys(steps.CONV_STATES, "CT")
    | dict.fromkeys(("state_predelta", "new_state"), "HVK")
    | dict.fromkeys(("Qcur_reshaped", "Qcur_normed", "Qcur", "Kcur_normed", "Kcur", "Vcur"), "TNH")
    | dict.fromkeys(("q_conv", "q_conv_predelta", "k_conv", "k_conv_predelta", "v_conv_predelta"), "TNH")
    | dict.fromkeys(("beta", "beta_sigmoid"), "TN1")
)
_FLAT = {
    "conv_states",
    "conv_state_update",
    "state_update_target",
}  # C and K - 1 as one axis, as in the cache


def taps(
    path: str | os.PathLike[str],
    tokens: Sequence[int],
    select: str | None = None,
    decode: int = 0,
    **options: Any,
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, str]], str]:
    """Every tensor that llama.cpp names, as a dump has them; the weights behind them; the engine's version.

    The last `decode` tokens are fed one at a time, the others in one pass; see `steps.join` for how the parts
    are put together. `select` is a regular expression that a name has to contain a match of. Taps are f32, or
    i32 where they are indices, token axis first, in execution order. Weights are tap -> (name, quant type).
    `options` are Engine's. Raises BadInput for what cannot be read or run.
    """
    recorder = _Recorder(re.compile(select or ""))
    passes = steps.split(tokens, decode)
    options = {"n_ctx": len(tokens), "n_ubatch": len(tokens)} | options
    with Engine(path, observe=recorder.see, wants=recorder.wants, **options) as engine:
        recorder.conv_kernel = int(engine.model.metadata(f"{engine.model.architecture}.ssm.conv_kernel") or 0)
        joined = steps.join((len(part), recorder.record(engine, part)) for part in passes)
        return joined, recorder.weights, engine.lib.version


class _Recorder:
    """Collects the named nodes of a pass in the conventions of a dump (spec section 5 has llama.cpp's)."""

    def __init__(self, select: re.Pattern[str]) -> None:
        self.select = select
        self.conv_kernel = 0
        self.weights: dict[str, tuple[str, str]] = {}
        self._taps: dict[str, np.ndarray] = {}
        self._count = self._seen = 0  # tokens of this pass, and of all with it

    def record(self, engine: Engine, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Feeds `tokens` and returns their taps."""
        self._taps = {}
        self._count = len(tokens)
        self._seen += len(tokens)
        engine.decode(tokens)
        return self._taps

    def wants(self, node_name: str) -> bool:
        """Whether a node is an activation with a name of its own, and was asked for."""
        name = _tap_name(node_name)
        own = (
            name and not name.startswith(("node_", "leaf_", "cache_", "__")) and not re.search(r"[(#]", name)
        )
        return bool(own and self.select.search(name))

    def see(self, node: Node) -> None:
        """Takes a node; a name that occurs twice keeps the last, in its last place."""
        name = _tap_name(node.name)
        self._taps.pop(name, None)
        self._taps[name] = self._arranged(steps.stem(name), node.array)
        self.weights.pop(name, None)
        if node.weight:
            self.weights[name] = node.weight

    def _arranged(self, kind: str, array: np.ndarray) -> np.ndarray:
        """GGML's four axes, slow to fast -> as many as there are, those of time first."""
        if kind in _FLAT:
            array = array.reshape(1, 1, -1, self.conv_kernel - 1)
        axes = _AXES.get(kind, "")
        shape = array.shape[-len(axes) :] if axes else ()
        if not axes or ("N" in axes and shape[axes.index("T")] != self._count):
            return array.reshape(_natural_shape(array.shape, self._count))
        array = array.reshape(shape)
        if "T" in axes:
            array = np.ascontiguousarray(np.moveaxis(array, axes.index("T"), 0))
        return array[..., : self._seen] if kind in steps.KEYS_LAST else array


def _tap_name(node_name: str) -> str:
    """A node's name; a copy into the cache goes by the name of its place there."""
    return node_name.partition(" (copy of ")[0]


def _natural_shape(shape: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Without GGML's leading ones, but with the token axis even if it is one of them."""
    first = next((i for i, length in enumerate(shape) if length > 1), 3)
    return shape[first:] if tokens > 1 else (1, *shape[first:])
