"""The token mixers' kernels, on every instruction set that runs here, against float64 numpy, token by token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import relative_l2

from scarlet_jax.errors import BadInput
from scarlet_jax.ops import cpu, implementations

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

# A few sums of up to some hundred f32 products, each rounded to 2^-24, and an exponential within one or two units
# in the last place. A mistake in what is computed costs 1e-2 and more.
TOLERANCE = 2e-6
EPS = 1e-5


@pytest.fixture(autouse=True, params=["amx", "avx512vnni", "avx512", "avx2", "generic"])
def isa(request):
    try:
        cpu.set_isa(request.param)
    except BadInput as reason:
        pytest.skip(str(reason))
    yield request.param
    cpu.set_isa()


@pytest.fixture
def random():
    return np.random.default_rng(0)


def normal(random, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * random.standard_normal(shape)).astype(np.float32)


def f64(*arrays: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- delta net ----------------------------------------------------------------------------------------------

DELTA_NETS = {  # B, T, Hk, Hv, Dk, Dv, W: whole vectors or not, blocks of tokens or not, one convolution tap
    "decode": (1, 1, 2, 6, 128, 128, 4),
    "blocks": (1, 37, 2, 4, 32, 48, 4),
    "batch": (3, 5, 3, 3, 48, 16, 3),
    "ragged": (2, 19, 1, 4, 13, 11, 5),
    "no-history": (2, 2, 1, 2, 7, 6, 1),
}


def delta_net_inputs(
    random, B, T, Hk, Hv, Dk, Dv, W, count=None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    channels = 2 * Hk * Dk + Hv * Dv
    arrays = {
        "qkv": normal(random, B, T, channels),
        "z": normal(random, B, T, Hv * Dv),
        "alpha": normal(random, B, T, Hv, scale=3),
        "beta": normal(random, B, T, Hv, scale=3),
        "conv1d": normal(random, channels, W),
        "dt": normal(random, Hv),
        "a": -np.exp(normal(random, Hv)),
        "norm": normal(random, Dv),
        "history": normal(random, B, W - 1, channels),
        "memory": normal(random, B, Hv, Dv, Dk),
        "count": np.full(B, T, np.int32) if count is None else np.asarray(count, np.int32),
    }
    return arrays, {"key_head": random.permutation(np.arange(Hv) % Hk), "key_heads": Hk, "eps": EPS}


def delta_net_by_definition(arrays, *, key_head, key_heads, eps):
    """Float64, one sequence, one token, one head at a time; the outcome of padding is zero."""
    qkv, z, alpha, beta, conv1d, dt, a, norm, history, memory = f64(*list(arrays.values())[:-1])
    B, T, _ = qkv.shape
    _, Hv, Dv, Dk = memory.shape
    out = np.zeros((B, T, Hv, Dv))
    for b in range(B):
        count = arrays["count"][b]
        rows = np.concatenate([history[b], qkv[b, :count]])
        for t in range(count):
            mixed = (rows[t : t + conv1d.shape[1]] * conv1d.T).sum(0)
            mixed = mixed * sigmoid(mixed)
            q, k, v = np.split(mixed, [key_heads * Dk, 2 * key_heads * Dk])
            q, k, v = q.reshape(-1, Dk), k.reshape(-1, Dk), v.reshape(-1, Dv)
            for h in range(Hv):
                query, key = q[key_head[h]], k[key_head[h]]
                query = query / np.sqrt((query**2).sum() + eps) / np.sqrt(Dk)
                key = key / np.sqrt((key**2).sum() + eps)
                S = memory[b, h] * np.exp(np.logaddexp(0, alpha[b, t, h] + dt[h]) * a[h])
                S = S + sigmoid(beta[b, t, h]) * np.outer(v[h] - S @ key, key)
                memory[b, h], o = S, S @ query
                gate = z[b, t].reshape(Hv, Dv)[h]
                out[b, t, h] = o / np.sqrt((o**2).mean() + eps) * norm * gate * sigmoid(gate)
        history[b] = rows[count:]
    return out.reshape(z.shape), history, memory


def run_delta_net(arrays, **options):
    return jax.block_until_ready(jax.jit(functools.partial(cpu.delta_net, **options))(*arrays.values()))


def assert_delta_net(arrays, options):
    results = run_delta_net(arrays, **options)
    for got, expected in zip(results, delta_net_by_definition(arrays, **options), strict=True):
        assert relative_l2(got, expected) < TOLERANCE


@pytest.mark.parametrize("sizes", DELTA_NETS.values(), ids=DELTA_NETS)
def test_delta_net(random, sizes):
    assert_delta_net(*delta_net_inputs(random, *sizes))


def test_delta_net_of_sequences_of_different_lengths(random):
    """None at all, fewer than the history, one beyond a block, all."""
    assert_delta_net(*delta_net_inputs(random, 4, 18, 2, 2, 16, 16, 5, count=[0, 2, 17, 18]))


def test_delta_net_padding_is_not_looked_at(random):
    arrays, options = delta_net_inputs(random, 2, 20, 1, 2, 16, 16, 4, count=[3, 18])
    expected = run_delta_net(arrays, **options)
    for name in ("qkv", "z", "alpha", "beta"):
        arrays[name][0, 3:] = np.nan
        arrays[name][1, 18:] = np.nan
    for got, same in zip(run_delta_net(arrays, **options), expected, strict=True):
        np.testing.assert_array_equal(got, same)


def test_delta_net_that_forgets_everything(random):
    """Gates that leave less than the smallest float of what was before."""
    arrays, options = delta_net_inputs(random, 1, 20, 1, 2, 32, 32, 4)
    arrays["alpha"] += 200
    assert_delta_net(arrays, options)
    arrays["beta"] -= 300  # and write nothing: what is left is nothing
    assert not np.asarray(run_delta_net(arrays, **options)[2]).any()


def test_delta_net_continues_where_it_stopped(random):
    """Two calls are one, to the last bit: nothing depends on where the blocks of tokens begin."""
    arrays, options = delta_net_inputs(random, 1, 40, 2, 4, 32, 16, 4)
    out, history, memory = run_delta_net(arrays, **options)
    parts = []
    for span in (slice(0, 21), slice(21, 40)):
        cut = {name: arrays[name][:, span] for name in ("qkv", "z", "alpha", "beta")}
        count = {"count": np.array([span.stop - span.start], np.int32)}
        part, *state = run_delta_net(arrays | cut | count, **options)
        arrays |= dict(zip(("history", "memory"), state, strict=True))
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), out)
    np.testing.assert_array_equal(arrays["history"], history)
    np.testing.assert_array_equal(arrays["memory"], memory)


def test_delta_net_in_place(random):
    arrays, options = delta_net_inputs(random, 2, 3, 1, 3, 32, 16, 5, count=[3, 1])
    expected = run_delta_net(arrays, **options)
    on_device = [jnp.asarray(x) for x in arrays.values()]
    where = on_device[9].unsafe_buffer_pointer()
    got = jax.jit(functools.partial(cpu.delta_net, **options), donate_argnums=(8, 9))(*on_device)
    assert on_device[9].is_deleted()
    assert got[2].unsafe_buffer_pointer() == where
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_delta_net_that_is_not_a_number_says_so(random):
    arrays, options = delta_net_inputs(random, 1, 2, 1, 2, 16, 16, 4)
    arrays["qkv"][0, 0, 16 + 3] = np.nan  # of the key
    out, _, memory = run_delta_net(arrays, **options)
    assert np.isnan(out).any()
    assert np.isnan(memory).any()


# --- attention ----------------------------------------------------------------------------------------------

ATTENTIONS = {  # B, T, N, K, H, M, S, gated: parts of the cache or not, whole vectors or not
    "decode": (1, 1, 8, 2, 128, 32, 700, True),
    "draft": (2, 3, 6, 2, 48, 8, 600, True),
    "prompt": (2, 41, 6, 2, 32, 5, 80, True),
    "plain": (3, 9, 4, 4, 20, 10, 300, False),
    "odd": (1, 5, 3, 1, 11, 3, 37, False),
}


def attention_inputs(
    random, B, T, N, K, H, M, S, gated, dtype: Any = "float32"
) -> tuple[dict[str, Any], dict[str, Any]]:
    count = random.integers(1, T + 1, B)
    arrays = {
        "q": normal(random, B, T, N * H * (2 if gated else 1)),
        "k": normal(random, B, T, K * H),
        "v": normal(random, B, T, K * H),
        "q_norm": normal(random, H),
        "k_norm": normal(random, H, scale=2),
        "angle": normal(random, B, T, M, scale=2),
        "start": random.integers(0, S - count + 1, B).astype(np.int32),
        "count": count.astype(np.int32),
        "k_cache": normal(random, B, S, K, H).astype(dtype),
        "v_cache": normal(random, B, S, K, H).astype(dtype),
    }
    return arrays, {"gated": gated, "adjacent": False, "eps": EPS}


def attention_by_definition(arrays, *, gated, adjacent, eps, magnitude=1.0):
    """Float64, a head at a time, from the narrow cache that a real one would hold."""
    k_cache, v_cache = arrays["k_cache"].copy(), arrays["v_cache"].copy()
    q, k, v, q_norm, k_norm, angle = f64(*list(arrays.values())[:6])
    B, T = q.shape[:2]
    _, _, K, H = k_cache.shape
    N = q.shape[-1] // (2 * H if gated else H)
    q, k, v = q.reshape(B, T, N, -1), k.reshape(B, T, K, H), v.reshape(B, T, K, H)
    out = np.zeros((B, T, N, H))

    def turned(x, weight, angle):
        x = x / np.sqrt((x**2).mean() + eps) * weight if len(weight) else x.copy()
        M = len(angle)
        first = np.arange(0, 2 * M, 2) if adjacent else np.arange(M)
        second = first + (1 if adjacent else M)
        pair = x[first] + 1j * x[second]
        pair = pair * np.exp(1j * angle) * magnitude
        x[first], x[second] = pair.real, pair.imag
        return x

    for b in range(B):
        start, count = arrays["start"][b], arrays["count"][b]
        for t in range(count):
            for h in range(K):
                k_cache[b, start + t, h] = turned(k[b, t, h], k_norm, angle[b, t])
                v_cache[b, start + t, h] = v[b, t, h]
            for n in range(N):
                keys, values = f64(
                    k_cache[b, : start + t + 1, n // (N // K)], v_cache[b, : start + t + 1, n // (N // K)]
                )
                scores = keys @ turned(q[b, t, n, :H], q_norm, angle[b, t]) / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ values / weights.sum()
                if gated:
                    out[b, t, n] *= sigmoid(q[b, t, n, H:])
    return out.reshape(B, T, -1), k_cache, v_cache


def run_attention(arrays, **options):
    return jax.block_until_ready(jax.jit(functools.partial(cpu.attention, **options))(*arrays.values()))


def assert_attention(arrays, options):
    out, *caches = run_attention(arrays, **options)
    expected, *expected_caches = attention_by_definition(arrays, **options)
    assert relative_l2(out, expected) < TOLERANCE
    for got, cache in zip(caches, expected_caches, strict=True):
        assert got.dtype == cache.dtype
        # A key that lies between two 16-bit floats may be rounded to the other one: one unit in a few elements.
        bound = TOLERANCE if cache.dtype == np.float32 else 1e-4
        assert relative_l2(got.astype(np.float32), cache.astype(np.float32)) < bound


@pytest.mark.parametrize("sizes", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(random, sizes):
    assert_attention(*attention_inputs(random, *sizes))


def test_attention_that_rotates_neighbours(random):
    arrays, options = attention_inputs(random, *ATTENTIONS["plain"])
    assert_attention(arrays, options | {"adjacent": True})
    none = np.zeros(0, np.float32)
    assert_attention(arrays | {"q_norm": none, "k_norm": none}, options)


def test_attention_that_makes_larger_what_it_rotates(random):
    arrays, options = attention_inputs(random, *ATTENTIONS["plain"])
    assert_attention(arrays, options | {"magnitude": 1.25})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", ["draft", "odd", "prompt"])
def test_attention_over_a_narrow_cache(random, sizes, dtype):
    """Against the very keys that the kernel has stored."""
    arrays, options = attention_inputs(random, *ATTENTIONS[sizes], dtype=jnp.dtype(dtype))
    out, k_cache, _ = run_attention(arrays, **options)
    expected, k_expected, _ = attention_by_definition(arrays, **options)
    step = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert relative_l2(np.asarray(k_cache, np.float32), k_expected.astype(np.float32)) < step / 10
    assert relative_l2(out, expected) < step / 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_are_rounded_as_numpy_rounds(random, dtype):
    """Ties, subnormals, the largest, overflow, infinities, NaN: all exponents."""
    exponents = np.exp2(random.integers(-28, 18, 4096)) * random.integers(-4096, 4096, 4096)
    special = [
        0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519.99,
        65520,
        2.0**-24,
        2.0**-25,
        3 * 2.0**-25,
        1e-8,
        3e38,
    ]
    values = np.concatenate([exponents, special]).astype(np.float32)
    arrays, options = attention_inputs(random, 1, 1, 1, 1, len(values), 2, 3, False, dtype=jnp.dtype(dtype))
    arrays["v"] = values[None, None]
    stored = np.asarray(run_attention(arrays, **options)[2])[0, arrays["start"][0], 0]
    with np.errstate(over="ignore"):
        expected = values.astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(stored.astype(np.float32), expected.astype(np.float32))


def test_attention_of_sequences_of_different_lengths(random):
    arrays, options = attention_inputs(random, 4, 12, 4, 2, 16, 4, 64, True)
    arrays |= {"count": np.array([0, 1, 7, 12], np.int32), "start": np.array([5, 0, 57, 52], np.int32)}
    expected = run_attention(arrays, **options)
    assert_attention(arrays, options)
    for b, count in enumerate(arrays["count"]):
        for name in ("q", "k", "v", "angle"):
            arrays[name][b, count:] = np.nan  # padding is not looked at
    jax.tree.map(np.testing.assert_array_equal, run_attention(arrays, **options), expected)


def test_attention_sees_no_later_slot(random):
    arrays, options = attention_inputs(random, 1, 6, 2, 1, 32, 4, 600, True)
    arrays |= {"start": np.array([290], np.int32), "count": np.array([6], np.int32)}
    expected = run_attention(arrays, **options)[0]
    arrays["k_cache"][:, 296:] = arrays["v_cache"][:, 296:] = np.nan
    np.testing.assert_array_equal(run_attention(arrays, **options)[0], expected)


def test_attention_with_scores_in_the_thousands(random):
    """One slot takes all: exponentials that overflow, were the largest score not taken off first."""
    arrays, options = attention_inputs(random, 1, 2, 2, 1, 32, 4, 500, True)
    arrays["q_norm"] *= 300
    arrays |= {"start": np.array([490], np.int32)}
    out, expected = run_attention(arrays, **options)[0], attention_by_definition(arrays, **options)[0]
    assert np.isfinite(out).all()
    assert relative_l2(out, expected) < 1e-3  # scores of 1e4 are known to 1e-3 in f32


def test_attention_in_place(random):
    arrays, options = attention_inputs(random, *ATTENTIONS["draft"])
    expected = run_attention(arrays, **options)
    on_device = [jnp.asarray(x) for x in arrays.values()]
    where = [x.unsafe_buffer_pointer() for x in on_device[8:]]
    got = jax.jit(functools.partial(cpu.attention, **options), donate_argnums=(8, 9))(*on_device)
    assert [x.unsafe_buffer_pointer() for x in got[1:]] == where
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# --- both -----------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_threads(random):
    net = delta_net_inputs(random, *DELTA_NETS["batch"])
    layers = [attention_inputs(random, *ATTENTIONS[name]) for name in ("decode", "draft", "prompt")]

    def results(threads):
        cpu.set_threads(threads)
        return [run_delta_net(net[0], **net[1]), *(run_attention(x, **options) for x, options in layers)]

    try:
        jax.tree.map(np.testing.assert_array_equal, results(1), results(3))
    finally:
        cpu.set_threads(0)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("qkv", (1, 3), r"qkv is f32 \(1, 3\): expected f32 \(B, T, C\)"),
        ("z", (3, 5, 47), r"z is f32 \(3, 5, 47\): expected f32 \(3, 5, 48\)"),
        ("conv1d", (336, 0), r"conv1d is f32 \(336, 0\)"),
        ("dt", (4,), r"dt is f32 \(4\): expected f32 \(3\)"),
        ("history", (3, 3, 336), r"history is f32 \(3, 3, 336\)"),
    ],
)
def test_delta_net_of_wrong_shapes_is_refused(random, name, shape, expected):
    arrays, options = delta_net_inputs(random, *DELTA_NETS["batch"])
    with pytest.raises(Exception, match=f"scarlet_delta_net: {expected}"):
        run_delta_net(arrays | {name: np.zeros(shape, np.float32)}, **options)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "q",
            np.zeros((2, 3, 100), np.float32),
            r"q is f32 \(2, 3, 100\): expected rows of a multiple of 192",
        ),
        ("angle", np.zeros((2, 3, 25), np.float32), "at most half of the 48 dims"),
        ("v", np.zeros((2, 3, 95), np.float32), r"v is f32 \(2, 3, 95\): expected f32 \(2, 3, 96\)"),
        ("start", np.array([0, 599], np.int32), "602 tokens: the cache has 600 slots"),
        ("start", np.array([0, -1], np.int32), "start has -1: expected 0 to 600"),
        ("count", np.array([4, 0], np.int32), "count has 4: expected 0 to 3"),
    ],
)
def test_attention_of_wrong_shapes_is_refused(random, name, value, expected):
    arrays, options = attention_inputs(random, *ATTENTIONS["draft"])
    arrays["count"][:] = 3
    with pytest.raises(Exception, match=f"scarlet_attention: .*{expected}"):
        run_attention(arrays | {name: value}, **options)


def test_the_registry_finds_them():
    with implementations.use("cpu"):
        assert implementations.offered("delta_net")
        assert implementations.offered("attention")
    with implementations.use("portable"):
        assert not implementations.offered("delta_net")
