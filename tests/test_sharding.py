"""Models over several devices: how their axes are cut, and (in processes of their own) that it changes nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest

from scarlet_jax import sharding
from scarlet_jax.tools.cli import main

FOLDER = Path(__file__).parent


def environment(devices: int) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run_cases(*options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [*command, str(FOLDER / "sharding_cases.py")],
        env=environment(8),
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def test_on_eight_devices():
    run_cases()


@pytest.mark.hours
def test_every_shape_on_eight_devices():
    run_cases("-m", "slow")


# --- cuts: plain arithmetic ---------------------------------------------------------------------------------

SIZES = [
    (1, 1),
    (1, 4),
    (1, 6),
    (2, 1),
    (2, 3),
    (2, 8),
    (3, 2),
    (4, 4),
    (5, 2),
    (8, 2),
    (16, 1),
    (16, 3),
    (16, 2),
]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 8, 16, 32])
@pytest.mark.parametrize("mapping", ["tile", "repeat"])
def test_every_reader_is_held_once_and_beside_its_key(mapping, parts):
    cut = {"tile": sharding._tiled, "repeat": sharding._grouped}[mapping]
    for keys, each in SIZES:
        for unit in (1, 2, 4):
            if keys * each % unit:
                continue
            heads = cut(keys, each, unit, parts)
            if heads is None:
                assert keys % unit
                continue
            held = heads.readers[heads.readers >= 0]
            assert sorted(held) == list(range(keys * each))
            for key, readers in zip(*heads, strict=True):
                here = np.arange(len(readers))
                local = here % len(key) if mapping == "tile" else here // (len(readers) // len(key))
                whole = readers % keys if mapping == "tile" else readers // each
                assert (key[local] == whole)[readers >= 0].all()
                runs = readers.reshape(-1, unit)
                aligned = (runs == runs[:, :1] + np.arange(unit)).all(axis=1) & (runs[:, 0] % unit == 0)
                assert (aligned | (runs == -1).all(axis=1)).all()


@pytest.mark.parametrize("parts", [2, 4, 8, 16])
def test_what_divides_is_divided(parts):
    for cut in (sharding._tiled, sharding._grouped):
        keys, readers = cut(16, 2, 2, parts)  # 4B-shaped: 16 key heads, 32 value heads, two of them a block
        assert (keys.size, readers.size) == (max(16, 2 * parts if cut is sharding._tiled else 16), 32)
    assert sharding._even(36, 8, 1).shape == (8, 5)
    assert (sharding._even(36, 8, 1) >= 0).sum() == 36


def test_parts_of_an_array_are_what_indexing_gives():
    whole = np.arange(7 * 5).reshape(7, 5)
    places = np.array([-1, 0, 1, 4, 3, -1, -1, 6])
    expected = np.where(places[:, None] < 0, 0, whole[places])
    np.testing.assert_array_equal(sharding._taken(whole, places, 0), expected)
    columns = np.array([4, -1, 0, 1, 2])
    expected = np.where(columns < 0, 0, whole[:, columns])
    np.testing.assert_array_equal(sharding._taken(whole, columns, 1), expected)


# --- the command --------------------------------------------------------------------------------------------

SHAPE = models.DENSE_SHAPES["qwen3"]


@pytest.mark.slow
def test_processes_share_a_model(tmp_path):
    """Two processes of two devices: the tokens of one process alone; the first tells them, and its seed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "scarlet_jax", "generate", str(models.path(SHAPE)), "--tokens", "5,7,9"]
    command += ["-n", "6", "--temperature", "1", "--json"]
    together = [
        subprocess.Popen(
            [*command, tmp_path / f"{i}", "--devices", "0", "--coordinator", address, "--process", f"{i}/2"],
            env=environment(2),
            stdout=subprocess.DEVNULL,
        )
        for i in range(2)
    ]
    assert [process.wait(timeout=240) for process in together] == [0, 0]
    assert not (tmp_path / "1").exists()
    first = json.loads((tmp_path / "0").read_text())
    seed = ["--seed", str(first["stats"]["seed"])]
    subprocess.run([*command, tmp_path / "alone", *seed], env=environment(2), check=True)
    assert first["tokens"] == json.loads((tmp_path / "alone").read_text())["tokens"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--devices", "-1"], "--devices -1: expected a number of devices, or 0 for all"),
        (["--devices", "9999"], "devices is 9999, expected 1 to"),
        (["--process", "1/2"], "expected HOST:PORT of the first process and I/N"),
        (["--coordinator", "h:1", "--process", "2/2"], "expected HOST:PORT of the first process and I/N"),
    ],
)
def test_flags_that_make_no_sense(flags, line, capsys):
    assert main(["generate", str(models.path(SHAPE)), "--tokens", "1", *flags]) == 2
    assert line in capsys.readouterr().err
