"""Whatever is wrong with a GGUF file, the reader says so in one line, at once and in little memory."""

from __future__ import annotations

import math
import os
import re
import struct
import tracemalloc
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from gguf_files import NUMBER_CODES, RawTensor, array, pack, string, text, u32, value
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scarlet_jax import gguf
from scarlet_jax.errors import BadInput

HUGE = 2**60
STRING, UINT32 = GGUFValueType.STRING, GGUFValueType.UINT32

VALUES = [
    ("general.architecture", text("qwen35")),
    ("general.alignment", u32(16)),
    *((f"one.{kind.name}", value(kind, 1)) for kind in NUMBER_CODES),
    *((f"many.{kind.name}", array(kind, [0, 1])) for kind in NUMBER_CODES),
    ("words", array(STRING, ["a", "bc", ""])),
    ("nothing", array(STRING, [])),
]
TENSORS = [
    RawTensor("blk.0.a", [3, 2], offset=0, data=bytes(24)),
    RawTensor("blk.0.b", [32, 2, 1, 1], type_id=2, offset=32, data=bytes(36)),
    RawTensor("blk.0.c", [5], type_id=1, offset=80, data=bytes(10)),
]
GOOD = pack(VALUES, TENSORS, alignment=16)

# A reading holds what it has read as python objects: a one-byte string costs 9 bytes in the file and 50 in
# memory, a tensor 32 and some 600. 64 times the file is ample, 256 KiB covers what does not grow with it.
BYTES_PER_BYTE, BYTES_AT_LEAST = 64, 2**18


def write(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.unlink(missing_ok=True)  # a new inode: an earlier reading may still be mapped
    path.write_bytes(content)
    return path


def read_in_little_memory(path: Path, size: int) -> gguf.Gguf:
    tracemalloc.start()
    try:
        return gguf.read(path)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= BYTES_PER_BYTE * size + BYTES_AT_LEAST


def refusal(path: Path, size: int = 0) -> str:
    """What the reader says about a bad file, without the file's name in front."""
    with pytest.raises(BadInput) as caught:
        read_in_little_memory(path, size)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_the_good_file_is_good(tmp_path):
    """Or the tests below would see refusals for another reason than theirs."""
    model = gguf.read(write(tmp_path, GOOD))
    assert len(model.metadata) == len(VALUES)
    assert list(model.tensors) == [tensor.name for tensor in TENSORS]


def test_truncated_anywhere(tmp_path):
    for size in range(1, len(GOOD)):
        message = refusal(write(tmp_path, GOOD[:size]), size)
        assert re.match(r"truncated: |claims \d+ |not a GGUF file: ", message), (size, message)


# --- The header --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (pack([], [], magic=b"GGML"), r"not a GGUF file: begins with b'GGML', expected b'GGUF'"),
        (b"PK\x03\x04 and so on", r"not a GGUF file: begins with b'PK\\x03\\x04'"),
        (b"GG", r"not a GGUF file: begins with b'GG'"),
        (pack([], [], version=0), r"GGUF version 0, expected 2 or 3"),
        (b"GGUF" + struct.pack("<III", 1, 0, 0), r"GGUF version 1, expected 2 or 3"),
        (pack([], [], version=4), r"GGUF version 4, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"a big-endian GGUF file, expected little-endian"),
        (pack([], [], tensor_count=HUGE), rf"claims {HUGE} tensors, expected at most the 0"),
        (pack([], [], value_count=HUGE), rf"claims {HUGE} metadata values, expected at most the 0"),
        (pack([], [], tensor_count=2**64 - 1), rf"claims {2**64 - 1} tensors"),
        (pack(VALUES, TENSORS, value_count=len(VALUES) + 1), r""),
        (pack(VALUES, TENSORS, tensor_count=len(TENSORS) + 1), r""),
    ],
)
def test_header(tmp_path, content, expected):
    assert re.match(expected, refusal(write(tmp_path, content), len(content)))


