"""mamba2: a Mamba-2 mixer in every layer and nothing else."""

from __future__ import annotations

from scarlet_jax.config import Block, Mamba2, Metadata
from scarlet_jax.configs import common


def block(meta: Metadata, _i: int) -> Block:
    """Every layer, from the keys under `mamba2.`."""
    cfg = mixer(meta, "mamba2")
    return Block(cfg, None, cfg.layer_norm_rms_epsilon)


def mixer(meta: Metadata, name: str, *, norm: bool = True) -> Mamba2:
    """The Mamba-2 mixers of an architecture."""
    sizes = ("conv_kernel", "inner_size", "state_size", "group_count", "time_step_rank")
    values = {size: meta.integer(f"{name}.ssm.{size}") for size in sizes}
    for size in sizes:
        meta.require(values[size] > 0, f"{name}.ssm.{size}", "1 or more")
    heads, groups = values["time_step_rank"], values["group_count"]
    meta.require(
        heads % groups == 0, f"{name}.ssm.time_step_rank", f"a multiple of ssm.group_count, {groups}"
    )
    meta.require(
        values["inner_size"] % heads == 0,
        f"{name}.ssm.inner_size",
        f"a multiple of ssm.time_step_rank, {heads}",
    )
    eps = meta.number(f"{name}.attention.layer_norm_rms_epsilon")
    return Mamba2(**values, layer_norm_rms_epsilon=eps, norm=norm)


ARCH = common.arch("mamba2", block)
