"""The model's weights for the analyzer: decoded by the reference decoder, not by the engine under suspicion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity.arithmetic import Rounding

LARGE = 1 << 26  # elements of a weight that is never decoded whole: a vocabulary's
_AT_ONCE = 1 << 22


class ModelWeights(Mapping[tuple[int | None, str], np.ndarray]):
    """(layer, stem) -> f32 array (out, in); decoded at each access, the last few kept.

    `path` is a GGUF file; `metadata` its keys. Layer None holds `token_embd`, `output` and `output_norm`.
    """

    def __init__(self, path: Any):
        from scarlet_jax import gguf as reader  # the file format only: no kernel and no model

        self._file = reader.read(path)
        self.metadata: Mapping[str, Any] = self._file.metadata
        self._cache: dict[str, np.ndarray] = {}
        self._products: dict[tuple[Any, ...], np.ndarray] = {}

    def tensor_name(self, key: tuple[int | None, str]) -> str:
        """The file's name of a weight; a model without `output.weight` is tied."""
        layer, stem = key
        if key == (None, "output") and "output.weight" not in self._file.tensors:
            return "token_embd.weight"
        prefix = stem if layer is None else f"blk.{layer}.{'attn_qkv' if self._fused(key) else stem}"
        return next((n for n in (f"{prefix}.weight", prefix) if n in self._file.tensors), f"{prefix}.weight")

    def raw(self, key: tuple[int | None, str]) -> tuple[np.ndarray, str]:
        """The packed bytes (..., row bytes) and the quant type."""
        tensor = self._file.tensors[self.tensor_name(key)]
        return tensor.data[self._fused(key) or slice(None)], tensor.qtype

    def qtype(self, key: tuple[int | None, str]) -> str:
        """The quant type of a weight."""
        return self._file.tensors[self.tensor_name(key)].qtype

    def _fused(self, key: tuple[int | None, str]) -> slice | None:
        """Rows of attn_q, attn_k or attn_v within a full attention layer's `attn_qkv`; None where not fused."""
        layer, stem = key
        if stem not in ("attn_q", "attn_k", "attn_v") or f"blk.{layer}.{stem}.weight" in self._file.tensors:
            return None
        if f"blk.{layer}.attn_qkv.weight" not in self._file.tensors:
            return None
        prefix = self.metadata["general.architecture"]
        dim = int(self.metadata[f"{prefix}.attention.key_length"])
        keys = dim * self._per_layer(f"{prefix}.attention.head_count_kv", layer)
        rows = self._file.tensors[f"blk.{layer}.attn_qkv.weight"].shape[0]
        start = {"attn_q": 0, "attn_k": rows - 2 * keys, "attn_v": rows - keys}[stem]
        return slice(start, rows - 2 * keys if stem == "attn_q" else start + keys)

    def _per_layer(self, key: str, layer: int | None) -> int:
        value = np.ravel(self.metadata[key])
        return int(value[layer or 0] if value.size > 1 else value[0])

    def __getitem__(self, key: tuple[int | None, str]) -> np.ndarray:
        rows = self._fused(key)
        if rows is not None:
            return self[key[0], "attn_qkv"][rows]
        name = self.tensor_name(key)
        if name not in self._cache:
            if name not in self._file.tensors:
                raise KeyError(key)
            while len(self._cache) >= 4:
                self._cache.pop(next(iter(self._cache)))
            tensor = self._file.tensors[name]
            self._cache[name] = decode(tensor.data, tensor.qtype) * self._scale(name)
        return self._cache[name]

    def elements(self, key: tuple[int | None, str]) -> int:
        """How many numbers a weight holds."""
        return int(np.prod(self._file.tensors[self.tensor_name(key)].shape))

    def product(
        self, key: tuple[int | None, str], x: np.ndarray, rounding: Rounding | None = None
    ) -> np.ndarray:
        """x (T, in) by the weight, some rows of it decoded (and rounded) at a time: for one that would not fit."""
        asked = (
            key,
            rounding,
            x.dtype,
            x.shape,
            hash(x.tobytes()),
        )  # many a supposed cause begins with the right product
        if asked not in self._products:
            while len(self._products) >= 4:
                self._products.pop(next(iter(self._products)))
            self._products[asked] = self._product(key, x, rounding or (lambda w: w))
        return self._products[asked]

    def _product(self, key: tuple[int | None, str], x: np.ndarray, rounding: Rounding) -> np.ndarray:
        rows = len(self._file.tensors[self.tensor_name(key)].data)
        step = max(1, _AT_ONCE // x.shape[-1])
        made = np.empty((len(x), rows), x.dtype)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            made[:, part] = x @ rounding(self.some(key, part)).astype(x.dtype, copy=False).T
        made.flags.writeable = False
        return made

    def some(self, key: tuple[int | None, str], part: slice) -> np.ndarray:
        """Some rows of a matrix, decoded alone."""
        name = self.tensor_name(key)
        tensor = self._file.tensors[name]
        return decode(tensor.data[self._fused(key) or slice(None)][part], tensor.qtype) * self._scale(name)

    def rows(self, key: tuple[int | None, str], ids: np.ndarray) -> np.ndarray:
        """Rows `ids` of a table."""
        name = self.tensor_name(key)
        tensor = self._file.tensors[name]
        return decode(tensor.data[np.asarray(ids) % len(tensor.data)], tensor.qtype) * self._scale(name)

    def _scale(self, name: str) -> np.ndarray | np.float32:
        """The separate `X.scale` of a weight `X.weight`, one value (or one an expert)."""
        scale = self._file.tensors.get(name.removesuffix(".weight") + ".scale")
        if scale is None:
            return np.float32(1)
        value = scale.data.view(np.float32)
        return value.reshape(-1, 1, 1) if value.size > 1 else value.reshape(())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and self.tensor_name(key) in self._file.tensors

    def __iter__(self) -> Iterator[tuple[int | None, str]]:
        for name in self._file.tensors:
            yield parse(name)

    def __len__(self) -> int:
        return len(self._file.tensors)


def parse(name: str) -> tuple[int | None, str]:
    """Layer and stem: "blk.3.attn_q.weight" gives (3, "attn_q"), "output.weight" (None, "output")."""
    stem = name.removesuffix(".weight")
    if stem.startswith("blk."):
        layer, _, rest = stem[4:].partition(".")
        return int(layer), rest
    return None, stem


def decode(blocks: np.ndarray, qtype: str) -> np.ndarray:
    """Packed rows (..., row bytes) -> f32 (..., elements), by gguf-py where it can and by ggml's own code else."""
    kind = getattr(gguf.GGMLQuantizationType, qtype, None)
    if kind is not None:
        try:
            native = {"F32": np.float32, "F16": np.float16}.get(qtype, np.uint8)
            return np.asarray(
                gguf.quants.dequantize(np.ascontiguousarray(blocks).view(native), kind), np.float32
            )
        except NotImplementedError:
            pass
    try:
        from scarlet_jax.tools.engines.ggml import to_float

        return to_float(qtype, np.ascontiguousarray(blocks))
    except (ImportError, KeyError, OSError):
        raise BadInput(
            f"quant type {qtype}: no reference decoder here; expected gguf-py or llama.cpp"
        ) from None
