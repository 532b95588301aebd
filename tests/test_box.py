"""The model in the box: what it writes and what it can do, on every path."""

import pytest

from scarlet_jax import data, load
from scarlet_jax.errors import BadInput
from scarlet_jax.ops import implementations
from scarlet_jax.tools.cli import main
from scarlet_jax.tools.train import skills, text

STORY = (
    " barn. She found a yellow book there. Anna was happy. She put the book in the box. Then Rosa came with a"
    ' hen. "Where is the yellow book?" said Rosa. "It is in the box," said Anna. Anna and Rosa played with'
    " the hen in the barn. The end.\n"
)
CONTINUATIONS = {
    "One morning, Anna went to the": STORY,
    "Remember: apple is star, plum is rope.\nWhat is plum? It is": " rope.\n",
    "Copy: rain star gold.\nAgain:": " rain star gold.\n",
    "7 + 8 =": " 15.\n",
}


@pytest.fixture(scope="module", params=["cpu", "portable"])
def model(request):
    if reason := implementations.IMPLEMENTATIONS[request.param].unavailable():
        pytest.skip(reason)
    return load(data.model_path(), implementation=request.param)


@pytest.mark.parametrize("prompt", CONTINUATIONS)
def test_greedy_continuations(model, prompt):
    """The prompt goes in at once and the answer token by token, so both forms of each layer speak."""
    tokenizer = model.tokenizer
    expected = CONTINUATIONS[prompt]
    start = [tokenizer.ids[text.END], *tokenizer.encode(prompt)]
    count = len(tokenizer.encode(expected))
    assert tokenizer.decode(model.generate(start, max_tokens=count, temperature=0)) == expected


def test_skills_and_perplexity():
    """In batches of several lengths. Turns whose two best tokens are close may fall either way."""
    model = load(data.model_path())
    recall = skills.score(model, "recall", documents=64)
    assert (abs(recall.right - 148) <= 1, recall.turns) == (True, 175)
    assert recall.perplexity == pytest.approx(1.23634, rel=1e-3)  # f32 sums in another order, and no more
    assert skills.score(model, "arithmetic", documents=64).right == 192


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
