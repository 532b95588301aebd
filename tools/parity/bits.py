"""Misread blocks: what a product with a quantised weight looks like when its bits are taken wrongly.

Two ways to find out. Known mistakes of decoders are re-made, and the product repeated. And where high bits are
stored apart, the residual is regressed on every bit plane of every sub-block at once: whatever plane a decoder
took instead, the regression shows minus one for the right plane and plus one for the one taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from scarlet_jax.tools.parity.blocks import Parts, six_bits, take_apart
from scarlet_jax.tools.parity.graph import Missing
from scarlet_jax.tools.parity.weights import LARGE

_ROWS = 192  # output rows looked at: weights are many, and every row holds the same mistake
_TOKENS = 48


def hypotheses(case: Any, weights: Any, make: Callable[..., Any]) -> list[Any]:
    """Explanations of a broken product by the blocks of its weight."""
    product = _product(case, weights)
    if product is None:
        return []
    found = []
    for name, evidence, decoded in _mistakes(product.parts, product.qtype):
        explained = product.share(decoded)
        found.append(make(name, explained, f"{evidence}: {explained:.2%} explained", "quantisation", 0))
    found += [make(*h) for h in _regression(product)]
    return found


@dataclasses.dataclass(frozen=True)
class _Product:
    """A sample of the broken product: residual (T, rows), inputs (T, in), the rows' blocks in parts.

    A looked-up row is its own product: `inputs` is None, and the rows are those of the tokens.
    """

    residual: np.ndarray
    inputs: np.ndarray | None
    parts: Parts
    qtype: str
    right: np.ndarray
    floor: float
    gain: float

    def share(self, decoded: np.ndarray) -> float:
        """How much of the residual the wrongly decoded weights (blocks, E) explain."""
        with np.errstate(all="ignore"):
            wrong = decoded.reshape(self.right.shape).astype(np.float64) * self.gain - self.right
            left = self.residual - (wrong if self.inputs is None else self.inputs @ wrong.T)
        energy = float((self.residual**2).sum())
        if not energy or not np.isfinite(left).all():
            return 0.0
        return 1.0 - max(0.0, float((left**2).sum()) - self.floor**2) / energy


def _product(case: Any, weights: Any) -> _Product | None:
    looked_up = case.op.klass == "embedding"
    if not (case.op.linear or looked_up) or not hasattr(weights, "raw") or case.view is None:
        return None
    layer = None if case.op.weight in ("output", "token_embd", "output_norm") else case.tap.layer
    key = (layer, case.op.weight)
    if key not in weights:
        return None
    raw, qtype = weights.raw(key)
    residual = case.residual.reshape(len(case.residual), -1)
    inputs = None if looked_up else _inputs(case)
    if raw.ndim != 2 or (inputs is None and not looked_up):
        return None
    tokens = np.linspace(0, len(residual) - 1, min(_TOKENS, len(residual))).astype(int)
    if looked_up:
        rows, columns = np.asarray(case.view.facts.tokens)[slice(*case.view.facts.kept)][tokens], slice(None)
    else:
        rows = np.linspace(0, len(raw) - 1, min(_ROWS, len(raw))).astype(int)
        columns, inputs = rows, inputs[tokens]
    parts = _parts(raw[rows], qtype)
    if parts is None or (not looked_up and residual.shape[1] != len(raw)):
        return None
    large = hasattr(weights, "elements") and weights.elements(key) > LARGE
    right = (weights.rows(key, rows) if large else weights[key][rows]).astype(np.float64)
    plain = parts.decode().reshape(right.shape)
    gain = float((plain * right).sum() / max((plain.astype(np.float64) ** 2).sum(), 1e-300))
    sample = residual[tokens][:, columns]
    floor = case.floor * (sample.size / max(1, residual.size)) ** 0.5
    return _Product(sample, inputs, parts, qtype, right, floor, gain)


def _parts(rows: np.ndarray, qtype: str) -> Parts | None:
    from scarlet_jax.ops.qtensor import block_size

    try:
        size = block_size(qtype)[1]
    except KeyError:
        return None
    return take_apart(rows.reshape(-1, size), qtype)


def _inputs(case: Any) -> np.ndarray | None:
    """What went into the product, as rounded by the engine's arithmetic."""
    caught: list[np.ndarray] = []
    view = case.view
    original = view.linear

    def catch(stem: str, x: np.ndarray) -> np.ndarray:
        if stem == case.op.weight:
            caught.append(view._activation(stem, x))
        return original(stem, x)

    view.linear = catch
    try:
        case.op.run(view)
    except Missing:
        return None
    finally:
        del view.linear
    return caught[-1].reshape(len(caught[-1]), -1).astype(np.float64) if caught else None


Mistake = tuple[str, str, np.ndarray]


def _mistakes(parts: Parts, qtype: str) -> Iterator[Mistake]:
    """Name, what was done, and the weights (blocks, E) that it gives."""
    short = qtype.lower()
    yield from _orders(parts)
    yield from _high_bits(parts, short)
    yield from _scales(parts, short)
    yield from _omissions(parts, short)


