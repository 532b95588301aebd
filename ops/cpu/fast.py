"""The fast mode of the compiled kernels, as an implementation of its own: chosen by name, never by "auto".

Products with weights of the formats that `cpu.rounds` names take their activations in 8 bits; everything else is
the exact implementation's, to the bit.
"""

from __future__ import annotations

import functools

from scarlet_jax.ops import cpu
from scarlet_jax.ops.cpu.mixers import attention, delta_net  # noqa: F401

qmatmul = functools.partial(cpu.qmatmul, fast=True)
qmatmul_many = functools.partial(cpu.qmatmul_many, fast=True)
qmatmul_experts = functools.partial(cpu.qmatmul_experts, fast=True)
ffn = functools.partial(cpu.ffn, fast=True)
ffn_experts = functools.partial(cpu.ffn_experts, fast=True)


def unavailable() -> str | None:
    """Why the mode cannot run here, in a line; None if it can."""
    if reason := cpu.unavailable():
        return reason
    if not cpu.rounds("Q4_K"):  # every processor with the mode has it for this format
        return f"the fast mode needs AVX-512 VNNI; the kernels run on {cpu.isa()} here"
    return None
