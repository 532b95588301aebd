"""Who may import whom (README, "The house"), read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("ops", "configs", "tools")
SOURCES = [
    *ROOT.glob("scarlet_jax/*.py"),
    *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "scarlet_jax" else ("scarlet_jax", *parts))


def imports(path: Path):
    """Full names of everything imported, those inside functions and under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# A module under the first prefix may import nothing of ours but what is under the others.
RULES = [
    ("scarlet_jax.ops", ["scarlet_jax.ops", "scarlet_jax.errors"]),
    ("scarlet_jax.types", ["scarlet_jax.ops"]),
    ("scarlet_jax.config", []),
    ("scarlet_jax.configs", ["scarlet_jax.config", "scarlet_jax.configs", "scarlet_jax.errors"]),
]


@pytest.mark.parametrize(("prefix", "allowed"), RULES)
def test_layers_import_downwards(prefix, allowed):
    def within(name, prefixes):
        return any(name == p or name.startswith(p + ".") for p in prefixes)

    checked = [path for path in SOURCES if within(module_name(path), [prefix])]
    assert checked
    for path in checked:
        wrong = [i for i in imports(path) if within(i, ["scarlet_jax"]) and not within(i, allowed)]
        assert not wrong, f"{path}: {wrong}"


PASSES = ("scarlet_jax.forward", "scarlet_jax.programs", "scarlet_jax.model")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_generation_and_tools_import_the_model(path):
    name = module_name(path)
    if name.startswith(
        (
            *("scarlet_jax.tools", "scarlet_jax.load", "scarlet_jax.generate"),
            *("scarlet_jax.model", "scarlet_jax.programs", "scarlet_jax.forward", "scarlet_jax.memory"),
        )
    ):
        return
    if name == "scarlet_jax.__init__":
        return
    assert not [i for i in imports(path) if i.startswith(PASSES)]


@pytest.mark.parametrize("path", [*SOURCES, *ROOT.glob("tests/**/*.py")], ids=str)
def test_no_top_level_folder_is_imported_bare(path):
    """`import ops` would load a module twice, and split the identity of QTensor."""
    assert not [i for i in imports(path) if i.split(".")[0] in FOLDERS]


def test_no_layer_knows_an_architecture():
    """Architectures are data: their names occur in configs/ alone (and in the tools that make models)."""
    stems = [path.stem for path in ROOT.glob("configs/*.py") if path.stem != "__init__"]
    names = {*stems, *(stem.replace("_", "-") for stem in stems)}
    engine = [
        path for path in ROOT.glob("scarlet_jax/*.py") if path.stem != "tokenizer"
    ]  # pre-tokenisers share names
    for path in engine:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                raise AssertionError(f"{path}:{node.lineno} names {node.value!r}")
