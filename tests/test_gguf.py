"""The GGUF reader against two others, gguf-py's and llama.cpp's, on well-formed files."""

from __future__ import annotations

import ctypes
import math
import os
import re
import struct
import sys
from pathlib import Path

import gguf as gguf_py
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import xllamacpp
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf_files import NUMBER_CODES, RawTensor, array, pack, text, u32, value
from hypothesis import given, settings
from hypothesis import strategies as st

from scarlet_jax import gguf
from scarlet_jax.errors import BadInput
from scarlet_jax.ops.qtensor import block_size

# Every type that a file may hold: llama.cpp's ids, and the two that are for activations only left out.
TYPE_IDS = {kind.name: kind.value for kind in GGMLQuantizationType} | {"Q1_0": 41, "Q2_0": 42}
del TYPE_IDS["Q8_1"], TYPE_IDS["Q8_K"]


def write(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.unlink(missing_ok=True)  # a new inode: an earlier reading may still be mapped
    path.write_bytes(content)
    return path


def random_tensor(name: str, qtype: str, shape: tuple[int, ...], offset: int, seed: int) -> RawTensor:
    elements, size = block_size(qtype)
    nbytes = math.prod(shape) // elements * size
    data = np.random.default_rng(seed).bytes(nbytes)
    return RawTensor(name, list(reversed(shape)), TYPE_IDS[qtype], offset, data)


def one_of_each_type(alignment: int) -> list[RawTensor]:
    """A tensor of each type, of one to four dimensions, all of distinct sizes."""
    tensors, offset = [], 0
    for index, qtype in enumerate(TYPE_IDS):
        row = block_size(qtype)[0] * (1 + index % 3)
        shape = (*(2, 3, 5)[: index % 4], row)
        tensors.append(random_tensor(f"{qtype}.weight", qtype, shape, offset, seed=index))
        offset += len(tensors[-1].data) + -len(tensors[-1].data) % alignment
    return tensors


# --- Against gguf-py ---------------------------------------------------------------------------------------


def numbers(code: str) -> st.SearchStrategy:
    if code == "?":
        return st.booleans()
    if code in "fd":
        return st.floats(width=32 if code == "f" else 64)
    return st.integers(np.iinfo(code).min, np.iinfo(code).max)


NUMBERS = {kind: numbers(code) for kind, code in NUMBER_CODES.items()}
KINDS = st.sampled_from([*NUMBERS, GGUFValueType.STRING])


def contents(kind: GGUFValueType) -> st.SearchStrategy:
    return st.text(max_size=12) if kind == GGUFValueType.STRING else NUMBERS[kind]


SCALARS = KINDS.flatmap(lambda kind: contents(kind).map(lambda content: value(kind, content)))
ARRAYS = KINDS.flatmap(lambda kind: st.lists(contents(kind), max_size=5).map(lambda many: array(kind, many)))
# gguf-py keeps the header's own fields under "GGUF."; an alignment must fit the data, so it is not random.
KEYS = st.text(max_size=20).filter(lambda key: not key.startswith(("GGUF.", "general.alignment")))
READ_BY_GGUF_PY = sorted(set(TYPE_IDS) - {"Q2_0"})


@st.composite
def good_files(draw) -> bytes:
    values = draw(st.dictionaries(KEYS, SCALARS | ARRAYS, max_size=6))
    alignment = draw(st.sampled_from([None, 8, 32, 64, 4096]))
    entries = list(values.items())
    if alignment:
        entries.insert(draw(st.integers(0, len(entries))), ("general.alignment", u32(alignment)))
    alignment = alignment or 32
    tensors, offset = [], 0
    for name in draw(st.lists(st.text(max_size=10), unique=True, max_size=4)):
        qtype = draw(st.sampled_from(READ_BY_GGUF_PY))
        shape = (
            *draw(st.lists(st.integers(1, 3), max_size=3)),
            block_size(qtype)[0] * draw(st.integers(1, 2)),
        )
        offset += alignment * draw(st.integers(0, 2))  # gaps are allowed
        tensors.append(random_tensor(name, qtype, shape, offset, seed=len(tensors)))
        offset += len(tensors[-1].data) + -len(tensors[-1].data) % alignment
    in_any_order = draw(st.permutations(tensors))
    return pack(entries, in_any_order, version=draw(st.sampled_from([2, 3])), alignment=alignment)


def plain(found):
    """A value of either reader as python data, floats by their bits so that a NaN equals itself."""
    found = found.tolist() if isinstance(found, np.ndarray) else found
    if isinstance(found, list):
        return [plain(element) for element in found]
    return struct.pack("<d", found) if isinstance(found, float) else found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=good_files())
