"""Positions of texts with images: as transformers makes them, and where text goes on after them."""

import ctypes
import dataclasses
import functools
import types

import numpy as np
import oracle
import pytest
from models import SHAPES, model, path, tokens
from support import relative_l2
from test_model import TOLERANCE, every_implementation, every_shape
from test_mtp import before

from scarlet_jax import BadInput
from scarlet_jax.generate import StateCache, generate
from scarlet_jax.positions import with_images

TEXT, IMAGE, VIDEO = 7, 326, 327
PADS = {"pads": (IMAGE, VIDEO)}


@dataclasses.dataclass
class Layout:
    """A text with images and videos: ids, and (time, height, width) of each of them in order."""

    ids: list[int]
    grids: list[tuple[int, int, int]]

    @classmethod
    def of(cls, *parts: int | tuple[int, int, int], merge: int = 2) -> "Layout":
        """So many tokens of text, or an image of that grid; of several frames, a video, its frames apart."""
        ids, grids = [], []
        for part in parts:
            if isinstance(part, int):
                ids += [TEXT] * part
                continue
            time, height, width = part
            size = height * width // merge**2
            frame = [VIDEO] * size + [TEXT] * 2
            ids += frame * time if time > 1 else [IMAGE] * size
            grids.append(part)
        return cls(ids, grids)


def drawn(seed: int, merge: int) -> Layout:
    """A random text; first and last may be anything, and two images never touch (transformers takes them for one)."""
    rng = np.random.default_rng(seed)
    parts = []
    for turn in range(rng.integers(1, 8)):
        if (turn + seed) % 2:
            parts.append(int(rng.integers(1, 9)))
        else:
            height, width = (int(n) * merge for n in rng.integers(1, 8, 2))
            parts.append((int(rng.integers(1, 4)), height, width))
    return Layout.of(*parts, merge=merge)


def theirs(layout: Layout, merge: int) -> tuple[np.ndarray, int]:
    """transformers' positions (3, T), and where it has the text go on."""
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5").Qwen3_5Model
    me = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=merge)),
        get_vision_position_ids=functools.partial(qwen.get_vision_position_ids, None),
    )
    positions, delta = qwen.get_rope_index(me, **inputs(torch, layout))
    return positions[:, 0].numpy(), len(layout.ids) + int(delta)


def inputs(torch, layout: Layout) -> dict:
    """What transformers is given."""
    kinds = [{IMAGE: 1, VIDEO: 2}.get(id, 0) for id in layout.ids]
    images, videos = (
        [grid for grid in layout.grids if (grid[0] > 1) == several] for several in (False, True)
    )
    return {
        "input_ids": torch.tensor([layout.ids]),
        "mm_token_type_ids": torch.tensor([kinds]),
        "image_grid_thw": torch.tensor(images) if images else None,
        "video_grid_thw": torch.tensor(videos) if videos else None,
    }


NAMED = {
    "text": Layout.of(9),
    "image-first": Layout.of((1, 4, 10), 5),
    "image-last": Layout.of(5, (1, 10, 4)),
    "image-alone": Layout.of((1, 2, 2)),
    "two": Layout.of(3, (1, 6, 6), 1, (1, 2, 8), 4),
    "video": Layout.of(2, (3, 4, 6), 5, (1, 4, 4)),
}


@pytest.mark.parametrize("name", NAMED)
def test_positions_are_transformers(name):
    layout = NAMED[name]
    np.testing.assert_array_equal(with_images(layout.ids, layout.grids, **PADS), theirs(layout, 2)[0])


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_positions_of_any_layout_are_transformers(merge):
    for seed in range(40):
        layout = drawn(seed, merge)
        ours = with_images(layout.ids, layout.grids, **PADS, spatial_merge_size=merge)
        np.testing.assert_array_equal(ours, theirs(layout, merge)[0])


def test_images_may_touch():
    """Where one ends is told by its grid."""
    ours = with_images([IMAGE] * 8 + [TEXT], [(1, 2, 4), (1, 2, 6), (1, 6, 2)], **PADS)
    assert ours.tolist() == [
        [0, 0, 2, 2, 2, 5, 5, 5, 8],
        [0, 0, 2, 2, 2, 5, 6, 7, 8],
        [0, 1, 2, 3, 4, 5, 5, 5, 8],
    ]


