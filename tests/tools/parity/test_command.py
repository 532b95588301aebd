"""`scarlet parity`: exit codes, files, one line for bad input; and the one-flag routine on a real model."""

import json

import pytest
from faults.cases import changed, faulty, ours, reference

from scarlet_jax.tools.cli import main
from scarlet_jax.tools.parity import write_dump


@pytest.fixture
def files(tmp_path):
    def make(**dumps):
        for name, dump in dumps.items():
            write_dump(tmp_path / name, dump, engine=name, arch="qwen35", tokens=dump.tokens)
        return [str(tmp_path / name) for name in dumps]

    return make


@pytest.mark.parametrize(
    ("pair", "code", "verdict"),
    [
        (lambda: (ours(), reference()), 0, "clean"),
        (lambda: faulty("gate-up-swapped"), 1, "systematic"),
        (lambda: (changed(ours(), lambda n, x: x, tokens=[1, 2]), reference()), 2, "invalid"),
        (
            lambda: [changed(d, lambda n, x: x if n == "l_out-5" else None) for d in faulty("rope-base")],
            3,
            "inconclusive",
        ),
    ],
)
def test_exit_codes_and_files(files, tmp_path, capsys, pair, code, verdict):
    a, b = pair()
    paths = files(a=a, b=b)
    report_file, page_file = tmp_path / "r.json", tmp_path / "r.html"
    assert main(["parity", *paths, "--json", str(report_file), "--html", str(page_file)]) == code
    assert json.loads(report_file.read_text())["verdict"] == verdict
    assert page_file.read_text().startswith("<!doctype html>")
    assert verdict in capsys.readouterr().out


def test_json_on_stdout_is_nothing_but_json(files, capsys):
    assert main(["parity", *files(a=ours(), b=reference()), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "clean"


@pytest.mark.parametrize(
    "flags",
    [
        ["absent", "absent"],
        ["absent"],
        ["absent", "--prompt", "x"],
        ["absent", "other", "--against", "llama.cpp"],
    ],
)
def test_bad_input_is_one_line(capsys, flags):
    assert main(["parity", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("scarlet parity: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n, x: x[:, :5] if x.ndim == 2 else x[:, :1], "shape"),
        (lambda n, x: x[:0], "[0, 48] against [40, 48]"),
    ],
)
def test_other_shapes_are_one_line(files, capsys, change, says):
    assert main(["parity", *files(a=changed(ours(), change), b=reference())]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("zero", ["a", "b"])
def test_a_dump_that_nobody_filled_is_no_measurement(files, capsys, zero):
    dumps = {"a": ours(), "b": reference()}
    dumps[zero] = changed(dumps[zero], lambda n, x: 0 * x)
    assert main(["parity", *files(**dumps)]) == 2
    assert "zero in every tap" in capsys.readouterr().out


def test_a_model_without_layers_is_one_line(files, capsys, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes(40))
    assert main(["parity", *files(a=ours(), b=reference()), "--model", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unwritable_report(files, capsys):
    assert main(["parity", *files(a=ours(), b=reference()), "--json", "/no/such/folder/r.json"]) == 2
    assert "/no/such/folder/r.json" in capsys.readouterr().err


def test_against_llama_cpp(capsys, tmp_path):
    import models

    model, page = str(models.path(models.PACKABLE, "Q5_K")), tmp_path / "report.html"
    flags = ["--against", "llama.cpp", "--tokens", "5,6,7,8,9,10,11", "--html", str(page)]
    assert main(["parity", model, *flags]) == 0
    assert "noise" in capsys.readouterr().out
    assert "noise" in page.read_text()


@pytest.mark.slow
def test_the_whole_set_against_llama_cpp(capsys):
    import models

    assert main(["parity", str(models.path(models.PACKABLE, "F32")), "--against", "llama.cpp"]) == 0
    assert capsys.readouterr().out.count("clean") == 5  # four prompts and the verdict
