"""Practises the fault that this project was born from: puts it into a copy of our decoder, and finds it again.

Q5_K keeps the fifth bits of 256 weights as eight planes of 32 bytes. The faulty copy has one mask for both nibbles
of a byte: a high nibble takes the bit of the low one. Everything else, this program's own decoders too, stays right.

First a stock mix, whose attn_qkv is Q5_K: the text becomes garbage, and engine-parity names the operation, the
weight, the type and the cause from two dumps, ours and llama.cpp's. Then a "merge", the same model with Q6_K in
place of Q5_K: the text is right, nothing differs, and only `audit` gives the fault away.

Exit code: 0 if the fault is found and named, 1 if not.

example: scarlet drill --json drill.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import scarlet_jax
from scarlet_jax import gguf as reader
from scarlet_jax import hub
from scarlet_jax.errors import BadInput
from scarlet_jax.ops import cpu, implementations, portable
from scarlet_jax.ops.qtensor import QTensor, block_size
from scarlet_jax.ops.quants import decode
from scarlet_jax.tools import audit, common, requantise
from scarlet_jax.tools.engines import llama_cpp, scarlet
from scarlet_jax.tools.parity import Dump, terminal
from scarlet_jax.tools.parity.compare import Comparison
from scarlet_jax.tools.parity.weights import ModelWeights

BROKEN, SPARED = "Q5_K", "Q6_K"
CAUSE = "q5_k-high-bit"
PROMPT = "One winter, Max rode to the beach. It was cold."
FAULTY = "faulty copy"  # the implementation's name, while there is one
_QH = slice(16, 48)  # bytes of a Q5_K block: the fifth bits, bit b of each byte for sub-block b
_DIFF = """\
  low  = (qs & 0x0F) | fifth_bit(qh, 2 * j)     << 4
[red]- high = (qs >> 4)   | fifth_bit(qh, 2 * j + 1) << 4[/]
[green]+ high = (qs >> 4)   | fifth_bit(qh, 2 * j)     << 4[/]"""


# --- The fault ----------------------------------------------------------------------------------------------


def misread(rows: jax.Array, qtype: str) -> jax.Array:
    """Packed rows as the faulty copy sees them: in Q5_K both nibbles of a byte have the low one's fifth bit.

    What a wrong decoder makes of right bytes is what the right one makes of bytes with each odd plane of `qh`
    replaced by the even one below it.
    """
    if qtype != BROKEN:
        return rows
    blocks = rows.reshape(*rows.shape[:-1], -1, block_size(BROKEN)[1])
    even = blocks[..., _QH] & 0x55
    return blocks.at[..., _QH].set(even | (even << 1)).reshape(rows.shape)


def decode_wrongly(rows: jax.Array, qtype: str) -> jax.Array:
    """`quants.decode` with the fault."""
    return decode(misread(rows, qtype), qtype)


class FaultyCopy:
    """An implementation (see `ops.implementations`): each operation of the best there is, of misread weights."""

    def __init__(self) -> None:
        self._right = portable if cpu.unavailable() else cpu

    def unavailable(self) -> None:
        """It can always run."""

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        right = getattr(self._right, operation)

        def faulty(*arguments: Any, **options: Any) -> Any:
            misread_all = jax.tree.map(_misread_weight, arguments, is_leaf=lambda x: isinstance(x, QTensor))
            return right(*misread_all, **options)

        return faulty


def _misread_weight(x: Any) -> Any:
    if not isinstance(x, QTensor):
        return x
    return dataclasses.replace(x, blocks=misread(jnp.asarray(x.blocks), x.qtype))


@contextlib.contextmanager
def faulty_copy() -> Iterator[None]:
    """Within, there is an implementation of the name FAULTY, for those who ask for it."""
    implementations.IMPLEMENTATIONS[FAULTY] = FaultyCopy()
    try:
        yield
    finally:
        del implementations.IMPLEMENTATIONS[FAULTY]


# --- The models ---------------------------------------------------------------------------------------------


def make_merge(source: Path, target: Path) -> None:
    """A copy of a file with every Q5_K tensor requantised to Q6_K by llama.cpp's quantiser."""
    requantise.write(source, target, lambda _, qtype: SPARED if qtype == BROKEN else qtype)


def stock_model(name: str | None) -> Path:
    """The file to practise on."""
    path = hub.resolve(name)
    if BROKEN not in {tensor.qtype for tensor in reader.read(path).tensors.values()}:
        raise BadInput(f"{path}: no tensor is {BROKEN}; expected a stock mix, such as Q4_K_M")
    return path


# --- The practice -------------------------------------------------------------------------------------------


def practise(path: Path, prompt: str, count: int) -> dict[str, Any]:
    """One model by the right decoder and by the faulty copy: texts and verdicts."""
    model = scarlet_jax.load(path)
    tokens = model.tokenizer.encode(prompt)
    reference = _dump(tokens, *llama_cpp.taps(path, tokens))
    reports = {
        side: Comparison(
            _dump(tokens, *scarlet.taps(path, tokens, implementation=implementation)),
            reference,
            ModelWeights(path),
        ).report()
        for side, implementation in (("before", FAULTY), ("after", None))
    }
    tap = (reports["before"]["first"] or {}).get("tap")
    return {
        "text_right": _text(model, tokens, count),
        "text_wrong": _text(scarlet_jax.load(path, implementation=FAULTY), tokens, count),
        **{key: reports["before"][key] for key in ("verdict", "class", "first", "factor", "cause")},
        "sentence": terminal.sentence(reports["before"]),
        "before": _figures(reports["before"], tap),
        "after": _figures(reports["after"], tap) | {"verdict": reports["after"]["verdict"]},
    }


