"""Block formats: bit for bit what gguf-py and ggml decode, and no small mistake goes unseen."""

from __future__ import annotations

import ast
import inspect
import types

import gguf
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from support_blocks import (
    LAYOUTS,
    LEFT_TO_GGML,
    QTYPES,
    assert_same_bits,
    by_gguf_py,
    differing,
    expected_values,
    random_blocks,
    trial_blocks,
)
from support_mutants import functions, mutants, reachable

from scarlet_jax.errors import BadInput
from scarlet_jax.ops import quants
from scarlet_jax.ops.qtensor import block_size
from scarlet_jax.ops.quants import DECODERS, decode
from scarlet_jax.tools.engines import ggml

every_type = pytest.mark.parametrize("qtype", QTYPES)


def test_the_table_is_whole():
    no_weights = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}  # integers, doubles, activations
    assert set(DECODERS) == set(QTYPES)
    assert set(DECODERS) >= {t.name for t in gguf.GGMLQuantizationType} - no_weights
    assert set(DECODERS) >= set(LEFT_TO_GGML)


@every_type
def test_bits_under_jit(qtype):
    got = jax.jit(lambda blocks: DECODERS[qtype](blocks))(
        trial_blocks(qtype)
    )  # a new function: no cached trace
    assert_same_bits(np.asarray(got), expected_values(qtype))


@every_type
def test_the_two_oracles_agree(qtype):
    """What gguf-py says, ggml's C says too; and our trials hold NaN, infinity, -0 where a format can."""
    expected = expected_values(qtype)
    assert_same_bits(ggml.to_float(qtype, trial_blocks(qtype)), expected)
    if LAYOUTS[qtype].f16:
        assert np.isnan(expected).any()
        assert np.isinf(expected).any()
        assert (np.signbit(expected) & (expected == 0)).any()


def test_mxfp4_subnormals_are_not_flushed():
    """Exponent bytes 0 and 1 reach below the least normal f32; XLA:CPU would flush a product there."""
    blocks = np.zeros((2, 17), np.uint8)
    blocks[:, 0], blocks[:, 1] = [0, 1], 0x91  # element 0 is +1/2, element 16 is -1/2
    got = np.asarray(jax.jit(decode, static_argnames="qtype")(blocks, qtype="MXFP4"))
    assert got[:, [0, 16]].tolist() == [[2.0**-128, -(2.0**-128)], [2.0**-127, -(2.0**-127)]]


@pytest.mark.parametrize("qtype", ["F32", "BF16", "Q5_0", "Q6_K", "IQ1_M", "NVFP4"])
def test_rows_and_leading_axes(qtype):
    elements, size = block_size(qtype)
    blocks = random_blocks(qtype, 2 * 3 * 5)
    got = jax.jit(decode, static_argnums=1)(blocks.reshape(2, 3, 5 * size), qtype)
    assert got.shape == (2, 3, 5 * elements)
    assert_same_bits(np.asarray(got).reshape(-1, elements), by_gguf_py(qtype, blocks))
    assert decode(blocks[:0].reshape(0, 5 * size), qtype).shape == (0, 5 * elements)


@every_type
def test_lowers_for_other_devices(qtype):
    blocks = jax.ShapeDtypeStruct((3, 5 * block_size(qtype)[1]), jnp.uint8)
    exported = jax.export.export(jax.jit(decode, static_argnums=1), platforms=["cuda", "tpu"])(blocks, qtype)
    assert exported.out_avals[0].shape == (3, 5 * block_size(qtype)[0])


def test_what_is_refused():
    with pytest.raises(BadInput, match=r"quant type Q9_Z: not one of F32, .*Q4_K"):
        decode(np.zeros((1, 144), np.uint8), "Q9_Z")
    with pytest.raises(BadInput, match="Q4_K row of 145 bytes: expected whole blocks of 144 bytes"):
        decode(np.zeros((1, 145), np.uint8), "Q4_K")
    with pytest.raises(AssertionError):
        decode(np.zeros((1, 144), np.int8), "Q4_K")


