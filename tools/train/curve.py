"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib  # pyright: ignore[reportMissingImports] (the train extra)
import numpy as np

matplotlib.use("agg")  # draws into files, on machines without a screen too
from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

WINDOW = 50  # steps that the smooth line averages


def draw(path: Path, losses: Sequence[float]) -> None:
    """Every step's loss in nats, and a running mean."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, linewidth=0.5, alpha=0.4, label="each step")
    if len(losses) >= WINDOW:
        smooth = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid")
        axes.plot(np.arange(len(smooth)) + WINDOW - 1, smooth, label=f"mean of {WINDOW}")
    axes.set(xlabel="step", ylabel="weighted cross-entropy (nats)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