@pytest.mark.parametrize(
    ("ids", "grids", "line"),
    [
        ([IMAGE] * 4, [], "tokens: an image begins at 0, and there is no grid left for it"),
        ([TEXT] + [IMAGE] * 5, [(1, 4, 4)], "tokens: an image begins at 5, and there is no grid left"),
        (
            [IMAGE] * 3 + [TEXT],
            [(1, 4, 4)],
            "tokens: 3 for an image in a row at 0; expected 2 x 2, as in its",
        ),
        ([TEXT], [(2, 4, 4)], "grids: 2 more frames than the tokens have room for"),
        (
            [IMAGE] * 4,
            [(1, 4, 5)],
            r"grids: \(1, 4, 5\); expected multiples of 2 rows and columns, 2 or more",
        ),
        ([IMAGE] * 4, [(0, 4, 4)], r"grids: \(0, 4, 4\); expected"),
    ],
)
def test_grids_that_do_not_fit(ids, grids, line):
    with pytest.raises(BadInput, match=line):
        with_images(ids, grids, **PADS)


# --- the model ----------------------------------------------------------------------------------------------

# Images wider and higher than they are long in tokens; the first text after one begins before its place.
PROMPT = Layout.of(5, (1, 8, 12), 3, (1, 10, 4), 2)
STEPS = 6


