"""Structures that any broken operation may show: gains, offsets, permutations, shifts, periods, lost precision.

Each function looks at a `Case` and yields hypotheses; what it fits, it fits on the even tokens and scores on the
odd ones (with a single token, on every other channel).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from scarlet_jax.tools.parity.arithmetic import Rounding, bf16, f16, q8_0
from scarlet_jax.tools.parity.case import listed, other_rows
from scarlet_jax.tools.parity.operands import channel_orders

Make = Callable[..., Any]
Found = Iterator[tuple[str, float, str, str, int]]
Look = Callable[[Any, Any], Found]


def hypotheses(case: Any, pair: Any, make: Make, looks: Sequence[Look] | None = None) -> list[Any]:
    """All structural explanations of a case, or those of some `looks`."""
    if not case.ours.size or not np.isfinite(case.ours).all() or not np.isfinite(case.right).all():
        return []
    found: list[Any] = []
    for look in _LOOKS if looks is None else looks:
        with np.errstate(all="ignore"):
            found += [make(*h) for h in look(case, pair)]
    return found


def _zeros(case: Any, _: Any) -> Found:
    if not case.ours.any():
        yield "zeros", 1.0, "the output is zero everywhere", "structure", 0


def _gain(case: Any, pair: Any) -> Found:
    fit, held = case.halves()
    p, y = case.right[fit], case.ours[fit]
    gain = _least(p, y)
    explained = case.share(gain * case.right, held)
    if abs(gain + 1) < 0.02:
        yield "sign", explained, f"the output is the right one times {gain:.4g}", "structure", 1
        return
    known = _known_gain(gain, pair.reference.facts, case.right.shape)
    if explained < _EXACT:
        return
    name = "missing-scale" if known else "gain"
    text = f"the output is the right one times {gain:.6g}" + (f" = {known}" if known else "")
    yield name, explained, text, "structure", 1


_EXACT = 0.9995  # one factor for everything leaves nothing but noise


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
    fit, held = case.halves()
    bias = case.residual[fit].mean(axis=0)
    explained = case.share(case.right + bias, held)
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
    fit, held = case.halves()
    p, y = case.right[fit], case.ours[fit]
    gain = (p * y).sum(axis=0) / np.maximum((p * p).sum(axis=0), 1e-300)
    name = "norm-weight" if case.op is not None and case.op.klass == "norm" else "channel-gain"
    yield name, case.share(gain * case.right, held), "each channel has its own gain", "structure", 8
    if case.ours.ndim == 3:
        gain = (p * y).sum(axis=(0, 2)) / np.maximum((p * p).sum(axis=(0, 2)), 1e-300)
        text = f"each head has its own constant gain, {gain.min():.3g} to {gain.max():.3g}"
        yield "head-gain", case.share(gain[:, None] * case.right, held), text, "structure", 7


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

    if p.size < 3 * len(p) or case.ours.ndim != 3 or case.ours.shape[2] < 4:
        return
    even = np.arange(case.ours.shape[2]) % 2 == 0
    energy = np.maximum((case.right[..., even] ** 2).sum(-1, keepdims=True), 1e-300)
    gains = (case.right[..., even] * case.ours[..., even]).sum(-1, keepdims=True) / energy
    explained = case.share(gains * case.right, (slice(None), slice(None), ~even))
    text = f"each head of each token has its own gain, {gains.min():.4g} to {gains.max():.4g}"
    yield "token-gain", explained, text, "structure", 9


def _token_offset(case: Any, _: Any) -> Found:
    """One constant a token, fitted on even channels and scored on odd ones."""
    flat = (len(case.ours), -1)
    residual = case.residual.reshape(flat)
    if residual.shape[1] < 8:
        return
    right = case.right.reshape(flat)
    top = right.max(axis=1, keepdims=True)
    total = top + np.log(np.exp(right - top).sum(axis=1, keepdims=True))
    text = "the logarithm of the sum of exponentials is subtracted from every row"
    yield "log-softmax", case.share((right - total).reshape(case.ours.shape)), text, "structure", 1
    even = np.arange(residual.shape[1]) % 2 == 0
    offset = residual[:, even].mean(axis=1, keepdims=True)
    left = ((residual - offset)[:, ~even] ** 2).sum() - case.floor**2 / 2
    explained = 1 - max(0.0, float(left)) / max(float((residual[:, ~even] ** 2).sum()), 1e-300)
    text = f"each token has its own constant added, {offset.min():.4g} to {offset.max():.4g}"
    yield "token-offset", explained, text, "structure", 9


def _copies(case: Any, _: Any) -> Found:
    """Wrong rows, heads, or channels of the last axis, that are right ones of another place: stale or overwritten."""
    if case.hit is None or case.ours.size > 1 << 22:
        return
    for axis, word in _axis_words(case).items():
        a, b = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (case.ours, case.right))
        hit = np.moveaxis(case.wrong, axis, 0).reshape(a.shape)
        wrong = np.flatnonzero(hit.sum(axis=1) >= _TELLING)
        if not 0 < len(wrong) <= min(256, 0.9 * len(a)):
            continue
        source = {int(i): _nearest(a[i], b, hit[i]) for i in wrong}
        candidate = b.copy()
        for i, j in source.items():
            candidate[i] = np.where(hit[i], b[j], b[i])
        back = np.moveaxis(candidate.reshape(np.moveaxis(case.ours, axis, 0).shape), 0, axis)
        pairs = ", ".join(f"{i} is {j}" for i, j in list(source.items())[:4])
        name = {"token": "stale-row", "head": "head-permutation", "key": "kv-cache"}.get(word, "channel-copy")
        name = _copied_row(case, source) if word == "token" else name
        yield name, case.share(back), f"{word}s hold what others should: {pairs}", "structure", 4


_TELLING = 8  # wrong elements: some other row is like fewer by chance


def _axis_words(case: Any) -> dict[int, str]:
    """Axis -> what runs along it."""
    last = case.ours.ndim - 1
    if "state" in case.tap.op:
        return {0: "head"}
    heads = {1: "head"} if last == 2 else {}
    return {0: "token"} | heads | {last: "key" if case.tap.op == "kq" else "channel"}


def _copied_row(case: Any, source: dict[int, int]) -> str:
    """A token's experts exchanged; in a table other ids' rows; all others have stayed from another token."""
    if case.experts is not None:
        slots = len(case.ours) // max(1, len(case.view("ffn_moe_topk")))
        return "slot-permutation" if all(i // slots == j // slots for i, j in source.items()) else "stale-row"
    if case.op is None or case.op.klass != "embedding" or case.view is None:
        return "stale-row"
    ids = np.asarray(case.view.facts.tokens)[slice(*case.view.facts.kept)]
    if len(ids) != len(case.ours):
        return "wrong-row"
    copied = {i: j for i, j in source.items() if np.allclose(case.ours[i], case.right[j], rtol=1e-3)}
    return other_rows(ids[list(copied)], ids[list(copied.values())])


def _nearest(row: np.ndarray, rows: np.ndarray, where: np.ndarray) -> int:
    return int(((rows[:, where] - row[where]) ** 2).sum(axis=1).argmin())


def _started(case: Any, _: Any) -> Found:
    """A carried state that the reference starts empty."""
    if case.op is not None and case.op.source and "state" in case.op.name and not case.right.any():
        yield "state-reset", 1.0, "the run starts from a state that is not empty", "structure", 1


def _shift(case: Any, _: Any) -> Found:
    tokens = len(case.ours)
    for by in (1, -1, 2, -2):
        if tokens <= abs(by) + 2:
            continue
        rows = slice(by, None) if by > 0 else slice(None, by)
        moved = np.roll(case.right, by, axis=0)
        where = f"of {abs(by)} token{'s' * (abs(by) > 1)} {'earlier' if by > 0 else 'later'}"
        yield "token-shift", case.share(moved, rows), f"every row is that {where}", "structure", 1
        gain = _least(moved[rows], case.ours[rows])
        text = f"every row is {gain:.4g} times that {where}"
        yield "token-shift", case.share(gain * moved, rows), text, "structure", 3
        gain = _least(moved[rows], case.residual[rows])
        text = f"{gain:.4g} times the row {where} is added to every row"
        yield "stale-row", case.share(case.right + gain * moved, rows), text, "structure", 3
    if tokens > 3:
        yield "token-order", case.share(case.right[::-1]), "the tokens are in reverse order", "structure", 1
        yield from _same_rows(case)


def _same_rows(case: Any) -> Found:
    """One token's row at every token."""
    if np.linalg.norm(case.ours - case.ours[:1]) < 1e-3 * np.linalg.norm(case.ours):
        rows = case.right.reshape(len(case.right), -1)
        token = _nearest(case.ours[0].ravel(), rows, np.ones(rows.shape[1], bool))
        explained = case.share(np.broadcast_to(case.right[token], case.right.shape))
        yield "stale-row", explained, f"every row is that of token {token}", "structure", 2


