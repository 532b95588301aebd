"""`scarlet bench`: what it counts, and that every figure is there. Never how fast."""

import json

import jax
import pytest
from models import PACKABLE, PACKABLE_EXPERTS, model, path

from scarlet_jax.errors import BadInput
from scarlet_jax.ops import cpu
from scarlet_jax.ops.cpu import fast
from scarlet_jax.tools import bench, cli

FIGURES = {"prefill_tps", "decode_tps", "draft_ratio", "load_s", "roofline_fraction"}


def test_figures_of_both_engines(tmp_path, capsys):
    out = tmp_path / "bench.json"
    flags = ["-p", "5", "-n", "3", "--repeat", "1", "--against", "llama.cpp", "--json", str(out)]
    assert cli.main(["bench", str(path(PACKABLE, "Q4_K")), *flags]) == 0
    result = json.loads(out.read_text())
    ours = FIGURES | {"first_token_s", "peak_rss_bytes", "weight_bytes_per_token", "read_bandwidth"}
    assert all(result[figure] > 0 for figure in ours)
    assert all(result["reference"][figure] > 0 for figure in FIGURES)
    # The roofline is bytes a token over bytes a second, whatever the machine.
    seconds = result["weight_bytes_per_token"] / result["read_bandwidth"]
    assert result["roofline_fraction"] == pytest.approx(seconds * result["decode_tps"], rel=1e-6)
    assert "llama.cpp" in capsys.readouterr().out


@pytest.mark.skipif(fast.unavailable() is not None, reason=f"no fast mode here: {fast.unavailable()}")
def test_the_fast_mode_has_its_error_beside_its_speed(tmp_path):
    """More than float32 rounding, so that it ran; no more than half a percent a product makes of random layers."""
    out = tmp_path / "bench.json"
    flags = ["-p", "70", "-n", "1", "--repeat", "1", "--precision", "fast", "--json", str(out)]
    assert cli.main(["bench", str(path(PACKABLE, "Q4_K")), *flags]) == 0
    result = json.loads(out.read_text())
    assert result["precision"] == "fast"
    assert "fast mode" in result["path"]
    assert 1e-4 < result["error"] < 0.2


def test_without_compiled_kernels_there_are_figures_too(tmp_path, monkeypatch, request):
    """The portable code's; memory is then read by one thread."""

    def missing():
        raise cpu._UnavailableError("there was no compiler")

    monkeypatch.setattr(cpu, "_library", missing)
    jax.clear_caches()  # of programs with the kernels, and then of those without
    request.addfinalizer(jax.clear_caches)
    out = tmp_path / "bench.json"
    flags = ["-p", "5", "-n", "3", "--repeat", "1", "--json", str(out)]
    assert cli.main(["bench", str(path(PACKABLE, "Q4_K")), *flags]) == 0
    result = json.loads(out.read_text())
    assert "portable" in result["path"]
    assert result["read_bandwidth"] > 0


def test_a_token_reads_every_weight_but_the_embedding():
    loaded = model(PACKABLE, "Q4_K")
    stored = {name: t.data.nbytes for name, t in loaded.gguf.tensors.items()}
    assert loaded.weight_bytes_per_token == sum(stored.values()) - stored["token_embd.weight"]


def test_a_token_reads_the_experts_it_is_given_to():
    """Two of six in every block."""
    loaded = model(PACKABLE_EXPERTS, "Q4_K")
    stored = {name: t.data.nbytes for name, t in loaded.gguf.tensors.items() if name != "token_embd.weight"}
    experts = sum(size for name, size in stored.items() if "_exps" in name)
    assert loaded.weight_bytes_per_token == sum(stored.values()) - experts * 4 // 6


@pytest.mark.parametrize(
    "flags", [["-p", "0"], ["-n", "-1"], ["--repeat", "0"], ["--draft", "0"], ["-p", "4090", "-n", "90"]]
)
def test_bad_flags(flags, capsys):
    assert cli.main(["bench", str(path(PACKABLE, "Q4_K")), *flags]) == 2
    assert capsys.readouterr().err.startswith("scarlet bench: ")


def test_a_gpu_that_is_not_there_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench.common, "use_backend", refuse)
    monkeypatch.setattr(bench, "_fresh_process", lambda *_: pytest.fail("started"))
    assert cli.main(["bench", "nowhere.gguf", "--backend", "gpu"]) == 2
    assert capsys.readouterr().err == "scarlet bench: --backend gpu: JAX cannot use one here\n"


def refuse(name: str) -> None:
    raise BadInput(f"--backend {name}: JAX cannot use one here")


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no kernels here: {cpu.unavailable()}")
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--types", "Q9_Z"], "--types Q9_Z: expected some of "),
        (["--rows", "one"], "--rows one: expected numbers"),
        (["--rows", "1,0"], "--rows 1,0 --repeat 7: expected 1 or more of both"),
        (["--repeat", "0"], "expected 1 or more of both"),
        (
            ["--isa", "generic", "--fast"],
            "--fast: the fast mode needs AVX-512 VNNI; the kernels run on generic",
        ),
    ],
)
def test_what_kernel_bench_refuses(flags, line, capsys):
    try:
        assert cli.main(["kernel-bench", *flags]) == 2
    finally:
        cpu.set_isa()
    assert line in capsys.readouterr().err
