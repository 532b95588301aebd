"""Models that were made: llama.cpp loads each, their numbers are sensible, the recipes are llama.cpp's."""

import dataclasses
import errno
import re
import subprocess
import sys

import gguf
import models
import numpy as np
import oracle
import pytest
from support import relative_l2

from scarlet_jax.errors import BadInput
from scarlet_jax.gguf import read
from scarlet_jax.tools import cli, synth, synth_vocabulary
from scarlet_jax.tools.engines import ggml, llama_cpp
from scarlet_jax.tools.synth import Shape

TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 282, 40)]
PACKABLE = models.PACKABLE


def types_of(tensors: list[synth.Tensor]) -> dict[str, str]:
    return {tensor.name: tensor.qtype for tensor in tensors}


# --- What llama.cpp makes of them ---------------------------------------------------------------------------


def check_llama_cpp_runs(path):
    with llama_cpp.Engine(path) as engine:
        logits = engine.decode(TOKENS[:5])
    assert np.isfinite(logits).all()
    assert logits.std() > 1


@pytest.mark.parametrize("qtype", ggml.TYPE_IDS)
def test_llama_cpp_runs_every_type(qtype, tmp_path):
    """One tensor of it: some quantisers manage only 40,000 weights a second."""
    shape = dataclasses.replace(PACKABLE, block_count=2)
    path = synth.write(tmp_path / "m.gguf", shape, "Q8_0", types={r"blk\.1\.ffn_up\.weight": qtype})
    assert read(path).tensors["blk.1.ffn_up.weight"].qtype == qtype
    check_llama_cpp_runs(path)


@pytest.mark.parametrize("quant", synth.MIXES)
def test_llama_cpp_runs_every_mix(quant, tmp_path):
    check_llama_cpp_runs(
        synth.write(tmp_path / "m.gguf", dataclasses.replace(PACKABLE, block_count=2), quant)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"tied": True},
        {"fused_qkv": True},
        {"scales": True},
        {"nextn_predict_layers": 1},
        {"recurrent_layers": (False, True, True, False)},
        {"conv_kernel": 3},
        {"conv_kernel": 5},
        {"alignment": 64},
        {"vocab_size": synth_vocabulary.SMALLEST},
        {"dimension_count": 64, "dimension_sections": (11, 11, 10, 0)},
        {"key_length": 40},
        {"head_count_kv": 1},
        {"group_count": 1, "time_step_rank": 3},
        {"layer_norm_rms_epsilon": 1e-3},
    ],
    ids=str,
)
def test_every_axis_is_free(change, tmp_path):
    """llama.cpp loads it and computes what the float64 forward makes of the same file."""
    small = dataclasses.replace(PACKABLE, embedding_length=64, feed_forward_length=96)
    path = synth.write(tmp_path / "m.gguf", dataclasses.replace(small, **change))
    with llama_cpp.Engine(path) as engine:
        logits = engine.decode(TOKENS[:7])
    # llama.cpp was at most 4e-6 from it on such models; a size that reached only one of the two gives 1e-2.
    assert relative_l2(logits, oracle.forward(path, TOKENS[:7])[0]) < 2e-5


def test_separate_scales_leave_the_products_as_they_were(tmp_path):
    logits = []
    for scales in (False, True):
        path = synth.write(tmp_path / "m.gguf", dataclasses.replace(PACKABLE, scales=scales))
        with llama_cpp.Engine(path) as engine:
            logits.append(engine.decode(TOKENS[:7]))
    assert relative_l2(*logits) < 2e-5  # as two roundings of one model


def test_numbers_are_those_of_a_working_model():
    """Nothing dies out or explodes in 24 layers, logits are spread, a tied head does not echo its input."""
    shape = Shape(block_count=24, tied=True, vocab_size=2000)
    taps, _, _ = llama_cpp.taps(
        models.path(shape), TOKENS, select="l_out|result|gate_sigmoid|beta_sig|kq_soft|^gate-"
    )
    size = {name: float(np.sqrt(np.mean(np.square(x)))) for name, x in taps.items()}
    assert all(0.2 < size[f"l_out-{i}"] < 5 for i in range(24))
    logits = taps["result_output"]
    assert 2 < logits.std() < 4.5
    assert np.mean(logits.argmax(1) == TOKENS) < 0.1
    assert len(set(logits.argmax(1))) > len(set(TOKENS)) // 2  # the head follows the context
    forgotten = np.exp(taps["gate-0"])
    assert forgotten.min() < 0.7 < 0.99 < forgotten.max()  # heads that forget, and heads that keep
    assert 0.1 < taps["kq_soft_max-23"][-1].max(axis=-1).mean() < 0.95  # attention that chooses, not one-hot


# --- Recipes ------------------------------------------------------------------------------------------------


