"""The gate before any verdict: is this a measurement of two engines on the same thing at all?

Each check returns one sentence when it fails. A failed check means that no operation may be blamed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scarlet_jax.tools.parity.dump import Dump
from scarlet_jax.tools.parity.logs import Sampled
from scarlet_jax.tools.parity.metrics import Metrics

_SAMPLE = 1 << 14
_SAME = (
    1e-3  # relative difference below which two layers' outputs are one and the same array, shifted or copied
)


def check(
    ours: Dump,
    reference: Dump,
    taps: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    metrics: Mapping[str, Metrics],
) -> str | None:
    """The first reason why the comparison is void, or None."""
    return (
        _tokens(ours, reference, metrics)
        or _model(ours, reference)
        or _not_a_number(metrics)
        or _nothing(taps, metrics)
        or _repeated(ours, "our dump")
        or _repeated(reference, "the reference")
        or _shifted(taps, reference, metrics)
        or _mislabelled(taps, metrics)
        or _other_text(taps, metrics, listed=bool(len(ours.tokens) and len(reference.tokens)))
    )


def _same_rows(metrics: Mapping[str, Metrics]) -> bool:
    """Whether what the layers give is the same, for the rows that were compared."""
    stream = [m.relative_l2 for name, m in metrics.items() if name.startswith("l_out-")]
    return bool(stream) and max(stream) < 0.02


def _tokens(ours: Dump, reference: Dump, metrics: Mapping[str, Metrics]) -> str | None:
    a, b = list(ours.tokens), list(reference.tokens)
    if not a or not b or a == b:
        return None
    long, short, side = (a, b, "our") if len(a) > len(b) else (b, a, "the reference's")
    more = len(long) - len(short)
    if long[more:] == short and more:
        if _same_rows(metrics):
            return None  # padding that attention does not see
        count = "one more token" if more == 1 else f"{more} more tokens"
        return f"other tokens: {side} prompt has {count} in front ({', '.join(map(str, long[:more][:4]))})"
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if at == min(len(a), len(b)):
        return f"other tokens: {len(a)} tokens against {len(b)}, the first {at} equal"
    return f"other tokens: position {at} is {a[at]} against {b[at]}"


def _model(ours: Dump, reference: Dump) -> str | None:
    if ours.arch and reference.arch and ours.arch != reference.arch:
        return f"other model: architecture {ours.arch} against {reference.arch}"
    theirs = {weight: qtype for weight, qtype in reference.weights.values()}
    for weight, qtype in ours.weights.values():
        if theirs.get(weight, qtype) != qtype:
            return f"other model: {weight} is {qtype} against {theirs[weight]}"
    return None


def _not_a_number(metrics: Mapping[str, Metrics]) -> str | None:
    """Dumps without a number in them; NaN that begins somewhere is a finding, not a void measurement."""
    for side, who in ((0, "our dump"), (1, "the reference")):
        bad = [m.not_finite[side] for m in metrics.values() if m.tokens.size]
        if bad and all(bad):
            return f"{who} holds NaN or infinity in every tap"
    for name, m in metrics.items():
        if m.not_finite[1]:
            return f"the reference itself holds NaN or infinity, first in {name}"
        if m.not_finite[0]:
            return None
    return None


def _nothing(
    taps: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], metrics: Mapping[str, Metrics]
) -> str | None:
    """A dump of zeros alone: buffers that nobody filled."""
    if not any(m.size for m in metrics.values()):
        return None
    if all(m.norm == 0 for m in metrics.values()):
        return "the reference is zero in every tap"
    if len(metrics) > 2 and all(m.norm_ratio == 0 for m in metrics.values()):
        return "our dump is zero in every tap"
    return None


def _repeated(dump: Dump, who: str) -> str | None:
    """One layer's arrays written under every layer's name."""
    outputs = _stream(dump)
    if len(outputs) < 3:
        return None
    first = _sample(dump[outputs[0]])
    same = [n for n in outputs[1:] if np.array_equal(_sample(dump[n]), first) and not _adds_nothing(dump, n)]
    if first.any() and len(same) >= max(2, (len(outputs) - 1) // 2):
        return f"{who} repeats one layer: {outputs[0]} and {same[0]} (and {len(same) - 1} more) are identical"
    return None


def _adds_nothing(dump: Dump, name: str) -> bool:
    """Whether the dump shows that a layer's branches are zero, as those of an untrained or emptied layer are."""
    layer = name.rpartition("-")[2]
    mixer = next((op for op in ("linear_attn_out", "attn_output") if f"{op}-{layer}" in dump), "")
    shown = [f"{op}-{layer}" for op in (mixer, "ffn_out") if f"{op}-{layer}" in dump]
    return bool(shown) and not any(_sample(dump[branch]).any() for branch in shown)