def test_big_endian_by_gguf_py(tmp_path):
    writer = gguf_py.GGUFWriter(tmp_path / "big.gguf", "qwen35", endianess=gguf_py.GGUFEndian.BIG)
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "big-endian" in refusal(tmp_path / "big.gguf")


# --- Metadata ----------------------------------------------------------------------------------------------


def long_string(length: int) -> bytes:
    return struct.pack("<Q", length) + b"abc"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([("k", text("a")), ("k", u32(1))], r"metadata key 'k' occurs twice"),
        ([(b"\xff\xfe", u32(1))], r"the key of metadata value 0 is not UTF-8"),
        ([("k", text(b"\xc3("))], r"metadata key 'k' is not UTF-8"),
        ([("k", array(STRING, ["ok", b"\x80"]))], r"string 1 of metadata key 'k' is not UTF-8"),
        ([("k", struct.pack("<I", 13) + bytes(8))], r"metadata key 'k' has value type 13, expected 0 to 12"),
        ([("k", struct.pack("<IIQ", 9, 99, 1))], r"metadata key 'k' has value type 99, expected 0 to 12"),
        (
            [("k", struct.pack("<IIQ", 9, 9, 1) + array(UINT32, [1]))],
            r"metadata key 'k' is an array of arrays",
        ),
        ([("k", struct.pack("<IIQ", 9, 9, HUGE))], r"metadata key 'k' is an array of arrays"),
        ([("k", struct.pack("<II", 9, 9) * 10_000)], r"metadata key 'k' is an array of arrays"),
        ([("k", array(UINT32, [1, 2], count=HUGE))], rf"claims {HUGE} numbers in metadata key 'k'"),
        ([("k", array(GGUFValueType.BOOL, [], count=2**64 - 1))], rf"claims {2**64 - 1} numbers"),
        ([("k", array(STRING, ["a"], count=HUGE))], rf"claims {HUGE} strings in metadata key 'k'"),
        (
            [("k", array(STRING, ["a" * 40] * 9, count=50))],
            r"truncated: string \d+ of metadata key 'k' ends at byte",
        ),
        ([("k", struct.pack("<I", STRING) + long_string(HUGE))], r"truncated: metadata key 'k' ends at byte"),
        ([("k", struct.pack("<I", STRING) + long_string(2**64 - 1))], r"truncated: metadata key 'k' ends at"),
        (
            [("k", struct.pack("<IIQ", 9, STRING, 1) + long_string(HUGE))],
            r"truncated: string 0 of metadata key 'k' ends at byte",
        ),
        ([("a\nb\x1b[2J" * 500, text(b"\x80"))], r"metadata key 'a\\nb\\x1b\[2J"),
        ([("\0" * 80, text(b"\x80"))], r"metadata key '(\\x00){18}\\x0\.\.\.' is not UTF-8"),
    ],
)
def test_metadata(tmp_path, entries, expected):
    content = pack(entries, [])
    message = refusal(write(tmp_path, content), len(content))
    assert re.match(expected, message)
    assert len(message) < 300


def test_a_key_longer_than_the_file(tmp_path):
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + long_string(HUGE) + bytes(20)
    message = refusal(write(tmp_path, content), len(content))
    assert message == f"truncated: the key of metadata value 0 ends at byte {HUGE + 32}, the file at byte 55"


@pytest.mark.parametrize("alignment", [0, 3, 48, 2**31 + 1])
def test_alignment_is_a_power_of_two(tmp_path, alignment):
    content = pack([("general.alignment", u32(alignment))], [])
    assert refusal(write(tmp_path, content)) == f"general.alignment is {alignment}, expected a power of two"


def test_alignment_is_an_integer(tmp_path):
    content = pack([("general.alignment", text("32"))], [])
    assert "metadata key 'general.alignment' is '32', expected an integer" in refusal(
        write(tmp_path, content)
    )


# --- Tensors -----------------------------------------------------------------------------------------------


