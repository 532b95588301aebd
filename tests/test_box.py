"""The model in the box: what it writes and what it can do, on every path."""

import itertools
import re

import numpy as np
import oracle
import pytest
from support import relative_l2

from scarlet_jax import data, load
from scarlet_jax.errors import BadInput
from scarlet_jax.ops import cpu
from scarlet_jax.tools import perplexity
from scarlet_jax.tools.cli import main
from scarlet_jax.tools.train import corpus, skills, text

STORY = (
    " bakery. She saw a spotted shoe there. Anna was brave. She hid the shoe in the trunk. Then Daisy came with a "
    "spaniel. Daisy looked in the trunk and saw the spotted shoe. Anna and Daisy sat with the spaniel in the "
    "bakery. The end.\nQuestion: Who saw the shoe?\nAnswer: Anna.\nQuestion: Where is the shoe?\nAnswer: In the "
    "trunk.\nQuestion: Who came with a spaniel?\nAnswer: Daisy.\n"
)
CONTINUATIONS = {
    "One morning, Anna went to the": STORY,
    "Remember: apple is star, plum is rope.\nWhat is plum? It is": " rope.\n",
    "Copy: rain star gold.\nAgain:": " rain star gold.\n",
    "7 + 8 =": " 15.\n",
    "Count from 5 to 9:": " 5 6 7 8 9.\n",
}


# Kind -> turns answered exactly, of how many, perplexity of the answers and share of drafts accepted, of 32 documents.
SKILLS = {
    "story": (64, 64, 1.852259, 0.826972),
    "recall": (83, 86, 1.108211, 0.627907),
    "copy": (32, 32, 1.004926, 0.596939),
    "arithmetic": (93, 96, 1.034338, 0.773770),
    "counting": (32, 32, 1.003792, 0.813636),
}

# Name -> implementation, and the instruction set of its kernels.
PATHS = {
    **{isa: ("cpu", isa) for isa in ("generic", "avx2", "avx512", "avx512vnni", "amx")},
    "fast": ("cpu-fast", ""),
    "portable": ("portable", ""),
}


@pytest.fixture(scope="module", params=PATHS)
def model(request):
    implementation, isa = PATHS[request.param]
    try:
        if isa:
            cpu.set_isa(isa)
        yield load(data.model_path(), implementation=implementation)
    except BadInput as error:
        pytest.skip(str(error))
    if isa:
        cpu.set_isa()


@pytest.mark.parametrize("prompt", CONTINUATIONS)
def test_greedy_continuations(model, prompt):
    """The prompt goes in at once and the answer token by token, so both forms of each layer speak."""
    tokenizer = model.tokenizer
    expected = CONTINUATIONS[prompt]
    start = [tokenizer.ids[text.END], *tokenizer.encode(prompt)]
    count = len(tokenizer.encode(expected))
    found = tokenizer.decode(model.generate(start, max_tokens=count, temperature=0))
    # Rounded products give a long story another turn where two tokens are close.
    same = 200 if model.implementation == "cpu-fast" else len(expected)
    assert found[:same] == expected[:same]


# --- What it can do, in every mode --------------------------------------------------------------------------


def together(model, rows):
    logits, _ = model.forward(rows)
    return [some[: len(row)] for some, row in zip(np.asarray(logits), rows, strict=True)]


def in_pieces(size):
    """Each row by itself, `size` tokens a call."""

    def run(model, rows):
        return [np.concatenate(list(pieces(model, row))) for row in rows]

    def pieces(model, row):
        state = None
        for start in range(0, len(row), size):
            logits, state = model.forward(row[start : start + size], state)
            yield np.asarray(logits)

    return run


MODES = {"together": together, "alone": in_pieces(1000), "by seven": in_pieces(7), "by token": in_pieces(1)}


@pytest.fixture(scope="module")
def examples():
    """A held-out document of each kind as (rows of tokens, their turns), and how the float64 forward scores them."""
    path = data.model_path()
    encoder = text.Encoder(load(path).tokenizer)
    documents = [next(corpus.documents(7, corpus.HELD_OUT, kind=kind)) for kind in corpus.KINDS]
    turns = [encoder.turns(document) for document in documents]
    rows = [[encoder.end, *itertools.chain.from_iterable(p + a for p, a in some)] for some in turns]
    truth = [scored(oracle.forward(path, row)[0], some) for row, some in zip(rows, turns, strict=True)]
    return rows, turns, truth


