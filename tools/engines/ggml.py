"""libllama and ggml through ctypes: finding the library, checking its layouts, coding blocks.

The C interface has no stable binary layout, so nothing is believed: each struct that we read or fill is
first compared with values the library itself reports, and a library that differs is refused in one line.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from scarlet_jax.errors import BadInput

# The types a weight can have. Integers are never weights; Q8_1 and Q8_K exist only for activations, and
# asking ggml to quantise to any of them aborts the process.
_NOT_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
TYPE_IDS = {t.name: int(t) for t in gguf.GGMLQuantizationType} | {"Q1_0": 41, "Q2_0": 42}
TYPE_IDS = {name: number for name, number in TYPE_IDS.items() if name not in _NOT_WEIGHTS}

# (tensor, asking whether it is wanted or telling that it is there, user data) -> wanted, or: go on
EvalCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
# (blocks, floats, number of elements)
ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)

LOG_ERROR = 4
CONTEXT_TYPE_MTP = 1  # enum llama_context_type
LOAD_MTP = 4  # its place among the model parameters' `flags`

_KEPT: list[Any] = []  # callbacks that C code has the address of, for as long as the process lives


class TensorStruct(ctypes.Structure):
    """The head of `struct ggml_tensor`, as far as its data."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
    ]


class TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`: a small arena for tensors that are never computed."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Batch(ctypes.Structure):
    """`struct llama_batch`: one entry a token; a null pointer would mean llama.cpp's default."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def _struct(name: str, fields: list[tuple[str, Any]]) -> type[ctypes.Structure]:
    """A struct whose tail differs by version: more room than any version needs, filled by its defaults."""
    return type(name, (ctypes.Structure,), {"_fields_": [*fields, ("rest", ctypes.c_uint64 * 64)]})


def _context_params(newer_counts: int, has_context_type: bool) -> type[ctypes.Structure]:
    """`llama_context_params` with the first `newer_counts` of the counts that were added over time."""
    counts = ["n_ctx", "n_batch", "n_ubatch", "n_seq_max"]
    counts += ["n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq"][:newer_counts]
    kinds = ["rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type"]
    kinds = ["ctx_type", *kinds] if has_context_type else kinds
    floats = ["rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor"]
    floats += ["yarn_beta_fast", "yarn_beta_slow"]
    return _struct(
        "ContextParams",
        [(name, ctypes.c_uint32) for name in counts]
        + [(name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", *kinds)]
        + [(name, ctypes.c_float) for name in floats]
        + [("yarn_orig_ctx", ctypes.c_uint32), ("defrag_thold", ctypes.c_float)]
        + [("cb_eval", EvalCallback), ("cb_eval_user_data", ctypes.c_void_p)]
        + [("type_k", ctypes.c_int32), ("type_v", ctypes.c_int32)],
    )


def _model_params(mode_count: int) -> type[ctypes.Structure]:
    """`llama_model_params` with `mode_count` enums between `n_gpu_layers` and `main_gpu`."""
    modes = ["split_mode", "load_mode", "lazy_mode"][:mode_count]
    return _struct(
        "ModelParams",
        [("devices", ctypes.POINTER(ctypes.c_void_p)), ("tensor_buft_overrides", ctypes.c_void_p)]
        + [(name, ctypes.c_int32) for name in ("n_gpu_layers", *modes, "main_gpu")]
        + [("tensor_split", ctypes.c_void_p), ("progress_callback", ctypes.c_void_p)]
        + [("progress_callback_user_data", ctypes.c_void_p), ("kv_overrides", ctypes.c_void_p)]
        + [("vocab_only", ctypes.c_bool), ("flags", ctypes.c_uint8 * 7)],
    )


def _context_defaults_fit(p: Any) -> bool:
    """Whether llama.cpp's documented defaults stand where this layout puts them."""
    kinds = (p.rope_scaling_type, p.pooling_type, p.attention_type, p.flash_attn_type)
    return (
        (p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max) == (512, 2048, 512, 1)
        and 0 < p.n_threads == p.n_threads_batch
        and getattr(p, "ctx_type", 0) == 0
        and kinds == (-1, -1, -1, -1)
        and (p.rope_freq_base, p.rope_freq_scale, p.yarn_ext_factor) == (0.0, 0.0, -1.0)
        and not p.cb_eval
        and (p.type_k, p.type_v) == (TYPE_IDS["F16"],) * 2
    )


def _model_defaults_fit(p: Any) -> bool:
    """As `_context_defaults_fit`: layer split, first device, nothing overridden, one flag at least set."""
    pointers = (p.devices, p.tensor_buft_overrides, p.tensor_split, p.kv_overrides)
    pointers += (p.progress_callback, p.progress_callback_user_data)
    flags = bytes(p.flags)
    return (
        (p.split_mode, p.main_gpu) == (1, 0)
        and not any(pointers)
        and not p.vocab_only
        and sum(flags) > 0
        and max(flags) <= 1
    )


# The layouts known so far, newest first. (One mode instead of two moves nothing that we use.)
_CONTEXT_LAYOUTS = [_context_params(n, kind) for n in (3, 2, 1, 0) for kind in (True, False)]
_MODEL_LAYOUTS = [_model_params(n) for n in (3, 2)]

_P, _I, _S = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
_TENSOR = ctypes.POINTER(TensorStruct)

# Every function we call: result type, argument types.
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), [_I]),
    "ggml_type_name": (_S, [_I]),
    "ggml_blck_size": (ctypes.c_int64, [_I]),
    "ggml_type_size": (ctypes.c_size_t, [_I]),
    "ggml_quantize_init": (None, [_I]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [_I]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [_I, _P, _P, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _P],
    ),
    "ggml_init": (_P, [InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_new_tensor_2d": (_TENSOR, [_P, _I, ctypes.c_int64, ctypes.c_int64]),
    "ggml_mul_mat": (_TENSOR, [_P, _TENSOR, _TENSOR]),
    "ggml_reshape_1d": (_TENSOR, [_P, _TENSOR, ctypes.c_int64]),
    "ggml_get_data": (_P, [_TENSOR]),
    "ggml_get_name": (_S, [_P]),
    "ggml_nbytes": (ctypes.c_size_t, [_P]),
    "ggml_op_name": (_S, [_I]),
    "ggml_backend_tensor_get": (None, [_P, _P, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_dev_count": (ctypes.c_size_t, []),
    "ggml_backend_load_all_from_path": (None, [_S]),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, _P]),
    "llama_context_default_params": (None, []),  # result type: the layout that fits
    "llama_model_default_params": (None, []),
    "llama_model_load_from_file": (_P, [_S, ctypes.c_void_p]),
    "llama_model_free": (None, [_P]),
    "llama_model_get_vocab": (_P, [_P]),
    "llama_model_meta_val_str": (_I, [_P, _S, _S, ctypes.c_size_t]),
    "llama_init_from_model": (_P, [_P, ctypes.c_void_p]),
    "llama_free": (None, [_P]),
    "llama_n_ctx": (ctypes.c_uint32, [_P]),
    "llama_n_ubatch": (ctypes.c_uint32, [_P]),
    "llama_n_seq_max": (ctypes.c_uint32, [_P]),
    "llama_get_memory": (_P, [_P]),
    "llama_memory_clear": (None, [_P, ctypes.c_bool]),
    "llama_decode": (_I, [_P, Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_P]),
    "llama_vocab_n_tokens": (_I, [_P]),
    "llama_vocab_is_eog": (ctypes.c_bool, [_P, _I]),
    "llama_tokenize": (_I, [_P, _S, _I, ctypes.POINTER(ctypes.c_int32), _I, ctypes.c_bool, ctypes.c_bool]),
    "llama_token_to_piece": (_I, [_P, _I, _S, _I, _I, ctypes.c_bool]),
}


class Library:
    """A loaded libllama, with its ggml: checked functions as attributes (`lib.llama_decode(...)`).

    Raises BadInput if the library or one of its functions is absent, or if a layout is not one we know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: deque[str] = deque(maxlen=8)  # the last error lines that llama.cpp logged
        self._c = _open(path)
        for name, (result, arguments) in _PROTOTYPES.items():
            self._declare(name, result, arguments)
        self.context_params = self._fitting(
            "llama_context_default_params", _CONTEXT_LAYOUTS, _context_defaults_fit
        )
        self.model_params = self._fitting("llama_model_default_params", _MODEL_LAYOUTS, _model_defaults_fit)
        self.llama_init_from_model.argtypes = [_P, self.context_params]
        self.llama_model_load_from_file.argtypes = [_S, self.model_params]
        self._check_tensor_layout()
        _KEPT.append(LogCallback(self._on_log))
        self.llama_log_set(_KEPT[-1], None)
        if not self.ggml_backend_dev_count():  # a build whose processors are plug-ins beside it
            self.ggml_backend_load_all_from_path(str(path.parent).encode())
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no llama.cpp function {name!r} was declared")

    @property
    def version(self) -> str:
        """Name and version, as far as the library knows them."""
        for symbol, name in (("llama_version", "llama.cpp"), ("ggml_version", "llama.cpp with ggml")):
            if hasattr(self._c, symbol):
                function = self._c[symbol]
                function.restype = ctypes.c_char_p
                return f"{name} {function().decode()}"
        return "llama.cpp"

    def last_error(self) -> str:
        """What llama.cpp last complained about, as one line."""
        return "; ".join(self.errors) or "it gave no reason"

    def type_id(self, qtype: str) -> int:
        """The number that ggml gives a type name such as "Q4_K"; BadInput if this library differs."""
        number = TYPE_IDS.get(qtype)
        if number is None:
            raise BadInput(f"quant type {qtype!r}: not one of {', '.join(TYPE_IDS)}")
        name = (self.ggml_type_name(number) or b"").decode(errors="replace")
        if name.upper() != qtype:
            raise BadInput(f"quant type {qtype}: {self.path} ({self.version}) does not have it")
        return number

    def block_size(self, qtype: str) -> tuple[int, int]:
        """Elements and bytes of one block."""
        number = self.type_id(qtype)
        return self.ggml_blck_size(number), self.ggml_type_size(number)

    def _declare(self, name: str, result: Any, arguments: list[Any]) -> None:
        try:
            function = self._c[name]  # an own object: other users of the library keep their prototypes
        except AttributeError:
            raise BadInput(f"{self.path}: not a usable llama.cpp library: it lacks {name}") from None
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)

    def _on_log(self, level: int, text: bytes, _user_data: int) -> None:
        if level == LOG_ERROR and (line := text.decode(errors="replace").strip()):
            self.errors.append(line)

    def _fitting(self, name: str, layouts: list[type], fits: Callable[[Any], bool]) -> type[ctypes.Structure]:
        function = getattr(self, name)
        for layout in layouts:
            function.restype = layout
            if fits(function()):
                return layout
        raise BadInput(
            f"{self.path}: {name}() has a layout that is not known here; try another llama.cpp version"
        )

    def _check_tensor_layout(self) -> None:
        """Builds a product and a view of it, and finds their parts where `TensorStruct` says they are."""
        context = self.ggml_init(InitParams(1 << 16, None, False))
        f32 = TYPE_IDS["F32"]
        w, x = self.ggml_new_tensor_2d(context, f32, 3, 5), self.ggml_new_tensor_2d(context, f32, 3, 7)
        y = self.ggml_mul_mat(context, w, x)
        view = self.ggml_reshape_1d(context, y, 35)
        address = functools.partial(ctypes.cast, typ=ctypes.c_void_p)
        found = [list(y[0].ne), list(y[0].nb), y[0].type, self.ggml_op_name(y[0].op), y[0].data]
        found += [y[0].src[0], y[0].src[1], view[0].src[0], view[0].view_src]
        expected = [[5, 7, 1, 1], [4, 20, 140, 140], f32, b"MUL_MAT", self.ggml_get_data(y)]
        expected += [address(tensor).value for tensor in (w, x, y, y)]
        self.ggml_free(context)
        if found != expected:
            raise BadInput(f"{self.path}: ggml_tensor has a layout that is not known here")


def _open(path: Path) -> ctypes.CDLL:
    """dlopen, after the libggml*.so beside it where the library cannot find them by itself."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else a failed assertion in C starts a debugger
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        reason = error
    siblings = list(path.parent.glob("libggml*.so"))
    kept = []  # while these are open, the names that libllama needs are already loaded
    while siblings:
        opened = [s for s in siblings if (handle := _try_open(s)) and not kept.append(handle)]
        if not opened:
            break
        siblings = [s for s in siblings if s not in opened]
    if kept and (library := _try_open(path)):
        return library
    raise BadInput(f"{path}: cannot load it as a llama.cpp library ({reason})")


def _try_open(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _wheel_library() -> Path:
    """The extension module of the xllamacpp wheel, which exports llama.cpp's C API; it is not imported."""
    spec = importlib.util.find_spec("xllamacpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("xllamacpp*.so")):
            return file
    raise BadInput("llama.cpp is not installed: `pip install xllamacpp`, or name a libllama.so with --lib")


def library(lib: str | os.PathLike[str] | None = None) -> Library:
    """The llama.cpp of the xllamacpp wheel, or the one at path `lib`; loaded once a process."""
    path = Path(lib).absolute() if lib else _wheel_library()
    if not path.is_file():
        raise BadInput(f"--lib {path}: no such file; expected llama.cpp's libllama.so")
    return _library(path)


@functools.cache
def _library(path: Path) -> Library:
    return Library(path)


def to_float(qtype: str, blocks: np.ndarray, *, lib: str | None = None) -> np.ndarray:
    """Decodes by ggml's own reference: blocks uint8 (..., row_bytes) -> f32 (..., elements)."""
    ggml = library(lib)
    blocks = np.ascontiguousarray(blocks, np.uint8)
    elements, size = ggml.block_size(qtype)
    if blocks.shape[-1] % size:
        raise BadInput(f"{qtype}: rows of {blocks.shape[-1]} bytes are not whole blocks of {size}")
    if qtype == "F32":  # the one type without a decoder
        return blocks.view(np.float32)
    out = np.empty((*blocks.shape[:-1], blocks.shape[-1] // size * elements), np.float32)
    decode = ToFloat(ggml.ggml_get_type_traits(ggml.type_id(qtype))[0].to_float)
    if out.size:
        decode(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def quantize(rows: np.ndarray, qtype: str, *, lib: str | None = None) -> np.ndarray:
    """Packs by llama.cpp's own quantiser: f32 (n, k) -> uint8 (n, row_bytes).

    Every type of a GGUF file can be made; those that demand an importance matrix get a uniform one.
    The call releases the GIL: several threads can quantise different rows at once.
    """
    ggml = library(lib)
    number = ggml.type_id(qtype)
    rows = np.ascontiguousarray(rows, np.float32)
    n, k = rows.shape
    elements, size = ggml.block_size(qtype)
    if k % elements:
        raise BadInput(f"{qtype}: rows of {k} elements are not whole blocks of {elements}")
    out = np.empty((n, k // elements * size), np.uint8)
    importance = np.ones(k, np.float32) if ggml.ggml_quantize_requires_imatrix(number) else None
    pointer = importance.ctypes.data if importance is not None else None
    ggml.ggml_quantize_chunk(number, rows.ctypes.data, out.ctypes.data, 0, n, k, pointer)
    return out
