"""C++ kernels behind the XLA foreign function interface: products with packed weights on a CPU.

A peer of `ops.portable` behind `ops.matmul`: `unavailable()` and `qmatmul(x, w)`. Weights decode to the very
f32 values of ggml's reference, sums are f32; a result does not depend on the number of threads. Activations are
f32, or, with AVX-512 VNNI, whole numbers of 24 bits with a scale for each sub-block of weights (`fixed.h`): as
close to float64, and faster. The best instruction set of the machine is chosen at load;
SCARLET_CPU_ISA=amx|avx512vnni|avx512|avx2|generic forces one, and SCARLET_THREADS sets how many threads share
the work (all cores by default).

`fast` (opt-in; as an implementation, `ops.cpu.fast`) rounds activations to 8 bits, a scale for each sub-block
of weights (16 or 32 elements), where the processor has AVX-512 VNNI and rows are whole 256s of a quantised format;
all else stays exact. About 5e-3 of relative error a product, half of what a scale for each 256 costs, for up to
2.5 times the speed. With AMX it takes two bf16 for each number of more than four rows instead, of activations and
of weights of any format: about 5e-6.

All functions are for jit and vmap; the products have gradients too.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import chex
import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.ops import portable
from scarlet_jax.ops.cpu.build import FAILURE_NOTE, LIBRARY, fingerprint
from scarlet_jax.ops.cpu.mixers import attention, delta_net  # noqa: F401
from scarlet_jax.ops.qtensor import QTensor, block_size

Weight = jax.Array | np.ndarray | QTensor

_FOLDER = Path(__file__).parent
_HANDLERS = (
    *("scarlet_qmatmul", "scarlet_qmatmul_experts", "scarlet_ffn", "scarlet_ffn_experts"),
    *("scarlet_decode", "scarlet_delta_net", "scarlet_attention"),
)
_FLOAT_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class _UnavailableError(Exception):
    """Why the library cannot be used."""


def unavailable() -> str | None:
    """Why the kernels cannot run here, in a line; None if they can."""
    try:
        _library()
    except _UnavailableError as reason:
        return str(reason)
    if jax.default_backend() != "cpu":
        return f"the default device is a {jax.default_backend()}"
    return None


def isa() -> str:
    """The instruction set in use: "amx", "avx512vnni", "avx512", "avx2" or "generic"."""
    return _library().isa


def set_isa(name: str = "") -> None:
    """Use that instruction set from now on, or the best one of this machine.

    Raises BadInput if it is unknown or cannot run here. Not while a kernel runs.
    """
    try:
        _choose_isa(_library(), name)
    except _UnavailableError as reason:
        raise BadInput(str(reason)) from reason


def threads() -> int:
    """How many threads share the work, the caller included."""
    return _library().scarlet_threads()


def set_threads(count: int) -> None:
    """Share the work among `count` threads, the caller included; 0 for all the cores of this process."""
    _library().scarlet_set_threads(count)


def rounds(qtype: str) -> bool:
    """Whether the fast mode rounds the activations that such weights multiply, on this machine."""
    return bool(_library().scarlet_rounds(qtype.encode()))


def read_memory(data: np.ndarray) -> None:
    """Read `data` once with all threads: the probe that measures a machine's memory."""
    _library().scarlet_read_all(data.ctypes.data, data.nbytes)


