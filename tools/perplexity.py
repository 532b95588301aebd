"""Measures how well a model predicts a text, and how far its predictions are from those of a base.

The text is cut into windows of --window tokens, each read from an empty state; what is left at the end is not
used. As llama.cpp's llama-perplexity has it, the first half of a window only gives context: counted are the
predictions of the tokens in its second half, all but the first of them (255 of 512). --count all counts every
token that has one before it in its window. Where the file asks for a beginning-of-sequence token, it takes the
place of each window's first token. Control tokens spelt out in the text are text.

With --base the same windows go through another file, and with --against through another engine (on the same file
unless --base names one); a base of ours is exact whatever --precision says, so that `--precision fast --against
scarlet` tells what the fast mode costs. KL divergence is that of the model's distribution from the base's, in nats
a token.

Intervals are of 95 %, from the tokens as if they were independent, as the +- of llama-perplexity (one standard
error) is: normal for means, Wilson's for the agreement, and for the 99th percentile by ranks.

example: scarlet perplexity model-Q4_K_M.gguf --text wiki.test.raw --base model-F16.gguf --json kl.json
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from scarlet_jax.errors import BadInput
from scarlet_jax.model import Model
from scarlet_jax.tokenizer import Tokenizer
from scarlet_jax.tools import common

COUNTED = ("half", "all")
ENGINES = ("scarlet", "llama.cpp")
LOGITS_AT_ONCE = 1 << 23  # of one engine: 32 MiB of f32 whatever the vocabulary, and as f64 for the sums
_Z = statistics.NormalDist().inv_cdf(0.975)  # of an interval of 95 %


# --- Engines ------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """What is measured: something that predicts the next token everywhere in a text."""

    def logits(self, window: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """Logits after tokens `first` to the last but one of int32 (T,), f32 (rows, V), few rows at a time.

        How many is `rows_at_once(V)`, and what is left at the end.
        """
        ...


class Ours:
    """Our engine: one pass for the hidden states, then the head over a few of them at a time."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def logits(self, window: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """As in `Engine`."""
        hidden = self._model.hidden(window)
        for part in _parts(first, len(window) - 1, self._model.config.vocabulary_size):
            yield np.asarray(self._model.logits(hidden[part]))


class LlamaCpp:
    """llama.cpp as a reference: F32 cache, no flash attention."""

    def __init__(self, path: Path, window: int, threads: int | None, lib: str | None) -> None:
        from scarlet_jax.tools.engines import llama_cpp

        self._engine = llama_cpp.Engine(path, n_ctx=window, n_ubatch=window, threads=threads, lib=lib)

    def logits(self, window: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """As in `Engine`."""
        self._engine.clear()
        if first:
            self._engine.decode(window[:first].tolist(), last=True)
        for part in _parts(first, len(window) - 1, self._engine.model.vocab_size):
            yield self._engine.decode(window[part].tolist())


def _parts(start: int, stop: int, vocabulary: int) -> Iterator[slice]:
    """`start` to `stop` in steps of `rows_at_once`."""
    step = rows_at_once(vocabulary)
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def rows_at_once(vocabulary: int) -> int:
    """How many tokens' logits are held together."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


# --- Scores -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scores:
    """What is known of each counted token, f64 (n,), in nats; without a base only the first.

    `nll` and `base_nll` are minus the log of what it was given by model and base, `kl` is the divergence of the
    model's prediction from the base's, and `agrees` whether both have the same token on top.
    """

    nll: np.ndarray
    base_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    agrees: np.ndarray | None = None


def windows(tokens: Sequence[int], length: int, bos: int | None = None) -> np.ndarray:
    """The text cut into whole windows, int32 (W, length), each beginning with `bos` if there is one."""
    count = len(tokens) // length
    cut = np.array(tokens[: count * length], np.int32).reshape(count, length)
    if bos is not None:
        cut[:, 0] = bos
    return cut


def first_counted(length: int, counted: str) -> int:
    """The first token of a window whose prediction of the next one counts."""
    return length // 2 if counted == "half" else 0


