"""Architectures as data: one file each, found here under the name in `general.architecture`."""

from __future__ import annotations

from scarlet_jax.config import Arch
from scarlet_jax.configs import (
    falcon_h1,
    lfm2,
    llama,
    mamba2,
    qwen2,
    qwen3,
    qwen3moe,
    qwen3next,
    qwen35,
    qwen35moe,
)
from scarlet_jax.errors import BadInput

ARCHITECTURES: dict[str, Arch] = {
    module.ARCH.name: module.ARCH
    for module in (qwen35, qwen35moe, qwen3next, qwen3, qwen3moe, qwen2, llama, lfm2, mamba2, falcon_h1)
}


def find(name: str) -> Arch:
    """The architecture of that name, or BadInput saying which there are."""
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise BadInput(f"general.architecture: {name!r} is not supported; expected one of: {known}")
    return ARCHITECTURES[name]
