"""What a model will take of a device's memory: weights and state against what is allocated; and who is refused."""

from __future__ import annotations

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import models
import pytest

import scarlet_jax
from scarlet_jax import memory
from scarlet_jax.errors import BadInput
from scarlet_jax.ops import gpu, implementations
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
    short, long = (need(model.weights, model.config, context=n).workspace for n in (64, 512))
    assert short >= 4 * BATCH * 64 * (256 * SHAPE.head_count + 2 * SHAPE.embedding_length)
    assert long >= 4 * BATCH * 512 * (512 * SHAPE.head_count + 3 * SHAPE.feed_forward_length)
    assert long > 4 * short


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
