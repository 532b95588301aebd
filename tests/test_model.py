"""The model against a float64 forward written from the spec, against llama.cpp, and against transformers."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import oracle
import pytest
from models import SCALED_ROPE, SHAPES, changed, model, path, tokens
from support import relative_l2

import scarlet_jax
from scarlet_jax import BadInput, forward
from scarlet_jax.batch import PIECE
from scarlet_jax.ops.implementations import IMPLEMENTATIONS
from scarlet_jax.span import Span

# f32 arithmetic over a few layers: llama.cpp itself is 2e-6 from the float64 truth on these models, and an
# error that a fault makes is orders of magnitude larger.
TOLERANCE = 1e-5
LENGTHS = [1, 2, 63, 64, 65, 200]

# Layers by one kernel each where there are kernels for this machine, and layers step by step.
every_implementation = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
        for name, module in IMPLEMENTATIONS.items()
        for reason in [module.unavailable()]
    ],
)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def assert_taps_agree(ours, truth, tolerance=TOLERANCE):
    truth = ours_named(truth)
    assert not set(truth) - set(ours)
    errors = {name: relative_l2(visible(ours[name], truth[name]), truth[name]) for name in truth}
    assert not {name: error for name, error in errors.items() if not error < tolerance}


def ours_named(theirs):
    """llama.cpp's taps, less fused products (their parts are tapped too) and products before a weight's scale.

    The parts of qwen3next's `ssm_in` are tapped when they are in order: as `z`, and the others as `qkv_mixed`.
    """
    theirs = {re.sub("^qkv_mixed-", "linear_attn_qkv_mixed-", name): x for name, x in theirs.items()}
    fused = re.compile(r"wqkv-|ffn_moe_gate_up-|linear_attn_mixed_|(q|k|v|query_flat|key_flat|value_flat)-")
    after_scale = re.compile(r"_s(caled)?-")
    scaled = {after_scale.sub("-", name): x for name, x in theirs.items() if after_scale.search(name)}
    bare = {name: x for name, x in theirs.items() if not after_scale.search(name) and not fused.match(name)}
    return bare | scaled


def visible(ours, truth):
    """Attention scores over the slots that the other engine shows: caches differ in how many are empty.

    And with the axes of the other: ggml cannot tell axes of one from none, and splits heads here, joins them
    there.
    """
    if ours.size == truth.size:
        return ours.reshape(truth.shape)
    return ours[..., : truth.shape[-1]] if ours.ndim == truth.ndim else ours


@every_shape
@pytest.mark.parametrize("count", LENGTHS)
def test_every_tap_of_a_prompt_against_float64(shape, count):
    ids = tokens(shape, count)
    logits, truth = oracle.forward(path(shape), ids)
    ours, _, taps = model(shape).forward_with_taps(ids)
    assert_taps_agree(taps, truth)
    assert relative_l2(ours, logits) < TOLERANCE


@every_implementation
@every_shape
@pytest.mark.parametrize("count", LENGTHS)
def test_logits_of_a_prompt_against_float64(shape, count, implementation):
    """Padded, as a batch of one, and without taps: whole layers at once where the implementation can."""
    ids = tokens(shape, count)
    logits, _ = model(shape, implementation=implementation).forward(ids)
    assert relative_l2(logits, oracle.forward(path(shape), ids)[0]) < TOLERANCE


@every_implementation
@every_shape
@pytest.mark.parametrize("before", [1, 64, 70])
def test_logits_of_decoding_against_float64(shape, before, implementation):
    """Token by token, then three at once; each state consumed."""
    ids = tokens(shape, before + 5)
    ours = model(shape, implementation=implementation)
    _, state = ours.forward(ids[:before])
    for start, stop in [(before, before + 1), (before + 1, before + 2), (before + 2, before + 5)]:
        logits, state = ours.last_logits(ids[start:stop], state, consume=True)
        assert relative_l2(logits, oracle.forward(path(shape), ids[:stop])[0][-1]) < TOLERANCE


@every_implementation
@every_shape
@pytest.mark.parametrize("before", [1, 64, 70])
def test_every_tap_of_decoding_against_float64(shape, before, implementation):
    """Token by token, then three at once."""
    ids = tokens(shape, before + 5)
    ours = model(shape, implementation=implementation)
    _, state = ours.forward(ids[:before])
    for start, stop in [(before, before + 1), (before + 1, before + 2), (before + 2, before + 5)]:
        logits, state, taps = ours.forward_with_taps(ids[start:stop], state)
        expected, truth = oracle.forward(path(shape), ids[:stop], start=start)
        assert_taps_agree(taps, truth)
        assert relative_l2(logits, expected) < TOLERANCE


@every_implementation
@every_shape
def test_long_prompt_in_pieces(shape, implementation):
    """Longer than what is computed at once, and than the first cache."""
    ids = tokens(shape, 2 * PIECE + 3)
    expected, truth = oracle.forward(path(shape), ids)
    ours = model(shape, implementation=implementation)
    logits, state = ours.forward(ids)
    assert relative_l2(logits, expected) < TOLERANCE
    assert_state_is(state, truth)

    state = None
    for part in np.split(ids, [1, 70, 300, 301, 900]):
        logits, state = ours.forward(part, state)
    assert relative_l2(logits, expected[900:]) < TOLERANCE
    assert_state_is(state, truth)


def assert_state_is(state, truth):
    """Every recurrent state against the truth's, and every key against the truth's keys."""
    for i, block in enumerate(state.blocks):
        if f"new_state-{i}" in truth:
            assert relative_l2(block.memory[0], truth[f"new_state-{i}"]) < TOLERANCE
            assert relative_l2(block.conv[0], truth[f"conv_state_last-{i}"]) < TOLERANCE
        else:
            count = len(truth[f"Kcur-{i}"])
            assert relative_l2(block.k[0, :count], truth[f"Kcur-{i}"]) < TOLERANCE
            assert not np.asarray(block.k[0, count:]).any()


@every_implementation
@every_shape
def test_padding_leaves_no_trace(shape, implementation):
    """Whatever the padding holds, the state is the same to the last bit."""
    m, ids = model(shape), tokens(shape, 64).astype(np.int32)[None]
    count = np.array([41], np.int32)

    def state_after(padding):
        padded = np.where(np.arange(64) < 41, ids, padding)
        state = m.init_state(1, 64)
        return forward.trunk(m.weights, padded, count, state, m.config, implementation=implementation).state

    jax.tree.map(np.testing.assert_array_equal, state_after(0), state_after(77))


@every_implementation
@every_shape
def test_batch_of_different_lengths_is_each_alone(shape, implementation):
    ours = model(shape, implementation=implementation)
    rows = [tokens(shape, n, seed=n) for n in (5, 70, 1)]
    more = [tokens(shape, n, seed=n) for n in (3, 1, 9)]
    together, state = ours.forward(rows)
    after, _ = ours.forward(more, state)
    last, _ = ours.last_logits(more, state)
    for i, (row, rest) in enumerate(zip(rows, more, strict=True)):
        expected, _ = oracle.forward(path(shape), [*row, *rest])
        assert relative_l2(together[i, : len(row)], expected[: len(row)]) < TOLERANCE
        assert relative_l2(after[i, : len(rest)], expected[len(row) :]) < TOLERANCE
        assert relative_l2(last[i], expected[-1]) < TOLERANCE


def test_last_logits_of_sequences_that_end_in_different_pieces():
    shape = SHAPES["tied"]
    rows = [tokens(shape, n, seed=n) for n in (PIECE + 40, 7)]
    last, _ = model(shape).last_logits(rows)
    for i, row in enumerate(rows):
        assert relative_l2(last[i], oracle.forward(path(shape), row)[0][-1]) < TOLERANCE


@every_shape
def test_a_later_token_changes_nothing_before_it(shape):
    ids = tokens(shape, 40)
    logits, _ = model(shape).forward(ids)
    changed, _ = model(shape).forward([*ids[:-1], (ids[-1] + 1) % shape.vocab_size])
    np.testing.assert_array_equal(logits[:-1], changed[:-1])
    assert not np.array_equal(logits[-1], changed[-1])


@every_implementation
def test_lengths_of_a_bucket_compile_once(implementation):
    def programs():
        jitted: list[Any] = [forward.run_block, forward.run_block_in_place]
        jitted += [forward._trunk_program, forward.trunk_program_in_place]
        return sum(program._cache_size() for program in jitted)

    shape = SHAPES["tied"]
    m = scarlet_jax.load(path(shape), implementation=implementation, kv_dtype="float16")  # new to every cache
    none = programs()
    m.forward(tokens(shape, 64))
    compiled = programs()
    assert compiled > none
    for count in range(33, 64, 7):
        m.forward(tokens(shape, count))
    assert programs() == compiled


@every_implementation
def test_a_state_is_a_snapshot_until_it_is_consumed(implementation):
    shape = SHAPES["untied"]
    m = model(shape, implementation=implementation)
    ids = tokens(shape, 12)
    _, state = m.forward(ids[:9])
    once, _ = m.last_logits(ids[9:], state)
    again, _ = m.last_logits(ids[9:], state, consume=True)
    np.testing.assert_array_equal(once, again)
    assert state.blocks[0].memory.is_deleted()


def test_gradients_are_those_of_the_steps():
    """Of every weight that is a float, through the state as well: the token after a prompt."""
    shape = dataclasses.replace(SHAPES["untied"], block_count=2, full_attention_interval=2)
    m, ids = model(shape), tokens(shape, 7).astype(np.int32)[None]

    def loss(weights, implementation):
        state = m.init_state(1)
        for part in (ids[:, :-1], ids[:, -1:]):
            count = np.array([part.shape[1]], np.int32)
            traced = forward.trunk(weights, part, count, state, m.config, implementation=implementation)
            state = traced.state
        return (traced.hidden * np.arange(shape.embedding_length, dtype=np.float32)).mean()

    gradient = jax.grad(loss, allow_int=True)
    ours, theirs = (jax.tree.leaves(gradient(m.weights, name)) for name in ("auto", "portable"))
    floats = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.dtype != jax.dtypes.float0]
    assert len(floats) > 20
    for a, b in floats:
        assert relative_l2(a, b) < 1e-4  # sums of products of both signs, thousands of them: digits cancel


def test_taps_come_in_the_order_of_execution():
    """Not sorted by name, as jit returns the keys of a dict: each of these needs the one before."""
    chain = (
        "attn_norm",
        "linear_attn_qkv_mixed",
        "conv_input",
        "conv_output_silu",
        "attn_output",
        "final_output",
    )
    chain += ("linear_attn_out", "attn_residual", "attn_post_norm", "ffn_out", "l_out")
    taps = list(model(next(iter(SHAPES.values()))).taps([1, 2, 3]))
    assert [name for name in taps if name.endswith("-0") and name[:-2] in chain] == [f"{n}-0" for n in chain]
    layers = [int(name.rsplit("-", 1)[1]) for name in taps if re.search(r"-\d+$", name)]
    assert layers == sorted(layers)
    assert taps[0].endswith("input_embed")
    assert taps[-1] == "result_output"


def test_no_taps_is_the_program_without_the_calls(monkeypatch):
    m = model(SHAPES["untied"])
    state = m.init_state(1)

    def lowered(tapped):
        span = Span.text(state.length, state.length + 7, 7)
        x = np.zeros((1, 7, m.config.embedding_length), np.float32)

        def run(x):
            """A new function each time: a traced program must not be remembered."""
            for w, s, cfg in zip(m.weights.blocks, state.blocks, m.config.blocks, strict=True):
                x, _, taps = forward._run_block(w, x, s, span, cfg, tapped)
            return x, taps

        return jax.jit(run).lower(x).as_text()

    off, on = lowered(False), lowered(True)
    for module in ("attention", "delta_net", "ffn", "forward"):
        monkeypatch.setattr(f"scarlet_jax.{module}.tap", lambda name, x: x)
    assert lowered(False) == off
    assert off != on


@every_shape
@pytest.mark.parametrize("count", [1, 65])
def test_every_tap_against_llama_cpp(shape, count):
    from scarlet_jax.tools.engines import llama_cpp

    ids = tokens(shape, count)
    assert_taps_agree(model(shape).taps(ids), llama_cpp.taps(path(shape), ids)[0])


@every_shape
@pytest.mark.parametrize("count", LENGTHS)
def test_logits_against_transformers(shape, count):
    pytest.importorskip("torch", reason="the transformers extra is not installed")
    from scarlet_jax.tools.engines import transformers

    ids = tokens(shape, count)
    ours, theirs = np.asarray(model(shape).forward(ids)[0]), transformers.logits(path(shape), ids)
    truth, _ = oracle.forward(path(shape), ids)
    # Logits run to 20 here, and transformers, in f32 as well, is itself up to 3e-4 from the float64 truth.
    assert np.abs(ours - truth).max() < 2e-4
    assert np.abs(ours - theirs).max() < 2e-4 + np.abs(theirs - truth).max()


@every_implementation
def test_a_stretched_rotation(implementation):
    """YaRN of interleaved sections, its ramp within the rotated dims, with a factor of the file's own."""
    from scarlet_jax.tools.engines import llama_cpp

    ids = tokens(SCALED_ROPE, 40)
    logits, truth = oracle.forward(path(SCALED_ROPE), ids)
    ours = model(SCALED_ROPE, implementation=implementation)
    tapped, _, taps = ours.forward_with_taps(ids)
    for reference in (truth, llama_cpp.taps(path(SCALED_ROPE), ids)[0]):
        assert_taps_agree(taps, reference)
    assert relative_l2(tapped, logits) < TOLERANCE
    assert relative_l2(ours.forward(ids)[0], logits) < TOLERANCE


