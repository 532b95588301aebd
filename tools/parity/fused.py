"""Several products that one engine makes as one: queries, keys and values, gate and up, beta and alpha.

The fused tap is cut into the taps that the other dump has. Its parts lie one after another in each row, or, where
the projection is stored by key head, one after another within each head; the values choose between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from scarlet_jax.tools.parity.dump import Dump
from scarlet_jax.tools.parity.logs import Sampled

# The fused tap -> its parts, in order. Keys are as wide as values.
PARTS = {
    "wqkv": ("Qcur_full", "Kcur_projected", "Vcur"),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
    "in_proj_qkvz": ("linear_attn_qkv_mixed", "z"),
    "in_proj_ba": ("beta", "alpha"),
}

Cut = Callable[[np.ndarray], np.ndarray]


def separate(dump: Dump, other: Dump) -> Dump:
    """The dump with every fused tap cut into its parts, where the other dump has some of them and not the whole."""
    cuts: dict[str, tuple[str, Cut]] = {}
    for name in dump:
        op, _, layer = name.rpartition("-")
        if op not in PARTS or name in other or isinstance(dump[name], Sampled):
            continue
        for part, cut in _cuts(dump[name], [f"{p}-{layer}" for p in PARTS[op]], other):
            if part not in dump:
                cuts[part] = (name, cut)
    if not cuts:
        return dump
    by_source = {
        whole: [p for p, (source, _) in cuts.items() if source == whole] for whole, _ in cuts.values()
    }
    order = [new for name in dump.order for new in by_source.get(name, [name])]
    weights = dict(dump.weights) | {p: dump.weights[w] for p, (w, _) in cuts.items() if w in dump.weights}
    listed = ", ".join(f"{whole} as {', '.join(parts)}" for whole, parts in list(by_source.items())[:1])
    more = f" and {len(by_source) - 1} more" if len(by_source) > 1 else ""
    return dataclasses.replace(
        dump,
        taps=_Parts(dump.taps, cuts),
        order=order,
        weights=weights,
        notes=[*dump.notes, f"fused taps are compared in parts: {listed}{more}"],
    )


def _cuts(whole: np.ndarray, parts: Sequence[str], other: Dump) -> Iterator[tuple[str, Cut]]:
    """Each part with the function that cuts it out; nothing where the widths do not add up."""
    width = _width(whole)
    widths = {part: _width(other[part]) for part in parts if part in other}
    if len(parts) == 3 and parts[2] in widths:
        widths.setdefault(parts[1], widths[parts[2]])
    missing = [part for part in parts if part not in widths]
    if not widths or len(missing) > 1:
        return
    if missing:
        widths[missing[0]] = width - sum(widths.values())
    if min(widths.values()) <= 0 or sum(widths.values()) != width or not len(whole):
        return
    edges = np.cumsum([0, *(widths[part] for part in parts)])
    ways = [
        {
            part: _slice(int(a), int(b), other[part].shape[1:] if part in other else (int(b - a),))
            for part, a, b in zip(parts, edges, edges[1:], strict=False)
        },
        *_by_head(whole, parts, widths, other),
    ]
    errors = [sum(_error(cut(whole), other[p]) for p, cut in way.items() if p in other) for way in ways]
    best = int(np.argmin(errors))
    yield from ways[best if errors[best] < 0.5 * errors[0] else 0].items()


def _slice(start: int, stop: int, shape: tuple[int, ...]) -> Cut:
    return lambda x: x.reshape(len(x), -1)[:, start:stop].reshape(len(x), *shape)


def _by_head(
    whole: np.ndarray, parts: Sequence[str], widths: Mapping[str, int], other: Dump
) -> Iterator[dict[str, Cut]]:
    """Rows dealt by key head: (q, k, v, z) of one head beside each other, or (beta, alpha)."""
    layer = parts[0].rpartition("-")[2]
    keys = next((other[n] for n in (f"k_conv-{layer}", f"k_conv_predelta-{layer}") if n in other), None)
    if len(parts) != 2 or keys is None or keys.ndim != 3:
        return
    heads, dim = keys.shape[1:]
    first, second = (widths[part] for part in parts)
    if first % heads or second % heads:
        return
    inner = [dim, dim, first // heads - 2 * dim] if parts[0].startswith("linear") else [first // heads]

    def cut(x: np.ndarray, which: int, shape: tuple[int, ...]) -> np.ndarray:
        pieces = np.split(x.reshape(len(x), heads, -1), np.cumsum(inner), axis=-1)
        chosen = pieces[-1:] if which else pieces[:-1]
        return np.concatenate([p.reshape(len(x), -1) for p in chosen], axis=1).reshape(len(x), *shape)

    yield {
        part: lambda x, w=which, s=other[part].shape[1:]: cut(x, w, s)
        for which, part in enumerate(parts)
        if part in other
    }


def _width(x: np.ndarray | Sampled) -> int:
    return x.size // max(1, x.shape[0])


def _error(a: np.ndarray, b: np.ndarray | Sampled) -> float:
    if isinstance(b, Sampled):
        return 0.0
    rows = min(len(a), len(b), 64)
    a, b = (np.asarray(x[:rows], np.float64).reshape(rows, -1) for x in (a, b))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)) if a.shape == b.shape else np.inf


class _Parts(Mapping[str, Any]):
    """Taps with some cut out of others."""

    def __init__(self, taps: Mapping[str, Any], cuts: Mapping[str, tuple[str, Cut]]):
        self._taps, self._cuts = taps, cuts
        self._whole = {source for source, _ in cuts.values()}

    def __getitem__(self, name: str) -> Any:
        if name in self._cuts:
            source, cut = self._cuts[name]
            return cut(self._taps[source])
        return self._taps[name]

    def __contains__(self, name: object) -> bool:
        return name in self._cuts or (name in self._taps and name not in self._whole)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._taps if name not in self._whole)
        yield from self._cuts

    def __len__(self) -> int:
        return len(self._taps) - len(self._whole) + len(self._cuts)
