"""The right operation on the wrong operand: another tap in its place, or the right one that something was done to.

Each hypothesis re-runs the operation on our engine's own taps with one of those that it reads replaced. Nothing is
fitted, so whatever explains most of the residual does so by more than chance.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from scarlet_jax.tools.parity import formulas as f
from scarlet_jax.tools.parity.arithmetic import ROUNDINGS
from scarlet_jax.tools.parity.case import Case, Hypothesis
from scarlet_jax.tools.parity.graph import FAILURES, Op
from scarlet_jax.tools.parity.ops_shared import delayed

Change = Callable[[np.ndarray], np.ndarray]

_LARGEST = 1 << 20  # elements of an output that is made again and again


def hypotheses(case: Case) -> Iterator[Hypothesis]:
    """All that may have been done to what the operation reads."""
    if case.view is None or case.op is None or case.ours.size > _LARGEST or not np.isfinite(case.ours).all():
        return
    names = operands(case)
    for name in names:
        x = case.view.before() if name == "before" else case.view(name)
        if x.dtype.kind != "f" or x.ndim < 2:
            continue
        if case.op.kind != "end":
            yield from _other_taps(case, name, x)
        for cause, done, change in _mistreated(case, name, x):
            yield from _tried(case, cause, f"{name} {done}", {name: change(x)})
    yield from _exchanged(case, names)
    for label, rounding in ROUNDINGS.items() if len(names) > 1 else ():
        rounded = {name: rounding(case.view(name)) for name in names if name != "before"}
        yield from _tried(case, "input-precision", f"all that it reads rounded to {label}", rounded, 5)


def _exchanged(case: Case, names: list[str]) -> Iterator[Hypothesis]:
    """Two operands of one size, each in the other's place."""
    for a, b in itertools.combinations([name for name in names if name != "before"], 2):
        x, y = case.view(a), case.view(b)
        if x.size == y.size and len(x) == len(y):
            instead = {a: y.reshape(x.shape), b: x.reshape(y.shape)}
            yield from _tried(case, "swapped-inputs", f"{a} and {b} exchanged", instead, 3)


def inputs_read(view: object, op: Op) -> tuple[str, ...]:
    """Names in the dump of the taps that an operation reads."""
    probe = view.fresh()
    with contextlib.suppress(*FAILURES):
        op.run(probe)
    return tuple(probe.used)


def operands(case: Case) -> list[str]:
    """Names without the layer of the taps of this layer that the operation reads; "before" for the stream.

    With those, products that were not dumped and that it makes on its way.
    """
    layer, entering = str(case.view.layer), case.view.run.before.get(case.view.layer)
    read = dict.fromkeys(inputs_read(case.view, case.op))
    own = [op for op, _, number in (name.rpartition("-") for name in read) if number == layer and op]
    return own + _products_between(case) + (["before"] if entering in read else [])


def _products_between(case: Case) -> list[str]:
    probe = case.view.fresh()
    try:
        case.op.run(probe)
    except FAILURES:
        return []
    return [op.name for op in probe.computed if op.linear]


def _other_taps(case: Case, name: str, wanted: np.ndarray) -> Iterator[Hypothesis]:
    """Another tap of its shape read instead."""
    layer = str(case.view.layer)
    present = [op for op, _, number in (n.rpartition("-") for n in case.view.run.taps) if number == layer]
    entering = ["before"] if case.view.run.before.get(case.view.layer) in case.view.run.taps else []
    for other in [*present, *entering]:
        if other in (name, case.op.name) or other in same_array(name):
            continue
        instead = case.view.before() if other == "before" else case.view(other)
        if instead.shape == wanted.shape and instead is not wanted:
            word = "the stream before the layer" if other == "before" else other
            yield from _tried(case, "wrong-input", f"{word} in place of {name}", {name: instead}, 3)


def same_array(op: str) -> tuple[str, ...]:
    """Other names of one array."""
    return {
        "linear_attn_qkv_mixed": ("qkv_mixed_transposed",),
        "attn_pregate": ("kqv",),
        "kqv": ("attn_pregate",),
    }.get(op, ())


