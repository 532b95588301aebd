"""Structures that any broken operation may show: gains, offsets, permutations, shifts, periods, lost precision.

Each function looks at a `Case` and yields hypotheses; what it fits, it fits on the even tokens and scores on the
odd ones (with a single token, on every other channel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from scarlet_jax.tools.parity import formulas, graph
from scarlet_jax.tools.parity.arithmetic import bf16, f16, q8_0
from scarlet_jax.tools.parity.ops_attention import fitted_angles

Make = Callable[..., Any]


def hypotheses(case: Any, pair: Any, make: Make) -> list[Any]:
    """All structural explanations of a case."""
    if not case.ours.size or not np.isfinite(case.ours).all() or not np.isfinite(case.right).all():
        return []
    found: list[Any] = []
    for look in _LOOKS:
        with np.errstate(all="ignore"):
            found += [make(*h) for h in look(case, pair)]
    return found


Found = Iterator[tuple[str, float, str, str, int]]


def _halves(case: Any) -> tuple[Any, Any]:
    """Fitting rows and held-out rows."""
    tokens = len(case.ours)
    return (slice(0, None, 2), slice(1, None, 2)) if tokens > 1 else (slice(None), slice(None))


def _share(case: Any, candidate: np.ndarray, rows: Any = slice(None)) -> float:
    left, whole = (case.ours - candidate)[rows], case.residual[rows]
    energy = float((whole**2).sum())
    if not energy or not np.isfinite(left).all():
        return 0.0
    floor = case.floor**2 * whole.size / case.residual.size
    return 1.0 - max(0.0, float((left**2).sum()) - floor) / energy


def _zeros(case: Any, _: Any) -> Found:
    if not case.ours.any():
        yield "zeros", 1.0, "the output is zero everywhere", "structure", 0


def _gain(case: Any, pair: Any) -> Found:
    fit, held = _halves(case)
    p, y = case.right[fit], case.ours[fit]
    gain = float((p * y).sum() / max((p * p).sum(), 1e-300))
    explained = _share(case, gain * case.right, held)
    if abs(gain + 1) < 0.02:
        yield "sign", explained, f"the output is the right one times {gain:.4g}", "structure", 1
        return
    known = _known_gain(gain, pair.reference.facts, case.right.shape)
    name = "missing-scale" if known else "gain"
    text = f"the output is the right one times {gain:.6g}" + (f" = {known}" if known else "")
    yield name, explained, text, "structure", 1


def _known_gain(gain: float, facts: Any, shape: tuple[int, ...]) -> str:
    """The gain as a power of a dimension or of two, where it is one."""
    dims = {
        "H": facts.head_dim,
        "Dk": facts.key_dim,
        "n": shape[-1],
        "heads": shape[1] if len(shape) > 2 else 0,
    }
    for label, n in dims.items():
        for power, text in ((0.5, "sqrt({})"), (-0.5, "1/sqrt({})"), (1, "{}"), (-1, "1/{}")):
            if n > 1 and abs(gain / n**power - 1) < 5e-3:
                return text.format(f"{label}={n}")
    power = np.log2(abs(gain)) if gain else 0.0
    return f"2^{round(power)}" if round(power) != 0 and abs(power - round(power)) < 5e-3 else ""


def _bias(case: Any, _: Any) -> Found:
    if len(case.ours) < 4 or (case.op is not None and case.op.klass == "embedding"):
        return  # a table's rows have no bias: where their blocks' minima are lost it looks like one
    fit, held = _halves(case)
    bias = case.residual[fit].mean(axis=0)
    explained = _share(case, case.right + bias, held)
    constant = float(np.ptp(bias)) < 1e-3 * float(np.abs(bias).max(initial=0))
    text = (
        f"a constant of {bias.flat[0]:.4g} is added"
        if constant
        else "the same vector is added at every token"
    )
    yield "missing-bias", explained, text, "structure", 2


def _channel_gain(case: Any, _: Any) -> Found:
    if len(case.ours) < 4:
        return
    fit, held = _halves(case)
    p, y = case.right[fit], case.ours[fit]
    gain = (p * y).sum(axis=0) / np.maximum((p * p).sum(axis=0), 1e-300)
    name = "norm-weight" if case.op is not None and case.op.klass == "norm" else "channel-gain"
    yield name, _share(case, gain * case.right, held), "each channel has its own gain", "structure", 8
    if case.ours.ndim == 3:
        gain = (p * y).sum(axis=(0, 2)) / np.maximum((p * p).sum(axis=(0, 2)), 1e-300)
        text = f"each head has its own constant gain, {gain.min():.3g} to {gain.max():.3g}"
        yield "head-gain", _share(case, gain[:, None] * case.right, held), text, "structure", 7


def _token_gain(case: Any, _: Any) -> Found:
    """One gain a token, fitted on even channels and scored on odd ones."""
    flat = (len(case.ours), -1)
    p, y = case.right.reshape(flat), case.ours.reshape(flat)
    if p.shape[1] < 4 or len(p) < 2:
        return
    gain = (p[:, ::2] * y[:, ::2]).sum(axis=1) / np.maximum((p[:, ::2] ** 2).sum(axis=1), 1e-300)
    candidate = gain[:, None] * p
    left, whole = (y - candidate)[:, 1::2], (y - p)[:, 1::2]
    explained = 1 - max(0.0, (left**2).sum() - case.floor**2 / 2) / max((whole**2).sum(), 1e-300)
    text = f"each token has its own gain, {gain.min():.4g} to {gain.max():.4g}"
    yield "token-gain", float(explained), text, "structure", 9


def _shift(case: Any, _: Any) -> Found:
    tokens = len(case.ours)
    for by in (1, -1, 2, -2):
        if tokens <= abs(by) + 2:
            continue
        rows = slice(by, None) if by > 0 else slice(None, by)
        moved = np.roll(case.right, by, axis=0)
        text = f"every row is that of {abs(by)} token{'s' * (abs(by) > 1)} {'earlier' if by > 0 else 'later'}"
        yield "token-shift", _share(case, moved, rows), text, "structure", 1
    if tokens > 3:
        yield "token-order", _share(case, case.right[::-1]), "the tokens are in reverse order", "structure", 1
        yield (
            "stale-row",
            _share(case, np.broadcast_to(case.right[:1], case.right.shape)),
            "every row is the first",
            ("structure"),
            2,
        )


def _heads(case: Any, pair: Any) -> Found:
    """Heads (axis 1 of (T, N, H), or runs of a head's length) exchanged among themselves."""
    shape = case.ours.shape
    facts = pair.reference.facts
    lengths = {shape[-1]} if len(shape) == 3 else {facts.head_dim, facts.key_dim, facts.value_dim}
    for length in sorted(n for n in lengths if n > 1):
        width = int(np.prod(shape[1:]))
        if width % length or width // length < 2:
            continue
        cut = (len(case.ours), -1, length)
        order = _assignment(case.ours.reshape(cut), case.right.reshape(cut))
        if (order == np.arange(len(order))).all():
            continue
        candidate = case.right.reshape(cut)[:, order].reshape(shape)
        text = f"heads are exchanged: ours 0.. are the right {_listed(order)}"
        yield "head-permutation", _share(case, candidate), text, "structure", 1


def _assignment(ours: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each group (axis 1) of ours the group of right that fits it best, one to one."""
    a, b = (x.transpose(1, 0, 2).reshape(x.shape[1], -1) for x in (ours, right))
    cross = a @ b.T
    cost = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * cross
    return linear_sum_assignment(cost)[1]


def _channels(case: Any, _: Any) -> Found:
    """Channels of the last axis exchanged: halves swapped, interleaved, blocks of 32 reordered, any order."""
    n = case.ours.shape[-1] if case.ours.ndim > 1 else 0
    if n < 4:
        return
    named = {"halves swapped": np.roll(np.arange(n), n // 2), "reversed": np.arange(n)[::-1]}
    if n % 2 == 0:
        named["interleaved for halves"] = np.arange(n).reshape(2, -1).T.ravel()
        named["halves for interleaved"] = np.arange(n).reshape(-1, 2).T.ravel()
        named["neighbours swapped"] = np.arange(n).reshape(-1, 2)[:, ::-1].ravel()
    for label, order in named.items():
        explained = _share(case, case.right[..., order])
        yield _order_name(case, order), explained, f"channels {label}", "structure", 2
    if 8 <= n <= 2048 and case.ours.size // n >= 6:
        fit, held = _halves(case)
        a, b = (x[fit].reshape(-1, n).T for x in (case.ours, case.right))
        cost = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
        order = linear_sum_assignment(cost)[1]
        if not (order == np.arange(n)).all():
            text = f"channels are exchanged: ours 0.. are the right {_listed(order)}"
            yield _order_name(case, order), _share(case, case.right[..., order], held), text, "structure", 4


def _order_name(case: Any, order: np.ndarray) -> str:
    """Elements exchanged within the blocks of a quantised row that was looked up are its nibbles."""
    n = len(order)
    blocks = n % 32 == 0 and all(
        (order.reshape(-1, size) // size == np.arange(n // size)[:, None]).all() for size in (32,)
    )
    looked_up = (
        case.op is not None
        and case.op.klass == "embedding"
        and case.tap.qtype not in ("", "F32", "F16", "BF16")
    )
    return "nibble-order" if looked_up and blocks else "channel-permutation"


def _precision(case: Any, _: Any) -> Found:
    for label, rounding in (("bf16", bf16), ("f16", f16), ("int8 blocks", q8_0)):
        text = f"the output is the right one rounded to {label}"
        yield "output-precision", _share(case, rounding(case.right)), text, "structure", 1


def _clip(case: Any, _: Any) -> Found:
    high, low = float(case.ours.max()), float(case.ours.min())
    if case.right.max() > high or case.right.min() < low:
        text = f"the output is limited to {low:.4g} .. {high:.4g}"
        name = "missing-negative" if low == 0 and case.right.min() < 0 else "saturation"
        yield name, _share(case, np.clip(case.right, low, high)), text, "structure", 2


def _soft_cap(case: Any, _: Any) -> Found:
    for cap in (10.0, 15.0, 20.0, 30.0, 50.0, 100.0):
        text = f"the output is {cap:g} tanh(right / {cap:g})"
        yield "soft-cap", _share(case, cap * np.tanh(case.right / cap)), text, "structure", 1


def _part(case: Any, _: Any) -> Found:
    """The residual sits in one part of the array only: some tokens, some heads, some channels."""
    residual = case.residual.reshape(len(case.ours), -1)
    energy = residual**2
    if not energy.any():
        return
    yield from _tokens_hit(case, energy.sum(axis=1))
    yield from _channels_hit(case, energy)


def _tokens_hit(case: Any, rows: np.ndarray) -> Found:
    tokens = len(rows)
    floor = (10 * case.floor) ** 2 / max(1, tokens)
    bad = np.flatnonzero(rows > max(floor, 1e-6 * rows.max()))
    if tokens < 8 or not 0 < len(bad) < 0.9 * tokens:
        return
    inside = float(rows[bad].sum() / rows.sum())
    if list(bad) == [0]:
        yield "first-token", inside, "only the first token is wrong: what it starts from", "structure", 5
    elif bad[0] > 0 and len(bad) >= 0.8 * (tokens - bad[0]):
        name = "chunk-boundary" if bad[0] % 16 == 0 else "late-tokens"
        yield (
            name,
            inside,
            f"tokens 0 to {bad[0] - 1} are right, those from {bad[0]} on wrong",
            "structure",
            5,
        )
    elif bad[-1] < tokens - 1 and len(bad) >= 0.8 * (bad[-1] + 1):
        yield "early-tokens", inside, f"only tokens 0 to {bad[-1]} are wrong", "structure", 5
    else:
        text = f"{len(bad)} of {tokens} tokens are wrong: {_listed(bad)}"
        yield "some-tokens", inside, text, "structure", 10


def _channels_hit(case: Any, energy: np.ndarray) -> Found:
    columns = energy.sum(axis=0)
    floor = (10 * case.floor) ** 2 / max(1, len(columns))
    bad = np.flatnonzero(columns > max(floor, 1e-6 * columns.max()))
    width = len(columns)
    if not 0 < len(bad) < 0.9 * width:
        return
    inside = float(columns[bad].sum() / columns.sum())
    if not case.ours.reshape(len(energy), -1)[:, bad].any():
        yield "zeros", inside, f"{len(bad)} of {width} channels are zero: {_listed(bad)}", "structure", 2
    if case.ours.ndim == 3:
        length = case.ours.shape[-1]
        hit = np.unique(bad // length)
        if len(hit) < case.ours.shape[1] and len(bad) > 0.5 * len(hit) * length:
            text = f"heads {_listed(hit)} of {case.ours.shape[1]} are wrong"
            yield "some-heads", inside, text, "structure", 6
            return
    if len(bad) == bad[-1] - bad[0] + 1:
        where = "last" if bad[-1] == width - 1 else "first" if bad[0] == 0 else "middle"
        text = f"only the {where} channels, {bad[0]} to {bad[-1]} of {width}, are wrong"
        yield "channel-range", inside, text, "structure", 6
        return
    for period in (16, 32, 64, 128, 256):
        phases = np.unique(bad % period)
        if width % period == 0 and width > period and len(phases) <= period // 2:
            text = f"channels {_listed(phases)} of every {period} are wrong"
            yield "channel-period", inside, text, "structure", 6
            return


def _rotation(case: Any, pair: Any) -> Found:
    """Rotated queries or keys: the angles that ours shows, fitted on even heads and scored on odd ones."""
    if case.op is None or case.op.name not in ("Qcur", "Kcur") or case.view is None or case.ours.ndim != 3:
        return
    try:
        x = graph.heads(case.view(f"{case.op.name}_normed"), case.ours.shape[-1])
    except graph.Missing:
        return
    tokens, heads, _ = x.shape
    half = slice(0, None, 2) if heads > 1 else slice(None)
    held = slice(1, None, 2) if heads > 1 else slice(None)
    facts = case.view.facts
    moved = np.abs(case.ours - x).max(axis=(0, 1)) > 1e-5 * np.abs(x).max()
    dims = int(np.flatnonzero(moved).max(initial=-1)) + 1
    for pairs, adjacent in {
        ((dims + 1) // 2, False),
        ((dims + 1) // 2, True),
        (facts.rotary // 2, facts.adjacent),
    }:
        if not pairs or tokens < 3:
            continue
        angle = fitted_angles(x[:, half], case.ours[:, half], pairs, adjacent)
        turned = formulas.rotate(x, angle, adjacent=adjacent)
        left, whole = (case.ours - turned)[:, held], case.residual[:, held]
        explained = 1 - float((left**2).sum()) / max(float((whole**2).sum()), 1e-300)
        yield *_angle_story(angle, pairs, adjacent, facts, explained), "structure", 3


def _angle_story(
    angle: np.ndarray, pairs: int, adjacent: bool, facts: Any, explained: float
) -> tuple[str, float, str]:
    if adjacent != facts.adjacent:
        return (
            "rope-pairing",
            explained,
            f"{'neighbouring' if adjacent else 'half-apart'} dims are rotated together",
        )
    if 2 * pairs != facts.rotary:
        return "rope-partial", explained, f"{2 * pairs} dims are rotated instead of {facts.rotary}"
    turn = np.angle(np.exp(1j * np.diff(angle, axis=0))).mean(axis=0)  # radians a token, for each pair
    if pairs > 1 and abs(turn[0] - 1) < 1e-3 and 0 < turn[1] < 1:
        base = turn[1] ** -pairs
        if facts.rope_base and abs(base / facts.rope_base - 1) > 1e-2:
            return (
                "rope-base",
                explained,
                f"the angles are those of base {base:.4g} instead of {facts.rope_base:g}",
            )
    return (
        "rope-angle",
        explained,
        f"a rotation by other angles: {turn[:3].round(4).tolist()} radians a token",
    )


_LOOKS = (
    _zeros,
    _gain,
    _bias,
    _channel_gain,
    _token_gain,
    _shift,
    _heads,
    _channels,
    _precision,
    _clip,
    _soft_cap,
    _part,
    _rotation,
)


def _listed(values: np.ndarray) -> str:
    shown = ", ".join(str(int(v)) for v in values[:8])
    return shown + (", ..." if len(values) > 8 else "")
