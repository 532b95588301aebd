"""Every operation of the table against the oracle's own taps; every misreading is one."""

import dataclasses

import numpy as np
import pytest
from faults.cases import model, reference
from faults.run import InMemory

from scarlet_jax.tools.parity import graph, operations  # noqa: F401 - the table
from scarlet_jax.tools.parity.compare import Comparison, split

# Misreadings that are the right thing on a text without history, or for this model's sizes.
HARMLESS = {
    "conv-state",
    "conv-state, rows reversed",
    "state-reset",
    "state-transposed",
    "chunk-boundary",
    "chunk-boundary, state transposed",
    "stale-state",
    "state-precision, int8 with a scale for 32",  # heads of other lengths
    "decay-precision, int8 with a scale for 32",
    "norm-axis",  # of one axis
    *(
        "eps",
        "eps=0",
        "eps=1e-12",
        "eps=1e-08",
        "eps=1e-07",
        "eps=1e-06",
        "eps=1e-05",
    ),  # inputs are of order one
    "rope-base=1e+07",
    "token-offset",
}
BIG_WINDOWS = {f"mask, window {n}" for n in (64, 128, 256, 512, 1024)}


@pytest.fixture(scope="module")
def comparison():
    clean = reference(40)
    c = Comparison(clean, clean, InMemory(model()))
    c._measure()
    return c


def names():
    return [n for n in reference(40) if split(n)[1] in (0, 2, None)]


@pytest.mark.parametrize("name", names())
def test_formula_and_misreadings(comparison, name):
    tap = next(t for t in comparison.taps if t.name == name)
    op = graph.find(tap.op, tap.kind)
    assert op is not None
    if op.source and tap.op != "model.input_embed":
        return
    truth = np.asarray(comparison.reference[name], np.float64)

    def error(run) -> float:
        view = comparison.pair.reference.view(tap.layer, tap.kind)
        with np.errstate(all="ignore"):
            value = np.asarray(run(view), np.float64)
        return float(np.linalg.norm(value.reshape(truth.shape) - truth) / np.linalg.norm(truth))

    if tap.op.startswith("kq-") or tap.op == "kq":
        truth = graph.visible(truth)
    assert error(op.run) < 1e-6
    for label, run in op.variants.items():
        if label not in HARMLESS | BIG_WINDOWS:
            assert not error(run) < 2e-6, label


def test_every_misreading_has_a_kebab_case_name():
    for op in graph.OPS.values():
        for label in op.variants:
            short = label.split(",")[0].split("=")[0].strip()
            assert short == short.lower()
            assert " " not in short


def test_facts_can_be_replaced():
    from scarlet_jax.tools.parity.facts import Facts

    assert dataclasses.replace(Facts(), head_dim=8, rotary_dims=0).rotary == 8
