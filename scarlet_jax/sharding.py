"""Tensor parallelism: one model over many devices, each with its share of heads, experts, columns and vocabulary.

Every device runs the very functions that one device runs, with a config of fewer heads and weights of fewer rows
(`jax.shard_map`); kernels see whole, smaller matrices. The two projections that end a block are split by columns,
so that each of them is a sum over the devices; the embedding is one more, and the logits are joined. Nothing else
crosses between devices, no weight ever does. How a weight is cut is said here alone, for each kind of layer.

A cut of an axis is an int array (devices, n): the places that each device holds, -1 for none. Cuts go between
whole quant blocks. Where a number does not divide, all but the last devices take one more, and what is missing is
filled up with zeros, which add nothing. Key heads of which there are fewer than devices are held by several.
What can be cut nowhere (blocks that span key heads in another order) every device holds and computes whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scarlet_jax import attention, config, delta_net
from scarlet_jax.errors import BadInput
from scarlet_jax.ops import implementations
from scarlet_jax.ops.qtensor import QTensor, block_size
from scarlet_jax.ops.shares import AXIS, Experts, Stacked, Summed

# How an array lies on the mesh: whole on every device, or cut along its second or third axis.
WHOLE: Any = P()
_SECOND: Any = P(None, AXIS)
_THIRD: Any = P(None, None, AXIS)


def mesh_of(devices: int | Mesh) -> Mesh:
    """The mesh of one axis that a model is spread over: the first so many devices, or all of any mesh in order."""
    if isinstance(devices, Mesh):
        return Mesh(devices.devices.ravel(), (AXIS,))
    found = jax.devices()
    if not 1 <= devices <= len(found):
        raise BadInput(f"devices is {devices}, expected 1 to {len(found)}, as many as JAX finds here")
    return Mesh(np.array(found[:devices]), (AXIS,))


# --- cuts ---------------------------------------------------------------------------------------------------


class Grouped(NamedTuple):
    """Cuts of heads of two kinds, of which each of the first (`keys`) is read by several of the second."""

    keys: np.ndarray
    readers: np.ndarray


def _even(count: int, parts: int, unit: int = 1) -> np.ndarray:
    """A run of whole units for each device, as long on every one; the last ones may go short."""
    size = -(-count // (unit * parts)) * unit
    places = np.arange(parts * size).reshape(parts, size)
    return np.where(places < count, places, -1)


def _widened(cut: np.ndarray, width: int, start: int = 0) -> np.ndarray:
    """A cut of heads as one of their elements, `width` each, the first of them at `start`."""
    places = start + cut[..., None] * width + np.arange(width)
    return np.where(cut[..., None] < 0, -1, places).reshape(len(cut), -1)


def _grouped(keys: int, readers_each: int, unit: int, parts: int) -> Grouped:
    """Cut so that readers go with their key, in aligned runs of `unit` readers; reader i reads key i div each."""
    run = math.lcm(unit, readers_each)  # the fewest readers that are whole units and whole groups
    if parts <= keys * readers_each // run or readers_each % unit or readers_each == unit:
        cut = _even(keys, parts, run // readers_each)
        return Grouped(cut, _widened(cut, readers_each))
    sharing = min(max(1, parts // keys), readers_each // unit)  # devices that hold the same key
    of_a_key = _even(readers_each, sharing, unit)
    key = np.arange(parts) // sharing
    held = key < keys
    readers = of_a_key[np.arange(parts) % sharing]
    readers = np.where(held[:, None] & (readers >= 0), key[:, None] * readers_each + readers, -1)
    return Grouped(np.where(held, key, -1)[:, None], readers)


def _tiled(keys: int, readers_each: int, unit: int, parts: int) -> Grouped | None:
    """The same where reader i reads key i mod `keys`; None if the runs do not fit in with that order."""
    if keys % unit:
        return _grouped(keys, readers_each, unit, parts) if keys == 1 else None
    runs = keys // unit
    sharing = min(max(1, parts // runs), readers_each)
    key = _even(keys, -(-parts // sharing), unit)[np.arange(parts) // sharing]
    turn = _even(readers_each, sharing)[np.arange(parts) % sharing]
    readers = np.where(
        (turn[:, :, None] < 0) | (key[:, None] < 0), -1, turn[:, :, None] * keys + key[:, None]
    )
    return Grouped(key, readers.reshape(parts, -1))


# --- how each kind of layer is cut ----------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a layer is cut: its config on each device, its weights' rows and columns, and a mixer's state.

    A weight in neither dict is held whole. `shares`: what a weight's part is, of `ops.shares`.
    """

    config: Any
    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    shares: dict[str, Callable]
    state: Any = None  # a PartitionSpec for each array


