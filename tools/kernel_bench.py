"""Measure the CPU kernels: GB/s of packed weights and GFLOP/s, by block format and number of rows.

    scarlet kernel-bench --types Q4_K,Q6_K --rows 1,4,512

`error` is the relative L2 distance of some rows from their products in float64: of the exact kernels, and
with --fast of the fast mode where it covers the format.

Every figure is the median of repetitions that alternate with two probes of the machine, taken by the same
threads: reading memory once (GB/s), the roof of few rows, and fused multiply-adds in registers (GFLOP/s),
the roof of many. `of roof` compares with the nearer of the two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scarlet_jax.errors import BadInput
from scarlet_jax.ops import cpu
from scarlet_jax.ops.cpu import fast
from scarlet_jax.ops.qtensor import QTensor, block_size
from scarlet_jax.ops.quants import DECODERS
from scarlet_jax.tools import common

# Weights for few rows are read from memory: several times what a last-level cache holds. For many rows a
# matrix of a model's usual size does.
BYTES_FOR_FEW_ROWS = 192 * 2**20
MANY_ROWS = 32
COLUMNS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--types", default="all", help="block formats, comma separated (default: all)")
    parser.add_argument("--rows", default="1,4,512", help="rows of activations (default: 1,4,512)")
    parser.add_argument(
        "--isa", default="", help="amx, avx512vnni, avx512, avx2 or generic (default: the best one here)"
    )
    parser.add_argument("--fast", action="store_true", help="activations of 8 bits")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--repeat", type=int, default=7, help="repetitions (default: 7)")
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int | None:
    """Measure, and print a table or JSON."""
    if reason := cpu.unavailable():
        raise BadInput(f"kernel-bench: {reason}")
    types = list(DECODERS) if args.types == "all" else args.types.split(",")
    if unknown := [t for t in types if t not in DECODERS]:
        raise BadInput(f"--types {unknown[0]}: expected some of {', '.join(DECODERS)}")
    try:
        counts = [int(n) for n in args.rows.split(",")]
    except ValueError:
        raise BadInput(f"--rows {args.rows}: expected numbers, comma separated") from None
    if min(counts) < 1 or args.repeat < 1:
        raise BadInput(f"--rows {args.rows} --repeat {args.repeat}: expected 1 or more of both")
    cpu.set_isa(args.isa)
    if args.fast and (reason := fast.unavailable()):
        raise BadInput(f"--fast: {reason}")
    cpu.set_threads(args.threads)
    cases = [(qtype, count) for qtype in types for count in counts]
    console = Console(stderr=True)
    steps = track(cases, "measuring", console=console, transient=True, disable=not sys.stderr.isatty())
    results = [measure(qtype, count, args.repeat, fast=args.fast) for qtype, count in steps]
    if args.json:
        common.write_json(args.json, {"isa": cpu.isa(), "threads": cpu.threads(), "results": results})
    if args.json != "-":
        Console().print(_table(results))
    return None


def measure(qtype: str, count: int, repeat: int, *, fast: bool = False) -> dict:
    """Time `count` rows of activations times a matrix of `qtype`, beside the two probes."""
    w = QTensor(jax.device_put(_random_rows(qtype, count)), qtype)
    x = jax.device_put(np.random.default_rng(1).standard_normal((count, COLUMNS)).astype(np.float32))
    product = jax.jit(lambda x, w: cpu.qmatmul(x, w, fast=fast))
    library = cpu._library()
    probe = np.ones(BYTES_FOR_FEW_ROWS, np.uint8)
    iterations = 2_000_000
    flops = library.scarlet_fma_all(iterations // 100) * 100
    jobs: list[Callable[[], object]] = [
        lambda: product(x, w).block_until_ready(),
        lambda: cpu.read_memory(probe),
        lambda: library.scarlet_fma_all(iterations),
    ]
    seconds = alternate(jobs, repeat)
    out = w.shape[0]
    result = {
        "type": qtype,
        "rows": count,
        "gigabytes_per_second": w.blocks.nbytes / seconds[0] / 1e9,
        "gigaflops": 2 * count * out * COLUMNS / seconds[0] / 1e9,
        "read_bandwidth": probe.nbytes / seconds[1] / 1e9,
        "fma_peak": flops / seconds[2] / 1e9,
        "error": _error(product(x, w), x, w),
    }
    roofs = (
        result["gigabytes_per_second"] / result["read_bandwidth"],
        result["gigaflops"] / result["fma_peak"],
    )
    return result | {"roofline_fraction": max(roofs)}


def _error(y: jax.Array, x: jax.Array, w: QTensor) -> float:
    """Relative L2 distance of the first 64 columns of y from float64."""
    rows = np.asarray(cpu.decode(w.blocks[:64], w.qtype), np.float64)
    expected = np.asarray(x, np.float64) @ rows.T
    return float(np.linalg.norm(np.asarray(y[:, : len(rows)]) - expected) / np.linalg.norm(expected))


def alternate(jobs: list[Callable[[], object]], repeat: int) -> list[float]:
    """The median seconds of each job, run in turns after one turn that does not count."""
    taken: list[list[float]] = [[] for _ in jobs]
    for turn in range(repeat + 1):
        for job, times in zip(jobs, taken, strict=True):
            start = time.perf_counter()
            job()
            if turn:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def _random_rows(qtype: str, count: int) -> np.ndarray:
    """Packed weights of random bits, finite: uint8 (out, row bytes)."""
    elements, size = block_size(qtype)
    row_bytes = COLUMNS // elements * size
    out = 4096 if count >= MANY_ROWS else BYTES_FOR_FEW_ROWS // row_bytes
    rows = np.random.default_rng(0).integers(0, 256, (out, row_bytes), np.uint8)
    return rows & 0x3F  # no exponent of an f16 or f32 scale is then that of infinity


def _table(results: list[dict]) -> Table:
    table = Table(title=f"{cpu.isa()}, {cpu.threads()} threads")
    for heading in ("type", "rows", "GB/s", "GFLOP/s", "read GB/s", "FMA GFLOP/s", "of roof", "error"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for r in results:
        table.add_row(
            r["type"],
            str(r["rows"]),
            f"{r['gigabytes_per_second']:.2f}",
            f"{r['gigaflops']:.1f}",
            f"{r['read_bandwidth']:.1f}",
            f"{r['fma_peak']:.0f}",
            f"{r['roofline_fraction']:.0%}",
            f"{r['error']:.1e}",
        )
    return table
