"""From the local evidence of every tap to one verdict.

The z-score of a tap is the logarithm of its local divergence over the computed floor, in units of how well such a
floor is known; Benjamini and Hochberg's procedure over all taps keeps the share of false findings down. Two axes
then tell apart what a threshold alone cannot: one place, or one cause in many places.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from scarlet_jax.tools.parity.local import Local
from scarlet_jax.tools.parity.metrics import Metrics

EXIT = {"clean": 0, "noise": 0, "single-op": 1, "systematic": 1, "invalid": 2, "inconclusive": 3}

# How well a floor is known, as the standard deviation of its logarithm: the formula's own rounding error within a
# factor of 2, a product with an unknown matrix within 2.5, and for propagation a generous bound.
_UNCERTAINTY = {
    "formula": math.log(2),
    "direct": math.log(2),
    "span": math.log(2),
    "propagated": math.log(1.7),
}
FALSE_DISCOVERIES = 1e-3


@dataclasses.dataclass
class Tap:
    """One compared tap with everything known about it."""

    name: str
    op: str
    layer: int | None
    kind: str
    klass: str
    weight: str
    qtype: str
    aligned: str
    metrics: Metrics
    local: Local | None
    alias: bool = False
    broken: bool = False
    note: str = ""
    own: bool = False  # only our dump has it: held against what its own inputs give

    @property
    def peak(self) -> float:
        """The local divergence, or the whole one where there is no local evidence."""
        return self.local.difference if self.local else self.metrics.relative_l2


@dataclasses.dataclass(frozen=True)
class Factor:
    """What the broken taps have in common."""

    kind: str
    value: str
    members: frozenset[str]


def find_broken(taps: Sequence[Tap]) -> None:
    """Mark the taps whose own operation diverges beyond its floor and matters downstream."""
    judged = [tap for tap in taps if tap.local is not None and tap.local.method != "alone"]
    p_values = np.array([p_value(tap.local) for tap in judged])
    for index in discoveries(p_values, FALSE_DISCOVERIES):
        judged[index].broken = True
    consumers: dict[str, list[Tap]] = {}
    for tap in judged:
        for name in tap.local.inputs:
            consumers.setdefault(name, []).append(tap)
    nan = [tap for tap in judged if tap.metrics.not_finite[0] and not tap.metrics.not_finite[1]]
    for tap in nan:  # it spreads: only where it begins is something wrong
        tap.broken = tap is nan[0]
    settled: dict[str, bool] = {}
    for tap in [tap for tap in judged if tap.broken]:
        _excuse(tap, consumers, settled)
    _excuse_views(judged)
    _lone_aliases(judged)
    for tap in judged:
        if tap.broken and _whole_layer(tap) and not tap.metrics.not_finite[0]:
            tap.broken = False  # somewhere in this layer: `unclear` says so


def _whole_layer(tap: Tap) -> bool:
    """Whether all that is known of a layer is what went in and what came out."""
    inputs = tap.local.inputs
    return (
        tap.local.method == "propagated"
        and tap.layer is not None
        and len(inputs) > 0
        and all(name.rpartition("-")[0] == tap.op or name == "model.input_embed" for name in inputs)
    )


def _agrees(reader: Tap, tap: Tap) -> bool:
    """Whether an operation that reads `tap` has nothing of its divergence; numbers that are none agree with nothing."""
    if reader.metrics.not_finite[0] > reader.metrics.not_finite[1]:
        return False
    own = reader.local.f32_floor * 10
    if reader.local.method in ("propagated", "alone"):  # a floor that is made of its inputs' divergence
        own = 1e-3 * tap.metrics.relative_l2
    return reader.metrics.relative_l2 <= max(own, 1e-6)


def _settles(tap: Tap, consumers: Mapping[str, Sequence[Tap]], known: dict[str, bool]) -> bool:
    """Whether a tap's divergence is taken back: everything that reads it agrees, or has its own taken back."""
    if tap.name not in known:
        known[tap.name] = False  # whatever reads itself
        readers = [c for c in consumers.get(tap.name, ()) if not c.alias]
        leaves = [c for c in readers if not consumers.get(c.name) and not _agrees(c, tap)]
        through = [
            c for c in readers if c not in leaves
        ]  # a state that is kept is no part of this run's output
        states = all(family(leaf) in ("delta-rule", "conv-state") for leaf in leaves)
        known[tap.name] = (
            len(through) > 0
            and states
            and all(_agrees(c, tap) or _settles(c, consumers, known) for c in through)
        )
    return known[tap.name]


def _excuse(tap: Tap, consumers: Mapping[str, Sequence[Tap]], known: dict[str, bool]) -> None:
    """A divergence that the next operations take back, or that was never there in sum, is a convention."""
    if tap.metrics.not_finite[0]:
        return
    floor = max(10 * tap.local.floor, 1e-6)
    if tap.metrics.relative_l2 <= floor and tap.local.method != "direct":
        tap.broken, tap.note = False, "agrees, though not with its inputs: they follow another convention"
    elif _settles(tap, consumers, known):
        tap.broken, tap.note = False, CONVENTION


