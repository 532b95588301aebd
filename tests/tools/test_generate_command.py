"""`scarlet generate` from the command line, over a tiny model."""

from __future__ import annotations

import io
import json
import re
import sys

import jax.numpy as jnp
import models
import pytest

from scarlet_jax import chat
from scarlet_jax.ops.cpu import fast
from scarlet_jax.tools import common
from scarlet_jax.tools.cli import main

SHAPE = models.SHAPES["untied"]


@pytest.fixture(scope="module")
def path():
    return str(models.path(SHAPE))


@pytest.fixture(scope="module")
def model():
    return models.model(SHAPE)


@pytest.fixture
def run(capsys):
    """Runs a command: exit code, standard output, standard error."""

    def run(*argv):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as error:  # argparse
            code = error.code
        return code, *capsys.readouterr()

    return run


def results(run, *argv):
    code, out, _ = run(*argv, "--json", "-")
    assert code == 0
    return json.loads(out)


def pipe(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


def test_it_prints_what_the_model_says_and_reports_the_same(run, path, model):
    prompt = model.tokenizer.encode("The quick")
    expected = list(model.generate(prompt, max_tokens=5))
    command = ["generate", path, "--raw", "-p", "The quick", "-n", 5]
    report = results(run, *command)
    assert report["prompt_tokens"] == prompt
    assert report["tokens"] == expected
    assert report["text"] == model.tokenizer.decode(expected, special=False)
    code, out, err = run(*command)
    assert (code, out, err) == (0, report["text"].rstrip("\n") + "\n", "")


def test_a_prompt_goes_through_the_chat_template_unless_raw(run, path, model):
    expected = chat.prompt(model, [{"role": "user", "content": "Hi"}])
    assert "<|im_start|>" in expected
    report = results(run, "generate", path, "-p", "Hi", "-n", 1)
    assert model.tokenizer.decode(report["prompt_tokens"]) == expected
    assert results(run, "generate", path, "-p", "Hi", "-n", 1, "--raw")["prompt_tokens"] == (
        model.tokenizer.encode("Hi")
    )
    report = results(run, "generate", path, "-p", "Hi", "-n", 1, "--think", "off")
    assert model.tokenizer.decode(report["prompt_tokens"]).endswith("<think>\n\n</think>\n\n")


def test_the_standard_input_is_a_prompt_without_its_last_line_end(run, path, model, monkeypatch):
    for raw, text in ((b"one\ntwo\n", "one\ntwo"), (b"one\r\n", "one"), (b"\xff", "\ufffd")):
        pipe(monkeypatch, raw)
        report = results(run, "generate", path, "--raw", "-n", 0)
        assert report["prompt_tokens"] == model.tokenizer.encode(text)


def test_token_ids_are_a_prompt_as_they_stand(run, path):
    report = results(run, "generate", path, "--tokens", "5, 6,7", "-n", 3)
    assert report["prompt_tokens"] == [5, 6, 7]
    assert len(report["tokens"]) == 3


def test_a_seed_repeats_a_text(run, path):
    command = ["generate", path, "--tokens", "5,6,7", "-n", 8, "--temperature", 2]
    first = results(run, *command)
    assert first["tokens"] != results(run, *command)["tokens"]
    assert first["tokens"] == results(run, *command, "--seed", first["stats"]["seed"])["tokens"]
    greedy = results(run, *command, "--top-k", 1)["tokens"]
    for off in (["--temperature", 0], ["--top-p", 0], ["--min-p", 1]):
        assert results(run, *command, *off)["tokens"] == greedy


def test_the_context_may_be_shorter_than_the_models(run, path):
    report = results(run, "generate", path, "--tokens", "5,6,7", "-n", -1, "--context", 9)
    assert len(report["tokens"]) == 6
    assert report["stats"]["finish"] == "context"


def test_threads_and_cache_dtype_reach_the_engine(run, path, monkeypatch):
    options = {}
    threads = []
    load = common.load
    monkeypatch.setattr(common, "load", lambda path, **given: options.update(given) or load(path, **given))
    monkeypatch.setattr(common.cpu, "unavailable", lambda: None)
    monkeypatch.setattr(common.cpu, "set_threads", threads.append)
    command = ["generate", path, "--tokens", "5,6,7", "-n", 0]
    assert run(*command)[0] == run(*command, "--threads", 3, "--kv-dtype", "bf16")[0] == 0
    assert threads == [3]
    assert options == {"context_length": None, "kv_dtype": jnp.bfloat16, "implementation": None, "mesh": 1}


def test_threads_without_kernels_are_bad_input(run, path, monkeypatch):
    monkeypatch.setattr(common.cpu, "unavailable", lambda: "not built")
    code, _, err = run("generate", path, "-p", "x", "--threads", 2)
    assert (code, err) == (
        2, "scarlet generate: --threads 2: there are no CPU kernels to run on them (not built)\n"
    )  # fmt: skip
    assert common.compute_path() == "portable code on cpu (not built)"


def test_the_fast_mode_runs_or_says_why_not(run, path, monkeypatch):
    missing = fast.unavailable()
    code, _, err = run("generate", path, "--tokens", "5,6,7", "-n", 2, "--stats", "--precision", "fast")
    if missing is None:
        assert code == 0
        assert "fast mode" in err
    monkeypatch.setattr(fast, "unavailable", lambda: "no such processor")
    code, _, err = run("generate", path, "-p", "x", "--precision", "fast")
    assert code == 2
    assert err == "scarlet generate: --precision fast: implementation cpu-fast: no such processor\n"


def test_stats_go_to_the_standard_error(run, path):
    code, out, err = run("generate", path, "--tokens", "5,6,7", "-n", 40, "--seed", 3, "--stats")
    assert code == 0
    for part in (
        "load ",
        "first token ",
        "prompt 3 tokens at ",
        "seed 3",
        common.compute_path(),
    ):
        assert part in err
    assert re.search(r"answer \d+ tokens at ", err)
    assert err.count("\n") == 1
    assert "seed" not in out


def test_the_report_is_a_file_and_the_text_is_printed_too(run, path, tmp_path):
    code, out, _ = run("generate", path, "--tokens", "5,6,7", "-n", 3, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert (code, out.rstrip("\n")) == (0, report["text"].rstrip("\n"))
    assert {"load_s", "first_token_s", "prefill_tps", "decode_tps", "seed", "finish"} <= report[
        "stats"
    ].keys()
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.gguf", "-p", "x"], "nowhere.gguf: no such file"),
        (["MODEL", "--tokens", "1,x"], "--tokens '1,x': expected ids separated by commas"),
        (["MODEL", "--tokens", "1,331"], "prompt: token 331 is outside the vocabulary, expected 0 to 330"),
        (["MODEL", "--raw", "-p", ""], "prompt: empty, expected at least one token"),
        (
            ["MODEL", "--tokens", "1,2,3", "--context", "3"],
            "prompt: 3 tokens, expected fewer than the context",
        ),
        (["MODEL", "-p", "x", "--context", "0"], "--context 0: expected 1 or more"),
        (["MODEL", "-p", "x", "--threads", "0"], "--threads 0: expected 1 or more"),
        (["MODEL", "-p", "x", "-n", "-2"], "-n -2: expected a number of tokens, or -1"),
        (["MODEL", "-p", "x", "--temperature", "-1"], "temperature is -1.0, expected 0"),
        (["MODEL", "-p", "x", "--top-p", "2"], "top_p is 2.0, expected 0 to 1"),
        (["MODEL", "-p", "x", "--seed", "-4"], "seed is -4, expected 0 to"),
        (["MODEL", "-p", "x", "--backend", "tpu"], "--backend tpu: JAX cannot use one here"),
        (
            ["MODEL", "--tokens", "1", "-n", "1", "--json", "/no/where.json"],
            "--json /no/where.json: cannot",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, path, words, message):
    code, _, err = run("generate", *(path if word == "MODEL" else word for word in words))
    assert code == 2
    assert err.startswith("scarlet generate: ")
    assert message in err
    assert err.count("\n") == 1


def test_no_prompt_at_all_is_bad_input(run, path, monkeypatch):
    pipe(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    code, _, err = run("generate", path)
    assert (code, err) == (2, "scarlet generate: -p: expected a prompt, there or on the standard input\n")


@pytest.mark.parametrize("command", ["generate", "chat", "inspect"])
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"example: scarlet {command} " in out


def test_a_terminal_is_shown_control_characters_not_sent_them():
    assert common.visible("a\x1b[2J\tb\n\r\x07\x7f\x9b") == "a␛[2J\tb\n␍␇␡\ufffd"
    for is_terminal, expected in ((True, "␛"), (False, "\x1b")):
        stream = io.StringIO()
        stream.isatty = lambda is_terminal=is_terminal: is_terminal
        common.writer(stream)("\x1b")
        assert stream.getvalue() == expected
