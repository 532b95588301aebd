"""`scarlet COMMAND ...`: finds the command, runs it, and turns bad input into one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NamedTuple

from scarlet_jax.errors import BadInput


class Command(NamedTuple):
    """A module with a docstring (its help), `add_arguments(parser)`, and `run(args)` -> exit code or None.

    It is imported only when asked for.
    """

    module: str
    summary: str


COMMANDS = {
    "generate": Command("scarlet_jax.tools.generate", "continue a prompt"),
    "chat": Command("scarlet_jax.tools.chat", "talk with a model"),
    "inspect": Command("scarlet_jax.tools.inspect", "what a file holds, and what it needs"),
    "taps": Command(
        "scarlet_jax.tools.taps", "write all activations of a prompt to a dump, by one of three engines"
    ),
    "parity": Command("scarlet_jax.tools.parity.command", "name the operation that two engines disagree on"),
    "audit": Command("scarlet_jax.tools.audit", "decode every tensor twice, and say what was ever verified"),
    "perplexity": Command(
        "scarlet_jax.tools.perplexity", "how well a model predicts a text, and how near it is to another"
    ),
    "drill": Command(
        "scarlet_jax.tools.drill", "put a fault into a copy of a decoder, and find it from activations"
    ),
    "bench": Command("scarlet_jax.tools.bench", "how fast a model runs, beside llama.cpp on the same file"),
    "kernel-bench": Command(
        "scarlet_jax.tools.kernel_bench", "how fast each kernel is, by block format and rows"
    ),
    "gpu-bench": Command(
        "scarlet_jax.tools.gpu_bench", "a GPU's kernels and models: right, and how fast beside its roofs"
    ),
    "synth": Command("scarlet_jax.tools.synth", "make a random model of a real shape"),
}


def main(argv: list[str] | None = None) -> int:
    """The entry point `scarlet`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        return _top_level(argv)
    command = importlib.import_module(COMMANDS[argv[0]].module)
    parser = argparse.ArgumentParser(
        prog=f"scarlet {argv[0]}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    try:
        return command.run(args) or 0
    except BadInput as error:
        print(f"scarlet {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader left (`scarlet ... | head`): nothing more to say
        return 141


def _top_level(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: scarlet COMMAND [...]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<12} {command.summary}")
        print("\n`scarlet COMMAND --help` explains one, with an example.")
        return 0
    print(f"scarlet: no command {argv[0]!r}; expected one of: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
