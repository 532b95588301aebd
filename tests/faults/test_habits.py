"""What is no fault must not be called one, on tiny models of every kind."""

import pytest
from faults import habits


@pytest.mark.parametrize("name", ["a", "lfm2"])
def test_another_engines_habits_are_no_fault(name):
    for pair, known, report in habits.alarms(name, lengths=(40,)):
        assert report["exit"] == 0, (pair, known, report["verdict"], report["first"], report["why"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "m", "lfm2", "falcon-h1", "qwen3next", "llama", "qwen3moe"])
def test_nor_on_prompts_of_any_length(name):
    assert [(p, k, r["verdict"], r["why"]) for p, k, r in habits.alarms(name) if r["exit"]] == []
