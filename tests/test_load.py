"""Files that parse but do not hold the model they claim: one line that names the tensor or the key."""

import dataclasses
import re

import gguf
import jax
import numpy as np
import oracle
import pytest
from models import SHAPES, folder, model, path, tokens
from support import relative_l2

import scarlet_jax
from scarlet_jax import BadInput
from scarlet_jax.ops.qtensor import QTensor
from scarlet_jax.tools import synth

SHAPE = SHAPES["tied"]


def copied(writer, source, *, keys=(), drop=()):
    """Hand metadata but `keys`, and tensors but `drop`, of a reader to a writer."""
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.alignment", *keys):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], element)
    for tensor in source.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data)


def finished(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewritten(name, *, drop=(), add=(), keys=None):
    """The F32 file of SHAPE again, with tensors left out or added, and keys replaced or (None) left out."""
    target = folder() / f"{name}.gguf"
    writer = gguf.GGUFWriter(target, "qwen35")
    keys = keys or {}
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    copied(writer, gguf.GGUFReader(path(SHAPE)), keys=keys, drop=drop)
    for tensor_name, data in add:
        writer.add_tensor(tensor_name, data)
    finished(writer)
    return target


def test_a_rewritten_file_is_the_same_model():
    """So that the refusals below are of the change alone."""
    ids = tokens(SHAPE, 5)
    same, _ = scarlet_jax.load(rewritten("same")).forward(ids)
    np.testing.assert_array_equal(same, model(SHAPE).forward(ids)[0])


def test_every_problem_in_one_error():
    wrong = np.zeros((3, 5), np.float32)
    file = rewritten(
        "problems",
        drop=("blk.0.ssm_a", "blk.2.ffn_up.weight"),
        add=(("blk.2.ffn_up.weight", wrong), ("blk.0.surprise.weight", wrong)),
    )
    with pytest.raises(BadInput) as caught:
        scarlet_jax.load(file)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    assert "blk.0.ssm_a is missing" in message
    assert "blk.2.ffn_up.weight has shape (3, 5), expected (64, 96)" in message
    assert "blk.0.surprise.weight is not a tensor of this architecture" in message


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"qwen35.attention.key_length": None}, "qwen35.attention.key_length"),
        ({"qwen35.block_count": None}, "qwen35.block_count"),
        ({"qwen35.block_count": 0}, "nextn_predict_layers"),
        ({"qwen35.ssm.inner_size": 7}, "time_step_rank x state_size, 144"),
        ({"qwen35.ssm.group_count": 2}, "multiple of ssm.group_count, 2"),
        ({"qwen35.rope.dimension_sections": [0, 0, 0, 0]}, "dimension_sections"),
        ({"qwen35.rope.dimension_sections": [1, 2]}, "dimension_sections"),
        ({"qwen35.rope.dimension_count": 33}, "dimension_count"),
        ({"qwen35.attention.head_count_kv": 3}, "multiple of 3 kv heads"),
        ({"qwen35.rope.scaling.type": "longrope"}, "none, linear or yarn"),
        ({"qwen35.embedding_length": "wide"}, "qwen35.embedding_length"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
    ],
)
def test_metadata_that_cannot_be(keys, expected):
    file = rewritten("metadata", keys=keys)
    with pytest.raises(BadInput, match=re.escape(expected)) as caught:
        scarlet_jax.load(file)
    assert str(file) in str(caught.value)


def test_an_unknown_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen4exp")
    writer.add_tensor("a", np.zeros(32, np.float32))
    finished(writer)
    with pytest.raises(BadInput, match=r"'qwen4exp' is not supported; expected one of: .*qwen35"):
        scarlet_jax.load(tmp_path / "x.gguf")


def test_packed_weights_are_the_bytes_of_the_file(tmp_path):
    """No decoding at load: the pytree holds the bytes of the file; a tied head is the embedding itself."""
    shape = dataclasses.replace(SHAPE, embedding_length=256, feed_forward_length=512, alignment=64)
    file = synth.write(tmp_path / "packed.gguf", shape, "Q4_K")
    loaded = scarlet_jax.load(file)
    gate = loaded.weights.blocks[0].ffn.ffn_gate
    assert isinstance(gate, QTensor)
    tensor = loaded.gguf.tensors["blk.0.ffn_gate.weight"]
    np.testing.assert_array_equal(gate.blocks, tensor.data)
    assert gate.shape == (512, 256)
    assert loaded.weights.output is loaded.weights.token_embd


@pytest.mark.parametrize("alignment", [64, 4096])
def test_aligned_tensors_are_used_in_place(alignment, tmp_path):
    loaded = scarlet_jax.load(
        synth.write(tmp_path / "a.gguf", dataclasses.replace(SHAPE, alignment=alignment))
    )
    assert all(_lies_in_the_file(x, loaded.gguf) for x in jax.tree.leaves(loaded.weights) if x.size > 1000)


@pytest.mark.parametrize("alignment", [8, 16, 32])
def test_any_alignment_is_the_same_model(alignment, tmp_path):
    loaded = scarlet_jax.load(
        synth.write(tmp_path / "a.gguf", dataclasses.replace(SHAPE, alignment=alignment), seed=1)
    )
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, model(SHAPE).weights)


def _lies_in_the_file(array, file):
    address = array.unsafe_buffer_pointer()
    return any(0 <= address - t.data.ctypes.data < t.data.nbytes for t in file.tensors.values())


def test_prediction_blocks_are_not_the_trunks():
    """block_count includes them; the trunk must not (spec section 10, trap 1)."""
    shape = SHAPES["untied"]
    assert shape.nextn_predict_layers == 1
    loaded = model(shape)
    assert len(loaded.config.blocks) == shape.block_count
    assert len(loaded.config.nextn) == len(loaded.weights.nextn) == 1


def test_split_sets_load_as_one(tmp_path):
    """Tensors spread over two parts, by gguf-py's own splitting writer."""
    source = gguf.GGUFReader(path(SHAPE))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen35", split_max_tensors=len(source.tensors) // 2 + 1)
    copied(writer, source)
    finished(writer)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 2
    ids = tokens(SHAPE, 5)
    logits, _ = scarlet_jax.load(parts[0]).forward(ids)
    assert relative_l2(logits, oracle.forward(path(SHAPE), ids)[0]) < 1e-5
