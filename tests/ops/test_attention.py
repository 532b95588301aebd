import numpy as np
from support import relative_l2

from scarlet_jax.ops import attention


def test_against_float64_with_unfilled_slots():
    rng = np.random.default_rng(0)
    batch, tokens, heads, groups, dim, slots = 2, 5, 6, 3, 8, 16
    start = np.array([7, 2])
    q = rng.standard_normal((batch, tokens, heads, dim)).astype(np.float32)
    k = rng.standard_normal((batch, slots, groups, dim)).astype(np.float32)
    v = rng.standard_normal((batch, slots, groups, dim)).astype(np.float32)
    position = (start[:, None] + np.arange(tokens)).astype(np.int32)

    expected = np.zeros((batch, tokens, heads, dim))
    for b in range(batch):
        for t in range(tokens):
            for n in range(heads):
                seen = slice(0, start[b] + t + 1)
                products = k[b, seen, n // 2].astype(float) @ q[b, t, n].astype(float)
                weights = np.exp(products * 0.25)
                expected[b, t, n] = weights / weights.sum() @ v[b, seen, n // 2].astype(float)

    probabilities = attention.softmax(attention.scores(q, k), position, 0.25)
    assert relative_l2(attention.mix(probabilities, v), expected) < 1e-6  # three short f32 sums
    # What lies in later slots is invisible, bit for bit.
    k[0, 12:], v[0, 12:], k[1, 7:], v[1, 7:] = 1e9, 1e9, -1e9, -1e9
    changed = attention.softmax(attention.scores(q, k), position, 0.25)
    np.testing.assert_array_equal(attention.mix(changed, v), attention.mix(probabilities, v))
