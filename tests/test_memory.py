"""What a model will take of a device's memory: weights and state against what is allocated; and who is refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import pytest

import scarlet_jax
from scarlet_jax import memory
from scarlet_jax.errors import BadInput
from scarlet_jax.ops import gpu, implementations
from scarlet_jax.ops.implementations import IMPLEMENTATIONS
from scarlet_jax.tools.cli import main
from scarlet_jax.tools.inspect import parse_size

SHAPE = models.PACKABLE
BATCH, CONTEXT = 2, 300


def nbytes(tree) -> int:
    return sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(tree)}.values())


def need(weights, cfg, **options) -> memory.Need:
    options = {"batch": BATCH, "context": CONTEXT, "kv_dtype": jnp.float32, "planes": False} | options
    return memory.need(weights, cfg, **options)


def test_weights_and_state_are_those_allocated():
    model = models.model(SHAPE, "Q8_0", implementation="portable")
    needed = need(model.weights, model.config)
    assert needed.weights == nbytes(model.weights)
    assert needed.state == nbytes(model.init_state(BATCH, CONTEXT))


def test_the_workspace_grows_as_what_is_computed_does():
    """At least what a block holds at once by its definition: two tables of scores, or gate, up and their product."""
    model = models.model(SHAPE, "Q8_0", implementation="portable")
    options = {"implementation": "portable"}
    short, long = (need(model.weights, model.config, context=n, **options).workspace for n in (64, 512))
    assert short >= 4 * BATCH * 64 * (256 * SHAPE.head_count + 2 * SHAPE.embedding_length)
    assert long >= 4 * BATCH * 512 * (512 * SHAPE.head_count + 3 * SHAPE.feed_forward_length)
    assert long > 4 * short


IN_A_PROCESS = """
import re, sys
import jax, scarlet_jax

def resident(which):
    return 1024 * int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

model = scarlet_jax.load(sys.argv[1], implementation="portable")
state = jax.block_until_ready(model.init_state(1, int(sys.argv[2])))
before = resident("VmRSS")
jax.block_until_ready(model.last_logits([7] * 512, state, consume=True))
print(resident("VmHWM") - before)
"""


@pytest.mark.hours
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read off /proc")
def test_the_workspace_is_what_a_process_takes(tmp_path):
    """What a longer context adds, within 5 %: a process takes some for its programs, whatever they compute."""
    shape = dataclasses.replace(SHAPE, context_length=65536, head_count=8)
    model = models.model(shape, "Q8_0", implementation="portable")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    predicted, taken = [], []
    for context in (32768, 65536):
        needed = need(model.weights, model.config, batch=1, context=context, implementation="portable")
        command = [sys.executable, "-c", IN_A_PROCESS, str(models.path(shape, "Q8_0")), str(context)]
        for _ in ("compiles", "does not"):
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
        predicted.append(needed.workspace)
        taken.append(int(done.stdout))
    assert taken[1] - taken[0] == pytest.approx(predicted[1] - predicted[0], rel=0.05)
    assert taken[1] == pytest.approx(predicted[1], rel=0.05)


def test_kernels_need_little_to_work_in():
    """Scores and decoded weights, which the portable code has whole, are nowhere at once where layers are kernels."""
    if IMPLEMENTATIONS["cpu"].unavailable():
        pytest.skip("there are no kernels")
    model = models.model(SHAPE, "Q8_0")
    kernels, portable = (
        need(model.weights, model.config, context=2048, implementation=name).workspace
        for name in ("cpu", "portable")
    )
    assert kernels < portable / 5


def test_a_cache_that_grows_is_there_twice():
    """The old one is half of the new."""
    model = models.model(SHAPE, "Q8_0")
    needed = need(model.weights, model.config, context=4096, batch=8)
    assert needed.workspace >= nbytes(model.init_state(8, 2048))


def test_what_is_tied_is_counted_once():
    """A head that is the embedding, and prediction blocks that use the trunk's."""
    model = models.model(models.SHAPES["tied"])
    assert model.weights.output is model.weights.token_embd
    assert memory.weight_bytes(model.weights, planes=False) == nbytes(model.weights)
    again = dataclasses.replace(model.weights, nextn=(model.weights,))
    assert memory.weight_bytes(again, planes=False) == nbytes(model.weights)


def test_planes_are_counted_as_they_are_held():
    model = models.model(SHAPE, "Q8_0", implementation="portable")
    with gpu.mode("elsewhere"):
        held = implementations.prepared(model.weights, "gpu")
    assert memory.weight_bytes(model.weights, planes=True) == nbytes(held)


def test_what_does_not_fit_is_refused_with_the_numbers(capsys):
    path = str(models.path(SHAPE, "Q8_0"))
    flags = ["--context", "300", "--batch", "2", "--json", "-"]
    assert main(["inspect", path, "--memory", "1GB", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == told["weights"] + told["state"] + told["workspace"] < told["memory"] == 10**9
    assert main(["inspect", path, "--memory", str(told["total"] - 1), *flags[:-2]]) == 2
    line = capsys.readouterr().err
    assert f"{told['total'] / 1e9:.2f} GB are needed" in line
    assert line.count("\n") == 1


def test_a_device_that_is_too_small_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(memory, "limit_of", lambda device: 10**5)
    monkeypatch.setattr(importlib.import_module("scarlet_jax.load"), "_place", lambda *_: pytest.fail("read"))
    with pytest.raises(BadInput, match=r"the memory of 1 cpu device\(s\) is 0.00 GB: .* GB are needed"):
        scarlet_jax.load(models.path(SHAPE, "Q8_0"))


def test_sizes():
    assert [parse_size("", text) for text in ("8GB", "1.5 GiB", "512m", "70")] == [
        8e9,
        1.5 * 2**30,
        512e6,
        70,
    ]
    for text in ("", "many", "8XB", "1.2.3GB"):
        with pytest.raises(BadInput, match=r"--memory .*expected a size such as 8GB"):
            parse_size("--memory", text)