def _one_row(case: Any, _: Any) -> Found:
    """Wrong tokens that hold one row among them, whosever it is."""
    if case.hit is None or len(case.hit[0]) < 4:
        return
    first, others = case.hit[0][0], case.hit[0][1:]
    candidate = case.right.copy()
    candidate[others] = case.ours[first]
    looked_up = case.op is not None and case.op.klass == "embedding"
    text = f"tokens {listed(case.hit[0])} hold one and the same row"
    yield "token-clamp" if looked_up else "stale-row", case.share(candidate, others), text, "structure", 5


def _id_offset(case: Any, _: Any) -> Found:
    """Wrong tokens hold the rows of ids that lie by one number beside, as far as those are in the prompt."""
    if case.op is None or case.op.klass != "embedding" or case.view is None:
        return
    ids = np.asarray(case.view.facts.tokens)[slice(*case.view.facts.kept)]
    wrong = np.arange(len(case.ours)) if case.hit is None else case.hit[0]
    if len(ids) != len(case.ours):
        return
    where = {int(i): t for t, i in enumerate(ids)}
    everywhere = np.ones(case.ours.shape[1:], bool).ravel()
    rows = case.right.reshape(len(ids), -1)
    nearest = {t: _nearest(case.ours[t].ravel(), rows, everywhere) for t in wrong[:_TELLING]}
    for by in {int(ids[j] - ids[t]) for t, j in nearest.items()}:
        told = np.array([t for t in wrong if int(ids[t]) + by in where], int)
        if len(told) < 4:
            continue
        candidate = case.right.copy()
        candidate[told] = case.right[[where[int(ids[t]) + by] for t in told]]
        text = (
            f"wrong tokens hold the rows of their ids {by:+d}, of which {len(told)} of {len(wrong)} are shown"
        )
        yield "token-offset", case.share(candidate, told), text, "structure", 5


