"""From a GGUF file to a Model: tensors become weight pytrees, by the file's own names.

A weight keeps the bytes of the file. Where the memory map is aligned for XLA (64 bytes) the array is the
map itself; elsewhere it is copied once, on a CPU into huge pages, and the map's pages are given back.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scarlet_jax import compiled, configs, gguf, huge_pages, memory, mtp, sharding
from scarlet_jax.config import Arch, Block, Config
from scarlet_jax.errors import BadInput
from scarlet_jax.forward import FEED_FORWARDS, MIXERS, BlockWeights, Weights
from scarlet_jax.model import Model
from scarlet_jax.ops.qtensor import QTensor
from scarlet_jax.types import Weight

FLOATS = ("F32", "F16", "BF16")  # held as plain arrays; every other type stays packed

Rows = slice | np.ndarray  # of a matrix: a view of the file, or row numbers, which cost a copy


def load(path: str | Path, *, mesh: int | Mesh = 1, **options: Any) -> Model:
    """Load a GGUF of one of `configs.ARCHITECTURES` (the first file of a split set too).

    `mesh`: how many devices share the model, or which (`scarlet_jax.sharding`); each gets its own part of the
    weights straight from the file. Other options are Model's: `context_length`, `kv_dtype`, `implementation`.
    Raises BadInput for a file that is broken, of an unknown architecture, or whose tensors are not all there and
    of the right shape.
    """
    compiled.keep()
    file = gguf.read(path)
    arch = configs.find(file.architecture)
    cfg = arch.config(file.metadata)
    _check_room(file, arch, cfg, mesh)
    if mesh == 1 and jax.default_backend() == "cpu":
        return Model(file, cfg, weights(file, arch, cfg), **options)
    among = None if mesh == 1 else sharding.mesh_of(mesh)
    model = Model(file, cfg, weights(file, arch, cfg, mapped=True), mesh=among, **options)
    for tensor in file.tensors.values():
        tensor.release()
    return model


def _check_room(file: gguf.Gguf, arch: Arch, cfg: Config, mesh: int | Mesh) -> None:
    """BadInput, with the numbers, for weights that the devices cannot hold: before the first of them is read."""
    devices = sharding.mesh_of(mesh).devices.ravel()
    limit = memory.limit_of(next(d for d in devices if d.process_index == jax.process_index()))
    if limit is None:
        return
    held = memory.weight_bytes(weights(file, arch, cfg, mapped=True), planes=devices[0].platform == "gpu")
    what = f"{file.path}: the memory of {len(devices)} {devices[0].platform} device(s)"
    memory.check(memory.Need(held, 0, 0), limit * len(devices), what)


def weights(file: gguf.Gguf, arch: Arch, cfg: Config, *, mapped: bool = False) -> Weights:
    """The weight pytree of a Config; one BadInput lists every missing, misshapen or unknown tensor.

    `mapped`: as arrays of the host that lie in the mapped file, not yet read.
    """
    tensors = _Tensors(file, arch, mapped)
    table = (cfg.vocabulary_size, cfg.embedding_length)
    token_embd = tensors.weight("token_embd.weight", table, biased=False)
    trunk = Weights(
        token_embd=token_embd,
        blocks=tuple(_block(tensors, i, block, cfg.embedding_length) for i, block in enumerate(cfg.blocks)),
        output_norm=tensors.array("output_norm.weight", (cfg.embedding_length,)),
        output=tensors.weight("output.weight", table) if "output.weight" in file.tensors else token_embd,
    )
    nextn = tuple(_predictor(tensors, i, cfg, trunk) for i in range(len(cfg.nextn)))
    tensors.finish(arch.ignored)
    return dataclasses.replace(trunk, nextn=nextn)


def _predictor(tensors: _Tensors, number: int, cfg: Config, trunk: Weights) -> Weights:
    """A prediction block, with the trunk's embedding, norm and head where it has none of its own."""
    index, width = len(cfg.blocks) + number, cfg.embedding_length
    prefix, table = f"blk.{index}.nextn.", (cfg.vocabulary_size, width)

    def own(name: str, take: Callable[..., Any], *how: Any, otherwise: Any) -> Any:
        return take(prefix + name, *how) if tensors.has(prefix + name) else otherwise

    return Weights(
        token_embd=own("embed_tokens.weight", tensors.weight, table, otherwise=trunk.token_embd),
        blocks=(_block(tensors, index, cfg.nextn[number], width),),
        output_norm=own("shared_head_norm.weight", tensors.array, (width,), otherwise=trunk.output_norm),
        output=own("shared_head_head.weight", tensors.weight, table, otherwise=trunk.output),
        join=tensors.group(prefix, mtp, None, width),
    )


def _block(tensors: _Tensors, index: int, cfg: Block, width: int) -> BlockWeights:
    mixer, prefix = MIXERS[type(cfg.mixer)], f"blk.{index}."
    norm = tensors.array(f"{prefix}attn_norm.weight", (width,))
    weights = BlockWeights(norm, tensors.group(prefix, mixer, cfg.mixer, width))
    if cfg.ffn is None:
        return weights
    ffn = FEED_FORWARDS[type(cfg.ffn)]
    return dataclasses.replace(
        weights,
        post_attention_norm=tensors.array(f"{prefix}post_attention_norm.weight", (width,)),
        ffn=tensors.group(prefix, ffn, cfg.ffn, width),
    )


