"""Mixers with a memory of fixed size (lfm2, mamba2, falcon-h1) against float64, llama.cpp and transformers."""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
import support_transformers_recurrent
from models import PACKABLE_RECURRENT, RECURRENT_SHAPES, changed, model, path, tokens
from support import relative_l2
from test_model import TOLERANCE, assert_taps_agree, every_implementation

import scarlet_jax
from scarlet_jax import BadInput, configs, gguf, sharding
from scarlet_jax.tools import cli
from scarlet_jax.tools.engines import llama_cpp
from scarlet_jax.tools.parity import compare

every_shape = pytest.mark.parametrize("shape", RECURRENT_SHAPES.values(), ids=RECURRENT_SHAPES.keys())


@every_shape
@pytest.mark.parametrize("count", [1, 70])
def test_every_tap_and_logit(shape, count):
    ids = tokens(shape, count)
    logits, truth = oracle.forward(path(shape), ids)
    ours, state, taps = model(shape).forward_with_taps(ids)
    theirs = llama_cpp.taps(path(shape), ids)[0]
    untapped = {f"{name}-{i}" for name in UNTAPPED[shape.arch] for i in range(shape.block_count)}
    for reference in (truth, theirs):
        named = {name: x for name, x in reference.items() if name not in untapped}
        assert_taps_agree(taps, {name: x for name, x in named.items() if not name.startswith(STATES)})
    assert relative_l2(ours, logits) < TOLERANCE
    assert_state_is(state, truth)
    assert len(set(theirs) & set(truth)) > 5 * shape.block_count  # llama.cpp's names are ours


STATES = ("history-", "memory-")
# What llama.cpp calls projections before they are heads, or rotated; and an input that it shows once more.
UNTAPPED = {"lfm2": ("Kcur",), "mamba2": (), "falcon-h1": ("Kcur", "Vcur", "ssm_in")}


def assert_state_is(state, truth):
    """What each layer remembers."""
    for i, block in enumerate(getattr(block, "mamba2", block) for block in state.blocks):
        for name in (field.name for field in dataclasses.fields(block)):
            if (expected := truth.get(f"{name.replace('conv', 'history')}-{i}")) is not None:
                assert relative_l2(getattr(block, name)[0], expected) < TOLERANCE


@every_implementation
@every_shape
def test_in_pieces_and_token_by_token(shape, implementation):
    ids = tokens(shape, 210)
    logits, truth = oracle.forward(path(shape), ids)
    ours = model(shape, implementation=implementation)
    whole, state = ours.forward(ids)
    assert relative_l2(whole, logits) < TOLERANCE
    assert_state_is(state, truth)

    state, parts = None, []
    for part in np.split(
        ids, [1, 70, 135, *range(136, 146)]
    ):  # one compiled program for 1, one for 65 to 128
        part_logits, state = ours.forward(part, state, consume=True)
        parts.append(part_logits)
    assert relative_l2(np.concatenate(parts), logits) < TOLERANCE
    assert_state_is(state, truth)


@every_implementation
@every_shape
def test_a_batch_is_each_alone_and_padding_leaves_no_trace(shape, implementation):
    ours = model(shape, implementation=implementation)
    rows, more = ([tokens(shape, n, seed=n) for n in lengths] for lengths in ((5, 70, 1), (3, 1, 9)))
    _, state = ours.forward(rows)
    after, _ = ours.forward(more, state)
    for i, (row, rest) in enumerate(zip(rows, more, strict=True)):
        expected, _ = oracle.forward(path(shape), [*row, *rest])
        assert relative_l2(after[i, : len(rest)], expected[len(row) :]) < TOLERANCE

    def state_after(padding):
        padded = np.where(np.arange(128) < 81, tokens(shape, 128), padding).astype(np.int32)[None]
        count, before = np.array([81], np.int32), ours.init_state(1, 128)
        return ours.programs.trunk(padded, count, before, in_place=True).state

    jax.tree.map(np.testing.assert_array_equal, state_after(0), state_after(77))


@every_shape
def test_logits_against_transformers(shape):
    """In f32 as well, so itself some way from the truth; the bound is on the logits as they are, up to 20."""
    ids = tokens(shape, 40)
    theirs = support_transformers_recurrent.logits(path(shape), ids)
    assert np.abs(model(shape).forward(ids)[0] - theirs).max() < 2e-4


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4"])
@pytest.mark.parametrize("shape", PACKABLE_RECURRENT.values(), ids=PACKABLE_RECURRENT.keys())
def test_packed_weights_against_float64(shape, quant):
    """A prompt, then one token; the truth over the decoded weights: f32 rounding is all that is between."""
    ids, ours = tokens(shape, 12), model(shape, quant)
    truth, _ = oracle.forward(path(shape, quant), ids)
    logits, state = ours.forward(ids[:-1])
    assert relative_l2(logits, truth[:-1]) < TOLERANCE
    assert relative_l2(ours.forward(ids[-1:], state)[0], truth[-1:]) < TOLERANCE