def _least(x: np.ndarray, y: np.ndarray) -> float:
    """The factor that brings x nearest to y."""
    return float((x * y).sum() / max((x * x).sum(), 1e-300))


def _heads(case: Any, pair: Any) -> Found:
    """Heads (axis 1 of (T, N, H), or runs of a head's length) exchanged among themselves."""
    shape = case.ours.shape
    facts = pair.reference.facts
    lengths = {shape[-1]} if len(shape) == 3 else {facts.head_dim, facts.key_dim, facts.value_dim}
    for length in sorted(n for n in lengths if n > 1):
        width = int(np.prod(shape[1:]))
        if width % length or not 2 <= width // length <= _MANY:
            continue
        cut = (len(case.ours), -1, length)
        order = _assignment(case.ours.reshape(cut), case.right.reshape(cut))
        if (order == np.arange(len(order))).all():
            continue
        candidate = case.right.reshape(cut)[:, order].reshape(shape)
        text = f"heads are exchanged: ours 0.. are the right {listed(order)}"
        mixer = case.op is None or len(shape) == 3 or case.op.klass in ("ssm", "attention")
        name = "head-permutation" if mixer else "channel-permutation"
        yield name, case.share(candidate), text, "structure", 1


_MANY = 2048  # groups: of more, each is not held against each other one


