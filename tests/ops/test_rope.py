import numpy as np
import pytest
from support import relative_l2

from scarlet_jax.ops import rope


def text_positions(*values):
    position = np.array([values], np.int32)
    return np.stack([position, position, position, 0 * position])


@pytest.mark.parametrize(("dims", "base"), [(64, 1e7), (128, 1e4), (20, 5e5)])
def test_angles_at_far_positions(dims, base):
    """To 1e-6 rad at the last position of the longest context, where an f32 product is off by 1e-2."""
    positions = [0, 1, 7, 4095, 131071, 262143, 2**20 - 1]
    frequency = rope.frequencies(dims, base)
    component = rope.components("neox", (), dims // 2)
    angle = np.asarray(rope.angles(text_positions(*positions), frequency, component), np.float64)[0]
    exact = np.array(positions)[:, None] * frequency
    apart = np.angle(np.exp(1j * (angle - exact)))  # whole turns apart is no difference
    assert np.abs(apart[:-1]).max() < 1e-6
    assert np.abs(apart).max() < 2e-6  # 2^20: the 44 bits of frequency begin to show
    naive = np.float32(262143) * frequency.astype(np.float32)
    assert np.abs(np.angle(np.exp(1j * (naive - exact[5])))).max() > 1e-4


def test_components_of_the_published_sections():
    """Spec section 4: t, h, w interleaved, ending j=30 t and 31 h."""
    component = rope.components("imrope", (11, 11, 10, 0), 32)
    assert "".join("thwe"[c] for c in component) == "thw" * 10 + "th"


@pytest.mark.parametrize(
    ("kind", "sections", "pairs", "expected"),
    [
        ("mrope", (2, 3, 1, 2), 8, "tthhhwee"),
        ("mrope", (2, 1, 1, 0), 6, "tthwtt"),  # past their sum the sections start over
        ("imrope", (3, 3, 2, 0), 8, "thwthwth"),
        ("imrope", (4, 2, 2, 0), 8, "thwthwte"),  # h has two pairs only: the third is left to e
        ("neox", (), 4, "tttt"),
        ("norm", (), 3, "ttt"),
    ],
)
def test_components(kind, sections, pairs, expected):
    assert "".join("thwe"[c] for c in rope.components(kind, sections, pairs)) == expected


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("rotary", [6, 16, 20])
def test_rotation_is_a_complex_product(adjacent, rotary):
    rng = np.random.default_rng(rotary)
    batch, tokens, heads, dim = 2, 5, 3, 20
    x = rng.standard_normal((batch, tokens, heads, dim)).astype(np.float32)
    angle = rng.uniform(-3, 3, (batch, tokens, rotary // 2)).astype(np.float32)
    real, imaginary = (
        (slice(0, rotary, 2), slice(1, rotary, 2))
        if adjacent
        else (
            slice(0, rotary // 2),
            slice(rotary // 2, rotary),
        )
    )
    exact = x.astype(np.float64)
    turned = (exact[..., real] + 1j * exact[..., imaginary]) * np.exp(1j * angle.astype(np.float64))[
        :, :, None
    ]
    exact[..., real], exact[..., imaginary] = turned.real, turned.imag
    # sine, cosine, two products and a sum in f32
    assert relative_l2(rope.rotate(x, angle, adjacent=adjacent), exact) < 3e-7


def test_position_components_turn_their_own_pairs():
    positions = np.array([5, 11, 23, 47], np.int32).reshape(4, 1, 1)
    frequency = rope.frequencies(16, 1e4)
    component = rope.components("imrope", (3, 2, 2, 0), 8)
    angle = np.asarray(rope.angles(positions, frequency, component), np.float64)[0, 0]
    exact = positions[component, 0, 0] * frequency
    assert np.abs(np.angle(np.exp(1j * (angle - exact)))).max() < 1e-6