CONVENTION = "another convention: everything computed from it agrees"


def _excuse_views(judged: Sequence[Tap]) -> None:
    """What an operation leaves for the next run follows the convention of what it gave in this one."""
    excused = {(family(t), t.layer) for t in judged if t.note == CONVENTION and not t.broken}
    for tap in judged:
        if tap.broken and family(tap) == "delta-rule" and ("delta-rule", tap.layer) in excused:
            tap.broken, tap.note = False, CONVENTION


def _lone_aliases(judged: Sequence[Tap]) -> None:
    """A tap that nothing reads is no fault of the computation on its own."""
    broken = [tap for tap in judged if tap.broken]
    if broken and all(tap.alias for tap in broken):
        for tap in broken:
            tap.broken, tap.note = False, "a label or a view: nothing that was computed from it diverges"


def discoveries(p_values: np.ndarray, rate: float) -> np.ndarray:
    """Indices that Benjamini and Hochberg's procedure (1995) rejects at the false discovery `rate`."""
    order = np.argsort(p_values)
    limit = rate * np.arange(1, len(order) + 1) / max(len(order), 1)
    below = np.flatnonzero(p_values[order] <= limit)
    return order[: below[-1] + 1] if len(below) else order[:0]


def p_value(local: Local) -> float:
    """Chance of a divergence as large as this one where nothing is wrong."""
    if not local.ratio > 1:
        return 1.0
    z = math.log(local.ratio) / _UNCERTAINTY[local.method]
    return 0.5 * math.erfc(z / 2**0.5)


# Operations that are one piece of mathematics under several names.
FAMILIES = {
    "delta-rule": ("attn_output:ssm", "new_state:ssm"),
    "l2-norm": ("q_conv_predelta", "k_conv_predelta"),
    "rope": ("Qcur", "Kcur"),
    "rms-norm": ("attn_norm", "attn_post_norm", "ffn_norm", "Qcur_normed", "Kcur_normed", "result_norm"),
    "qk-norm": ("Qcur_normed", "Kcur_normed"),
    "attention": ("kq", "kq_soft_max", "kqv", "attn_pregate"),
    "gate-split": ("Qcur_reshaped", "gate_reshaped"),
    "sigmoid": ("beta_sigmoid", "gate_sigmoid", "shared_expert_gate_sigmoid"),
    "silu": ("conv_output_silu", "ffn_swiglu", "ffn_moe_swiglu", "final_output"),
    "residual": ("attn_residual", "l_out"),
    "conv-split": ("q_conv", "k_conv", "v_conv_predelta"),
    "conv-state": ("conv_output_raw", "conv_state_last"),
}


def factors(taps: Sequence[Tap]) -> list[Factor]:
    """Everything the broken taps could have in common, most specific first."""
    usable = [t for t in taps if t.local is not None and not t.alias]
    found: list[Factor] = []

    def group(kind: str, value_of) -> None:
        members: dict[str, set[str]] = {}
        for tap in usable:
            for value in value_of(tap):
                members.setdefault(value, set()).add(tap.name)
        found.extend(Factor(kind, value, frozenset(names)) for value, names in members.items())

    group("op", lambda t: [t.op])
    group("qtype", lambda t: [t.qtype] if t.qtype else [])
    group(
        "op",
        lambda t: [n for n, ops in FAMILIES.items() if t.op in ops or f"{t.op}:{t.kind.split()[0]}" in ops],
    )
    group(
        "op", lambda t: ["matmul"] if t.weight and t.local.method in ("formula", "span") and t.qtype else []
    )
    group("class", lambda t: [t.klass])
    group("layer", lambda t: [str(t.layer)] if t.layer is not None else [])
    return found


def best_factor(taps: Sequence[Tap], prefer: str = "") -> tuple[Factor | None, float, float]:
    """The factor that fits the broken taps best, with its precision and recall; ties go to `prefer`, then order."""
    broken = {t.name for t in taps if t.broken and not t.alias}
    best: tuple[float, bool, Factor | None, float, float] = (0.0, False, None, 0.0, 0.0)
    for factor in factors(taps):
        hit = len(broken & factor.members)
        if not hit:
            continue
        precision, recall = hit / len(broken), hit / len(factor.members)
        score = round(2 * precision * recall / (precision + recall), 6)
        if (score, factor.kind == prefer) > best[:2]:
            best = (score, factor.kind == prefer, factor, precision, recall)
    return best[2:]


_CLOSE = ("delta-rule", "l2-norm", "rope", "qk-norm", "attention", "gate-split", "conv-split", "conv-state")


def family(tap: Tap) -> str:
    """The operation that a tap is a view or a half of."""
    names = {tap.op, f"{tap.op}:{tap.kind.split()[0]}"}
    return next((f for f in _CLOSE if names & set(FAMILIES[f])), tap.op)


def places(taps: Sequence[Tap]) -> int:
    """Broken operations counted as a person would: views and halves of one operation in one layer are one."""
    return len({(family(t), t.layer) for t in taps if t.broken and not t.alias})


