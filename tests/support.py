"""What tests share: the one distance they all quote."""

from __future__ import annotations

import numpy as np


def relative_l2(ours, truth) -> float:
    """||ours - truth|| / ||truth||, in float64; 0 where both are zero, inf for a NaN or another shape."""
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    if ours.shape != truth.shape:
        return np.inf
    error, size = np.linalg.norm(ours - truth), np.linalg.norm(truth)
    if not np.isfinite(error):
        return np.inf
    return float(error / size) if size else float(error and np.inf)
