"""The report: what is said of dumps that agree, that cannot be compared, and that hold less than one would like."""

import json
import re

import numpy as np
import pytest
from faults import run, tiny
from faults.cases import changed, faulty, model, ours, reference, tokens
from faults.dress import DRESSES

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity import Dump, compare, write_dump


def keep(*prefixes):
    return lambda name, x: x if name.startswith(prefixes) else None


def test_two_right_engines_agree():
    report = compare(ours(), reference())
    assert (report["verdict"], report["exit"], report["first"], report["cause"]) == ("clean", 0, None, None)
    assert len(report["taps"]) == len(reference())
    json.dumps(report, allow_nan=False)


def test_the_report_has_what_the_contract_says():
    report = compare(*faulty("key-heads-repeated"))
    assert report["first"] == {
        "tap": "new_state-0",
        "layer": 0,
        "op": "new_state",
        "weight": None,
        "qtype": None,
    }
    assert report["factor"] == {"kind": "op", "value": "delta-rule"}
    assert set(report["cause"]) == {"name", "evidence", "confidence"}
    assert set(report["axes"]) == {"spread", "peak"}
    assert set(report["unmatched"]) == {"ours", "reference"}
    columns = "name layer op class relative_l2 norm_ratio cosine max_abs max_at local_relative_l2 noise_floor aligned"
    assert set(columns.split()) <= set(report["taps"][0])
    json.dumps(report, allow_nan=False)


def test_propagated_divergence_is_not_local():
    taps = {tap["name"]: tap for tap in compare(*faulty("kv-heads-tiled"))["taps"]}
    assert taps["ffn_gate-3"]["relative_l2"] > 0.05  # everything downstream is off
    assert taps["ffn_swiglu-3"]["local_relative_l2"] < 1e-6  # and computed rightly from what is off
    assert not taps["ffn_swiglu-3"]["broken"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda o: changed(o, lambda n, x: x, tokens=list(range(40))), "other tokens: position 0"),
        (lambda o: changed(run.dump(model(), tokens(40, seed=9)), lambda n, x: x, tokens=[]), "other tokens"),
        (lambda o: run.dump(model(), np.concatenate([[5], tokens(40)])), "one more token in front"),
        (lambda o: run.dump(tiny.make("a", 1), tokens(40)), "other model"),
        (lambda o: changed(o, lambda n, x: x, arch="llama"), "other model: architecture"),
        (lambda o: changed(o, lambda n, x: np.full_like(x, np.nan)), "NaN"),
        (lambda o: changed(o, lambda n, x: x[:0]), "empty"),
        (
            lambda o: changed(o, lambda n, x: o["l_out-0"] if n.startswith("l_out") else x),
            "repeats one layer",
        ),
        (
            lambda o: changed(o, lambda n, x: o["l_out-5"] if n == "result_norm" else x),
            "before the final norm",
        ),
        (
            lambda o: changed(o, lambda n, x: o["result_norm"] if n == "l_out-5" else x),
            "after the final norm",
        ),
    ],
)
def test_no_verdict_on_what_is_no_comparison(change, why):
    other = changed(reference(), lambda n, x: x[:0]) if why == "empty" else reference()
    report = compare(change(ours()), other)
    assert (report["verdict"], report["exit"], report["first"]) == ("invalid", 2, None)
    assert why in report["why"]


@pytest.mark.parametrize("by", [1, -1])
def test_shifted_layers(by):
    def name(old):
        op, _, layer = old.rpartition("-")
        return f"{op}-{int(layer) + by}" if layer.isdigit() else old

    shifted = Dump({name(n): ours()[n] for n in ours() if not n.endswith("-0")}, tokens=ours().tokens)
    report = compare(shifted, reference())
    assert report["verdict"] == "invalid"
    assert "shifted" in report["why"]


def test_no_common_tap():
    with pytest.raises(BadInput, match="share no tap"):
        compare(Dump({"x": np.zeros(3)}), reference())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("flattened heads", lambda n, x: x.reshape(len(x), -1) if x.ndim == 3 and "state" not in n else x),
        ("head-major", lambda n, x: x.transpose(1, 0, 2) if x.ndim == 3 and "state" not in n else x),
        ("a batch axis", lambda n, x: x[None]),
        ("channels first", lambda n, x: x.T if x.ndim == 2 else x),
        (
            "last rows only",
            lambda n, x: x[-1:] if n in ("result_norm", "result_output", "h_nextn", "norm") else x,
        ),
    ],
)
def test_other_layouts_are_aligned(name, change):
    report = compare(changed(ours(), change), reference())
    assert report["verdict"] == "clean"
    assert any(tap["aligned"] != "as-is" for tap in report["taps"]), name
    assert not report["unmatched"]["reference"]


