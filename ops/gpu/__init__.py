"""Pallas kernels for GPUs: products with packed weights, read as planes (`planes`), and those of the mixers.

A peer of `ops.portable` behind `ops.matmul`. A weight may come packed as in the file, and is then rearranged on
every call: for tests. `prepare` does it once, at load time. What is no packed weight, and what runs where Pallas
has no GPU (a TPU among others), is plain XLA.

No figure of these kernels has been measured yet on a GPU. Until they
have given the right answer once on the device at hand, `unavailable()` keeps them out of the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from scarlet_jax.ops import portable
from scarlet_jax.ops.gpu import products
from scarlet_jax.ops.gpu.backend import CUSTOM_CALL, mode, needs_gpu_here  # noqa: F401
from scarlet_jax.ops.gpu.mixers import attend, delta_rule  # noqa: F401
from scarlet_jax.ops.gpu.planes import LAYOUTS, Planes, pack
from scarlet_jax.ops.gpu.trial import trial
from scarlet_jax.ops.qtensor import QTensor

Weight = jax.Array | np.ndarray | QTensor | Planes


def unavailable() -> str | None:
    """Why the kernels cannot run here, in a line; None if they can."""
    if not needs_gpu_here():
        return None
    if jax.default_backend() != "gpu":
        return f"the default device is a {jax.default_backend()}"
    return trial()


def prepare(w: QTensor) -> QTensor | Planes:
    """Packed blocks as planes; what is a QTensor only for its scale or bias, floats, as it is."""
    return _pack(w) if w.qtype in LAYOUTS else w


_pack = jax.jit(pack)


def qmatmul(x: jax.Array, w: Weight) -> jax.Array:
    """`x @ w.T`: f32 (..., in), (out, in) of any kind -> f32 (..., out), without `w.scale`."""
    return qmatmul_many(x, [w])[0]


def qmatmul_many(x: jax.Array, ws: Sequence[Weight]) -> list[jax.Array]:
    """`[qmatmul(x, w) for w in ws]`: with a few rows of x, all packed weights by one kernel."""
    ws = [prepare(w) if isinstance(w, QTensor) else w for w in ws]
    packed = iter(products.qmatmul_many(x, [w for w in ws if isinstance(w, Planes)]))
    return [next(packed) if isinstance(w, Planes) else portable.qmatmul(x, w) for w in ws]
