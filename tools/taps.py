"""Writes the activations of any engine to a dump, under llama.cpp's names.

The last --decode tokens are fed one at a time, the others in one pass; the dump has them all, as if they had
come at once, so that a prompt's dumps can be compared whichever way it was fed.

example: scarlet taps model.gguf -p "The quick brown fox" -o ours.safetensors
         scarlet taps model.gguf -p "The quick brown fox" -o theirs.safetensors --engine llama.cpp
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from scarlet_jax import gguf, hub
from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity.dump import write_dump

Captured = tuple[dict[str, np.ndarray], dict[str, tuple[str, str]], str]  # taps, weights, name and version


def _scarlet(path: Path, tokens: Sequence[int], select: str | None, decode: int, lib: str | None) -> Captured:
    from scarlet_jax.tools.engines import scarlet

    return scarlet.taps(path, tokens, select, decode)


def _llama_cpp(
    path: Path, tokens: Sequence[int], select: str | None, decode: int, lib: str | None
) -> Captured:
    from scarlet_jax.tools.engines import llama_cpp

    return llama_cpp.taps(path, tokens, select, decode, lib=lib)


def _transformers(
    path: Path, tokens: Sequence[int], select: str | None, decode: int, lib: str | None
) -> Captured:
    from scarlet_jax.tools.engines import transformers

    return transformers.taps(path, tokens, select, decode)


# Engine -> function of (path, tokens, select, decode, lib). Imported only when asked for.
ENGINES: dict[str, Callable[[Path, Sequence[int], str | None, int, str | None], Captured]] = {
    "scarlet": _scarlet,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}


@dataclasses.dataclass(frozen=True)
class Source:
    """What a dump says about its model, and how a text becomes tokens."""

    name: str
    arch: str
    config: dict[str, Any]
    encode: Callable[[str], list[int]]


def source(path: Path) -> Source:
    """A GGUF's description, or that of a transformers checkpoint directory."""
    return _checkpoint(path) if path.is_dir() else _gguf(path)


def _gguf(path: Path) -> Source:
    from scarlet_jax.tokenizer import Tokenizer

    file = gguf.read(path)
    arch = file.architecture
    config = {key: value for key, value in file.metadata.items() if key.startswith(f"{arch}.")}
    return Source(
        name=file.metadata.string("general.name", path.stem),
        arch=arch,
        config=config,
        encode=lambda text: Tokenizer.from_gguf(file).encode(text),
    )


def _checkpoint(path: Path) -> Source:
    from tokenizers import Tokenizer

    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: expected a GGUF, or a checkpoint directory with a config.json") from error

    def encode(text: str) -> list[int]:
        if not (path / "tokenizer.json").is_file():
            raise BadInput(f"{path}: has no tokenizer.json; expected one for -p (or use --tokens)")
        return Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids

    return Source(name=path.name, arch=str(config.get("model_type", "")), config=config, encode=encode)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a .gguf, owner/repo[:QUANT], or a checkpoint directory (the model in the box)",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the text to run")
    prompt.add_argument("--tokens", metavar="1,2,3", help="the token ids to run")
    parser.add_argument("-o", "--out", metavar="DUMP", required=True, help="the dump to write")
    parser.add_argument("--select", metavar="REGEX", help="only taps whose name contains a match")
    parser.add_argument(
        "--decode", metavar="N", type=int, default=0, help="feed the last N tokens one at a time"
    )
    parser.add_argument("--engine", choices=ENGINES, default="scarlet", help="who computes (default scarlet)")
    parser.add_argument("--lib", metavar="PATH", help="a libllama.so in place of the xllamacpp wheel's")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.lib and args.engine != "llama.cpp":
        raise BadInput(f"--lib: only for --engine llama.cpp; this is {args.engine}")
    path = hub.resolve(args.model)
    about = source(path)
    tokens = parse_tokens(args.tokens) if args.tokens is not None else about.encode(args.prompt)
    if not tokens:
        raise BadInput("-p: the prompt is empty; expected one token or more")
    _check_pattern(args.select)
    _check_folder(Path(args.out))
    with _waiting(f"{args.engine}: {len(tokens)} tokens"):
        taps, weights, engine = ENGINES[args.engine](path, tokens, args.select, args.decode, args.lib)
        if not taps:
            raise BadInput(f"--select {args.select}: no tap has such a name")
        config = about.config | {"decode": args.decode}
        write_dump(
            args.out,
            taps,
            engine=engine,
            model=about.name,
            arch=about.arch,
            tokens=tokens,
            weights=weights,
            config=config,
        )
    print(f"{args.out}: {len(taps)} taps of {len(tokens)} tokens, by {engine}")


def parse_tokens(text: str) -> list[int]:
    """Token ids from "1,2,3"; BadInput for anything else."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise BadInput(f"--tokens {text!r}: expected ids separated by commas, such as 1,2,3")
    return [int(part) for part in text.split(",")]


def _check_pattern(select: str | None) -> None:
    try:
        re.compile(select or "")
    except re.error as error:
        raise BadInput(f"--select {select}: is no regular expression ({error})") from None


def _check_folder(out: Path) -> None:
    """Before the work, not after it."""
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise BadInput(f"-o {out}: expected a path in a folder that can be written to")


def _waiting(what: str) -> contextlib.AbstractContextManager[Any]:
    """A sign of life on stderr, where somebody is looking."""
    return Console(stderr=True).status(what) if sys.stderr.isatty() else contextlib.nullcontext()