def _attention(cfg: config.Attention, w: attention.Weights, parts: int) -> Plan:
    unit = _heads_a_block(w.attn_output, cfg.key_length)
    keys, queries = _grouped(cfg.head_count_kv, cfg.head_count // cfg.head_count_kv, unit, parts)
    dim = cfg.key_length
    local = dataclasses.replace(cfg, head_count=queries.shape[1], head_count_kv=keys.shape[1])
    rows = {
        "attn_q": _widened(queries, dim * (2 if cfg.gated else 1)),
        "attn_k": _widened(keys, dim),
        "attn_v": _widened(keys, dim),
    }
    columns = {"attn_output": _widened(queries, dim)}
    return Plan(local, rows, columns, {"attn_output": Summed}, attention.State(k=_THIRD, v=_THIRD))


def _delta_net(cfg: config.DeltaNet, w: delta_net.Weights, parts: int) -> Plan:
    """The convolution's channels are queries, keys and values, one after another: each is cut by its heads."""
    unit = _heads_a_block(w.ssm_out, cfg.state_size)
    cut = _tiled if cfg.head_mapping == "tile" else _grouped
    heads = cut(cfg.group_count, cfg.time_step_rank // cfg.group_count, unit, parts)
    if heads is None:
        logging.warning(
            "delta net: a block of ssm_out spans heads of different keys: every device holds it whole"
        )
        return Plan(cfg, {}, {}, {}, delta_net.State(WHOLE, WHOLE))
    keys, values = heads
    dim = cfg.state_size
    channels = np.concatenate(
        [
            _widened(keys, dim),
            _widened(keys, dim, start=cfg.key_dim),
            _widened(values, dim, start=2 * cfg.key_dim),
        ],
        axis=1,
    )
    rows = {"attn_qkv": channels, "ssm_conv1d": channels, "attn_gate": _widened(values, dim)}
    rows |= dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_dt_bias", "ssm_a"), values)
    local = dataclasses.replace(cfg, group_count=keys.shape[1], time_step_rank=values.shape[1])
    columns = {"ssm_out": _widened(values, dim)}
    state = delta_net.State(conv=_THIRD, memory=_SECOND)
    return Plan(local, rows, columns, {"ssm_out": Summed}, state)


def _dense(cfg: config.Dense, w: Any, parts: int) -> Plan:
    inner = _even(cfg.feed_forward_length, parts, _block_elements(w.ffn_down))
    local = config.Dense(inner.shape[1])
    return Plan(local, {"ffn_gate": inner, "ffn_up": inner}, {"ffn_down": inner}, {"ffn_down": Summed})


def _moe(cfg: config.MoE, w: Any, parts: int) -> Plan:
    """Experts go whole to a device each (rows of a stack are experts); the shared one is cut like a dense one."""
    experts = _even(cfg.expert_count, parts)
    rows = {"ffn_gate_exps": experts, "ffn_up_exps": experts, "ffn_down_exps": experts}
    shares: dict[str, Callable] = {
        "ffn_gate_exps": Experts,
        "ffn_up_exps": Experts,
        "ffn_down_exps": lambda part: Summed(Experts(part)),
    }
    if not cfg.expert_shared_feed_forward_length:
        return Plan(cfg, rows, {}, shares)
    inner = _even(cfg.expert_shared_feed_forward_length, parts, _block_elements(w.ffn_down_shexp))
    local = dataclasses.replace(cfg, expert_shared_feed_forward_length=inner.shape[1])
    rows |= {"ffn_gate_shexp": inner, "ffn_up_shexp": inner}
    return Plan(local, rows, {"ffn_down_shexp": inner}, shares | {"ffn_down_shexp": Summed})


_PLANS: dict[type, Callable[[Any, Any, int], Plan]] = {
    config.Attention: _attention,
    config.DeltaNet: _delta_net,
    config.Dense: _dense,
    config.MoE: _moe,
}


def _block_elements(w: Any) -> int:
    return block_size(w.qtype)[0] if isinstance(w, QTensor) else 1


def _heads_a_block(w: Any, dim: int) -> int:
    """The fewest heads whose columns are whole blocks."""
    block = _block_elements(w)
    return block // math.gcd(block, dim)


# --- weights on their devices -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spread:
    """A model over a mesh: its config on each device, its weights, and where they and its state lie.

    `weights` are global arrays of which each device holds, and each process reads, its own part. `specs` is the
    same pytree of PartitionSpecs; `state` is one for `forward.State.blocks`.
    """

    mesh: Mesh
    config: config.Config
    weights: Any
    state: tuple[Any, ...]

    @property
    def specs(self) -> Any:
        """The PartitionSpec of each array of the weights."""
        return jax.tree.map(_spec, self.weights)

    def program(self, function: Callable, takes: Any, gives: Any, **options: Any) -> Callable:
        """`function` compiled to run on every device at once; `takes` and `gives` are PartitionSpecs."""
        run = jax.shard_map(function, mesh=self.mesh, in_specs=takes, out_specs=gives, check_vma=False)
        return jax.jit(run, **options)

    def prepared(self, implementation: str) -> Spread:
        """With packed weights as the implementation wants them, rearranged by each device for itself."""

        def on_each(prepare: Callable, w: QTensor) -> Any:
            bare = dataclasses.replace(w, scale=None, bias=None)
            spec = _spec(w.blocks)
            done = self.program(prepare, (spec,), spec)(bare)
            return dataclasses.replace(done, scale=w.scale, bias=w.bias)

        weights = implementations.prepared(self.weights, implementation, on_each)
        return dataclasses.replace(self, weights=weights)


def spread(weights: Any, cfg: config.Config, mesh: Mesh) -> Spread:
    """Cut a model's weights, arrays on the host (mapped from a file, say), and put each part on its device.

    Raises BadInput for a model with layers that nobody has said how to cut.
    """
    kinds = {type(part) for block in cfg.blocks for part in (block.mixer, block.ffn) if part}
    if unplanned := sorted(kind.__name__ for kind in kinds - set(_PLANS)):
        raise BadInput(f"mesh: {cfg.architecture} has layers that cannot be spread: {', '.join(unplanned)}")
    parts = mesh.devices.size
    place = functools.partial(_place, mesh=mesh)
    blocks, configs, states = [], [], []
    for w, block in zip(weights.blocks, cfg.blocks, strict=True):
        mixer = _PLANS[type(block.mixer)](block.mixer, w.mixer, parts)
        ffn = _PLANS[type(block.ffn)](block.ffn, w.ffn, parts)
        norms = jax.tree.map(place, dataclasses.replace(w, mixer=None, ffn=None))
        cut = dataclasses.replace(norms, mixer=_cut(w.mixer, mixer, mesh), ffn=_cut(w.ffn, ffn, mesh))
        blocks.append(cut)
        configs.append(dataclasses.replace(block, mixer=mixer.config, ffn=ffn.config))
        states.append(mixer.state)

    def table(w: Any) -> Stacked:
        return Stacked(_cut_weight(w, _even(cfg.vocabulary_size, parts), None, mesh), cfg.vocabulary_size)

    token_embd = table(weights.token_embd)
    output = token_embd if weights.output is weights.token_embd else table(weights.output)
    whole = dataclasses.replace(
        weights,
        token_embd=token_embd,
        blocks=tuple(blocks),
        output_norm=place(weights.output_norm),
        output=output,
    )
    return Spread(mesh, dataclasses.replace(cfg, blocks=tuple(configs)), whole, tuple(states))


def _cut(w: Any, plan: Plan, mesh: Mesh) -> Any:
    """A layer's Weights by its plan."""
    fields = {field.name: getattr(w, field.name) for field in dataclasses.fields(w)}
    for name, weight in fields.items():
        if weight is not None:
            part = _cut_weight(weight, plan.rows.get(name), plan.columns.get(name), mesh)
            fields[name] = plan.shares.get(name, lambda part: part)(part)
    return type(w)(**fields)


def _cut_weight(w: Any, rows: np.ndarray | None, columns: np.ndarray | None, mesh: Mesh) -> Any:
    """A matrix, or a stack of them (whose rows are matrices), in parts; its own scale and bias with it."""
    if not isinstance(w, QTensor):
        return _place(w, rows, columns, mesh=mesh)
    experts = len(w.shape) > 2
    return QTensor(
        _place(w.blocks, rows, _in_bytes(columns, w), mesh=mesh),
        w.qtype,
        None if w.scale is None else _place(w.scale, rows if experts else None, mesh=mesh),
        None if w.bias is None else _place(w.bias, rows, mesh=mesh),
    )


def _in_bytes(columns: np.ndarray | None, w: QTensor) -> np.ndarray | None:
    """A cut of columns as one of the bytes of a packed row: whole blocks, by construction."""
    if columns is None:
        return None
    elements, size = block_size(w.qtype)
    firsts = columns.reshape(len(columns), -1, elements)[..., 0]
    return _widened(np.where(firsts < 0, -1, firsts // elements), size)


def _place(
    whole: Any, rows: np.ndarray | None = None, columns: np.ndarray | None = None, *, mesh: Mesh
) -> jax.Array:
    """An array of the host, cut along its first axis or its last, or whole on every device."""
    whole = np.asarray(whole)
    cut, axis = (rows, 0) if rows is not None else (columns, whole.ndim - 1)
    shape = list(whole.shape)
    if cut is not None:
        shape[axis] = cut.size
    sharding = NamedSharding(mesh, WHOLE if cut is None else P(*[None] * axis, AXIS))

    def part(index: Any) -> np.ndarray:
        return whole[index] if cut is None else _taken(whole, cut.ravel()[index[axis]], axis)

    return jax.make_array_from_callback(tuple(shape), sharding, part)


def _taken(whole: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Some places along an axis, by runs, which are quicker to copy; zeros for -1."""
    follows = np.where(places[:-1] < 0, places[1:] < 0, places[1:] == places[:-1] + 1)
    pieces = []
    for run in np.split(places, np.flatnonzero(~follows) + 1):
        index: list[Any] = [slice(None)] * whole.ndim
        index[axis] = slice(int(run[0]), int(run[-1]) + 1) if run[0] >= 0 else np.zeros(len(run), int)
        piece = whole[tuple(index)]
        pieces.append(piece if run[0] >= 0 else np.zeros_like(piece))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=axis)


def _spec(array: Any) -> P:
    return array.sharding.spec