@pytest.mark.parametrize("dress", ["flat", "head-major"])
@pytest.mark.parametrize("fault", ["kv-heads-tiled", "conv-silu-missing"])
def test_a_reference_laid_out_otherwise_is_turned_to_ours(dress, fault):
    wrong, right = faulty(fault)
    report = compare(wrong, DRESSES[dress](right))
    assert report["first"] == compare(wrong, right)["first"]
    assert compare(ours(), DRESSES[dress](reference()))["verdict"] == "clean"


def test_transposed_states_of_another_format_are_aligned_but_ours_are_a_fault():
    turned = lambda n, x: x.transpose(0, 2, 1) if n.startswith("new_state") else x  # noqa: E731
    other = compare(changed(ours(), turned, format="npz"), reference())
    assert other["verdict"] == "clean"
    assert {t["aligned"] for t in other["taps"] if t["op"] == "new_state"} == {"transpose"}
    same = compare(changed(ours(), turned), reference())
    assert (same["exit"], same["first"]["op"], same["cause"]["name"]) == (1, "new_state", "state-transposed")


def test_a_scale_folded_elsewhere_is_a_convention():
    scaled = changed(ours(), lambda n, x: x * 16**-0.5 if n.startswith("q_conv_predelta") else x)
    report = compare(scaled, reference())
    assert report["exit"] == 0
    assert any("convention" in note for note in report["notes"])


def test_sixteen_bit_taps_are_noise():
    halves = changed(ours(), lambda n, x: x.astype(np.float16).astype(np.float32))
    assert compare(halves, reference())["verdict"] == "noise"


def test_rounded_taps_still_show_a_large_fault():
    def rounded(n, x):
        return np.round(x, 4).astype(np.float32)

    wrong, right = faulty("query-scale-missing")
    report = compare(changed(wrong, rounded, resolution=0.5e-4), right)
    assert (report["first"]["tap"], report["cause"]["name"]) == ("attn_output-0", "missing-scale")
    assert compare(changed(ours(), rounded, resolution=0.5e-4), reference())["exit"] == 0


def test_one_tap_cannot_say_where():
    wrong, right = faulty("kv-heads-tiled")
    report = compare(changed(wrong, keep("result_output")), right)
    assert (report["verdict"], report["exit"]) == ("inconclusive", 3)
    assert compare(changed(ours(), keep("result_output")), reference())["verdict"] == "clean"


def test_few_taps_and_the_model_name_what_lies_between():
    wrong, right = faulty("kv-heads-tiled")
    few = keep("model", "l_out", "result")
    report = compare(changed(wrong, few), changed(right, few), model=run.InMemory(model()))
    assert report["first"]["tap"] == "l_out-2"
    assert (report["class"], report["cause"]["name"]) == ("attention", "head-permutation")


def test_a_broken_reference_is_found_too():
    wrong, right = faulty("conv-silu-missing")
    report = compare(right, wrong)
    assert (report["first"]["op"], report["cause"]["name"]) == ("conv_output_silu", "missing-silu")


def test_dumps_from_disk_give_the_same_report(tmp_path):
    paths = []
    for side, dump in zip("ab", faulty("ffn-sign"), strict=True):
        paths.append(tmp_path / side)
        write_dump(paths[-1], dump, engine="e", tokens=dump.tokens)
    report = compare(*paths)
    assert (report["verdict"], report["first"]["tap"], report["cause"]["name"]) == (
        "single-op",
        "ffn_out-2",
        "sign",
    )


def test_nothing_depends_on_chance():
    pair = faulty("rope-pairing")
    assert compare(*pair) == compare(*pair)


def test_renaming_by_a_map(tmp_path):
    named = Dump({re.sub(r"-(\d+)$", r".\1", n): ours()[n] for n in ours()}, tokens=ours().tokens)
    report = compare(named, reference(), mapping={"ffn_up.{}": "ffn_up-{}", "ffn_gate.{}": "ffn_gate-{}"})
    assert {"ffn_up-0", "ffn_gate-5"} <= {tap["name"] for tap in report["taps"]}
    bad = tmp_path / "map.json"
    bad.write_text("[1]")
    with pytest.raises(BadInput, match="--map"):
        compare(named, reference(), mapping=bad)


@pytest.mark.parametrize("fault", ["kv-heads-tiled", "conv-silu-missing", "ffn-sign"])
def test_layer_outputs_alone_cannot_say_which_operation(fault):
    few = keep("l_out")
    report = compare(*(changed(dump, few) for dump in faulty(fault)))
    assert (report["verdict"], report["exit"]) == ("inconclusive", 3)
    assert ("l_out-0" if fault == "conv-silu-missing" else "l_out-2") in report["why"]
    assert compare(changed(ours(), few), changed(reference(), few))["verdict"] == "clean"
