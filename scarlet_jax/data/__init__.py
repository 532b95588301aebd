"""The model in the box: a small trained Qwen3.5 that the package carries (see docs/training.md)."""

from __future__ import annotations

from pathlib import Path

from scarlet_jax.errors import BadInput

_FILE = Path(__file__).parent / "box.gguf"


def model_path() -> Path:
    """The file; BadInput if this installation lacks it."""
    if not _FILE.is_file():
        raise BadInput(f"{_FILE}: the model in the box is missing; name another MODEL")
    return _FILE