def _mistreated(case: Case, name: str, x: np.ndarray) -> Iterator[tuple[str, str, Change]]:
    """(cause, what was done, how) of all that may happen to one operand on its way."""
    for label, rounding in ROUNDINGS.items():
        yield "input-precision", f"rounded to {label}", rounding
    yield "token-shift", "of one token earlier", delayed
    yield "token-shift", "of one token later", lambda x: delayed(x[::-1])[::-1]
    yield "stale-row", "of the first token always", lambda x: np.broadcast_to(x[:1], x.shape)
    yield "extra-silu", "through a SiLU first", f.silu
    yield "extra-sigmoid", "through a sigmoid first", f.sigmoid
    yield _SCALED.get(name, "sign"), "with the other sign", lambda x: -x
    for label, factor in _factors(x).items():
        yield _SCALED.get(name, "missing-scale"), f"times {label}", lambda x, factor=factor: x * factor
    for label, order in channel_orders(x.shape[-1]).items():
        yield "channel-permutation", f"with its channels {label}", lambda x, order=order: x[..., order]
    yield from _by_head(case, x)


def channel_orders(n: int) -> dict[str, np.ndarray]:
    """Usual mistakes in the order of n channels."""
    orders = {"halves swapped": np.roll(np.arange(n), n // 2), "reversed": np.arange(n)[::-1]}
    if n % 2 == 0:
        orders["interleaved for halves"] = np.arange(n).reshape(2, -1).T.ravel()
        orders["halves for interleaved"] = np.arange(n).reshape(-1, 2).T.ravel()
        orders["neighbours swapped"] = np.arange(n).reshape(-1, 2)[:, ::-1].ravel()
    return orders


def _by_head(case: Case, x: np.ndarray) -> Iterator[tuple[str, str, Change]]:
    """What happens to heads, or to the whole where there are none."""
    facts, form = case.view.facts, x.shape
    dims = (
        {facts.value_dim, facts.head_dim} - {0, 1}
        if x.ndim == 2 and x.shape[1] != facts.value_heads
        else set()
    )
    forms = {form} | {
        (len(x), x.shape[1] // dim, dim) for dim in dims if x.shape[1] % dim == 0 < x.shape[1] - dim
    }
    changes: list[tuple[str, str, Change]] = [
        ("extra-norm", "divided by its root mean square first", lambda x: f.rms(x, facts.eps)),
        ("extra-norm", "divided by its norm first", lambda x: f.l2(x, facts.eps)),
    ]
    moves: list[tuple[str, str, Change]] = [
        ("head-permutation", "of the head before", lambda x: np.roll(x, 1, axis=1)),
        ("head-permutation", "of the head after", lambda x: np.roll(x, -1, axis=1)),
        ("one-for-all-heads", "averaged over heads", lambda x: 0 * x + x.mean(axis=1, keepdims=True)),
        ("one-for-all-heads", "of the first head", lambda x: 0 * x + x[:, :1]),
    ]
    for cut in sorted(forms, key=len):
        headed = cut[1] > 1 and (len(cut) == 3 or cut[1] == facts.value_heads)
        for cause, done, change in [*changes, *(moves if headed else ())]:
            yield cause, done, lambda x, change=change, cut=cut: change(x.reshape(cut)).reshape(form)


# What a person calls another factor on these.
_SCALED = {"gate": "decay", "beta_sigmoid": "beta-scale"}


def _factors(x: np.ndarray) -> dict[str, float]:
    width = x.shape[-1]
    return {
        "2": 2.0,
        "1/2": 0.5,
        "ln 2": float(np.log(2)),
        "1/ln 2": 1 / float(np.log(2)),
        **({f"sqrt({width})": width**0.5, f"1/sqrt({width})": width**-0.5} if width > 1 else {}),
        **({f"{width}": float(width), f"1/{width}": 1 / width} if width > 1 else {}),
    }


def _tried(
    case: Case, cause: str, done: str, instead: Mapping[str, np.ndarray], simplicity: int = 4
) -> Iterator[Hypothesis]:
    """The operation re-run with some operands replaced."""
    view = case.view.fresh()
    for name, value in instead.items():
        view.replace(name, value)
    try:
        with np.errstate(all="ignore"):
            value = np.asarray(case.op.run(view), np.float64)
    except FAILURES:
        return
    if value.size != case.ours.size:
        return
    explained = case.share(value.reshape(case.ours.shape))
    yield Hypothesis(cause, explained, f"re-run with {done}: {explained:.2%} explained", "swap", simplicity)
