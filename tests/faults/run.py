"""The fault benchmark: injects every fault, asks the analyzer, prints a confusion matrix.

OMP_NUM_THREADS=1 python tests/faults/run.py            # faults on three tiny models, with and without the file
OMP_NUM_THREADS=1 python tests/faults/run.py --clean    # pairs without a fault, of real engines
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
import numpy as np
import oracle
from faults import catalogue, changes, misread, ports, slips, tiny, unseen
from faults.dress import DRESSES

from scarlet_jax.tools import synth
from scarlet_jax.tools.engines import llama_cpp
from scarlet_jax.tools.parity import Dump, compare
from scarlet_jax.tools.parity.weights import parse

COLLECTIONS = {
    "catalogue": tuple(catalogue.FAULTS),
    "ports": (*ports.PORTS, *ports.EXPERTS),
    "slips": (*slips.SLIPS, *slips.EXPERT_SLIPS),
    "unseen": tuple(unseen.UNSEEN),
}


class InMemory(dict):
    """A model's weights as the analyzer takes them from a file."""

    def __init__(self, model: oracle.Model):
        super().__init__({parse(name): value for name, value in model.weights.items()})
        self.metadata = model.metadata


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the analyzer said of one fault on one model, and whether it was right."""

    fault: str
    group: str
    setting: str
    said: str
    verdict: bool
    first: bool
    klass: bool
    cause: bool | None  # None: not named


def dump(model: oracle.Model, tokens: np.ndarray, noise: int = 0) -> Dump:
    """An f32 dump of the float64 forward, with rounding errors of f32's size at every tap when `noise` is a seed."""
    with np.errstate(all="ignore"):
        _, taps = oracle.forward(model, tokens)
    rng = np.random.default_rng(noise)
    shaken = {
        name: (x * (1 + 2**-24 * rng.standard_normal(x.shape))).astype(np.float32)
        if noise
        else x.astype(np.float32)
        for name, x in taps.items()
    }
    return Dump(shaken, engine="test", arch="qwen35", tokens=tokens.tolist(), config={})


def outcomes(
    sizes: str,
    settings: tuple[str, ...],
    only: str = "",
    faults: Sequence[changes.Fault] = tuple(catalogue.FAULTS),
    dress: str = "plain",
    length: int = 0,
) -> Iterator[Outcome]:
    """Every fault on every model that it shows on; the reference in another format, other lengths, if asked for."""
    for size in sizes:
        model = tiny.make(size, seed=ord(size))
        for fault in faults:
            if only not in fault.name or (fault.group == "moe") > ("experts" in tiny.SIZES[size]):
                continue
            tokens = np.random.default_rng([len(fault.name), ord(size)]).integers(
                0, tiny.SIZES[size]["V"], length or fault.tokens
            )
            reference = dump(model, tokens, noise=1)
            with changes.apply(fault, model) as broken:
                ours = dump(broken, tokens, noise=2)
            if not _shows(ours, reference):
                continue
            reference = DRESSES[dress](reference)
            arch = model.metadata["general.architecture"]
            config = {k: v for k, v in model.metadata.items() if k.startswith(f"{arch}.")}
            for setting in settings:
                ours = dataclasses.replace(ours, config=config if setting == "config" else {})
                report = compare(ours, reference, model=InMemory(model) if setting == "model" else None)
                yield judge(fault, f"{size}/{setting}", report)


def _shows(ours: Dump, reference: Dump) -> bool:
    """Whether a fault does anything on this model and these tokens."""
    return any(
        not np.isfinite(ours[n]).all()
        or np.linalg.norm(ours[n] - reference[n]) > 1e-5 * np.linalg.norm(reference[n])
        for n in reference
    )


def misread_outcomes(settings: tuple[str, ...], only: str = "") -> Iterator[Outcome]:
    """Every wrong decoder, on a file of that type and on a stock mix, against llama.cpp on the same file."""
    with tempfile.TemporaryDirectory() as folder:
        for mistake in misread.MISREADS:
            if only not in mistake.name and only not in mistake.qtype:
                continue
            for quant in (mistake.qtype, "Q4_K_M") if mistake.qtype == "Q5_K" else (mistake.qtype,):
                yield from _misread(Path(folder), mistake, quant, settings)


