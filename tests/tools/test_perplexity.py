"""`scarlet perplexity`: against llama.cpp's logits on the same tokens, and against sums written out in full."""

from __future__ import annotations

import json
import math

import models
import numpy as np
import oracle
import pytest

from scarlet_jax.ops.cpu import fast
from scarlet_jax.tools import perplexity
from scarlet_jax.tools.cli import main
from scarlet_jax.tools.engines import llama_cpp

SHAPE = models.SHAPES["untied"]
TEXT = (
    "The quick brown fox jumps over the lazy dog. One token, two tokens, three: größer, 你好, 1234567890!\n"
    * 6
)
LENGTH = 37  # of a window: odd, and no power of two

# Between ours and llama.cpp a nat of an F32 file differs by f32 rounding of logits of order ten: 1e-5 and less
# was measured. One token too many or too few in a window changes the perplexity by 1e-2 and more.
NATS = 5e-5


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def measured(tmp_path, *argv):
    out = tmp_path / "out.json"
    assert main(["perplexity", *map(str, argv), "--window", str(LENGTH), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def llama_cpp_log_probabilities(path, text, first):
    """The whole of llama-perplexity's recipe by llama.cpp's tokenizer and engine: log p (n, V), next ids (n,)."""
    with llama_cpp.Engine(path, n_ctx=LENGTH) as engine:
        ids = engine.model.tokenize(text.removesuffix("\n"), parse_special=False)
        logs, targets = [], []
        for start in range(0, len(ids) - LENGTH + 1, LENGTH):
            window = ids[start : start + LENGTH]
            engine.clear()
            logits = engine.decode(window).astype(np.float64)
            logs.append((logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[first:-1])
            targets += window[first + 1 :]
    return np.concatenate(logs), np.array(targets)


@pytest.mark.parametrize(("count", "first"), [("half", LENGTH // 2), ("all", 0)])
def test_perplexity_of_llama_cpp_on_an_f32_file(count, first, text, tmp_path):
    log_p, targets = llama_cpp_log_probabilities(models.path(SHAPE), TEXT, first)
    nll = -log_p[np.arange(len(targets)), targets]
    result = measured(tmp_path, models.path(SHAPE), "--text", text, "--count", count)
    assert result["tokens"] == len(targets)
    assert math.log(result["perplexity"]) == pytest.approx(nll.mean(), abs=NATS)
    error = (
        nll.std() / math.sqrt(len(nll) - 1) * result["perplexity"]
    )  # what llama-perplexity prints after +-
    assert result["standard_errors"]["perplexity"] == pytest.approx(error, rel=1e-4)
    assert result["kl_mean"] is None


def test_divergence_of_llama_cpp_between_two_files(text, tmp_path):
    base, other = models.path(SHAPE), models.path(SHAPE, seed=2)
    log_p, _ = llama_cpp_log_probabilities(base, TEXT, LENGTH // 2)
    log_q, _ = llama_cpp_log_probabilities(other, TEXT, LENGTH // 2)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    result = measured(tmp_path, other, "--text", text, "--base", base)
    assert result["kl_mean"] == pytest.approx(kl.mean(), abs=NATS)
    assert result["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), abs=4 * NATS)  # one token, not a mean
    assert result["top1_agreement"] == (log_p.argmax(axis=1) == log_q.argmax(axis=1)).mean()
    ratio = result["perplexity"] / result["base_perplexity"]
    assert result["perplexity_ratio"] == pytest.approx(ratio, rel=1e-12)
    for name, (low, high) in result["intervals"].items():
        assert low <= result[name] <= high
        assert low < high


def test_another_engine_as_model_and_as_base(text, tmp_path):
    path = models.path(SHAPE)
    swapped = measured(tmp_path, path, "--text", text, "--engine", "llama.cpp", "--windows", 3)
    ours = measured(tmp_path, path, "--text", text, "--against", "llama.cpp", "--windows", 3)
    assert ours["windows"] == 3
    assert swapped["perplexity"] == pytest.approx(ours["base_perplexity"], rel=1e-9)  # the same computation
    assert swapped["perplexity"] == pytest.approx(ours["perplexity"], rel=NATS)
    # Second order in logits that differ by 1e-5: what is not f32 rounding would be 1e-6 and more.
    assert 0 < ours["kl_mean"] < 1e-9
    assert ours["top1_agreement"] == 1


@pytest.mark.skipif(fast.unavailable() is not None, reason=f"no fast mode here: {fast.unavailable()}")
def test_the_fast_mode_beside_the_exact_one(text, tmp_path):
    """The base is exact; rounded products are half a percent off, which is 1e-5 in KL and more, and below 1e-1."""
    path = models.path(models.PACKABLE, "Q4_K")
    flags = "--text", text, "--against", "scarlet", "--windows", 2
    assert measured(tmp_path, path, *flags)["kl_mean"] == 0
    rounded = measured(tmp_path, path, *flags, "--precision", "fast")
    assert 1e-5 < rounded["kl_mean"] < 1e-1
    assert rounded["base_perplexity"] == measured(tmp_path, path, *flags)["perplexity"]


def test_logits_in_parts_are_those_of_the_float64_forward(monkeypatch):
    """A few rows at a time, through both engines, over windows longer than one pass."""
    path, tokens = models.path(SHAPE), models.tokens(SHAPE, LENGTH)
    truth = oracle.forward(path, tokens)[0][10:-1]
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 7 * SHAPE.vocab_size)
    engines = [perplexity.Ours(models.model(SHAPE)), perplexity.LlamaCpp(path, LENGTH, None, None)]
    for engine in engines:
        parts = list(engine.logits(np.asarray(tokens, np.int32), 10))
        assert max(map(len, parts)) == 7
        np.testing.assert_allclose(np.concatenate(parts), truth, atol=2e-4)  # of logits of order ten


def test_windows_begin_with_the_token_that_the_file_asks_for():
    cut = perplexity.windows(list(range(11)), 4, bos=99)
    np.testing.assert_array_equal(cut, [[99, 1, 2, 3], [99, 5, 6, 7]])
    np.testing.assert_array_equal(perplexity.windows(list(range(8)), 4), np.arange(8).reshape(2, 4))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Drawn from known distributions: 95 in 100, within what 400 draws can tell (four standard deviations)."""
    rng = np.random.default_rng(3)
    hits = np.zeros(4)
    for _ in range(400):
        values = rng.exponential(size=1500)
        found = perplexity.summary(perplexity.Scores(values, values * 0 + 1, values, rng.random(1500) < 0.98))
        truths = {"perplexity": math.e, "kl_mean": 1.0, "kl_p99": math.log(100), "top1_agreement": 0.98}
        hits += [found["intervals"][k][0] <= truth <= found["intervals"][k][1] for k, truth in truths.items()]
    assert (hits / 400 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400)).all()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--window", "3"], "--window 3"),
        (["--window", "4000"], "tokens; expected a window of 4000"),
        (["--window", "40000"], "expected at most the context"),
        (["--windows", "0"], "--windows 0"),
        (["--lib", "x.so"], "--lib"),
        (["--text", "/nowhere"], "/nowhere: cannot be read"),
        (["--base", str(models.path(models.SHAPES["tied"]))], "expected the vocabulary"),
    ],
)
def test_bad_input_is_one_line(flags, expected, text, capsys):
    argv = ["perplexity", str(models.path(SHAPE)), "--text", text, *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_a_text_that_is_not_utf8(tmp_path, capsys):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    assert main(["perplexity", str(models.path(SHAPE)), "--text", str(path)]) == 2
    assert "byte 3" in capsys.readouterr().err
