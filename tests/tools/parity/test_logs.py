"""Text logs: what llama.cpp's callback prints is read back with its gaps and its rounding."""

import numpy as np
import pytest
from faults import run
from faults.cases import changed, faulty, model, ours, reference
from faults.dress import log

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity import compare
from scarlet_jax.tools.parity.logs import RESOLUTION, Sampled, read_log
from scarlet_jax.tools.parity.readers import read

MAINLINE = {}
IK = {"prefix": "ggml_debug:", "indent": (37, 38, 39)}


@pytest.mark.parametrize("style", [MAINLINE, IK])
def test_values_places_and_tokens(style):
    dump = read_log(log(reference(), **style), "log")
    assert list(dump.tokens) == list(reference().tokens)
    assert dump.resolution == RESOLUTION
    some = 0
    for name in dump:
        value, truth = dump[name], np.asarray(reference()[name])
        mine = value.of(truth) if isinstance(value, Sampled) else truth.reshape(value.shape)
        theirs = value.values if isinstance(value, Sampled) else value
        assert np.abs(mine - theirs).max() <= RESOLUTION * 1.01, name
        some += isinstance(value, Sampled)
    assert some > 50


def test_a_clean_pair_is_no_fault(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(log(reference()))
    assert compare(ours(), read(path))["exit"] == 0
    assert compare(ours(), read(path), model=run.InMemory(model()))["exit"] == 0
    assert compare(read(path), read(path))["verdict"] == "clean"


@pytest.mark.parametrize("fault", ["conv-silu-missing", "kv-heads-tiled", "norm-offset-missing"])
def test_a_fault_shows_against_a_log(fault):
    wrong, right = faulty(fault)
    report = compare(wrong, read_log(log(right), "log"), model=run.InMemory(model()))
    assert report["exit"] == 1
    expected = {
        "conv-silu-missing": "conv_output_silu-0",
        "kv-heads-tiled": "kq-2",
        "norm-offset-missing": "attn_norm-0",
    }
    assert report["first"]["tap"] == expected[fault]


def test_below_the_resolution_there_is_no_verdict():
    faint = [read_log(log(changed(d, lambda n, x: x * 1e-4)), "log") for d in (ours(), reference())]
    report = compare(*faint)
    assert (report["verdict"], report["exit"]) == ("inconclusive", 3)
    assert "rounded" in report["why"]


def test_a_cut_log_gives_what_it_holds():
    text = log(reference())
    dump = read_log(text[: len(text) // 2], "log")
    assert 20 < len(dump) < len(reference())
    assert any("cut short" in note for note in dump.notes)
    assert compare(ours(), dump)["exit"] == 0


def test_repeated_passes_keep_the_last():
    once = log(changed(reference(), lambda n, x: x * 0 if n == "l_out-0" else x))
    dump = read_log(once + "\n" + log(reference()), "log")
    value = dump["l_out-0"]
    assert np.abs(value.values).max() > 0.1


@pytest.mark.parametrize(
    "text", ["", "hello\nworld", "common_debug_cb_eval: x = (f32) ADD(a{1}, b{1}}) = {4, 1, 1, 1}\n"]
)
def test_no_tensor_in_it(tmp_path, text):
    path = tmp_path / "log.txt"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"log\.txt"):
        read(path)


def test_nan_in_a_log():
    broken = changed(reference(), lambda n, x: x * np.nan if n == "ffn_up-1" else x)
    dump = read_log(log(broken), "log")
    assert np.isnan(dump["ffn_up-1"].values).all()


# As llama-eval-callback prints a lone sequence: views of the other sequences' states have no rows, the output is
# stamped with times, and the end is lost when the tool leaves before its log has drained.
REAL = """\
0.00.355.524 I number of input tokens = 2
0.00.355.531 I   39
0.00.355.537 I   273
common_debug_cb_eval:        cache_r_l0 (view) = (f32)       VIEW(cache_r_l0{3840, 1, 1, 1}, }) = {3840, 0, 1, 1}
    [
        [
        ],
    ]
    sum = 0.000000
common_debug_cb_eval:   conv_states_reshaped-0 = (f32)    RESHAPE(conv_states-0{6, 1, 1, 1}, }) = {3, 2, 1, 1}
    [
        [
            [      0.0000,       1.0000,       2.0000  ],
            [      0.5000,       0.0000,       0.0000  ],
        ],
    ]
    sum = 3.500000
common_debug_cb_eval:             ffn_swiglu-3 = (f32)     SWIGLU(gate-3{2, 2, 1, 1}, up-3{2, 2, 1, 1}}) = {2, 2, 1, 1}
    [
"""


def test_a_real_log_with_views_of_no_rows():
    dump = read_log(REAL, "log")
    assert list(dump) == ["conv_states_reshaped-0"]
    assert np.array_equal(dump["conv_states_reshaped-0"], [[0, 0.5], [1, 0], [2, 0]])
    assert list(dump.tokens) == [39, 273]
