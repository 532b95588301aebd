"""transformers as a reference: a GGUF put back into it, a checkpoint, its taps, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import sys

import numpy as np
import oracle
import pytest
from support import relative_l2
from support_shapes import FOURTH_POSITION, SHAPES

from scarlet_jax import gguf
from scarlet_jax.errors import BadInput
from scarlet_jax.tools import synth
from scarlet_jax.tools.engines import llama_cpp, transformers_model
from scarlet_jax.tools.engines import transformers as engine

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # models this small only wait for each other's threads

# float32 throughout: measured over these shapes, at most 5e-6 on any tap.
TOLERANCE = 1e-5
TOKENS = np.random.default_rng(2).integers(0, SHAPES["conv-4"].vocab_size, 67).tolist()  # more than a chunk


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A function from a shape's name and a quant type to a file, made once."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name: str, quant: str = "F32"):
        return synth.write(folder / f"{name} {quant}.gguf", SHAPES[name], quant, seed=4)

    return make


@pytest.fixture(scope="module")
def checkpoint(path, tmp_path_factory):
    """A directory that transformers itself wrote, of the weights of conv-5.gguf."""
    folder = tmp_path_factory.mktemp("checkpoint")
    transformers_model.load(path("conv-5")).model.save_pretrained(folder)
    return folder


def differences(taps, truth) -> dict[str, float]:
    errors = {name: relative_l2(tap, truth[name]) for name, tap in taps.items()}
    return {name: error for name, error in errors.items() if not error <= TOLERANCE}


# ------------------------------------------------------------------------------
# Taps
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [0, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tap_is_the_judges(name, decode, path):
    taps, _, version = engine.taps(path(name), TOKENS, decode=decode)
    _, truth = oracle.forward(path(name), TOKENS)
    assert differences(taps, truth) == {}
    assert {tap.dtype for tap in taps.values()} == {np.dtype(np.float32)}
    assert version.startswith(f"transformers {transformers.__version__}")


def test_one_token(path):
    taps, *_ = engine.taps(path("conv-4"), TOKENS[:1])
    assert differences(taps, oracle.forward(path("conv-4"), TOKENS[:1])[1]) == {}


def test_names_order_and_weights_are_llama_cpps(path):
    ours, our_weights, _ = engine.taps(path("conv-4", "Q8_0"), TOKENS[:5])
    theirs, their_weights, _ = llama_cpp.taps(path("conv-4", "Q8_0"), TOKENS[:5], threads=1)
    assert ours.keys() <= theirs.keys()
    assert our_weights == their_weights
    assert {"Q8_0", "F16"} == {qtype for _, qtype in our_weights.values()}
    for step in ("attn_norm-0", "linear_attn_qkv_mixed-0", "new_state-0", "linear_attn_out-0", "l_out-0"):
        assert step in ours
    in_both = [name for name in theirs if name in ours]
    apart = ("beta", "alpha", "z", "Qcur", "Kcur", "Vcur")  # independent of each other: either order is right
    assert [n for n in ours if not n.startswith(apart)] == [n for n in in_both if not n.startswith(apart)]


def test_select(path):
    taps, weights, _ = engine.taps(path("conv-4"), TOKENS[:5], select=r"^(ffn_gate|kq_.*)-3$|output$")
    assert list(taps) == ["kq_soft_max-3", "ffn_gate-3", "result_output"]
    assert weights == {
        "ffn_gate-3": ("blk.3.ffn_gate.weight", "F32"),
        "result_output": ("output.weight", "F32"),
    }


# ------------------------------------------------------------------------------
# A GGUF put back
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["BF16", "Q4_K_M", "NVFP4", "Q1_0", "Q2_0"])
def test_weights_of_any_type(quant, tmp_path):
    shape = synth.Shape(
        block_count=2,
        full_attention_interval=2,
        vocab_size=300,
        embedding_length=256,
        feed_forward_length=512,
    )
    file = synth.write(tmp_path / "wide.gguf", shape, quant)
    logits, _ = oracle.forward(file, TOKENS[:7])
    assert relative_l2(engine.logits(file, TOKENS[:7]), logits) <= TOLERANCE


def _wrongly_ordered(undo):
    def wrong(x, order):
        return undo(x, transformers_model.Order(*(np.arange(len(indices)) for indices in order)))

    return wrong


CONVERTED = [
    (kind, parameter)
    for kind, weights in transformers_model._MIXER_WEIGHTS.items()
    for parameter, (_, undo) in weights.items()
    if undo is not transformers_model._same
]


@pytest.mark.parametrize(("kind", "parameter"), CONVERTED)
def test_each_change_of_the_converter_matters(kind, parameter, path, monkeypatch):
    """A norm's offset or a tensor's head order left as the converter made it."""
    name, undo = transformers_model._MIXER_WEIGHTS[kind][parameter]
    wrong = transformers_model._same if undo is transformers_model._less_one else _wrongly_ordered(undo)
    monkeypatch.setitem(transformers_model._MIXER_WEIGHTS[kind], parameter, (name, wrong))
    logits, _ = oracle.forward(path("conv-4"), TOKENS)
    assert relative_l2(engine.logits(path("conv-4"), TOKENS), logits) > 100 * TOLERANCE


def test_no_rotary_dimension_is_lost_to_rounding():
    assert int(46 * (26 / 46)) == 25  # why the factor is one step up
    for head_dim in range(2, 513):
        for rotary in range(2, head_dim + 1, 2):
            assert int(head_dim * np.nextafter(rotary / head_dim, 1.0)) == rotary


def test_a_rotary_pair_of_the_fourth_position_is_refused(tmp_path):
    file = synth.write(tmp_path / "fourth.gguf", FOURTH_POSITION)
    with pytest.raises(BadInput, match=r"fourth\.gguf: .*pairs \[5, 7, 8, 9, 10, 11, 12\] to a position"):
        engine.taps(file, TOKENS)


# ------------------------------------------------------------------------------
# A checkpoint
# ------------------------------------------------------------------------------


def test_a_checkpoint_is_the_same_model(path, checkpoint):
    ours, weights, _ = engine.taps(checkpoint, TOKENS)
    theirs, *_ = engine.taps(path("conv-5"), TOKENS)
    scaled = ("ffn_gate", "ffn_up")  # the GGUF's come before its separate scale, which a checkpoint lacks
    assert list(ours) == list(theirs)
    for name, tap in theirs.items():
        if not name.startswith(scaled):
            np.testing.assert_array_equal(ours[name], tap)
    assert weights["z-1"] == ("model.layers.1.linear_attn.in_proj_z.weight", "F32")


def test_a_checkpoint_with_images_gives_its_text_model(tmp_path):
    """What is published: the text model within a model of images, in bfloat16."""
    text = {
        **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
        **{"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    }
    image = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=image, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = model(torch.tensor([TOKENS])).logits[0]
    model.bfloat16().save_pretrained(tmp_path)
    taps, weights, _ = engine.taps(tmp_path, TOKENS)
    assert weights["result_output"] == ("model.language_model.embed_tokens.weight", "BF16")
    assert relative_l2(taps["result_output"], expected.numpy()) <= TOLERANCE


# ------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "decode", "message"),
    [
        ([], 0, "no tokens"),
        ([1, 300], 0, "token id 300: expected 0 to 299"),
        ([-1], 0, "token id -1"),
        ([1, 2], 2, "--decode 2"),
    ],
)
def test_tokens_that_cannot_be(tokens, decode, message, path):
    with pytest.raises(BadInput, match=message):
        engine.taps(path("conv-4"), tokens, decode=decode)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(BadInput, match="transformers cannot load it"):
        engine.taps(tmp_path, [1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "weight model.norm.weight is missing"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}),
            r"weight model.norm.weight has shape \(3,\), expected \(80,\)",
        ),
    ],
)
def test_a_checkpoint_with_a_wrong_weight(change, message, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(BadInput, match=message):
        engine.taps(tmp_path, [1])


def test_a_checkpoint_cut_short(checkpoint, tmp_path):
    whole = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(BadInput, match="transformers cannot load it"):
        engine.taps(tmp_path, [1])


def test_a_checkpoint_of_another_model(tmp_path):
    transformers.Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="model type 'qwen3', not 'qwen3_5_text'"):
        engine.taps(tmp_path, [1])


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("blk.3.attn_k.weight", None, r"tensor blk\.3\.attn_k\.weight is missing"),
        (
            "blk.1.ffn_up.weight",
            "blk.1.ffn_down.weight",
            r"blk\.1\.ffn_up\.weight is \(80, 112\), expected \(112, 80\)",
        ),
        ("blk.0.ssm_a", "blk.0.ssm_norm.weight", r"tensor blk\.0\.ssm_a is \(32,\), expected \(6,\)"),
    ],
)
def test_a_gguf_with_a_wrong_tensor(name, replacement, message, path, monkeypatch):
    whole = gguf.read(path("conv-4"))
    tensors = dict(whole.tensors)
    wrong = tensors.pop(name)
    if replacement:
        tensors[name] = dataclasses.replace(tensors[replacement], name=wrong.name)
    monkeypatch.setattr(transformers_model, "read", lambda _: dataclasses.replace(whole, tensors=tensors))
    with pytest.raises(BadInput, match=rf"conv-4 F32\.gguf: .*{message}"):
        engine.taps(path("conv-4"), [1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "llama", "architecture 'llama', expected 'qwen35'"),
        ("qwen35.block_count", 2**31, "block_count 2147483648, more than there are tensors"),
        ("qwen35.embedding_length", 2**31, r"tensor token_embd\.weight is \(300, 80\), expected"),
        ("qwen35.attention.head_count", 2**31, "expected"),
        ("qwen35.attention.head_count_kv", 0, "transformers cannot load it"),
        ("qwen35.ssm.group_count", 4, "transformers cannot load it"),
        ("qwen35.ssm.time_step_rank", 0, "transformers cannot load it"),
        ("qwen35.rope.dimension_sections", np.zeros(4, np.int32), "transformers cannot load it"),
        ("qwen35.rope.scaling.factor", 4.0, "rope scaling 'linear' by 4.0, expected none"),
        ("qwen35.feed_forward_length", np.array([112, 112, 112, 96]), "feed_forward_length differs"),
    ],
)
def test_a_gguf_that_says_what_cannot_be(key, value, message, path, monkeypatch):
    """Nothing of a claimed size is allocated either: this takes no longer than the rest."""
    whole = gguf.read(path("conv-4"))
    claims = gguf.Metadata(dict(whole.metadata) | {key: value}, whole.path)
    monkeypatch.setattr(transformers_model, "read", lambda _: dataclasses.replace(whole, metadata=claims))
    with pytest.raises(BadInput, match=rf"conv-4 F32\.gguf: .*{message}"):
        engine.taps(path("conv-4"), [1])


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_library_that_is_not_installed(library, path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadInput, match=rf"{library}.*pip install 'scarlet_jax\[transformers\]'"):
        engine.taps(path("conv-4"), [1])