def f32(name: str, ne: list[int], offset: int = 0, **lies) -> RawTensor:
    return RawTensor(name, ne, offset=offset, data=bytes(4 * math.prod(ne)), **lies)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([f32("t", [4]), f32("t", [4], offset=32)], r"tensor 't' occurs twice"),
        ([RawTensor(b"\xff", [4], data=bytes(16))], r"the name of tensor 0 is not UTF-8"),
        ([RawTensor("t", [])], r"tensor 't' has 0 dimensions, expected 1 to 4"),
        ([f32("t", [1, 1, 1, 1, 1])], r"tensor 't' has 5 dimensions, expected 1 to 4"),
        ([f32("t", [4], dims=2**32 - 1)], r"tensor 't' has 4294967295 dimensions, expected 1 to 4"),
        ([f32("t", [0])], r"tensor 't' is \(0,\), expected rows of whole F32 blocks of 1"),
        ([f32("t", [4, 0])], r"tensor 't' is \(0, 4\), expected"),
        (
            [RawTensor("t", [33, 2], type_id=2, data=bytes(64))],
            r"tensor 't' is \(2, 33\), .* Q4_0 blocks of 32",
        ),
        (
            [RawTensor("t", [128], type_id=12, data=bytes(144))],
            r"tensor 't' is \(128,\), .* Q4_K blocks of 256",
        ),
        (
            [RawTensor("t", [4], data=bytes(15))],
            r"truncated: tensor 't' ends at byte \d+, the file at byte \d+",
        ),
        ([RawTensor("t", [4], offset=32, data=b"")], r"truncated: tensor 't' ends at byte"),
        ([RawTensor("t", [4], offset=2**63)], r"truncated: tensor 't' ends at byte"),
        ([RawTensor("t", [4], offset=2**64 - 32)], r"truncated: tensor 't' ends at byte"),
        # products that come out as 0, or as what there is, in 64 bits
        ([RawTensor("t", [2**32, 2**32], data=bytes(64))], r"truncated: tensor 't' ends at byte 7378697629"),
        ([RawTensor("t", [2**16] * 4, data=bytes(64))], r"truncated: tensor 't' ends at byte 7378697629"),
        (
            [RawTensor("t", [4, 2**32, 2**32], data=bytes(64))],
            r"truncated: tensor 't' ends at byte 295147905",
        ),
        ([RawTensor("t", [2**62 + 1], data=bytes(64))], r"truncated: tensor 't' ends at byte 184467440"),
        ([RawTensor("t", [2**64 - 1], data=bytes(64))], r"truncated: tensor 't' ends at byte"),
        (
            [RawTensor("t", [4], offset=8, data=bytes(16))],
            r"tensor 't' begins at offset 8, expected a multiple of 32",
        ),
        ([f32("a", [32]), f32("b", [8], offset=96)], r"tensors 'a' and 'b' overlap"),
        ([f32("b", [8], offset=96), f32("a", [32])], r"tensors 'a' and 'b' overlap"),
        ([f32("a", [8]), f32("b", [8])], r"tensors 'a' and 'b' overlap"),
        (
            [f32("a", [64]), f32("b", [8], offset=64), f32("c", [8], offset=128)],
            r"tensors 'a' and 'b' overlap",
        ),
    ],
)
def test_tensors(tmp_path, tensors, expected):
    content = pack([], tensors)
    assert re.match(expected, refusal(write(tmp_path, content), len(content)))


@pytest.mark.parametrize(
    ("type_id", "expected"),
    [
        (144, "IQ4_KS is a type of ik_llama.cpp's own, expected one of llama.cpp's"),
        (138, "IQ3_K is a type of ik_llama.cpp's own, expected one of llama.cpp's"),
        (399, "Q8_K_R8 is a type of ik_llama.cpp's own, expected one of llama.cpp's"),
        (97, "type id 97 is not llama.cpp's, perhaps ik_llama.cpp's own"),
        (2**32 - 1, "type id 4294967295 is not llama.cpp's, perhaps ik_llama.cpp's own"),
        (4, "Q4_2 is a type that llama.cpp has retired"),
        (33, "Q4_0_8_8 is a type that llama.cpp has retired"),
        (36, "IQ4_NL_4_4 (in ik_llama.cpp: I2_S) is a type that llama.cpp has retired"),
        (9, "Q8_1 is a type for activations, expected one for weights"),
        (15, "Q8_K is a type for activations, expected one for weights"),
        (43, "type id 43 is unknown, expected one of llama.cpp's up to 42"),
        (96, "type id 96 is unknown, expected one of llama.cpp's up to 42"),
    ],
)
def test_types_that_cannot_be_read(tmp_path, type_id, expected):
    tensor = RawTensor("blk.0.attn_qkv.weight", [256], type_id=type_id, data=bytes(2048))
    assert refusal(write(tmp_path, pack([], [tensor]))) == f"tensor 'blk.0.attn_qkv.weight': {expected}"


