"""The trainer: its text, its tokenizer, its gradients, resuming, and the files it writes."""

import dataclasses
import itertools
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from support import relative_l2

from scarlet_jax.errors import BadInput
from scarlet_jax.load import load
from scarlet_jax.ops import implementations
from scarlet_jax.tools.engines import llama_cpp
from scarlet_jax.tools.train import corpus, export, network, products, skills, text

pytest.importorskip("optax", reason="the train extra is not installed")
from scarlet_jax.tools.train import loop, prediction

# One layer of each kind; smaller than the model in the box in every axis that may be.
SHAPE = dataclasses.replace(
    network.SHAPE, block_count=2, feed_forward_length=512, head_count=2, head_count_kv=1, key_length=128
)
RECIPE = loop.Recipe(shape=SHAPE, steps=3, rows=2, length=33, turn=1, warmup=1)
DRAFT = prediction.recipe(RECIPE, steps=2)


def take(count, **options):
    return list(itertools.islice(corpus.documents(3, corpus.HELD_OUT, **options), count))


@pytest.fixture(scope="module")
def vocabulary():
    return text.vocabulary(SHAPE.vocab_size, seed=0)


def not_quite_initial(shape):
    """Parameters whose norms are not all one, so that every part shows in the logits."""
    rng = np.random.default_rng(1)
    start = network.initial(shape, seed=0)
    return {
        name: x * (1 + 0.3 * rng.standard_normal(x.shape).astype(np.float32)) for name, x in start.items()
    }


@pytest.fixture(scope="module")
def parameters():
    return not_quite_initial(SHAPE)


@pytest.fixture(scope="module")
def files(parameters, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("box")
    paths = {quant: folder / f"{quant}.gguf" for quant in ("F32", "F16", "Q4_K_M")}
    for quant, path in paths.items():
        export.write(path, parameters, SHAPE, vocabulary, quant)
    return paths


# --- The corpus ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_documents_and_every_other_argument_gives_others():
    draws = {
        (seed, stream, part, kind): tuple(itertools.islice(corpus.documents(seed, stream, part, kind), 20))
        for seed in (0, 1)
        for stream in (corpus.TRAINING, corpus.HELD_OUT)
        for part in (0, 1)
        for kind in (None, "copy", "recall")
    }
    assert len(set(draws.values())) == len(draws)
    for key, drawn in draws.items():
        assert drawn == tuple(itertools.islice(corpus.documents(*key), 20))


def test_recalled_values_are_those_given():
    for document in take(100, kind="recall"):
        pairs = dict(re.findall(r"(\w+) is (\w+)", document[0].prompt.split("\n")[0]))
        for turn in document:
            key = re.search(r"What is (\w+)", turn.prompt)[1]
            assert turn.answer == f" {pairs[key]}.\n"


def test_copies_sums_and_counts_are_right():
    for document in take(50, kind="copy"):
        assert document[0].prompt == f"Copy:{document[0].answer[:-1]}\nAgain:"
    for turn in itertools.chain.from_iterable(take(50, kind="arithmetic")):
        a, sign, b = turn.prompt.split()[:3]
        assert int(turn.answer.strip(" .\n")) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    for document in take(50, kind="counting"):
        first, last = map(int, re.findall(r"\d+", document[0].prompt))
        step = 1 if first < last else -1
        assert document[0].answer == f" {' '.join(map(str, range(first, last + step, step)))}.\n"


def test_more_questions_change_nothing_else():
    """The vocabulary is learnt from documents with two; those with more are the same, and ask on."""
    few, many = (corpus.story(np.random.default_rng(5), questions) for questions in (2, 8))
    assert many[: len(few)] == few
    assert len(set(many)) == len(many) >= 7  # the story and each of its questions once


def test_answers_about_a_story_are_in_the_story():
    for document in take(100, kind="story"):
        story, *questions = document
        for turn in questions:
            answer = re.sub(r"^ (It is |In the |To the )?|\.\n$", "", turn.answer)
            assert answer.lower() in story.answer.lower(), (story, turn)


# --- The tokenizer ------------------------------------------------------------------------------------------


def test_documents_become_the_tokens_that_llama_cpp_gives_them(vocabulary, files):
    """Turn by turn, too: where a prompt ends, no token goes on."""
    encoder = text.Encoder(text.tokenizer(vocabulary))
    with llama_cpp.Engine(files["F32"]) as engine:
        for document in take(150):
            whole = "".join(turn.prompt + turn.answer for turn in document)
            tokens, _ = encoder.encode(document)
            assert tokens[:-1] == engine.model.tokenize(whole)


def test_batches_are_whole_rows_of_documents_in_order(vocabulary):
    encoder = text.Encoder(text.tokenizer(vocabulary))
    batch = text.batch(encoder, iter(take(40)), rows=6, length=50, told=0.25)
    assert batch.tokens.shape == batch.weight.shape == (6, 51)
    expected = [encoder.end, *itertools.chain.from_iterable(encoder.encode(d)[0] for d in take(20))][:51]
    assert batch.tokens[0].tolist() == expected
    row = batch.tokens[1].tolist()  # not of an end token, but of a document that the first row did not take
    begins = [encoder.encode(document)[0] for document in take(20)]
    assert any(row[: len(tokens)] == tokens for tokens in begins)
    assert tuple(batch.tokens[2:, 0] == encoder.end) == (True, False, True, False)
    weights = np.unique(batch.weight)
    assert weights.tolist() == [np.float32(w) for w in (0, text.PROMPT_WEIGHT, 0.25, 1)]


# --- What is trained ----------------------------------------------------------------------------------------


def test_products_and_their_gradients():
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(s).astype(np.float32) for s in ((2, 5, 70), (30, 70), (2, 5, 30)))
    y, backward = jax.vjp(products.qmatmul, jnp.asarray(x), jnp.asarray(w))
    dx, dw = backward(jnp.asarray(dy))
    # Each factor is rounded to 8 bits: 2^-9 of itself on average, and sums do not add to that.
    assert relative_l2(y, x.astype(float) @ w.T) < 4e-3
    assert relative_l2(dx, dy.astype(float) @ w) < 4e-3
    assert relative_l2(dw, np.einsum("bto,bti->oi", dy.astype(float), x)) < 4e-3