def test_q4_k_m_is_llama_cpps_mix():
    """The Q6_K layers are those that llama.cpp's rule gives 24 layers, 6 of them with attention."""
    types = types_of(synth.plan(synth.SIZES["qwen35", "0.8b"], "Q4_K_M"))
    down = [i for i in range(24) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert down == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    values = {i: types[f"blk.{i}.attn_v.weight"] for i in range(3, 24, 4)}
    assert [i for i, qtype in values.items() if qtype == "Q6_K"] == [11, 23]
    assert types["token_embd.weight"] == "Q6_K"  # it is the head too
    assert {types[f"blk.{i}.attn_qkv.weight"] for i in (0, 1, 22)} == {"Q5_K"}
    assert (
        types["blk.3.attn_q.weight"]
        == types["blk.0.ffn_up.weight"]
        == types["blk.0.ssm_out.weight"]
        == "Q4_K"
    )


def test_an_untied_table_is_not_the_head():
    types = types_of(synth.plan(PACKABLE, "Q4_K_M"))
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q4_K", "Q6_K")
    types = types_of(synth.plan(PACKABLE, "IQ2_XXS"))
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q2_K", "Q5_K")


def test_what_quantisers_leave_alone_stays_f32():
    types = types_of(synth.plan(dataclasses.replace(PACKABLE, nextn_predict_layers=1, scales=True), "Q4_0"))
    kept = {re.sub(r"^blk[.][0-9]+[.]", "", name) for name, qtype in types.items() if qtype == "F32"}
    assert kept - {name for name in kept if name.endswith(".scale")} == {
        "attn_norm.weight", "post_attention_norm.weight", "attn_q_norm.weight", "attn_k_norm.weight",
        "ssm_conv1d.weight", "ssm_dt.bias", "ssm_a", "ssm_norm.weight", "output_norm.weight",
        "nextn.enorm.weight", "nextn.hnorm.weight", "nextn.shared_head_norm.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("quant", "length", "stored"),
    [
        ("Q4_K", 512, "Q4_K"), ("Q4_K", 96, "Q5_0"), ("Q5_K", 96, "Q5_1"), ("Q6_K", 96, "Q8_0"),
        ("IQ4_XS", 96, "IQ4_NL"), ("IQ2_S", 96, "IQ4_NL"), ("TQ1_0", 96, "Q4_0"), ("Q4_K", 100, "F16"),
        ("Q8_0", 100, "F16"), ("Q1_0", 192, "F16"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_fall_back(quant, length, stored):
    shape = dataclasses.replace(PACKABLE, feed_forward_length=length)
    assert types_of(synth.plan(shape, quant))["blk.1.ffn_down.weight"] == stored


def test_types_overrule_the_recipe(tmp_path):
    wanted = {
        r"blk\.\d+\.ffn_.*": "Q2_K",
        r"blk\.0\.ffn_up\.weight": "Q1_0",
        r"blk\.2\.ssm_alpha\.weight": "F32",
    }
    path = synth.write(tmp_path / "m.gguf", PACKABLE, "Q8_0", types=wanted)
    stored = {name: tensor.qtype for name, tensor in read(path).tensors.items()}
    assert stored["blk.0.ffn_up.weight"] == "Q1_0"
    assert stored["blk.1.ffn_up.weight"] == stored["blk.3.ffn_down.weight"] == "Q2_K"
    assert stored["blk.2.ssm_alpha.weight"] == "F32"
    assert stored["blk.0.ssm_alpha.weight"] == "Q8_0"


# --- The file -----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_in_every_type(tmp_path):
    exact = oracle.load(synth.write(tmp_path / "f32.gguf", PACKABLE, seed=7)).weights
    packed = oracle.load(synth.write(tmp_path / "q8.gguf", PACKABLE, "Q8_0", seed=7)).weights
    other = oracle.load(synth.write(tmp_path / "other.gguf", PACKABLE, seed=8)).weights
    assert list(exact) == list(packed)
    for name in exact:
        assert relative_l2(packed[name], exact[name]) < 8e-3  # Q8_0's own error is 6e-3
        assert relative_l2(other[name], exact[name]) > 0.05


def test_files_are_reproducible_byte_by_byte(tmp_path):
    """Whatever order the threads finish in, and in another process."""
    first = synth.write(tmp_path / "a.gguf", PACKABLE, "Q4_K_M", seed=7).read_bytes()
    script = (
        "import dataclasses, models; from scarlet_jax.tools import synth;"
        f"synth.write({str(tmp_path / 'b.gguf')!r}, models.PACKABLE, 'Q4_K_M', seed=7)"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PYTHONPATH": models.__file__.rpartition("/")[0]}
    )
    assert (tmp_path / "b.gguf").read_bytes() == first


def test_tensors_larger_than_a_chunk_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "CHUNK_ELEMENTS", 1000)  # 3 rows of 256 at a time
    chunks = list(synth._chunks(synth.plan(PACKABLE)))
    assert max(rows * tensor.shape[-1] for tensor, _, rows in chunks) <= 1000  # memory stays bounded
    weights = oracle.load(synth.write(tmp_path / "m.gguf", PACKABLE)).weights
    rows = weights["blk.0.ffn_gate.weight"]
    assert len(np.unique(rows)) > 0.99 * rows.size  # no chunk is missing and none occurs twice
    assert 0.9 < rows.std() * 16 < 1.1  # 1 / sqrt(256)


def test_alignment_is_kept(tmp_path):
    reader = gguf.GGUFReader(
        synth.write(tmp_path / "m.gguf", dataclasses.replace(PACKABLE, alignment=128), "Q5_K_M")
    )
    assert reader.alignment == 128
    assert all(tensor.data_offset % 128 == 0 for tensor in reader.tensors)
    assert (tmp_path / "m.gguf").stat().st_size % 128 == 0


def test_published_sizes_are_the_fact_sheets():
    """Parameters by name of the model, and the 2B file's 335 tensors (spec section 2)."""
    billions = {}
    for arch, size in synth.SIZES:
        tensors = synth.plan(synth.SIZES[arch, size])
        billions[size] = sum(int(np.prod(tensor.shape)) for tensor in tensors) / 1e9
    assert {size: round(count, 2) for size, count in billions.items() if size != "tiny"} == {
        "0.8b": 0.75, "2b": 1.88, "4b": 4.21, "9b": 8.95, "27b": 26.9,
        "35b-a3b": 34.66, "35b-a3b-cut": 3.64, "122b-a10b": 122.11, "397b-a17b": 396.35,
    }  # fmt: skip
    with_prediction = dataclasses.replace(synth.SIZES["qwen35", "2b"], nextn_predict_layers=1)
    assert len(synth.plan(with_prediction)) == 335


# --- The vocabulary -----------------------------------------------------------------------------------------


def test_the_real_table_has_the_real_ids():
    keys = synth_vocabulary.metadata(248320)
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == len(keys["tokenizer.ggml.token_type"]) == len(set(tokens)) == 248320
    for token, number in [
        ("<|endoftext|>", 248044), ("<|im_start|>", 248045), ("<|im_end|>", 248046),
        ("<|vision_start|>", 248053), ("<|vision_pad|>", 248055), ("<|image_pad|>", 248056),
        ("<|video_pad|>", 248057), ("<think>", 248068), ("</think>", 248069),
    ]:  # fmt: skip
        assert tokens[number] == token
    assert keys["tokenizer.ggml.eos_token_id"] == 248046
    kinds = [keys["tokenizer.ggml.token_type"][i] for i in (0, 100_000, 248046, 248068, 248319)]
    assert kinds == [1, 5, 3, 4, 5]  # normal, unused, control, user-defined, unused


def test_merges_make_tokens_that_exist():
    keys = synth_vocabulary.metadata(512)
    known = set(keys["tokenizer.ggml.tokens"])
    assert len(keys["tokenizer.ggml.merges"]) > 100
    for merge in keys["tokenizer.ggml.merges"]:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= known


# --- Bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "3b"], "--arch qwen35 --size 3b: expected one of qwen35 tiny, qwen35 0.8b"),
        (["--arch", "gpt2"], "--arch gpt2 --size tiny: expected one of"),
        (["--quant", "Q4_K_XL"], "--quant Q4_K_XL: expected one of F32, F16"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
    ],
)
def test_a_wrong_flag_is_one_line(arguments, message, tmp_path, capsys):
    assert cli.main(["synth", str(tmp_path / "m.gguf"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_file(tmp_path, capsys):
    assert cli.main(["synth", str(tmp_path / "m.gguf"), "--size", "tiny", "--quant", "Q8_0"]) == 0
    assert read(tmp_path / "m.gguf").architecture == "qwen35"
    assert capsys.readouterr().err == ""  # no progress bar where nobody looks


def test_a_vocabulary_too_small_is_refused(tmp_path):
    with pytest.raises(BadInput, match="vocabulary of 100: expected 288 or more"):
        synth.write(tmp_path / "m.gguf", dataclasses.replace(PACKABLE, vocab_size=100))


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"none/m\.gguf: cannot be written: No such file or directory"):
        synth.write(tmp_path / "none" / "m.gguf", PACKABLE)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synth, "_write_chunk", full)
    with pytest.raises(BadInput, match=r"m\.gguf: cannot be written: No space left on device"):
        synth.write(tmp_path / "m.gguf", PACKABLE)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_survives_a_failure(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_text("the older one")

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(synth, "_write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synth.write(tmp_path / "m.gguf", PACKABLE)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the older one"]