class _Tensors:
    """The tensors of a file, taken by name and shape; remembers what was wrong and what was left over.

    A tensor that is missing or misshapen comes out as None, and `finish` raises.
    """

    def __init__(self, file: gguf.Gguf, arch: Arch, mapped: bool) -> None:
        self._file = file
        self._mapped = mapped
        self._room = huge_pages.Room()
        self._names, self._joined = arch.names, arch.joined
        self._unused = set(file.tensors)
        self._problems: list[str] = []

    def group(self, prefix: str, module: Any, cfg: Any, width: int) -> Any:
        """A mixer's or network's Weights: fields annotated Weight as stored, any others in f32."""
        shapes = module.shapes(cfg, width)
        joined = {**_consecutive(module.FUSED, shapes), **self._joined(cfg)}
        taken = self._split_joined(prefix, joined, shapes)
        kinds = {field.name: field.type for field in dataclasses.fields(module.Weights)}
        for name, shape in shapes.items():
            if (field := _field(name)) not in taken:
                take = self.weight if kinds[field].startswith("Weight") else self.array
                taken[field] = take(prefix + name, shape)
        return module.Weights(**taken)

    def _split_joined(self, prefix: str, joined: Mapping[str, Any], shapes: dict) -> dict[str, Weight]:
        """Weights that the file stores in one tensor, cut apart: rows are whole blocks."""
        taken = {}
        for whole, parts in joined.items():
            if prefix + whole in self._file.tensors:
                *experts, _, columns = shapes[next(iter(parts))]
                shape = (*experts, sum(shapes[part][-2] for part in parts), columns)
                for part, rows in parts.items():
                    taken[_field(part)] = self.weight(prefix + whole, shape, rows)
        return taken

    def weight(self, name: str, shape: tuple[int, ...], rows: Rows = slice(None), biased: bool = True) -> Any:
        """A matrix, or some rows of it, as the file stores it: floats as an array, any other type packed.

        A shape of three axes is a stack of experts' matrices, each cut alike. With the scale, or one an expert,
        and, if it may be `biased`, the bias that the file has beside it (experts' biases nobody adds: they
        are left over, and refused).
        """
        tensor = self._take(name, shape)
        if tensor is None:
            return None
        scale = self._beside(name, "scale", shape[:-2] or (1,))
        bias = self._beside(name, "bias", shape[:-1]) if biased and len(shape) == 2 else None
        if tensor.qtype in FLOATS and scale is None and bias is None:
            return self._place(tensor, tensor.array()[..., rows, :])
        bias = bias if bias is None else bias[rows]
        return QTensor(self._place(tensor, tensor.data[..., rows, :]), tensor.qtype, scale, bias)

    def array(self, name: str, shape: tuple[int, ...]) -> Any:
        """A vector or a small table, in f32."""
        tensor = self._take(name, shape)
        if tensor is None:
            return None
        if tensor.qtype not in FLOATS:
            self._problems.append(f"{name} is {tensor.qtype}, expected one of {', '.join(FLOATS)}")
            return None
        if self._mapped:
            return tensor.array().astype(np.float32)
        return jnp.asarray(tensor.array(), jnp.float32)

    def _place(self, tensor: gguf.Tensor, view: np.ndarray) -> Any:
        return view if self._mapped else _place(tensor, view, self._room)

    def _beside(self, name: str, kind: str, shape: tuple[int, ...]) -> jax.Array | None:
        """What is stored beside a weight, `X.scale` or `X.bias` for `X.weight`, or None."""
        other = f"{name.removesuffix('.weight')}.{kind}"
        return self.array(other, shape) if self.has(other) else None

    def has(self, name: str) -> bool:
        """Whether the file has it."""
        return self._file_name(name) in self._file.tensors

    def _file_name(self, name: str) -> str:
        """The file's own name of a tensor: where it differs from ours, it does so in every block."""
        within = re.sub(r"^blk\.\d+\.", "", name)
        return name.removesuffix(within) + self._names.get(within, within)

    def _take(self, name: str, shape: tuple[int, ...]) -> gguf.Tensor | None:
        name = self._file_name(name)
        tensor = self._file.tensors.get(name)
        self._unused.discard(name)
        if tensor is None:
            self._problems.append(f"{name} is missing")
        elif tensor.shape != shape:
            self._problems.append(f"{name} has shape {tensor.shape}, expected {shape}")
        else:
            return tensor
        return None

    def finish(self, ignored: tuple[str, ...]) -> None:
        """Raise BadInput if anything was wrong, or left over and not matched by `ignored`."""
        left = sorted(name for name in self._unused if not any(re.fullmatch(p, name) for p in ignored))
        problems = self._problems + [f"{name} is not a tensor of this architecture" for name in left]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise BadInput(f"{self._file.path}: {'; '.join(problems[:8])}{more}")


def _consecutive(
    fused: dict[str, tuple[str, ...]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, dict[str, Rows]]:
    """The rows of weights that follow each other in one tensor."""
    cuts = {whole: np.cumsum([0, *(shapes[part][-2] for part in parts)]) for whole, parts in fused.items()}
    return {
        whole: dict(zip(parts, map(slice, cuts[whole][:-1], cuts[whole][1:]), strict=True))
        for whole, parts in fused.items()
    }


def _field(name: str) -> str:
    """The field of a Weights that holds a tensor: `shortconv.conv.weight` -> `shortconv_conv`."""
    return name.removesuffix(".weight").replace(".", "_")


def _place(tensor: gguf.Tensor, view: np.ndarray, room: huge_pages.Room) -> jax.Array:
    """Hand a view of the memory map to JAX: in place if it can be, else by one copy."""
    on_cpu = jax.default_backend() == "cpu"
    of_the_file = np.may_share_memory(view, tensor.data) and view.flags.c_contiguous
    if on_cpu and of_the_file and view.ctypes.data % huge_pages.ALIGNMENT == 0:
        return jax.device_put(view)
    placed = jax.device_put(room.copy(view) if on_cpu else view).block_until_ready()
    tensor.release()
    return placed
