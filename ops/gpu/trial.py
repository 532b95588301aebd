"""Whether the kernels are right on the device at hand: a small one of each kind, against plain XLA."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from scarlet_jax.ops import attention, gated_delta
from scarlet_jax.ops.gpu import mixers, products
from scarlet_jax.ops.gpu.planes import pack
from scarlet_jax.ops.qtensor import QTensor


@functools.cache
def trial() -> str | None:
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


_TYPES = (("Q8_0", 2 * 34), ("Q4_0", 2 * 18))  # and bytes of a row of 64


def _samples() -> Iterator[tuple[Callable, Callable, tuple]]:
    """A kernel, the same in plain XLA, and arguments for both."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    w, other = (pack(QTensor(rng.integers(0, 256, (64, n), np.uint8) & 0x3F, t)) for t, n in _TYPES)
    for rows in (1, products.FEW + 1):
        yield products.qmatmul, products.elsewhere, (normal(rows, w.shape[1]), w)
    yield (
        products.qmatmul_many,
        lambda x, ws: [products.elsewhere(x, w) for w in ws],
        (normal(1, w.shape[1]), (w, other)),
    )
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
