"""qwen3, qwen2 and llama against a float64 forward written from the spec, llama.cpp and transformers."""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
from models import DENSE_SHAPES, changed, model, path, tokens
from support import relative_l2
from support_transformers import decoder_logits
from test_model import TOLERANCE, assert_taps_agree, every_implementation, ours_named

import scarlet_jax
from scarlet_jax import BadInput, configs, gguf
from scarlet_jax.tools import synth
from scarlet_jax.tools.engines import llama_cpp

every_shape = pytest.mark.parametrize("shape", DENSE_SHAPES.values(), ids=DENSE_SHAPES.keys())
# One of each architecture, with rows that every block format divides.
PACKABLE = {
    arch: dataclasses.replace(
        DENSE_SHAPES[arch],
        block_count=2,
        embedding_length=256,
        feed_forward_length=512,
        head_count=4,
        head_count_kv=2,
        key_length=64,
        dimension_count=64,
    )
    for arch in ("qwen3", "qwen2", "llama")
}


def with_biases(taps):
    """llama.cpp taps `ffn_gate` before the bias and `ffn_gate_b` after, and so on: ours are after."""
    after = {name.replace("_b-", "-"): x for name, x in taps.items() if "_b-" in name and "wqkv" not in name}
    before = {name: x for name, x in taps.items() if "_b-" not in name and not name.startswith("ffn_down-")}
    return before | after


@every_implementation
@every_shape
@pytest.mark.parametrize("count", [1, 65])
def test_logits_of_a_prompt_against_float64(shape, count, implementation):
    ids = tokens(shape, count)
    logits, _ = model(shape, implementation=implementation).forward(ids)
    assert relative_l2(logits, oracle.forward(path(shape), ids)[0]) < TOLERANCE


@every_shape
def test_every_tap_against_float64_and_llama_cpp(shape):
    ids = tokens(shape, 33)
    logits, truth = oracle.forward(path(shape), ids)
    ours, _, taps = model(shape).forward_with_taps(ids)
    assert relative_l2(ours, logits) < TOLERANCE
    theirs = llama_cpp.taps(path(shape), ids)[0]
    assert set(theirs) - {"norm"} <= set(truth) | {f"ffn_down-{i}" for i in range(shape.block_count)} | {
        f"wqkv_b-{i}" for i in range(shape.block_count)
    }
    for reference in (truth, theirs):
        assert_taps_agree(taps, with_biases(ours_named(reference)))


@every_implementation
@every_shape
def test_decoding_against_float64(shape, implementation):
    """Token by token, then three at once; a batch of different lengths is each alone."""
    ids = tokens(shape, 12)
    ours = model(shape, implementation=implementation)
    _, state = ours.forward(ids[:7])
    for start, stop in [(7, 8), (8, 9), (9, 12)]:
        logits, state = ours.last_logits(ids[start:stop], state, consume=True)
        assert relative_l2(logits, oracle.forward(path(shape), ids[:stop])[0][-1]) < TOLERANCE
    together, _ = ours.forward([ids, ids[:5]])
    assert relative_l2(together[1, :5], oracle.forward(path(shape), ids[:5])[0]) < TOLERANCE


# Each architecture and each format in the quick run; every pair of them in the slow one.
QUICK = {("qwen3", "Q4_K_M"), ("qwen3", "Q8_0"), ("qwen2", "Q5_K_M"), ("qwen2", "Q6_K"), ("llama", "IQ4_XS")}
QUICK |= {("llama", "MXFP4")}


@pytest.mark.parametrize(
    ("arch", "quant"),
    [
        pytest.param(arch, quant, marks=[] if (arch, quant) in QUICK else pytest.mark.slow)
        for arch in PACKABLE
        for quant in ["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4"]
    ],
)
def test_packed_weights_against_float64(arch, quant):
    """The truth over the decoded weights: f32 rounding is all that is between."""
    shape = PACKABLE[arch]
    ids = tokens(shape, 9)
    logits, _ = model(shape, quant).forward(ids)
    assert relative_l2(logits, oracle.forward(path(shape, quant), ids)[0]) < TOLERANCE


