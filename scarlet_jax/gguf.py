"""GGUF in: a file, or a set of split files, as typed metadata and memory-mapped tensors.

Format: the ggml project's docs/gguf.md, versions 2 and 3, little-endian; constants from the `gguf` package.
The package's own reader believes what a file says of itself (counts, lengths, offsets) and does not know
every type, so this one reads for itself and holds each claim against the bytes that are there. Whatever is
wrong with a file is one BadInput; nothing is allocated for data that the file only claims to hold.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType, Keys

from scarlet_jax import huge_pages
from scarlet_jax.errors import BadInput
from scarlet_jax.ops.qtensor import block_size

_VERSIONS = (2, 3)  # these two differ in nothing but big-endian files
_MAX_DIMS = 4
# No model's metadata comes near; it bounds what a huge file of holes can make us walk and hold.
_MAX_HEADER = 1 << 28

# Codes that mean the same number to struct and to numpy.
_U32, _U64 = "<I", "<Q"
_NUMBERS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}

# Tensor type ids (spec section 9). The package knows all of llama.cpp's but the newest.
_ACTIVATION_TYPES = {9: "Q8_1", 15: "Q8_K"}
_TYPES = {kind.value: kind.name for kind in GGMLQuantizationType} | {41: "Q1_0", 42: "Q2_0"}
_RETIRED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4 (in ik_llama.cpp: I2_S)",  # one id, two meanings, and llama.cpp has neither today
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
# llama.cpp counts its types up from 0; ik_llama.cpp's own, and its row-interleaved repacks, begin far above.
_FIRST_IK_TYPE = 97
_IK_TYPES = {
    int(type_id): name
    for type_id, name in re.findall(
        r"(\d+) (\w+)",
        """
        133 Q6_0, 134 IQ1_BN, 135 IQ2_BN, 137 IQ2_K, 138 IQ3_K, 139 IQ4_K, 140 IQ5_K, 141 IQ6_K, 144 IQ4_KS,
        145 IQ2_KS, 146 IQ4_KSS, 151 Q8_KV, 152 IQ5_KS, 153 IQ2_KT, 154 IQ3_KT, 155 IQ4_KT, 156 IQ3_KS,
        157 IQ2_KL, 158 IQ1_KT, 202 Q4_0_R8, 206 Q5_0_R4, 208 Q8_0_R8, 210 Q2_K_R4, 211 Q3_K_R4, 212 Q4_K_R4,
        213 Q5_K_R4, 214 Q6_K_R4, 216 IQ2_XXS_R4, 217 IQ2_XS_R4, 218 IQ3_XXS_R4, 219 IQ1_S_R4, 220 IQ4_NL_R4,
        221 IQ3_S_R4, 222 IQ2_S_R4, 223 IQ4_XS_R8, 229 IQ1_M_R4, 230 BF16_R16, 233 Q6_0_R4, 335 IQ2_BN_R4,
        337 IQ2_K_R4, 338 IQ3_K_R4, 339 IQ4_K_R4, 340 IQ5_K_R4, 344 IQ4_KS_R4, 352 IQ5_KS_R4, 353 MXFP4_R8,
        397 Q8_K_R16, 398 Q8_KV_R8, 399 Q8_K_R8
        """,
    )
}

_PLAIN_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor: its name, type and shape, and its bytes where they lie in the memory-mapped file.

    `shape` is row-major, the reverse of GGUF's `ne`, so a matrix is (out, in). `data` is uint8
    (*shape[:-1], row bytes), read-only; no byte of it is read before somebody looks. `offset` is where it
    begins in the file; at a multiple of 64, JAX on a CPU can use the bytes in place.
    """

    name: str
    qtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    offset: int
    memory: mmap.mmap = dataclasses.field(repr=False)

    @property
    def is_plain(self) -> bool:
        """Whether the elements are ordinary numbers (F32, BF16, I32 ...) rather than quantised blocks."""
        return self.qtype in _PLAIN_DTYPES

    def array(self) -> np.ndarray:
        """The elements of a plain tensor, of shape `shape` and native dtype: a view, no copy."""
        return self.data.view(_PLAIN_DTYPES[self.qtype])

    def release(self) -> None:
        """Stop counting the tensor's pages as this process's memory; whoever looks again gets them again.

        A loader that copies tensors and releases each keeps one tensor of the file resident, not all of them.
        """
        if hasattr(self.memory, "madvise"):  # not on Windows
            start = self.offset - self.offset % mmap.PAGESIZE
            self.memory.madvise(mmap.MADV_DONTNEED, start, self.offset + self.data.nbytes - start)


