import jax
import numpy as np
import oracle
import pytest
from support import relative_l2

from scarlet_jax.ops import state_space


def inputs(rng, tokens, heads, groups, dim, state, batch=2):
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(3), (batch, tokens, heads))).astype(np.float32)
    a = -rng.uniform(0.5, 16, heads).astype(np.float32)
    b, c = normal(batch, tokens, groups, state), normal(batch, tokens, groups, state)
    memory = np.zeros((batch, heads, dim, state), np.float32)
    return normal(batch, tokens, heads, dim), dt, a, b, c, memory


@pytest.mark.parametrize("scan", [state_space.recurrent, state_space.chunked])
@pytest.mark.parametrize(("heads", "groups", "tokens"), [(6, 2, 150), (5, 1, 64), (3, 3, 1)])
def test_against_float64(scan, heads, groups, tokens):
    x, dt, a, b, c, state = inputs(np.random.default_rng(tokens), tokens, heads, groups, 8, 12)
    y, end = jax.jit(scan)(x, dt, a, b, c, state)
    for row in range(len(x)):
        one = [part[row].astype(np.float64) for part in (x, dt, b, c)]
        expected, memory = oracle.state_space(*one[:2], a.astype(np.float64), *one[2:])
        assert relative_l2(y[row], expected) < 1e-6  # sums of a few dozen products in f32
        assert relative_l2(end[row], memory) < 1e-6


def test_continued_and_padded():
    """From a state; and tokens without a time step, after the last real one, change nothing."""
    x, dt, a, b, c, state = inputs(np.random.default_rng(1), 150, 6, 2, 8, 12)
    whole, end = state_space.chunked(x, dt, a, b, c, state)
    first, middle = state_space.chunked(x[:, :70], dt[:, :70], a, b[:, :70], c[:, :70], state)
    rest, last = state_space.chunked(x[:, 70:], dt[:, 70:], a, b[:, 70:], c[:, 70:], middle)
    assert relative_l2(np.concatenate([first, rest], axis=1), whole) < 1e-6
    assert relative_l2(last, end) < 1e-6
    idle = np.where(np.arange(150)[:, None] < 70, dt, 0)
    assert relative_l2(state_space.chunked(x, idle, a, b, c, state)[1], middle) < 1e-6


def test_a_long_prompt_needs_no_matrix_of_all_tokens_by_all():
    """What 64 times as many tokens need grows as their inputs and outputs do."""

    def scratch(tokens):
        parts = inputs(np.random.default_rng(0), tokens, 4, 2, 8, 16, batch=1)
        shapes = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts]
        return jax.jit(state_space.chunked).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert scratch(16384) < 80 * scratch(256)
    assert scratch(16384) < 16384 * 16384 // 16
