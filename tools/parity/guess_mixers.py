"""Guesses at attention, rotation, convolution and the delta rule: heads, slots, positions and chunks gone astray."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from scarlet_jax.tools.parity import formulas as f
from scarlet_jax.tools.parity.arithmetic import ROUNDINGS
from scarlet_jax.tools.parity.case import Case, listed
from scarlet_jax.tools.parity.graph import Missing, heads
from scarlet_jax.tools.parity.guess import Guess, exponential_of, of, per_group
from scarlet_jax.tools.parity.ops_attention import all_scores, angles, fitted_angles
from scarlet_jax.tools.parity.ops_delta import by_chunk, conv_by_chunk, conv_input, delta, key_heads

_CHUNKS = (8, 16, 32, 64, 128, 256, 512)
_HEADS = 32  # with more, not every pairing is tried


# --- attention -------------------------------------------------------------------------------------------------


@of("kq_soft_max")
def _mask(case: Case) -> Iterator[Guess]:
    """The right scores, and whatever keys our zeros say that each token sees."""
    scores = all_scores(case.view) * case.view.facts.head_dim**-0.5
    seen = case.ours > 0
    causal = f.causal_mask(scores.shape[0], scores.shape[2])[:, None]
    if (seen == causal).all():
        return
    lost, extra = (int(x.any(axis=1).sum()) for x in (causal & ~seen, seen & ~causal))
    text = f"mask, {lost} pairs of query and key that should be seen are not, {extra} that should not are"
    yield text, f.softmax(np.where(seen, scores, -np.inf))


@of("kq_soft_max")
def _exponential(case: Case) -> Iterator[Guess]:
    """Another function in place of the exponential, where the largest score was not looked for among those seen."""
    scores = all_scores(case.view) * case.view.facts.head_dim**-0.5
    below = scores - scores.max(axis=-1, keepdims=True)
    for x, word in ((below, "scores below the largest, seen or not"), (scores, "scores as they are")):
        yield from exponential_of(case, x.reshape(case.ours.shape), word)


@of("kq")
def _key_heads(case: Case) -> Iterator[Guess]:
    q, k = (heads(case.view(name), case.view.facts.head_dim) for name in ("Qcur", "Kcur"))
    if k.shape[1] < 2 or k.shape[1] > _HEADS:
        return
    right = case.right != 0
    all_read = [
        np.where(right, f.scores(q, k, np.full(q.shape[1], n)), 0).reshape(case.ours.shape)
        for n in range(k.shape[1])
    ]
    chosen, best = per_group(case, all_read)
    yield f"head-permutation, query heads read key heads {chosen.tolist()}", best


@of("kq")
def _neighbouring_slots(case: Case) -> Iterator[Guess]:
    """Wrong scores are those of the slot beside: a key that was not stored yet, or was overwritten."""
    for by, word in ((1, "before"), (-1, "after")):
        beside = np.where(case.wrong, np.roll(case.right, by, axis=2), case.right)
        yield f"kv-cache, wrong scores are those of the key {word}", beside


@of("kqv", "attn_pregate")
def _value_heads(case: Case) -> Iterator[Guess]:
    p, v = case.view("kq_soft_max"), heads(case.view("Vcur"), case.view.facts.head_dim)
    if v.shape[1] < 2 or v.shape[1] > _HEADS:
        return
    mixed = [f.mix(p[:, :, : len(v)], v, np.full(p.shape[1], n)) for n in range(v.shape[1])]
    chosen, best = per_group(case, mixed)
    yield f"head-permutation, query heads read value heads {chosen.tolist()}", best


@of("kqv", "attn_pregate")
def _value_slots(case: Case) -> Iterator[Guess]:
    """Each value slot with a weight of its own: those of -1 are missing from the cache."""
    p, v = case.view("kq_soft_max"), heads(case.view("Vcur"), case.view.facts.head_dim)
    slots, ours = min(p.shape[2], len(v)), case.residual.reshape(len(p), p.shape[1], -1)
    if slots > 512:
        return
    read = np.arange(p.shape[1]) // (p.shape[1] // v.shape[1])
    gram, right = np.zeros((slots, slots)), np.zeros(slots)
    for n, k in enumerate(read):
        a, b = p[:, n, :slots], v[:slots, k]
        gram += (a.T @ a) * (b @ b.T)
        right += ((a.T @ ours[:, n]) * b).sum(1)
    weight, *_ = np.linalg.lstsq(gram, right, rcond=1e-12)
    off = np.flatnonzero(np.abs(weight) > 0.05)
    if not 0 < len(off) < 0.5 * slots:
        return
    candidate = case.right.reshape(ours.shape) + f.mix(p[:, :, :slots] * weight, v[:slots], read)
    yield f"kv-cache, values of slots {listed(off)} count {weight[off[0]]:+.2f} too often", candidate


# --- rotation --------------------------------------------------------------------------------------------------


@of("Qcur", "Kcur")
def _positions(case: Case) -> Iterator[Guess]:
    """The right frequencies at other positions: the integer that fits each token's angles best."""
    x, facts = heads(case.view(f"{case.op.name}_normed"), case.view.facts.head_dim), case.view.facts
    turn = angles(case.view, 2)
    turn = turn[1] - turn[0]
    pairs, tokens = facts.rotary // 2, len(x)
    seen = fitted_angles(x, case.ours, pairs, facts.adjacent)
    tried = np.arange(-2 - tokens, 2 * tokens + 3)
    error = np.abs(np.exp(1j * seen)[:, None] - np.exp(1j * tried[:, None] * turn)).sum(-1)
    position = tried[error.argmin(axis=1)]
    expected = np.arange(facts.first_position, facts.first_position + tokens)
    off = np.flatnonzero(position != expected)
    if not len(off) or (len(off) > 1 and len(np.unique(position)) < 2 and not position.any()):
        return
    text = f"tokens {listed(off)} are at positions {listed(position[off])}"
    yield f"position-shift, {text}", f.rotate(x, position[:, None] * turn, adjacent=facts.adjacent)