def test_equals_gguf_py(tmp_path_factory, content):
    path = write(tmp_path_factory.getbasetemp(), content)
    ours, theirs = gguf.read(path), gguf_py.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        # gguf-py gives an empty array no element type, and so no contents
        assert plain(ours.metadata[key]) == plain(field.contents() if field.data else []), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.qtype == tensor.tensor_type.name
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.offset == tensor.data_offset
        assert mine.data.tobytes() == tensor.data.tobytes()


# --- Against llama.cpp -------------------------------------------------------------------------------------


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    for name, result, *arguments in [
        ("gguf_free", None),
        ("gguf_get_n_tensors", ctypes.c_int64),
        ("gguf_get_n_kv", ctypes.c_int64),
        ("gguf_get_data_offset", ctypes.c_size_t),
        ("gguf_get_key", ctypes.c_char_p, ctypes.c_int64),
        ("gguf_get_tensor_name", ctypes.c_char_p, ctypes.c_int64),
        ("gguf_get_tensor_type", ctypes.c_int, ctypes.c_int64),
        ("gguf_get_tensor_offset", ctypes.c_size_t, ctypes.c_int64),
        ("gguf_get_tensor_size", ctypes.c_size_t, ctypes.c_int64),
        ("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), ctypes.c_int64),
    ]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, [ctypes.c_void_p, *arguments]
    library.ggml_type_name.restype, library.ggml_type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    return library


@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_equals_llama_cpp_for_every_type(tmp_path, ggml, alignment):
    """Names, shapes, offsets and sizes; the one reader beside ours that knows Q1_0 and Q2_0."""
    values = [("general.architecture", text("qwen35")), ("general.alignment", u32(alignment))]
    path = write(tmp_path, pack(values, one_of_each_type(alignment), alignment=alignment))
    ours = gguf.read(path)
    theirs = ggml.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    assert theirs
    try:
        names = [ggml.gguf_get_key(theirs, key).decode() for key in range(ggml.gguf_get_n_kv(theirs))]
        assert names == list(ours.metadata)
        assert ggml.gguf_get_n_tensors(theirs) == len(ours.tensors) == len(TYPE_IDS)
        for index, tensor in enumerate(ours.tensors.values()):
            assert ggml.gguf_get_tensor_name(theirs, index).decode() == tensor.name
            type_name = ggml.ggml_type_name(ggml.gguf_get_tensor_type(theirs, index)).decode()
            assert type_name.upper() == tensor.qtype
            ne = [1] * (4 - len(tensor.shape)) + list(tensor.shape)
            assert ggml.gguf_get_tensor_ne(theirs, index)[:4] == ne[::-1]
            start = ggml.gguf_get_data_offset(theirs) + ggml.gguf_get_tensor_offset(theirs, index)
            assert (start, ggml.gguf_get_tensor_size(theirs, index)) == (tensor.offset, tensor.data.nbytes)
    finally:
        ggml.gguf_free(theirs)


# --- Tensors -----------------------------------------------------------------------------------------------


def test_data_is_rows_of_packed_bytes(tmp_path):
    raw = one_of_each_type(32)
    tensors = gguf.read(write(tmp_path, pack([], raw))).tensors
    for expected in raw:
        tensor = tensors[str(expected.name)]
        elements, size = block_size(tensor.qtype)
        assert tensor.shape == tuple(reversed(expected.ne))
        assert tensor.data.dtype == np.uint8
        assert tensor.data.shape == (*tensor.shape[:-1], tensor.shape[-1] // elements * size)
        assert tensor.data.tobytes() == expected.data


@pytest.mark.parametrize(
    ("qtype", "dtype"),
    [
        ("F32", np.float32),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("F64", np.float64),
        ("I8", np.int8),
        ("I16", np.int16),
        ("I32", np.int32),
        ("I64", np.int64),
    ],
)
def test_plain_types_have_native_arrays(tmp_path, qtype, dtype):
    expected = np.arange(-7, 8).reshape(3, 5).astype(dtype)
    raw = RawTensor("t", [5, 3], TYPE_IDS[qtype], 0, expected.tobytes())
    tensor = gguf.read(write(tmp_path, pack([], [raw]))).tensors["t"]
    assert tensor.is_plain
    assert tensor.array().dtype == dtype
    np.testing.assert_array_equal(tensor.array(), expected)
    assert np.shares_memory(tensor.array(), tensor.data)


def test_quantised_types_are_not_plain(tmp_path):
    tensors = gguf.read(write(tmp_path, pack([], one_of_each_type(32)))).tensors
    plain_types = {tensor.qtype for tensor in tensors.values() if tensor.is_plain}
    assert plain_types == {qtype for qtype in TYPE_IDS if block_size(qtype)[0] == 1}


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    """Read-only, and where the file's alignment is 64 JAX's CPU arrays are those very bytes."""
    values = [("general.alignment", u32(64))]
    tensors = gguf.read(write(tmp_path, pack(values, one_of_each_type(64), alignment=64))).tensors
    assert len({id(tensor.memory) for tensor in tensors.values()}) == 1
    for tensor in tensors.values():
        assert not tensor.data.flags.writeable
        assert np.shares_memory(tensor.data, np.frombuffer(tensor.memory, np.uint8))
        on_device = jax.device_put(tensor.data, jax.devices("cpu")[0])
        assert on_device.unsafe_buffer_pointer() == tensor.data.ctypes.data
        assert on_device.dtype == jnp.uint8


def resident_bytes(path: Path) -> int:
    """How much of a mapped file this process holds in memory, by the kernel's count."""
    mappings = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE
    )
    mine = "".join(entry for entry in mappings if entry.partition("\n")[0].endswith(str(path)))
    return sum(int(kib) * 1024 for kib in re.findall(r"^Rss:\s+(\d+) kB", mine, flags=re.MULTILINE))


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages through /proc")
def test_reading_touches_no_tensor_data_and_release_gives_pages_back(tmp_path):
    rows, row = 2048, 4096  # 32 MiB
    big = RawTensor("big", [row, rows], offset=64)
    small = RawTensor("small", [3], offset=0, data=bytes(12))
    content = pack([], [small, big])
    path = write(tmp_path, content)
    os.truncate(path, len(content) + 64 + rows * row * 4)
    tensor = gguf.read(path).tensors["big"]
    # One look at either end of the file may bring in a huge page, 2 MiB on most machines.
    around = 2 * 2 * 2**20
    assert resident_bytes(path) <= around
    assert tensor.array().sum() == 0
    assert resident_bytes(path) >= tensor.data.nbytes
    tensor.release()
    assert resident_bytes(path) <= around
    assert tensor.array().sum() == 0  # still there for whoever looks


def test_a_file_larger_than_memory_is_read(tmp_path):
    """Sparse: 1 TiB of holes takes no disk, and must take no memory either."""
    content = pack([], [RawTensor("huge", [1 << 20, 1 << 18])])
    path = write(tmp_path, content)
    os.truncate(path, len(content) + (1 << 40))
    tensor = gguf.read(path).tensors["huge"]
    assert tensor.array()[-1, -1] == 0


# --- Metadata ----------------------------------------------------------------------------------------------

VALUES = [
    ("int", value(GGUFValueType.INT16, -3)),
    ("float", value(GGUFValueType.FLOAT32, 0.5)),
    ("nan", value(GGUFValueType.FLOAT64, math.nan)),
    ("flag", value(GGUFValueType.BOOL, True)),
    ("text", text("ab\nc")),
    ("texts", array(GGUFValueType.STRING, ["x", "", "é"])),
    ("ints", array(GGUFValueType.UINT32, [7, 8, 9])),
    ("flags", array(GGUFValueType.BOOL, [True, False])),
    ("floats", array(GGUFValueType.FLOAT32, [1.5, 2.5])),
]


@pytest.fixture
def metadata(tmp_path) -> gguf.Metadata:
    return gguf.read(write(tmp_path, pack(VALUES, []))).metadata


def test_metadata_is_a_mapping_in_file_order(metadata):
    assert list(metadata) == [key for key, _ in VALUES]
    assert len(metadata) == len(VALUES)
    assert metadata["flag"] is True
    assert metadata["texts"] == ["x", "", "é"]
    assert metadata["ints"].dtype == np.uint32
    assert "absent" not in metadata


def test_typed_look_ups(metadata):
    assert metadata.integer("int") == -3
    assert metadata.number("float") == 0.5
    assert isinstance(metadata.number("int"), float)
    assert metadata.string("text") == "ab\nc"
    assert metadata.strings("texts") == ["x", "", "é"]
    assert metadata.integers("ints", 3) == (7, 8, 9)
    assert metadata.integers("int", 3) == (-3, -3, -3)
    assert metadata.integers("flags", 2) == (1, 0)


def test_defaults_stand_in_only_for_absent_keys(metadata):
    assert metadata.integer("absent", 0) == 0
    assert metadata.number("absent", 1e-6) == 1e-6
    assert metadata.string("absent", "") == ""
    assert metadata.strings("absent", []) == []
    assert metadata.integers("absent", 2, 0) == (0, 0)
    with pytest.raises(BadInput, match="'text'"):
        metadata.integer("text", 0)


@pytest.mark.parametrize(
    ("look_up", "words"),
    [
        (lambda m: m.integer("absent"), ["'absent'", "missing", "an integer"]),
        (lambda m: m.integer("float"), ["'float'", "0.5", "an integer"]),
        (lambda m: m.integer("flag"), ["'flag'", "True", "an integer"]),
        (lambda m: m.integer("ints"), ["'ints'", "an array of 3 uint32", "an integer"]),
        (lambda m: m.number("absent"), ["'absent'", "missing", "a number"]),
        (lambda m: m.number("nan"), ["'nan'", "finite"]),
        (lambda m: m.number("text"), ["'text'", r"'ab\nc'", "number"]),
        (lambda m: m.string("int"), ["'int'", "-3", "a string"]),
        (lambda m: m.string("texts"), ["'texts'", "an array of 3 strings", "a string"]),
        (lambda m: m.strings("ints"), ["'ints'", "an array of strings"]),
        (lambda m: m.integers("absent", 3), ["'absent'", "missing", "3 integers"]),
        (lambda m: m.integers("ints", 4), ["'ints'", "array of 3", "array of 4 integers"]),
        (lambda m: m.integers("floats", 2), ["'floats'", "float32", "2 integers"]),
        (lambda m: m.integers("texts", 3), ["'texts'", "3 strings", "3 integers"]),
    ],
)
def test_look_ups_say_what_is_wrong(metadata, tmp_path, look_up, words):
    with pytest.raises(BadInput) as caught:
        look_up(metadata)
    message = str(caught.value)
    assert str(tmp_path / "model.gguf") in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_stored_bool_is_true_for_any_byte_but_zero(tmp_path):
    raw = array(GGUFValueType.UINT8, [0, 1, 2, 255])
    as_bools = raw[:4] + struct.pack("<I", GGUFValueType.BOOL) + raw[8:]
    metadata = gguf.read(write(tmp_path, pack([("flags", as_bools)], []))).metadata
    assert metadata.integers("flags", 4) == (0, 1, 1, 1)


def test_architecture(tmp_path):
    assert (
        gguf.read(write(tmp_path, pack([("general.architecture", text("qwen35"))], []))).architecture
        == "qwen35"
    )
    with pytest.raises(BadInput, match=r"general\.architecture"):
        _ = gguf.read(write(tmp_path, pack([], []))).architecture


# --- Split sets --------------------------------------------------------------------------------------------


@pytest.fixture
def split_set(tmp_path) -> list[Path]:
    """Five tensors in three files, by gguf-py's own writer."""
    writer = gguf_py.GGUFWriter(tmp_path / "split.gguf", "qwen35", split_max_tensors=2)
    for index in range(5):
        writer.add_tensor(f"blk.{index}.w", np.full((index + 2, 32), index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("split-*.gguf"))


def test_any_part_opens_the_whole_set(split_set):
    assert [path.name for path in split_set] == [f"split-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for path in split_set:
        model = gguf.read(path)
        assert model.path == path
        assert model.architecture == "qwen35"  # said by the first part only
        assert list(model.tensors) == [f"blk.{index}.w" for index in range(5)]
        for index, tensor in enumerate(model.tensors.values()):
            assert tensor.shape == (index + 2, 32)
            assert (tensor.array() == index).all()


def test_parts_may_have_their_own_alignment(split_set):
    """Each file is laid out by its own general.alignment."""
    split_keys = [
        ("split.no", value(GGUFValueType.UINT16, 2)),
        ("split.count", value(GGUFValueType.UINT16, 3)),
        ("general.alignment", u32(256)),
    ]
    last = np.full((6, 32), 4, np.float32)
    tensor = RawTensor("blk.4.w", [32, 6], data=last.tobytes())
    split_set[2].write_bytes(pack(split_keys, [tensor], alignment=256))
    np.testing.assert_array_equal(gguf.read(split_set[0]).tensors["blk.4.w"].array(), last)


@pytest.mark.parametrize("count", [0, 1])
def test_a_merged_or_single_part_set_is_one_file(tmp_path, count):
    """llama.cpp's merge leaves split.count 0 behind; the name does not matter then."""
    values = [("split.count", value(GGUFValueType.UINT16, count)), ("split.tensors.count", u32(7))]
    path = write(tmp_path, pack(values, [RawTensor("t", [1], data=bytes(4))]))
    assert list(gguf.read(path).tensors) == ["t"]
