"""Which arithmetic each engine computes in, found by imitation.

A rounding is believed only when repeating it explains most of what the exact formula leaves over, in the median
of the operations it would touch: that cannot happen by chance, and no fault looks like it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scarlet_jax.tools.parity import graph, local
from scarlet_jax.tools.parity.arithmetic import KV_ROUNDING
from scarlet_jax.tools.parity.dump import Dump
from scarlet_jax.tools.parity.view import Arithmetic

_SAMPLED = 10  # operations looked at for each kind of rounding
_EXPLAINED = 0.5  # share of the residual's norm that must go


def infer(pair: local.Pair, taps: Sequence, dumps: tuple[Dump, Dump]) -> None:
    """Set `pair.arithmetic` and `pair.may_round` for both sides."""
    products = [t for t in taps if _op(t) is not None and _op(t).linear]
    attended = [t for t in taps if t.op in ("kq", "kqv", "attn_pregate") and t.kind == "attention"]
    found = []
    for side in (0, 1):
        matmul = _best(pair, side, products, [Arithmetic(matmul=m) for m in ("partner", "bf16", "tf32")])
        kv = _best(pair, side, attended, [Arithmetic(kv=k) for k in KV_ROUNDING])
        found.append(Arithmetic(matmul.matmul, kv.kv))
    pair.arithmetic = (found[0], found[1])
    pair.may_round = tuple(
        arithmetic.matmul == "partner" or "llama" in dump.engine.lower()
        for arithmetic, dump in zip(found, dumps, strict=True)
    )


def _op(tap) -> graph.Op | None:
    return graph.find(tap.op, tap.kind)


def _best(pair: local.Pair, side: int, taps: Sequence, candidates: Sequence[Arithmetic]) -> Arithmetic:
    """The candidate that explains most, or exact arithmetic."""
    step = max(1, len(taps) // _SAMPLED)
    shares: dict[Arithmetic, list[float]] = {c: [] for c in candidates}
    for tap in taps[::step][: _SAMPLED + 1]:
        for candidate, share in _shares(pair, side, tap, candidates).items():
            shares[candidate].append(share)
    medians = {c: float(np.median(s)) for c, s in shares.items() if s}
    if not medians:
        return Arithmetic()
    best = min(medians, key=lambda c: medians[c])
    return best if medians[best] < _EXPLAINED else Arithmetic()


def _shares(pair: local.Pair, side: int, tap, candidates: Sequence[Arithmetic]) -> dict[Arithmetic, float]:
    """What is left of one tap's residual under each arithmetic; 1 where it explains nothing."""
    run, op = (pair.ours, pair.reference)[side], _op(tap)
    y = np.asarray(run.taps[tap.name], np.float64)

    def residual(arithmetic: Arithmetic) -> float:
        value = op.run(run.view(tap.layer, tap.kind, run.facts, arithmetic=arithmetic))
        return float(np.linalg.norm(y - np.asarray(value, np.float64).reshape(y.shape)))

    try:
        with np.errstate(all="ignore"):
            exact = residual(Arithmetic())
            if exact <= 30 * local.EPS32 * np.linalg.norm(y):  # exact already
                return dict.fromkeys(candidates, 1.0)
            return {c: residual(c) / exact for c in candidates}
    except (graph.Missing, ValueError):
        return {}
