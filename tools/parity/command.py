"""Compares two engines' activations and says which operation is broken, or that none is.

OURS and REFERENCE are dumps: `scarlet taps` files, logs of llama-eval-callback or llama-debug, folders or
archives of arrays named by module. With --model the weights are at hand and every product can be checked.
With --against, OURS is a model, that in the box where none is named: both engines run it on a set of prompts and
are compared.

Exit code: 0 clean or noise, 1 a fault, 2 no valid comparison, 3 inconclusive.

example: scarlet parity ours.safetensors theirs.safetensors --model model.gguf --html report.html
         scarlet parity model.gguf --against llama.cpp
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity import against, names, page, terminal
from scarlet_jax.tools.parity.compare import Comparison, open_weights
from scarlet_jax.tools.parity.readers import read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument(
        "ours", metavar="OURS", nargs="?", help="a dump, or with --against a model (the model in the box)"
    )
    parser.add_argument("reference", metavar="REFERENCE", nargs="?", help="the dump to trust")
    parser.add_argument("--model", metavar="M.gguf", help="the file that both engines ran")
    parser.add_argument(
        "--against", choices=against.ENGINES, help="run the model OURS in ours and this engine"
    )
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="with --against: this text instead of the set")
    parser.add_argument("--tokens", metavar="1,2,3", help="with --against: these ids instead of the set")
    parser.add_argument("--lib", metavar="PATH", help="with --against llama.cpp: a libllama.so to run")
    parser.add_argument(
        "--map", metavar="F", help="a JSON file of tap name -> our tap name ({} is the layer)"
    )
    parser.add_argument("--json", metavar="F", help="write the report as JSON (- for stdout)")
    parser.add_argument("--html", metavar="F", help="write the report as one self-contained page")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code is the verdict's."""
    console = Console(stderr=args.json == "-", soft_wrap=True)
    if args.against:
        return _against(args, console)
    if args.ours is None or args.reference is None:
        raise BadInput("expected two dumps, OURS and REFERENCE, or one model and --against")
    for flag in ("prompt", "tokens", "lib"):
        if getattr(args, flag) is not None:
            raise BadInput(f"--{flag}: only with --against")
    weights = open_weights(args.model)
    dumps = [names.rename(read(path), args.map) for path in (args.ours, args.reference)]
    comparison = Comparison(dumps[0], dumps[1], weights)
    report = comparison.report()
    _write(args, report, _page(args, report, comparison))
    terminal.show(report, console)
    return report["exit"]


def _against(args: argparse.Namespace, console: Console) -> int:
    if args.reference is not None:
        raise BadInput(
            f"{args.reference}: --against runs both engines; expected one model and no second dump"
        )
    worst, worst_page, all_reports = None, "", []
    for case in against.cases(args.ours, args.against, prompt=args.prompt, tokens=args.tokens, lib=args.lib):
        comparison = case.compare()
        report = comparison.report() | {"case": case.name}
        all_reports.append(report)
        console.print(
            f"{case.name}: [{terminal.COLOURS[report['verdict']]}]{report['verdict']}[/]", highlight=False
        )
        if worst is None or against.worse(report, worst):
            worst, worst_page = (
                report,
                _page(args, report, comparison),
            )  # now: the dumps do not outlive the set
    assert worst is not None
    report = worst | {
        "cases": [{k: r[k] for k in ("case", "verdict", "exit", "first", "cause")} for r in all_reports]
    }
    _write(args, report, worst_page)
    terminal.show(report, console)
    return report["exit"]


def _page(args: argparse.Namespace, report: Mapping[str, Any], comparison: Comparison) -> str:
    """The HTML page, if one is asked for: it looks into both dumps."""
    return page.render(report, comparison) if args.html else ""


def _write(args: argparse.Namespace, report: Mapping[str, Any], html: str) -> None:
    if args.json == "-":
        json.dump(report, sys.stdout)
        print()
    elif args.json:
        write_text(args.json, json.dumps(report, indent=1))
    if args.html:
        write_text(args.html, html)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, target)
    except OSError as error:
        raise BadInput(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
