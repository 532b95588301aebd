"""Decodes every tensor of a model by our kernels and by reference decoders, and says what that covers.

Three checks. Every tensor's bytes, decoded by us and by gguf-py (or llama.cpp, for the types that gguf-py cannot
decode), must agree bit for bit. For every role and type of weight, the product that the engine really runs must
give the same weights back. And every block format we know is tried on random blocks, whether this model uses it
or not: a decoder that this file does not exercise may be the one that the next file needs.

The table of roles and types says which of them this model exercises, and which were ever found right on this
machine, by these very decoders: what another version of them, another build of the kernels or another instruction
set has shown counts no more. --record keeps that memory elsewhere.

Exit code: 0 everything agrees, 1 a decoder is wrong.

example: scarlet audit model.gguf --json audit.json
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from scarlet_jax import gguf as reader
from scarlet_jax import hub
from scarlet_jax.errors import BadInput
from scarlet_jax.ops import cpu
from scarlet_jax.ops.matmul import linear
from scarlet_jax.ops.qtensor import QTensor, block_size
from scarlet_jax.ops.quants import DECODERS, decode
from scarlet_jax.tools import common

_OPS = Path(cpu.__file__).resolve().parents[1]
_ROWS_AT_ONCE = 1 << 22  # elements decoded together
_RANDOM_BLOCKS = 512
_FLOATS = ("F32", "F16", "BF16")
_PRODUCT_ROWS, _PRODUCT_COLUMNS = 24, 512  # of a weight read back through the engine's product


@dataclasses.dataclass(frozen=True)
class Finding:
    """One decoder caught: where, how many of the elements differ, and the first of them."""

    where: str
    role: str
    qtype: str
    wrong: int
    of: int
    largest: float
    first: int

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.where} ({self.qtype}): {self.wrong} of {self.of} elements differ, by up to {self.largest:.4g}, "
            f"first at {self.first}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    common.add_model_argument(parser)
    parser.add_argument("--record", metavar="F", help="where verified pairs are remembered")
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 if a decoder is wrong."""
    record = Path(args.record) if args.record else _default_record()
    report = audit(hub.resolve(args.model), record)
    if args.json:
        common.write_json(args.json, report)
    if args.json != "-":
        show(report, Console(highlight=False))
    return 1 if report["findings"] else 0


def audit(
    path: Path,
    record: Path | None = None,
    decoder: Callable[[jax.Array, str], jax.Array] = decode,
    implementation: str = "auto",
) -> dict[str, Any]:
    """Check every tensor of the file and every decoder; plain data, ready for JSON.

    `decoder` and `implementation` are what is on trial: `quants.decode`, or something of its signature, and the
    name of who does the products.
    """
    file = reader.read(path)
    qtypes = sorted(set(DECODERS) - set(_FLOATS))
    findings = [f for qtype in qtypes if (f := check_random_blocks(qtype, decoder))]
    with Progress(transient=True, console=Console(stderr=True), disable=not os.isatty(2)) as progress:
        task = progress.add_task("decoding", total=len(file.tensors))
        for name, tensor in file.tensors.items():
            findings += filter(None, [check_tensor(name, tensor, decoder)])
            progress.advance(task)
    findings += check_products(file.tensors, implementation)
    pairs = collections.Counter((role(name), tensor.qtype) for name, tensor in file.tensors.items())
    wrong_types = {f.qtype for f in findings}
    right = {pair for pair in pairs if pair[1] not in wrong_types}
    verified = _remember(record, right, path.name, fingerprint())
    return {
        "model": file.metadata.get("general.name", path.stem),
        "tensors": len(file.tensors),
        "findings": [dataclasses.asdict(f) | {"text": str(f)} for f in findings],
        "coverage": [
            {"role": r, "qtype": q, "tensors": n, "verified": (r, q) in verified}
            for (r, q), n in sorted(pairs.items())
        ],
        "types_not_in_model": sorted(set(DECODERS) - {q for _, q in pairs}),
        "verified_elsewhere": sorted([r, q] for r, q in verified - set(pairs)),
    }


def role(name: str) -> str:
    """What a tensor is for: "blk.3.attn_q.weight" is an "attn_q"."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def check_tensor(name: str, tensor: Any, decoder: Any = decode) -> Finding | None:
    """Our decoder against the reference's, over the whole tensor; no finding for types without a reference."""
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    elements = int(tensor.shape[-1]) if tensor.shape else 1
    step = max(1, _ROWS_AT_ONCE // max(1, elements))
    wrong, largest, first, seen = 0, 0.0, -1, 0
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step])
        differ, by = compare(ours(part, tensor.qtype, decoder), reference(part, tensor.qtype))
        if differ.size:
            first = seen + int(differ[0]) if first < 0 else first
            wrong, largest = wrong + len(differ), max(largest, by)
        seen += len(part) * elements
    return Finding(name, role(name), tensor.qtype, wrong, seen, largest, first) if wrong else None


def check_random_blocks(qtype: str, decoder: Any = decode) -> Finding | None:
    """A decoder on random bytes, whatever the model holds."""
    blocks = np.random.default_rng(0).integers(0, 256, (_RANDOM_BLOCKS, block_size(qtype)[1]), np.uint8)
    mine, theirs = ours(blocks, qtype, decoder), reference(blocks, qtype)
    differ, by = compare(mine, theirs)
    if not differ.size:
        return None
    return Finding("random blocks", "decoder", qtype, len(differ), mine.size, by, int(differ[0]))


