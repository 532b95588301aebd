"""Compiled programs are kept between processes, where they may be."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax
from scarlet_jax import compiled
compiled.keep()
jax.jit(lambda x: x * 2 + 1)(1.0)
print(jax.config.jax_compilation_cache_dir)
"""


def run(**environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is Linux's")
def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    kept = tmp_path / "scarlet_jax" / "compiled"
    assert run(XDG_CACHE_HOME=str(tmp_path)) == str(kept)
    programs = {path.name: path.stat().st_mtime_ns for path in kept.glob("*-cache")}
    assert programs
    run(XDG_CACHE_HOME=str(tmp_path))
    assert {path.name: path.stat().st_mtime_ns for path in kept.glob("*-cache")} == programs


def test_the_users_own_choice_stands(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    assert run(XDG_CACHE_HOME=str(tmp_path), **own) == str(tmp_path / "own")
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="0") == "None"
    assert not (tmp_path / "scarlet_jax").exists()


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    assert run(XDG_CACHE_HOME=str(tmp_path / "file")) == "None"