def decode(blocks: jax.Array | np.ndarray, qtype: str) -> jax.Array:
    """Decode rows of blocks: uint8 (..., row bytes) -> f32 (..., elements), as `ops.quants.decode`."""
    chex.assert_type(blocks, jnp.uint8)
    elements, size = block_size(qtype)
    *rows, row_bytes = blocks.shape
    result = jax.ShapeDtypeStruct((*rows, row_bytes // size * elements), jnp.float32)
    return _call("scarlet_decode", result, vmap_method="broadcast_all")(blocks, qtype=qtype)


def qmatmul(x: jax.Array, w: Weight, *, fast: bool = False) -> jax.Array:
    """`x @ w.T`: f32 (..., in), (out, in) packed or F32, F16, BF16 -> f32 (..., out), without `w.scale`."""
    return qmatmul_many(x, [w], fast=fast)[0]


def qmatmul_many(x: jax.Array, ws: Sequence[Weight], *, fast: bool = False) -> list[jax.Array]:
    """`[x @ w.T for w in ws]` in one call: f32 (..., in), each (out_i, in) -> f32 (..., out_i) each."""
    chex.assert_type(x, jnp.float32)
    arrays, qtypes = zip(*(_packed(w) for w in ws), strict=True)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    ys = _products(",".join(qtypes), tuple(w.shape[-2] for w in ws), fast, rows, arrays)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


def qmatmul_experts(x: jax.Array, w: Weight, ids: jax.Array, *, fast: bool = False) -> jax.Array:
    """Each row times its own experts: x f32 (M, in) or, a row an expert, (M, k, in); w (E, out, in);
    ids int32 (M, k), within 0 .. E-1 -> f32 (M, k, out), without `w.scale`.

    No expert's weights are gathered or copied; rows that share an expert are multiplied together.
    """  # noqa: D205
    chex.assert_type([x, ids], [jnp.float32, jnp.int32])
    array, qtype = _packed(w)
    return _experts(qtype, w.shape[-2], fast, x, array, ids)


def ffn(x: jax.Array, gate: Weight, up: Weight, down: Weight, *, fast: bool = False) -> jax.Array:
    """`(silu(x @ gate.T) * (x @ up.T)) @ down.T` in one call.

    x f32 (..., in), gate and up (F, in), down (out, F) -> f32 (..., out). The weights' own scales are not
    applied: a caller whose weights have them takes the steps one by one.
    """
    chex.assert_type(x, jnp.float32)
    arrays, qtypes = zip(_packed(gate), _packed(up), _packed(down), strict=True)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    result = jax.ShapeDtypeStruct((len(rows), down.shape[-2]), jnp.float32)
    run = _call("scarlet_ffn", result, vmap_method="sequential")
    y = run(rows, *arrays, qtypes=",".join(qtypes), fast=fast)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def ffn_experts(
    x: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    ids: jax.Array,
    shares: jax.Array,
    *,
    fast: bool = False,
) -> jax.Array:
    """The sum over each row's experts of share times `ffn`, in one call that reads no other expert.

    x f32 (M, in); gate and up (E, F, in), down (E, out, F); ids int32 (M, k), within 0 .. E-1; shares f32
    (M, k) -> f32 (M, out). As of `ffn`, the weights' own scales are not applied.
    """
    chex.assert_type([x, ids, shares], [jnp.float32, jnp.int32, jnp.float32])
    arrays, qtypes = zip(_packed(gate), _packed(up), _packed(down), strict=True)
    result = jax.ShapeDtypeStruct((len(x), down.shape[-2]), jnp.float32)
    run = _call("scarlet_ffn_experts", result, vmap_method="sequential")
    return run(x, *arrays, ids, shares, qtypes=",".join(qtypes), fast=fast)


# --- the product and its gradient -------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _products(qtypes: str, outs: tuple[int, ...], fast: bool, x: jax.Array, ws: tuple) -> list[jax.Array]:
    results = [jax.ShapeDtypeStruct((len(x), out), jnp.float32) for out in outs]
    return _call("scarlet_qmatmul", results, vmap_method="expand_dims")(x, *ws, qtypes=qtypes, fast=fast)


def _products_forward(qtypes, outs, fast, x, ws):
    return _products(qtypes, outs, fast, x, ws), (x, ws)


def _products_backward(qtypes, outs, fast, saved, cotangents):
    x, ws = saved
    dense = [_as_f32(w, qtype) for w, qtype in zip(ws, qtypes.split(","), strict=True)]
    dx = sum(jnp.dot(dy, w, precision="highest") for dy, w in zip(cotangents, dense, strict=True))
    return dx, tuple(_weight_cotangent(w, x, dy) for w, dy in zip(ws, cotangents, strict=True))


_products.defvjp(_products_forward, _products_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _experts(qtype: str, out: int, fast: bool, x: jax.Array, w: jax.Array, ids: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((*ids.shape, out), jnp.float32)
    run = _call("scarlet_qmatmul_experts", result, vmap_method="sequential")
    return run(x, w, ids, qtype=qtype, fast=fast)


def _experts_forward(qtype, out, fast, x, w, ids):
    return _experts(qtype, out, fast, x, w, ids), (x, w, ids)


def _experts_backward(qtype, out, fast, saved, dy):
    """That of the portable product, which reads the experts routed to and no others."""
    del out, fast
    x, w, ids = saved

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return portable.qmatmul_experts(x, QTensor(w, qtype) if w.dtype == jnp.uint8 else w, ids)

    return *jax.vjp(product, x, w)[1](dy), np.zeros(ids.shape, jax.dtypes.float0)


_experts.defvjp(_experts_forward, _experts_backward)


def _as_f32(w: jax.Array, qtype: str) -> jax.Array:
    return decode(w, qtype) if w.dtype == jnp.uint8 else w.astype(jnp.float32)


def _weight_cotangent(w: jax.Array, x: jax.Array, dy: jax.Array) -> jax.Array | np.ndarray:
    if w.dtype == jnp.uint8:
        return np.zeros(w.shape, jax.dtypes.float0)  # packed bits have no gradient
    return jnp.dot(dy.T, x, precision="highest").astype(w.dtype)


# --- the library ------------------------------------------------------------------------------------


def _packed(w: Weight) -> tuple[jax.Array | np.ndarray, str]:
    """The array that goes to the kernel, and the name of its type."""
    if isinstance(w, QTensor):
        return w.blocks, w.qtype
    if str(w.dtype) not in _FLOAT_TYPES:
        raise NotImplementedError(f"weights of dtype {w.dtype}: expected a QTensor, or f32, f16 or bf16")
    return w, _FLOAT_TYPES[str(w.dtype)]


def _call(name: str, result, *, vmap_method: str):
    _library()
    return jax.ffi.ffi_call(name, result, vmap_method=vmap_method)


@functools.cache
def _library() -> ctypes.CDLL:
    """The loaded library: codebooks filled, instruction set chosen, handlers registered."""
    path = _FOLDER / LIBRARY
    if not path.exists():
        note = _FOLDER / FAILURE_NOTE
        why = note.read_text("utf-8").splitlines()[0] if note.exists() else "run `pip install` again"
        raise _UnavailableError(f"the compiled kernels were not built: {why}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _UnavailableError(f"the compiled kernels do not load: {error}") from error
    if _sources(library) != fingerprint() != "":
        again = "`python -m scarlet_jax.ops.cpu.build` compiles them again"
        raise _UnavailableError(f"the compiled kernels are of other sources than those here: {again}")
    _declare(library)
    _choose_isa(library, os.environ.get("SCARLET_CPU_ISA", ""))
    for name, book in _codebooks().items():
        copied = library.scarlet_set_codebook(name.encode(), book.tobytes(), book.nbytes)
        assert copied == book.nbytes, f"codebook {name}: {book.nbytes} bytes, the library has {copied}"
    for name in _HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


def _sources(library: ctypes.CDLL) -> str:
    """The fingerprint of what the library was compiled from."""
    if not hasattr(library, "scarlet_sources"):
        return "older than fingerprints"
    library.scarlet_sources.restype = ctypes.c_char_p
    return library.scarlet_sources().decode()


def _declare(library: ctypes.CDLL) -> None:
    library.scarlet_set_codebook.restype = ctypes.c_size_t
    library.scarlet_set_codebook.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.scarlet_set_isa.restype = ctypes.c_char_p
    library.scarlet_set_isa.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.scarlet_rounds.restype = ctypes.c_bool
    library.scarlet_rounds.argtypes = [ctypes.c_char_p]
    library.scarlet_read_all.restype = ctypes.c_float
    library.scarlet_read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.scarlet_fma_all.restype = ctypes.c_double
    library.scarlet_fma_all.argtypes = [ctypes.c_int64]


def _choose_isa(library: ctypes.CDLL, name: str) -> None:
    error = ctypes.create_string_buffer(256)
    chosen = library.scarlet_set_isa(name.encode(), error, len(error))
    if chosen is None:
        raise _UnavailableError(error.value.decode())
    library.isa = chosen.decode()


def _codebooks() -> dict[str, np.ndarray]:
    """The tables that the kernels look up, from the gguf package, a signed byte or a float an entry."""

    def grid(name: str) -> np.ndarray:
        codec = getattr(gguf.quants, name)
        codec.init_grid()
        return codec.grid.reshape(codec.grid_shape).astype(np.int8)

    return {
        "iq1": grid("IQ1_S"),
        "iq2_xxs": grid("IQ2_XXS"),
        "iq2_xs": grid("IQ2_XS"),
        "iq2_s": grid("IQ2_S"),
        "iq3_xxs": grid("IQ3_XXS"),
        "iq3_s": grid("IQ3_S"),
        "sign_codes": np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8),
        "iq4": np.array(gguf.quants.IQ4_NL.kvalues, np.float32),
        "e2m1": np.array(gguf.quants.MXFP4.kvalues, np.float32),
    }
