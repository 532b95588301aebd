"""Dumps in the formats people have in hand, told apart by what the file begins with."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity.dump import FORMAT, Dump, MappedTensors, read_dump
from scarlet_jax.tools.parity.logs import looks_like_log, read_log

_KNOWN = (
    "a scarlet-taps/1 file, .safetensors, .npz, .pt, .gguf, a llama-eval-callback or llama-debug log, "
    "llama-debug's --save-logits .bin, a transformers debug tree, or a folder of arrays"
)


def read(path: str | os.PathLike[str]) -> Dump:
    """Open a dump of any known format; arrays are read when asked for wherever the format allows it.

    Raises:
        BadInput: the path is missing or unreadable, or holds nothing known.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise BadInput(f"{path}: is empty; expected {_KNOWN}")
    return _reader(path, head)(path)


def _reader(path: Path, head: bytes) -> Callable[[Path], Dump]:
    if head[:4] == b"GGUF":
        return _gguf
    if head[:2] == b"PK":
        return _torch if path.suffix in (".pt", ".pth", ".bin") else _npz
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return _safetensors
    if head[:6] == b"\x93NUMPY":
        return _npy
    if head.lstrip()[:1] == b"{":
        return _debug_tree
    if path.suffix == ".bin":
        return _saved_logits
    if _is_text(head):
        return _text
    raise BadInput(f"{path}: no known format; expected {_KNOWN}")


def _is_text(head: bytes) -> bool:
    return b"\0" not in head


def _safetensors(path: Path) -> Dump:
    tensors = MappedTensors(path)
    if tensors.metadata.get("format") == FORMAT:
        return read_dump(path)
    return _plain(tensors, path, "safetensors")


def _plain(taps: Mapping[str, Any], path: Path, kind: str, **rest: Any) -> Dump:
    if not len(taps):
        raise BadInput(f"{path}: holds no array; expected activations by name")
    order = sorted(taps, key=_natural) if kind != "npz" else list(taps)
    return Dump(_Squeezed(taps, path), engine=rest.pop("engine", ""), order=order, format=kind, **rest)


def _natural(name: str) -> list[Any]:
    """Layers in number order."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


class _Squeezed(Mapping[str, np.ndarray]):
    """Arrays without a leading batch axis of one, as floats or integers that numpy computes with."""

    def __init__(self, arrays: Mapping[str, Any], source: Path):
        self._arrays, self._source = arrays, source

    def __getitem__(self, name: str) -> np.ndarray:
        array = np.asarray(self._arrays[name])
        if array.dtype.kind not in "fiub":
            raise BadInput(f"{self._source}: array {name} is of type {array.dtype}; expected real numbers")
        if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):
            array = array.astype(np.float32)
        return array[0] if array.ndim > 2 and array.shape[0] == 1 else array

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _npz(path: Path) -> Dump:
    try:
        archive = np.load(path, allow_pickle=False)
        arrays = {name: None for name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: not a whole .npz archive ({_line(error)})") from None
    except Exception as error:  # zipfile has errors of its own
        raise BadInput(f"{path}: not a whole .npz archive ({_line(error)})") from None
    tokens = _take(_Archive(archive, list(arrays), path), arrays, ("tokens", "input_ids"), path)
    return _plain(_Archive(archive, list(arrays), path), path, "npz", tokens=tokens)


class _Archive(Mapping[str, np.ndarray]):
    def __init__(self, archive: Any, names: list[str], path: Path):
        self._archive, self._names, self._path = archive, dict.fromkeys(names), path

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            self._check_size(name)
            return self._archive[name]
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"{self._path}: array {name} cannot be read ({_line(error)})") from None

    def _check_size(self, name: str) -> None:
        """Nothing is allocated for an array that claims to be larger than what the archive holds of it."""
        file = self._archive.zip
        entry = file.getinfo(name if name in file.namelist() else f"{name}.npy")
        with file.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in header:
                return
            shape, _, dtype = header[version](stream)
        held = min(entry.file_size, _DEFLATED * entry.compress_size)
        if math.prod(shape) * dtype.itemsize > held:
            claims = f"claims the shape {list(shape)}, of which the archive holds {held} bytes at most"
            raise BadInput(f"{self._path}: array {name} {claims}")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_DEFLATED = 1032  # bytes that deflate can make of one


def _take(archive: Any, names: dict[str, None], words: tuple[str, ...], path: Path) -> list[int]:
    """An array of token ids, taken out of the taps."""
    for word in words:
        if word in names:
            del names[word]
            tokens = np.ravel(archive[word])
            if tokens.dtype.kind not in "iu":
                raise BadInput(f"{path}: {word} is of type {tokens.dtype}; expected integers")
            return tokens.tolist()
    return []


def _npy(path: Path) -> Dump:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: not a whole .npy array ({_line(error)})") from None
    return _plain({path.stem: array}, path, "npy")


def _torch(path: Path) -> Dump:
    return _plain(_flatten(_load_torch(path)), path, "pt")


def _load_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise BadInput(f"{path}: a torch file; expected the torch package to read it with") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BadInput(f"{path}: torch's weights-only loader refuses it ({_line(error)})") from None


def _flatten(value: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Nested mappings and sequences of tensors -> name -> array; sglang's {value, meta} gives its value."""
    if isinstance(value, Mapping):
        if set(value) >= {"value", "meta"}:
            return _flatten(value["value"], prefix)
        return {
            k: v for key, part in value.items() for k, v in _flatten(part, _join(prefix, str(key))).items()
        }
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
        return {
            k: v
            for i, part in enumerate(value)
            for k, v in _flatten(part, _join(prefix, str(i) if i else "")).items()
        }
    if hasattr(value, "detach"):
        tensor = value.detach()
        return {prefix or "tensor": (tensor.float() if tensor.is_floating_point() else tensor).numpy()}
    return {prefix: np.asarray(value)} if isinstance(value, np.ndarray) else {}


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _folder(path: Path) -> Dump:
    """A folder of .npy, .pt or .safetensors files named by tap or module; a debug tree inside comes first."""
    trees = sorted(path.glob("*_debug_tree_FULL_TENSORS.json"))
    if trees:
        return _debug_tree(trees[0])
    taps: dict[str, Any] = {}
    for file in sorted(path.iterdir(), key=lambda p: _natural(p.name)):
        if file.suffix == ".npy":
            taps[_file_name(file)] = _Lazy(file)
        elif file.suffix in (".pt", ".pth"):
            taps |= {
                (_file_name(file) if len(part) == 1 else _join(_file_name(file), k)): v
                for part in [_flatten(_load_torch(file))]
                for k, v in part.items()
            }
        elif file.suffix == ".safetensors":
            tensors = MappedTensors(file)
            taps |= {(k if len(tensors) > 1 else _file_name(file)): tensors[k] for k in tensors}
    if not taps:
        raise BadInput(
            f"{path}: no array in this folder; expected .npy, .pt or .safetensors files named by tap"
        )
    return _plain(taps, path, "folder")


