"""Taps: free when off, complete when on."""

import jax
import jax.numpy as jnp
import pytest

from scarlet_jax import taps


def layer(x, look):
    x = look("first", jnp.sin(x))
    return look("second", x * 2)


def lowered(function):
    return jax.jit(function).lower(jnp.ones((2, 3))).as_text()


def test_off_is_the_program_without_the_calls():
    assert lowered(lambda x: layer(x, taps.tap)) == lowered(lambda x: layer(x, lambda name, x: x))


def test_on_is_another_program():
    """The comparison above can fail: a collector changes the program."""

    def tapped(x):
        with taps.collect(True) as seen:
            layer(x, taps.tap)
        return seen

    assert lowered(tapped) != lowered(lambda x: layer(x, taps.tap))


def test_a_name_that_occurs_twice_keeps_the_last_at_its_own_place():
    with taps.collect(True) as seen:
        for value, name in enumerate(["norm", "attn_norm", "norm"]):
            taps.tap(name, jnp.float32(value))
    assert list(seen) == ["attn_norm", "norm"]
    assert seen["norm"] == 2


@pytest.mark.parametrize("wanted", [False, True])
def test_the_collector_closes(wanted):
    with taps.collect(wanted) as seen:
        taps.tap("inside", jnp.float32(0))
    taps.tap("outside", jnp.float32(0))
    assert list(seen) == (["inside"] if wanted else [])