@of("Qcur", "Kcur")
def _still_pairs(case: Case) -> Iterator[Guess]:
    """Some pairs not turned at all: sections of positions that were never filled."""
    x, facts = heads(case.view(f"{case.op.name}_normed"), case.view.facts.head_dim), case.view.facts
    right = angles(case.view, len(x))
    seen = fitted_angles(x, case.ours, facts.rotary // 2, facts.adjacent)
    still = (np.abs(np.sin(seen / 2)) < 1e-4).all(axis=0) & (np.abs(right[-1]) > 1e-3)
    if not still.any() or still.all():
        return
    text = f"rope-sections, pairs {listed(np.flatnonzero(still))} of {len(still)} are not turned"
    yield text, f.rotate(x, np.where(still, 0, right), adjacent=facts.adjacent)


@of("Qcur", "Kcur")
def _angles(case: Case) -> Iterator[Guess]:
    """Other angles: fitted on even heads and scored on odd ones."""
    x, facts = heads(case.view(f"{case.op.name}_normed"), case.ours.shape[-1]), case.view.facts
    tokens, count, _ = x.shape
    fit = slice(0, None, 2) if count > 1 else slice(None)
    held = (slice(None), slice(1, None, 2) if count > 1 else slice(None))
    moved = np.abs(case.ours - x).max(axis=(0, 1)) > 1e-5 * np.abs(x).max()
    dims = int(np.flatnonzero(moved).max(initial=-1)) + 1
    half = (dims + 1) // 2
    for pairs, adjacent in {(half, False), (half, True), (facts.rotary // 2, facts.adjacent)}:
        if pairs and tokens >= 3:
            angle = fitted_angles(x[:, fit], case.ours[:, fit], pairs, adjacent)
            story = _angle_story(angle, pairs, adjacent, case.view)
            yield story, f.rotate(x, angle, adjacent=adjacent), held


def _angle_story(angle: np.ndarray, pairs: int, adjacent: bool, view: Any) -> str:
    facts = view.facts
    if adjacent != facts.adjacent:
        return f"rope-pairing, {'neighbouring' if adjacent else 'half-apart'} dims are rotated together"
    if 2 * pairs != facts.rotary:
        return f"rope-partial, {2 * pairs} dims are rotated instead of {facts.rotary}"
    turn = np.angle(np.exp(1j * np.diff(angle, axis=0)).mean(axis=0))  # radians a token, for each pair
    told = np.arange(len(angle))[:, None] * turn + angle[0]
    if np.abs(np.exp(1j * (angle - told)) - 1).max() > 1e-2:
        return "rope-angle, the angles do not grow evenly with the position"
    right = angles(view, 2)
    factor = turn[-1] / (right[1] - right[0])[-1]
    if np.abs(np.exp(1j * (turn - factor * (right[1] - right[0]))) - 1).max() < 1e-3:
        return f"rope-scale, all angles are {factor:.5g} times the right ones"
    base = _base_of(turn)
    if base and facts.rope_base and abs(base / facts.rope_base - 1) > 1e-2:
        return f"rope-base, the angles are those of base {base:.4g} instead of {facts.rope_base:g}"
    return f"rope-angle, a rotation by other angles: {turn[:3].round(4).tolist()} radians a token"


@of("Vcur")
def _turned_values(case: Case) -> Iterator[Guess]:
    """Values rotated as keys are: angles fitted on even heads and scored on odd ones."""
    x, y = (heads(z, case.view.facts.head_dim) for z in (case.right, case.ours))
    if x.shape[1] < 2:
        return
    moved = np.abs(y - x).max(axis=(0, 1)) > 1e-5 * np.abs(x).max()
    pairs = (int(np.flatnonzero(moved).max(initial=-1)) + 2) // 2
    for adjacent in (False, True):
        angle = fitted_angles(x[:, ::2], y[:, ::2], pairs, adjacent)
        text = f"extra-rope, the values are rotated: {2 * pairs} of {x.shape[2]} dims"
        yield text, f.rotate(x, angle, adjacent=adjacent), (slice(None), slice(1, None, 2))


def _base_of(turn: np.ndarray) -> float:
    """The base whose powers all pairs turn by; 0 for none."""
    pairs = len(turn)
    if pairs < 2 or abs(turn[0] - 1) > 1e-3 or not (turn > 0).all():
        return 0.0
    base = turn[1] ** -pairs
    expected = base ** (-np.arange(pairs) / pairs)
    return float(base) if (np.abs(turn - expected) < 0.05 * expected + 1e-4).all() else 0.0


# --- what looks back: convolution and delta rule ---------------------------------------------------------------


def _boundaries(case: Case) -> list[tuple[int, int]]:
    """(first, period) of chunks that could have gone wrong: at the first wrong token, alone or again and again."""
    first = int(case.hit[0][0]) if case.hit is not None else 0
    tokens = len(case.view("conv_output_silu")) if case.op.name == "new_state" else len(case.ours)
    return ([(first, tokens)] if first else []) + [(n, n) for n in _CHUNKS if n < tokens and first in (0, n)]


@of("conv_output_raw")
def _kernel(case: Case) -> Iterator[Guess]:
    """The kernel that our output shows, fitted on even tokens: its taps in another order, or another."""
    padded, right = conv_input(case.view), case.view.weight("ssm_conv1d")
    width, tokens = right.shape[1], len(case.ours)
    if tokens < 4 * width:
        return
    shifted = np.stack([padded[j : j + tokens] for j in range(width)], axis=-1).transpose(1, 0, 2)
    fitted = (np.linalg.pinv(shifted[:, ::2], rcond=1e-9) @ case.ours.T[:, ::2, None])[..., 0]
    order = [int(((right - fitted[:, j : j + 1]) ** 2).sum(axis=0).argmin()) for j in range(width)]
    if order != list(range(width)):
        text = f"conv-taps, the kernel's taps are the right {order}"
        yield text, f.causal_conv(padded, right[:, order]), slice(1, None, 2)
    yield "conv-kernel, another kernel", f.causal_conv(padded, fitted), slice(1, None, 2)


_CARRIED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "lost": lambda past: 0 * past,
    "short of its first row": lambda past: np.concatenate([0 * past[:1], past[1:]]),
    "reversed": lambda past: past[::-1],
    "one token late": lambda past: np.concatenate([0 * past[:1], past[:-1]]),
    "one token early": lambda past: np.concatenate([past[1:], past[-1:]]),
    "the last token repeated": lambda past: np.repeat(past[-1:], len(past), 0),
}


@of("conv_output_raw")
def _conv_history(case: Case) -> Iterator[Guess]:
    """The convolution's history mistreated where a chunk ends."""
    for first, period in _boundaries(case):
        for label, carry in _CARRIED.items():
            text = f"chunk-boundary, from token {first} on the history of every chunk is {label}"
            yield text, conv_by_chunk(case.view, carry, first, period)
        yield (
            f"chunk-boundary, from token {first} on the history of every chunk is one token older",
            conv_by_chunk(case.view, None, first, period),
        )


@of("conv_output_raw")
def _after_boundaries(case: Case) -> Iterator[Guess]:
    """Wrong where the convolution reaches back over a chunk's start, at every chunk, and nowhere else."""
    reach = case.view.facts.conv_kernel - 1
    if case.hit is None:
        return
    for period in (n for n in _CHUNKS if reach < n < len(case.ours)):
        starts = set(range(period, len(case.ours), period))
        if starts <= set(case.hit[0].tolist()) and (case.hit[0] % period < reach).all() and case.hit[0][0]:
            text = f"chunk-boundary, only the first {reach} tokens of chunks of {period} are wrong"
            yield text, case.within(case.ours)


_STATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "lost": lambda s: 0 * s,
    "transposed": lambda s: np.swapaxes(s, -1, -2),
    "halved": lambda s: s / 2,
    "the head's before": lambda s: np.roll(s, 1, axis=0),
    "the head's after": lambda s: np.roll(s, -1, axis=0),
    **{f"rounded to {label}": rounding for label, rounding in ROUNDINGS.items()},
}


@of("attn_output:ssm", "new_state:ssm")
def _state_at_chunks(case: Case) -> Iterator[Guess]:
    out = int(case.op.name == "new_state")
    for first, period in _boundaries(case):
        for label, carry in _STATES.items():
            text = f"chunk-boundary, from token {first} on the state is {label} between chunks of {period}"
            yield text, by_chunk(case.view, out, carry, period, first)


_WITHIN: dict[str, dict[str, Any]] = {
    "chunk-solve, writes within chunks of {} do not see each other": {"terms": 1},
    "chunk-solve, the series of a chunk of {} ends after two terms": {"terms": 2},
    "chunk-solve, the series of a chunk of {} ends after three terms": {"terms": 3},
    "decay, the state before a chunk of {} does not decay within": {"start_decays": False},
    **{
        f"decay-precision, the sums of log decays in chunks of {{}} in {label}": {
            "sums": lambda g, rounding=rounding: rounding(np.cumsum(g, axis=0))
        }
        for label, rounding in ROUNDINGS.items()
    },
}


@of("attn_output:ssm", "new_state:ssm")
def _within_chunks(case: Case) -> Iterator[Guess]:
    """The tokens of a chunk solved for together, one part of that left out or in few bits."""
    out, tokens = int(case.op.name == "new_state"), len(case.view("v_conv_predelta"))
    for chunk in (n for n in _CHUNKS if n < 2 * tokens):
        for text, twist in _WITHIN.items():
            yield text.format(chunk), delta(case.view, out=out, chunk=chunk, **twist)


@of("attn_output:ssm")
def _state_jump(case: Case) -> Iterator[Guess]:
    """The state changed once, before the first wrong token, by what the tokens after it show."""
    start = int(case.hit[0][0]) if case.hit is not None else 0
    q, k, g, beta = key_heads(case.view)
    hv, dk = q.shape[1:]
    walk = np.broadcast_to(np.eye(dk), (hv, dk, dk)).copy()
    seen = []
    for t in range(start, len(q)):
        walk = np.exp(g[t])[:, None, None] * (
            walk - beta[t][:, None, None] * np.matmul(walk, k[t][:, :, None]) * k[t][:, None, :]
        )
        seen.append(np.matmul(walk, q[t][:, :, None])[..., 0])
    seen = np.stack(seen, axis=1)  # (Hv, T', Dk)
    residual = case.residual.reshape(len(q), hv, -1)[start:].transpose(1, 0, 2)
    fitted = np.linalg.pinv(seen[:, ::2], rcond=1e-6) @ residual[:, ::2]
    candidate = case.right.reshape(len(q), hv, -1).copy()
    candidate[start:] += (seen @ fitted).transpose(1, 0, 2)
    name = "chunk-boundary" if start else "state-reset"
    text = f"{name}, the state before token {start} is another; all that follows, follows from that"
    yield text, candidate, slice(start + 1, None, 2)


@of("attn_output:ssm", "new_state:ssm")
def _other_heads(case: Case) -> Iterator[Guess]:
    """Each value head with the key head, decay, write strength or state of the head that fits best."""
    out = int(case.op.name == "new_state")
    axis = 0 if out else 1
    count, keys = case.view("v_conv_predelta").shape[1], case.view("k_conv_predelta").shape[1]
    if count > _HEADS or case.ours.size > 1 << 20:
        return
    tries = {
        "head-permutation, value heads read key heads {}": (keys, lambda n: {"read": np.full(count, n)}),
        "decay, value heads decay as heads {}": (count, lambda n: {"g": _same_for_all(n)}),
        "missing-beta, value heads write as heads {}": (count, lambda n: {"beta": _same_for_all(n)}),
        "state-aliasing, value heads have the states of heads {}": (
            count,
            lambda n: {"entering": _one_state(n)},
        ),
    }
    for text, (choices, twist) in tries.items():
        if choices > 1:
            chosen, best = per_group(
                case, [delta(case.view, out=out, **twist(n)) for n in range(choices)], axis
            )
            yield text.format(chosen.tolist()), best


# (cause, keyword of `delta`, tap, in words)
_LIMITED = (("decay", "g", "gate", "log decay"), ("saturation", "beta", "beta_sigmoid", "write strength"))
_SIDES = {"below": np.maximum, "above": np.minimum}


@of("attn_output:ssm", "new_state:ssm")
def _limited(case: Case) -> Iterator[Guess]:
    """Decays or write strengths that go no further than a limit, which only the delta rule sees."""
    if case.ours.size > 1 << 20:
        return
    for (cause, operand, tap, word), side in itertools.product(_LIMITED, _SIDES):
        made = functools.partial(_with_limit, case, operand, side)
        bound = _best_limit(case, np.sort(case.view(tap), axis=None), made)
        yield f"{cause}, no {word} is {side} {bound:.4g}", made(bound)


def _with_limit(case: Case, operand: str, side: str, bound: float) -> np.ndarray:
    change = {operand: lambda x: _SIDES[side](x, x.dtype.type(bound))}
    return delta(case.view, out=int(case.op.name == "new_state"), **change).reshape(case.ours.shape)


def _best_limit(case: Case, values: np.ndarray, made: Callable[[float], np.ndarray]) -> float:
    """The limit among sorted `values` that explains most; on either side of it one explains less and less."""
    from scipy.optimize import minimize_scalar

    def at(part: float) -> float:
        return float(np.interp(part, np.linspace(0, 1, len(values)), values))

    found = minimize_scalar(
        lambda part: -case.share(made(at(part))), bounds=(0, 1), options={"maxiter": 30, "xatol": 1e-6}
    )
    return at(found.x)


def _same_for_all(n: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.repeat(x[:, n : n + 1], x.shape[1], axis=1)


def _one_state(n: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda states: np.repeat(states[n : n + 1], len(states), axis=0)


@of("final_output:ssm")
def _other_gate_heads(case: Case) -> Iterator[Guess]:
    """The right norm, gated by other heads' gates."""
    x, factor = case.op.normed(case.view)
    if x.shape[1] > _HEADS:
        return
    normed, turned = f.rms(x, case.view.facts.eps), [np.roll(factor, n, axis=1) for n in range(x.shape[1])]
    chosen, best = per_group(case, [normed * factor for factor in turned])
    yield (
        f"head-permutation, gates come from the head {chosen.tolist()} before",
        best.reshape(case.ours.shape),
    )


# --- experts ---------------------------------------------------------------------------------------------------


@of("ffn_moe_gate", "ffn_moe_up", "ffn_moe_down")
def _other_experts(case: Case) -> Iterator[Guess]:
    """For each expert that was asked, the one whose weights our output shows."""
    view, stem = case.view, case.op.weight
    chosen = np.rint(view("ffn_moe_topk")).astype(np.int64)
    x = (
        view("ffn_moe_swiglu")
        if "down" in stem
        else np.repeat(view("attn_post_norm").reshape(len(chosen), 1, -1), chosen.shape[1], 1)
    )
    used, count = np.unique(chosen), int(view("ffn_moe_probs").shape[-1])
    if count > _HEADS:
        raise Missing("few experts")
    rows, asked, ours = x.reshape(-1, x.shape[-1]), chosen.ravel(), case.ours.reshape(chosen.size, -1)
    candidate, found = np.empty_like(ours), {}
    for expert in used:
        at = asked == expert
        made = [view.expert(stem, other, rows[at]) for other in range(count)]
        best = int(np.argmin([((y - ours[at]) ** 2).sum() for y in made]))
        candidate[at] = made[best]
        found |= {int(expert): best} if best != expert else {}
    if found:
        text = ", ".join(f"{a} computes with {b}'s weights" for a, b in list(found.items())[:4])
        yield f"expert-permutation, expert {text}", candidate


@of("ffn_moe_gate", "ffn_moe_up", "ffn_moe_down")
def _expert_stride(case: Case) -> Iterator[Guess]:
    """Experts' matrices read with another distance between them: each one's rows begin by so much more beside."""
    stacked = case.view.weight(case.op.weight)
    _, rows, width = stacked.shape
    flat_rows = stacked.reshape(-1, width)
    for by in (sign * step for step in _STEPS if step < rows for sign in (-1, 1)):
        view = case.view.fresh()

        def expert(_stem: str, number: int, x: np.ndarray, by: int = by) -> np.ndarray:
            start = number * (rows + by)
            return x @ flat_rows[np.arange(start, start + rows) % len(flat_rows)].T

        view.expert = expert
        yield f"expert-stride, expert n begins {by:+d} n rows from where it should", case.op.run(view)


_STEPS = (1, 2, 4, 8, 16, 32)  # rows: off by one, or by what padding adds