def fault(name, shape):
    """The model with one thing wrong in its first layer with a memory."""
    ours = scarlet_jax.load(path(shape))
    i = next(i for i in range(shape.block_count) if shape.is_recurrent(i))
    blocks = list(ours.weights.blocks)
    w = blocks[i].mixer
    wrong = {
        "gates swapped": lambda: {
            "shortconv_in_proj": np.roll(w.shortconv_in_proj, shape.embedding_length, axis=0)
        },
        "taps reversed": lambda: {"shortconv_conv": w.shortconv_conv[:, ::-1]},
        "no bias of the convolution": lambda: {"ssm_conv1d_bias": 0 * w.ssm_conv1d_bias},
        "no bias of the time step": lambda: {"ssm_dt_bias": 0 * w.ssm_dt_bias},
        "rates of other heads": lambda: {"ssm_a": w.ssm_a[::-1]},
        "inputs not added": lambda: {"ssm_d": 0 * w.ssm_d},
        "norms of other groups": lambda: {"ssm_norm": w.ssm_norm[::-1]},
        "no attention": lambda: {"attn_output": 0 * w.attn_output},
        "no state space": lambda: {"ssm_out": 0 * w.ssm_out},
    }[name]()
    blocks[i] = dataclasses.replace(blocks[i], mixer=dataclasses.replace(w, **wrong))
    ours = changed(ours, weights=dataclasses.replace(ours.weights, blocks=tuple(blocks)))
    return ours


_OF_MAMBA2 = ("no bias of the convolution", "no bias of the time step", "rates of other heads")
_OF_MAMBA2 += ("inputs not added", "norms of other groups")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("gates swapped", "lfm2"), ("taps reversed", "lfm2")),
        *(("no attention", "falcon-h1"), ("no state space", "falcon-h1")),
        *((name, "mamba2") for name in _OF_MAMBA2),
    ],
)
def test_a_fault_is_seen(name, shape):
    shape = RECURRENT_SHAPES[shape]
    ids = tokens(shape, 20)
    assert (
        relative_l2(fault(name, shape).forward(ids)[0], oracle.forward(path(shape), ids)[0]) > 100 * TOLERANCE
    )


@pytest.mark.parametrize(
    ("arch", "key", "value", "expected"),
    [
        ("lfm2", "shortconv.l_cache", 1, "2 or more"),
        ("lfm2", "attention.sliding_window", 128, "sliding-window attention is not supported"),
        ("lfm2", "expert_count", 8, "mixtures of experts are not supported"),
        ("mamba2", "ssm.group_count", 4, "a multiple of ssm.group_count, 4"),
        ("mamba2", "ssm.inner_size", 97, "a multiple of ssm.time_step_rank, 6"),
        ("mamba2", "ssm.conv_kernel", 0, "1 or more"),
        ("falcon-h1", "ssm.group_count", 4, "a multiple of ssm.group_count, 4"),
        ("falcon-h1", "attention.scale", 0.1, "attention scales other than"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arch, key, value, expected):
    file = gguf.read(path(RECURRENT_SHAPES[arch]))
    claims = gguf.Metadata(dict(file.metadata) | {f"{arch}.{key}": value}, file.path, file.tensors)
    with pytest.raises(BadInput, match=rf"'{arch}\..*' is .*{expected}"):
        configs.find(arch).config(claims)


@pytest.mark.parametrize(
    ("arch", "kind"), [("lfm2", "ShortConv"), ("mamba2", "Mamba2"), ("falcon-h1", "Parallel")]
)
def test_a_mesh_is_refused_by_the_layer_s_name(arch, kind):
    with pytest.raises(BadInput, match=f"{arch} has layers that cannot be spread: {kind}$"):
        scarlet_jax.load(path(RECURRENT_SHAPES[arch]), mesh=sharding.mesh_of(1))


@pytest.mark.parametrize("arch", ["lfm2", "mamba2", "falcon-h1"])
def test_the_tools_take_what_they_have_no_formulas_for(arch, tmp_path, capsys):
    """Dumps of both engines, a comparison of them, and what the file holds."""
    file, ids = str(path(RECURRENT_SHAPES[arch])), "5,300,17,17,4,99,280,33"
    dumps = [str(tmp_path / f"{name}.safetensors") for name in ("scarlet", "llama.cpp")]
    for name, out in zip(("scarlet", "llama.cpp"), dumps, strict=True):
        assert cli.main(["taps", file, "--tokens", ids, "--decode", "2", "--engine", name, "-o", out]) == 0
    report = compare(*dumps, model=file)
    assert report["verdict"] in ("clean", "noise")
    assert len(report["taps"]) > 4 * RECURRENT_SHAPES[arch].block_count
    assert cli.main(["inspect", file]) == 0
    assert arch in capsys.readouterr().out
