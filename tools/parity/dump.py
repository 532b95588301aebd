"""Activation dumps: one file an engine run, read a tensor at a time.

A dump in our own format, `scarlet-taps/1`, is a safetensors file. Keys are tap names, arrays are C order
with the token axis first, and the metadata strings say who computed what from which tokens. Reading maps one
tensor at a time, so comparing two dumps holds two tensors and never two files.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from scarlet_jax.errors import BadInput

FORMAT = "scarlet-taps/1"

# Safetensors dtypes that a dump may hold. BF16 has no numpy type: it is read as raw bits and widened.
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Dump(Mapping[str, np.ndarray]):
    """The taps of one run: name -> array, in execution order, fetched when asked for.

    Attributes:
        taps: name -> array; a mapping that may read from disk at each access.
        engine: name and version of the engine.
        model: the model's own name (`general.name`).
        arch: the architecture (`general.architecture`).
        tokens: the token ids of the run; empty where the source does not say.
        order: tap names in execution order.
        weights: tap -> (weight name, quant type), where a tap is one weight's product.
        config: whatever the engine knows about the model and its own arithmetic.
        format: what was read.
        resolution: absolute uncertainty of every value, above 0 for text logs that round.
        notes: what a reader had to say about the source, for the report.
    """

    taps: Mapping[str, Any]
    engine: str = ""
    model: str = ""
    arch: str = ""
    tokens: Sequence[int] = ()
    order: Sequence[str] = ()
    weights: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: str = FORMAT
    resolution: float = 0.0
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Completes `order`: taps it does not name come last."""
        named = [name for name in self.order if isinstance(name, str) and name in self.taps]
        known = set(named)
        object.__setattr__(self, "order", named + [name for name in self.taps if name not in known])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.taps[name]

    def __contains__(self, name: object) -> bool:
        return name in self.taps

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.taps)


class MappedTensors(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file; each access maps that tensor alone, read-only.

    The map dies with the array, so the pages of a large file do not stay in the process. `metadata` holds
    the file's strings. Raises BadInput when the file is not a whole safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="np") as checked:  # the library validates every offset
                self.metadata: dict[str, str] = dict(checked.metadata() or {})
            with self.path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                self._header = json.loads(file.read(header_bytes))
        except SafetensorError as error:
            raise BadInput(
                f"{self.path}: not a whole safetensors file ({_one_line(error)}); expected a {FORMAT} dump"
            ) from None
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be read ({error.strerror or _one_line(error)})") from None
        self._header.pop("__metadata__", None)
        self._data_start = 8 + header_bytes

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._header[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise BadInput(
                f"{self.path}: tensor {name} is {entry['dtype']}; expected one of {', '.join(_DTYPES)}"
            )
        if 0 in entry["shape"]:
            return np.zeros(entry["shape"], dtype)
        start = self._data_start + entry["data_offsets"][0]
        array = np.memmap(self.path, dtype, "r", start, tuple(entry["shape"]))
        return _widen_bf16(array) if entry["dtype"] == "BF16" else array

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)


def read_dump(path: str | os.PathLike[str]) -> Dump:
    """Opens a `scarlet-taps/1` file; nothing but its header is read.

    Raises:
        BadInput: the file is missing, truncated, not safetensors, or not a dump.
    """
    tensors = MappedTensors(path)
    text = tensors.metadata
    if text.get("format") != FORMAT:
        raise BadInput(f"{path}: format is {text.get('format', 'not given')!r}; expected {FORMAT!r}")
    return Dump(
        tensors,
        engine=text.get("engine", ""),
        model=text.get("model", ""),
        arch=text.get("arch", ""),
        tokens=_tokens(path, text),
        order=_metadata_json(path, text, "order", list),
        weights=_weights(path, text),
        config=_metadata_json(path, text, "config", dict),
    )


def write_dump(
    path: str | os.PathLike[str],
    taps: Mapping[str, Any],
    *,
    engine: str,
    model: str = "",
    arch: str = "",
    tokens: Sequence[int],
    weights: Mapping[str, Sequence[str]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes `taps` (name -> f32 or i32 array, in execution order) as a `scarlet-taps/1` file.

    Args:
        path: the file to write; it appears whole or not at all.
        taps: any array-likes; floats are stored as f32, integers as i32.
        engine: name and version of the engine that computed them.
        model: the model's own name.
        arch: the architecture.
        tokens: the token ids that were run.
        weights: tap -> (weight name, quant type), where a tap is one weight's product.
        config: anything JSON about the model and the engine's arithmetic.

    Raises:
        BadInput: the file cannot be written (no such folder, no space, ...).
    """
    path = Path(path)
    arrays = {name: _storable(name, value) for name, value in taps.items()}
    metadata = {
        "format": FORMAT,
        "engine": engine,
        "model": model,
        "arch": arch,
        "tokens": json.dumps([int(token) for token in tokens]),
        "order": json.dumps(list(arrays)),
        "weights": json.dumps({tap: list(weight) for tap, weight in (weights or {}).items()}),
        "config": json.dumps(dict(config or {}), default=_json_value),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: the dump cannot be written ({_one_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _storable(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    kind = {"f": np.float32, "V": np.float32, "i": np.int32, "u": np.int32, "b": np.int32}.get(
        array.dtype.kind
    )
    if kind is None:
        raise BadInput(f"tap {name} has dtype {array.dtype}; expected floats or integers")
    return np.ascontiguousarray(array.astype(kind, copy=False)).reshape(array.shape)


def _weights(path: str | os.PathLike[str], text: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    weights = _metadata_json(path, text, "weights", dict)
    for tap, weight in weights.items():
        if not (
            isinstance(weight, list) and len(weight) == 2 and all(isinstance(word, str) for word in weight)
        ):
            raise BadInput(
                f"{path}: metadata 'weights' of {tap} is {weight!r}; expected [weight name, quant type]"
            )
    return {tap: (name, qtype) for tap, (name, qtype) in weights.items()}


def _tokens(path: str | os.PathLike[str], text: Mapping[str, str]) -> list[int]:
    tokens = _metadata_json(path, text, "tokens", list)
    if not all(isinstance(token, int) for token in tokens):
        raise BadInput(f"{path}: metadata 'tokens' is not a list of token ids")
    return tokens


def _metadata_json(path: str | os.PathLike[str], text: Mapping[str, str], key: str, kind: type) -> Any:
    try:
        value = json.loads(text.get(key) or json.dumps(kind()))
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, kind):
        raise BadInput(f"{path}: metadata {key!r} is not a JSON {kind.__name__}")
    return value


def _json_value(value: Any) -> Any:
    """Config values that JSON does not know: numpy scalars and arrays, sets and dtypes."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _widen_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