def _shifted(taps, reference: Dump, metrics: Mapping[str, Metrics]) -> str | None:
    """Layers numbered from another start, or hidden states taken one layer late."""
    ours, theirs = taps
    names = [n for n in _stream(reference) if n in metrics]
    wrong = [n for n in names if metrics[n].relative_l2 > 10 * _SAME]
    if len(names) < 3 or len(wrong) < len(names) - 1:
        return None
    chain = ["model.input_embed", *_stream(reference)]
    for shift in (1, -1, 2, -2):
        pairs = [
            (n, chain[i + shift]) for i, n in enumerate(chain) if n in names and 0 <= i + shift < len(chain)
        ]
        pairs = [(a, b) for a, b in pairs if b in metrics and ours[a].shape == theirs[b].shape]
        close = [p for p in pairs if _difference(ours[p[0]], theirs[p[1]]) < _SAME]
        if len(pairs) >= 2 and len(close) >= 0.8 * len(pairs):
            return f"layers are shifted by {shift:+d}: our {close[0][0]} is the reference's {close[0][1]}"
    return None


def _mislabelled(taps, metrics: Mapping[str, Metrics]) -> str | None:
    """Hidden states before and after the final norm exchanged."""
    ours, reference = taps
    logits = metrics.get("result_output")
    if logits is not None and logits.relative_l2 > 10 * _SAME:
        return None  # what is computed from them differs too: the norm itself was left out
    ends = [n for n in ("result_norm", "h_nextn") if n in metrics]
    last = [n for n in metrics if n.startswith("l_out-")][-1:]
    for a in (*ends, *last):
        for b in (*ends, *last):
            if (a in ends) == (b in ends) or metrics[a].relative_l2 < 10 * _SAME:
                continue
            x, y = ours[a], reference[b]
            if x.shape == y.shape and _difference(x, y) < _SAME:
                when = "after" if b in ends else "before"
                return f"hidden states {when} the final norm: our {a} is the reference's {b}"
    return None


def _other_text(taps, metrics: Mapping[str, Metrics], listed: bool) -> str | None:
    """Embeddings that say other tokens were run, where the dumps do not list them: rows moved, or some exchanged."""
    name = "model.input_embed"
    if listed or name not in metrics or metrics[name].relative_l2 < 1e-2:
        return None  # the same tokens, by their numbers: then the lookup is at fault
    a, b = (np.asarray(side[name], np.float64) for side in taps)
    for shift in (1, -1, 2, -2):
        x, y = (a[shift:], b[:-shift]) if shift > 0 else (a[:shift], b[-shift:])
        if len(x) > 1 and _difference(x, y) < _SAME:
            return f"other tokens: our embeddings are the reference's moved by {shift:+d}"
    rows = metrics[name].tokens
    unrelated = abs(metrics[name].cosine) < 0.3 and 0.5 < metrics[name].norm_ratio < 2
    if unrelated and len(rows) > 1:
        return "other tokens: the embeddings are unrelated, and the dumps do not both list their tokens"
    if (rows < _SAME).any() and np.median(rows[rows >= _SAME]) > 0.5:
        unlike = int((rows >= _SAME).sum())
        found = [_nearest(a[t], b) for t in np.flatnonzero(rows >= _SAME)[:64]]
        if any(found) or unlike < len(rows) / 2:
            at = int(np.argmax(rows >= _SAME))
            return f"other tokens: {unlike} of {len(rows)} embeddings differ wholly, first at position {at}"
    return None


def _nearest(row: np.ndarray, rows: np.ndarray) -> bool:
    return bool((np.linalg.norm(rows - row, axis=1) < _SAME * np.linalg.norm(row)).any())


def _stream(dump: Dump) -> list[str]:
    """The residual stream after each layer, in order."""
    names = [n for n in dump if n.startswith("l_out-") and n[6:].isdigit()]
    return sorted(names, key=lambda n: int(n[6:]))


def _sample(x: np.ndarray) -> np.ndarray:
    flat = np.reshape(x.values if isinstance(x, Sampled) else x, -1)
    return np.array(flat[:: max(1, flat.size // _SAMPLE)])


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    a, b = _sample(a).astype(np.float64), _sample(b).astype(np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))
