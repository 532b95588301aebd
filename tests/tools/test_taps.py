"""`scarlet taps`: one dump format whichever engine computes, and one line for whatever is wrong."""

import json
import subprocess
import sys

import models
import numpy as np
import pytest
from support import relative_l2

from scarlet_jax.tools import cli
from scarlet_jax.tools.parity.dump import read_dump

SHAPE = models.SHAPES["untied"]
ENGINES = ["scarlet", "llama.cpp", "transformers"]

# Two engines in F32: each was at most 4e-6 from the float64 forward over these models; see test_llama_cpp.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model() -> str:
    return str(models.path(SHAPE))


def dump(tmp_path, *arguments, name="out"):
    out = tmp_path / f"{name}.safetensors"
    assert cli.main(["taps", *arguments, "-o", str(out)]) == 0
    return read_dump(out)


def engine_or_skip(engine: str) -> str:
    if engine == "transformers":
        pytest.importorskip("transformers")
    return engine


@pytest.mark.parametrize("decode", ["0", "3"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_writes_the_same_dump(engine, decode, model, tmp_path):
    flags = [model, "--tokens", "5,300,17,17,4,99,280,33"]
    reference = dump(tmp_path, *flags, "--engine", "llama.cpp", "--decode", decode, name="reference")
    ours = dump(tmp_path, *flags, "--engine", engine_or_skip(engine), "--decode", decode)
    assert ours.tokens == [5, 300, 17, 17, 4, 99, 280, 33]
    assert (ours.model, ours.arch) == ("synth qwen35", "qwen35")
    assert ours.engine.startswith("scarlet_jax " if engine == "scarlet" else engine)
    assert ours.config["qwen35.ssm.conv_kernel"] == SHAPE.conv_kernel
    assert {"l_out-0", "Qcur-2", "new_state-0", "kqv-5", "result_norm", "result_output"} <= set(ours)
    shared = [tap for tap in ours if tap in reference]
    assert len(shared) > 0.5 * len(reference)
    wrong = {tap: relative_l2(ours[tap], reference[tap]) for tap in shared}
    assert {tap: error for tap, error in wrong.items() if not error < TOLERANCE} == {}
    assert {tap: ours.weights.get(tap) for tap in shared} == {
        tap: reference.weights.get(tap) for tap in shared
    }


def test_arrays_are_token_first(model, tmp_path):
    s, count = SHAPE, 5
    taps = dump(tmp_path, model, "--tokens", "1,2,3,4,5", "--engine", "llama.cpp")
    heads = {"Qcur-2": s.head_count, "Kcur-2": s.head_count_kv, "Vcur-2": s.head_count_kv}
    shapes = {tap: (count, n, s.key_length) for tap, n in heads.items()} | {
        "attn_norm-0": (count, s.embedding_length),
        "kq-2": (count, s.head_count, count),
        "kqv-2": (count, s.head_count, s.key_length),
        "attn_output-2": (count, s.embedding_length),
        "attn_output-0": (count, s.time_step_rank, s.state_size),
        "q_conv-0": (count, s.group_count, s.state_size),
        "qkv_mixed_transposed-0": (count, s.conv_channels),
        "conv_input-0": (s.conv_kernel - 1 + count, s.conv_channels),
        "conv_state_last-0": (s.conv_kernel - 1, s.conv_channels),
        "new_state-0": (s.time_step_rank, s.state_size, s.state_size),
        "beta-0": (count, s.time_step_rank, 1),
        "result_output": (count, s.vocab_size),
    }
    assert {tap: taps[tap].shape for tap in shapes} == shapes


def test_a_text_is_tokenized_by_the_files_own_tokenizer(model, tmp_path):
    taps = dump(tmp_path, model, "-p", "the fox", "--engine", "llama.cpp", "--select", "^l_out-0$")
    assert taps.tokens == models.model(SHAPE).tokenizer.encode("the fox")
    assert list(taps) == ["l_out-0"]


def test_a_checkpoint_directory_works(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    config = transformers.Qwen3_5TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3_5ForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    taps = dump(tmp_path, str(tmp_path / "checkpoint"), "--tokens", "1,2,3", "--engine", "transformers")
    assert taps["result_output"].shape == (3, 97)
    assert taps.config["hidden_size"] == 32
    assert np.isfinite(taps["l_out-3"]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "1,x"], "--tokens '1,x': expected ids separated by commas, such as 1,2,3"),
        (["--tokens", ""], "--tokens '': expected ids separated by commas"),
        (["--tokens", "1,999"], "expected 0 to 330"),
        (["-p", ""], "-p: the prompt is empty"),
        (["--tokens", "1,2", "--select", "(["], "--select ([: is no regular expression"),
        (["--tokens", "1,2", "--select", "zzz"], "--select zzz: no tap has such a name"),
        (["--tokens", "1,2", "--decode", "2"], "--decode 2: expected fewer than the 2 tokens"),
        (["--tokens", "1,2", "--decode", "-1"], "--decode -1: expected fewer than the 2 tokens"),
        (["--tokens", "1,2", "--lib", "none.so"], "none.so: no such file; expected llama.cpp's libllama.so"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, model, tmp_path, capsys):
    arguments = ["taps", model, *flags, "-o", str(tmp_path / "out"), "--engine", "llama.cpp"]
    assert cli.main(arguments) == 2
    check_one_line(capsys, message)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_model_or_place_is_one_line(model, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    out, folder = str(tmp_path / "out"), str(tmp_path / "folder")
    for arguments, message in [
        (["none.gguf", "-o", out], "none.gguf: no such file"),
        ([folder, "-o", out], "folder: expected a GGUF, or a checkpoint"),
        ([model, "-o", str(tmp_path / "none" / "out")], "none/out: expected a path in a folder"),
        ([model, "-o", folder], "folder: the dump cannot be written"),
        ([model, "-o", out, "--lib", "x"], "--lib: only for --engine llama.cpp; this is scarlet"),
    ]:  # fmt: skip
        assert cli.main(["taps", *arguments, "--tokens", "1,2"]) == 2
        check_one_line(capsys, message)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def check_one_line(capsys, message):
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_no_space_on_the_disk_leaves_nothing(model, tmp_path):
    """A limit on the size of files stands in for a full disk: writing fails half way in either case."""
    script = """if True:
        import resource, signal, sys
        from scarlet_jax.tools import cli
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        sys.exit(cli.main(sys.argv[1:]))"""
    flags = ["taps", model, "--tokens", "1,2,3", "-o", str(tmp_path / "out"), "--engine", "llama.cpp"]
    done = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "out: the dump cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["taps", "--help"])
    assert "example: scarlet taps model.gguf -p" in capsys.readouterr().out


def test_metadata_is_what_the_contract_says(model, tmp_path):
    """Read without our reader: a safetensors header is a length and JSON."""
    dump(tmp_path, model, "--tokens", "1,2", "--engine", "llama.cpp", "--select", "ffn_up-0|l_out-0")
    raw = (tmp_path / "out.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = header.pop("__metadata__")
    assert set(header) == {"ffn_up-0", "l_out-0"}
    assert header["l_out-0"]["shape"] == [2, SHAPE.embedding_length]
    assert metadata["format"] == "scarlet-taps/1"
    assert json.loads(metadata["tokens"]) == [1, 2]
    assert json.loads(metadata["order"]) == ["ffn_up-0", "l_out-0"]
    assert json.loads(metadata["weights"]) == {"ffn_up-0": ["blk.0.ffn_up.weight", "F32"]}
