"""Prediction blocks against a float64 forward written from the spec, and against llama.cpp's own context for them."""

import dataclasses

import gguf
import numpy as np
import oracle
import pytest
from models import MOE_SHAPES, PACKABLE, SHAPES, changed, folder, model, path, tokens
from support import relative_l2
from test_load import copied, finished
from test_model import TOLERANCE, every_implementation

import scarlet_jax
from scarlet_jax import BadInput
from scarlet_jax.tools.engines import llama_cpp

MTP_SHAPES = {
    "dense": SHAPES["untied"],
    "experts": MOE_SHAPES["experts"],
    "qwen3next": dataclasses.replace(MOE_SHAPES["qwen3next"], nextn_predict_layers=1),
    # A table and a head of its own, and the trunk's last norm.
    "own-head": dataclasses.replace(SHAPES["tied"], nextn_predict_layers=1, own_head=True),
}
every_shape = pytest.mark.parametrize("shape", MTP_SHAPES.values(), ids=MTP_SHAPES.keys())


def before(shape, ids, quant="F32"):
    """The normed state before each token, f64 (T, D): zeros before the first."""
    _, taps = oracle.forward(path(shape, quant), ids)
    return np.concatenate([np.zeros((1, shape.embedding_length)), taps["result_norm"][:-1]])


@every_implementation
@every_shape
def test_logits_and_states_against_float64(shape, implementation):
    """At once; in parts that end anywhere, the state carried; and the states that we make ourselves."""
    ids = tokens(shape, 23)
    hidden = before(shape, ids)
    logits, states = oracle.predict(path(shape), ids, hidden)
    ours = model(shape, implementation=implementation)
    whole = ours.forward_mtp(ids, hidden)
    assert relative_l2(whole[0], logits) < TOLERANCE
    assert relative_l2(whole[1], states) < TOLERANCE
    assert relative_l2(ours.normed(ours.hidden(ids))[:-1], hidden[1:]) < TOLERANCE

    state = None
    for start, stop in [(0, 1), (1, 17), (17, 18), (18, 23)]:
        after, _, state = ours.forward_mtp(ids[start:stop], hidden[start:stop], state)
        assert relative_l2(after, logits[start:stop]) < TOLERANCE


@every_shape
def test_logits_against_llama_cpp(shape):
    ids = tokens(shape, 23)
    hidden = before(shape, ids)
    with llama_cpp.Engine(path(shape), prediction=True, n_ctx=64) as reference:
        theirs = reference.decode(ids, hidden=hidden)
    assert relative_l2(model(shape).forward_mtp(ids, hidden)[0], theirs) < TOLERANCE


def test_a_longer_draft_goes_on_from_the_states_of_the_block():
    """Token by token from the second on, each with the state that the block made of the one before."""
    shape = MTP_SHAPES["dense"]
    ids, ours = tokens(shape, 9), model(shape)
    hidden = before(shape, ids[:6])
    _, states, state = ours.forward_mtp(ids[:6], hidden)
    for i in range(6, 9):
        last = oracle.predict(path(shape), ids[:i], hidden)[1][-1:]
        hidden = np.concatenate([hidden, last])
        after, states, state = ours.forward_mtp(ids[i : i + 1], states[-1:], state)
        assert relative_l2(after, oracle.predict(path(shape), ids[: i + 1], hidden)[0][-1:]) < TOLERANCE


def test_several_sequences_and_more_than_a_piece():
    shape = MTP_SHAPES["own-head"]
    rows = [tokens(shape, n, seed=n) for n in (600, 3)]
    states = np.zeros((2, 600, shape.embedding_length))
    for i, row in enumerate(rows):
        states[i, : len(row)] = before(shape, row)
    logits, _, _ = model(shape).forward_mtp(rows, states)
    for i, row in enumerate(rows):
        expected, _ = oracle.predict(path(shape), row, states[i, : len(row)])
        assert relative_l2(logits[i, : len(row)], expected) < TOLERANCE


@pytest.mark.parametrize("quant", ["Q4_K_M", "MXFP4"])
def test_packed_weights_against_float64(quant):
    shape = dataclasses.replace(PACKABLE, block_count=2, nextn_predict_layers=1)
    ids = tokens(shape, 9)
    hidden = before(shape, ids, quant)
    logits, _ = oracle.predict(path(shape, quant), ids, hidden)
    assert relative_l2(model(shape, quant).forward_mtp(ids, hidden)[0], logits) < TOLERANCE


@pytest.mark.parametrize("mistake", ["norms", "no norm", "halves", "trunk's norm", "shift"])
def test_a_fault_is_seen(mistake):
    shape = MTP_SHAPES["dense"]
    ids = tokens(shape, 9)
    hidden = given = before(shape, ids)
    ours = scarlet_jax.load(path(shape))
    (block,) = ours.weights.nextn
    join = block.join
    if mistake == "norms":
        join = dataclasses.replace(join, enorm=join.hnorm, hnorm=join.enorm)
    elif mistake == "no norm":
        join = dataclasses.replace(join, hnorm=np.ones_like(join.hnorm))
    elif mistake == "halves":
        join = dataclasses.replace(join, eh_proj=np.roll(join.eh_proj, shape.embedding_length, axis=1))
    elif mistake == "trunk's norm":
        block = dataclasses.replace(block, output_norm=ours.weights.output_norm)
    else:
        given = np.roll(hidden, -1, axis=0)
    nextn = (dataclasses.replace(block, join=join),)
    ours = changed(ours, weights=dataclasses.replace(ours.weights, nextn=nextn))
    assert relative_l2(ours.forward_mtp(ids, given)[0], oracle.predict(path(shape), ids, hidden)[0]) > 1e-3


def test_what_cannot_be_predicted_is_refused():
    ours = model(MTP_SHAPES["dense"])
    with pytest.raises(BadInput, match=r"hidden: of shape \(3, 80\); expected \(2, 80\)"):
        ours.forward_mtp([1, 2], np.zeros((3, 80)))
    with pytest.raises(BadInput, match="no prediction block 1; it has 1"):
        ours.forward_mtp([1], np.zeros((1, 80)), block=1)
    with pytest.raises(BadInput, match="no prediction block 0; it has 0"):
        model(SHAPES["tied"]).forward_mtp([1], np.zeros((1, 96)))


def test_a_prediction_block_that_is_not_whole_is_refused():
    target = folder() / "mtp.gguf"
    writer = gguf.GGUFWriter(target, "qwen35")
    drop = ("blk.6.nextn.hnorm.weight", "blk.6.nextn.eh_proj.weight")
    copied(writer, gguf.GGUFReader(path(MTP_SHAPES["dense"])), drop=drop)
    writer.add_tensor("blk.6.nextn.eh_proj.weight", np.zeros((80, 80), np.float32))
    finished(writer)
    with pytest.raises(BadInput) as caught:
        scarlet_jax.load(target)
    assert "blk.6.nextn.hnorm.weight is missing" in str(caught.value)
    assert "blk.6.nextn.eh_proj.weight has shape (80, 80), expected (80, 160)" in str(caught.value)