@pytest.mark.parametrize("size", [1, 2, 64])
def test_the_delta_rules_system_and_its_gradients(size):
    """Against float64: the inverse by LAPACK, and differences of it for the gradients."""
    rng = np.random.default_rng(size)
    lower = np.tril(rng.standard_normal((3, 2, size, size)) / np.sqrt(size), -1)
    columns, dx = rng.standard_normal((2, 3, 2, size, 5))
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    x, backward = jax.vjp(products.solve, f32(lower), f32(columns))
    dlower, dcolumns = backward(f32(dx))
    solved = lambda lower: np.linalg.solve(np.eye(size) + lower, columns)  # noqa: E731
    # f32 sums of 64 terms; the systems are well conditioned.
    assert relative_l2(x, solved(lower)) < 1e-5
    assert relative_l2(dcolumns, np.linalg.solve((np.eye(size) + lower).swapaxes(-1, -2), dx)) < 1e-5
    way = np.tril(rng.standard_normal(lower.shape), -1) * 1e-5
    slope = np.sum(dx * (solved(lower + way) - solved(lower - way))) / 2
    assert np.sum(np.asarray(dlower, float) * way) == pytest.approx(slope, rel=1e-4, abs=1e-12)
    assert not np.triu(dlower).any()


def test_the_trainer_solves_by_its_own_products_and_nobody_else_does(parameters, vocabulary, monkeypatch):
    called = []
    solve = products.solve
    monkeypatch.setattr(products, "solve", lambda *a: called.append(a) or solve(*a))
    cfg = network.config(SHAPE, vocabulary)
    network.logits(parameters, jnp.zeros((1, 5), jnp.int32), cfg)
    assert len(called) == 1  # the one delta net
    assert not implementations.offered("solve")


def test_training_logits_are_the_engines(parameters, vocabulary, files):
    tokens = np.random.default_rng(2).integers(0, SHAPE.vocab_size, 40)
    cfg = network.config(SHAPE, vocabulary)
    ours = np.asarray(network.logits(parameters, jnp.asarray(tokens[None], jnp.int32), cfg))[0]
    theirs = np.asarray(load(files["F32"]).forward(tokens)[0])
    # Products of bf16 factors, one after another through two layers and the head.
    assert relative_l2(ours, theirs) < 3e-2