@pytest.mark.parametrize(
    "setting", [{"attn_factor": 1.0}, {"type": "linear"}, {"original_context_length": 960}]
)
def test_each_setting_of_a_stretched_rotation_counts(setting):
    ids, ours = tokens(SCALED_ROPE, 40), scarlet_jax.load(path(SCALED_ROPE))
    blocks = list(ours.config.blocks)
    mixer = blocks[2].mixer
    rope = dataclasses.replace(mixer.rope, scaling=dataclasses.replace(mixer.rope.scaling, **setting))
    blocks[2] = dataclasses.replace(blocks[2], mixer=dataclasses.replace(mixer, rope=rope))
    ours = changed(ours, config=dataclasses.replace(ours.config, blocks=tuple(blocks)))
    assert relative_l2(ours.forward(ids)[0], oracle.forward(path(SCALED_ROPE), ids)[0]) > 100 * TOLERANCE


def image_positions(before, rows, columns, after):
    """Text, an image of rows x columns, and text that goes on from the image's longer side: (3, T)."""
    image = np.indices((1, rows, columns)).reshape(3, -1) + before
    rest = np.arange(after) + before + max(rows, columns)
    return np.concatenate([np.tile(np.arange(before), (3, 1)), image, np.tile(rest, (3, 1))], axis=1)