def _misread(
    folder: Path, mistake: misread.Misread, quant: str, settings: tuple[str, ...]
) -> Iterator[Outcome]:
    path = folder / f"{quant}.gguf"
    if not path.exists():
        synth.write(path, models.PACKABLE, quant, seed=1)
    tokens = np.random.default_rng(37).integers(0, models.PACKABLE.vocab_size, 37).tolist()
    theirs, products, version = llama_cpp.taps(path, tokens)
    reference = Dump(theirs, version, arch="qwen35", tokens=tokens, order=list(theirs), weights=products)
    _, right = oracle.forward(misread.misread(oracle.load(path), mistake), tokens)
    taps = {name: x.astype(np.float32) for name, x in right.items()}
    ours = Dump(taps, "a wrong decoder", arch="qwen35", tokens=tokens, order=list(taps), weights=products)
    first = next(tap for tap in theirs if products.get(tap, ("", ""))[1] == mistake.qtype)
    op = first.rpartition("-")[0] or first
    klass = {"model.input_embed": "embedding", "linear_attn_qkv_mixed": "ssm"}[op if "-" in first else first]
    fault = changes.Fault(
        f"{mistake.qtype} {mistake.name}",
        "quant",
        None,
        (op if "-" in first else first,),
        (klass,),
        mistake.causes,
    )
    for setting in settings:
        report = compare(ours, reference, model=path if setting == "model" else None)
        yield judge(fault, f"{quant}/{setting}", report)


SIZES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
PLACES = ("linear_attn_out", "conv_output_silu", "attn_gated", "ffn_swiglu", "l_out")


def sensitivity(settings: tuple[str, ...]) -> str:
    """Fault size against detection: one tap of one layer times 1 + size, in engines that compute in f32."""
    model = tiny.make("a", 1)
    tokens = np.random.default_rng(4).integers(0, tiny.SIZES["a"]["V"], 40)
    reference = dump(model, tokens, noise=1)
    lines = [f"{'one tap times 1 + size':24}" + "".join(f"{size:>9.0e}" for size in SIZES)]
    for setting, place in itertools.product(settings, PLACES):
        layer = 2 if place == "attn_gated" else 1
        cells = []
        for size in SIZES:
            with changes.tap(f"{place}-{layer}", lambda x, _get, size=size: x * (1 + size))(model) as broken:
                ours = dump(broken, tokens, noise=2)
            report = compare(ours, reference, model=InMemory(model) if setting == "model" else None)
            found = report["first"] is not None and report["first"]["tap"] == f"{place}-{layer}"
            cells.append("found" if found else "wrong" if report["exit"] else "-")
        lines.append(f"{place + ', ' + setting:24}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def judge(fault: changes.Fault, setting: str, report: dict[str, Any]) -> Outcome:
    """Compare what was said with what was done."""
    first, cause = report["first"] or {}, report["cause"]
    named = cause["name"] if cause else None
    said = f"{report['verdict']} {first.get('tap')} {report['class']} {named} {report['why']}"
    return Outcome(
        fault.name,
        fault.group,
        setting,
        said,
        report["verdict"] in (("single-op", "systematic") if fault.layers == "all" else ("single-op",)),
        first.get("op") in fault.ops,
        report["class"] in fault.classes,
        None if cause is None else cause["name"] in fault.causes,
    )


def table(results: list[Outcome]) -> str:
    """Shares by group, and the four figures that count."""
    lines = [f"{'group':12}{'faults':>8}{'verdict':>9}{'first':>8}{'class':>8}{'named':>8}{'right':>8}"]
    groups = collections.defaultdict(list)
    for r in results:
        groups[r.group].append(r)
    for group, rows in [*groups.items(), ("all", results)]:
        named = [r for r in rows if r.cause is not None]
        shares = [
            np.mean([r.verdict for r in rows]),
            np.mean([r.first for r in rows]),
            np.mean([r.klass for r in rows]),
        ]
        shares += [len(named) / len(rows), np.mean([r.cause for r in named]) if named else np.nan]
        lines.append(f"{group:12}{len(rows):8}" + "".join(f"{share:8.1%}" for share in shares))
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="abc")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--faults", choices=COLLECTIONS, default="catalogue", help="which collection")
    parser.add_argument("--dress", choices=DRESSES, default="plain", help="the reference in another format")
    parser.add_argument("--length", type=int, default=0, help="tokens of every prompt")
    parser.add_argument("--quant", action="store_true", help="wrong decoders too, against llama.cpp")
    parser.add_argument(
        "--settings",
        default="dumps,model",
        help="dumps: nothing but them; config: ours says the model's sizes, as `scarlet taps` does; model: its weights",
    )
    parser.add_argument(
        "--sensitivity", action="store_true", help="fault size against detection, and no more"
    )
    args = parser.parse_args()
    if args.sensitivity:
        print(sensitivity(tuple(args.settings.split(","))))
        return
    results, start = [], time.time()
    settings = tuple(args.settings.split(","))
    quant = misread_outcomes(settings, args.only) if args.quant else ()
    faults = COLLECTIONS[args.faults]
    injected = outcomes(args.sizes, settings, args.only, faults, args.dress, args.length)
    for outcome in itertools.chain(injected, quant):
        results.append(outcome)
        wrong = [n for n in ("verdict", "first", "klass") if not getattr(outcome, n)]
        wrong += ["cause"] if outcome.cause is False else ["unnamed"] if outcome.cause is None else []
        if wrong:
            print(
                f"{outcome.setting:9} {outcome.fault:28} {','.join(wrong):24} said: {outcome.said}",
                flush=True,
            )
    print(table(results))
    print(f"{len(results)} comparisons in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
