"""Two dumps in, one report out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity import (
    align,
    causes,
    facts,
    fused,
    graph,
    imitation,
    local,
    metrics,
    names,
    own,
    validity,
    verdict,
)
from scarlet_jax.tools.parity.dump import Dump
from scarlet_jax.tools.parity.logs import Sampled
from scarlet_jax.tools.parity.readers import read
from scarlet_jax.tools.parity.view import Run, residual_stream

# Elements of a tap that are re-run in float64: half a second a layer, whatever the size of the dumps. And tokens
# at least: a chunk of the delta rule with some of the next.
WINDOW, TOKENS = 1 << 20, 80

Source = Dump | str | os.PathLike[str]


def compare(
    ours: Source,
    reference: Source,
    *,
    model: str | os.PathLike[str] | Any = None,
    mapping: Mapping[str, str] | str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Compare two dumps (or files of any known format).

    Args:
        ours: the dump on trial.
        reference: the dump to trust.
        model: the GGUF file that both ran, if at hand: its weights make every product checkable.
        mapping: reader's tap name -> our tap name, or a JSON file of that.

    Returns:
        The report of the contract: plain data, ready for JSON. `report["exit"]` is the command's exit code.

    Raises:
        BadInput: a file is not a dump, or the two share no tap.
    """
    dumps = [names.rename(d if isinstance(d, Dump) else read(d), mapping) for d in (ours, reference)]
    weights = open_weights(model)
    return Comparison(dumps[0], dumps[1], weights).report()


def open_weights(model: Any) -> Any:
    """A model file as weights; anything else (weights already, or None) as it is."""
    if isinstance(model, str | os.PathLike):
        from scarlet_jax.tools.parity.weights import ModelWeights

        weights = ModelWeights(Path(model))
        if not any(key[0] is not None for key in weights):
            raise BadInput(f"{model}: holds no layer's weights; expected the model that both engines ran")
        return weights
    return model


