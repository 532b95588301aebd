"""llama.cpp as a reference: its coding of blocks, its engine, its taps."""

import ctypes
import functools
import importlib
import os

import gguf
import models
import numpy as np
import oracle
import pytest
from support import relative_l2

from scarlet_jax.errors import BadInput
from scarlet_jax.tools import synth
from scarlet_jax.tools.engines import ggml, llama_cpp, steps

# A path to one more libllama to test, as a user would give with --lib.
LIBRARIES = [None, *filter(None, [os.environ.get("SCARLET_LIBLLAMA")])]

# llama.cpp on F32 models was at most 4e-6 from the float64 forward over these shapes and lengths (two tokens
# of seed 2 aside: 1.6e-5, where a key is nearly orthogonal to its query). Any fault here gives 1e-2 or more.
TOLERANCE = 2e-5

TOKENS = [int(t) for t in np.random.default_rng(5).integers(0, 282, 70)]


@functools.cache
def truth(name: str, count: int) -> dict[str, np.ndarray]:
    """The float64 forward's taps of the first `count` tokens."""
    return oracle.forward(models.path(models.SHAPES[name]), TOKENS[:count])[1]


# --- Blocks -------------------------------------------------------------------------------------------------

NOT_IN_GGUF_PY = {"Q1_0", "Q2_0"}  # it cannot decode these

# relative_l2 of coding normal numbers, as measured, plus a tenth. A guard against feeding the quantiser
# wrong rows: garbage would give about 1.4. The rest are coarse: 0.9 bounds them all.
CODING_ERROR = {"F32": 0, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 6e-3, "Q6_K": 0.02, "Q5_K": 0.041, "Q4_K": 0.08}


@pytest.mark.parametrize("qtype", ggml.TYPE_IDS)
def test_blocks_decode_as_gguf_py_decodes_them(qtype):
    x = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    blocks = ggml.quantize(x, qtype)
    y = ggml.to_float(qtype, blocks)
    assert relative_l2(y, x) <= CODING_ERROR.get(qtype, 0.9)
    if qtype not in NOT_IN_GGUF_PY:
        stored = blocks.view(np.float32) if qtype == "F32" else blocks
        expected = gguf.dequantize(stored, gguf.GGMLQuantizationType[qtype])
        np.testing.assert_array_equal(y, expected.astype(np.float32))


