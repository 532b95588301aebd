"""`scarlet COMMAND ...`: finds the command, runs it, and turns bad input into one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import sys

from scarlet_jax.errors import BadInput

# Command name -> module. A command is a module with a docstring (its help; the first line is the summary),
# `add_arguments(parser)` and `run(args) -> int | None` (the exit code). Imported only when asked for.
COMMANDS = {
    "synth": "scarlet_jax.tools.synth",
    "taps": "scarlet_jax.tools.taps",
    "inspect": "scarlet_jax.tools.inspect",
    "generate": "scarlet_jax.tools.generate",
    "chat": "scarlet_jax.tools.chat",
}


def main(argv: list[str] | None = None) -> int:
    """The entry point `scarlet`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        return _top_level(argv)
    command = importlib.import_module(COMMANDS[argv[0]])
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
    wants_help = argv[:1] in (["-h"], ["--help"])
    names = ", ".join(COMMANDS)
    if wants_help or not argv:
        print(f"usage: scarlet COMMAND [...]\n\ncommands: {names}\n\n`scarlet COMMAND --help` explains one.")
        return 0
    print(f"scarlet: no command {argv[0]!r}; expected one of: {names}", file=sys.stderr)
    return 2