@functools.cache
def story(shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids (T,) of the prompt and of what follows it; positions (3, T) of all; float64 logits after each."""
    prompt = np.array(PROMPT.ids)
    text = tokens(shape, len(prompt) + STEPS)
    ids = np.where(np.append(prompt, [TEXT] * STEPS) == IMAGE, IMAGE, text)
    positions = with_images(ids, PROMPT.grids, pads=[IMAGE])
    fourth = np.concatenate([positions, 0 * positions[:1]])
    return ids, positions, oracle.forward(path(shape), ids, positions=fourth)[0]


@every_implementation
@every_shape
def test_text_goes_on_after_an_image(shape, implementation):
    """Nobody says positions after the prompt; token by token, and in a batch beside text alone."""
    ids, positions, truth = story(shape)
    ours, n = model(shape, implementation=implementation), len(PROMPT.ids)
    logits, state = ours.last_logits(ids[:n], positions=positions[:, :n])
    assert relative_l2(logits, truth[n - 1]) < TOLERANCE
    assert (int(state.length[0]), int(state.position[0])) == (n, positions[0, n])
    assert positions[0, n] != n
    assert relative_l2(ours.forward(ids[n:], state)[0], truth[n:]) < TOLERANCE
    for i in range(n, n + STEPS):
        logits, state = ours.last_logits(ids[i : i + 1], state)
        assert relative_l2(logits, truth[i]) < TOLERANCE

    text = np.tile(np.arange(n), (3, 1))
    both = np.stack([positions[:, :n], text], axis=1)
    _, state = ours.forward([ids[:n], ids[: n - 4]], positions=both)
    together, _ = ours.forward([ids[n:], ids[n - 4 :]], state)
    assert relative_l2(together[0, :STEPS], truth[n:]) < TOLERANCE
    alone = oracle.forward(path(shape), ids)[0]
    assert relative_l2(together[1], alone[n - 4 :]) < TOLERANCE


@pytest.mark.parametrize("fault", ["slot", "last"])
def test_another_place_to_go_on_from_is_seen(fault):
    """After the token's place in the sequence; after the last token's time."""
    shape = SHAPES["untied"]
    ids, positions, truth = story(shape)
    n = len(PROMPT.ids) - 2  # up to the last image
    _, state = model(shape).forward(ids[:n], positions=positions[:, :n])
    wrong = {"slot": state.length, "last": positions[0, n - 1 : n] + 1}[fault]
    wrong = dataclasses.replace(state, position=np.asarray(wrong, np.int32))
    assert relative_l2(model(shape).forward(ids[n:], state)[0], truth[n:]) < TOLERANCE
    assert relative_l2(model(shape).forward(ids[n:], wrong)[0], truth[n:]) > 100 * TOLERANCE


def test_a_prompt_may_end_within_an_image():
    """The rest of it says its positions; the text after does not."""
    shape = SHAPES["tied"]
    ids, positions, truth = story(shape)
    ours, n = model(shape), len(PROMPT.ids)
    state = None
    for part in (slice(0, 11), slice(11, 12), slice(12, 40), slice(40, n)):
        _, state = ours.forward(ids[part], state, positions=positions[:, part])
    assert relative_l2(ours.forward(ids[n:], state)[0], truth[n:]) < TOLERANCE


@every_shape
def test_prompt_and_steps_against_transformers(shape):
    """Its own model for images without their encoder: it makes the positions, and goes on from them."""
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    from scarlet_jax.tools.engines import transformers_model

    ids, _, truth = story(shape)
    n = len(PROMPT.ids)
    net = _with_images(transformers_model.load(path(shape)).model)
    given = inputs(torch, dataclasses.replace(PROMPT, ids=ids[:n].tolist()))
    with torch.no_grad():
        out = net(**given, use_cache=True)
        logits = [out.logits[0]]
        for id in ids[n:]:
            out = net(input_ids=torch.tensor([[id]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
    theirs = torch.cat(logits).numpy()
    assert np.abs(theirs - truth).max() < 1e-3  # in f32; another place to go on from is 1e-1 and more


def _with_images(net):
    """The text model within the one that also takes images."""
    import transformers

    config = transformers.Qwen3_5Config(
        text_config=net.config.to_dict(), vision_config={"depth": 0, "hidden_size": 16, "num_heads": 1}
    )
    config.image_token_id, config.video_token_id = IMAGE, VIDEO
    whole = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    whole.model.language_model, whole.lm_head = net.model, net.lm_head
    return whole


@every_shape
def test_prompt_and_steps_against_llama_cpp(shape):
    """As its library for images feeds them: embeddings and four rows of positions; then tokens, each at one."""
    from scarlet_jax.tools.engines import ggml, llama_cpp

    ids, positions, truth = story(shape)
    n = len(PROMPT.ids)
    embeddings = np.ascontiguousarray(
        oracle.load(path(shape)).weights["token_embd.weight"][ids[:n]], np.float32
    )
    rows = (ctypes.c_int32 * (4 * n))(*positions[:, :n].ravel(), *[0] * n)
    with llama_cpp.Engine(path(shape), n_ctx=128) as engine:
        batch, _alive = llama_cpp._batch(ids[:n], range(n), [0] * n, [True] * n)
        batch.token = type(batch.token)()
        batch.embd, batch.pos = embeddings.ctypes.data, ctypes.cast(rows, type(batch.pos))
        assert isinstance(batch, ggml.Batch)
        assert engine.lib.llama_decode(engine._context, batch) == 0
        logits = [
            np.ctypeslib.as_array(engine.lib.llama_get_logits(engine._context), (n, shape.vocab_size)).copy()
        ]
        engine._lengths = [int(positions[0, n])]
        logits += [engine.decode([id]) for id in ids[n:].tolist()]
    assert relative_l2(np.concatenate(logits), truth) < TOLERANCE


@pytest.mark.parametrize("block", [1, 4])
def test_generation_after_images(block):
    """Every token is the likeliest that float64 gives for all before it."""
    shape = SHAPES["untied"]
    ids, positions, _ = story(shape)
    n = len(PROMPT.ids)
    options = {"max_tokens": STEPS, "stop": (), "block": block, "steady": 9}
    made = list(generate(model(shape), ids[:n], positions=positions[:, :n], **options))
    fourth = np.concatenate([positions, 0 * positions[:1]])
    truth, _ = oracle.forward(path(shape), [*ids[:n], *made], positions=fourth)
    assert made == truth[n - 1 : -1].argmax(axis=-1).tolist()
    assert made != list(generate(model(shape), ids[:n], **options))
    with pytest.raises(BadInput, match="positions: a cache knows a prompt by its tokens"):
        generate(model(shape), ids[:n], positions=positions[:, :n], cache=StateCache())


def test_a_prediction_block_after_images():
    shape = SHAPES["untied"]
    ids, positions, _ = story(shape)
    n = len(PROMPT.ids)
    hidden = before(shape, ids)
    fourth = np.concatenate([positions, 0 * positions[:1]])
    truth, _ = oracle.predict(path(shape), ids, hidden, positions=fourth)
    _, _, state = model(shape).forward_mtp(ids[:n], hidden[:n], positions=positions[:, :n])
    assert relative_l2(model(shape).forward_mtp(ids[n:], hidden[n:], state)[0], truth[n:]) < TOLERANCE
    text, _ = oracle.predict(path(shape), ids, hidden)
    assert relative_l2(text[n:], truth[n:]) > 100 * TOLERANCE