class Comparison:
    """One comparison under way; `report()` is its result, the rest is kept for whoever draws it."""

    def __init__(self, ours: Dump, reference: Dump, weights: Any = None):
        ours, reference = fused.separate(ours, reference), fused.separate(reference, ours)
        self.ours, self.reference, self.weights = ours, reference, weights
        self.alignment = align.align(ours, reference)
        self.rows_cut = _rows_cut(self.alignment, reference)
        if self.rows_cut:
            self._drop_states()
        if not self.alignment.matches:
            raise BadInput(_nothing_shared(ours, reference))
        self.views = tuple(
            align.Aligned(dump, self.alignment.matches, side)
            for dump, side in ((ours, "ours"), (reference, "reference"))
        )
        if weights is not None:
            _check_model(self.alignment.matches, reference, weights)
        self.taps: list[verdict.Tap] = []
        self.narrowed = False
        self.notes: list[str] = [*ours.notes, *reference.notes]
        self.pair = self._pair()

    def report(self) -> dict[str, Any]:
        """Measure, judge, decide, name."""
        self._measure()
        empty = next((t.name for t in self.taps if not t.metrics.tokens.size), None)
        if empty is not None and all(not t.metrics.tokens.size for t in self.taps):
            return self._result("invalid", why=f"every tap is empty, first {empty}")
        measured = {t.name: t.metrics for t in self.taps}
        void = validity.check(self.ours, self.reference, self.views, measured)
        if void:
            return self._result("invalid", why=void)
        self._judge()
        verdict.find_broken(self.taps)
        if verdict.other_model(self.taps):
            return self._result(
                "invalid", why="other model: the learned weights differ at nearly every operation"
            )
        self.taps = own.insert(
            self.taps, self.pair, self.ours, self.alignment.only_ours, self.pair.ours.kinds
        )
        return self._decide()

    def _decide(self) -> dict[str, Any]:
        label, first, factor = verdict.decide(self.taps)
        why = verdict.unclear(self.taps, max(self.pair.resolution)) if first is None else ""
        if why:
            return self._result("inconclusive", why=why)
        cause = None
        if first is not None:
            cause = causes.name(self.pair, self.taps, first, self.weights)
            if cause and cause["kind"] == "quantisation":
                label, first, factor = verdict.decide(self.taps, prefer="qtype")
            if cause and cause["kind"] == "place":
                self.notes.append(f"{first.name}: {cause['evidence']}")
                cause = None
        return self._result(label, first, factor, cause)

    def _pair(self) -> local.Pair:
        metadata = getattr(self.weights, "metadata", None)
        known = facts.gather([self.reference, self.ours], metadata)
        if self.rows_cut:
            known = dataclasses.replace(known, cut=True, first_position=max(0, self.rows_cut))
        layers = sorted({layer for n in self.alignment.matches if (layer := split(n)[1]) is not None})
        kinds = {layer: self._kind(layer) for layer in layers}
        before = residual_stream(layers)
        learned: dict[tuple[int | None, str], np.ndarray] = {}
        qtypes = _qtypes(self.ours, self.reference, self.weights)

        def run(taps: Mapping[str, np.ndarray]) -> Run:
            return Run(taps, kinds, before, known, learned, self.weights, qtypes)

        sampled = tuple(any(isinstance(v, Sampled) for v in _values(d)) for d in (self.ours, self.reference))
        return local.Pair(
            run(self.views[0]),
            run(self.views[1]),
            arithmetic=(local.Arithmetic(), local.Arithmetic()),
            resolution=(self.ours.resolution, self.reference.resolution),
            whole=(run(align.Whole(self.ours)), run(align.Whole(self.reference))),
            sampled=sampled,
        )

    def _drop_states(self) -> None:
        """States belong to the rows of their run: two runs that cover other rows start from other ones."""
        for name in [n for n in self.alignment.matches if split(n)[0] in _STATES]:
            del self.alignment.matches[name]
            self.alignment.only_ours.append(name)
            self.alignment.only_reference.append(name)

    def _kind(self, layer: int) -> str:
        """What a layer is: its mixers, and whether it has experts; "attention parallel" has both mixers at once."""
        recurrent = self._shows(layer, _RECURRENT, "ssm_out")
        attention = self._shows(layer, _ATTENTION, "attn_output")
        mixer = "attention parallel" if recurrent and attention else "ssm" if recurrent else "attention"
        return f"{mixer} moe" if self._shows(layer, ("ffn_moe_logits", "ffn_moe_out"), "") else mixer

    def _shows(self, layer: int, ops: Sequence[str], weight: str) -> bool:
        """Whether one of a layer's taps is of these operations, or the model has this weight there."""
        if self.weights is not None and (layer, weight) in self.weights:
            return True
        return any(f"{op}-{layer}" in dump for op in ops for dump in (self.ours, self.reference))

    def _measure(self) -> None:
        for name, match in self.alignment.matches.items():
            op_name, layer = split(name)
            kind = self.pair.reference.kinds[layer] if layer is not None else "end"
            op = graph.find(op_name, kind)
            weight, qtype = self._weight(name, op, layer)
            measured = metrics.measure(self.views[0][name], self.views[1][name])
            self.taps.append(
                verdict.Tap(
                    name,
                    op_name,
                    layer,
                    kind,
                    op.klass if op else _guess_class(op_name, kind),
                    weight,
                    qtype,
                    match.how,
                    measured,
                    None,
                    alias=op.alias if op else False,
                )
            )

    def _weight(self, name: str, op: graph.Op | None, layer: int | None) -> tuple[str, str]:
        for dump in (self.ours, self.reference):
            if name in dump.weights:
                return dump.weights[name]
        if op is None or not op.weight:
            return "", ""
        key = (None if layer is None or op.weight == "token_embd" else layer, op.weight)
        if self.weights is not None and hasattr(self.weights, "tensor_name"):
            return self.weights.tensor_name(key), self.weights.qtype(key) if key in self.weights else ""
        stem = op.weight if "." in op.weight or op.weight == "ssm_a" else f"{op.weight}.weight"
        return (stem if key[0] is None else f"blk.{layer}.{stem}"), ""

    def _narrow(self) -> None:
        """Judge a large dump on a window of its tokens: the first ones, or those where divergence sets in."""
        tokens = max((len(t.metrics.tokens) for t in self.taps if t.layer is not None), default=0)
        widths = [t.metrics.size // tokens for t in self.taps if tokens and len(t.metrics.tokens) == tokens]
        if not widths or tokens * max(widths) <= WINDOW:
            return
        count = min(tokens, max(TOKENS, WINDOW // max(widths)))
        if count >= tokens:
            return
        start = verdict.onset(self.taps, tokens, count)
        self.notes.append(
            f"large dumps: operations re-run on tokens {start} to {start + count - 1} of {tokens}"
        )
        self.pair = local.windowed(self.pair, tokens, start, count)
        self.narrowed = True

    def _judge(self) -> None:
        self._narrow()
        imitation.infer(self.pair, self.taps, (self.ours, self.reference), self.alignment.only_ours)
        for side, arithmetic in zip(("ours", "reference"), self.pair.arithmetic, strict=True):
            if str(arithmetic):
                self.notes.append(
                    f"{side}: taken to compute with {arithmetic}; a fault of that size would look the same"
                )
        clean = True
        for tap in self.taps:
            clean = clean and tap.metrics.relative_l2 == 0
            if clean or not tap.metrics.tokens.size:
                continue
            op = graph.find(tap.op, tap.kind)
            with np.errstate(all="ignore"):
                tap.local = local.judge(self._pair_for(tap), op, tap.layer, tap.kind, tap.name)
            tap.local.residual = tap.local.ours_residual = None  # made again for the few that are looked into

    def _pair_for(self, tap: verdict.Tap) -> local.Pair:
        """A state at the end of all tokens does not follow from some of them."""
        if not self.narrowed or tap.op not in ("new_state", "conv_state_last", "conv_state_update"):
            return self.pair
        facts_ = dataclasses.replace(self.pair.reference.facts, cut=True)
        runs = (dataclasses.replace(run, facts=facts_) for run in (self.pair.ours, self.pair.reference))
        return dataclasses.replace(self.pair, ours=next(runs), reference=next(runs))

    def _result(
        self,
        label: str,
        first: verdict.Tap | None = None,
        factor: verdict.Factor | None = None,
        cause: Mapping[str, Any] | None = None,
        why: str = "",
    ) -> dict[str, Any]:
        spread, peak = verdict.axes(self.taps)
        return {
            "verdict": label,
            "exit": verdict.EXIT[label],
            "class": (cause or {}).get("class") or first.klass
            if first
            else "input"
            if why.startswith("other tokens")
            else None,
            "first": _first(first),
            "factor": {"kind": factor.kind, "value": factor.value} if factor else None,
            "cause": {k: cause[k] for k in ("name", "evidence", "confidence")} if cause else None,
            "why": why,
            "axes": {"spread": spread, "peak": _json_float(peak)},
            "engines": {"ours": self.ours.engine, "reference": self.reference.engine},
            "model": self.reference.model or self.ours.model,
            "tokens": len(self.reference.tokens or self.ours.tokens),
            "taps": [_row(tap) for tap in self.taps],
            "unmatched": {"ours": self.alignment.only_ours, "reference": self.alignment.only_reference},
            "notes": self.notes + [f"{t.name}: {t.note}" for t in self.taps if t.note],
        }


_RECURRENT = (
    *("linear_attn_qkv_mixed", "conv_output_silu", "linear_attn_out", "final_output", "new_state", "z"),
    *("ssm_conv", "ssm_in", "ssm_in_proj", "mamba_out", "conv_in_proj", "conv_out_proj"),
)
_ATTENTION = ("Kcur", "Kcur_normed", "Qcur", "Vcur", "kq", "attn_pregate")

# What a run starts from; where it ends up, both runs share.
_STATES = ("state_predelta", "conv_states", "conv_states_reshaped", "conv_input")


def _check_model(names: Iterable[str], dump: Dump, weights: Any) -> None:
    """Raise BadInput where a norm's weight says that the model is of another width than the dump's."""
    for name in names:
        op, layer = split(name)
        stem = {"attn_norm": "attn_norm", "result_norm": "output_norm"}.get(op)
        if stem is None or (layer, stem) not in weights:
            continue
        shape, expected = dump[name].shape, np.size(weights[layer, stem])
        if expected not in shape:
            said = f"its {stem} has {expected} entries, {name} is {list(shape)}"
            raise BadInput(f"--model: {said}; expected the model that both ran")


def _rows_cut(alignment: align.Alignment, reference: Dump) -> int:
    """How many leading rows of the run the comparison leaves out (-1 for trailing ones); 0 where it has them all."""
    for name, match in alignment.matches.items():
        if match.how.startswith(("last", "first")) and match.how.endswith("rows") and "-" in name:
            if match.how.startswith("first"):
                return -1
            total = len(reference.tokens)
            return max(1, total - int(match.how.split()[1]))
    return 0


def _values(dump: Dump) -> Iterable[Any]:
    """The arrays of a log; nothing for dumps on disk, whose arrays are whole."""
    return (dump[name] for name in dump) if dump.resolution else ()


def split(name: str) -> tuple[str, int | None]:
    """Operation and layer: "l_out-3" gives ("l_out", 3), "result_norm" gives ("result_norm", None)."""
    op, _, layer = name.rpartition("-")
    return (op, int(layer)) if op and layer.isdigit() else (name, None)


def _qtypes(ours: Dump, reference: Dump, weights: Any) -> dict[tuple[int | None, str], str]:
    from scarlet_jax.tools.parity.weights import parse

    found = {parse(weight): qtype for dump in (ours, reference) for weight, qtype in dump.weights.values()}
    if weights is not None and hasattr(weights, "qtype"):
        found |= {key: weights.qtype(key) for key in weights}
        if (None, "output") in weights:  # a tied model's is its table
            found[None, "output"] = weights.qtype((None, "output"))
    fused = {layer: qtype for (layer, stem), qtype in found.items() if stem == "attn_qkv"}
    parts = ((layer, stem) for layer in fused for stem in ("attn_q", "attn_k", "attn_v"))
    return {key: fused[key[0]] for key in parts} | found


def _first(tap: verdict.Tap | None) -> dict[str, Any] | None:
    if tap is None:
        return None
    return {
        "tap": tap.name,
        "layer": tap.layer,
        "op": tap.op,
        "weight": tap.weight or None,
        "qtype": tap.qtype or None,
    }


def _row(tap: verdict.Tap) -> dict[str, Any]:
    m, evidence = tap.metrics, tap.local
    return {
        "name": tap.name,
        "layer": tap.layer,
        "op": tap.op,
        "class": tap.klass,
        "relative_l2": _json_float(m.relative_l2),
        "norm_ratio": _json_float(m.norm_ratio),
        "cosine": _json_float(m.cosine),
        "max_abs": _json_float(m.max_abs),
        "max_at": list(m.max_at),
        "local_relative_l2": _json_float(evidence.difference) if evidence else 0.0,
        "noise_floor": _json_float(evidence.floor) if evidence else None,
        "method": evidence.method if evidence else "identical",
        "weight": tap.weight or None,
        "qtype": tap.qtype or None,
        "aligned": tap.aligned,
        "broken": tap.broken,
    }


def _json_float(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# Words in the names of taps that no operation describes -> the class; the first that occurs.
_WORDS = {
    **{"moe": "moe", "exp": "moe", "ffn": "ffn", "embd": "embedding"},
    **dict.fromkeys(("mamba", "ssm", "conv", "dt_", "memory", "history"), "ssm"),
    **{"norm": "norm"},
    **dict.fromkeys(("cur", "kq", "attn"), "attention"),
}


def _guess_class(op: str, kind: str) -> str:
    mixer = kind.split()[0]
    other = mixer if mixer in ("ssm", "attention") else "head"
    return next((klass for word, klass in _WORDS.items() if word in op.lower()), other)


def _nothing_shared(ours: Dump, reference: Dump) -> str:
    name = next((name for name in reference if name in ours), None)
    if name is None:
        few = f"{_few(ours)} against {_few(reference)}"
        return f"the dumps share no tap: {few}; expected common names or a --map"
    shapes = f"{list(ours[name].shape)} against {list(reference[name].shape)}"
    return f"no tap has the same shape in both dumps: {name} is {shapes}; expected two runs of one model on one prompt"


def _few(dump: Sequence[str] | Dump) -> str:
    listed = list(dump)[:3]
    return f"{', '.join(listed)}{', ...' if len(dump) > 3 else ''}" if listed else "no taps at all"
