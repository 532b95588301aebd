"""Misread blocks: what a product with a quantised weight looks like when its bits are taken wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def hypotheses(case: Any, weights: Any, make: Callable[..., Any]) -> list[Any]:
    """Explanations of a broken product by the blocks of its weight."""
    return []
