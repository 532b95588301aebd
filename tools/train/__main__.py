"""Trains the model in the box and writes it as GGUF: F32, F16 and Q4_K_M.

Stops and goes on: a run that finds a checkpoint in OUT continues it, and sees the text that it would have
seen. The loss curve is drawn beside it.

example: python -m scarlet_jax.tools.train /tmp/box --steps 740
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.train import curve, export, loop, text

SAVE_EVERY = 60  # seconds
QUANTS = ("F32", "F16", "Q4_K_M")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        _train(args)
    except BadInput as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scarlet_jax.tools.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for checkpoint, curve and models")
    default = loop.Recipe()
    for name in ("steps", "seed", "rows", "length"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", metavar="N", type=int, default=value, help=f"({value})")
    return parser


def _train(args: argparse.Namespace) -> None:
    recipe = loop.Recipe(seed=args.seed, steps=args.steps, rows=args.rows, length=args.length)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.safetensors"
    run = loop.restore(checkpoint, recipe) if checkpoint.exists() else loop.start(recipe)
    saved = time.monotonic()
    with _progress() as progress:
        task = progress.add_task("training", total=recipe.steps, completed=run.step, loss="")
        for _ in loop.train(recipe, run):
            progress.update(task, completed=run.step, loss=f"loss {run.losses[-1]:.3f}")
            if time.monotonic() - saved > SAVE_EVERY:
                loop.save(checkpoint, recipe, run)
                curve.draw(args.out / "loss.png", run.losses)
                saved = time.monotonic()
    loop.save(checkpoint, recipe, run)
    curve.draw(args.out / "loss.png", run.losses)
    vocabulary = text.vocabulary(recipe.shape.vocab_size, recipe.seed)
    for quant in QUANTS:
        path = args.out / f"box-{quant}.gguf"
        export.write(path, run.parameters, recipe.shape, vocabulary, quant)
        print(path)


def _progress() -> Progress:
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())
