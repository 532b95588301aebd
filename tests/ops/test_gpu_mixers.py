"""The Pallas kernels of the mixers: interpreted against float64, and lowered for CUDA and TPU without either."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support import relative_l2

from scarlet_jax.ops import gpu, implementations
from scarlet_jax.ops.gpu import mixers

# A dozen f32 sums of up to some hundred terms, fed into one another, as in test_gated_delta and test_cpu_mixers.
TOLERANCE = 2e-6

# What is interpreted is not worth optimising: compiling is most of its time.
QUICKLY = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}


def interpreted(function, *arguments):
    with gpu.mode("interpreted"):
        return jax.jit(function, compiler_options=QUICKLY)(*arguments)


def delta_inputs(tokens, *, batch=2, heads=3, key_dim=24, value_dim=40, decay=1.0):
    """All axes distinct. Keys of unit length, as the layer makes them."""
    rng = np.random.default_rng(tokens)
    q, k = rng.standard_normal((2, batch, tokens, heads, key_dim))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((batch, tokens, heads, value_dim))
    g = -decay * rng.exponential(size=(batch, tokens, heads))
    beta = rng.uniform(size=(batch, tokens, heads))
    state = rng.standard_normal((batch, heads, value_dim, key_dim))
    return tuple(x.astype(np.float32) for x in (q, k, v, g, beta, state))


def delta_by_definition(q, k, v, g, beta, state):
    """Spec section 4 step 7, literally, in float64."""
    q, k, v, g, beta, state = (x.astype(np.float64) for x in (q, k, v, g, beta, state))
    o = np.empty(v.shape)
    for b, t, h in np.ndindex(g.shape):
        S = np.exp(g[b, t, h]) * state[b, h]  # (Dv, Dk)
        S = S + beta[b, t, h] * np.outer(v[b, t, h] - S @ k[b, t, h], k[b, t, h])
        o[b, t, h], state[b, h] = S @ q[b, t, h], S
    return o, state


# One token, a few by steps, a chunk and its neighbours, and more; slow, usual and instant forgetting.
@pytest.mark.parametrize(
    ("tokens", "decay"), [(1, 1.0), (8, 30.0), (9, 1.0), (64, 0.01), (65, 30.0), (150, 0.01)]
)
def test_delta_rule(tokens, decay):
    arguments = delta_inputs(tokens, decay=decay)
    got = interpreted(gpu.delta_rule, *arguments)
    for ours, truth in zip(got, delta_by_definition(*arguments), strict=True):
        assert relative_l2(ours, truth) < TOLERANCE


def test_delta_rule_of_keys_that_repeat():
    """Hundreds of tokens that all write to one place: the chunk's system is as far from diagonal as it gets."""
    q, k, v, g, beta, state = delta_inputs(70, key_dim=16, value_dim=16)
    k[:] = k[:, :1]
    beta[:] = 1
    arguments = (q, k, v, 0.01 * g, beta, state)
    got = interpreted(gpu.delta_rule, *arguments)
    for ours, truth in zip(got, delta_by_definition(*arguments), strict=True):
        assert relative_l2(ours, truth) < TOLERANCE


def test_delta_rule_closed_tokens_leave_no_trace():
    q, k, v, g, beta, state = delta_inputs(70, key_dim=16, value_dim=16)
    g[:, 66:], beta[:, 66:], v[:, 66:] = 0, 0, 1e6
    _, padded = interpreted(gpu.delta_rule, q, k, v, g, beta, state)
    _, expected = delta_by_definition(*(x[:, :66] for x in (q, k, v, g, beta)), state)
    assert relative_l2(padded, expected) < TOLERANCE


ATTENTIONS = {  # B, T, N, K, H, S, dtype: parts of the cache seen by nobody, several tokens, many heads
    "decode": (1, 1, 4, 2, 64, 1024, "float32"),
    "draft": (3, 5, 6, 3, 16, 192, "float32"),
    "wide": (2, 1, 24, 1, 32, 64, "float32"),
    "half": (2, 2, 6, 2, 16, 128, "bfloat16"),
    "prompt": (2, 11, 6, 2, 16, 128, "float32"),
    "odd": (2, 3, 6, 2, 20, 128, "float32"),
}


def attention_inputs(B, T, N, K, H, S, dtype):
    rng = np.random.default_rng(S)
    q = 3 * rng.standard_normal((B, T, N, H)).astype(np.float32)
    k, v = rng.standard_normal((2, B, S, K, H)).astype(jnp.dtype(dtype))
    start = rng.integers(0, S - T + 1, B)
    start[0] = S // 3
    return q, k, v, (start[:, None] + np.arange(T)).astype(np.int32)


def attention_by_definition(q, k, v, position, scale):
    out = np.empty(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen, group = slice(0, position[b, t] + 1), n // (q.shape[2] // k.shape[2])
        products = k[b, seen, group].astype(float) @ q[b, t, n].astype(float) * scale
        weights = np.exp(products - products.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, group].astype(float)
    return out


@pytest.mark.parametrize("sizes", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(sizes):
    q, k, v, position = attention_inputs(*sizes)
    attend = functools.partial(gpu.attend, scale=0.3)
    expected = attention_by_definition(q, k, v, position, 0.3)
    for b, last in enumerate(position[:, -1]):  # what nobody may look at
        k[b, last + 1 :], v[b, last + 1 :] = 1e9, -1e9
    assert relative_l2(interpreted(attend, q, k, v, position), expected) < TOLERANCE


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("operation", "arguments", "kernels"),
    [
        ("delta_rule", delta_inputs(1, key_dim=128, value_dim=128), 1),
        ("delta_rule", delta_inputs(100, key_dim=128, value_dim=128), 2),
        ("attend", attention_inputs(1, 1, 8, 2, 256, 512, "bfloat16"), 1),
        ("attend", attention_inputs(2, 4, 6, 3, 64, 512, "float32"), 1),
        ("attend", attention_inputs(1, 40, 6, 3, 64, 512, "float32"), 0),
    ],
)
def test_lowers(operation, arguments, kernels, platform):
    allowed = [export.DisabledSafetyCheck.custom_call(gpu.CUSTOM_CALL)]
    function = getattr(gpu, operation)
    if operation == "attend":
        function = functools.partial(function, scale=0.1)
    with gpu.mode("elsewhere"):
        text = export.export(jax.jit(function), platforms=[platform], disabled_checks=allowed)(
            *arguments
        ).mlir_module()
    assert text.count(gpu.CUSTOM_CALL) == (kernels if platform == "cuda" else 0)


@pytest.mark.slow
def test_the_trial_on_a_device_passes_and_notices(monkeypatch):
    """What decides on a GPU whether the kernels are used, interpreted: all of it right, then one kernel wrong."""
    trial = gpu.trial.__wrapped__
    with gpu.mode("interpreted"):
        assert jax.jit(lambda x: x if trial() is None else -x)(1) == 1  # asked while a program is traced
        right = mixers.attend
        monkeypatch.setattr(mixers, "attend", lambda *x, scale: right(*x, scale=1.1 * scale))
        assert trial() == "the kernels give wrong results on this device"


def test_the_registry_finds_them():
    with gpu.mode("elsewhere"), implementations.use("gpu"):
        assert implementations.offered("delta_rule")
        assert implementations.offered("attend")
        assert not implementations.offered("attention")  # nor is a module that happens to have the name
    with implementations.use("portable"):
        assert not implementations.offered("attend")
