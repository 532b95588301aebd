"""llama.cpp as a reference engine: any libllama, by default the one in the xllamacpp wheel.

It runs on the CPU with an F32 cache and without flash attention unless told otherwise, so that what it
computes is as near to the truth as it can be.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.engines import ggml
from scarlet_jax.tools.engines.ggml import quantize, to_float

__all__ = ["Engine", "Model", "Node", "quantize", "to_float"]

_DTYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 26: np.dtype(np.int32)}  # of activations


class Model:
    """A GGUF opened by llama.cpp: its vocabulary and, unless `vocab_only`, its weights, on the CPU.

    A context manager. Raises BadInput if llama.cpp refuses the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, vocab_only: bool = False, lib: str | None = None) -> None:
        self.path = Path(path)
        self.lib = ggml.library(lib)
        if not self.path.is_file():
            raise BadInput(f"{path}: no such file")
        params = self.lib.llama_model_default_params()
        params.devices = (ctypes.c_void_p * 1)()  # no device but the CPU
        params.vocab_only = vocab_only
        self.lib.errors.clear()
        self._model = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise BadInput(f"{path}: llama.cpp cannot load it: {self.lib.last_error()}")
        self._vocab = self.lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = self.lib.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        if self._model:
            self.lib.llama_model_free(self._model)
        self._model = None

    def metadata(self, key: str) -> str | None:
        """A metadata value as llama.cpp prints it, or None."""
        buffer = ctypes.create_string_buffer(4096)
        length = self.lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else None

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
    op: str
    array: np.ndarray
    weight: tuple[str, str] | None


class Engine:
    """A model with a context: feeds tokens, gives the logits of each, shows every tensor on the way.

    `observe(node)`, if set, is called for each graph node whose name `wants(name)`. `n_ubatch` tokens go
    through the graph at a time; `sequences` independent ones share the context of `n_ctx` tokens each.
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
        lib: str | None = None,
    ) -> None:
        self.model = Model(path, lib=lib)
        self.lib = self.model.lib
        self.observe: Callable[[Node], None] | None = None
        self.wants: Callable[[str], bool] = lambda _name: True
        self._failure: Exception | None = None
        self._next_position = [0] * sequences
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx * sequences, sequences
        params.n_batch = n_ctx * sequences
        params.n_ubatch = min(n_ubatch, params.n_batch)
        if hasattr(params, "n_outputs_max_per_seq"):  # else logits of one token only
            params.n_outputs_max = params.n_outputs_max_per_seq = params.n_batch
        params.n_threads = params.n_threads_batch = threads or os.cpu_count() or 1
        params.flash_attn_type = int(flash_attention)
        params.type_k, params.type_v = self.lib.type_id(type_k), self.lib.type_id(type_v)
        self._callback = ggml.EvalCallback(self._on_node)  # kept: llama.cpp holds only a pointer
        params.cb_eval = self._callback
        self.lib.errors.clear()
        self._context = self.lib.llama_init_from_model(self.model._model, params)
        if not self._context:
            self.model.close()
            raise BadInput(f"{path}: llama.cpp cannot make a context: {self.lib.last_error()}")
        if (self.lib.llama_n_seq_max(self._context), self.lib.llama_n_ubatch(self._context)) != (sequences, params.n_ubatch):
            raise BadInput(f"{self.lib.path}: llama_context_params has a layout that is not known here")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        self._next_position = [0] * len(self._next_position)

    def decode(self, tokens: Sequence[int], *, sequences: Sequence[int] | None = None) -> np.ndarray:
        """Feeds tokens, each at the end of its sequence (all of sequence 0 by default) -> logits f32 (T, V)."""
        sequences = [0] * len(tokens) if sequences is None else sequences
        batch, _alive = self._batch(tokens, sequences)
        self.lib.errors.clear()
        status = self.lib.llama_decode(self._context, batch)
        failure, self._failure = self._failure, None
        if failure:
            raise failure
        if status:
            raise BadInput(f"{self.model.path}: llama.cpp cannot decode: {self.lib.last_error()} (status {status})")
        logits = self.lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (len(tokens), self.model.vocab_size)).copy()

    def _batch(self, tokens: Sequence[int], sequences: Sequence[int]) -> tuple[ggml.Batch, Any]:
        """The tokens as llama.cpp takes them, and what must live as long as that."""
        count = len(tokens)
        if not count:
            raise BadInput("no tokens: expected one or more")
        if wrong := [token for token in tokens if not 0 <= token < self.model.vocab_size]:
            raise BadInput(f"token id {wrong[0]}: expected 0 to {self.model.vocab_size - 1}")
        positions = []
        for sequence in sequences:
            positions.append(self._next_position[sequence])
            self._next_position[sequence] += 1
        ints = ctypes.c_int32 * count
        ids = ints(*sequences)
        pointers = [ctypes.pointer(ctypes.c_int32.from_buffer(ids, 4 * i)) for i in range(count)]
        columns = {
            "token": ints(*tokens),
            "pos": ints(*positions),
            "n_seq_id": ints(*[1] * count),
            "seq_id": (ctypes.POINTER(ctypes.c_int32) * count)(*pointers),
            "logits": (ctypes.c_int8 * count)(*[1] * count),
        }
        batch = ggml.Batch(n_tokens=count)
        for name, column in columns.items():
            kind = dict(ggml.Batch._fields_)[name]
            setattr(batch, name, ctypes.cast(column, kind))
        return batch, (columns, ids)

    def _on_node(self, tensor: int, ask: bool, _user_data: int) -> bool:
        """llama.cpp's evaluation callback. An exception ends the evaluation; `decode` raises it again."""
        if self.observe is None:
            return False
        try:
            name = self.lib.ggml_get_name(tensor).decode()
            if not self.wants(name):
                return not ask
            if not ask:
                self.observe(self._node(tensor, name))
            return True
        except Exception as error:
            self._failure = error
            return False

    def _node(self, tensor: int, name: str) -> Node:
        struct = ggml.TensorStruct.from_address(tensor)
        op = self.lib.ggml_op_name(struct.op).decode()
        return Node(name, op, self._array(tensor, struct), self._weight(struct))

    def _array(self, tensor: int, struct: ggml.TensorStruct) -> np.ndarray:
        """A copy of the tensor's values, read through its strides wherever they are kept."""
        size = self.lib.ggml_nbytes(tensor)
        raw = np.empty(size, np.uint8)
        self.lib.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, size)
        return np.ascontiguousarray(np.ndarray(struct.ne[::-1], _DTYPES[struct.type], raw, strides=struct.nb[::-1]))

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