def _assignment(ours: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each group (axis 1) of ours the group of right that fits it best, one to one."""
    a, b = (x.transpose(1, 0, 2).reshape(x.shape[1], -1) for x in (ours, right))
    cross = a @ b.T
    cost = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * cross
    return linear_sum_assignment(cost)[1]


def _channels(case: Any, _: Any) -> Found:
    """Channels of the last axis exchanged: halves swapped, interleaved, blocks of 32 reordered, any order."""
    n = case.ours.shape[-1] if case.ours.ndim > 1 else 0
    if n < 2:
        return
    for label, order in channel_orders(n).items():
        explained = case.share(case.right[..., order])
        yield _order_name(case, order), explained, f"channels {label}", "structure", 2
        if case.op is not None and case.op.normed is not None and len(case.ours) > 3:
            fit, held = case.halves()
            moved = case.right[..., order]
            over = tuple(range(moved.ndim - 1))
            gain = (moved * case.ours)[fit].sum(axis=over) / np.maximum(
                (moved**2)[fit].sum(axis=over), 1e-300
            )
            text = f"channels {label} before each has its gain"
            yield _order_name(case, order), case.share(gain * moved, held), text, "structure", 7
    if n <= _MANY and case.ours.size // n >= 6:
        fit, held = case.halves()
        a, b = (x[fit].reshape(-1, n).T for x in (case.ours, case.right))
        cost = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
        order = linear_sum_assignment(cost)[1]
        if not (order == np.arange(n)).all():
            text = f"channels are exchanged: ours 0.. are the right {listed(order)}"
            yield _order_name(case, order), case.share(case.right[..., order], held), text, "structure", 4


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
        yield "output-precision", case.share(rounding(case.right)), text, "structure", 1


def _on_grid(case: Any, _: Any) -> Found:
    """Our values are numbers of a short format and the right ones are not: sums were kept, or results stored, in it."""
    for label, rounding in (("bf16", bf16), ("f16", f16)):
        ours, right = (float(np.mean(_is_nearly(x, rounding))) for x in (case.ours, case.right))
        step = np.linalg.norm(rounding(case.right) - case.right)
        if ours > 0.99 and right < 0.5 and np.linalg.norm(case.residual) < _ROUNDINGS * step:
            text = f"{ours:.1%} of our values are numbers of {label}, {right:.1%} of the right ones"
            yield "output-precision", 1.0, text, "structure", 1


_ROUNDINGS = 32  # more errors of one rounding than a sum in a short format collects


def _is_nearly(x: np.ndarray, rounding: Rounding) -> np.ndarray:
    return np.abs(rounding(x) - x) <= 2.0**-22 * np.abs(x)


def _noise(case: Any, _: Any) -> Found:
    """A sum, or a product with a plain matrix, wrong by little and as by rounding: even, normal, unlike the output.

    Not where the matrix is stored in blocks of few bits: those misread look the same.
    """
    if (
        case.op is None
        or not (case.op.linear or case.op.summed)
        or case.tap.qtype not in ("", "F32", "F16", "BF16")
    ):
        return
    residual, right = (x.reshape(len(x), -1) for x in (case.residual, case.right))
    size = np.linalg.norm(residual) / max(np.linalg.norm(right), 1e-300)
    if residual.size < 1024 or not 0 < size < 0.03 or case.hit is not None:
        return
    alike = abs(np.vdot(residual, right)) / (np.linalg.norm(residual) * np.linalg.norm(right))
    scaled = residual / np.sqrt(np.mean(residual**2, axis=1, keepdims=True))
    peaked = float(np.mean(scaled**4))
    uneven = max(_unevenness(residual), _unevenness(residual.T))
    if alike < 0.05 and 2 < peaked < 4 and uneven < 4:
        text = f"errors of {size:.1g} that look like rounding: as large everywhere, unlike the output"
        yield "low-precision", 1.0, text, "structure", 2


def _unevenness(x: np.ndarray) -> float:
    """The largest over the median root mean square of the rows."""
    rows = np.sqrt(np.mean(x**2, axis=1))
    return float(rows.max() / max(np.median(rows), 1e-300))


def _race(case: Any, _: Any) -> Found:
    """A few elements anywhere, large and small alike: whatever went wrong does not depend on what was computed."""
    wrong = case.wrong
    if not _by_token(case) or not 8 <= wrong.sum() <= 0.03 * wrong.size:
        return
    inside = wrong if case.hit is None else wrong[np.ix_(*case.hit)]
    usual, hit = (float(np.mean(np.abs(x))) for x in (case.right, case.right[wrong]))
    if inside.mean() < 0.2 and 0.5 < hit / usual < 2:
        text = f"{int(wrong.sum())} of {wrong.size} elements are wrong, anywhere and of any size"
        yield "race", 1.0, text, "structure", 1


def _by_token(case: Any) -> bool:
    """Whether a token's output follows from that token's inputs alone."""
    return case.op is not None and bool(case.op.linear or case.op.pointwise or case.op.summed)


def _garbage(case: Any, _: Any) -> Found:
    """One block of tokens and channels that has nothing to do with what it should be, in an operation by token."""
    if case.hit is None or not _by_token(case):
        return
    at = np.ix_(*case.hit)
    ours, right = case.ours[at].ravel(), case.right[at].ravel()
    block = all(
        len(i) == i[-1] - i[0] + 1 or len(i) >= 0.9 * n
        for i, n in zip(case.hit, case.ours.shape, strict=True)
    )
    if not block or ours.size < 32 or not ours.any():
        return
    alike = abs(np.vdot(ours, right)) / max(np.linalg.norm(ours) * np.linalg.norm(right), 1e-300)
    if alike < 3 / ours.size**0.5 and case.wrong[at].mean() > 0.99:
        text = f"{case.where()} hold numbers that have nothing to do with what they should be"
        yield "garbage", 1.0, text, "structure", 1


def _grid(case: Any, _: Any) -> Found:
    """Whole numbers times one scale: for everything, a token, a channel or a run along the last axis."""
    axes = tuple(range(case.right.ndim))
    groups = {"one scale for all": axes, "a scale a token": axes[1:], "a scale a row": axes[-1:]}
    if len(case.ours) > 3:
        groups["a scale a channel"] = axes[:1]
    for label, over in groups.items():
        for levels in (127, 7):
            step = np.abs(case.right).max(axis=over, keepdims=True) / levels if over else 0
            if np.any(step):
                step = np.where(step, step, 1)
                text = f"the output is the right one as integers to {levels}, {label}"
                candidate = np.rint(case.right / step) * step
                yield "output-precision", case.share(candidate), text, "structure", 2


def _axes(case: Any, pair: Any) -> Found:
    """The right numbers read in another order of axes: a view where a transposition was meant, or the other way."""
    shape, facts = case.right.shape, pair.reference.facts
    cut = {shape} if len(shape) == 3 else set()
    if len(shape) == 2:
        dims = (facts.head_dim, facts.key_dim, facts.value_dim)
        cut = {shape} | {
            (shape[0], shape[1] // d, d) for d in dims if d and shape[1] % d == 0 and shape[1] > d
        }
    for form in sorted(cut):
        for order in itertools.permutations(range(len(form))):
            if order == tuple(range(len(form))):
                continue
            turned = [form[a] for a in order]
            for label, x in (
                ("laid out", case.right.reshape(form).transpose(order).reshape(shape)),
                ("taken to lie", case.right.reshape(turned).transpose(np.argsort(order)).reshape(shape)),
            ):
                text = f"the right numbers {label} with axes {list(order)} of {list(form)}"
                name = "channel-permutation" if order[0] == 0 else "axis-order"
                yield name, case.share(x), text, "structure", 3


def _clip(case: Any, _: Any) -> Found:
    high, low = float(case.ours.max()), float(case.ours.min())
    if case.right.max() > high or case.right.min() < low:
        text = f"the output is limited to {low:.4g} .. {high:.4g}"
        name = "missing-negative" if low == 0 and case.right.min() < 0 else "saturation"
        yield name, case.share(np.clip(case.right, low, high)), text, "structure", 2


def _soft_cap(case: Any, _: Any) -> Found:
    for cap in (10.0, 15.0, 20.0, 30.0, 50.0, 100.0):
        text = f"the output is {cap:g} tanh(right / {cap:g})"
        yield "soft-cap", case.share(cap * np.tanh(case.right / cap)), text, "structure", 1


def _part(case: Any, _: Any) -> Found:
    """The residual sits in one part of the array only: some tokens, some heads, some channels."""
    residual = case.residual.reshape(len(case.ours), -1)
    energy = residual**2
    if not energy.any():
        return
    yield from _tokens_hit(case, energy.sum(axis=1))
    yield from _channels_hit(case, energy)
    wrong = case.wrong
    if wrong.mean() < 0.1 and case.hit is None:
        text = (
            f"{int(wrong.sum())} of {wrong.size} elements are wrong, scattered over all tokens and channels"
        )
        inside = float(energy[wrong.reshape(energy.shape)].sum() / energy.sum())
        yield "scattered", inside, text, "structure", 11


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
        looks_back = case.op is not None and case.op.name in ("conv_output_raw", "attn_output")
        name = "chunk-boundary" if bad[0] % 16 == 0 and looks_back else "late-tokens"
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
        text = f"{len(bad)} of {tokens} tokens are wrong: {listed(bad)}"
        yield "some-tokens", inside, text, "structure", 10
    if not case.ours.reshape(tokens, -1)[bad].any():
        yield "zeros", inside, f"tokens {listed(bad)} of {tokens} are zero", "structure", 2


def _channels_hit(case: Any, energy: np.ndarray) -> Found:
    columns = energy.sum(axis=0)
    floor = (10 * case.floor) ** 2 / max(1, len(columns))
    bad = np.flatnonzero(columns > max(floor, 1e-6 * columns.max()))
    width = len(columns)
    if not 0 < len(bad) < 0.9 * width:
        return
    inside = float(columns[bad].sum() / columns.sum())
    if not case.ours.reshape(len(energy), -1)[:, bad].any():
        yield "zeros", inside, f"{len(bad)} of {width} channels are zero: {listed(bad)}", "structure", 2
    if case.ours.ndim == 3:
        length = case.ours.shape[-1]
        hit = np.unique(bad // length)
        if len(hit) < case.ours.shape[1] and len(bad) > 0.5 * len(hit) * length:
            text = f"heads {listed(hit)} of {case.ours.shape[1]} are wrong"
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
            text = f"channels {listed(phases)} of every {period} are wrong"
            yield "channel-period", inside, text, "structure", 6
            return


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
    _grid,
    _axes,
    _clip,
    _soft_cap,
    _token_offset,
    _copies,
    _one_row,
    _id_offset,
    _started,
    _part,
)
# What is said where nothing else explains the residual: they tell its nature and not how it came about.
LAST = (_race, _garbage, _on_grid, _noise)
# What some tokens, heads or channels may have on their own.
IN_PART = (_zeros, _gain, _bias, _channel_gain, _shift, _heads, _channels, _precision, _clip, _token_offset)
