import jax
import numpy as np
import pytest
from support import relative_l2

from scarlet_jax.ops import gated_delta

# The chunk's triangular system and its products are a dozen f32 sums of up to 64 terms, fed into one another.
TOLERANCE = 2e-6


def inputs(tokens, *, decay=1.0, seed=0):
    """All axes distinct: B 2, Hv 3, Dk 8, Dv 5. Keys of unit length, as the layer makes them."""
    rng = np.random.default_rng(seed)
    batch, heads, key_dim, value_dim = 2, 3, 8, 5
    q, k = rng.standard_normal((2, batch, tokens, heads, key_dim))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((batch, tokens, heads, value_dim))
    g = -decay * rng.exponential(size=(batch, tokens, heads))
    beta = rng.uniform(size=(batch, tokens, heads))
    state = rng.standard_normal((batch, heads, value_dim, key_dim))
    return tuple(x.astype(np.float32) for x in (q, k, v, g, beta, state))


def definition(q, k, v, g, beta, state):
    """Spec section 4 step 7, literally, in float64."""
    q, k, v, g, beta, state = (x.astype(np.float64) for x in (q, k, v, g, beta, state))
    o = np.empty(v.shape)
    for b, t, h in np.ndindex(g.shape):
        S = np.exp(g[b, t, h]) * state[b, h].T  # (Dk, Dv)
        delta = beta[b, t, h] * (v[b, t, h] - S.T @ k[b, t, h])
        S = S + np.outer(k[b, t, h], delta)
        o[b, t, h], state[b, h] = S.T @ q[b, t, h], S.T
    return o, state


@pytest.mark.parametrize("rule", [gated_delta.recurrent, gated_delta.chunked])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("decay", [0.01, 1.0, 30.0])
def test_against_the_definition(rule, tokens, decay):
    arguments = inputs(tokens, decay=decay)
    o, state = jax.jit(rule)(*arguments)
    expected_o, expected_state = definition(*arguments)
    assert relative_l2(o, expected_o) < TOLERANCE
    assert relative_l2(state, expected_state) < TOLERANCE


@pytest.mark.parametrize("rule", [gated_delta.recurrent, gated_delta.chunked])
def test_a_closed_token_leaves_no_trace(rule):
    q, k, v, g, beta, state = inputs(70)
    g[:, 66:], beta[:, 66:] = 0, 0
    v[:, 66:] = 1e6
    _, with_padding = rule(q, k, v, g, beta, state)
    _, without = rule(*(x[:, :66] for x in (q, k, v, g, beta)), state)
    np.testing.assert_allclose(with_padding, without, rtol=2e-6, atol=1e-7)


def test_no_gate_overflows():
    """Heads that forget at once: exp above the diagonal of a chunk would be infinite, and 0 * inf is NaN."""
    o, state = gated_delta.chunked(*inputs(64, decay=1000.0))
    assert np.isfinite(o).all()
    assert np.isfinite(state).all()
