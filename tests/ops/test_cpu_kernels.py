"""The compiled CPU kernels, on every instruction set that runs here, against float64 over ggml's values."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support_blocks import (
    LAYOUTS,
    QTYPES,
    assert_same_bits,
    by_gguf_py,
    expected_values,
    random_blocks,
    trial_blocks,
    with_scale,
)

from scarlet_jax.errors import BadInput
from scarlet_jax.ops import cpu
from scarlet_jax.ops.cpu import build
from scarlet_jax.ops.qtensor import QTensor, block_size

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

# Inputs and decoded weights are the same numbers on both sides; a product is rounded once and then some
# tens of times as lanes and chains are summed, each about 2^-25 relative. A wrong bit costs 1e-3 and more.
TOLERANCE = 2e-6
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
PACKED = tuple(q for q in QTYPES if q not in FLOATS)

every_type = pytest.mark.parametrize("qtype", QTYPES)
every_packed_type = pytest.mark.parametrize("qtype", PACKED)


@pytest.fixture(autouse=True, params=["amx", "avx512vnni", "avx512", "avx2", "generic"])
def isa(request):
    try:
        cpu.set_isa(request.param)
    except BadInput as reason:
        pytest.skip(str(reason))
    yield request.param
    cpu.set_isa()


def relative_l2(got, expected) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


def make_rows(qtype: str, out: int, blocks: int = 3, seed: int = 0) -> np.ndarray:
    """Random weights of about unit size: uint8 (out, row bytes), a row being `blocks` times 256 elements.

    Where a block is smaller, one more is put behind: kernels take small blocks by the 256 elements too.
    """
    elements = block_size(qtype)[0]
    if qtype in FLOATS:
        shape = (out, 256 * blocks + 32)
        return np.random.default_rng([seed, out]).standard_normal(shape).astype(FLOATS[qtype]).view(np.uint8)
    count = out * (256 * blocks // elements + (elements < 256))
    return with_scale(qtype, random_blocks(qtype, count, seed)).reshape(out, -1)


def values_of(qtype: str, rows: np.ndarray) -> np.ndarray:
    """Packed (out, row bytes) -> float64 (out, in), by gguf-py."""
    values = by_gguf_py(qtype, rows.reshape(-1, block_size(qtype)[1]))
    return values.reshape(len(rows), -1).astype(np.float64)


def activations(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def product(x, qtype: str, rows: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64) @ values_of(qtype, rows).T


# --- values -----------------------------------------------------------------------------------------


@every_type
def test_decoding_is_bit_exact(qtype):
    """NaN, infinities, subnormals and minus zero included."""
    assert_same_bits(np.asarray(cpu.decode(trial_blocks(qtype), qtype)), expected_values(qtype))


@every_packed_type
def test_decoding_rows(qtype):
    elements, size = block_size(qtype)
    blocks = random_blocks(qtype, 2 * 3 * 5)
    got = jax.jit(cpu.decode, static_argnums=1)(blocks.reshape(2, 3, 5 * size), qtype)
    assert got.shape == (2, 3, 5 * elements)
    assert_same_bits(np.asarray(got).reshape(-1, elements), by_gguf_py(qtype, blocks))


# One row, few, the first count of the tiled product, and counts that fill no tile; out of 1, of odd numbers,
# and beyond a tile of weights.
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 11])
@every_type
def test_product(qtype, count):
    rows = make_rows(qtype, out=13)
    w = QTensor(rows, qtype)
    x = activations(count, w.shape[1])
    got = jax.jit(cpu.qmatmul)(x, w)
    assert got.dtype == jnp.float32
    assert relative_l2(got, product(x, qtype, rows)) <= TOLERANCE


@pytest.mark.parametrize("qtype", ["Q4_K", "Q8_0", "F16"])
@pytest.mark.parametrize("count", [1, 4, 9, 531])
@pytest.mark.parametrize("out", [1, 97, 205])
def test_product_beyond_every_tile(qtype, count, out):
    rows = make_rows(qtype, out, blocks=15 if qtype == "Q4_K" else 48)
    w = QTensor(rows, qtype)
    x = np.abs(activations(count, w.shape[1])) * np.sign(values_of(qtype, rows)[0]).astype(np.float32)
    assert relative_l2(cpu.qmatmul(x, w), product(x, qtype, rows)) <= TOLERANCE


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("elements", [1, 5, 16, 31, 33, 517, 1030])
@pytest.mark.parametrize("qtype", FLOATS)
def test_float_rows_of_any_length(qtype, elements, count):
    rng = np.random.default_rng(elements)
    weights = jnp.asarray(rng.standard_normal((7, elements)).astype(FLOATS[qtype]))
    x = activations(count, elements)
    expected = np.asarray(x, np.float64) @ np.asarray(weights, np.float64).T
    assert relative_l2(cpu.qmatmul(x, weights), expected) <= TOLERANCE
    as_bytes = np.asarray(weights).view(np.uint8)
    np.testing.assert_array_equal(
        cpu.decode(as_bytes, qtype) if elements else 0, np.asarray(weights, np.float32)
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("count", [1, 3, 12])
@every_packed_type
def test_adversarial_blocks(qtype, count, ragged):
    """Scales, mins and quants at their extremes, and activations of very different sizes."""
    size = block_size(qtype)[1]
    rng = np.random.default_rng(7)
    blocks = 1024 // block_size(qtype)[0] + ragged * (block_size(qtype)[0] < 256)
    rows = rng.choice(np.array([0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F], np.uint8), (9, blocks * size))
    rows = with_scale(qtype, rows.reshape(-1, size)).reshape(9, -1)
    w = QTensor(rows, qtype)
    x = activations(count, w.shape[1]) * (10.0 ** rng.integers(-6, 6, w.shape[1])).astype(np.float32)
    assert relative_l2(cpu.qmatmul(x, w), product(x, qtype, rows)) <= TOLERANCE


@pytest.mark.parametrize("shape", [(0, 768), (2, 0, 768)])
def test_no_rows(shape):
    w = QTensor(make_rows("Q4_K", out=7), "Q4_K")
    assert cpu.qmatmul(jnp.zeros(shape), w).shape == (*shape[:-1], 7)
    none = QTensor(w.blocks[:0], "Q4_K")
    assert cpu.qmatmul(jnp.zeros((3, 768)), none).shape == (3, 0)
    assert cpu.decode(w.blocks[:0], "Q4_K").shape == (0, 768)
    assert (np.asarray(cpu.qmatmul(jnp.zeros((3, 0)), jnp.zeros((5, 0)))) == np.zeros((3, 5))).all()


# --- independence -----------------------------------------------------------------------------------


@pytest.fixture
def many_threads():
    before = cpu.threads()
    yield cpu.set_threads
    cpu.set_threads(before)


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("qtype", ["Q4_K", "Q6_K", "F32"])
def test_threads_do_not_change_a_bit(qtype, count, many_threads):
    w = QTensor(make_rows(qtype, out=301, blocks=16), qtype)
    x = activations(count, w.shape[1])
    results = []
    for threads in (1, 2, 5):
        many_threads(threads)
        assert cpu.threads() == threads
        results.append(np.asarray(cpu.qmatmul(x, w)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@every_type
def test_rows_do_not_depend_on_their_neighbours(qtype):
    """A verified draft is bit for bit what one step at a time would have given."""
    w = QTensor(make_rows(qtype, out=37, blocks=9), qtype)
    x = activations(4, w.shape[1])
    one_by_one = np.concatenate([cpu.qmatmul(x[i : i + 1], w) for i in range(4)])
    for count in (2, 3, 4):
        np.testing.assert_array_equal(cpu.qmatmul(x[:count], w), one_by_one[:count])


@pytest.mark.parametrize("qtype", ["Q4_K", "F16"])
def test_many_rows_do_not_depend_on_their_number(qtype):
    w = QTensor(make_rows(qtype, out=103, blocks=5), qtype)
    x = activations(40, w.shape[1])
    whole = np.asarray(cpu.qmatmul(x, w))
    np.testing.assert_array_equal(cpu.qmatmul(x[:5], w), whole[:5])
    np.testing.assert_array_equal(cpu.qmatmul(x[:23], w), whole[:23])


def test_two_callers_at_once(many_threads):
    """Neither waits for the other's work, and both are right."""
    many_threads(3)
    w = QTensor(make_rows("Q5_K", out=500, blocks=8), "Q5_K")
    xs = [activations(1, w.shape[1]) * scale for scale in (1, 2)]
    expected = [np.asarray(cpu.qmatmul(x, w)) for x in xs]
    wrong = []

    def call(x, y):
        for _ in range(100):
            if not np.array_equal(cpu.qmatmul(x, w), y):
                wrong.append(y)

    callers = [threading.Thread(target=call, args=pair) for pair in zip(xs, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong
    assert not any(caller.is_alive() for caller in callers)


# --- fused calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 10])
def test_many_weights_share_an_input(count):
    ws = [QTensor(make_rows(q, out), q) for q, out in (("Q4_K", 13), ("Q6_K", 5), ("IQ3_S", 7))]
    floats = jnp.asarray(activations(3, 768))
    x = activations(2, count, 768)
    got = jax.jit(lambda x, ws: cpu.qmatmul_many(x, ws))(x, [*ws, floats])
    for y, w in zip(got, [*ws, floats], strict=True):
        np.testing.assert_array_equal(y, cpu.qmatmul(x, w))


def rows_of(qtype: str, out: int, elements: int) -> np.ndarray:
    """Random weights: uint8 (out, row bytes)."""
    block, size = block_size(qtype)
    return make_rows(qtype, out, elements // 256)[:, : elements // block * size]


@pytest.mark.parametrize("qtypes", [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "IQ4_XS", "F16")])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_ffn(qtypes, count):
    F, D = 512, 256
    shapes = [(F, D), (F, D), (24, F)]
    rows = [rows_of(q, *shape) for q, shape in zip(qtypes, shapes, strict=True)]
    ws = [QTensor(r, q) for r, q in zip(rows, qtypes, strict=True)]
    x = activations(count, D)
    x /= np.float32(
        product(x, qtypes[0], rows[0]).std() / 3
    )  # so that silu is tried on both sides of its bend
    gate, up = (product(x, q, r) for q, r in zip(qtypes[:2], rows[:2], strict=True))
    hidden = gate / (1 + np.exp(-gate)) * up
    expected = hidden @ values_of(qtypes[2], rows[2]).T
    got = jax.jit(cpu.ffn)(x, *ws)
    assert relative_l2(got, expected) <= TOLERANCE


@pytest.mark.parametrize("qtypes", [("Q4_K", "Q5_K", "Q6_K"), ("Q8_0", "F32", "IQ4_XS")])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_ffn_of_experts(qtypes, count):
    """Any number of rows an expert, none for some; one that a row has twice counts twice."""
    E, k, F, D, out = 5, 3, 256, 512, 21
    shapes = [(E * F, D), (E * F, D), (E * out, F)]
    rows = [rows_of(q, *shape) for q, shape in zip(qtypes, shapes, strict=True)]
    ws = [QTensor(r.reshape(E, len(r) // E, -1), q) for r, q in zip(rows, qtypes, strict=True)]
    gates, ups, downs = (
        values_of(q, r).reshape(E, len(r) // E, -1) for q, r in zip(qtypes, rows, strict=True)
    )
    rng = np.random.default_rng(count)
    x, ids = activations(count, D), rng.integers(0, E - 1, (count, k)).astype(np.int32)
    x /= np.float32(np.abs(gates).max() * D**0.5)  # so that silu is tried around its bend
    shares = rng.normal(size=(count, k)).astype(F32)
    expected = np.zeros((count, out))
    for m, slot in np.ndindex(count, k):
        gate, up = (stack[ids[m, slot]] @ np.float64(x[m]) for stack in (gates, ups))
        expected[m] += shares[m, slot] * (downs[ids[m, slot]] @ (gate / (1 + np.exp(-gate)) * up))
    got = jax.jit(cpu.ffn_experts)(x, *ws, ids, shares)
    assert got.shape == expected.shape
    assert count == 0 or relative_l2(got, expected) <= TOLERANCE


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_experts(count, own):
    """Any number of rows an expert, none for some; x shared by a row's experts or one each."""
    E, k, out = 6, 3, 13
    rows = make_rows("Q5_K", E * out, blocks=2)
    w = QTensor(rows.reshape(E, out, -1), "Q5_K")
    rng = np.random.default_rng(count)
    ids = np.stack([rng.permutation(E - 1)[:k] for _ in range(count)]).astype(np.int32)
    x = activations(*((count, k, 512) if own else (count, 512)))
    values = values_of("Q5_K", rows).reshape(E, out, 512)
    each = x if own else np.repeat(x[:, None], k, axis=1)
    expected = np.einsum("mki,mkoi->mko", each.astype(np.float64), values[ids])
    got = jax.jit(cpu.qmatmul_experts)(x, w, ids)
    assert got.shape == (count, k, out)
    assert relative_l2(got, expected) <= TOLERANCE


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("qtype", ["Q4_K", "Q6_K", "Q8_0"])
def test_one_row_of_any_size(qtype, size):
    rows = make_rows(qtype, out=13)
    w = QTensor(rows, qtype)
    x = activations(1, w.shape[1]) * np.float32(size)
    assert relative_l2(cpu.qmatmul(x, w), product(x, qtype, rows)) <= TOLERANCE


@pytest.mark.parametrize("what", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("qtype", ["Q4_K", "Q6_K", "Q8_0"])
def test_one_row_keeps_what_is_not_finite(qtype, what):
    w = QTensor(make_rows(qtype, out=7), qtype)
    x = activations(1, w.shape[1])
    x[0, 300] = what
    assert not np.isfinite(np.asarray(cpu.qmatmul(x, w))).any()


# --- the fast mode ----------------------------------------------------------------------------------

# The matrix unit's fast mode: what two bf16 leave of a number is 2^-18 of it at most, of x and of w, and so is
# the product of their second terms. Three such errors, independent of one another, are 6.6e-6.
AMX_FAST_TOLERANCE = 6.6e-6
# Elements of x that are rounded together: those whose weights share a factor.
ROUNDED_BY = dict.fromkeys(["Q2_K", "Q3_K", "Q6_K", "IQ1_M", "IQ2_XS", "IQ2_S", "TQ2_0", "NVFP4"], 16)
ROUNDED_BY["TQ1_0"] = 256


NOT_OF_BYTES = ("Q1_0", "Q2_0")  # whose quants do not come a byte each


@pytest.mark.parametrize("count", [1, 2, 4, 6])
@every_packed_type
def test_exact_mode_keeps_what_f32_keeps_of_the_largest(qtype, count):
    """Beside an activation a million times as large, the small ones of its 32 keep their upper bits.

    Products in fixed point round x to 2^-23 of the largest of those that share a scale, or better: about an
    f32's last bit of the largest, and for one as small as this no more than the sum in f32 would keep.
    """
    rows = whole_rows(qtype, out=21, blocks=3)
    x = activations(count, 768)
    x[:, ::32] *= 2.0**20
    apart = np.abs(x).reshape(count, -1, ROUNDED_BY.get(qtype, 32)).max(-1, keepdims=True)
    most = np.broadcast_to(apart, (*apart.shape[:-1], ROUNDED_BY.get(qtype, 32))).reshape(x.shape)
    values = values_of(qtype, rows)
    error = np.abs(cpu.qmatmul(x, QTensor(rows, qtype)) - product(x, qtype, rows))
    # The second term: f32 sums, of terms that the largest dominate.
    bound = 2.0**-23 * (most @ np.abs(values).T) + 2.0**-21 * (np.abs(x) @ np.abs(values).T)
    assert (error <= bound).all()


def rounded(x: np.ndarray, size: int) -> np.ndarray:
    """Each `size` elements as whole multiples of a 127th of their largest: f32 -> float64."""
    groups = x.reshape(len(x), -1, size)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / F32(127)
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0).astype(F32)
    return (np.rint(groups * inverse) * np.float64(scale)).reshape(x.shape)


def whole_rows(qtype: str, out: int, blocks: int) -> np.ndarray:
    """`make_rows` without what is beyond the last whole 256 elements."""
    elements, size = block_size(qtype)
    return np.ascontiguousarray(make_rows(qtype, out, blocks)[:, : 256 * blocks // elements * size])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 203])
@every_packed_type
def test_fast(qtype, count, isa):
    """Where the mode covers the type it is the exact product of the rounded activations, else of all of them.

    What rounding itself costs is half a 127th of the largest of 32 at most: 0.5 % of normal numbers in the mean
    square, and less where all weights are of a sign.
    """
    rows = whole_rows(qtype, out=73, blocks=9)
    w = QTensor(rows, qtype)
    x = activations(count, w.shape[1])
    x[0, :256] = 0  # a stretch without a scale
    fast = jax.jit(lambda x: cpu.qmatmul(x, w, fast=True))(x)
    exact = cpu.qmatmul(x, w)
    if isa == "amx" and count > 4:
        assert relative_l2(fast, product(x, qtype, rows)) <= AMX_FAST_TOLERANCE
    elif isa in ("amx", "avx512vnni") and qtype not in NOT_OF_BYTES:
        seen = rounded(x, ROUNDED_BY.get(qtype, 32))
        assert relative_l2(fast, seen @ values_of(qtype, rows).T) <= TOLERANCE
        assert 1e-4 < relative_l2(fast, np.float64(exact)) < 1e-2
    else:
        np.testing.assert_array_equal(fast, exact)
    assert cpu.rounds(qtype) == (isa == "amx" or (isa == "avx512vnni" and qtype not in NOT_OF_BYTES))


def test_fast_rows_do_not_depend_on_those_beside(isa):
    """Up to four: a draft is verified with the very sums that its tokens would have one by one."""
    w = QTensor(whole_rows("Q4_K", out=9, blocks=2), "Q4_K")
    x = activations(4, w.shape[1])
    together = cpu.qmatmul(x, w, fast=True)
    np.testing.assert_array_equal(together, np.concatenate([cpu.qmatmul(r[None], w, fast=True) for r in x]))


def test_fast_needs_whole_blocks_of_256(isa):
    w = QTensor(make_rows("Q8_0", out=7), "Q8_0")
    for count in (1, 7):
        x = activations(count, w.shape[1])
        if isa != "amx":
            np.testing.assert_array_equal(cpu.qmatmul(x, w, fast=True), cpu.qmatmul(x, w))


@pytest.mark.parametrize("qtype", ["Q6_K", "IQ4_XS", "IQ2_S"])
def test_fast_at_the_extremes(qtype, isa):
    """The largest quants, scales and activations together do not overflow 32 bits."""
    for quant, scale in itertools.product((0x00, 0x80, 0x7F, 0xFF), repeat=2):
        blocks = np.full((2 * 7, block_size(qtype)[1]), quant, np.uint8)
        blocks[:, LAYOUTS[qtype].scales] = scale
        rows = with_scale(qtype, blocks).reshape(7, -1)
        w = QTensor(rows, qtype)
        x = np.full((6, w.shape[1]), 3e4, np.float32) * np.array([1, -1, 1, -1, 1, -1], np.float32)[:, None]
        expected = product(x, qtype, rows)
        error = np.linalg.norm(cpu.qmatmul(x, w, fast=True) - expected)
        bound = AMX_FAST_TOLERANCE if isa == "amx" else TOLERANCE  # all are the largest: rounding leaves them
        assert error <= bound * np.linalg.norm(expected)


def test_fast_keeps_what_is_not_finite(isa):
    w = QTensor(make_rows("Q4_K", out=7), "Q4_K")
    x = activations(6, w.shape[1])
    x[1, 300], x[3, 5] = np.inf, np.nan
    finite = np.isfinite(np.asarray(cpu.qmatmul(x, w, fast=True)))
    assert finite[[0, 2, 4, 5]].all()
    assert not finite[[1, 3]].any()


@pytest.mark.parametrize("count", [1, 6, 100])
def test_fast_fused_calls(count, isa):
    shapes = {"gate": (300, 512), "up": (300, 512)}
    ws = [QTensor(rows_of("Q4_K", *shape), "Q4_K") for shape in shapes.values()]
    x = activations(count, 512)
    one, other = cpu.qmatmul_many(x, ws, fast=True)
    np.testing.assert_array_equal(one, cpu.qmatmul(x, ws[0], fast=True))
    np.testing.assert_array_equal(other, cpu.qmatmul(x, ws[1], fast=True))
    x /= np.float32(np.std(np.asarray(one)) / 3)
    gate, up = (np.float64(y) for y in cpu.qmatmul_many(x, ws, fast=True))
    down = activations(11, 300)
    got = cpu.ffn(x, *ws, jnp.asarray(down), fast=True)
    assert relative_l2(got, (gate / (1 + np.exp(-gate)) * up) @ np.float64(down).T) <= TOLERANCE


# --- transformations --------------------------------------------------------------------------------


def test_vmap():
    rows = make_rows("Q4_K", out=3 * 7)
    w = QTensor(jnp.asarray(rows.reshape(3, 7, -1)), "Q4_K")
    x = activations(3, 5, 768)
    one_by_one = np.stack([cpu.qmatmul(x[e], QTensor(w.blocks[e], "Q4_K")) for e in range(3)])
    np.testing.assert_array_equal(jax.vmap(cpu.qmatmul)(x, w), one_by_one)
    over_w = jax.vmap(cpu.qmatmul, in_axes=(None, 0))(x[0], w)
    np.testing.assert_array_equal(over_w[0], one_by_one[0])
    both = jax.vmap(jax.vmap(cpu.qmatmul, in_axes=(None, 0)), in_axes=(0, None))(x, w)
    np.testing.assert_array_equal(both[2, 1], cpu.qmatmul(x[2], QTensor(w.blocks[1], "Q4_K")))
    over_x = jax.vmap(cpu.qmatmul, in_axes=(0, None))(x, QTensor(w.blocks[0], "Q4_K"))
    np.testing.assert_array_equal(over_x[0], one_by_one[0])


def test_gradient():
    rows = make_rows("Q6_K", out=7, blocks=1)
    w = QTensor(rows, "Q6_K")
    x, dy = activations(3, 256), activations(3, 7)
    _, pull = jax.vjp(lambda x: cpu.qmatmul(x, w), jnp.asarray(x))
    assert relative_l2(pull(jnp.asarray(dy))[0], dy.astype(np.float64) @ values_of("Q6_K", rows)) <= TOLERANCE


# --- what does not fit ------------------------------------------------------------------------------


def raw(name, result, *args, **attributes):
    return jax.ffi.ffi_call(name, result)(*args, **attributes)


F32 = jnp.float32
BLOCKS = np.zeros((7, 288), np.uint8)  # Q4_K (7, 512)
SQUARE = np.zeros((256, 144), np.uint8)  # Q4_K (256, 256)


def mixture(**changed) -> jax.Array:
    """One row and its two experts, both the only one."""
    w = QTensor(SQUARE[None], "Q4_K")
    ids, shares = np.zeros((1, 2), np.int32), np.zeros((1, 2), F32)
    arguments = {"gate": w, "up": w, "down": w, "ids": ids, "shares": shares} | changed
    return cpu.ffn_experts(np.zeros((1, 256), F32), **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: raw(
                "scarlet_qmatmul",
                [jax.ShapeDtypeStruct((3, 7), F32)],
                np.zeros((3, 256), F32),
                BLOCKS,
                qtypes="Q4_K",
                fast=False,
            ),
            r"scarlet_qmatmul: w is u8 \(7, 288\): expected rows of 256 elements",
        ),
        (
            lambda: raw(
                "scarlet_qmatmul",
                [jax.ShapeDtypeStruct((3, 7), F32)],
                np.zeros((3, 512), np.int32),
                BLOCKS,
                qtypes="Q4_K",
                fast=False,
            ),
            r"scarlet_qmatmul: x is i32 \(3, 512\): expected f32",
        ),
        (
            lambda: raw(
                "scarlet_qmatmul",
                [jax.ShapeDtypeStruct((3, 6), F32)],
                np.zeros((3, 512), F32),
                BLOCKS,
                qtypes="Q4_K",
                fast=False,
            ),
            r"scarlet_qmatmul: the result is f32 \(3, 6\)",
        ),
        (
            lambda: raw(
                "scarlet_qmatmul",
                [jax.ShapeDtypeStruct((3, 7), F32)],
                np.zeros((3, 512), F32),
                BLOCKS,
                qtypes="Q9_X",
                fast=False,
            ),
            "w has quant type Q9_X, which is unknown",
        ),
        (
            lambda: raw(
                "scarlet_qmatmul",
                [jax.ShapeDtypeStruct((3, 7), F32)],
                np.zeros((3, 512), F32),
                BLOCKS[:, 1:],
                qtypes="Q4_K",
                fast=False,
            ),
            r"w is u8 \(7, 287\): expected rows of whole Q4_K blocks of 144 bytes",
        ),
        (
            lambda: raw(
                "scarlet_qmatmul",
                [jax.ShapeDtypeStruct((3, 7), F32)],
                np.zeros((3, 512), F32),
                BLOCKS,
                qtypes="Q4_K,Q6_K",
                fast=False,
            ),
            "1 weights and 1 results for quant types Q4_K,Q6_K",
        ),
        (
            lambda: raw(
                "scarlet_qmatmul",
                [jax.ShapeDtypeStruct((3, 7), F32)],
                np.zeros((3, 512), F32),
                BLOCKS.astype(F32),
                qtypes="Q4_K",
                fast=False,
            ),
            r"w is f32 \(7, 288\): expected u8",
        ),
        (
            lambda: raw("scarlet_decode", jax.ShapeDtypeStruct((7, 511), F32), BLOCKS, qtype="Q4_K"),
            r"scarlet_decode: the result is f32 \(7, 511\)",
        ),
        (
            lambda: raw(
                "scarlet_ffn",
                jax.ShapeDtypeStruct((3, 7), F32),
                np.zeros((3, 512), F32),
                BLOCKS,
                BLOCKS,
                BLOCKS,
                qtypes="Q4_K,Q4_K,Q4_K",
                fast=False,
            ),
            r"scarlet_ffn: down is u8 \(7, 288\): expected rows of 7 elements",
        ),
        (
            lambda: cpu.qmatmul_experts(
                np.zeros((2, 512), F32), QTensor(BLOCKS[None], "Q4_K"), np.array([[0], [1]], np.int32)
            ),
            "scarlet_qmatmul_experts: ids has 1: expected 0 to 0",
        ),
        (
            lambda: cpu.qmatmul_experts(
                np.zeros((3, 512), F32), QTensor(BLOCKS[None], "Q4_K"), np.zeros((2, 1), np.int32)
            ),
            r"scarlet_qmatmul_experts: x is f32 \(3, 512\)",
        ),
        (
            lambda: mixture(ids=np.array([[0, -1]], np.int32)),
            "scarlet_ffn_experts: ids has -1: expected 0 to 0",
        ),
        (
            lambda: mixture(shares=np.zeros((1, 3), F32)),
            r"scarlet_ffn_experts: shares is f32 \(1, 3\): expected f32, of the shape of ids i32 \(1, 2\)",
        ),
        (
            lambda: mixture(up=QTensor(np.stack([SQUARE, SQUARE]), "Q4_K")),
            r"scarlet_ffn_experts: up is u8 \(2, 256, 144\): expected 1 experts, as gate has",
        ),
    ],
)
def test_a_misfit_is_an_error_with_names(call, message):
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call())


def test_integer_weights_are_not_covered():
    with pytest.raises(NotImplementedError, match="weights of dtype int32"):
        cpu.qmatmul(activations(1, 4), jnp.zeros((3, 4), jnp.int32))


# --- the process ------------------------------------------------------------------------------------


def run_python(code: str, limit: float = 120, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=limit
    )


once = pytest.mark.parametrize("isa", ["generic"], indirect=True)  # not for every instruction set


@once
def test_environment(isa):
    code = "from scarlet_jax.ops import cpu; print(cpu.unavailable()); print(cpu.isa(), cpu.threads())"
    assert run_python(code, SCARLET_CPU_ISA="generic", SCARLET_THREADS="3").stdout == "None\ngeneric 3\n"
    wrong = run_python(code, SCARLET_CPU_ISA="neon").stdout
    assert wrong.startswith("instruction set neon: expected one of")
    assert wrong.endswith(" generic\n")


@once
def test_fork(isa):
    """A child of a process whose team is at work has none of its threads, and makes a team of its own."""
    code = """
import ctypes, os
from scarlet_jax.ops import cpu
from scarlet_jax.ops.cpu import build
cpu.set_threads(3)
library = cpu._library()
assert library.scarlet_fma_all(1000) > 0
child = os.fork()
if child == 0:
    os._exit(0 if library.scarlet_fma_all(1000) > 0 else 1)
assert os.waitpid(child, 0)[1] == 0
assert library.scarlet_fma_all(1000) > 0
print("both")
"""
    assert run_python(code).stdout == "both\n"


# --- the build --------------------------------------------------------------------------------------


@once
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no-such-compiler: No such file or directory"), ("false", "false -std=c++17")],
)
def test_without_a_compiler_the_package_says_so(isa, compiler, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    (tmp_path / build.LIBRARY).write_text("an older one")
    assert build.build_or_note(tmp_path).startswith(reason)
    monkeypatch.setattr(cpu, "_FOLDER", tmp_path)
    with pytest.raises(Exception, match=f"the compiled kernels were not built: {re.escape(reason)}"):
        cpu._library.__wrapped__()


@once
def test_a_library_that_does_not_load(isa, tmp_path, monkeypatch):
    (tmp_path / build.LIBRARY).write_text("not a library")
    monkeypatch.setattr(cpu, "_FOLDER", tmp_path)
    with pytest.raises(Exception, match="the compiled kernels do not load"):
        cpu._library.__wrapped__()


@once
def test_a_library_of_other_sources(isa, monkeypatch):
    """A checkout moves on; its library stays until it is compiled again."""
    monkeypatch.setattr(cpu, "fingerprint", lambda: "another")
    why = "of other sources than those here: `python -m scarlet_jax.ops.cpu.build` compiles them again"
    with pytest.raises(Exception, match=re.escape(why)):
        cpu._library.__wrapped__()


@once
@pytest.mark.slow
def test_sanitizers(isa, tmp_path):
    """This file's tests in a process whose kernels are built with AddressSanitizer and UBSan."""
    compiler = build._find_compiler()
    runtimes = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip("the compiler has no shared sanitizer runtimes")
    build.compile_library(tmp_path / build.LIBRARY, sanitize=True)
    code = f"""
import pathlib, pytest, sys
from scarlet_jax.ops import cpu
from scarlet_jax.ops.cpu import build
cpu._FOLDER = pathlib.Path({str(tmp_path)!r})
assert cpu.unavailable() is None, cpu.unavailable()
sys.exit(pytest.main([{__file__!r}, "-q", "-x", "-p", "no:cacheprovider", "-k", "not environment and not fork"]))
"""
    options = {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    result = run_python(code, **options, limit=1800)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@once
@pytest.mark.slow
def test_wheel(isa, tmp_path):
    """A wheel holds the library, for any Python of this platform."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__", "*.gguf")
    shutil.copytree(Path(__file__).parents[2], source, symlinks=True, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=1200)
    (wheel,) = tmp_path.glob("scarlet_jax-*-py3-none-*.whl")
    assert "scarlet_jax/ops/cpu/" + build.LIBRARY in zipfile.ZipFile(wheel).namelist()