def test_the_loss_is_the_weighted_mean_of_what_the_logits_say(parameters, vocabulary):
    cfg = network.config(SHAPE, vocabulary)
    batch = text.batch(text.Encoder(text.tokenizer(vocabulary)), iter(take(20)), rows=2, length=20)
    logits = np.asarray(network.logits(parameters, batch.tokens[:, :-1], cfg), np.float64)
    nats = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, np.asarray(batch.tokens)[:, 1:, None], axis=-1)[..., 0]
    )
    expected = np.average(nats, weights=np.asarray(batch.weight)[:, 1:])
    assert float(network.loss(parameters, batch, cfg)) == pytest.approx(expected, rel=1e-5)  # f32 sums


def test_no_parameter_is_left_without_a_gradient(parameters, vocabulary):
    cfg = network.config(SHAPE, vocabulary)
    batch = text.batch(text.Encoder(text.tokenizer(vocabulary)), iter(take(20)), rows=2, length=30)
    gradient = jax.jit(jax.grad(network.loss), static_argnums=2)(parameters, batch, cfg)
    assert [name for name, g in gradient.items() if not np.any(g) or not np.all(np.isfinite(g))] == []


# --- The prediction block -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafting(vocabulary, tmp_path_factory):
    """Parameters with a prediction block, and their file."""
    parameters, path = not_quite_initial(DRAFT.shape), tmp_path_factory.mktemp("draft") / "F32.gguf"
    export.write(path, parameters, DRAFT.shape, vocabulary, "F32")
    return parameters, path


def test_drafted_logits_are_the_judges(drafting, vocabulary):
    parameters, path = drafting
    tokens = np.random.default_rng(5).integers(0, SHAPE.vocab_size, (2, 21))
    cfg = network.config(DRAFT.shape, vocabulary)
    ours = prediction.logits(parameters, jnp.asarray(tokens, jnp.int32), cfg)
    known = [oracle.forward(path, row)[1]["result_norm"] for row in tokens]
    before = [np.vstack([np.zeros_like(states[:1]), states[:-1]]) for states in known]
    truth = [oracle.predict(path, row, states)[0] for row, states in zip(tokens, before, strict=True)]
    assert relative_l2(ours, truth) < 3e-2  # products of bf16 factors, as of the trunk


def test_a_file_with_a_prediction_block_is_the_trunk_to_llama_cpp_and_to_us(drafting):
    _, path = drafting
    tokens = np.random.default_rng(6).integers(0, SHAPE.vocab_size, 30).tolist()
    truth, _ = oracle.forward(path, tokens)
    with llama_cpp.Engine(path) as engine:
        assert relative_l2(engine.decode(tokens), truth) < 1e-5
    assert relative_l2(load(path).forward(tokens)[0], truth) < 1e-5


def test_every_parameter_of_the_block_is_trained_and_none_of_the_trunk(drafting, vocabulary):
    cfg = network.config(DRAFT.shape, vocabulary)
    trunk = {name: x for name, x in drafting[0].items() if not name.startswith("blk.2.")}
    run = loop.start(DRAFT, trunk)
    assert run.parameters.keys() == drafting[0].keys() - trunk.keys()
    batch = text.batch(text.Encoder(text.tokenizer(vocabulary)), iter(take(20)), rows=2, length=30)
    gradient = jax.jit(jax.grad(lambda p: prediction.loss(trunk | p, batch, cfg)))(run.parameters)
    assert [name for name, g in gradient.items() if not np.any(g) or not np.all(np.isfinite(g))] == []


