"""Known arithmetics, simulated: what an engine does to numbers before it multiplies them.

llama.cpp's CPU path turns the activations of a matmul into the weight type's partner format (8-bit blocks for
quantised weights) and keeps keys and values in f16 or a block format. Each function here rounds an array the way
that engine does and returns it in its own float type, so an operation can be re-run in that arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rounding = Callable[[np.ndarray], np.ndarray]


def f16(x: np.ndarray) -> np.ndarray:
    """Nearest half precision number."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(x.dtype)


def bf16(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16 number, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(x.dtype)


def tf32(x: np.ndarray) -> np.ndarray:
    """Nearest number with 10 mantissa bits: what a GPU's tensor core makes of f32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(x.dtype)


def e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest number with 3 mantissa bits: fp8 where it neither overflows nor vanishes."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 16), exponent - 4).astype(x.dtype)


def int8_rows(x: np.ndarray) -> np.ndarray:
    """Integers to 127 times one scale for the whole last axis."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)) * scale


def q8_0(x: np.ndarray) -> np.ndarray:
    """Blocks of 32 as int8 times an f16 scale, amax/127 (ggml's Q8_0 and, but for its sum, Q8_1)."""
    return _blocks(x, 32, _q8_0_block)


def q8_k(x: np.ndarray) -> np.ndarray:
    """Blocks of 256 as int8 times an f32 scale; the largest magnitude becomes -127 (ggml's Q8_K)."""
    return _blocks(x, 256, _q8_k_block)


def q4_0(x: np.ndarray) -> np.ndarray:
    """Blocks of 32 as 4-bit integers times an f16 scale, the signed extreme over -8 (ggml's Q4_0)."""
    return _blocks(x, 32, _q4_0_block)


def _q8_0_block(x: np.ndarray) -> np.ndarray:
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    return np.rint(x * inverse) * d.astype(np.float16).astype(np.float32)


def _q8_k_block(x: np.ndarray) -> np.ndarray:
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    scale = np.divide(np.float32(-127), extreme, out=np.zeros_like(extreme), where=extreme != 0)
    back = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return np.minimum(np.rint(x * scale), 127) * back


def _q4_0_block(x: np.ndarray) -> np.ndarray:
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    d = extreme / np.float32(-8)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    return (np.clip(np.floor(x * inverse + np.float32(8.5)), 0, 15) - 8) * d.astype(np.float16).astype(
        np.float32
    )


def _blocks(x: np.ndarray, size: int, block: Rounding) -> np.ndarray:
    """Apply `block` to the last axis cut into `size`; an axis that is no multiple stays as it is."""
    if x.shape[-1] % size or not x.size:
        return x
    cut = np.ascontiguousarray(x, np.float32).reshape(*x.shape[:-1], -1, size)
    return block(cut).reshape(x.shape).astype(x.dtype)


# Weight type -> what llama.cpp's CPU path turns that matmul's activations into (fact sheet, "Dtypes").
_Q8_0_PARTNERS = ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "Q4_1", "Q5_1")
ACTIVATION_ROUNDING: dict[str, Rounding] = {
    "F16": f16,
    "BF16": bf16,
    **dict.fromkeys(_Q8_0_PARTNERS, q8_0),
}


def partner(qtype: str) -> Rounding | None:
    """How activations are rounded for a weight of `qtype`; None for F32 and unknown types."""
    if qtype in ("", "F32"):
        return None
    return ACTIVATION_ROUNDING.get(qtype, q8_k)


def rotated(rounding: Rounding) -> Rounding:
    """`rounding` after a Hadamard rotation of every 64 elements, which is undone: a quantised cache's way."""

    def apply(x: np.ndarray) -> np.ndarray:
        if x.shape[-1] % 64:
            return rounding(x)
        cut = x.reshape(*x.shape[:-1], -1, 64)
        return (rounding((cut @ HADAMARD).reshape(x.shape)).reshape(cut.shape) @ HADAMARD).reshape(x.shape)

    return apply


def _hadamard(n: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / n**0.5


HADAMARD = _hadamard(64)

# What a key-value cache may hold, in the order the hypotheses are tried.
KV_ROUNDING: dict[str, Rounding] = {
    "f16": f16,
    "bf16": bf16,
    "q8_0": q8_0,
    "q8_0 rotated": rotated(q8_0),
    "q4_0": q4_0,
    "q4_0 rotated": rotated(q4_0),
}

# What an operand or a state may be kept in, tried when a cause is looked for.
ROUNDINGS: dict[str, Rounding] = {
    "bf16": bf16,
    "f16": f16,
    "fp8 (e4m3)": e4m3,
    "int8 with a scale a row": int8_rows,
    "int8 with a scale for 32": q8_0,
}
