"""`scarlet inspect`: counts against gguf-py's, memory against the spec's formulas, and what cannot run."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import gguf
import jax
import models
import numpy as np
import pytest
from rich.console import Console
from support_vocabulary import metadata, write

from scarlet_jax.tools import common, synth
from scarlet_jax.tools.cli import main
from scarlet_jax.tools.common import bytes_text, count_text
from scarlet_jax.tools.inspect import Device, Memory, Report, _device, inspect, show

SHAPE = models.PACKABLE


@pytest.fixture(scope="module")
def path():
    return models.path(SHAPE, "Q4_K_M")


@pytest.fixture(scope="module")
def report(path):
    return inspect(path)


def shown(report: Report, width: int = 100) -> str:
    file = io.StringIO()
    show(report, Console(file=file, width=width, highlight=False))
    return file.getvalue()


@pytest.mark.parametrize("quant", ["Q4_K_M", "IQ2_XXS", "F32"])
def test_tensors_are_counted_as_by_gguf_py(quant):
    file = models.path(SHAPE, quant)
    report = inspect(file)
    tensors = gguf.GGUFReader(file).tensors
    assert report.bytes == sum(tensor.n_bytes for tensor in tensors)
    assert report.weights == sum(tensor.n_elements for tensor in tensors)
    for share in report.types:
        same = [tensor for tensor in tensors if tensor.tensor_type.name == share.name]
        assert share.tensors == len(same) > 0
        assert share.bytes == sum(tensor.n_bytes for tensor in same)
        assert share.bits_per_weight == 8 * share.bytes / sum(tensor.n_elements for tensor in same)
    for shares in (report.types, report.roles):
        assert sum(share.tensors for share in shares) == len(tensors)
        assert sum(share.bytes for share in shares) == report.bytes
        assert [share.bytes for share in shares] == sorted((share.bytes for share in shares), reverse=True)


def test_roles_are_counted_over_blocks(report):
    roles = {share.name: share for share in report.roles}
    assert roles["ffn_up"].shapes == [(SHAPE.feed_forward_length, SHAPE.embedding_length)]
    assert roles["ffn_up"].tensors == SHAPE.block_count
    assert roles["attn_q"].tensors == SHAPE.block_count // SHAPE.full_attention_interval
    assert roles["token_embd"].tensors == roles["output"].tensors == 1
    assert sum(roles["ffn_down"].types.values()) == SHAPE.block_count


def test_memory_is_what_the_spec_says(report):
    """Spec section 8, with states in f32."""
    full = SHAPE.block_count // SHAPE.full_attention_interval
    recurrent = SHAPE.block_count - full
    conv = recurrent * (SHAPE.conv_kernel - 1) * SHAPE.conv_channels * 4
    delta = recurrent * SHAPE.state_size * SHAPE.inner_size * 4
    counts = 4 + 4  # tokens seen, and the position of the next
    kv = full * SHAPE.head_count_kv * 2 * SHAPE.key_length
    assert report.memory.sequence == conv + delta + counts
    assert report.memory.token == {"f32": 4 * kv, "bf16": 2 * kv}
    assert report.memory.weights == report.bytes
    assert report.memory.total(1000, "bf16") == report.bytes + conv + delta + counts + 2000 * kv


def test_a_model_that_runs_has_no_problems(report):
    assert report.problems == report.notes == []
    assert (report.architecture, report.file_type, report.name) == ("qwen35", "Q4_K_M", "synth qwen35")
    assert report.tokenizer["tokens"] == SHAPE.vocab_size
    assert "<|im_end|>" in report.tokenizer["ends"]


def test_the_room_on_a_device_is_what_the_weights_leave():
    config: Any = inspect(models.path(SHAPE, "F32")).config
    memory = Memory(weights=1000, sequence=100, token={"f32": 10, "bf16": 5})

    class Gpu:
        platform = "gpu"

        def __init__(self, size):
            self.size = size

        def __str__(self):
            return "gpu:3"

        def memory_stats(self):
            return self.size and {"bytes_limit": self.size}

    assert _device(Gpu(1150), memory, config) == Device("gpu:3", 1150, 5)
    assert _device(Gpu(1100), memory, config) == Device("gpu:3", 1100, 0)
    assert _device(Gpu(1099), memory, config) == Device("gpu:3", 1099, None)
    assert _device(Gpu(10**9), memory, config) == Device("gpu:3", 10**9, config.context_length)
    assert _device(Gpu(None), memory, config) == Device("gpu:3", None, None)


# --- What cannot run ----------------------------------------------------------------------------------------


def add_tensor(path, **arrays):
    """The vocabulary's file again, with tensors."""
    writer = gguf.GGUFWriter(path, "qwen35")
    for key, value in metadata().items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_another_architecture_is_described_as_far_as_it_goes(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt3000")
    writer.add_name("Tin Man")
    writer.add_tensor("heart", np.ones((3, 7), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = inspect(tmp_path / "m.gguf")
    assert (report.name, report.weights, report.bytes) == ("Tin Man", 21, 42)
    assert report.config is report.memory is None
    assert report.roles[0].shapes == [(3, 7)]
    architecture, tokenizer = report.problems
    assert "'gpt3000' is not supported; expected one of: " in architecture
    assert "metadata key 'tokenizer.ggml.model' is missing" in tokenizer
    text = shown(report)
    assert text.count("cannot run  ") == 2
    assert "runs here" not in text


def test_an_unknown_pre_tokeniser_and_a_missing_template_are_told(tmp_path):
    report = inspect(write(tmp_path / "m.gguf", metadata(pre="tekken")))
    assert any("'tokenizer.ggml.pre' is 'tekken', expected one of qwen35" in line for line in report.problems)
    assert report.notes == ["no chat template: `scarlet generate` continues prompts as they stand"]


def test_a_type_without_decoder_is_told(tmp_path):
    integers = {"a.weight": np.zeros((2, 3), np.int8), "b.weight": np.zeros(4, np.int8)}
    report = inspect(add_tensor(tmp_path / "m.gguf", **integers))
    assert "a.weight and 1 more: of type I8, which has no decoder here" in report.problems


@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_tensors_that_the_loader_would_refuse_are_told(tmp_path, monkeypatch, quant):
    plan = synth.plan

    def spoilt(*args):
        for tensor in plan(*args):
            if tensor.name == "blk.1.attn_k.weight":
                continue
            if tensor.name == "blk.0.ffn_up.weight":
                tensor = dataclasses.replace(tensor, shape=(64, tensor.shape[1]))
            yield tensor

    monkeypatch.setattr(synth, "plan", lambda *args: list(spoilt(*args)))
    [problem] = inspect(synth.write(tmp_path / "m.gguf", SHAPE, quant)).problems
    assert "blk.0.ffn_up.weight has shape (64, 256), expected (512, 256)" in problem
    assert "blk.1.attn_k.weight is missing" in problem


def test_prediction_blocks_are_noted():
    shape = dataclasses.replace(models.SHAPES["tied"], nextn_predict_layers=2)
    [note] = inspect(models.path(shape)).notes
    assert note == "2 prediction block(s): `Model.forward_mtp` runs them, generation does not"


# --- What it looks like, and the command --------------------------------------------------------------------


def test_every_table_fits_a_narrow_terminal(report):
    text = shown(report, width=80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for role in (share.name for share in report.roles):
        assert any(line.strip().startswith(role + " ") for line in lines)
    rows = [line for line in lines if line.strip().split(" ")[0] in {share.name for share in report.roles}]
    assert len(rows) == len(report.roles)  # none wraps


def test_the_picture_has_the_main_things(report):
    text = shown(report)
    for part in (
        "synth qwen35",
        "─●─●  ─ 2 delta net  ● 2 attention",
        "head_count 4 · head_count_kv 2 · key_length 64",
        "kind imrope",
        "Q4_K_M",
        f"runs here  {common.compute_path()}",
        f"in all, {SHAPE.context_length:,} tokens",
        f"{jax.devices()[0]} has ",
    ):
        assert part in text


def test_the_report_is_json_too(report, path, capsys, tmp_path):
    assert main(["inspect", str(path), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report.as_json()))
    assert main(["inspect", str(path), "--json", str(tmp_path / "r.json")]) == 0
    assert "runs here" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["config"]["embedding_length"] == 256


def test_a_broken_file_is_one_line_and_exit_2(tmp_path, capsys, path):
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:5000])
    for name in ("cut.gguf", "none.gguf"):
        assert main(["inspect", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("scarlet inspect: ")
        assert err.count("\n") == 1


SIZES = {0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 10_300: "10.1 KiB", 1 << 20: "1.00 MiB"}
SIZES |= {1_048_500: "1.00 MiB", 1 << 50: "1024 TiB"}  # rounding up to the next unit; the last one


@pytest.mark.parametrize(("count", "expected"), SIZES.items())
def test_sizes_are_written_in_few_digits(count, expected):
    assert bytes_text(count) == expected


def test_counts_are_written_in_few_digits():
    assert [count_text(n) for n in (12, 1000, 248_320, 999_700)] == ["12", "1.00 k", "248 k", "1.00 M"]
