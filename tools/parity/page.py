"""A report as one HTML page that opens offline: heat map of layers and operations, curves on click, the words."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from scarlet_jax.tools.parity.metrics import head_curve
from scarlet_jax.tools.parity.page_template import TEMPLATE
from scarlet_jax.tools.parity.terminal import sentence

_POINTS = 240  # points of a curve; longer ones keep the largest of each stretch, so that no spike is lost
_HEADS_WITHIN = 1 << 24  # elements of a tap whose heads are still looked at one by one


def render(report: Mapping[str, Any], comparison: Any = None) -> str:
    """The page for a report; with the comparison behind it, curves over tokens and heads too."""
    curves = {} if comparison is None else {tap.name: _curves(tap, comparison) for tap in comparison.taps}
    data = {"report": report, "curves": curves}
    # "<" would end the script element if a model's name held a tag.
    payload = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    title = f"{report['verdict']}: {report['model'] or 'engine parity'}"
    return (
        TEMPLATE.replace("@TITLE@", html.escape(title))
        .replace("@SENTENCE@", html.escape(sentence(report)))
        .replace("@VERDICT@", html.escape(report["verdict"]))
        .replace("@DATA@", payload)
    )


def _curves(tap: Any, comparison: Any) -> dict[str, list[float]]:
    curves = {"tokens": _thin(tap.metrics.tokens)}
    if tap.local is not None:
        curves["local"] = _thin(tap.local.tokens)
    if tap.own:
        return curves
    ours = comparison.views[0][tap.name]
    if ours.size <= _HEADS_WITHIN:
        curves["heads"] = _thin(head_curve(ours, comparison.views[1][tap.name]))
    return curves


def _thin(values: np.ndarray) -> list[float]:
    """At most _POINTS values, each the largest of its stretch; four digits are enough to draw."""
    finite = np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=0.0)
    if finite.size > _POINTS:
        finite = np.array([part.max() for part in np.array_split(finite, _POINTS)])
    return [float(f"{v:.4g}") for v in finite]