# --- the decoders' own source, run by numpy: cheap enough to run thousands of variants ---------------


def _bitcast(x: np.ndarray, dtype) -> np.ndarray:
    """What `lax.bitcast_convert_type` does, for a dtype as wide as x's or as wide as x's last axis."""
    wider = np.dtype(dtype).itemsize > x.dtype.itemsize
    assert np.dtype(dtype).itemsize == x.dtype.itemsize * (x.shape[-1] if wider else 1)
    values = np.ascontiguousarray(x).view(dtype)
    return values[..., 0] if wider else values


SOURCE = functions(inspect.getsource(quants))


def _compile() -> dict:
    """The decoders in numpy's terms, by name."""
    names = {**vars(quants), "jnp": np, "lax": types.SimpleNamespace(bitcast_convert_type=_bitcast)}
    exec(compile(ast.Module([*SOURCE.values()], []), "quants in numpy", "exec"), names)
    return names


@every_type
def test_numpy_runs_the_same_source(qtype):
    with np.errstate(all="ignore"):
        assert_same_bits(_compile()[qtype.lower()](trial_blocks(qtype)), expected_values(qtype))


MULTIPLYING = [
    q for q in QTYPES if q not in ("F32", "BF16", "MXFP4")
]  # the last is put together from integers
ONE_TERM = [(q, 0) for q in MULTIPLYING] + [(q, 1) for q in MULTIPLYING if len(LAYOUTS[q].f16) == 2]


@pytest.mark.parametrize(("qtype", "kept"), ONE_TERM)
def test_products_are_exact(qtype, kept):
    """No product is rounded, so that a fused multiply-add or another order gives the same bits.

    In f64 each type's values, with only the scale or only the min in force, are exactly the f32 ones.
    """
    names = _compile()
    names["_f32"] = lambda x: x.astype(np.float64)
    names["_f16"] = lambda x: names["_view"](x, np.float16).astype(np.float64)
    blocks, offsets = trial_blocks(qtype).copy(), LAYOUTS[qtype].f16
    for offset in offsets[:kept] + offsets[kept + 1 :]:
        blocks[:, offset : offset + 2] = 0
    with np.errstate(all="ignore"):
        values, expected = names[qtype.lower()](blocks), by_gguf_py(qtype, blocks).astype(np.float64)
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, expected)


# --- mutations ---------------------------------------------------------------------------------------

# Where axes are cut and merged: shared by all formats, and partly idle in some (a format that views nothing
# as wider numbers cannot see how that is done). Their mistakes must be seen by some format, all others by
# each format that runs the mistaken line.
PLUMBING = {"_fields", "_view", "_unpack", "_lookup"}

# Changes that change nothing, and why.
SMALL = "the values are small and positive, so that signed and unsigned agree"
BITS = "only the bits matter, and signed and unsigned integers of a size have the same"
LINEAR = "the least normal numbers, of exponent field 1, continue the subnormal ones' bit patterns"
EQUIVALENT = {
    ("_ldexp", "bits = jnp.where(field < 2, subnormal, jnp.where(field > 254, 2139095040, normal))"): LINEAR,
    ("_ldexp", "bits = jnp.where(field <= 1, subnormal, jnp.where(field > 254, 2139095040, normal))"): LINEAR,
    ("_u16", "return x.astype(jnp.int16)"): SMALL,
    ("_ue4m3", "exponent, mantissa = ((x >> 3).astype(jnp.int32) & 15, x.astype(jnp.uint32) & 7)"): SMALL,
    ("_ue4m3", "exponent, mantissa = ((x >> 3).astype(jnp.uint32) & 15, x.astype(jnp.int32) & 7)"): SMALL,
    ("bf16", "return _view(_view(blocks, jnp.int16).astype(jnp.uint32) << 16, jnp.float32)"): BITS,
    ("bf16", "return _view(_view(blocks, jnp.uint16).astype(jnp.int32) << 16, jnp.float32)"): BITS,
    (
        "iq1_m",
        "d = (words >> 12 << np.array([0, 4, 8, 12], np.int16)).sum(axis=1, keepdims=True, dtype=jnp.uint16)",
    ): BITS,
    (
        "iq1_m",
        "d = (words >> 12 << np.array([0, 4, 8, 12], np.uint16)).sum(axis=1, keepdims=True, dtype=jnp.int16)",
    ): BITS,
}


