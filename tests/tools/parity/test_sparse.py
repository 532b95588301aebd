"""References that show less than ours: fused products, modules and hidden states only, heads too large to decode."""

import dataclasses

import numpy as np
import pytest
from faults import catalogue, changes, large, run
from faults.cases import changed, faulty, model, ours, reference, tokens
from faults.dress import DRESSES

from scarlet_jax.tools.parity import Dump, compare, weights
from scarlet_jax.tools.parity.names import rename


def fuse(dump: Dump, whole: str, parts: tuple[str, ...]) -> Dump:
    """The taps `parts` of each layer side by side as one."""
    taps = {}
    for name in dump:
        op, _, layer = name.rpartition("-")
        if op == parts[0]:
            rows = [dump[f"{part}-{layer}"].reshape(len(dump[name]), -1) for part in parts]
            taps[f"{whole}-{layer}"] = np.concatenate(rows, axis=1)
        elif op not in parts:
            taps[name] = dump[name]
    return Dump(taps, tokens=dump.tokens, order=list(taps), format="npz")


@pytest.mark.parametrize(
    ("whole", "parts"), [("ffn_gate_up", ("ffn_gate", "ffn_up")), ("in_proj_ba", ("beta", "alpha"))]
)
def test_a_fused_product_is_compared_in_parts(whole, parts):
    report = compare(ours(), fuse(reference(), whole, parts))
    assert report["verdict"] == "clean"
    assert {f"{part}-0" for part in parts} <= {tap["name"] for tap in report["taps"]}
    wrong, right = faulty("gate-up-swapped")
    found = compare(wrong, fuse(right, whole, parts))
    assert found["first"]["op"] == "ffn_swiglu"


def test_queries_keys_and_values_in_one():
    """Keys are as wide as values; the whole is what is left for the queries."""
    right = reference()
    keys = {f"Kcur_projected-{n.rpartition('-')[2]}": right[n] for n in right if n.startswith("Kcur_normed-")}
    both = Dump({**{n: right[n] for n in right}, **keys}, tokens=right.tokens)
    report = compare(ours(), fuse(both, "wqkv", ("Qcur_full", "Kcur_projected", "Vcur")))
    rows = {tap["name"]: tap for tap in report["taps"]}
    assert rows["Vcur-2"]["relative_l2"] < 1e-6
    assert rows["Qcur_full-2"]["relative_l2"] < 1e-6


@pytest.mark.parametrize("dress", ["modules", "stream", "halves"])
def test_less_of_a_reference_is_no_fault(dress):
    dressed = dataclasses.replace(DRESSES[dress](reference()), engine="")
    assert compare(ours(), rename(dressed))["exit"] == 0


# Steps that no module shows: found in our own taps, once what follows them differs.
BETWEEN = ("query-scale-missing", "key-heads-repeated", "kv-heads-tiled", "gate-flat", "decay-twice")


@pytest.mark.parametrize("name", BETWEEN)
def test_a_step_that_the_reference_does_not_show(name):
    for outcome in run.outcomes("a", ("model",), name, dress="modules"):
        assert (outcome.verdict, outcome.first, outcome.klass, outcome.cause) == (True,) * 4, outcome.said


def test_a_convention_of_ours_is_no_fault():
    """A tap of ours that nobody else has and that does not follow from its inputs, while all after it agrees."""
    odd = changed(ours(), lambda name, x: 2 * x if name.startswith("kq-") else x)
    report = compare(odd, DRESSES["modules"](reference()))
    assert report["verdict"] in ("clean", "noise")


def test_a_large_head_is_multiplied_in_parts(monkeypatch, tmp_path):
    import models

    path = models.path(models.PACKABLE, "Q6_K")
    file, key = weights.ModelWeights(path), (None, "output")
    x = np.random.default_rng(0).standard_normal((3, models.PACKABLE.embedding_length))
    whole = x @ file[key].astype(np.float64).T
    monkeypatch.setattr(weights, "_AT_ONCE", 7 * x.shape[1])
    np.testing.assert_allclose(file.product(key, x), whole, rtol=1e-12)
    assert file.elements(key) == whole.shape[1] * x.shape[1]


def test_a_head_that_is_the_table():
    """From the dumps alone: the prompt's own rows of the table are enough."""
    fault = next(f for f in catalogue.FAULTS if f.name == "head-tied")
    with changes.apply(fault, model()) as broken:
        wrong = run.dump(broken, tokens(), 2)
    assert compare(wrong, reference())["cause"]["name"] == "wrong-weight"


@pytest.mark.slow
def test_a_large_head_that_is_broken_takes_less_than_a_gigabyte(tmp_path):
    said = large.in_process(large.head(tmp_path))
    assert said.startswith("single-op soft-cap: ")
    assert float(said.rpartition("peak memory ")[2].split()[0]) < 0.8