# --- The loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (64, 64)])
def test_orthogonal_steps_keep_directions_and_level_their_lengths(shape):
    """Against LAPACK's singular value decomposition."""
    rng = np.random.default_rng(shape[0])
    left, right = (np.linalg.qr(rng.standard_normal((n, min(shape))))[0] for n in shape)
    lengths = np.geomspace(0.05, 1, min(shape)) * 7  # of any size in all; the polynomial lifts what is a 20th
    step = np.asarray(loop.orthogonal(jnp.asarray((left * lengths) @ right.T, jnp.float32)))
    levelled = left.T @ (step / np.sqrt(max(1, shape[0] / shape[1]))) @ right
    assert np.diag(levelled).min() > 0.6
    assert np.diag(levelled).max() < 1.3
    np.testing.assert_allclose(levelled, np.diag(np.diag(levelled)), atol=1e-4)  # f32, lifted a hundred times


def test_rates_rise_stay_and_fall():
    recipe = loop.Recipe(steps=100, warmup=10, decay=0.3)
    rate = loop.schedule(recipe, 2.0)
    assert [float(rate(n)) for n in (0, 5, 10, 70, 85, 100)] == pytest.approx([0, 1, 2, 2, 1, 0])
    assert loop.level_until(recipe) == 70


@pytest.mark.slow  # compiles the whole step three times
@jax.numpy_dtype_promotion("standard")  # optax mixes integers and floats
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path):
    *_, whole = loop.train(RECIPE, loop.start(RECIPE))
    part = next(loop.train(RECIPE, loop.start(RECIPE)))
    loop.save(tmp_path / "c", RECIPE, part)
    *_, resumed = loop.train(RECIPE, loop.restore(tmp_path / "c", RECIPE))
    assert resumed.step == whole.step == RECIPE.steps
    assert resumed.losses == whole.losses
    for name, x in whole.parameters.items():
        np.testing.assert_array_equal(resumed.parameters[name], x, name)


def test_checkpoints_of_another_recipe_and_other_files_are_refused(tmp_path):
    path = tmp_path / "c"
    loop.save(path, RECIPE, loop.start(RECIPE))
    for change in ({"rows": 3}, {"seed": 1}, {"decay": 0.2}, {"init": "another file"}):
        with pytest.raises(BadInput, match="another recipe"):
            loop.restore(path, dataclasses.replace(RECIPE, **change))
    path.write_bytes(b"not safetensors")
    with pytest.raises(BadInput, match="not a checkpoint"):
        loop.restore(path, RECIPE)


@pytest.mark.parametrize(("step", "steps", "continues"), [(60, 90, True), (66, 90, False), (66, 120, True)])
def test_a_run_may_be_cut_short_or_lengthened_until_its_rates_fall(tmp_path, step, steps, continues):
    """Of 100 steps the rates fall after 70, of 90 after 63, of 120 after 84."""
    recipe = dataclasses.replace(RECIPE, steps=100, decay=0.3)
    run = loop.start(recipe)
    run.step = step
    loop.save(tmp_path / "c", recipe, run)
    other = dataclasses.replace(recipe, steps=steps)
    if continues:
        assert loop.restore(tmp_path / "c", other).step == step
    else:
        with pytest.raises(BadInput, match="another recipe"):
            loop.restore(tmp_path / "c", other)
    assert loop.restore(tmp_path / "c", recipe).step == step


# --- A start from a file ------------------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_of_a_packed_file(files, vocabulary):
    """Unpacked by gguf-py; and the loss of the first step is that of the file's own logits."""
    init = network.read(files["Q4_K_M"], SHAPE, vocabulary)
    run = loop.start(RECIPE, init=init)
    for tensor in gguf.GGUFReader(files["Q4_K_M"]).tensors:
        found = network.tensors(run.parameters)[tensor.name]
        # exp(log(x)) of ssm_a rounds twice; all else is exact.
        np.testing.assert_allclose(
            found, gguf.dequantize(tensor.data, tensor.tensor_type).reshape(found.shape), rtol=1e-6
        )
    assert run.parameters.keys() == network.initial(SHAPE, 0).keys()


