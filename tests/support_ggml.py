"""ggml's own operations, one at a time, on the CPU: the op that llama.cpp would run, with any arguments."""

from __future__ import annotations

import ctypes

import numpy as np

from scarlet_jax.tools.engines import ggml

_MODES = {"norm": 0, "neox": 2, "mrope": 8, "imrope": 40}
_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


def rope(x, positions, kind, rotary, sections, base, *, factor=1.0, yarn=False, context=0, table=None):
    """f32 (T, N, H), turned by int32 positions (4, T): `ggml_rope_multi`, or `ggml_rope_ext` without sections."""
    c = ggml.library()._c
    scaling = [_I(context), _F(base), _F(1 / factor), _F(yarn), _F(1), _F(32), _F(1)]
    T, N, H = x.shape

    def build(context):
        inputs = _tensor(c, context, 0, x, (H, N, T))
        at = positions if sections else positions[0]
        at = _tensor(c, context, 26, at.astype(np.int32), (at.size,))
        factors = _tensor(c, context, 0, table.astype(np.float32), table.shape) if table is not None else _P()
        split = [(_I * 4)(*sections)] if sections else []
        c.ggml_rope_multi.restype = c.ggml_rope_ext.restype = _P
        op = c.ggml_rope_multi if sections else c.ggml_rope_ext
        return _P(op(_P(context), inputs, at, factors, _I(rotary), *split, _I(_MODES[kind]), *scaling))

    return _computed(c, build, x.shape)


def _tensor(c, context, kind, values, dims):
    """A tensor of that type number and those dims, fast to slow, holding the values."""
    c.ggml_new_tensor.restype = c.ggml_get_data.restype = _P
    tensor = _P(c.ggml_new_tensor(_P(context), _I(kind), _I(len(dims)), (ctypes.c_int64 * len(dims))(*dims)))
    values = np.ascontiguousarray(values)
    ctypes.memmove(c.ggml_get_data(tensor), values.ctypes.data, values.nbytes)
    return tensor


def _computed(c, build, shape):
    """The value of the tensor that `build(context)` makes, f32 of that shape."""
    library = ggml.library()
    context = library.ggml_init(ggml.InitParams(1 << 24, None, False))
    try:
        result = build(context)
        c.ggml_new_graph.restype = _P
        graph = _P(c.ggml_new_graph(_P(context)))
        c.ggml_build_forward_expand(graph, result)
        assert c.ggml_graph_compute_with_ctx(_P(context), graph, _I(1)) == 0
        out = np.empty(shape, np.float32)
        ctypes.memmove(out.ctypes.data, c.ggml_get_data(result), out.nbytes)
        return out
    finally:
        library.ggml_free(context)
