"""A trained model as GGUF files: packed by llama.cpp's quantiser, types chosen by its recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.tools import synth
from scarlet_jax.tools.common import replacing
from scarlet_jax.tools.engines import ggml
from scarlet_jax.tools.train import network

NAME = "scarlet box"  # general.name


def write(
    path: Path, parameters: network.Parameters, shape: synth.Shape, tokenizer: dict[str, Any], quant: str
) -> None:
    """Write one file, whole or not at all; `quant` is a type or one of `synth.MIXES`.

    Raises BadInput where the file cannot be written.
    """
    values = network.tensors(parameters)
    metadata = synth.metadata(shape, quant, NAME, tokenizer)
    try:
        with replacing(path) as temporary:
            writer = gguf.GGUFWriter(temporary, shape.arch)
            synth.add_metadata(writer, metadata)
            for tensor in synth.plan(shape, quant):
                _add(writer, tensor, np.asarray(values[tensor.name], np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}") from error


def _add(writer: gguf.GGUFWriter, tensor: synth.Tensor, value: np.ndarray) -> None:
    kind = gguf.GGMLQuantizationType[tensor.qtype]
    packed = ggml.quantize(value.reshape(-1, value.shape[-1]), tensor.qtype)
    rows = packed.view(np.uint8).reshape(*value.shape[:-1], -1)
    writer.add_tensor(tensor.name, rows, raw_dtype=kind)
