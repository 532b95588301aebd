"""What `test_sharding` runs in a process with eight simulated devices: one model spread over them, and alone."""

from __future__ import annotations

import dataclasses
import re

import jax
import models
import numpy as np
import pytest
from support import relative_l2

import scarlet_jax
from scarlet_jax import sharding
from scarlet_jax.errors import BadInput
from scarlet_jax.generate import generate
from scarlet_jax.programs import SpreadPrograms

# A residual stream summed over devices in another order: some f32 roundings (2^-24) a layer, of which a few
# layers make 1e-6. Two devices' terms taken for one, or a head read by the wrong one, cost 1e-2 and more.
TOLERANCE = 5e-6

FIRST_BLOCKS = {"block_count": 2, "full_attention_interval": 2, "nextn_predict_layers": 0}
SHAPES = {
    # Two key heads of the delta net, each held by four devices; six value heads, 128 wide and read in turns.
    "qwen35": dataclasses.replace(models.SHAPES["untied"], **FIRST_BLOCKS),
    # Eleven experts, of which the last devices have fewer or none; scales an expert.
    "qwen35moe": dataclasses.replace(models.MOE_SHAPES["experts-scaled"], **FIRST_BLOCKS),
    # Biases everywhere: those of summed products are added once.
    "llama": dataclasses.replace(models.DENSE_SHAPES["llama"], block_count=1),
}
# Blocks of 256 that hold two value heads of 128; three blocks of feed-forward network for two devices.
PACKED = dataclasses.replace(
    models.PACKABLE, block_count=2, head_count=4, head_count_kv=2, key_length=128, state_size=128, group_count=4,
    time_step_rank=8, feed_forward_length=768,
)  # fmt: skip


def compare(shape, quant: str, devices: int, implementation: str | None = None) -> list[scarlet_jax.Model]:
    """Prefill of two sequences of different lengths, and its last logits."""
    models_ = [
        scarlet_jax.load(models.path(shape, quant), mesh=mesh, implementation=implementation)
        for mesh in (1, devices)
    ]
    prompts = [models.tokens(shape, 7).tolist(), models.tokens(shape, 4).tolist()]
    (expected, one), (got, many) = (model.last_logits(prompts) for model in models_)
    assert relative_l2(got, expected) < TOLERANCE
    assert np.array_equal(one.length, many.length)
    return models_


def compare_decoding(alone: scarlet_jax.Model, spread: scarlet_jax.Model) -> None:
    """A prompt, and blocks of tokens made on the devices."""
    options = {"max_tokens": 7, "stop": (), "temperature": 1.0, "seed": 2, "block": 3}
    expected, got = (list(generate(model, [5, 3, 2], **options)) for model in (alone, spread))
    assert got == expected


@pytest.mark.parametrize("name", SHAPES)
def test_eight_devices_compute_what_one_does(name):
    pair = compare(SHAPES[name], "F32", 8)
    if name == "qwen35":
        compare_decoding(*pair)


def test_a_cache_grows_on_every_device():
    """Past the smallest cache's slots, by a prompt and by tokens made on the devices."""
    ids = models.tokens(SHAPES["llama"], 300)
    after, made = [], []
    for mesh in (1, 2):
        model = scarlet_jax.load(models.path(SHAPES["llama"]), mesh=mesh)
        _, state = model.last_logits(ids[:250])
        made.append(list(generate(model, ids[:250], max_tokens=20, stop=(), block=4)))
        after.append(model.last_logits(ids[250:], state)[0])
    assert relative_l2(after[1], after[0]) < TOLERANCE
    assert made[0] == made[1]


def test_positions_of_an_image_on_two_devices():
    """A prompt with a square of 3 x 3 in it, and text after it."""
    positions = np.concatenate([np.indices((1, 3, 3)).reshape(3, -1), np.full((3, 1), 3)], axis=1)
    ids, after = models.tokens(SHAPES["qwen35"], 10), []
    for mesh in (1, 2):
        model = scarlet_jax.load(models.path(SHAPES["qwen35"]), mesh=mesh)
        _, state = model.last_logits(ids, positions=positions)
        after.append(model.last_logits([5], state)[0])
    assert relative_l2(after[1], after[0]) < TOLERANCE