def _orders(parts: Parts) -> Iterator[Mistake]:
    """The nibbles (with their high bits) in another order."""
    elements = parts.low.shape[1]
    for length in (16, 32, 64, 128, 256):
        if elements % length:
            continue
        halves = (
            np.arange(length).reshape(2, -1).T.ravel()
        )  # 0, h, 1, h+1, ...: neighbours in a byte kept together
        back = np.argsort(halves)
        swapped = np.roll(np.arange(length), length // 2)
        for label, order in (("neighbours", halves), ("halves", back), ("low and high swapped", swapped)):
            full = (np.arange(0, elements, length)[:, None] + order[None]).ravel()
            text = f"integers of every {length} in another order ({label})"
            yield "nibble-order", text, parts.decode(low=parts.low[:, full], high=parts.high[:, full])
            if parts.planes.shape[-1]:
                yield "nibble-order", f"{text}, high bits in place", parts.decode(low=parts.low[:, full])


def _high_bits(parts: Parts, short: str) -> Iterator[Mistake]:
    planes = parts.planes.shape[-1]
    if not planes:
        return
    own = parts.own
    taken = {
        "one mask for both nibbles, shifted by one": own // 2,
        "one mask for both nibbles, shifted by two": 2 * (own // 2),
        "one mask for both nibbles, the upper one": 2 * (own // 2) + 1,
        "masks of the two nibbles swapped": own ^ 1,
        "masks in reverse order": planes - 1 - own,
        "always the first mask": 0 * own,
        "interleaved for halves": own % max(1, planes // 2) * 2 + own // max(1, planes // 2),
        "halves for interleaved": own // 2 + own % 2 * (planes // 2),
    }
    name = f"{short}-high-bit"
    for label, which in taken.items():
        index = np.clip(which, 0, planes - 1)[None, :, None].repeat(len(parts.low), 0)
        yield (
            name,
            f"high bits: {label}",
            parts.decode(high=np.take_along_axis(parts.planes, index, -1)[..., 0]),
        )
    yield name, "high bits: dropped", parts.decode(high=0 * parts.high)
    yield name, "high bits: inverted", parts.decode(high=parts.planes.max(initial=1) - parts.high)
    if planes == 8 and parts.low.shape[1] == 256:
        yield (
            name,
            "high bits: read along the bytes, eight elements each",
            parts.decode(high=_along_bytes(parts)),
        )


def _along_bytes(parts: Parts) -> np.ndarray:
    """Element i's bit as bit i%8 of byte i/8: the high bits read as one long string."""
    lanes = parts.planes[:, :32]  # (n, lane, bit)
    i = np.arange(256)
    return lanes[:, i // 8, i % 8]


def _scales(parts: Parts, short: str) -> Iterator[Mistake]:
    """Sub-block scales and minima unpacked wrongly or dealt to the wrong elements."""
    name, elements = f"{short}-scale", parts.low.shape[1]
    groups = elements // parts.group
    if groups > 1:
        first = np.repeat(parts.scale[:, :: parts.group], 1, axis=1)

        def dealt(order: np.ndarray, of: np.ndarray) -> np.ndarray:
            return np.repeat(of[:, :: parts.group][:, order], parts.group, axis=1)

        orders = {
            "all from the first sub-block": np.zeros(groups, int),
            "in reverse": np.arange(groups)[::-1],
            "neighbours swapped": np.arange(groups) ^ 1,
            "one sub-block late": np.roll(np.arange(groups), 1),
            "one sub-block early": np.roll(np.arange(groups), -1),
            "interleaved for halves": np.arange(groups).reshape(2, -1).T.ravel(),
            "halves for interleaved": np.arange(groups).reshape(-1, 2).T.ravel(),
        }
        for label, order in orders.items():
            scale = dealt(order, parts.scale)
            minimum = None if parts.minimum is None else dealt(order, parts.minimum)
            yield name, f"scales of sub-blocks {label}", parts.decode(scale=scale, minimum=minimum)
            yield name, f"scales of sub-blocks {label}, minima right", parts.decode(scale=scale)
        del first
    if parts.packed is not None:
        yield from _unpackings(parts, name)


def _unpackings(parts: Parts, name: str) -> Iterator[Mistake]:
    """The 6-bit packing of Q4_K and Q5_K misread."""
    sc, d, dmin = parts.packed.bytes, parts.packed.d, parts.packed.dmin
    scales, minima = six_bits(sc)
    bits = np.unpackbits(sc, axis=1, bitorder="little")
    string = (bits.reshape(len(sc), 16, 6) * (1 << np.arange(6))).sum(axis=2).astype(np.float32)
    a, b, c = sc[:, :4], sc[:, 4:8], sc[:, 8:]
    low_only = np.concatenate([a & 63, c & 15], axis=1).astype(np.float32)
    low_minima = np.concatenate([b & 63, c >> 4], axis=1).astype(np.float32)
    first4 = np.concatenate([a & 63, np.tile((a & 63)[:, :1], (1, 4))], axis=1).astype(np.float32)
    alternatives = {
        "read as one string of 6-bit numbers": (string[:, :8], string[:, 8:]),
        "read as 6-bit pairs": (string[:, ::2], string[:, 1::2]),
        "without the two upper bits of sub-blocks 4 to 7": (low_only, low_minima),
        "and minima exchanged": (minima, scales),
        "right for the first four sub-blocks only": (first4, minima),
        "as whole bytes": (sc[:, :8].astype(np.float32), np.concatenate([c, c], 1).astype(np.float32)),
        "with nibbles of sub-blocks 4 to 7 exchanged": (
            np.concatenate([a & 63, (c >> 4) | ((a >> 6) << 4)], axis=1).astype(np.float32),
            np.concatenate([b & 63, (c & 15) | ((b >> 6) << 4)], axis=1).astype(np.float32),
        ),
    }
    for label, (s, m) in alternatives.items():
        wide_s, wide_m = np.repeat(d * s, 32, axis=1), np.repeat(dmin * m, 32, axis=1)
        yield name, f"scales {label}", parts.decode(scale=wide_s, minimum=wide_m)
    wide = np.repeat(d * scales, 32, axis=1)
    yield (
        name,
        "d and dmin exchanged",
        parts.decode(scale=np.repeat(dmin * scales, 32, axis=1), minimum=np.repeat(d * minima, 32, axis=1)),
    )
    yield (
        f"{name.removesuffix('-scale')}-min",
        "minima not scaled by theirs",
        parts.decode(scale=wide, minimum=np.repeat(np.broadcast_to(dmin, minima.shape), 32, axis=1)),
    )


def _omissions(parts: Parts, short: str) -> Iterator[Mistake]:
    elements = parts.low.shape[1]
    if parts.minimum is not None:
        yield f"{short}-min", "minima left out", parts.decode(minimum=None)
        yield f"{short}-min", "minima added instead of subtracted", parts.decode(minimum=-parts.minimum)
    if parts.zero:
        yield "zero-point", f"zero point {parts.zero:g} left out", parts.decode(zero=0.0)
        for other in (parts.zero - 0.5, parts.zero + 1, parts.zero - 1, parts.zero / 2):
            yield "zero-point", f"zero point {other:g} for {parts.zero:g}", parts.decode(zero=other)
    if parts.table is not None:
        yield f"{short}-codebook", "codes taken for numbers", parts.scale * (parts.low.astype(np.float32) - 8)
    right = parts.decode()
    for period, keep in ((128, 32), (128, 64), (256, 32), (256, 64), (256, 128), (32, 16), (64, 32)):
        if elements % period == 0:
            mask = (np.arange(elements) % period < keep).astype(np.float32)
            yield f"{short}-partial", f"only the first {keep} of every {period} elements filled", right * mask
    unscaled = np.repeat(parts.scale[:, : parts.group], elements // parts.group, axis=1)
    if parts.group < elements:
        yield f"{short}-scale", "one scale for the whole block", parts.decode(scale=unscaled)


def _regression(product: _Product) -> Iterator[tuple[str, float, str, str, int]]:
    """The residual on every (sub-block, bit plane): which plane is read where."""
    parts = product.parts
    planes = parts.planes.shape[-1]
    if not 0 < planes <= 8 or product.inputs is None:
        return
    rows = len(product.right)
    elements = parts.low.shape[1]
    owners = int(parts.own.max()) + 1
    inputs = product.inputs.reshape(len(product.inputs), -1, elements)  # (T, blocks of a row, E)
    unit = (parts.scale * (parts.step * product.gain)).reshape(rows, -1, elements).astype(np.float64)
    stored = parts.planes.reshape(rows, -1, elements, planes)
    features = np.empty((owners * planes, len(inputs), rows))
    for owner in range(owners):
        which = np.flatnonzero(parts.own == owner)
        x = inputs[:, :, which].reshape(len(inputs), -1)
        for plane in range(planes):
            w = (unit[:, :, which] * stored[:, :, which, plane]).reshape(rows, -1)
            features[owner * planes + plane] = x @ w.T
    fit, held = (slice(0, None, 2), slice(1, None, 2)) if rows > 1 else (slice(None), slice(None))
    a = features[:, :, fit].reshape(len(features), -1).T
    y = product.residual[:, fit].ravel()
    coefficients, *_ = np.linalg.lstsq(a, y, rcond=1e-10)
    left = product.residual[:, held] - np.tensordot(coefficients, features[:, :, held], 1)
    energy = float((product.residual[:, held] ** 2).sum())
    explained = 1.0 - max(0.0, float((left**2).sum()) - product.floor**2 / 2) / max(energy, 1e-300)
    table = coefficients.reshape(owners, planes)
    read = [int(np.argmax(row + (np.arange(planes) == owner))) for owner, row in enumerate(table)]
    text = f"regression on bit planes: sub-blocks read planes {read}: {explained:.2%} explained on other rows"
    yield f"{product.qtype.lower()}-high-bit", explained, text, "quantisation", 1
