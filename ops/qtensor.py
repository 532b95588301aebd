"""QTensor: a matrix that stays packed in its GGUF quantisation blocks until a kernel reads it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

# The two types that the gguf package cannot size (spec section 9): elements and bytes of a block.
_NEWER_BLOCK_SIZES = {"Q1_0": (128, 18), "Q2_0": (64, 18)}


def block_size(qtype: str) -> tuple[int, int]:
    """Elements and bytes of one block of `qtype`, for instance (256, 144) for "Q4_K"."""
    if qtype in _NEWER_BLOCK_SIZES:
        return _NEWER_BLOCK_SIZES[qtype]
    return GGML_QUANT_SIZES[GGMLQuantizationType[qtype]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Packed weights: rows of whole blocks, exactly the bytes of the file.

    `blocks` is uint8 of shape (..., out, row bytes); leading axes, if any, are experts. `qtype` is the
    GGUF type name, static under jit. `scale`, if given, is the GGUF's separate `X.scale` tensor, which
    multiplies the result of a product with this weight (one value, or one an expert); `bias`, its `X.bias`,
    f32 (out,), is added after that.
    """

    blocks: jax.Array | np.ndarray
    qtype: str = dataclasses.field(metadata={"static": True})
    scale: jax.Array | np.ndarray | None = None
    bias: jax.Array | np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape (..., out, in)."""
        elements, size = block_size(self.qtype)
        *rows, row_bytes = self.blocks.shape
        return (*rows, row_bytes // size * elements)