def _is_right(decoder, blocks: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the decoder survives this test; one that raises does not."""
    with np.errstate(all="ignore"):
        try:
            got = decoder(blocks)
        except Exception:
            return False
    return got.shape == expected.shape and got.dtype == expected.dtype and not differing(got, expected).any()


def _survivors(qtype: str, names: set[str]) -> set[tuple[str, str]]:
    """The mutants of the functions `names` that decode all trials of this type rightly."""
    blocks, expected = trial_blocks(qtype), expected_values(qtype)
    few = np.random.default_rng(0).permutation(len(blocks))[:48]  # these catch almost all, quickly
    decoders, alive = _compile(), set()
    for name in names & reachable(qtype.lower(), SOURCE):
        original = decoders[name]
        for mutant in mutants(SOURCE[name]):
            exec(compile(ast.Module([mutant.tree], []), "mutant", "exec"), decoders)
            decoder = decoders[qtype.lower()]
            if _is_right(decoder, blocks[few], expected[few]) and _is_right(decoder, blocks, expected):
                alive.add((mutant.function, mutant.change))
        decoders[name] = original
    return alive


@every_type
def test_every_mistake_in_a_format_is_seen(qtype):
    """A changed shift, mask, offset, order, operator, type or variable, one at a time."""
    alive = _survivors(qtype, SOURCE.keys() - PLUMBING)
    assert alive <= EQUIVALENT.keys(), alive - EQUIVALENT.keys()


def test_every_mistake_in_the_plumbing_is_seen():
    for name in PLUMBING:
        users = [q for q in QTYPES if name in reachable(q.lower(), SOURCE)]
        assert not set.intersection(*(_survivors(q, {name}) for q in users)), name


def test_the_listed_equivalents_exist():
    made = {(m.function, m.change) for source in SOURCE.values() for m in mutants(source)}
    assert made >= EQUIVALENT.keys()


# The fault that this project began with. Sub-block b of Q5_K takes bit b of `qh`; the usual loop goes by
# pairs of sub-blocks, low nibbles and high ones, with a mask for each, and shifts both by two after a pair.
@pytest.mark.parametrize(
    "planes",
    [
        pytest.param((0, 0, 1, 1, 2, 2, 3, 3), id="one mask for both nibbles, shifted by one"),
        pytest.param((0, 0, 2, 2, 4, 4, 6, 6), id="one mask for both nibbles, shifted by two"),
        pytest.param((1, 1, 3, 3, 5, 5, 7, 7), id="the high nibbles' mask for both"),
        pytest.param((1, 0, 3, 2, 5, 4, 7, 6), id="the masks exchanged"),
        pytest.param((0, 1, 1, 2, 2, 3, 3, 4), id="two masks, shifted by one"),
        pytest.param((0, 4, 1, 5, 2, 6, 3, 7), id="low nibbles first"),
        pytest.param((7, 6, 5, 4, 3, 2, 1, 0), id="highest bit first"),
    ],
)
def test_q5_k_high_bit_faults_are_seen(planes, monkeypatch):
    def faulty_bits(x, group):
        return quants._unpack(x, planes, 0x01, group=group)

    monkeypatch.setattr(quants, "_bits", faulty_bits)
    with pytest.raises(AssertionError, match="values differ"):
        test_bits_under_jit("Q5_K")


def test_q5_k_without_high_bits_is_seen(monkeypatch):
    monkeypatch.setattr(quants, "_bits", lambda x, group: jnp.zeros((len(x), 256), jnp.uint8))
    with pytest.raises(AssertionError, match="values differ"):
        test_bits_under_jit("Q5_K")
