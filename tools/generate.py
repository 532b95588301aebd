"""Continues a prompt, printing text as it comes.

A model that has a chat template gets the prompt as a user's message, and answers. --raw takes the prompt as
it stands, to be continued; so does a model without a template. Without -p the standard input is the prompt.

example: scarlet generate model.gguf -p "Why is the sky blue?"
         scarlet generate model.gguf --raw -p "The quick brown" -n 20 --temperature 0.8 --seed 1
         scarlet generate owner/repo:Q4_K_M --json - < question.txt

--devices N has so many devices share the model, each with its part of the weights; --coordinator and --process
make the devices of several processes one set, which the same command on each of them shares.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator

from scarlet_jax import chat, hosts
from scarlet_jax.errors import BadInput
from scarlet_jax.generate import Stats, generate, stream_text
from scarlet_jax.model import Model
from scarlet_jax.tools import common
from scarlet_jax.tools.taps import parse_tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    common.add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="what to answer, or with --raw to continue")
    prompt.add_argument("--tokens", metavar="1,2,3", help="token ids to continue")
    parser.add_argument("--raw", action="store_true", help="no chat template")
    common.add_think_argument(parser)
    common.add_limit_argument(parser, default=512)
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of the first of several processes that share their devices",
    )
    parser.add_argument("--process", metavar="I/N", help="which one of them this is, from 0, and how many")
    parser.add_argument("--special", action="store_true", help="print control tokens too, as <|im_end|>")
    parser.add_argument("--stats", action="store_true", help="print times and speeds on stderr afterwards")
    common.add_json_argument(parser)
    common.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    began = time.perf_counter()
    if args.coordinator or args.process:
        hosts.start(args.coordinator, args.process)
    ids = None if args.tokens is None else parse_tokens(args.tokens)
    text = _prompt_text(args) if ids is None else ""
    model = common.load_model(args)
    load_s = time.perf_counter() - began
    prompt = _prompt_ids(model, text, args) if ids is None else ids

    stats = Stats()
    ready_s = time.perf_counter() - began
    tokens, answer = _stream(model, prompt, args, stats)
    times = {"load_s": load_s, "first_token_s": ready_s + stats.prefill_s}
    if not hosts.is_first():
        return
    if args.stats:
        common.print_stats(model, stats, load=times["load_s"], first_token=times["first_token_s"])
    if args.json:
        stats_json = times | common.stats_json(stats)
        common.write_json(
            args.json, {"prompt_tokens": prompt, "tokens": tokens, "text": answer, "stats": stats_json}
        )


def _prompt_text(args: argparse.Namespace) -> str:
    """-p, or else the standard input without its last line end."""
    if args.prompt is not None:
        return args.prompt
    if sys.stdin.isatty():
        raise BadInput("-p: expected a prompt, there or on the standard input")
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    return text.removesuffix("\n").removesuffix("\r")


def _prompt_ids(model: Model, text: str, args: argparse.Namespace) -> list[int]:
    if not args.raw and chat.has_template(model.gguf):
        text = chat.prompt(model, [{"role": "user", "content": text}], **common.think_option(args.think))
    return model.tokenizer.encode(text)


def _stream(model: Model, prompt: list[int], args: argparse.Namespace, stats: Stats) -> tuple[list[int], str]:
    """Print the text as it comes; its ids, and all of it."""
    tokens: list[int] = []
    parts: list[str] = []
    shown = args.json != "-" and hosts.is_first()
    show = common.writer(sys.stdout) if shown else (lambda text: None)

    def noted(ids: Iterator[int]) -> Iterator[int]:
        for id in ids:
            tokens.append(id)
            yield id

    limit = common.token_limit(args.n)
    ids = generate(model, prompt, max_tokens=limit, stats=stats, **common.sampling_options(args))
    with contextlib.closing(ids):
        texts = stream_text(model.tokenizer, noted(ids), special=args.special)
        for part in common.awaited(texts, f"reading {len(prompt)} tokens"):
            parts.append(part)
            show(part)
    text = "".join(parts)
    if not text.endswith("\n"):
        show("\n")
    return tokens, text