def onset(taps: Sequence[Tap], tokens: int, count: int) -> int:
    """First token of the window of `count` to look into: 0, unless divergence sets in after the first `count`."""
    curves = [t.metrics.tokens for t in taps if len(t.metrics.tokens) == tokens and t.layer is not None]
    worst = np.max([np.nan_to_num(c, nan=0.0, posinf=0.0) for c in curves], axis=0)
    usual = float(np.median(worst[:count])) + 1e-6
    late = np.flatnonzero(worst[count:] > 100 * usual)
    if not len(late):
        return 0
    return int(min(tokens - count, max(0, count + late[0] - count // 4)))


def axes(taps: Sequence[Tap]) -> tuple[float, float]:
    """Spread in 0 to 1 (evenness of local divergence over layers) and peak (the largest local divergence)."""
    worst: dict[int | None, float] = {}
    for tap in taps:
        if math.isfinite(tap.peak):
            worst[tap.layer] = max(worst.get(tap.layer, 0.0), tap.peak)
    values = np.array([v for layer, v in worst.items() if layer is not None])
    peak = max(worst.values(), default=0.0)
    if len(values) < 2 or values.sum() == 0:
        return float(values.sum() > 0), peak
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()) / len(values)), peak


def decide(taps: Sequence[Tap], prefer: str = "") -> tuple[str, Tap | None, Factor | None]:
    """Verdict, first broken tap and factor, once `find_broken` has run."""
    broken = [t for t in taps if t.broken]
    if not broken:
        return _without_fault(taps), None, None
    real = [t for t in broken if not t.alias]
    first = (real or broken)[0]
    factor, precision, recall = best_factor(taps, prefer)
    spread = places(taps)
    everywhere = factor is not None and factor.kind != "layer" and recall >= 0.6 and precision >= 0.6
    everywhere = everywhere or _in_most_layers(taps, first)
    verdict = "systematic" if spread >= 2 and (everywhere or spread >= 4) else "single-op"
    return verdict, first, factor if verdict == "systematic" or (factor and factor.kind == "op") else None


def _in_most_layers(taps: Sequence[Tap], first: Tap) -> bool:
    same = [t for t in taps if t.op == first.op and t.kind == first.kind and t.local is not None]
    broken = sum(t.broken for t in same)
    return broken >= 2 and broken >= 0.6 * len(same)


def _without_fault(taps: Sequence[Tap]) -> str:
    """Clean if f32 arithmetic alone explains every tap, noise if it takes more."""
    judged = [t for t in taps if t.local is not None]
    local_only = [t for t in judged if t.local.method in ("formula", "direct", "span")]
    exact = all(t.local.difference <= 8 * max(t.local.f32_floor, 2.0**-24) for t in local_only)
    return "clean" if exact and all(t.metrics.relative_l2 < 1e-3 for t in taps if not t.alias) else "noise"


def other_model(taps: Sequence[Tap]) -> bool:
    """Whether weights of every kind differ: no engine breaks its norms, biases, kernels and table all at once."""
    groups: dict[str, list[bool]] = {}
    for tap in taps:
        if tap.local is None or not tap.weight or tap.alias or tap.local.method not in ("formula", "direct"):
            continue
        stem = tap.weight.removesuffix(".weight").rpartition(".")[2] if "dt" not in tap.weight else "ssm_dt"
        groups.setdefault("norm" if stem.endswith("norm") and stem != "ssm_norm" else stem, []).append(
            tap.broken
        )
    broken = [group for group, marks in groups.items() if sum(marks) > 0.8 * len(marks)]
    return len(broken) >= 4 and len(broken) >= 0.8 * len(groups)


def unclear(taps: Sequence[Tap], resolution: float) -> str:
    """Why nothing can be said although nothing was found; empty where something can."""
    weighty = [t for t in taps if t.metrics.norm > 0]
    if not weighty:
        return "every tap of the reference is zero"
    different = [t for t in weighty if t.metrics.relative_l2 > 0.05]
    if len(taps) < 3 and different:
        return f"{different[0].name} differs, but {len(taps)} tap{'s' * (len(taps) > 1)} cannot show where that begins"
    start = next((t for t in weighty if t.local and not t.alias and t.local.method != "direct"), None)
    if start and start.local.method == "alone" and start.metrics.relative_l2 > 0.05:
        return (
            f"{start.name} differs by {start.metrics.relative_l2:.2g} already, and nothing that it is computed from "
            "is at hand; more taps or a --model would tell"
        )
    jumps = [
        t for t in taps if t.local and t.local.method == "propagated" and t.local.ratio > 5 and not t.note
    ]
    if jumps:
        return (
            f"{jumps[0].name} differs by {jumps[0].metrics.relative_l2:.2g}, more than its inputs do, "
            "but what it is computed from is not at hand; a --model would tell"
        )
    if not resolution:
        return ""

    def rounding(tap: Tap) -> float:
        return resolution / 3**0.5 * tap.metrics.size**0.5 / tap.metrics.norm

    hidden = [t for t in weighty if rounding(t) > 0.02]
    if len(hidden) > 0.5 * len(weighty):
        return f"values are rounded to {2 * resolution:g}: in {len(hidden)} of {len(weighty)} taps that hides up to 2 %"
    return ""