def check_products(tensors: Mapping[str, Any], implementation: str = "auto") -> list[Finding]:
    """One weight for each role and type, read back through the engine's own product with unit vectors."""
    findings, done = [], set()
    for name, tensor in tensors.items():
        pair = (role(name), tensor.qtype)
        if tensor.qtype in _FLOATS or len(tensor.shape) != 2 or pair in done:
            continue
        done.add(pair)
        rows = np.ascontiguousarray(tensor.data[:_PRODUCT_ROWS])
        inner = int(tensor.shape[-1])
        columns = np.unique(np.linspace(0, inner - 1, min(inner, _PRODUCT_COLUMNS)).astype(int))
        units = np.zeros((len(columns), inner), np.float32)
        units[np.arange(len(columns)), columns] = 1
        weight = QTensor(jnp.asarray(rows), tensor.qtype)
        read_back = np.asarray(linear(jnp.asarray(units), weight, implementation=implementation)).T
        right = reference(rows, tensor.qtype)[:, columns]
        # A product may add zeros in any order, but one weight times one is that weight to the last few bits.
        off = np.abs(read_back - right) > 1e-6 * np.abs(right).max(initial=1e-30)
        if off.any():
            by = float(np.abs(read_back - right).max())
            at = int(np.flatnonzero(off)[0])
            findings.append(
                Finding(f"{name}, in its product", role(name), tensor.qtype, int(off.sum()), off.size, by, at)
            )
    return findings


def ours(rows: np.ndarray, qtype: str, decoder: Any = decode) -> np.ndarray:
    """Rows of bytes by our decoder, f32."""
    return np.asarray(decoder(jnp.asarray(rows), qtype), np.float32)


def reference(rows: np.ndarray, qtype: str) -> np.ndarray:
    """The same by gguf-py, or by ggml's own code for what gguf-py cannot decode."""
    kind = getattr(GGMLQuantizationType, qtype, None)
    if kind is not None and qtype not in ("Q1_0", "Q2_0"):
        native = {"F32": np.float32, "F16": np.float16}.get(qtype, np.uint8)
        with np.errstate(all="ignore"):
            return np.asarray(gguf.quants.dequantize(rows.view(native), kind), np.float32)
    try:
        from scarlet_jax.tools.engines.ggml import to_float
    except ImportError:
        raise BadInput(
            f"{qtype}: gguf-py cannot decode it; expected the xllamacpp package beside it"
        ) from None
    return to_float(qtype, rows)


def compare(mine: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, float]:
    """Flat indices where two decodings differ, and by how much at most.

    Bits must agree but for what XLA does on purpose: subnormals become zero, and NaNs lose their payload.
    """
    mine, theirs = mine.reshape(-1), theirs.reshape(-1)
    tiny = np.finfo(np.float32).tiny
    same = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))
    same |= (np.abs(mine) < tiny) & (np.abs(theirs) < tiny)
    differ = np.flatnonzero(~same)
    with np.errstate(all="ignore"):
        by = np.abs(mine[differ].astype(np.float64) - theirs[differ])
    return differ, float(np.nan_to_num(by, nan=np.inf).max(initial=0.0))


def _default_record() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scarlet_jax" / "verified.json"


def fingerprint() -> str:
    """What decoded: a digest of the decoders' and products' code, with the instruction set in use.

    A verified pair says something of that code alone; when any of it changes, the record starts anew.
    """
    digest = hashlib.sha256()
    for path in sorted([*_OPS.glob("*.py"), *_OPS.glob("cpu/*")]):
        if path.suffix in (".py", ".cc", ".h", ".so"):
            digest.update(path.name.encode() + path.read_bytes())
    return f"{digest.hexdigest()[:16]} {'portable' if cpu.unavailable() else cpu.isa()}"


def _remember(
    record: Path | None, pairs: set[tuple[str, str]], source: str, decoders: str
) -> set[tuple[str, str]]:
    """All pairs that these decoders ever got right, these included; a record that cannot be used only forgets."""
    if record is None:
        return pairs
    kept: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):
        found = json.loads(record.read_text())
        kept = found["verified"] if found.get("decoders") == decoders else {}
    known = kept | {f"{r} {q}": source for r, q in pairs}
    temporary = record.with_name(f".{record.name}.{os.getpid()}.tmp")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"decoders": decoders, "verified": known}, indent=1, sort_keys=True))
        os.replace(temporary, record)
    except OSError:
        temporary.unlink(missing_ok=True)
    return {(r, q) for r, _, q in (key.rpartition(" ") for key in known)}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Findings, then roles by types."""
    for finding in report["findings"]:
        console.print(f"[bold red]wrong[/]  {finding['text']}")
    if not report["findings"]:
        console.print(
            f"[bold green]right[/]  {report['tensors']} tensors, bit for bit, and every decoder on random blocks"
        )
    console.print(_table(report))
    console.print(
        "● in this model and right   ✗ in this model and wrong   · right in another model   blank: never verified"
    )


def _table(report: Mapping[str, Any]) -> Table:
    elsewhere = {tuple(pair) for pair in report["verified_elsewhere"]}
    here = {(c["role"], c["qtype"]): c for c in report["coverage"]}
    wrong = {f["qtype"] for f in report["findings"]}
    types = sorted({q for _, q in [*here, *elsewhere]} | wrong)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("role")
    for qtype in types:
        table.add_column(qtype, justify="center")
    for name in sorted({r for r, _ in [*here, *elsewhere]}):
        table.add_row(name, *_cells(name, types, here, elsewhere, wrong))
    return table


def _cells(name: str, types: list[str], here: Mapping, elsewhere: set, wrong: set[str]) -> Iterator[str]:
    for qtype in types:
        if (name, qtype) in here:
            yield "[red]✗[/]" if qtype in wrong else f"● {here[name, qtype]['tensors']}"
        else:
            yield "·" if (name, qtype) in elsewhere else ""
