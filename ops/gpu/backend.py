"""Which Pallas backend compiles the kernels: the one place that knows.

Today Triton, for CUDA and ROCm. It is deprecated from jax 0.11 on; Mosaic GPU takes its place here, and the
kernels, which index references and use plain jnp, stay. Without a GPU, `mode` runs them on a CPU.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

PLATFORMS = ("cuda", "rocm")

# What `jax.export` has to be told: the text of a Triton call is not promised to hold across versions of jax.
CUSTOM_CALL = "__gpu$xla.gpu.triton"

# The GPU that programs for "elsewhere" are lowered for: jax 0.12 asks which, 0.10 does not.
ELSEWHERE = {"device_kind": "NVIDIA H100", "num_cores": 132, "platform": "gpu"}

_mode: contextvars.ContextVar[str] = contextvars.ContextVar("mode", default="compiled")


@contextlib.contextmanager
def mode(name: Literal["compiled", "interpreted", "elsewhere"]) -> Iterator[None]:
    """How kernels that are traced within will run; a jitted function remembers the mode of its first trace.

    "interpreted": step by step in plain XLA, on any device, for tests. "elsewhere": compiled, on a GPU that
    need not be here, for `jax.export`.
    """
    token = _mode.set(name)
    try:
        with _described_gpu() if name == "elsewhere" else contextlib.nullcontext():
            yield
    finally:
        _mode.reset(token)


def _described_gpu() -> contextlib.AbstractContextManager:
    """What tells jax of a GPU that is not here."""
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(**ELSEWHERE))
    return jax.sharding.use_abstract_mesh(mesh)


def interpreting() -> bool:
    """Whether kernels run without a GPU."""
    return _mode.get() == "interpreted"


def needs_gpu_here() -> bool:
    """Whether kernels are for the machine at hand, compiled."""
    return _mode.get() == "compiled"


def call(
    kernel: Callable, *, grid: tuple[int, ...], out: Any, warps: int = 4, stages: int = 2, **options: Any
):
    """`pallas_call` on whole arrays: the kernel cuts its own tiles out of references to them."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out,
        interpret=interpreting(),
        compiler_params=None if interpreting() else triton.CompilerParams(num_warps=warps, num_stages=stages),
        **options,
    )


def on_gpu(kernel: Callable, elsewhere: Callable, *arguments: Any) -> Any:
    """`kernel(*arguments)` where the program runs on a GPU (or is interpreted), else `elsewhere`.

    Decided when a program is lowered, so that one trace exports to any platform.
    """
    if interpreting():
        return kernel(*arguments)
    return jax.lax.platform_dependent(*arguments, **dict.fromkeys(PLATFORMS, kernel), default=elsewhere)