def score(
    windows: np.ndarray,
    first: int,
    model: Engine,
    base: Engine | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Run every window through one or two engines; `advance` is called after each.

    Windows are int32 (W, T); predictions by tokens `first` to T - 2 count.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    for window in windows:
        targets = window[first + 1 :]
        for logits, base_logits in _together(model, base, window, first):
            part, targets = targets[: len(logits)], targets[len(logits) :]
            columns.append(_scores(logits, base_logits, part))
        advance()
    return Scores(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _together(
    model: Engine, base: Engine | None, window: np.ndarray, first: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The logits of both for the same tokens."""
    if base is None:
        return ((logits, None) for logits in model.logits(window, first))
    return zip(model.logits(window, first), base.logits(window, first), strict=True)


def _scores(
    logits: np.ndarray, base_logits: np.ndarray | None, targets: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The fields of `Scores` for some tokens, in float64: a KL of 1e-10 is less than f32 sums would round."""
    given = np.arange(len(targets)), targets
    log_q = log_softmax(logits)
    if base_logits is None:
        return (-log_q[given],)
    log_p = log_softmax(base_logits)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return -log_q[given], -log_p[given], kl, log_p.argmax(axis=-1) == log_q.argmax(axis=-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log of the softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# --- Statistics ---------------------------------------------------------------------------------------------


def summary(scores: Scores) -> dict[str, Any]:
    """The figures of the contract; without a base, None for those that need one.

    `intervals` are of 95 % and `standard_errors` what llama-perplexity prints after +-, by figure.
    """
    nll, nll_error = _mean(scores.nll)
    figures: dict[str, Any] = {"perplexity": math.exp(nll)}
    errors = {"perplexity": math.exp(nll) * nll_error}
    intervals = {"perplexity": _exp(_normal(nll, nll_error))}
    if scores.kl is not None and scores.base_nll is not None and scores.agrees is not None:
        ratio, ratio_error = _mean(scores.nll - scores.base_nll)
        figures |= {"base_perplexity": math.exp(scores.base_nll.mean()), "perplexity_ratio": math.exp(ratio)}
        errors["perplexity_ratio"] = math.exp(ratio) * ratio_error
        intervals["perplexity_ratio"] = _exp(_normal(ratio, ratio_error))
        figures["kl_mean"], errors["kl_mean"] = _mean(scores.kl)
        intervals["kl_mean"] = _normal(figures["kl_mean"], errors["kl_mean"])
        figures["kl_p99"], intervals["kl_p99"] = _percentile(scores.kl, 0.99)
        same, count = float(scores.agrees.mean()), len(scores.agrees)
        figures["top1_agreement"], intervals["top1_agreement"] = same, _wilson(same, count)
        errors["top1_agreement"] = math.sqrt(same * (1 - same) / max(1, count - 1))
    for name in ("base_perplexity", "perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement"):
        figures.setdefault(name, None)
    return figures | {"intervals": intervals, "standard_errors": errors}


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error."""
    spread = float(values.std()) / math.sqrt(max(1, len(values) - 1))
    return float(values.mean()), spread


def _normal(mean: float, error: float) -> list[float]:
    return [mean - _Z * error, mean + _Z * error]


def _exp(interval: list[float]) -> list[float]:
    return [math.exp(end) for end in interval]


def _wilson(share: float, count: int) -> list[float]:
    """Wilson's score interval: stays within 0 and 1, and has a width where all agree (Wilson 1927)."""
    slack = _Z**2 / count
    centre = (share + slack / 2) / (1 + slack)
    half = _Z * math.sqrt(share * (1 - share) / count + slack / (4 * count)) / (1 + slack)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def _percentile(values: np.ndarray, at: float) -> tuple[float, list[float]]:
    """The percentile, interpolated, and between which ranks it lies: binomial, by its normal approximation.

    With fewer than some 400 tokens there is no rank high enough for a bound; the end is then the largest seen.
    """
    ordered, count = np.sort(values), len(values)
    middle, half = at * count, _Z * math.sqrt(count * at * (1 - at))
    low, high = math.floor(middle - half), math.ceil(middle + half)
    ends = [float(ordered[min(max(rank, 0), count - 1)]) for rank in (low - 1, high)]
    return float(np.quantile(ordered, at)), ends


# --- The command --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    common.add_model_arguments(parser)
    add = parser.add_argument
    add("--text", metavar="F", required=True, help="the text to predict, UTF-8; - is the standard input")
    add("--base", metavar="OTHER.gguf", help="the model to compare with; of the same vocabulary")
    add("--against", choices=ENGINES, help="the engine that runs the base (scarlet)")
    add("--engine", choices=ENGINES, default="scarlet", help="the engine that runs MODEL (scarlet)")
    add("--lib", metavar="PATH", help="a libllama in place of the xllamacpp package's")
    add("--window", metavar="N", type=int, default=512, help="tokens of a window (512)")
    add("--windows", metavar="W", type=int, help="only so many windows (all)")
    add("--count", choices=COUNTED, default="half", help="which predictions of a window count (half)")
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    for flag, value, least in (("--window", args.window, 4), ("--windows", args.windows, 1)):
        if value is not None and value < least:
            raise BadInput(f"{flag} {value}: expected {least} or more")
    if args.lib and "llama.cpp" not in (args.engine, args.against):
        raise BadInput("--lib: only with --engine llama.cpp or --against llama.cpp")
    result = measure(args)
    if args.json:
        common.write_json(args.json, result)
    if args.json != "-":
        Console(highlight=False).print(_table(result))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures, and what they are figures of."""
    text = _read(args.text)
    model = common.load_model(args)
    base = _base_model(args, model)
    cut = _windows(args, text, model)
    engines = [
        _engine(args, loaded, name)
        for loaded, name in ((model, args.engine), (base, args.against or "scarlet"))
        if loaded is not None
    ]
    hidden = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("windows", total=len(cut))
        scores = score(
            cut, first_counted(args.window, args.count), *engines, advance=lambda: progress.advance(task)
        )
    for path, nll in ((model.gguf.path, scores.nll), (base and base.gguf.path, scores.base_nll)):
        if nll is not None and not np.isfinite(nll).all():
            raise BadInput(f"{path}: its logits are not all numbers; nothing can be measured")
    return {
        "model": model.gguf.path.name,
        "engine": args.engine,
        "base": base and base.gguf.path.name,
        "base_engine": base and (args.against or "scarlet"),
        "window": args.window,
        "windows": len(cut),
        "count": args.count,
        "tokens": len(scores.nll),
        **summary(scores),
    }


def _read(name: str) -> str:
    """The text, less one line end at its end, as llama.cpp reads a file."""
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return raw.decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise BadInput(f"--text {name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"--text {name}: expected UTF-8; byte {error.start} is not") from error


def _base_model(args: argparse.Namespace, model: Model) -> Model | None:
    """The model of --base, MODEL itself if only --against is given, or none; in exact mode."""
    if args.base is None:
        return common.exact(model) if args.against else None
    base = common.load_model(argparse.Namespace(**vars(args) | {"model": args.base, "precision": "exact"}))
    if base.tokenizer.tokens != model.tokenizer.tokens:
        raise BadInput(f"--base {args.base}: expected the vocabulary of {model.gguf.path.name}")
    return base


def _windows(args: argparse.Namespace, text: str, model: Model) -> np.ndarray:
    """The windows of the text that are asked for."""
    if args.window > model.context_length:
        raise BadInput(f"--window {args.window}: expected at most the context, {model.context_length}")
    tokenizer: Tokenizer = model.tokenizer
    ids = tokenizer.encode(text, special=False)
    cut = windows(ids, args.window, tokenizer.bos_id if tokenizer.adds_bos else None)[: args.windows]
    if not len(cut):
        raise BadInput(f"--text {args.text}: {len(ids)} tokens; expected a window of {args.window} at least")
    return cut


def _engine(args: argparse.Namespace, model: Model, name: str) -> Engine:
    if name == "scarlet":
        return Ours(model)
    return LlamaCpp(model.gguf.path, args.window, args.threads, args.lib)


_ROWS = {
    "perplexity": ("perplexity", "{:.4f}"),
    "base_perplexity": ("perplexity of the base", "{:.4f}"),
    "perplexity_ratio": ("ratio of the two", "{:.6f}"),
    "kl_mean": ("KL divergence, mean", "{:.3e}"),
    "kl_p99": ("KL divergence, 99th percentile", "{:.3e}"),
    "top1_agreement": ("same token on top", "{:.3%}"),
}


def _table(result: Mapping[str, Any]) -> Table:
    beside = f" beside {result['base']} ({result['base_engine']})" if result["base"] else ""
    title = f"{result['model']} ({result['engine']}){beside}"
    caption = f"{result['tokens']} tokens of {result['windows']} windows of {result['window']}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("")
    table.add_column("figure", justify="right")
    table.add_column("95 % interval", justify="right")
    for key, (label, style) in _ROWS.items():
        if result[key] is not None:
            ends = result["intervals"].get(key, [])
            table.add_row(label, style.format(result[key]), " to ".join(map(style.format, ends)))
    return table