@every_implementation
@every_shape
def test_positions_of_an_image(shape, implementation):
    """Against float64, in pieces too, and in a batch with text that starts elsewhere."""
    ours = model(shape, implementation=implementation)
    positions = image_positions(5, 4, 6, 20)
    ids = tokens(shape, positions.shape[1])
    fourth = np.concatenate([positions, 0 * positions[:1]])
    truth = oracle.forward(path(shape), ids, positions=fourth)[0]
    assert relative_l2(ours.forward(ids, positions=positions)[0], truth) < TOLERANCE
    assert relative_l2(ours.forward(ids)[0], truth) > 100 * TOLERANCE  # text's would be wrong

    _, state = ours.forward(ids[:17], positions=positions[:, :17])
    last, _ = ours.last_logits(ids[17:], state, positions=positions[:, 17:])
    assert relative_l2(last, truth[-1]) < TOLERANCE

    later = fourth + 3
    both = np.stack([fourth, later], axis=1)
    together, _ = ours.forward(np.stack([ids, ids]), positions=both)
    assert relative_l2(together[1], oracle.forward(path(shape), ids, positions=later)[0]) < TOLERANCE


@every_shape
def test_positions_of_an_image_against_transformers(shape):
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    from scarlet_jax.tools.engines import transformers_model

    positions = image_positions(3, 3, 5, 9)
    ids = tokens(shape, positions.shape[1])
    net = transformers_model.load(path(shape)).model
    with torch.no_grad():
        theirs = net(torch.tensor(ids[None]), position_ids=torch.tensor(positions[:, None])).logits[0].numpy()
    fourth = np.concatenate([positions, 0 * positions[:1]])
    truth = oracle.forward(path(shape), ids, positions=fourth)[0]
    ours = np.asarray(model(shape).forward(ids, positions=positions)[0])
    assert np.abs(ours - theirs).max() < 2e-4 + np.abs(theirs - truth).max()
    assert np.abs(theirs - truth).max() < 1e-3  # in f32; another order of components is 1 and more


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (np.zeros((2, 4), int), r"of shape \(2, 4\); expected integers .* of shape \(3, 4\) or \(4, 4\)"),
        (np.zeros((3, 1, 4), int), r"of shape \(3, 1, 4\)"),
        (np.zeros((3, 4)), "float64"),
        (-np.ones((3, 4), int), "-1; expected 0 and above"),
    ],
)
def test_positions_that_cannot_be(positions, expected):
    with pytest.raises(BadInput, match=f"positions: .*{expected}"):
        model(SHAPES["tied"]).forward([1, 2, 3, 4], positions=positions)


