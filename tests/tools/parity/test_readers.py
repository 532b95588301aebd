"""Formats: told apart by content; broken ones are one line."""

import json
import zipfile

import numpy as np
import pytest
from faults.cases import ours, reference
from safetensors.numpy import save_file

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity import compare, write_dump
from scarlet_jax.tools.parity.readers import read

SOME = ("model.input_embed", "attn_norm-0", "linear_attn_qkv_mixed-0", "ffn_up-1", "l_out-1", "result_output")


@pytest.fixture
def taps():
    return {name: np.asarray(reference()[name]) for name in SOME}


def same(dump, taps):
    assert set(dump) == set(taps)
    for name, value in taps.items():
        np.testing.assert_array_equal(dump[name], value)


def test_npz(tmp_path, taps):
    np.savez(tmp_path / "a.npz", tokens=np.arange(40), **taps)
    dump = read(tmp_path / "a.npz")
    same(dump, taps)
    assert list(dump.tokens) == list(range(40))


def test_plain_safetensors_with_a_batch_axis(tmp_path, taps):
    save_file({n: np.ascontiguousarray(x[None]) for n, x in taps.items()}, tmp_path / "a.safetensors")
    same(read(tmp_path / "a.safetensors"), taps)


def test_torch(tmp_path, taps):
    torch = pytest.importorskip("torch")
    nested = {name: {"value": torch.from_numpy(x), "meta": {"step": 0}} for name, x in taps.items()}
    torch.save(nested, tmp_path / "a.pt")
    same(read(tmp_path / "a.pt"), taps)
    torch.save({"x": np.sum}, tmp_path / "evil.pt")  # a pickled function: the weights-only loader refuses
    with pytest.raises(BadInput, match="weights-only"):
        read(tmp_path / "evil.pt")


def test_folders(tmp_path, taps):
    for name, x in taps.items():
        np.save(tmp_path / f"{name}.npy", x)
    same(read(tmp_path), taps)


def test_dumper_file_names(tmp_path, taps):
    np.save(tmp_path / "step=0___rank=0___dump_index=3___name=ffn_up___layer_id=1.npy", taps["ffn_up-1"])
    assert list(read(tmp_path)) == ["ffn_up-1"]


def test_transformers_names(tmp_path, taps):
    names = {
        "model.embed_tokens": "model.input_embed",
        "model.layers.0.input_layernorm": "attn_norm-0",
        "model.layers.0.linear_attn.in_proj_qkv": "linear_attn_qkv_mixed-0",
        "model.layers.1.mlp.up_proj": "ffn_up-1",
        "model.layers.1": "l_out-1",
        "lm_head": "result_output",
    }
    np.savez(tmp_path / "hf.npz", **{theirs: taps[mine] for theirs, mine in names.items()})
    report = compare(ours(), read(tmp_path / "hf.npz"))
    assert {t["name"] for t in report["taps"]} == set(SOME)
    assert report["verdict"] == "clean"


def test_debug_tree(tmp_path, taps):
    children = []
    for i, name in enumerate(("layers.1.mlp.up_proj", "lm_head")):
        file = f"{i}.safetensors"
        save_file({"data": np.asarray(taps[{0: "ffn_up-1", 1: "result_output"}[i]])}, tmp_path / file)
        children.append(
            {"module_path": f"Qwen3_5ForCausalLM.model.{name}", "outputs": {"value": file}, "children": []}
        )
    tree = {"module_path": "Qwen3_5ForCausalLM", "children": children}
    path = tmp_path / "Qwen3_5ForCausalLM_debug_tree_FULL_TENSORS.json"
    path.write_text(json.dumps(tree))
    for source in (path, tmp_path):
        report = compare(ours(), read(source))
        assert {t["name"] for t in report["taps"]} == {"ffn_up-1", "result_output"}


def test_saved_logits(tmp_path):
    last = np.ascontiguousarray(reference()["result_output"][-1:])
    last.tofile(tmp_path / "llamacpp-m.bin")
    np.asarray(reference().tokens, np.int32).tofile(tmp_path / "llamacpp-m-tokens.bin")
    dump = read(tmp_path / "llamacpp-m.bin")
    assert list(dump.tokens) == list(reference().tokens)
    report = compare(ours(), dump)
    assert (report["verdict"], report["taps"][0]["aligned"]) == ("clean", "last 1 rows")
    lines = "\n".join(f"{i}: {v:f}" for i, v in enumerate(last[0]))
    (tmp_path / "logits.txt").write_text(lines)
    assert compare(ours(), read(tmp_path / "logits.txt"))["exit"] == 0


@pytest.mark.parametrize(
    "name", ["a.npz", "a.safetensors", "a.pt", "a.gguf", "a.json", "a.bin", "a.npy", "a.txt", "a"]
)
@pytest.mark.parametrize("kind", ["empty", "noise", "text", "cut"])
def test_broken_files_are_one_line(tmp_path, name, kind, taps):
    path = tmp_path / name
    content = {"empty": b"", "noise": bytes(range(256)) * 9 + b"\0\1\2", "text": b"no dump at all"}.get(kind)
    if kind == "cut":
        whole = tmp_path / "whole"
        write_dump(whole, taps, engine="e", tokens=[1])
        content = whole.read_bytes()[:-1000]
    path.write_bytes(content)
    with pytest.raises(BadInput) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokens": "[1,"},
        {"tokens": '["a"]'},
        {"weights": '{"x": 5}'},
        {"weights": '{"x": ["w"]}'},
        {"order": "3"},
    ],
)
def test_odd_metadata_is_one_line(tmp_path, metadata):
    save_file({"x": np.zeros((3, 3), np.float32)}, tmp_path / "a", {"format": "scarlet-taps/1"} | metadata)
    with pytest.raises(BadInput, match=next(iter(metadata))):
        read(tmp_path / "a")


def test_endless_nesting_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text('{"a":' * 50000 + "1" + "}" * 50000)
    with pytest.raises(BadInput, match="debug tree"):
        read(tmp_path / "a.json")


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        read(tmp_path / "absent")
    with pytest.raises(BadInput, match="no array"):
        read(tmp_path)


def test_nothing_is_allocated_on_a_claim(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (70000, 20000), }"
    header += b" " * (117 - len(header)) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    path = tmp_path / "claims.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("l_out-0.npy", npy)
    with pytest.raises(BadInput, match=r"l_out-0 claims the shape \[70000, 20000\]"):
        read(path)["l_out-0"]
    log = tmp_path / "claims.log"
    log.write_text(
        "common_debug_cb_eval: l_out-0 = (f32) ADD(a{4}, b{1}}) = {2, 2, 2, 4000000000}\n[ 1.0000, 2.0000],\n"
    )
    with pytest.raises(BadInput, match="no whole tensor"):
        read(log)
