"""How two arrays differ: never one number, always with its denominator, streamed so that size does not matter."""

from __future__ import annotations

import dataclasses
import mmap

import numpy as np

_CHUNK = 1 << 20  # elements looked at together: large enough for numpy, small enough for any cache and memory


_RELEASE_EVERY = 16  # chunks, 64 MiB a side


def release(array: np.ndarray) -> None:
    """Give the pages of a memory-mapped array back; they are read again if asked for."""
    base = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Differences of ours from the reference.

    Attributes:
        relative_l2: |ours - ref| / |ref| (infinite where only the reference is zero).
        norm_ratio: |ours| / |ref|.
        cosine: ours . ref / (|ours| |ref|).
        max_abs: largest |ours - ref|.
        max_at: its index.
        tokens: |ours_t - ref_t| / |ref_t| for each index of the first axis.
        not_finite: NaN or infinite elements of ours and of the reference.
        norm: |ref|.
        size: elements compared.
    """

    relative_l2: float
    norm_ratio: float
    cosine: float
    max_abs: float
    max_at: tuple[int, ...]
    tokens: np.ndarray
    not_finite: tuple[int, int]
    norm: float
    size: int = 0


def measure(ours: np.ndarray, ref: np.ndarray) -> Metrics:
    """Metrics of two arrays of one shape; elements that are not finite in either are left out of the sums."""
    shape = ours.shape
    if not ours.size:
        return Metrics(0.0, 1.0, 1.0, 0.0, (), np.zeros(0), (0, 0), 0.0)
    rows = shape[0] if ours.ndim else 1
    ours, ref = ours.reshape(max(rows, 1), -1), ref.reshape(max(rows, 1), -1)
    step = max(1, _CHUNK // max(1, ours.shape[1]))
    sums = []
    for start in range(0, max(rows, 1), step):
        sums.append(_sums(ours[start : start + step], ref[start : start + step]))
        if start // step % _RELEASE_EVERY == _RELEASE_EVERY - 1:
            release(ours)
            release(ref)
    difference, own, other, dot = (np.concatenate([s[i] for s in sums]) for i in range(4))
    peaks = [s[4] for s in sums]
    best = int(np.argmax([value for value, _ in peaks]))
    flat_at = best * step * ours.shape[1] + peaks[best][1]
    total = [float(part.sum()) for part in (difference, own, other, dot)]
    return Metrics(
        relative_l2=_ratio(total[0], total[2]) ** 0.5,
        norm_ratio=_ratio(total[1], total[2]) ** 0.5,
        cosine=_cosine(*total[1:]),
        max_abs=peaks[best][0],
        max_at=tuple(int(i) for i in np.unravel_index(flat_at, shape)) if shape and ours.size else (),
        tokens=np.sqrt(np.divide(difference, other, out=np.zeros_like(difference), where=other > 0)),
        not_finite=(sum(s[5] for s in sums), sum(s[6] for s in sums)),
        norm=total[2] ** 0.5,
        size=int(ours.size),
    )


def head_curve(ours: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """|ours - ref| / |ref| for each head (T, N, H) or each of up to 64 equal runs of channels (T, D)."""
    if ours.ndim < 2 or not ours.size:
        return np.zeros(0)
    groups = ours.shape[1] if ours.ndim == 3 else max(n for n in range(1, 65) if ours.shape[1] % n == 0)
    difference, energy = np.zeros(groups), np.zeros(groups)
    step = max(1, _CHUNK // max(1, ours[0].size))
    for start in range(0, len(ours), step):
        rows = slice(start, start + step)
        a, b = (x[rows].reshape(len(x[rows]), groups, -1) for x in (ours, ref))
        a, b = _finite(a.astype(np.float64), b.astype(np.float64))
        difference += ((a - b) ** 2).sum(axis=(0, 2))
        energy += (b * b).sum(axis=(0, 2))
    return np.sqrt(np.divide(difference, energy, out=np.zeros(groups), where=energy > 0))


def _sums(ours: np.ndarray, ref: np.ndarray):
    """Row sums of squared difference, ours^2, ref^2, ours.ref; the largest difference; counts of non-finite."""
    a, b = np.asarray(ours), np.asarray(ref)
    if a.dtype.kind != "f" or b.dtype.kind != "f" or a.dtype != b.dtype:
        a, b = a.astype(np.float64), b.astype(np.float64)
    bad = (0, 0)
    with np.errstate(all="ignore"):
        d = a - b
        own, other, difference = (_squares(x) for x in (a, b, d))
    if not (np.isfinite(own).all() and np.isfinite(other).all()):
        bad = (int(a.size - np.isfinite(a).sum()), int(b.size - np.isfinite(b).sum()))
        a, b = _finite(a.astype(np.float64), b.astype(np.float64))
        d = a - b
        own, other, difference = (_squares(x) for x in (a, b, d))
    dot = (own + other - difference) / 2
    if not d.size:
        return difference, own, other, dot, (0.0, 0), *bad
    low, high = int(d.argmin()), int(d.argmax())
    at = low if -d.flat[low] > d.flat[high] else high
    return difference, own, other, dot, (float(abs(d.flat[at])), at), *bad


def _squares(x: np.ndarray) -> np.ndarray:
    """Each row's sum of squares, float64; f32 rows are summed as such where no square is out of its range."""
    sums = np.vecdot(x, x).astype(np.float64)
    if x.dtype == np.float64 or ((sums > _FEW).all() and np.isfinite(sums).all()) or not x.any():
        return sums
    wide = x.astype(np.float64)
    return np.vecdot(wide, wide)


_FEW = 1e-30  # a sum of f32 squares below this has lost some of them


def _finite(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ok = np.isfinite(a) & np.isfinite(b)
    return np.where(ok, a, 0), np.where(ok, b, 0)


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else (0.0 if a == 0 else float("inf"))


def _cosine(own: float, other: float, dot: float) -> float:
    if own == 0 or other == 0:
        return 1.0 if own == other else 0.0
    return max(-1.0, min(1.0, dot / (own * other) ** 0.5))