def scored(logits, turns):
    return skills.score_row(perplexity.log_softmax(logits), turns)


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_as_exact_and_as_likely_as_in_truth(model, mode, examples):
    rows, turns, truth = examples
    for logits, some, expected in zip(MODES[mode](model, rows), turns, truth, strict=True):
        found = scored(logits, some)
        assert [turn.exact for turn in found] == [turn.exact for turn in expected]
        # f32 logits of order ten; the fast mode rounds a product to half a percent, of which little is left in a sum
        # over the tokens of a turn.
        rel, abs_ = (2e-3, 1e-2) if model.implementation == "cpu-fast" else (1e-4, 1e-3)
        assert [turn.nats for turn in found] == pytest.approx(
            [turn.nats for turn in expected], rel=rel, abs=abs_
        )


def test_transformers_runs_it_with_the_same_logits(examples):
    """Put back into a transformers model, rows of value heads, norms and all."""
    pytest.importorskip("torch", reason="the transformers extra is not installed")
    from scarlet_jax.tools.engines import transformers

    path, (rows, _, _) = data.model_path(), examples
    for row in rows:
        theirs, truth = transformers.logits(path, row), oracle.forward(path, row)[0]
        assert relative_l2(theirs, truth) < 1e-5
        assert relative_l2(load(path).forward(row)[0], truth) < 1e-5


def test_skills_and_perplexity():
    """In batches of several lengths. Turns whose two best tokens are close may fall either way, and so may drafts."""
    model = load(data.model_path())
    for kind, (right, turns, perplexity_of_answers, accepted) in SKILLS.items():
        score = skills.score(model, kind, documents=32)
        assert (abs(score.right - right) <= 1, score.turns) == (True, turns), score
        # f32 sums in another order, and no more; of some 200 drafts one or two.
        assert score.perplexity == pytest.approx(perplexity_of_answers, rel=1e-3)
        assert score.accepted == pytest.approx(accepted, abs=0.01)


@pytest.mark.parametrize("name", ["Rosa", "Tom"])
def test_what_it_tells_without_a_first_token_holds_together(name):
    """As somebody types it: where it was, who came and where the thing is, and the answers say so."""
    model = load(data.model_path())
    opening = f"One day, {name} ran to the"
    told = opening + model.tokenizer.decode(
        model.generate(model.tokenizer.encode(opening), max_tokens=100, temperature=0)
    )
    place, thing, container = re.search(
        r"ran to the (\w+)\..* (?:hid|put|placed|kept|stored|left) the (\w+) in the (\w+)\.", told
    ).groups()
    assert re.search(rf" with the \w+ in the {place}\. The end\.\n", told), told
    assert f"Where is the {thing}?\nAnswer: In the {container}.\n" in told, told


@pytest.mark.parametrize("kind", ["copy", "recall"])  # of which it drafts some, and not all
def test_drafts_are_accepted_where_the_judges_trunk_and_block_have_the_same_token_on_top(kind):
    path = data.model_path()
    model = load(path)
    encoder, same = text.Encoder(model.tokenizer), []
    for document in itertools.islice(corpus.documents(0, corpus.HELD_OUT, kind=kind), 3):
        turns = encoder.turns(document)
        row = [encoder.end, *itertools.chain.from_iterable(p + a for p, a in turns)]
        logits, seen = oracle.forward(path, row)
        before = np.pad(seen["result_norm"], ((1, 0), (0, 0)))[:-1]
        agrees = logits.argmax(-1) == oracle.predict(path, row, before)[0].argmax(-1)
        answered = itertools.chain.from_iterable([False] * len(p) + [True] * len(a) for p, a in turns)
        same += agrees[:-1][list(answered)].tolist()
    accepted = skills.score(model, kind, documents=3).accepted
    assert 0 < accepted < 1
    assert accepted == pytest.approx(np.mean(same), abs=1e-12)


@pytest.mark.parametrize(
    "command", ["inspect", "audit", "taps -p Hello -o dump", "parity --against llama.cpp -p Hello"]
)
def test_it_is_what_a_command_means_that_is_given_no_model(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(command.split()) == 0


def test_a_missing_file_is_said_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "_FILE", tmp_path / "box.gguf")
    with pytest.raises(BadInput, match="model in the box is missing"):
        data.model_path()