def test_every_type_id_below_the_forks_is_accounted_for():
    """Read, retired or for activations: no id between is left without a name."""
    known = set(gguf._TYPES) | set(gguf._RETIRED_TYPES)
    assert known == set(range(max(gguf._TYPES) + 1))
    assert not set(gguf._TYPES) & set(gguf._RETIRED_TYPES)
    assert min(gguf._IK_TYPES) > gguf._FIRST_IK_TYPE > max(gguf._TYPES)


# --- The path ----------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    assert refusal(tmp_path / "absent.gguf") == "No such file or directory"


def test_directory(tmp_path):
    assert refusal(tmp_path) == "not a regular file, expected a GGUF file"


def test_pipe_does_not_wait_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "not a regular file, expected a GGUF file"


def test_empty_file(tmp_path):
    assert refusal(write(tmp_path, b"")) == "the file is empty, expected a GGUF file"


def test_unreadable_file(tmp_path, monkeypatch):
    """By a stand-in for the operating system, whose permissions do not bind root."""
    path = write(tmp_path, GOOD)

    def deny(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", deny)
    assert refusal(path) == "Permission denied"


def test_path_that_no_system_call_takes():
    with pytest.raises(BadInput, match="null byte"):
        gguf.read("a\0b.gguf")


# --- Files of holes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        pack([("k", array(STRING, [], count=2**36))], []),
        pack([("k", array(GGUFValueType.BOOL, [], count=2**39))], []),
        pack([("k", struct.pack("<IQ", STRING, 2**39))], []),
        pack([("k", struct.pack("<IIQQ", 9, STRING, 1, 2**39))], []),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**39),
        b"GGUF" + struct.pack("<IQQ", 3, 2**33, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**33),
    ],
)
def test_a_sparse_file_backs_no_claim(tmp_path, head):
    """1 TiB of zeros takes no disk, so being inside the file is not yet a reason to believe a count."""
    path = write(tmp_path, head)
    os.truncate(path, 1 << 40)
    refusal(path)


# --- Split sets --------------------------------------------------------------------------------------------


def split_keys(number: int, count: int, tensors: int) -> list[tuple[str, bytes]]:
    return [
        ("split.no", value(GGUFValueType.UINT16, number)),
        ("split.count", value(GGUFValueType.UINT16, count)),
        ("split.tensors.count", value(GGUFValueType.INT32, tensors)),
    ]


def write_set(folder: Path, **changes: bytes) -> list[Path]:
    """Three parts of one tensor each; `changes` replaces the content of parts by name, `first=` and so on."""
    paths = []
    for number, ordinal in enumerate(("first", "second", "third")):
        good = pack(split_keys(number, 3, 3), [f32(f"t{number}", [4])])
        name = f"m-0000{number + 1}-of-00003.gguf"
        paths.append(write(folder, changes.get(ordinal, good), name))
    return paths


def test_the_good_set_is_good(tmp_path):
    assert list(gguf.read(write_set(tmp_path)[0]).tensors) == ["t0", "t1", "t2"]


@pytest.mark.parametrize("given_part", [0, 1])
def test_missing_part_is_named(tmp_path, given_part):
    paths = write_set(tmp_path)
    paths[2].unlink()
    expected = "part 3 of 3 is missing, expected m-00003-of-00003.gguf beside it"
    assert refusal(paths[given_part]) == expected