class Metadata(Mapping[str, Any]):
    """What a file says of itself, in the file's order.

    Values are python scalars and strings, list[str] for arrays of strings, and numpy arrays for arrays of
    numbers. The typed look-ups raise BadInput naming the file and the key when the value is of another type,
    or when the key is absent and no default is given. `tensors` are the file's: some that are small are as
    good as metadata (`table`).
    """

    def __init__(
        self, values: Mapping[str, Any], source: Path | str, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        self._values = values
        self._source = source
        self._tensors = tensors if tensors is not None else {}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer."""
        value = self._look_up(key, default, "an integer")
        return self._require(type(value) is int, key, value, "an integer")

    def number(self, key: str, default: float | None = None) -> float:
        """A finite float; integers count."""
        value = self._look_up(key, default, "a number")
        is_number = type(value) in (int, float) and math.isfinite(value)
        return float(self._require(is_number, key, value, "a finite number"))

    def string(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._look_up(key, default, "a string")
        return self._require(isinstance(value, str), key, value, "a string")

    def strings(self, key: str, default: list[str] | None = None) -> list[str]:
        """An array of strings."""
        value = self._look_up(key, default, "an array of strings")
        return self._require(isinstance(value, list), key, value, "an array of strings")

    def integers(self, key: str, length: int, default: int | None = None) -> tuple[int, ...]:
        """`length` integers (booleans count as 0 and 1): an array of them, or one value for all."""
        expected = f"an integer or an array of {length} integers"
        value = self._look_up(key, default, expected)
        if isinstance(value, np.ndarray):
            self._require(value.dtype.kind in "iub" and value.shape == (length,), key, value, expected)
            return tuple(int(element) for element in value)
        return (int(self._require(isinstance(value, int), key, value, expected)),) * length

    def table(self, tensor: str, length: int) -> tuple[float, ...]:
        """The `length` values of an F32 tensor, all above zero, or () where the file has none of that name."""
        found = self._tensors.get(tensor)
        if found is None:
            return ()
        if found.qtype != "F32" or found.shape != (length,) or not (found.array() > 0).all():
            what = f"{found.qtype} of shape {found.shape}"
            raise BadInput(f"{self._source}: {tensor} is {what}, expected {length} F32 values above 0")
        return tuple(map(float, found.array()))

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        return name in self._tensors

    def require(self, condition: bool, key: str, expected: str) -> None:
        """Raise BadInput, saying what the key is and what was expected, unless `condition` holds."""
        self._require(condition, key, self._values.get(key), expected)

    def _look_up(self, key: str, default: Any, expected: str) -> Any:
        value = self._values.get(key, default)
        if value is None:
            raise BadInput(f"{self._source}: metadata key {key!r} is missing, expected {expected}")
        return value

    def _require(self, condition: bool, key: str, value: Any, expected: str) -> Any:
        if not condition:
            raise BadInput(f"{self._source}: metadata key {key!r} is {_describe(value)}, expected {expected}")
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Gguf:
    """A model file, or a split set as if it were one file: the metadata is the first part's."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        """The key `general.architecture`, for instance "qwen35"."""
        return self.metadata.string(Keys.General.ARCHITECTURE)


def read(path: str | Path) -> Gguf:
    """Open a GGUF file, or a split set by any one of its files NAME-00001-of-00003.gguf.

    Raises BadInput, naming the file and the tensor or key, for anything that is not a well-formed GGUF of
    weights that llama.cpp could hold.
    """
    path = Path(path)
    given = _read_file(path)
    count = given.metadata.integer(Keys.Split.LLM_KV_SPLIT_COUNT, default=1)
    if count <= 1:  # 0 marks a set that was merged
        return given
    paths = _part_paths(path, count)
    parts = [given if part == path else _read_file(part) for part in paths]
    tensors = _join(parts)
    return Gguf(path, Metadata(parts[0].metadata, parts[0].path, tensors), tensors)


# --- Split sets --------------------------------------------------------------------------------------------


def _part_paths(path: Path, count: int) -> list[Path]:
    """The files of the set that `path` is one of, in order."""
    name = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if name is None or int(name[2]) != count:
        raise BadInput(f"{path}: a part of {count}, expected a name that ends in -00001-of-{count:05}.gguf")
    paths = []
    for number in range(1, count + 1):
        paths.append(path.with_name(f"{name[1]}-{number:05}-of-{name[2]}.gguf"))
        if not paths[-1].exists():
            raise BadInput(
                f"{path}: part {number} of {count} is missing, expected {paths[-1].name} beside it"
            )
    return paths


def _join(parts: list[Gguf]) -> dict[str, Tensor]:
    """The tensors of all parts, once the parts agree that they are one set."""
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        _expect(part, Keys.Split.LLM_KV_SPLIT_NO, number)
        _expect(part, Keys.Split.LLM_KV_SPLIT_COUNT, len(parts))
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise BadInput(f"{part.path}: tensor {_quote(name)} is in an earlier part of the set too")
            tensors[name] = tensor
    _expect(parts[0], Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, len(tensors))
    return tensors


def _expect(part: Gguf, key: str, expected: int) -> None:
    if (value := part.metadata.integer(key)) != expected:
        raise BadInput(f"{part.path}: {key} is {value}, expected {expected} by the rest of the set")


# --- One file ----------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Gguf:
    cursor = _Cursor(path, _map(path))
    _check_version(cursor)
    tensor_count = cursor.count("tensors", smallest=8 + 4 + 8 + 4 + 8)  # name, dims, one dim, type, offset
    value_count = cursor.count("metadata values", smallest=8 + 4 + 1)  # key, type, one byte
    tensors: dict[str, Tensor] = {}
    metadata = Metadata(_read_metadata(cursor, value_count), path, tensors)
    infos = [_read_tensor_info(cursor, index) for index in range(tensor_count)]
    alignment = _alignment(metadata, path)
    start = cursor.at + -cursor.at % alignment
    for info in infos:
        if info.name in tensors:
            raise cursor.bad(f"tensor {_quote(info.name)} occurs twice")
        tensors[info.name] = _place(cursor, info, start, alignment)
    _check_overlap(cursor, tensors)
    return Gguf(path, metadata, tensors)


def _map(path: Path) -> mmap.mmap:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise BadInput(f"{path}: not a regular file, expected a GGUF file")
        if status.st_size == 0:
            raise BadInput(f"{path}: the file is empty, expected a GGUF file")
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except BadInput:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that no system call takes
        raise BadInput(f"{path}: {getattr(error, 'strerror', error)}") from error
    huge_pages.advise(memory)
    return memory


def _check_version(cursor: _Cursor) -> None:
    magic = GGUF_MAGIC.to_bytes(4, "little")
    if cursor.memory[:4] != magic:
        raise cursor.bad(f"not a GGUF file: begins with {cursor.memory[:4]!r}, expected {magic!r}")
    cursor.step_over(4, "the magic")
    version = cursor.number(_U32, "the version")
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, *_VERSIONS):
        raise cursor.bad("a big-endian GGUF file, expected little-endian")
    if version not in _VERSIONS:
        raise cursor.bad(f"GGUF version {version}, expected 2 or 3")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"the key of metadata value {index}")
        if key in values:
            raise cursor.bad(f"metadata key {_quote(key)} occurs twice")
        values[key] = _read_value(cursor, f"metadata key {_quote(key)}")
    return values


