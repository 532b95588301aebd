"""docs/architectures.md says what the code does; and the engine asks nobody's name."""

import ast
import re
from pathlib import Path

import architectures_table
import pytest

from scarlet_jax import configs

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architectures.md").read_text()


def test_the_table_is_what_the_code_gives():
    """Made again by `python tests/architectures_table.py`."""
    _, _, rest = PAGE.partition(architectures_table.BEGIN)
    assert rest.partition(architectures_table.END)[0] == architectures_table.table()


def test_the_example_is_the_file():
    """Every line that the page's diff adds to the config of qwen3moe, and no other, is in it."""
    (diff,) = re.findall(r"\+\+\+ b/configs/qwen3moe.py\n@@.*?@@\n(.*?)(?=^```|^diff)", PAGE, re.S | re.M)
    added = "".join(line.removeprefix("+") for line in diff.splitlines(keepends=True))
    assert added == (ROOT / "configs" / "qwen3moe.py").read_text()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3moe", "qwen3next", "llama"])
def test_without_new_maths_an_architecture_is_at_most_sixty_lines(name):
    assert len((ROOT / "configs" / f"{name}.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", sorted(configs.ARCHITECTURES))
def test_hints_for_four_bit_kernels_are_ignored(name):
    """`X.input_scale` may stand beside any weight that llama.cpp packs as NVFP4."""
    assert any(re.fullmatch(p, "blk.3.ffn_up.input_scale") for p in configs.ARCHITECTURES[name].ignored)


ENGINE = [*ROOT.glob("scarlet_jax/*.py"), *ROOT.glob("ops/**/*.py")]


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_nothing_is_decided_by_the_name_of_an_architecture(path):
    """No comparison, `match` or look-up with `arch` or `architecture`: only `configs.find` may know names."""

    def names(node):
        return {getattr(part, "attr", getattr(part, "id", None)) for part in ast.walk(node)} & {
            "arch",
            "architecture",
        }

    for node in ast.walk(ast.parse(path.read_text())):
        asked = (
            [node.left, *node.comparators]
            if isinstance(node, ast.Compare)
            else [node.subject]
            if isinstance(node, ast.Match)
            else [node.slice]
            if isinstance(node, ast.Subscript)
            else []
        )
        assert not any(map(names, asked)), f"{path}:{getattr(node, 'lineno', 0)}"
