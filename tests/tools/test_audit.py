"""`scarlet audit`: silent on right decoders, and finds a wrong one even where the model does not use its type."""

import json

import models
import pytest

from scarlet_jax.ops import quants
from scarlet_jax.tools import audit
from scarlet_jax.tools.cli import main


@pytest.fixture
def record(tmp_path):
    return tmp_path / "verified.json"


def wrong_high_bit(monkeypatch):
    """The origin fault: both nibbles of a byte take the same high bit."""
    right = quants.DECODERS["Q5_K"]

    def q5_k(blocks):
        qh = blocks[:, 16:48]
        even = qh & 0x55
        return right(blocks.at[:, 16:48].set(even | (even << 1)))

    monkeypatch.setitem(quants.DECODERS, "Q5_K", q5_k)


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q6_K"])
def test_right_decoders(quant, record, capsys):
    path = models.path(models.PACKABLE, quant)
    assert main(["audit", str(path), "--record", str(record)]) == 0
    out = capsys.readouterr().out
    assert "right" in out
    assert "attn_qkv" in out


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q6_K"])
def test_a_wrong_decoder_is_found_whether_the_model_uses_it_or_not(quant, record, monkeypatch):
    wrong_high_bit(monkeypatch)
    report = audit.audit(models.path(models.PACKABLE, quant), record)
    assert {f["qtype"] for f in report["findings"]} == {"Q5_K"}
    in_tensors = [f for f in report["findings"] if f["where"].startswith("blk.")]
    assert bool(in_tensors) == (quant == "Q4_K_M")
    assert not any("Q5_K" in key for key in json.loads(record.read_text())["verified"])


def test_coverage_remembers_other_models(record):
    audit.audit(models.path(models.PACKABLE, "Q6_K"), record)
    report = audit.audit(models.path(models.PACKABLE, "Q4_K_M"), record)
    pairs = {(c["role"], c["qtype"]): c["verified"] for c in report["coverage"]}
    assert pairs["attn_qkv", "Q5_K"] is True
    assert ["attn_qkv", "Q6_K"] in report["verified_elsewhere"]


PAIR = ("attn_qkv", "Q5_K")


def test_the_record_holds_for_the_decoders_that_made_it(record):
    audit._remember(record, {PAIR}, "a.gguf", "these")
    assert audit._remember(record, {("output", "Q6_K")}, "b.gguf", "these") == {PAIR, ("output", "Q6_K")}
    assert audit._remember(record, {("output", "Q6_K")}, "b.gguf", "others") == {("output", "Q6_K")}
    assert audit._remember(record, set(), "a.gguf", "these") == set()


def test_the_fingerprint_is_of_code_and_instruction_set(monkeypatch, tmp_path):
    ops = tmp_path / "ops"
    (ops / "cpu").mkdir(parents=True)
    for name in ("quants.py", "cpu/decoders.h", "cpu/libscarlet_cpu.so"):
        (ops / name).write_text(name)
    monkeypatch.setattr(audit, "_OPS", ops)
    seen = {audit.fingerprint()}
    for name in ("quants.py", "cpu/decoders.h", "cpu/libscarlet_cpu.so"):
        (ops / name).write_text(f"{name} changed")
        seen.add(audit.fingerprint())
    monkeypatch.setattr(audit.cpu, "isa", lambda: "another")
    monkeypatch.setattr(audit.cpu, "unavailable", lambda: None)
    seen.add(audit.fingerprint())
    assert len(seen) == 5


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"decoders": "x"}', '{"attn_qkv Q6_K": "old"}', '{"verified": 3}']
)
def test_an_old_or_broken_record_only_forgets(record, text):
    record.write_text(text)
    assert audit._remember(record, {PAIR}, "a.gguf", "x") == {PAIR}
    assert json.loads(record.read_text()) == {"decoders": "x", "verified": {"attn_qkv Q5_K": "a.gguf"}}


def test_bad_input_is_one_line(tmp_path, capsys):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF and no more")
    assert main(["audit", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
