"""`scarlet gpu-bench`: gone through on a CPU, and refused without a GPU."""

from __future__ import annotations

import json

import jax
import pytest

from scarlet_jax.ops import gpu
from scarlet_jax.tools import gpu_bench
from scarlet_jax.tools.cli import main
from scarlet_jax.tools.engines import ggml


def test_all_of_it_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_bench, "checks", lambda plan: [("none", lambda: 0.0)]
    )  # they have a test of their own
    assert main(["gpu-bench", "--tiny", "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["tiny"]
    assert result["copy_bandwidth"] > 0 < result["matmul_flops"]
    (figures,) = result["models"]
    assert set(figures["decode"]) == {"1", "2"}
    assert all(one["tokens_s"] > 0 for one in (*figures["decode"].values(), *figures["prefill"].values()))
    assert figures["from_cpu_path"] < 1e-5
    assert figures["llama.cpp"] == {"reason": "--lib names none"}
    captured = capsys.readouterr()
    assert "decode, batch 2" in captured.out
    assert "gpu-bench: tiny Q8_0" in captured.err


def test_other_engines_stand_beside(tmp_path):
    """The same speeds by both, of the same file; what cannot run says why."""
    plan = gpu_bench.TINY
    path = gpu_bench._model_file(tmp_path, *plan.models[0])
    theirs = gpu_bench.beside_llama_cpp(path, plan, str(ggml.library().path))
    assert {what: set(speeds) for what, speeds in theirs.items()} == {"prefill": {8}, "decode": {1}}
    pytest.importorskip("torch", reason="the transformers extra is not installed")
    theirs = gpu_bench.beside_transformers(path, plan, tiny=True)
    assert {what: set(speeds) for what, speeds in theirs.items()} == {"prefill": {8}, "decode": {1, 2}}
    if jax.devices()[0].platform != "gpu":
        assert gpu_bench._or_why_not(lambda: gpu_bench.beside_transformers(path, plan, tiny=False)) == {
            "reason": "torch finds no GPU"
        }


def test_kernels_are_held_against_float64(monkeypatch):
    """Those that a wrong result of theirs would show in: the checks fail where a kernel is wrong."""
    with gpu.mode("interpreted"):
        assert gpu_bench._product_error("Q8_0", 1) < gpu_bench.KERNEL_LIMIT
        assert gpu_bench._attention_error() < gpu_bench.KERNEL_LIMIT
        assert gpu_bench._delta_error(1) < gpu_bench.KERNEL_LIMIT
        wrong = gpu.attend
        monkeypatch.setattr(
            gpu, "attend", lambda q, k, v, position, scale: wrong(q, k, v, position - 1, scale=scale)
        )
        assert gpu_bench._attention_error() > gpu_bench.KERNEL_LIMIT


def test_a_wrong_kernel_ends_in_an_error(tmp_path, monkeypatch, capsys):
    result = {"checks": [{"what": "Q4_K x 1", "error": float("nan")}], "models": []}
    monkeypatch.setattr(gpu_bench, "measure", lambda *_, **__: result)
    assert main(["gpu-bench", "--tiny", "--json", "-"]) == 2
    assert "kernels further than 1e-05 from float64: Q4_K x 1" in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is one")
def test_without_a_gpu_it_is_refused(capsys):
    assert main(["gpu-bench"]) == 2
    line = "there is no GPU here: JAX computes on a cpu (--tiny tries the script on it)"
    assert capsys.readouterr().err == f"scarlet gpu-bench: {line}\n"