def test_what_an_f32_file_holds_is_what_was_trained(files, parameters, vocabulary):
    init = network.read(files["F32"], SHAPE, vocabulary)
    assert init.keys() == parameters.keys()
    for name, x in parameters.items():
        np.testing.assert_allclose(init[name], x, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_prediction_block_is_taken_where_there_is_one(files, drafting, vocabulary):
    assert network.read(drafting[1], DRAFT.shape, vocabulary).keys() == drafting[0].keys()
    without = network.read(files["F32"], DRAFT.shape, vocabulary)
    run = loop.start(DRAFT, init=without)
    assert run.parameters.keys() == drafting[0].keys() > without.keys()


def test_files_of_another_shape_or_vocabulary_are_refused(files, vocabulary):
    with pytest.raises(BadInput, match=r"blk.0.ffn_gate.weight: \(512, 256\); expected \(768, 256\)"):
        network.read(files["F32"], dataclasses.replace(SHAPE, feed_forward_length=768), vocabulary)
    other = vocabulary | {"tokenizer.ggml.tokens": vocabulary["tokenizer.ggml.tokens"][::-1]}
    with pytest.raises(BadInput, match="of another vocabulary"):
        network.read(files["F32"], SHAPE, other)


# --- Files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["F32", "F16"])
def test_files_load_in_llama_cpp_with_equal_logits(files, quant):
    tokens = np.random.default_rng(4).integers(0, SHAPE.vocab_size, 30).tolist()
    with llama_cpp.Engine(files[quant]) as engine:
        theirs = engine.decode(tokens)
    ours = np.asarray(load(files[quant]).forward(tokens)[0])
    # llama.cpp rounds activations to f16 before a product with F16 weights.
    assert relative_l2(theirs, ours) < {"F32": 1e-5, "F16": 2e-3}[quant]


def test_converted_back_it_is_a_checkpoint_of_transformers_with_equal_logits(files, tmp_path):
    """F32 GGUF -> a transformers model -> the checkpoint that it saves -> loaded by transformers' own means."""
    torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
    from transformers import AutoModelForCausalLM

    from scarlet_jax.tools.engines import transformers_model

    transformers_model.load(files["F32"]).model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = np.random.default_rng(7).integers(0, SHAPE.vocab_size, 70)  # more than a chunk of the delta rule
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens[None])).logits[0].numpy()
    assert relative_l2(theirs, oracle.forward(files["F32"], tokens)[0]) < 1e-5  # f32 throughout
    assert relative_l2(load(files["F32"]).forward(tokens)[0], theirs) < 1e-5


def test_the_quantised_file_has_the_stock_mix(files):
    types = {name: tensor.qtype for name, tensor in load(files["Q4_K_M"]).gguf.tensors.items()}
    assert types["blk.0.attn_qkv.weight"] == "Q5_K"
    assert types["token_embd.weight"] == "Q6_K"
    assert types["blk.0.ffn_gate.weight"] == "Q4_K"
    packed = {qtype for qtype in types.values() if qtype != "F32"}
    assert packed == {"Q4_K", "Q5_K", "Q6_K"}  # no fallback: every row is whole blocks of 256


def test_what_cannot_be_written_is_said_in_a_line(parameters, vocabulary, tmp_path):
    with pytest.raises(BadInput, match="cannot be written"):
        export.write(tmp_path / "no" / "such.gguf", parameters, SHAPE, vocabulary, "F32")


# --- Skills -------------------------------------------------------------------------------------------------


def test_a_score_is_what_greedy_generation_gets_right(files):
    """An untrained model gets nothing right: what it does say is taken for the answer, and then spoilt."""
    model = load(files["F32"])
    prompt = model.tokenizer.encode("Copy: rain star.")
    start = [text.Encoder(model.tokenizer).end, *prompt]
    answer = list(model.generate(start, max_tokens=4, temperature=0))
    log_p = np.asarray(jax.nn.log_softmax(model.forward([*start, *answer])[0]))
    assert skills.score_row(log_p, [(prompt, answer)])[0].exact
    for i in range(len(answer)):
        wrong = [*answer[:i], (answer[i] + 1) % SHAPE.vocab_size, *answer[i + 1 :]]
        assert not skills.score_row(log_p, [(prompt, wrong)])[0].exact


def test_scores_count_the_turns_that_are_asked(files):
    scored = skills.score(load(files["F32"]), "story", documents=5)
    assert scored.turns == 10  # two questions a story
    assert scored.right == 0
    assert scored.perplexity > 100  # nothing learnt: about the size of the vocabulary
    assert scored.accepted is None