class _Lazy:
    """An .npy file that is mapped when looked at."""

    def __init__(self, path: Path):
        self._path = path

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        try:
            array = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BadInput(f"{self._path}: not a whole .npy array ({_line(error)})") from None
        return array if dtype is None else array.astype(dtype)


def _file_name(file: Path) -> str:
    """The tap a file is named after; sglang's dumper writes name=... and layer_id=... among other fields."""
    fields = dict(part.split("=", 1) for part in file.stem.split("___") if "=" in part)
    if "name" in fields:
        return fields["name"] + (f"-{fields['layer_id']}" if "layer_id" in fields else "")
    return file.stem


def _debug_tree(path: Path) -> Dump:
    """transformers' model_addition_debugger: a tree of modules, outputs in safetensors files beside it."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a transformers debug tree ({_line(error)})") from None
    taps: dict[str, Any] = {}
    try:
        outputs = list(_outputs(tree))
    except (BadInput, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: {_line(error)}") from None
    for module, output in outputs:
        array = _tree_value(output, path.parent)
        if array is not None:
            taps[module] = array
    if not taps:
        raise BadInput(
            f"{path}: no output values in this tree; expected model_addition_debugger_context(use_repr=False, "
            "do_prune_layers=False)"
        )
    return Dump(
        _Squeezed(taps, path), engine="transformers", order=list(taps), format="transformers debug tree"
    )


def _outputs(node: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping) or not isinstance(node.get("module_path", ""), str):
        raise BadInput("a node of this tree is no module; expected transformers' debug tree")
    for child in node.get("children") or []:
        yield from _outputs(child)
    if node.get("outputs") is not None and node.get("module_path"):
        path = re.sub(r"^\w+?(?:ForCausalLM|Model|ForConditionalGeneration)\.", "", node["module_path"])
        yield path, node["outputs"]


def _tree_value(output: Any, folder: Path) -> np.ndarray | None:
    if isinstance(output, list):
        return next((v for v in (_tree_value(part, folder) for part in output) if v is not None), None)
    if not isinstance(output, Mapping):
        return None
    value = output.get("value")
    if isinstance(value, str) and value.endswith(".safetensors"):
        file = (folder / Path(value).name) if not (folder / value).is_file() else folder / value
        return MappedTensors(file)["data"]
    return None


def _gguf(path: Path) -> Dump:
    """llama-results files: `tokens` and `logits`, the latter declared transposed but stored token-major."""
    from scarlet_jax import gguf

    file = gguf.read(path)
    if "logits" not in file.tensors:
        raise BadInput(
            f"{path}: a GGUF without `logits`; expected llama-results output (a model goes to --model)"
        )
    logits = file.tensors["logits"]
    tokens = file.tensors.get("tokens")
    ids = [int(t) for t in tokens.data.reshape(-1).view(np.int32)] if tokens is not None else []
    values = logits.data.reshape(-1).view(np.float32)
    rows = len(ids) or min(logits.shape)
    return Dump({"result_output": values.reshape(rows, -1)}, "llama.cpp", tokens=ids, format="llama-results")


def _saved_logits(path: Path) -> Dump:
    """llama-debug --save-logits: the last token's logits, f32; token ids in a -tokens.bin beside them."""
    raw = np.fromfile(path, np.uint8)
    if raw.size % 4 or path.stem.endswith("-tokens"):
        raise BadInput(f"{path}: not f32 logits; expected the .bin of llama-debug --save-logits")
    beside = path.with_name(f"{path.stem}-tokens.bin")
    tokens = [int(t) for t in np.fromfile(beside, np.int32)] if beside.is_file() else []
    engine = "transformers" if path.name.startswith("pytorch") else "llama.cpp"
    logits = raw.view(np.float32).reshape(1, -1)
    return Dump({"result_output": logits}, engine, tokens=tokens, format="saved logits")


def _text(path: Path) -> Dump:
    text = path.read_text(errors="replace")
    if looks_like_log(text[: 1 << 20]) or looks_like_log(text):
        return read_log(text, str(path))
    values = re.findall(r"^\s*(\d+):\s*([-+0-9.eE]+|nan|inf)\s*$", text, re.MULTILINE)
    if values and [int(i) for i, _ in values] == list(range(len(values))):
        logits = np.array([[float(v) for _, v in values]], np.float32)
        return Dump({"result_output": logits}, "llama.cpp", format="saved logits", resolution=0.5e-6)
    raise BadInput(f"{path}: a text, but no log of tensors; expected {_KNOWN}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