def test_packed_weights_are_cut_between_blocks():
    compare(PACKED, "Q4_K_M", 2)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cpu", "portable"])
@pytest.mark.parametrize("devices", [3, 8])
def test_every_shape(devices, implementation):
    for shape in [
        *models.SHAPES.values(),
        *models.DENSE_SHAPES.values(),
        *models.MOE_SHAPES.values(),
    ]:
        compare_decoding(*compare(shape, "F32", devices, implementation))
    for quant in ("Q4_K_M", "Q8_0"):
        compare(PACKED, quant, devices, implementation)
        compare(models.PACKABLE_EXPERTS, quant, devices, implementation)


def per_device(tree) -> list[int]:
    """Bytes that each device holds."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


def test_memory_is_divided():
    """A shape where all divides by eight: an eighth on each, but for the norms, which every device has."""
    shape = dataclasses.replace(
        SHAPES["qwen35"], vocab_size=344, head_count=16, head_count_kv=8, group_count=8, time_step_rank=16,
        feed_forward_length=160,
    )  # fmt: skip
    model = scarlet_jax.load(models.path(shape), mesh=8)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(scarlet_jax.load(models.path(shape)).weights))
    norms = 4 * (5 * shape.embedding_length + 2 * shape.key_length + shape.state_size)
    assert set(per_device(model.weights)) == {(whole - norms) // 8 + norms}
    state = jax.tree.leaves(scarlet_jax.load(models.path(shape)).init_state(3, 256).blocks)
    assert set(per_device(model.init_state(3, 256).blocks)) == {sum(leaf.nbytes for leaf in state) // 8}


def test_a_tied_head_is_held_once():
    model = scarlet_jax.load(models.path(models.DENSE_SHAPES["llama-tied"]), mesh=2)
    assert model.weights.output.part is model.weights.token_embd.part


def collectives(program, *arguments) -> list[tuple[str, int]]:
    """Each collective of a compiled program, and the elements of its result."""
    text = program.lower(*arguments).compile().as_text()
    found = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (all-[\w-]+|collective-[\w-]+|reduce-scatter)\(", text)
    return sorted((kind, int(np.prod([int(n) for n in sizes.split(",")]))) for sizes, kind in found)


def test_no_weight_crosses_between_devices():
    """A sum of activations for the embedding, and one for each half of a block; the logits are joined."""
    shape = SHAPES["qwen35"]
    model = scarlet_jax.load(models.path(shape), mesh=8)
    programs = model.programs
    assert isinstance(programs, SpreadPrograms)
    tokens, count = np.zeros((1, 4), np.int32), np.array([4], np.int32)
    trunk = collectives(programs._trunk, model.weights, tokens, count, model.init_state(), None)
    assert trunk == [("all-reduce", 4 * shape.embedding_length)] * (1 + 2 * shape.block_count)
    hidden = np.zeros((1, shape.embedding_length), np.float32)
    head = collectives(programs._head, model.weights.output_norm, model.weights.output, hidden)
    assert head == [("all-gather", -(-shape.vocab_size // 8) * 8)]


def test_any_mesh_will_do():
    mesh = jax.make_mesh((2, 3), ("rows", "columns"))
    assert sharding.mesh_of(mesh).devices.tolist() == mesh.devices.ravel().tolist()
    model = scarlet_jax.load(models.path(SHAPES["llama"]), mesh=mesh)
    assert len(model.weights.output_norm.sharding.device_set) == 6


def test_what_cannot_be_had_is_refused():
    with pytest.raises(BadInput, match="devices is 9, expected 1 to 8"):
        sharding.mesh_of(9)
    model = scarlet_jax.load(models.path(SHAPES["llama"]), mesh=2)
    with pytest.raises(BadInput, match="taps: the model is spread over 2 devices; expected one"):
        model.taps([1, 2])