@every_shape
def test_logits_against_transformers(shape):
    """In f32 as well, so itself some way from the truth; the bound is on the logits as they are, up to 20."""
    ids = tokens(shape, 40)
    ours = np.asarray(model(shape).forward(ids)[0])
    assert np.abs(ours - decoder_logits(path(shape), ids)).max() < 2e-4


@every_shape
def test_taps_cost_no_digit_and_padding_leaves_no_trace(shape):
    ids = tokens(shape, 20)
    ours = model(shape)
    logits, _ = ours.forward(ids)
    assert relative_l2(ours.forward_with_taps(ids)[0], logits) < TOLERANCE
    changed, _ = ours.forward([*ids[:-1], (ids[-1] + 1) % shape.vocab_size])
    np.testing.assert_array_equal(logits[:-1], changed[:-1])


@pytest.mark.parametrize("mistake", ["head_norm", "freq_factors", "kind", "bias"])
def test_a_fault_is_seen(mistake):
    """Each option left out moves the logits far beyond the tolerance."""
    shape = DENSE_SHAPES["qwen3" if mistake == "head_norm" else "llama"]
    ids = tokens(shape, 33)
    ours = scarlet_jax.load(path(shape))
    if mistake == "bias":
        bare = jax.tree.map(
            lambda w: dataclasses.replace(w, bias=None) if hasattr(w, "bias") else w,
            ours.weights,
            is_leaf=lambda w: hasattr(w, "bias"),
        )
        ours = changed(ours, weights=bare)
    else:
        first, *rest = ours.config.blocks
        rope = first.mixer.rope
        wrong = {
            "head_norm": {"head_norm": False},
            "freq_factors": {"rope": dataclasses.replace(rope, freq_factors=())},
            "kind": {"rope": dataclasses.replace(rope, kind="neox")},
        }[mistake]
        first = dataclasses.replace(first, mixer=dataclasses.replace(first.mixer, **wrong))
        ours = changed(ours, config=dataclasses.replace(ours.config, blocks=(first, *rest)))
    assert relative_l2(ours.forward(ids)[0], oracle.forward(path(shape), ids)[0]) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("expert_count", 8, "mixtures of experts are not supported"),
        ("attention.scale", 0.5, "attention scales other than"),
        ("attention.sliding_window", 128, "sliding-window attention is not supported"),
        ("attention.clamp_kqv", 8.0, "clamped queries"),
        ("nextn_predict_layers", 1, "prediction blocks are not supported"),
        ("attention.causal", False, "true, or absent"),
        ("rope.scaling.type", "longrope", "none, linear or yarn"),
        ("rope.scaling.alpha", 1000.0, "0.0, or absent"),
        ("rope.scaling.yarn_log_multiplier", 0.1, "0.0, or absent"),
        ("rope.scaling.yarn_ext_factor", 0.5, "1.0, or absent"),
        ("rope.scaling.factor", -2.0, "above 0"),
        ("rope.scaling.original_context_length", 0, "1 or more"),
        ("rope.scaling.yarn_beta_slow", 33.0, "above 0, below yarn_beta_fast"),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(key, value, expected):
    file = gguf.read(path(DENSE_SHAPES["llama"]))
    claims = gguf.Metadata(dict(file.metadata) | {f"llama.{key}": value}, file.path, file.tensors)
    with pytest.raises(BadInput, match=rf"'llama\.{key}' is .*{expected}"):
        configs.find("llama").config(claims)


def test_a_table_of_factors_of_the_wrong_length_is_refused(tmp_path):
    shape = dataclasses.replace(DENSE_SHAPES["llama"], dimension_count=20, block_count=1)
    file = synth.write(tmp_path / "m.gguf", shape)
    data = file.read_bytes().replace(b"llama.rope.dimension_count", b"llama.rope.dimension_other")
    file.write_bytes(data)
    with pytest.raises(BadInput, match=r"rope_freqs.weight is F32 of shape \(10,\), expected 20 F32 values"):
        scarlet_jax.load(file)