@every_shape
def test_greedy_tokens_equal_llama_cpp(shape):
    """Wherever its own two best logits are further apart than its own error."""
    from scarlet_jax.tools.engines import llama_cpp

    ids = list(tokens(shape, 20))
    with llama_cpp.Engine(path(shape), n_ctx=256) as reference:
        ours, state = model(shape).last_logits(ids)
        theirs = reference.decode(ids)[-1]
        for _ in range(24):
            truth = oracle.forward(path(shape), ids)[0][-1]
            second, best = np.sort(theirs)[-2:]
            if best - second > 2 * np.abs(theirs - truth).max():
                assert int(np.argmax(ours)) == int(np.argmax(theirs))
            ids.append(int(np.argmax(theirs)))
            ours, state = model(shape).last_logits(ids[-1:], state)
            theirs = reference.decode(ids[-1:])[-1]


@every_implementation
@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
def test_a_narrow_cache_rounds_keys_and_values_alone(kv_dtype, implementation):
    shape = SHAPES["untied"]
    ids = tokens(shape, 50)
    expected, _ = oracle.forward(path(shape), ids)
    narrow = scarlet_jax.load(path(shape), kv_dtype=kv_dtype, implementation=implementation)
    _, state = narrow.forward(ids[:30])
    logits, state = narrow.forward(ids[30:], state)
    # Rounding to 11 or 8 bits of mantissa, averaged over the cache.
    assert TOLERANCE < relative_l2(logits, expected[30:]) < {"float16": 2e-3, "bfloat16": 2e-2}[kv_dtype]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.blocks)} == {"float32", kv_dtype}


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], "at least one token"),
        ([[1, 2], []], "at least one token"),
        ([1, 400], "id 400 is outside the vocabulary; expected 0 to 330"),
        ([-1], "id -1"),
        ([1.5], "expected integers"),
        (range(101), "101 with those before them; the context holds 100"),
    ],
)
def test_bad_tokens(ids, expected):
    short = scarlet_jax.load(path(SHAPES["untied"]), context_length=100)
    with pytest.raises(BadInput, match=expected):
        short.forward(ids)


