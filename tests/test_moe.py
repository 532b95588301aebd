"""Mixtures of experts against a float64 forward written from the spec, llama.cpp and transformers."""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
from models import (
    MOE_SHAPES,
    PACKABLE_EXPERTS,
    PACKABLE_GROUPED,
    PACKABLE_PLAIN_EXPERTS,
    changed,
    model,
    path,
    tokens,
)
from support import relative_l2
from support_transformers import decoder_logits
from support_transformers_hybrid import hybrid_logits
from test_model import TOLERANCE, assert_taps_agree, every_implementation

import scarlet_jax
from scarlet_jax import BadInput, configs, gguf
from scarlet_jax.ops.implementations import IMPLEMENTATIONS

every_shape = pytest.mark.parametrize("shape", MOE_SHAPES.values(), ids=MOE_SHAPES.keys())


@every_implementation
@every_shape
@pytest.mark.parametrize("count", [1, 35])
def test_every_tap_and_logit_against_float64(shape, count, implementation):
    ids = tokens(shape, count)
    logits, truth = oracle.forward(path(shape), ids)
    ours = model(shape, implementation=implementation)
    tapped, _, taps = ours.forward_with_taps(ids)
    assert_taps_agree(taps, truth)
    assert relative_l2(tapped, logits) < TOLERANCE
    assert relative_l2(ours.forward(ids)[0], logits) < TOLERANCE  # padded, and without taps


@every_implementation
@every_shape
def test_decoding_against_float64(shape, implementation):
    """Token by token, then three at once."""
    ids = tokens(shape, 12)
    ours = model(shape, implementation=implementation)
    _, state = ours.forward(ids[:7])
    for start, stop in [(7, 8), (8, 9), (9, 12)]:
        logits, state = ours.last_logits(ids[start:stop], state, consume=True)
        assert relative_l2(logits, oracle.forward(path(shape), ids[:stop])[0][-1]) < TOLERANCE


@every_shape
@pytest.mark.parametrize("count", [1, 65])
def test_every_tap_against_llama_cpp(shape, count):
    from scarlet_jax.tools.engines import llama_cpp

    ids = tokens(shape, count)
    assert_taps_agree(model(shape).taps(ids), llama_cpp.taps(path(shape), ids)[0])


@pytest.mark.parametrize(
    "shape", [MOE_SHAPES["qwen3moe"], MOE_SHAPES["one-expert-a-token"]], ids=["some", "one"]
)
def test_logits_against_transformers(shape):
    """In f32 as well, so itself some way from the truth; the bound is on the logits as they are, up to 20."""
    ids = tokens(shape, 40)
    assert np.abs(model(shape).forward(ids)[0] - decoder_logits(path(shape), ids)).max() < 2e-4


@pytest.mark.parametrize(
    "name", ["experts", "gate-up-fused", "qwen3next", "qwen3next-legacy", "qwen3next-one-to-one"]
)
def test_logits_of_hybrids_against_transformers(name):
    """As above; here transformers, in f32, is itself up to 1.6e-4 from the float64 truth."""
    shape = MOE_SHAPES[name]
    ids = tokens(shape, 40)
    ours, theirs = np.asarray(model(shape).forward(ids)[0]), hybrid_logits(path(shape), ids)
    truth, _ = oracle.forward(path(shape), ids)
    assert np.abs(ours - truth).max() < 2e-4
    assert np.abs(ours - theirs).max() < 2e-4 + np.abs(theirs - truth).max()


# Each architecture and each format in the quick run; every pair of them in the slow one.
QUICK = {("qwen35moe", "Q4_K_M"), ("qwen35moe", "Q5_K_M"), ("qwen35moe", "IQ4_XS"), ("qwen35moe", "MXFP4")}
QUICK |= {("qwen3moe", "Q6_K"), ("qwen3next", "Q8_0"), ("qwen3next", "Q4_K_M")}


@pytest.mark.parametrize(
    ("shape", "quant"),
    [
        pytest.param(
            shape,
            quant,
            marks=[] if (shape.arch, quant) in QUICK else pytest.mark.slow,
            id=f"{shape.arch}-{quant}",
        )
        for shape in (PACKABLE_EXPERTS, PACKABLE_PLAIN_EXPERTS, PACKABLE_GROUPED)
        for quant in ["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4"]
    ],
)
def test_packed_experts_against_float64(shape, quant):
    """A prompt, then one token: the experts stay packed, whichever kernel takes them."""
    ids, ours = tokens(shape, 20), model(shape, quant)
    truth, _ = oracle.forward(path(shape, quant), ids)
    logits, state = ours.forward(ids[:-1])
    assert relative_l2(logits, truth[:-1]) < TOLERANCE
    assert relative_l2(ours.forward(ids[-1:], state)[0], truth[-1:]) < TOLERANCE
    experts = ours.weights.blocks[0].ffn.ffn_up_exps
    assert experts.blocks.dtype == np.uint8
    assert experts.shape == (6, 256, 256)