def _dump(tokens: Sequence[int], taps: Mapping[str, Any], weights: Any, engine: str) -> Dump:
    return Dump(taps, engine, tokens=tokens, order=list(taps), weights=weights)


def _text(model: scarlet_jax.Model, tokens: Sequence[int], count: int) -> str:
    """The prompt's greedy continuation."""
    return model.tokenizer.decode(model.generate(tokens, max_tokens=count), special=False)


def _figures(report: Mapping[str, Any], name: str | None) -> dict[str, float | None]:
    """How far a tap is from the reference's."""
    tap = next((tap for tap in report["taps"] if tap["name"] == name), {})
    return {key: tap.get(key) for key in ("norm_ratio", "relative_l2", "cosine")}


def found(result: Mapping[str, Any]) -> bool:
    """Whether the stock mix's text fell apart and the fault was named, and the audit alone found it in the merge."""
    stock, merge = result["stock"], result["merge"]
    falls_apart = stock["text_right"] != stock["text_wrong"]
    named = (stock["first"] or {}).get("qtype") == BROKEN and (stock["cause"] or {}).get("name") == CAUSE
    survives = merge["text_right"] == merge["text_wrong"] and merge["verdict"] in ("clean", "noise")
    caught = {finding["qtype"] for finding in merge["audit"]["findings"]} == {BROKEN}
    return bool(
        falls_apart and named and stock["after"]["verdict"] in ("clean", "noise") and survives and caught
    )


# --- The command --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a .gguf with Q5_K tensors (the model in the box)")
    add("-p", "--prompt", metavar="TEXT", default=PROMPT, help="what to continue")
    add("-n", metavar="N", type=int, default=64, help="tokens of text (64)")
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 if the fault was not found."""
    if args.n < 1:
        raise BadInput(f"-n {args.n}: expected 1 or more")
    if not args.prompt:
        raise BadInput("-p: the prompt is empty; expected one token or more")
    with tempfile.TemporaryDirectory(prefix="scarlet-drill-") as folder, faulty_copy():
        path = stock_model(args.model)
        merge = Path(folder) / "merge.gguf"
        result: dict[str, Any] = {"model": path.name, "prompt": args.prompt}
        with common.waiting("a stock mix"):
            result["stock"] = practise(path, args.prompt, args.n)
        make_merge(path, merge)
        with common.waiting("a merge"):
            result["merge"] = practise(merge, args.prompt, args.n)
            result["merge"]["audit"] = audit.audit(merge, None, decode_wrongly, FAULTY)
    result["found"] = found(result)
    if args.json:
        common.write_json(args.json, result)
    if args.json != "-":
        show(result, Console(highlight=False))
    return 0 if result["found"] else 1


def show(result: Mapping[str, Any], console: Console) -> None:
    """The drill as a story in two parts."""
    stock, merge = result["stock"], result["merge"]
    say = functools.partial(console.print, soft_wrap=True)
    say("The fault: in a copy of our Q5_K decoder, one mask for both nibbles of a byte.")
    say(_DIFF)
    console.rule(f"1. A stock mix: {result['model']}, some of whose weights are {BROKEN}", align="left")
    _show_texts(stock, result["prompt"], console)
    say("Which operation is it? Every one of ours, faulty copy and all, beside llama.cpp's on the same file:")
    say(f"[bold red]{stock['verdict']}[/]  {escape(stock['sentence'])}")
    console.print(_before_and_after(stock))
    console.rule(f"2. A merge: the same model with {SPARED} in place of {BROKEN}", align="left")
    _show_texts(merge, result["prompt"], console)
    say(f"[bold green]{merge['verdict']}[/]  {escape(merge['sentence'])}")
    say(
        "The decoder is as wrong as before, and nothing in this file shows it. The audit tries what is not used, too:"
    )
    audit.show(_packed(merge["audit"]), console)
    say(
        f"{BROKEN}: wrong, and used by no weight here. A file that does use it will be garbage, as the first was."
    )
    end = "[bold green]found[/], and named" if result["found"] else "[bold red]not found[/] as it should be"
    console.print(f"\nThe fault was {end}.")


def _packed(report: Mapping[str, Any]) -> dict[str, Any]:
    """The audit less the weights that are not packed, whose many roles would hide the rest."""
    return {**report, "coverage": [pair for pair in report["coverage"] if pair["qtype"] != "F32"]}


def _show_texts(part: Mapping[str, Any], prompt: str, console: Console) -> None:
    """What the right decoder and the faulty one make of the prompt; once where that is the same."""
    same = part["text_right"] == part["text_wrong"]
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, key in (
        [("both", "text_right")] if same else [("right", "text_right"), ("faulty", "text_wrong")]
    ):
        text = common.visible(part[key]).replace("\n", " ")
        table.add_row(f"[bold]{label}[/]", f"[dim]{escape(prompt)}[/]{escape(text)}")
    console.print(table)


def _before_and_after(part: Mapping[str, Any]) -> Table:
    """The first broken tap's distance to llama.cpp's: a ratio and a cosine of 1 and an L2 of 0 are no distance."""
    first = part["first"] or {"tap": "?"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (first["tap"], "norm ratio", "relative L2", "cosine"):
        table.add_column(heading, justify="left" if heading == first["tap"] else "right")
    for label, key in (("with the fault", "before"), ("without it", "after")):
        numbers = (part[key][name] for name in ("norm_ratio", "relative_l2", "cosine"))
        table.add_row(label, *("-" if number is None else f"{number:.4f}" for number in numbers))
    return table