@pytest.mark.parametrize(("qtype", "bits", "elements"), [("Q1_0", 1, 128), ("Q2_0", 2, 64)])
def test_one_and_two_bit_blocks_decode_as_the_format_says(qtype, bits, elements):
    """The layouts of spec section 9, by arithmetic: lowest bits first, one F16 scale a block."""
    rng = np.random.default_rng(2)
    scale = rng.standard_normal((5, 1)).astype(np.float16)
    packed = rng.integers(0, 256, (5, elements * bits // 8), np.uint8)
    blocks = np.concatenate([scale.view(np.uint8), packed], axis=1)
    codes = (packed[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
    codes = codes.reshape(5, elements).astype(np.float32)
    level = 2 * codes - 1 if qtype == "Q1_0" else codes - 1
    np.testing.assert_array_equal(ggml.to_float(qtype, blocks), scale.astype(np.float32) * level)


def test_leading_axes_are_kept_and_empty_is_fine():
    blocks = ggml.quantize(np.ones((6, 64), np.float32), "Q4_0")
    assert ggml.to_float("Q4_0", blocks.reshape(2, 3, 36)).shape == (2, 3, 64)
    assert ggml.to_float("Q4_0", blocks[:0]).shape == (0, 64)


@pytest.mark.parametrize("qtype", ["Q8_K", "Q8_1", "I32", "Q9_9"])
def test_a_type_that_is_no_weight_type_is_refused(qtype):
    with pytest.raises(BadInput, match=qtype):  # ggml itself would abort the process
        ggml.quantize(np.zeros((1, 256), np.float32), qtype)


def test_rows_must_be_whole_blocks():
    with pytest.raises(BadInput, match="Q4_K: rows of 128 elements are not whole blocks of 256"):
        ggml.quantize(np.zeros((1, 128), np.float32), "Q4_K")
    with pytest.raises(BadInput, match="Q4_K: rows of 143 bytes are not whole blocks of 144"):
        ggml.to_float("Q4_K", np.zeros((1, 143), np.uint8))


# --- The library and its layouts ----------------------------------------------------------------------------


def test_a_library_that_is_not_llama_cpp_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        ggml.library(tmp_path / "libllama.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(BadInput, match=r"text\.so: cannot load it as a llama\.cpp library"):
        ggml.library(tmp_path / "text.so")
    with pytest.raises(BadInput, match=r"not a usable llama\.cpp library: it lacks ggml_"):
        ggml.library(importlib.import_module("numpy._core._multiarray_umath").__file__)  # other symbols


DEFAULTS = {
    **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1},
    **{"n_threads": 4, "n_threads_batch": 4, "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0},
    **dict.fromkeys(("rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type"), -1),
    **{"type_k": 1, "type_v": 1, "defrag_thold": -1.0, "split_mode": 1, "load_mode": 1, "n_gpu_layers": -1},
}


@pytest.mark.parametrize("known", [ggml._CONTEXT_LAYOUTS, ggml._MODEL_LAYOUTS])
def test_defaults_tell_the_layouts_apart(known):
    """llama.cpp's defaults, laid out in each known way, fit that way and no other."""
    fits = ggml._context_defaults_fit if known is ggml._CONTEXT_LAYOUTS else ggml._model_defaults_fit
    for layout in known:
        params = layout(**{name: value for name, value in DEFAULTS.items() if name in dict(layout._fields_)})
        if hasattr(params, "flags"):
            params.flags[1] = 1
        memory = bytearray(bytes(params) + bytes(64))
        assert [fits(other.from_buffer(memory)) for other in known] == [other is layout for other in known]


@pytest.mark.parametrize("kind", ["_CONTEXT_LAYOUTS", "_MODEL_LAYOUTS"])
def test_a_library_of_an_unknown_layout_is_refused(kind, monkeypatch):
    path = ggml.library().path
    shifted = [type("Shifted", (ctypes.Structure,), {"_fields_": [("new", ctypes.c_int64), *layout._fields_]})
               for layout in getattr(ggml, kind)]  # fmt: skip
    monkeypatch.setattr(ggml, kind, shifted)
    with pytest.raises(BadInput, match="has a layout that is not known here"):
        ggml.Library(path)


def test_a_tensor_of_an_unknown_layout_is_refused(monkeypatch):
    path = ggml.library().path
    fields = [("new", ctypes.c_int64), *ggml.TensorStruct._fields_]
    pointer = ctypes.POINTER(type("Shifted", (ctypes.Structure,), {"_fields_": fields}))
    changed = {
        name: (
            pointer if result is ggml._TENSOR else result,
            [pointer if a is ggml._TENSOR else a for a in arguments],
        )
        for name, (result, arguments) in ggml._PROTOTYPES.items()
    }
    monkeypatch.setattr(ggml, "_PROTOTYPES", changed)
    with pytest.raises(BadInput, match="ggml_tensor has a layout that is not known here"):
        ggml.Library(path)


# --- The engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lib", LIBRARIES)
@pytest.mark.parametrize("name", models.SHAPES)
def test_logits_are_the_models(name, lib):
    path = models.path(models.SHAPES[name])
    with llama_cpp.Engine(path, lib=lib) as engine:
        logits = engine.decode(TOKENS)
    assert relative_l2(logits, truth(name, len(TOKENS))["result_output"]) < TOLERANCE


def test_prefill_decode_and_two_sequences_agree():
    path = models.path(models.SHAPES["untied"])
    first, second = TOKENS[:9], TOKENS[20:27]
    with llama_cpp.Engine(path, sequences=2) as engine:
        whole = engine.decode(first)
        engine.clear()
        pieces = [engine.decode(first[:4]), *(engine.decode([t]) for t in first[4:])]
        assert relative_l2(np.concatenate(pieces), whole) < TOLERANCE
        engine.clear()
        other = engine.decode(second)
        engine.clear()
        both = engine.decode(first + second, sequences=[0] * 9 + [1] * 7)
        assert relative_l2(both, np.concatenate([whole, other])) < TOLERANCE
        assert relative_l2(other[:, :100], whole[:7, :100]) > 0.5  # they are not the same to begin with


def test_the_last_logits_alone_are_the_last():
    with llama_cpp.Engine(models.path(models.SHAPES["untied"])) as engine:
        every = engine.decode(TOKENS[:9])
        engine.clear()
        last = engine.decode(TOKENS[:9], last=True)
    assert last.shape == (1, models.SHAPES["untied"].vocab_size)
    assert relative_l2(last[0], every[-1]) < TOLERANCE


def test_small_physical_batches_change_nothing():
    path = models.path(models.SHAPES["untied"])
    with llama_cpp.Engine(path) as whole, llama_cpp.Engine(path, n_ubatch=8) as parts:
        assert relative_l2(parts.decode(TOKENS), whole.decode(TOKENS)) < TOLERANCE


def test_an_error_in_the_callback_comes_out():
    def fail(_node):
        raise ArithmeticError("on purpose")

    with (
        llama_cpp.Engine(models.path(models.SHAPES["untied"]), observe=fail) as engine,
        pytest.raises(ArithmeticError, match="on purpose"),
    ):
        engine.decode(TOKENS)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        llama_cpp.Engine(tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(BadInput, match=r"broken\.gguf: llama\.cpp cannot load it: .+"):
        llama_cpp.Engine(broken)
    shape = models.SHAPES["untied"]
    with llama_cpp.Engine(models.path(shape), n_ctx=8) as engine:
        for tokens, message in [
            ([], "no tokens"),
            ([1, shape.vocab_size], f"token id {shape.vocab_size}: expected 0 to {shape.vocab_size - 1}"),
            ([-1], "token id -1"),
            ([1] * 9, "9 tokens: expected 8 or fewer"),
        ]:
            with pytest.raises(BadInput, match=message):
                engine.decode(tokens)
        assert len(engine.decode([1] * 8)) == 8  # a refusal changes nothing


def test_a_text_goes_there_and_back():
    text = "The quick brown fox, naïve: 你好 <|im_end|>"
    with llama_cpp.Model(models.path(models.SHAPES["untied"]), vocab_only=True) as model:
        tokens = model.tokenize(text)
        assert b"".join(model.piece(token) for token in tokens).decode() == text
        assert len(model.tokenize("<|im_end|>")) == 1
        assert len(model.tokenize("<|im_end|>", parse_special=False)) > 1


# --- Taps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lib", LIBRARIES)
@pytest.mark.parametrize("count", [1, 2, 70])
@pytest.mark.parametrize("name", models.SHAPES)
def test_every_tap_is_the_forward_of_the_spec(name, count, lib):
    path, tokens = models.path(models.SHAPES[name]), TOKENS[:count]
    taps, _, _ = llama_cpp.taps(path, tokens, lib=lib)
    expected = dict(truth(name, count))
    expected.pop("h_nextn")  # some versions give the same tensor a later name
    assert set(expected) <= set(taps)
    wrong = {tap: relative_l2(taps[tap], x) for tap, x in expected.items()}
    assert {tap: error for tap, error in wrong.items() if not error < TOLERANCE} == {}


def test_taps_are_what_the_fact_sheet_lists():
    """Spec section 5, and nothing without a name of its own."""
    recurrent = """conv_states conv_states_reshaped linear_attn_qkv_mixed qkv_mixed_transposed conv_input
        conv_state_last conv_state_update conv_output_raw conv_output_silu q_conv q_conv_predelta k_conv
        k_conv_predelta v_conv_predelta alpha a_softplus gate beta beta_sigmoid state_predelta new_state
        attn_output z final_output linear_attn_out"""
    full = """Qcur_full Qcur_reshaped Qcur_normed Qcur Vcur Kcur_normed Kcur kq kq_soft_max kqv attn_pregate
        gate_reshaped gate_sigmoid attn_gated attn_output"""
    both = "norm attn_norm attn_residual attn_post_norm ffn_gate ffn_up ffn_swiglu ffn_out l_out"
    taps, _, _ = llama_cpp.taps(models.path(models.PACKABLE), TOKENS[:3])
    expected = {"model.input_embed", "norm", "result_norm", "result_output"}
    expected |= {f"{tap}-{i}" for i in (0, 2) for tap in (recurrent + " " + both).split()}
    expected |= {f"{tap}-{i}" for i in (1, 3) for tap in (full + " " + both).split()}
    assert set(taps) - {"h_nextn"} == expected
    order = list(taps)
    for before, after in zip(
        ["model.input_embed", "attn_norm-0", "conv_input-0", "new_state-0", "norm-0", "l_out-0", "Qcur-1"],
        ["attn_norm-0", "conv_input-0", "new_state-0", "norm-0", "l_out-0", "Qcur-1", "result_output"],
        strict=True,
    ):
        assert order.index(before) < order.index(after)


def test_products_know_their_weight():
    path = models.path(models.PACKABLE, "Q4_K_M")
    taps, weights, engine = llama_cpp.taps(path, TOKENS[:2])
    assert engine.startswith("llama.cpp ")
    assert weights.keys() <= taps.keys()
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert {name: stored[name] for name, _ in weights.values()} == dict(weights.values())
    assert weights["linear_attn_qkv_mixed-0"] == (
        "blk.0.attn_qkv.weight",
        "Q5_K",
    )  # an unnamed product, reshaped
    assert weights["attn_output-1"] == ("blk.1.attn_output.weight", "Q4_K")
    assert weights["result_output"] == ("output.weight", "Q6_K")
    assert "attn_output-0" not in weights  # there it is the delta rule's output
    assert "Kcur-1" not in weights  # the name's last use is after rope
    assert "kq-1" not in weights  # a product, but of activations
    matrices = {name for name in stored if name.startswith("blk.") and not synth._stays_f32(name, (1, 1))}
    assert matrices - {name for name, _ in weights.values()} == {"blk.1.attn_k.weight", "blk.3.attn_k.weight"}


def test_a_separate_scale_does_not_hide_the_weight():
    _, weights, _ = llama_cpp.taps(models.path(models.SHAPES["scaled"]), TOKENS[:2])
    assert weights["linear_attn_out-0"] == ("blk.0.ssm_out.weight", "F32")


def test_decoding_the_last_tokens_gives_the_same_taps():
    path = models.path(models.SHAPES["untied"])
    whole, _, _ = llama_cpp.taps(path, TOKENS[:9])
    parts, _, _ = llama_cpp.taps(path, TOKENS[:9], decode=5)
    assert list(parts) == list(whole)
    scores = [tap for tap in whole if tap.startswith("kq-")]
    for tap in scores:  # a token that was decoded has not seen the keys that came later
        seen = np.tri(9, 9, dtype=bool)[:, None] | (np.arange(9) < 4)[:, None, None] & (np.arange(9) < 4)
        whole[tap] = np.where(seen, whole[tap], 0)
    wrong = {tap: relative_l2(parts[tap], x) for tap, x in whole.items()}
    assert {tap: error for tap, error in wrong.items() if not error < TOLERANCE} == {}


def test_only_selected_taps_are_taken():
    taps, weights, _ = llama_cpp.taps(
        models.path(models.SHAPES["untied"]), TOKENS[:3], select=r"^ffn_(up|gate)-\d"
    )
    assert set(taps) == set(weights) == {f"ffn_{part}-{i}" for part in ("up", "gate") for i in range(6)}


def test_an_f16_cache_shows():
    """The options reach llama.cpp: half precision keys move the scores by about its epsilon, 5e-4."""
    path = models.path(models.SHAPES["untied"])
    exact, _, _ = llama_cpp.taps(path, TOKENS, "^kq-")
    rounded, _, _ = llama_cpp.taps(path, TOKENS, "^kq-", type_k="F16")
    assert 1e-5 < max(relative_l2(rounded[tap], x) for tap, x in exact.items()) < 5e-3
    assert llama_cpp.taps(path, TOKENS, "^kq-", flash_attention=True)[0] == {}  # then scores never exist


# --- Steps --------------------------------------------------------------------------------------------------


def test_steps_join_along_tokens_and_keep_the_right_states():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 4)), rng.standard_normal((1, 3, 4))
    history, later = rng.standard_normal((3 + 2, 5)), rng.standard_normal((3 + 1, 5))
    kq, kq_later = rng.standard_normal((2, 6, 2)), rng.standard_normal((1, 6, 3))
    before, after = rng.standard_normal((2, 2, 7, 7))
    first = {
        "Qcur-0": a,
        "conv_input-0": history,
        "kq-0": kq,
        "state_predelta-0": before,
        "new_state-0": after,
    }
    second = {
        "Qcur-0": b,
        "conv_input-0": later,
        "kq-0": kq_later,
        "state_predelta-0": after,
        "new_state-0": before,
    }
    joined = steps.join([(2, first), (1, second)])
    np.testing.assert_array_equal(joined["Qcur-0"], np.concatenate([a, b]))
    np.testing.assert_array_equal(joined["conv_input-0"], np.concatenate([history, later[3:]]))
    assert joined["kq-0"].shape == (3, 6, 3)
    assert not joined["kq-0"][:2, :, 2].any()
    np.testing.assert_array_equal(joined["state_predelta-0"], before)
    np.testing.assert_array_equal(joined["new_state-0"], before)


def test_steps_split():
    assert steps.split([1, 2, 3, 4], 0) == [[1, 2, 3, 4]]
    assert steps.split([1, 2, 3, 4], 2) == [[1, 2], [3], [4]]
    for decode in (-1, 4):
        with pytest.raises(BadInput, match=f"--decode {decode}: expected fewer than the 4 tokens"):
            steps.split([1, 2, 3, 4], decode)
