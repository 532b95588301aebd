"""Pallas kernels for GPUs: products with packed weights, read as planes (`planes`), and those of the mixers.

A peer of `ops.portable` behind `ops.matmul`. A weight may come packed as in the file, and is then rearranged on
every call: for tests. `prepare` does it once, at load time. What is no packed weight, and what runs where Pallas
has no GPU (a TPU among others), is plain XLA.

No figure of these kernels has been measured yet on a GPU. Until they
have given the right answer once on the device at hand, `unavailable()` keeps them out of the way.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from scarlet_jax.ops import attention, gated_delta, portable
from scarlet_jax.ops.gpu import mixers, products
from scarlet_jax.ops.gpu.backend import CUSTOM_CALL, mode, needs_gpu_here  # noqa: F401
from scarlet_jax.ops.gpu.mixers import attend, delta_rule  # noqa: F401
from scarlet_jax.ops.gpu.planes import LAYOUTS, Planes, pack
from scarlet_jax.ops.qtensor import QTensor

Weight = jax.Array | np.ndarray | QTensor | Planes


def unavailable() -> str | None:
    """Why the kernels cannot run here, in a line; None if they can."""
    if not needs_gpu_here():
        return None
    if jax.default_backend() != "gpu":
        return f"the default device is a {jax.default_backend()}"
    return _trial()


@functools.cache
def _trial() -> str | None:
    """Compile and run one kernel of each kind: what a device does not support is learnt before a model is loaded.

    In a thread of its own: whoever asks may be tracing a program, and would trace the kernels into it.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, _try).result()


def _try() -> str | None:
    for kernel, elsewhere, arguments in _samples():
        try:
            got, expected = jax.jit(kernel)(*arguments), elsewhere(*arguments)
        except Exception as error:  # compilers raise what they like
            return f"the kernels do not compile: {str(error).strip().splitlines()[0][:200]}"
        for ours, truth in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            if not np.allclose(ours, truth, rtol=1e-4, atol=1e-3 * float(jnp.abs(truth).max())):
                return "the kernels give wrong results on this device"
    return None


def _samples() -> Iterator[tuple[Callable, Callable, tuple]]:
    """A kernel, the same in plain XLA, and arguments for both."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    w = pack(QTensor(rng.integers(0, 256, (64, 2 * 34), np.uint8) & 0x3F, "Q8_0"))
    for rows in (1, products.FEW + 1):
        yield products.qmatmul, products.elsewhere, (normal(rows, w.shape[1]), w)
    for tokens, rule in ((1, gated_delta.recurrent), (mixers.FEW + 1, gated_delta.chunked)):
        q, k, v = (0.1 * normal(1, tokens, 2, 32) for _ in range(3))
        gates = -np.abs(normal(1, tokens, 2)), 1 / (1 + normal(1, tokens, 2) ** 2)
        yield mixers.delta_rule, rule, (q, k, v, *gates, normal(1, 2, 32, 32))
    scale, position = 0.2, np.array([[77]], np.int32)
    cache = normal(1, 128, 2, 32), normal(1, 128, 2, 32)
    yield (
        functools.partial(mixers.attend, scale=scale),
        lambda q, k, v, at: attention.mix(attention.softmax(attention.scores(q, k), at, scale), v),
        (normal(1, 1, 4, 32), *cache, position),
    )


def prepare(w: QTensor) -> QTensor | Planes:
    """Packed blocks as planes; what is a QTensor only for its scale or bias, floats, as it is."""
    return _pack(w) if w.qtype in LAYOUTS else w


_pack = jax.jit(pack)


def qmatmul(x: jax.Array, w: Weight) -> jax.Array:
    """`x @ w.T`: f32 (..., in), (out, in) of any kind -> f32 (..., out), without `w.scale`."""
    if isinstance(w, QTensor):
        w = prepare(w)
    return products.qmatmul(x, w) if isinstance(w, Planes) else portable.qmatmul(x, w)
