"""Makes GGUF files for the tests of the reader: byte by byte, so that any byte can be a lie."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

from gguf.constants import GGMLQuantizationType, GGUFValueType

F32 = GGMLQuantizationType.F32.value
NUMBER_CODES = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content) -> bytes:
    """A metadata value with its type in front."""
    return struct.pack("<I", kind) + _content(kind, content)


def array(kind: int, contents: list, count: int | None = None) -> bytes:
    """A metadata array with its type in front; `count` overrides the truth."""
    count = len(contents) if count is None else count
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, count)
    return head + b"".join(_content(kind, content) for content in contents)


def _content(kind: int, content) -> bytes:
    if kind == GGUFValueType.STRING:
        return string(content)
    return struct.pack("<" + NUMBER_CODES[GGUFValueType(kind)], content)


def text(content: str | bytes) -> bytes:
    return value(GGUFValueType.STRING, content)


def u32(content: int) -> bytes:
    return value(GGUFValueType.UINT32, content)


@dataclasses.dataclass
class RawTensor:
    """A tensor as a file describes it, `offset` within the data section, and the bytes to put there.

    `ne` is fastest axis first; `dims` overrides the number of dimensions that the file claims.
    """

    name: str | bytes
    ne: list[int]
    type_id: int = F32
    offset: int = 0
    data: bytes = b""
    dims: int | None = None

    def info(self) -> bytes:
        dims = len(self.ne) if self.dims is None else self.dims
        ne = struct.pack(f"<{len(self.ne)}Q", *self.ne)
        return (
            string(self.name) + struct.pack("<I", dims) + ne + struct.pack("<IQ", self.type_id, self.offset)
        )


def pack(
    values: Sequence[tuple[str | bytes, bytes]],
    tensors: list[RawTensor],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    tensor_count: int | None = None,
    value_count: int | None = None,
) -> bytes:
    """The file's bytes; the counts default to the truth."""
    tensor_count = len(tensors) if tensor_count is None else tensor_count
    value_count = len(values) if value_count is None else value_count
    head = magic + struct.pack("<IQQ", version, tensor_count, value_count)
    head += b"".join(string(key) + packed for key, packed in values)
    head += b"".join(tensor.info() for tensor in tensors)
    data = bytearray()
    for tensor in filter(lambda tensor: tensor.data, tensors):
        end = tensor.offset + len(tensor.data)
        data.extend(bytes(max(0, end - len(data))))
        data[tensor.offset : end] = tensor.data
    return head + bytes(-len(head) % alignment) + bytes(data)
