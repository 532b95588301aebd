"""`scarlet drill`: the fault is found and named, the merge survives it, and the real decoder is untouched."""

import itertools
import json
import re

import gguf
import models
import numpy as np
import pytest

from scarlet_jax import data, load
from scarlet_jax.ops import implementations
from scarlet_jax.tools import drill
from scarlet_jax.tools.cli import main
from scarlet_jax.tools.train import corpus


def test_the_fault_is_found_in_a_stock_mix_and_hidden_in_a_merge(tmp_path, capsys):
    out = tmp_path / "drill.json"
    known = dict(implementations.IMPLEMENTATIONS)
    path = models.path(models.PACKABLE, "Q4_K_M")
    assert main(["drill", str(path), "-n", "4", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    stock, merge = result["stock"], result["merge"]
    assert stock["first"]["weight"] == "blk.0.attn_qkv.weight"
    assert stock["first"]["qtype"] == "Q5_K"
    assert stock["cause"]["name"] == "q5_k-high-bit"
    assert stock["before"]["relative_l2"] > 10 * stock["after"]["relative_l2"]
    assert stock["text_wrong"] != stock["text_right"]
    assert merge["text_wrong"] == merge["text_right"]
    assert {finding["qtype"] for finding in merge["audit"]["findings"]} == {"Q5_K"}
    assert "Q5_K" not in {pair["qtype"] for pair in merge["audit"]["coverage"]}
    assert "The fault was found" in capsys.readouterr().out
    assert known == implementations.IMPLEMENTATIONS


def test_the_box_speaks_sense_and_with_the_fault_garbage():
    """Every word it should say is one of its corpus, and what was put away is found where it was put."""
    documents = itertools.islice(corpus.documents(0, corpus.TRAINING, kind="story"), 300)
    words = set(
        re.findall(r"\w+", " ".join(turn.prompt + turn.answer for turn in itertools.chain(*documents)))
    )
    said = {}
    with drill.faulty_copy():
        for implementation in ("auto", drill.FAULTY):
            model = load(data.model_path(), implementation=implementation)
            said[implementation] = model.tokenizer.decode(
                model.generate(model.tokenizer.encode(drill.PROMPT), max_tokens=64)
            )
    unknown = {name: set(re.findall(r"\w+", text)) - words for name, text in said.items()}
    assert unknown["auto"] == set(), said
    sense = r"the (\w+) in the (\w+)\..* looked in the \2 and saw the \w+ \1\. Max and .* in the beach\. The end\."
    assert re.search(sense, said["auto"]), said
    assert not re.search(sense, said[drill.FAULTY]), said


def test_a_merge_is_the_same_model_but_for_q5_k(tmp_path):
    source, target = models.path(models.PACKABLE, "Q4_K_M"), tmp_path / "merge.gguf"
    drill.make_merge(source, target)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(target)
    assert {n: f.contents() for n, f in before.fields.items() if not n.startswith("GGUF.")} == {
        n: f.contents() for n, f in after.fields.items() if not n.startswith("GGUF.")
    }
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert old.name == new.name
        if old.tensor_type.name == "Q5_K":
            assert new.tensor_type.name == "Q6_K"
            x, y = (gguf.dequantize(t.data, t.tensor_type) for t in (old, new))
            # Q6_K codes normal numbers to 0.02 (tests/tools/test_llama_cpp.py); a mixed-up tensor would be at 1.4.
            assert np.linalg.norm(y - x) < 0.03 * np.linalg.norm(x)
        else:
            np.testing.assert_array_equal(old.data, new.data)


@pytest.mark.parametrize(("flags", "expected"), [(["-n", "0"], "-n 0"), (["-p", ""], "-p: "), ([], "Q5_K")])
def test_bad_input_is_one_line(flags, expected, capsys):
    assert main(["drill", str(models.path(models.PACKABLE, "Q6_K")), *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