def test_a_batch_cannot_continue_another_of_different_size():
    _, state = model(SHAPES["untied"]).forward([[1, 2], [3, 4]])
    with pytest.raises(BadInput, match="1 sequences; expected 2"):
        model(SHAPES["untied"]).forward([1], state)


@pytest.mark.parametrize("position", range(6))
def test_a_fault_in_the_model_is_seen(position):
    """The comparisons above can fail: each of these mistakes moves the logits far beyond their tolerance."""
    shape = dataclasses.replace(SHAPES["untied"], freq_base=1e4 + position)  # no compiled program is reused
    ids = tokens(shape, 65)
    ours = scarlet_jax.load(path(shape))
    blocks = list(ours.config.blocks)
    mixers = [block.mixer for block in blocks]
    recurrent, full = mixers[0], mixers[2]
    mistakes = [
        (0, dataclasses.replace(recurrent, head_mapping="repeat")),
        (0, dataclasses.replace(recurrent, layer_norm_rms_epsilon=1e-2)),
        (2, dataclasses.replace(full, rope=dataclasses.replace(full.rope, kind="norm"))),
        (2, dataclasses.replace(full, rope=dataclasses.replace(full.rope, dimension_count=18))),
        (2, dataclasses.replace(full, rope=dataclasses.replace(full.rope, freq_base=1e5))),
        (2, dataclasses.replace(full, head_count_kv=2, layer_norm_rms_epsilon=1e-2)),
    ]
    layer, wrong = mistakes[position]
    blocks[layer] = dataclasses.replace(blocks[layer], mixer=wrong)
    ours = changed(ours, config=dataclasses.replace(ours.config, blocks=tuple(blocks)))
    assert relative_l2(ours.forward(ids)[0], oracle.forward(path(shape), ids)[0]) > 100 * TOLERANCE
