"""Trains the model in the box and writes it as GGUF: F32, F16 and Q4_K_M.

First the trunk, then behind it, as it is, a block that predicts one token more. Stops and goes on: a run that
finds its checkpoints in OUT continues, and sees the text that it would have seen. The loss curves are drawn
beside them. Until the last part of a run, over which its rates fall, --steps may still be changed.

With --init a run starts from the weights of a file, packed or not, and a fresh optimiser, and sees the later mix
of texts from its first step on.

example: python -m scarlet_jax.tools.train /tmp/box --steps 2400
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.train import curve, export, loop, network, prediction, text

SAVE_EVERY = 60  # seconds
QUANTS = ("F32", "F16", "Q4_K_M")
DRAFT_STEPS = 150


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
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for checkpoints, curves and models")
    default = loop.Recipe()
    for name in ("steps", "seed", "rows", "length"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", metavar="N", type=int, default=value, help=f"({value})")
    parser.add_argument(
        "--init", metavar="MODEL", type=Path, help="the .gguf whose weights the run starts from"
    )
    parser.add_argument(
        "--draft-steps",
        metavar="N",
        type=int,
        default=DRAFT_STEPS,
        help=f"of the prediction block, behind the trunk; 0 for none ({DRAFT_STEPS})",
    )
    return parser


def _train(args: argparse.Namespace) -> None:
    recipe = loop.Recipe(seed=args.seed, steps=args.steps, rows=args.rows, length=args.length)
    vocabulary = text.vocabulary(recipe.shape.vocab_size, recipe.seed)
    init: network.Parameters = {}
    if args.init:
        init = network.read(args.init, prediction.recipe(recipe, args.draft_steps).shape, vocabulary)
        digest = hashlib.sha256(args.init.read_bytes()).hexdigest()
        recipe = dataclasses.replace(recipe, init=digest, turn=0)
    args.out.mkdir(parents=True, exist_ok=True)
    parameters = _phase(args.out, "trunk", recipe, init=init)
    if args.draft_steps:
        recipe = prediction.recipe(recipe, args.draft_steps)
        parameters |= _phase(args.out, "draft", recipe, prediction.loss, parameters, init)
    for quant in QUANTS:
        path = args.out / f"box-{quant}.gguf"
        export.write(path, parameters, recipe.shape, vocabulary, quant)
        print(path)


def _phase(
    out: Path,
    name: str,
    recipe: loop.Recipe,
    loss: loop.Loss = network.loss,
    frozen: network.Parameters = loop.NONE,
    init: network.Parameters = loop.NONE,
) -> network.Parameters:
    """Train what is not frozen, from its checkpoint if there is one; returns it."""
    checkpoint = out / f"{name}.safetensors"
    found = checkpoint.exists()
    run = loop.restore(checkpoint, recipe, frozen) if found else loop.start(recipe, frozen, init)

    def save() -> None:
        loop.save(checkpoint, recipe, run)
        curve.draw(out / f"{name}.png", run.losses)

    saved = time.monotonic()
    with _progress() as progress:
        task = progress.add_task(name, total=recipe.steps, completed=run.step, loss="")
        for _ in loop.train(recipe, run, loss, frozen):
            progress.update(task, completed=run.step, loss=f"loss {run.losses[-1]:.3f}")
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
    save()
    return run.parameters


def _progress() -> Progress:
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())
