"""Products with weights of every kind, against float64 numpy over gguf-py's values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support_blocks import QTYPES, assert_same_bits, by_gguf_py, random_blocks, with_scale

from scarlet_jax.errors import BadInput
from scarlet_jax.ops import implementations, portable
from scarlet_jax.ops.implementations import IMPLEMENTATIONS
from scarlet_jax.ops.matmul import embed, linear
from scarlet_jax.ops.qtensor import QTensor, block_size

FLOATS = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
PACKED = tuple(q for q in QTYPES if q not in FLOATS)

# Inputs and decoded weights are the same numbers on both sides, and each product is rounded once, each sum a
# few times (blocked sums): about 2^-24 x sqrt(log2 of the length) relative, 1.5e-7. Ten times that would
# still be far below what any wrong bit costs, 1e-3 and more.
TOLERANCE = 2e-6


run = jax.jit(linear, static_argnames="implementation")


def relative_l2(got, expected) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


def make_rows(qtype: str, out: int, blocks: int = 3) -> np.ndarray:
    """Random weights: uint8 (out, row bytes). Normal for the float types, random bits of unit scale else."""
    if qtype in FLOATS:
        weights = np.random.default_rng(out).standard_normal((out, 32 * blocks), np.float32)
        return gguf.quantize(weights, gguf.GGMLQuantizationType[qtype]).view(np.uint8)
    return with_scale(qtype, random_blocks(qtype, out * blocks)).reshape(out, -1)


def values_of(qtype: str, rows: np.ndarray) -> np.ndarray:
    """Packed (out, row bytes) -> f32 (out, in), by gguf-py."""
    return by_gguf_py(qtype, rows.reshape(-1, block_size(qtype)[1])).reshape(len(rows), -1)


def activations(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape, np.float32))


def product(x: jax.Array, weights: np.ndarray) -> np.ndarray:
    """In float64."""
    return np.asarray(x, np.float64) @ weights.T.astype(np.float64)


def plain(qtype: str, rows: np.ndarray) -> jax.Array:
    """A float tensor as the model's weights hold it, of its own dtype."""
    return jnp.asarray(rows.view(FLOATS[qtype]))


every_packed_type = pytest.mark.parametrize("qtype", PACKED)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@every_implementation
@every_packed_type
def test_packed_product(qtype, implementation):
    if reason := IMPLEMENTATIONS[implementation].unavailable():
        pytest.skip(reason)
    rows = make_rows(qtype, out=7)
    weights = values_of(qtype, rows)
    x = activations(5, weights.shape[1])
    got = run(x, QTensor(rows, qtype), implementation=implementation)
    assert got.dtype == jnp.float32
    assert relative_l2(got, product(x, weights)) <= TOLERANCE


@pytest.mark.parametrize("qtype", FLOATS)
def test_float_product(qtype):
    rows = make_rows(qtype, out=7)
    weights = values_of(qtype, rows)
    x = activations(5, weights.shape[1])
    got = run(x, plain(qtype, rows))
    assert got.dtype == jnp.float32
    assert relative_l2(got, product(x, weights)) <= TOLERANCE


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("qtype", ["F32", "F16", "Q5_K"])
def test_leading_axes(qtype, leading):
    rows = make_rows(qtype, out=7)
    weights = values_of(qtype, rows)
    w = plain(qtype, rows) if qtype in FLOATS else QTensor(rows, qtype)
    x = activations(*leading, weights.shape[1])
    got = run(x, w)
    assert got.shape == (*leading, 7)
    assert relative_l2(got, product(x, weights)) <= TOLERANCE


# Out of 37 rows: one tile, many with and without a remainder, one row at a time, and less room than a row.
@pytest.mark.parametrize("tile_rows", [37, 36, 19, 18, 10, 1, 0])
@pytest.mark.parametrize("qtype", ["BF16", "Q6_K"])
def test_tiles(qtype, tile_rows, monkeypatch):
    rows = make_rows(qtype, out=37)
    weights = values_of(qtype, rows)
    monkeypatch.setattr(portable, "TILE_BYTES", tile_rows * weights.shape[1] * 4 + 3)
    w = plain(qtype, rows) if qtype in FLOATS else QTensor(rows, qtype)
    x = activations(2, 3, weights.shape[1])
    got = jax.jit(lambda x, w: linear(x, w, implementation="portable"))(x, w)
    assert relative_l2(got, product(x, weights)) <= TOLERANCE