def _read_value(cursor: _Cursor, what: str) -> Any:
    kind = cursor.number(_U32, what)
    if kind == GGUFValueType.STRING:
        return cursor.string(what)
    if kind != GGUFValueType.ARRAY:
        return cursor.number(_number_code(cursor, kind, what), what)
    kind = cursor.number(_U32, what)
    if kind == GGUFValueType.STRING:
        return cursor.strings(what)
    return cursor.array(_number_code(cursor, kind, what), what)


def _number_code(cursor: _Cursor, kind: int, what: str) -> str:
    if kind == GGUFValueType.ARRAY:
        raise cursor.bad(f"{what} is an array of arrays, expected an array of numbers or strings")
    if kind not in _NUMBERS:
        raise cursor.bad(f"{what} has value type {kind}, expected 0 to {max(GGUFValueType)}")
    return _NUMBERS[GGUFValueType(kind)]


def _alignment(metadata: Metadata, path: Path) -> int:
    alignment = metadata.integer(Keys.General.ALIGNMENT, default=GGUF_DEFAULT_ALIGNMENT)
    if alignment <= 0 or alignment & (alignment - 1):
        raise BadInput(f"{path}: {Keys.General.ALIGNMENT} is {alignment}, expected a power of two")
    return alignment


class _TensorInfo(NamedTuple):
    """What the file says of a tensor; `offset` counts from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def _read_tensor_info(cursor: _Cursor, index: int) -> _TensorInfo:
    name = cursor.string(f"the name of tensor {index}")
    what = f"tensor {_quote(name)}"
    dims = cursor.number(_U32, what)
    if not 1 <= dims <= _MAX_DIMS:
        raise cursor.bad(f"{what} has {dims} dimensions, expected 1 to {_MAX_DIMS}")
    ne = [cursor.number(_U64, what) for _ in range(dims)]
    return _TensorInfo(name, tuple(reversed(ne)), cursor.number(_U32, what), cursor.number(_U64, what))


def _place(cursor: _Cursor, info: _TensorInfo, start: int, alignment: int) -> Tensor:
    """The tensor as a view of the data section, which begins at byte `start`."""
    what = f"tensor {_quote(info.name)}"
    if reason := _unusable(info.type_id):
        raise cursor.bad(f"{what}: {reason}")
    qtype = _TYPES[info.type_id]
    elements, size = block_size(qtype)
    *rows, row = info.shape
    if 0 in info.shape or row % elements:
        raise cursor.bad(f"{what} is {info.shape}, expected rows of whole {qtype} blocks of {elements}")
    if info.offset % alignment:
        raise cursor.bad(f"{what} begins at offset {info.offset}, expected a multiple of {alignment}")
    row_bytes = row // elements * size
    offset, nbytes = start + info.offset, math.prod(rows) * row_bytes
    if offset + nbytes > cursor.size:
        raise cursor.too_short(what, offset + nbytes)
    data = np.frombuffer(cursor.memory, np.uint8, nbytes, offset).reshape(*rows, row_bytes)
    return Tensor(info.name, qtype, info.shape, data, offset, cursor.memory)


def _unusable(type_id: int) -> str | None:
    """Why a tensor of this type cannot be read; None if it can."""
    if type_id in _IK_TYPES:
        return f"{_IK_TYPES[type_id]} is a type of ik_llama.cpp's own, expected one of llama.cpp's"
    if type_id in _RETIRED_TYPES:
        return f"{_RETIRED_TYPES[type_id]} is a type that llama.cpp has retired"
    if type_id in _ACTIVATION_TYPES:
        return f"{_ACTIVATION_TYPES[type_id]} is a type for activations, expected one for weights"
    if type_id >= _FIRST_IK_TYPE:
        return f"type id {type_id} is not llama.cpp's, perhaps ik_llama.cpp's own"
    if type_id not in _TYPES:
        return f"type id {type_id} is unknown, expected one of llama.cpp's up to {max(_TYPES)}"
    return None


def _check_overlap(cursor: _Cursor, tensors: Mapping[str, Tensor]) -> None:
    in_file_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for first, second in itertools.pairwise(in_file_order):
        if first.offset + first.data.nbytes > second.offset:
            raise cursor.bad(f"tensors {_quote(first.name)} and {_quote(second.name)} overlap")


class _Cursor:
    """Reads a memory-mapped file front to back, never past its end nor past the size of a sane header.

    `what` in every method says what is being read, for the error.
    """

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path = path
        self.memory = memory
        self.size = len(memory)
        self.end = min(self.size, _MAX_HEADER)
        self.at = 0

    def bad(self, problem: str) -> BadInput:
        return BadInput(f"{self.path}: {problem}")

    def too_short(self, what: str, end: int) -> BadInput:
        """For something that would end at byte `end`."""
        if end > self.size:
            return self.bad(f"truncated: {what} ends at byte {end}, the file at byte {self.size}")
        return self.bad(f"{what} ends at byte {end}, expected no more than {self.end} bytes of header")

    def step_over(self, nbytes: int, what: str) -> int:
        """Where the next `nbytes` begin."""
        start = self.at
        if start + nbytes > self.end:
            raise self.too_short(what, start + nbytes)
        self.at = start + nbytes
        return start

    def number(self, code: str, what: str) -> Any:
        start = self.step_over(struct.calcsize(code), what)
        return struct.unpack_from(code, self.memory, start)[0]

    def count(self, what: str, smallest: int) -> int:
        """How many things follow, each of at least `smallest` bytes: no more than there is room for."""
        count = self.number(_U64, f"the number of {what}")
        room = (self.end - self.at) // smallest
        if count > room:
            raise self.bad(f"claims {count} {what}, expected at most the {room} that there is room for")
        return count

    def string(self, what: str) -> str:
        length = self.number(_U64, what)
        start = self.step_over(length, what)
        try:
            return str(self.memory[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8 ({error.reason})") from error

    def strings(self, what: str) -> list[str]:
        # A vocabulary and its merges are half a million strings at every start: `string`, without the calls.
        count = self.count(f"strings in {what}", smallest=8)
        length_at = struct.Struct(_U64).unpack_from
        memory, end, at = self.memory, self.end, self.at
        found = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(memory, at)[0]
                if at > end:
                    raise self.too_short(f"string {len(found)} of {what}", at)
                found.append(str(memory[start:at], "utf-8"))
        except struct.error as error:
            raise self.too_short(f"string {len(found)} of {what}", start) from error
        except UnicodeDecodeError as error:
            raise self.bad(f"string {len(found)} of {what} is not UTF-8 ({error.reason})") from error
        self.at = at
        return found

    def array(self, code: str, what: str) -> np.ndarray:
        dtype = np.dtype(code)
        count = self.count(f"numbers in {what}", smallest=dtype.itemsize)
        return np.frombuffer(self.memory, dtype, count, self.step_over(count * dtype.itemsize, what))


def _quote(name: str) -> str:
    """A name out of the file for a one-line message: escaped, and not too long."""
    quoted = repr(name[:80])
    return quoted if len(quoted) <= 80 else f"{quoted[:76]}...'"


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    if isinstance(value, np.ndarray):
        return f"an array of {value.size} {value.dtype} numbers"
    return _quote(value) if isinstance(value, str) else repr(value)
