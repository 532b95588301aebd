import math

import numpy as np
import pytest
import support_ggml
from support import relative_l2

from scarlet_jax.ops import rope


def apart(angle, exact):
    """Radians between angles, whole turns aside; `exact` in more digits than float64."""
    turns = np.asarray(angle, np.longdouble) / TURN - exact / TURN
    return np.abs(turns - np.rint(turns)) * TURN


TURN = 2 * np.arccos(np.longdouble(-1))
FAR = [0, 1, 7, 4095, 131071, 262143, 2**20 - 1, 2**24 + 5]


@pytest.mark.parametrize("kind", ["neox", "mrope", "imrope"])
@pytest.mark.parametrize(("dims", "base"), [(64, 1e7), (128, 1e4), (20, 5e5)])
def test_angles_at_far_positions(dims, base, kind):
    """To 1e-6 rad, long after the last position of the longest context, where an f32 product is off by 1e-2."""
    component = rope.components(kind, (3, 1, 2, 1), dims // 2)
    positions = np.array([np.roll(FAR, shift) for shift in range(4)], np.int32)
    angle = rope.angles(positions[:, None], rope.frequencies(dims, base), component)[0]
    exponents = np.arange(0, dims, 2, dtype=np.longdouble) / dims
    exact = positions[component].T * np.longdouble(base) ** -exponents
    assert apart(angle, exact).max() < 1e-6
    naive = positions[component].T.astype(np.float32) * rope.frequencies(dims, base).astype(np.float32)
    assert apart(naive, exact).max() > 1e-3


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


# Kind, sections, rotary dims, base, factor, whether YaRN, context of the training.
TURNS = [
    ("norm", (), 20, 1e4, 1.0, False, 0),
    ("norm", (), 16, 5e5, 2.5, False, 0),
    ("norm", (), 36, 1e4, 8.0, True, 64),
    ("neox", (), 12, 1e4, 1.0, False, 0),
    ("neox", (), 40, 1e6, 4.0, True, 512),
    ("mrope", (3, 4, 2, 1), 20, 1e4, 1.0, False, 0),
    ("mrope", (1, 2, 1, 0), 24, 1e5, 3.0, True, 100),
    ("imrope", (3, 3, 2, 0), 16, 1e4, 1.0, False, 0),
    ("imrope", (2, 4, 1, 3), 28, 1e7, 1.5, False, 0),
    ("imrope", (7, 7, 6, 0), 40, 1e4, 4.0, True, 128),
]


def turned(x, positions, kind, sections, rotary, base, factor, yarn, context, table=()):
    """(T, N, H) as our layers turn them."""
    frequency = rope.frequencies(rotary, base, table)
    stretched = (
        rope.yarn(frequency, factor, base=base, context_length=context) if yarn else frequency / factor
    )
    component = rope.components(kind, sections, rotary // 2)
    angle = rope.angles(positions[:, None], stretched, component)
    magnitude = rope.yarn_magnitude(factor) if yarn else 1.0
    return rope.rotate(x[None], angle, adjacent=kind == "norm", magnitude=magnitude)[0]


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(("kind", "sections", "rotary", "base", "factor", "yarn", "context"), TURNS)
def test_turns_as_ggml_does(kind, sections, rotary, base, factor, yarn, context, table):
    """Positions of four components as images have them; near, since ggml's angles are f32 products."""
    rng = np.random.default_rng(rotary)
    x = rng.standard_normal((9, 3, 42)).astype(np.float32)
    positions = rng.integers(0, 60, (4, 9)).astype(np.int32)
    table = rng.uniform(1, 4, rotary // 2).astype(np.float32) if table else None
    factors = () if table is None else tuple(table.tolist())
    theirs = support_ggml.rope(
        x, positions, kind, rotary, sections, base, factor=factor, yarn=yarn, context=context, table=table
    )
    case = (kind, sections, rotary, base)
    ours = turned(x, positions, *case, factor, yarn, context, factors)
    assert relative_l2(ours, theirs) < 1e-5  # 60 rad in f32, after up to 20 products


@pytest.mark.parametrize(
    ("place", "wrong"), [(0, "mrope"), (1, (7, 3, 6, 0)), (2, 38), (3, 2e4), (4, 4.1), (5, False), (6, 384)]
)
def test_each_part_of_a_turn_counts(place, wrong):
    """What the comparison with ggml would see: any one of them changed."""
    rng = np.random.default_rng(place)
    x = rng.standard_normal((9, 3, 42)).astype(np.float32)
    positions = rng.integers(0, 60, (4, 9)).astype(np.int32)
    right = list(TURNS[-1])
    changed = [*right[:place], wrong, *right[place + 1 :]]
    assert relative_l2(turned(x, positions, *changed), turned(x, positions, *right)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "rotary", "head", "base", "settings"),
    [
        ("linear", 64, 64, 1e4, {"factor": 2.5}),
        ("yarn", 64, 64, 1e4, {"factor": 4.0, "original_max_position_embeddings": 512}),
        ("yarn", 20, 60, 1e7, {"factor": 1.5, "original_max_position_embeddings": 4096}),
        ("yarn", 128, 128, 1e6, {"factor": 32.0, "original_max_position_embeddings": 32768}),
        (
            *("yarn", 48, 96, 5e5),
            {"factor": 8.0, "original_max_position_embeddings": 900, "beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)
def test_frequencies_are_those_of_transformers(kind, rotary, head, base, settings):
    transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    part = math.nextafter(rotary / head, 1.0)
    parameters = {"rope_type": kind, "rope_theta": base, "partial_rotary_factor": part, **settings}
    config = transformers.LlamaConfig(head_dim=head, max_position_embeddings=512, rope_parameters=parameters)
    theirs, magnitude = ROPE_INIT_FUNCTIONS[kind](config)

    ours, factor = rope.frequencies(rotary, base), settings["factor"]
    if kind == "linear":
        assert relative_l2(ours / factor, theirs) < 1e-6
        return
    limits = {name: settings[name] for name in ("beta_fast", "beta_slow") if name in settings}
    context = settings["original_max_position_embeddings"]
    stretched = rope.yarn(ours, factor, base=base, context_length=context, **limits)
    np.testing.assert_allclose(stretched, theirs.numpy(), rtol=1e-5)  # each of them: the slow ones are small
    assert rope.yarn_magnitude(factor) == pytest.approx(magnitude, rel=1e-12)
    longer = rope.yarn(ours, factor, base=base, context_length=4 * context, **limits)
    assert np.abs(longer / stretched - 1).max() > 0.01


@pytest.mark.parametrize(("kind", "sections"), [("mrope", (4, 6, 2, 0)), ("imrope", (4, 4, 4, 0))])
def test_image_positions_turn_as_in_transformers(kind, sections):
    """Qwen2-VL has the sections one after the other, Qwen3.5 interleaved; an image between two texts."""
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections[:3]}
    if kind == "mrope":
        config = transformers.Qwen2VLTextConfig(
            hidden_size=72, num_attention_heads=3, rope_parameters=parameters
        )
        rotary = qwen2_vl.Qwen2VLRotaryEmbedding(config)
    else:
        config = transformers.Qwen3_5TextConfig(
            head_dim=24, rope_parameters=parameters | {"partial_rotary_factor": 1.0}
        )
        rotary = qwen3_5.Qwen3_5TextRotaryEmbedding(config)
    text, image = np.arange(4), np.indices((1, 3, 5)).reshape(3, -1) + 4
    positions = np.concatenate([np.tile(text, (3, 1)), image, np.tile(text + 9, (3, 1))], axis=1)

    x = np.random.default_rng(0).standard_normal((1, positions.shape[1], 3, 24)).astype(np.float32)
    cos, sin = rotary(torch.zeros(1), torch.tensor(positions[:, None]))
    theirs, _ = qwen3_5.apply_rotary_pos_emb(*[torch.tensor(x)] * 2, cos, sin, unsqueeze_dim=2)
    case = (kind, sections, 24, 1e4, 1.0, False, 0)
    fourth = np.concatenate([positions, np.full_like(positions[:1], 77)]).astype(np.int32)  # nobody's
    ours = turned(x[0], fourth, *case)
    assert relative_l2(ours, theirs[0].numpy()) < 1e-6
    assert relative_l2(turned(x[0], fourth[[0, 2, 1, 3]], *case), ours) > 0.01