def test_no_more_parts_are_looked_for_than_there_are(tmp_path):
    path = write(tmp_path, pack(split_keys(0, 65535, 3), []), "m-00001-of-65535.gguf")
    assert refusal(path) == "part 2 of 65535 is missing, expected m-00002-of-65535.gguf beside it"


@pytest.mark.parametrize("name", ["model.gguf", "m-00001-of-00004.gguf", "m-1-of-3.gguf"])
def test_part_under_another_name(tmp_path, name):
    path = write_set(tmp_path)[0].rename(tmp_path / name)
    assert refusal(path) == "a part of 3, expected a name that ends in -00001-of-00003.gguf"


def test_absurd_part_count(tmp_path):
    keys = [("split.count", value(GGUFValueType.UINT64, HUGE))]
    path = write(tmp_path, pack(keys, []), "m-00001-of-00003.gguf")
    assert refusal(path).startswith(f"a part of {HUGE}, expected")


@pytest.mark.parametrize(
    ("part", "content", "expected"),
    [
        (1, pack(split_keys(2, 3, 3), [f32("t1", [4])]), r"split\.no is 2, expected 1"),
        (1, pack(split_keys(1, 4, 3), [f32("t1", [4])]), r"split\.count is 4, expected 3"),
        (1, pack([], [f32("t1", [4])]), r"metadata key 'split\.no' is missing"),
        (1, pack(split_keys(1, 3, 3), [f32("t0", [4])]), r"tensor 't0' is in an earlier part of the set too"),
        (1, pack(split_keys(1, 3, 3), [f32("t1", [4])])[:-1], r"truncated: tensor 't1'"),
        (1, b"", r"the file is empty"),
        (0, pack(split_keys(0, 3, 4), [f32("t0", [4])]), r"split\.tensors\.count is 4, expected 3"),
        (
            0,
            pack(split_keys(0, 3, 3)[:2], [f32("t0", [4])]),
            r"metadata key 'split\.tensors\.count' is missing",
        ),
    ],
)
def test_part_that_does_not_belong(tmp_path, part, content, expected):
    paths = write_set(tmp_path, **{("first", "second")[part]: content})
    with pytest.raises(BadInput) as caught:
        gguf.read(paths[0])
    assert re.match(re.escape(f"{paths[part]}: ") + f"({expected})", str(caught.value))


# --- Fuzz --------------------------------------------------------------------------------------------------

