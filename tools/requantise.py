"""A GGUF written again with some tensors in other quant types, packed by llama.cpp's quantiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from scarlet_jax.tools.engines import ggml


def write(source: Path, target: Path, choose: Callable[[str, str], str]) -> None:
    """A copy of `source` in which each tensor has the type that `choose(name, its type)` says.

    Metadata and every tensor that keeps its type are copied as they are, `general.file_type` too.
    """
    file = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(file.fields["general.architecture"].contents()))
    writer.data_alignment = file.alignment
    for name, field in file.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    packed = [(tensor, *_packed(tensor, choose)) for tensor in file.tensors]
    for tensor, data, qtype in packed:
        dims = [int(n) for n in reversed(tensor.shape)]
        number: Any = ggml.TYPE_IDS[qtype]  # gguf-py has no name for every one of them
        writer.add_tensor_info(tensor.name, dims, np.dtype(np.float32), data.nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, data, _ in packed:
        writer.write_tensor_data(data)
    writer.close()


def _packed(tensor: gguf.ReaderTensor, choose: Callable[[str, str], str]) -> tuple[np.ndarray, str]:
    """The tensor's data and type in the new file."""
    old = tensor.tensor_type.name
    new = choose(tensor.name, old)
    if new == old:
        return tensor.data, old
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return ggml.quantize(values.reshape(-1, values.shape[-1]), new), new