@pytest.mark.parametrize("qtype", ["F16", "BF16", "Q6_K"])
def test_memory_is_bounded(qtype):
    """A vocabulary's head (Qwen3.5 0.8B: 248320 x 1024, a gigabyte in f32) needs a few tiles, compiled."""
    elements, size = block_size(qtype)
    w: Any = jax.ShapeDtypeStruct((248320, 1024 // elements * size), jnp.uint8)
    w = jax.ShapeDtypeStruct((248320, 1024), FLOATS[qtype]) if qtype in FLOATS else QTensor(w, qtype)
    x = jax.ShapeDtypeStruct((1, 1024), jnp.float32)
    compiled = jax.jit(lambda x, w: linear(x, w, implementation="portable")).lower(x, w).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * portable.TILE_BYTES


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scale_multiplies_the_result(shape):
    rows, scale = make_rows("NVFP4", out=7), np.full(shape, 0.37, np.float32)
    w, bare = QTensor(rows, "NVFP4", scale), QTensor(rows, "NVFP4")
    x = activations(5, w.shape[1])
    np.testing.assert_array_equal(run(x, w), np.asarray(run(x, bare)) * np.float32(0.37))
    ids, gather = jnp.array([6, 0, 3]), jax.jit(embed)
    np.testing.assert_array_equal(gather(w, ids), np.asarray(gather(bare, ids)) * np.float32(0.37))


def test_experts_by_vmap(monkeypatch):
    """Weights (E, out, in) with a scale each, x (E, T, in), tiled: as many products side by side."""
    rows = make_rows("Q4_K", out=3 * 7)
    monkeypatch.setattr(portable, "TILE_BYTES", 4 * 3072)
    w = QTensor(jnp.asarray(rows.reshape(3, 7, -1)), "Q4_K", jnp.array([0.5, 2.0, 3.0]))
    x = activations(3, 5, 768)
    expected = np.stack([product(x[e], values_of("Q4_K", rows[7 * e : 7 * e + 7])) for e in range(3)])
    expected *= np.array([0.5, 2.0, 3.0])[:, None, None]
    assert relative_l2(jax.jit(jax.vmap(lambda x, w: linear(x, w)))(x, w), expected) <= TOLERANCE


@pytest.mark.parametrize("qtype", QTYPES)
def test_embed_is_exact(qtype):
    rows = make_rows(qtype, out=11)
    table = plain(qtype, rows) if qtype in FLOATS else QTensor(rows, qtype)
    ids = np.array([[10, 0, 3, 3], [7, 1, 0, 9], [2, 10, 5, 4]], np.int32)
    got = jax.jit(embed)(table, ids)
    expected = values_of(qtype, rows)
    assert got.shape == (3, 4, expected.shape[1])
    assert_same_bits(np.asarray(got).reshape(12, -1), expected[ids.ravel()])


def test_products_do_not_depend_on_the_tpu_or_gpu_default_precision():
    """TF32 or bf16 products would be 1e-3 off; the lowered programs ask for full f32."""
    for w in (
        jnp.ones((7, 64)),
        jnp.ones((7, 64), jnp.bfloat16),
        QTensor(make_rows("Q8_0", out=7, blocks=2), "Q8_0"),
    ):
        text = run.lower(jnp.ones((5, 64)), w, implementation="portable").as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert dots
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


# --- which implementation ----------------------------------------------------------------------------


def fake(*, reason: str | None = None, covers: str = "Q8_0") -> SimpleNamespace:
    """An implementation whose every product is minus one."""

    def multiply(x, w):
        if w.qtype != covers:
            raise NotImplementedError(f"{w.qtype}: only {covers} here")
        return jnp.full((*x.shape[:-1], w.shape[0]), -1.0)

    return SimpleNamespace(qmatmul=multiply, unavailable=lambda: reason)


@pytest.fixture
def small():
    rows = make_rows("Q8_0", out=7)
    return activations(5, 96), QTensor(rows, "Q8_0")


def use(monkeypatch, **fakes):
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", {**fakes, "portable": portable})


def test_auto_takes_the_first_that_can(small, monkeypatch):
    x, w = small
    use(monkeypatch, absent=fake(reason="no such device"), narrow=fake(covers="Q4_K"), fast=fake())
    assert (np.asarray(linear(x, w)) == -1).all()
    use(monkeypatch, absent=fake(reason="no such device"), narrow=fake(covers="Q4_K"))
    np.testing.assert_array_equal(linear(x, w), portable.qmatmul(x, w))


def test_a_choice_by_name_is_honoured_or_says_why(small, monkeypatch):
    x, w = small
    use(monkeypatch, absent=fake(reason="no such device"), narrow=fake(covers="Q4_K"), fast=fake())
    np.testing.assert_array_equal(linear(x, w, implementation="portable"), portable.qmatmul(x, w))
    with pytest.raises(BadInput, match="implementation absent: no such device"):
        linear(x, w, implementation="absent")
    with pytest.raises(BadInput, match="implementation narrow: Q8_0: only Q4_K here"):
        linear(x, w, implementation="narrow")
    with pytest.raises(
        BadInput, match="implementation gpu: expected auto or one of absent, narrow, fast, portable, cpu-fast"
    ):
        linear(x, w, implementation="gpu")


def test_wrong_shapes_are_refused(small):
    x, w = small
    with pytest.raises(AssertionError):
        linear(x[:, :-1], w)
    with pytest.raises(AssertionError):
        linear(x.astype(jnp.bfloat16), w)
    with pytest.raises(AssertionError):
        linear(x, QTensor(w.blocks[None], w.qtype))