INTERESTING = st.sampled_from(
    [0, 1, 2, 9, 2**16, 2**31, 2**32 - 1, HUGE, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
)
POSITIONS = st.integers(0, len(GOOD) - 1)
MUTATIONS = st.one_of(
    st.tuples(st.just("flip"), POSITIONS, st.integers(1, 255)),
    st.tuples(st.just("overwrite"), POSITIONS, INTERESTING | st.integers(0, 2**64 - 1)),
    st.tuples(st.just("insert"), POSITIONS, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("delete"), POSITIONS, st.integers(1, 40)),
    st.tuples(st.just("copy"), POSITIONS, POSITIONS),
    st.tuples(st.just("cut"), POSITIONS, st.none()),
)


def mutate(content: bytes, mutations: list[tuple]) -> bytes:
    mutant = bytearray(content)
    for kind, at, argument in mutations:
        if kind == "flip" and at < len(mutant):
            mutant[at] ^= argument
        elif kind == "overwrite":
            mutant[at : at + 8] = struct.pack("<Q", argument)
        elif kind == "insert":
            mutant[at:at] = argument
        elif kind == "delete":
            del mutant[at : at + argument]
        elif kind == "copy":
            mutant[at : at + 40] = mutant[argument : argument + 40]
        elif kind == "cut":
            del mutant[at:]
    return bytes(mutant)


def read_or_refusal(path: Path, size: int) -> gguf.Gguf | str:
    try:
        return read_in_little_memory(path, size)
    except BadInput as error:
        return str(error)


def check_survives(folder: Path, content: bytes) -> None:
    """The file is refused in one line, or all that it yields lies within it."""
    path = write(folder, content)
    model = read_or_refusal(path, len(content))
    if isinstance(model, str):
        assert model.startswith(f"{path}: ")
        assert "\n" not in model
        assert len(model) < len(str(path)) + 300
        return
    taken = np.zeros(len(content), bool)
    for tensor in model.tensors.values():
        extent = slice(tensor.offset, tensor.offset + tensor.data.nbytes)
        assert tensor.data.tobytes() == content[extent]
        assert not taken[extent].any()
        taken[extent] = True
    for key, found in model.metadata.items():
        assert isinstance(key, str)
        assert isinstance(found, (int, float, str, list, np.ndarray))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(mutations=st.lists(MUTATIONS, min_size=1, max_size=4))
@example(mutations=[("overwrite", 8, HUGE)])
@example(mutations=[("overwrite", 16, HUGE)])
def test_mutants_of_a_good_file(tmp_path_factory, mutations):
    check_survives(tmp_path_factory.getbasetemp(), mutate(GOOD, mutations))


def mostly(truth: st.SearchStrategy, lie: st.SearchStrategy) -> st.SearchStrategy:
    """One lie in eight: a file of nothing else is refused at its first."""
    return st.integers(0, 7).flatmap(lambda die: lie if die == 7 else truth)


COUNTS = mostly(st.none(), st.integers(0, 5) | INTERESTING)
KEYS = mostly(
    st.text(max_size=5), st.sampled_from(["general.alignment", "split.count"]) | st.binary(max_size=5)
)
NAMES = mostly(st.text(max_size=5), st.just("twice") | st.binary(max_size=5))
SIZES = mostly(st.sampled_from([1, 2, 3, 64, 256]), INTERESTING)
TYPE_IDS = mostly(
    st.sampled_from([0, 1, 2, 8, 42]), st.integers(0, 45) | st.sampled_from([144, 399, 2**32 - 1])
)
OFFSETS = st.integers(0, 6).map(lambda steps: 32 * steps)
LYING_VALUES = st.one_of(
    st.builds(lambda kind, raw: struct.pack("<I", kind) + raw, st.integers(0, 14), st.binary(max_size=16)),
    st.builds(
        lambda kind, count, raw: struct.pack("<IIQ", GGUFValueType.ARRAY, kind, count) + raw,
        st.integers(0, 14),
        st.integers(0, 5) | INTERESTING,
        st.binary(max_size=60),
    ),
)
TRUE_VALUES = st.builds(u32, st.integers(0, 2**32 - 1)) | st.builds(text, st.text(max_size=8))
TENSORS_OF_LIES = st.builds(
    RawTensor,
    NAMES,
    st.lists(SIZES, min_size=1, max_size=3) | st.lists(SIZES, max_size=6),
    TYPE_IDS,
    mostly(OFFSETS, st.integers(0, 200) | INTERESTING),
    st.just(bytes(64)),
    mostly(st.none(), st.integers(0, 6) | st.just(2**32 - 1)),
)


@st.composite
def hostile_files(draw) -> bytes:
    tensors = draw(st.lists(TENSORS_OF_LIES, max_size=4))
    for tensor in tensors:
        tensor.data = (
            b"" if tensor.offset > 4096 else tensor.data
        )  # the tests do not allocate what they claim
    return pack(
        draw(st.lists(st.tuples(KEYS, mostly(TRUE_VALUES, LYING_VALUES)), max_size=3)),
        tensors,
        version=draw(mostly(st.sampled_from([2, 3]), st.integers(0, 5))),
        tensor_count=draw(COUNTS),
        value_count=draw(COUNTS),
    )


@settings(max_examples=600, deadline=None, derandomize=True)
@given(content=hostile_files())
def test_files_made_of_lies(tmp_path_factory, content):
    check_survives(tmp_path_factory.getbasetemp(), content)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200))
def test_noise_behind_the_magic(tmp_path_factory, content):
    check_survives(tmp_path_factory.getbasetemp(), b"GGUF\x03\0\0\0" + content)


def test_string_packs_its_length_in_front():
    """The tests' own writer against gguf-py's idea of a string."""
    assert string("é") == struct.pack("<Q", 2) + "é".encode()