@every_implementation
def test_only_the_experts_routed_to_are_read(implementation):
    """The others may hold anything at all: here, numbers that are none."""
    shape = MOE_SHAPES["experts"]
    ids = tokens(shape, 2)
    expected, _, taps = model(shape).forward_with_taps(ids)
    ours = scarlet_jax.load(path(shape), implementation=implementation)

    def poisoned(i, block):
        unused = np.setdiff1d(np.arange(shape.expert_count), taps[f"ffn_moe_topk-{i}"])
        assert unused.size
        stacks = {
            stem: np.asarray(getattr(block.ffn, stem)).copy()
            for stem in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
        }
        for stack in stacks.values():
            stack[unused] = np.nan
        return dataclasses.replace(block, ffn=dataclasses.replace(block.ffn, **stacks))

    blocks = tuple(poisoned(i, block) for i, block in enumerate(ours.weights.blocks))
    ours = changed(ours, weights=dataclasses.replace(ours.weights, blocks=blocks))
    assert relative_l2(ours.forward_with_taps(ids)[0], expected) < TOLERANCE


@pytest.mark.parametrize("own", [False, True])
def test_gradients_of_experts_are_those_of_the_portable_product(own):
    """Of the rows and of the weights, where two rows share an expert and one expert has none."""
    rng = np.random.default_rng(own)
    ids = np.array([[2, 0], [0, 3], [2, 3]], np.int32)
    x = rng.standard_normal((3, 2, 40) if own else (3, 40), np.float32)
    w, dy = rng.standard_normal((4, 9, 40), np.float32), rng.standard_normal((3, 2, 9), np.float32)
    each = (x if own else np.repeat(x[:, None], 2, axis=1)).astype(np.float64)
    dx = np.einsum("mko,mkoi->mki", dy.astype(np.float64), w[ids])
    dw = np.zeros(w.shape)
    np.add.at(dw, ids, np.einsum("mko,mki->mkoi", dy.astype(np.float64), each))

    for name, module in IMPLEMENTATIONS.items():
        if module.unavailable() is None:
            got = jax.vjp(lambda x, w, module=module: module.qmatmul_experts(x, w, ids), x, w)[1](dy)
            assert relative_l2(got[0], dx if own else dx.sum(axis=1)) < TOLERANCE, name
            assert relative_l2(got[1], dw) < TOLERANCE, name


@pytest.mark.parametrize(
    "mistake",
    [
        {"expert_weights_norm": False},
        {"expert_weights_scale": 1.01},
        {"expert_used_count": 2},
        {"expert_shared_feed_forward_length": 0},
    ],
    ids=str,
)
def test_a_fault_in_the_mixture_is_seen(mistake):
    shape = MOE_SHAPES["experts"]
    ids, ours = tokens(shape, 7), scarlet_jax.load(path(shape))
    blocks = [
        dataclasses.replace(block, ffn=dataclasses.replace(block.ffn, **mistake))
        for block in ours.config.blocks
    ]
    ours = changed(ours, config=dataclasses.replace(ours.config, blocks=tuple(blocks)))
    assert relative_l2(ours.forward(ids)[0], oracle.forward(path(shape), ids)[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("mistake", ["tile", "alpha-beta", "key-head"])
def test_a_fault_in_what_is_grouped_is_seen(mistake, monkeypatch):
    """Value heads with the wrong key head; beta for alpha; rows of joined tensors in their own order."""
    shape = MOE_SHAPES["qwen3next-legacy"]
    ids, arch = tokens(shape, 7), configs.ARCHITECTURES["qwen3next"]
    cfg = model(shape).config

    def joined(mixer):
        rows = arch.joined(mixer)
        if mistake == "key-head":
            return {whole: _in_order(parts) for whole, parts in rows.items()}
        if rows:
            beta, alpha = rows["ssm_ba.weight"].values()
            rows["ssm_ba.weight"] = {"ssm_beta.weight": alpha, "ssm_alpha.weight": beta}
        return rows

    if mistake == "tile":
        ours = scarlet_jax.load(path(shape))
        blocks = [_tiled(block) for block in cfg.blocks]
        ours = changed(ours, config=dataclasses.replace(cfg, blocks=tuple(blocks)))
    else:
        other = dataclasses.replace(arch, joined=joined)
        monkeypatch.setitem(configs.ARCHITECTURES, "qwen3next", other)
        ours = scarlet_jax.load(path(shape))
    assert relative_l2(ours.forward(ids)[0], oracle.forward(path(shape), ids)[0]) > 100 * TOLERANCE


def _in_order(parts):
    """The rows of each part one part after the other."""
    ends = np.cumsum([len(rows) for rows in parts.values()])
    return {part: np.arange(end - len(parts[part]), end) for part, end in zip(parts, ends, strict=True)}


def _tiled(block):
    if not hasattr(block.mixer, "head_mapping"):
        return block
    return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, head_mapping="tile"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"expert_used_count": 12}, "expert_used_count' is 12, expected 1 to expert_count, 11"),
        ({"expert_count": 0}, "expert_count' is 0, expected 1 or more"),
        ({"expert_feed_forward_length": 0}, "expert_feed_forward_length' is 0, expected 1 or more"),
        ({"expert_shared_feed_forward_length": 0}, "expert_shared_feed_forward_length' is 0, expected 1 or"),
    ],
)
def test_experts_that_cannot_be(change, expected):
    keys = dict(gguf.read(path(MOE_SHAPES["experts"])).metadata)
    changed = {f"qwen35moe.{key}": value for key, value in change.items()}
    with pytest.raises(BadInput, match=expected):
        configs.find("qwen35moe").config(gguf.Metadata(keys | changed, "x.gguf"))
