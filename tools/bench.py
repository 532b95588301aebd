"""Measures how fast a model runs: prefill, decode, start-up, memory; beside another engine on the same file.

With --against llama.cpp the two engines take turns within this run, so that a machine whose speed drifts is
unfair to neither; figures are medians. llama.cpp runs as it does by default (flash attention, F16 cache),
with as many threads. A prebuilt wheel of it is a quarter slower than a native build: give --lib one.

With --precision fast the logits after the prompt, ours and the other engine's, are compared with those of the
exact mode, so that what the speed costs stands beside it.

example: scarlet bench model.gguf -p 512 -n 64 --against llama.cpp --lib libllama.so --json bench.json
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scarlet_jax import hub, sampling
from scarlet_jax.errors import BadInput
from scarlet_jax.model import Model
from scarlet_jax.ops import cpu
from scarlet_jax.tools import common

GREEDY = sampling.Sampling()
PROBE_BYTES = 512 * 2**20  # read to measure the memory: many times a last-level cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    common.add_model_arguments(parser)
    add = parser.add_argument
    add("-p", "--prompt-tokens", metavar="P", type=int, default=512, help="tokens of prompt (512)")
    add("-n", "--new-tokens", metavar="N", type=int, default=64, help="tokens to decode after it (64)")
    add("--draft", metavar="D", type=int, default=4, help="tokens of a step that verifies a draft (4)")
    add("--against", choices=("llama.cpp",), help="another engine, in alternation with ours")
    add("--lib", metavar="PATH", help="the libllama to compare with (that of the xllamacpp package)")
    add("--repeat", metavar="R", type=int, default=5, help="repetitions, after one that does not count (5)")
    common.add_json_argument(parser)


class Engine(Protocol):
    """What is timed: a prompt of P tokens, tokens one by one, each chosen greedily from the logits, and steps of
    several tokens whose logits are all wanted, as when a draft is verified.
    """  # noqa: D205

    at_a_time: int  # tokens of a `decode`

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Start over with these tokens -> logits of the next one, f32 (V,)."""
        ...

    def prefill(self, tokens: Sequence[int]) -> int:
        """Start over with these tokens -> the next one."""
        ...

    def decode(self, token: int) -> int:
        """Go on with a token, the one it gives and so on, `at_a_time` tokens -> the next one."""
        ...

    def verify(self, tokens: Sequence[int]) -> None:
        """Go on with some tokens at once, to the logits of each."""
        ...


class Ours:
    """Our engine as `generate` runs it: state in place, as many tokens in a program as it takes by default."""

    def __init__(self, model: Model, slots: int, new_tokens: int) -> None:
        self._model, self._slots = model, slots
        self.at_a_time = min(model.tokens_at_a_time, new_tokens)
        self._key = jax.random.key(0)
        self._state: Any = None

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Start over, with a cache for all that will come."""
        empty = self._model.init_state(1, self._slots)
        logits, self._state = self._model.last_logits(tokens, empty, consume=True)
        return np.asarray(logits)

    def prefill(self, tokens: Sequence[int]) -> int:
        """Start over."""
        return int(self.logits(tokens).argmax())

    def decode(self, token: int) -> int:
        """Go on."""
        if self.at_a_time == 1:
            logits, self._state = self._model.last_logits([token], self._state, consume=True)
            return int(sampling.most_likely(logits))
        made, self._state = self._model.decode_block(
            token, self._state, self._key, 1, GREEDY, stop=(), count=self.at_a_time, block=self.at_a_time
        )
        return made[-1]

    def verify(self, tokens: Sequence[int]) -> None:
        """Go on, the choices by the host."""
        logits, self._state = self._model.forward(tokens, self._state, consume=True)
        sampling.most_likely(logits)


class LlamaCpp:
    """llama.cpp with its own defaults."""

    at_a_time = 1

    def __init__(self, path: Any, slots: int, lib: str | None) -> None:
        from scarlet_jax.tools.engines import llama_cpp

        self._engine = llama_cpp.Engine(
            path, n_ctx=-(-slots // 256) * 256, flash_attention=True, type_k="F16", type_v="F16", lib=lib
        )
        self.name = f"llama.cpp ({lib or 'xllamacpp'})"

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Start over."""
        self._engine.clear()
        return self._engine.decode(tokens, last=True)[0]

    def prefill(self, tokens: Sequence[int]) -> int:
        """Start over."""
        return int(self.logits(tokens).argmax())

    def decode(self, token: int) -> int:
        """Go on."""
        return int(self._engine.decode([token], last=True)[0].argmax())

    def verify(self, tokens: Sequence[int]) -> None:
        """Go on."""
        self._engine.decode(tokens).argmax(axis=-1)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    counts = (("-p", "prompt_tokens"), ("-n", "new_tokens"), ("--draft", "draft"), ("--repeat", "repeat"))
    for flag, name in counts:
        value = getattr(args, name)
        if value < 1:
            raise BadInput(f"{flag} {value}: expected 1 or more")
    common.use_backend(args.backend)  # refused before anything is started
    result = measure(args)
    if args.json:
        common.write_json(args.json, result)
    if args.json != "-":
        Console().print(_table(result))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of contract: ours at the top, the other engine's under `reference`."""
    slots = args.prompt_tokens + args.new_tokens * (1 + args.draft)
    ours: dict[str, Any] = _fresh_process(hub.resolve(args.model), args.backend)
    began = time.perf_counter()
    model = common.load_model(args)
    ours["load_s"] = time.perf_counter() - began
    if slots > model.context_length:
        raise BadInput(
            f"-p, -n and --draft: {slots} tokens in all, expected at most the context, {model.context_length}"
        )
    engines: list[Engine] = [Ours(model, slots, args.new_tokens)]
    reference: dict[str, Any] = {}
    if args.against:
        began = time.perf_counter()
        other = LlamaCpp(model.gguf.path, slots, args.lib)
        reference = {"engine": other.name, "load_s": time.perf_counter() - began}
        engines.append(other)

    prompt = np.random.default_rng(0).integers(0, model.config.vocabulary_size, args.prompt_tokens).tolist()
    probe = np.ones(PROBE_BYTES, np.uint8)
    jobs = [
        *(lambda engine=engine: _times(engine, prompt, args.new_tokens, args.draft) for engine in engines)
    ]
    times, bandwidth = _alternate(jobs, lambda: _read_bandwidth(probe), args.repeat)

    if args.precision != "exact":
        for figures, error in zip((ours, reference), errors(engines, model, prompt), strict=False):
            figures["error"] = error
    weight_bytes = model.weight_bytes_per_token
    for figures, engine_times in zip((ours, reference), times, strict=False):
        prefill_s, decode_s, verify_s = map(statistics.median, zip(*engine_times, strict=True))
        figures["prefill_tps"] = args.prompt_tokens / prefill_s
        figures["decode_tps"] = 1 / decode_s
        figures["draft_ratio"] = verify_s / decode_s
        figures["roofline_fraction"] = weight_bytes / decode_s / bandwidth
    return {
        "model": str(model.gguf.path.name),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "draft": args.draft,
        "tokens_at_a_time": engines[0].at_a_time,
        "repeat": args.repeat,
        "path": common.compute_path(model),
        "precision": args.precision,
        "weight_bytes_per_token": weight_bytes,
        "read_bandwidth": bandwidth,
        **ours,
        "reference": reference or None,
    }


def _times(engine: Engine, prompt: list[int], count: int, draft: int) -> tuple[float, float, float]:
    """Seconds of the prompt, of the median token after it, and of the median step of `draft` tokens."""
    began = time.perf_counter()
    token = engine.prefill(prompt)
    prefill_s = time.perf_counter() - began
    steps, verified = [], []
    for _ in range(count // engine.at_a_time):
        began = time.perf_counter()
        token = engine.decode(token)
        steps.append((time.perf_counter() - began) / engine.at_a_time)
    for _ in range(count):
        began = time.perf_counter()
        engine.verify([token] * draft)
        verified.append(time.perf_counter() - began)
    return prefill_s, statistics.median(steps), statistics.median(verified)


def _alternate(
    jobs: list[Callable[[], tuple[float, ...]]], probe: Callable[[], float], repeat: int
) -> tuple[list[list[tuple[float, ...]]], float]:
    """The times of each job over `repeat` turns after a warm-up; the median of the probe between turns."""
    times: list[list[tuple[float, ...]]] = [[] for _ in jobs]
    bandwidths = []
    hidden = not sys.stderr.isatty()
    for turn in track(
        range(repeat + 1), "measuring", console=Console(stderr=True), transient=True, disable=hidden
    ):
        for job, taken in zip(jobs, times, strict=True):
            seconds = job()
            if turn:
                taken.append(seconds)
        bandwidths.append(probe())
    return times, statistics.median(bandwidths)


def _read_bandwidth(probe: np.ndarray) -> float:
    """Bytes a second at which all threads together read memory once; without compiled kernels one thread does."""
    read = cpu.read_memory if cpu.unavailable() is None else np.max
    began = time.perf_counter()
    read(probe)
    return probe.nbytes / (time.perf_counter() - began)


def errors(engines: Sequence[Engine], model: Model, prompt: Sequence[int]) -> list[float]:
    """Relative L2 distance of each engine's logits after the prompt from those of exact mode."""
    truth = np.asarray(common.exact(model).last_logits(prompt)[0], np.float64)
    return [float(np.linalg.norm(e.logits(prompt) - truth) / np.linalg.norm(truth)) for e in engines]


def _fresh_process(path: Any, backend: str) -> dict[str, Any]:
    """Start-up as a user meets it: a new process, up to its first token, and the most memory it held.

    To be called while this process is small: a child's peak begins with its parent's memory.
    """
    command = [sys.executable, "-m", "scarlet_jax", "generate", str(path), "--backend", backend]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--tokens", "0", "-n", "1", "--json", "-"],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ,
    )
    return {
        "first_token_s": time.perf_counter() - began,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def _table(result: dict[str, Any]) -> Table:
    reference = result["reference"] or {}
    caption = f"beside {reference['engine']}" if reference else None
    table = Table(title=f"{result['model']} · {result['path']}", title_justify="left", caption=caption)
    table.add_column("")
    table.add_column("scarlet_jax", justify="right")
    if reference:
        table.add_column("llama.cpp", justify="right")
        table.add_column("ratio", justify="right")
    rows = [
        ("prefill_tps", f"prefill of {result['prompt_tokens']}, tokens/s", "{:.1f}"),
        ("decode_tps", "decode, tokens/s", "{:.2f}"),
        ("draft_ratio", f"a step of {result['draft']}, times a step of one", "{:.2f}"),
        ("roofline_fraction", f"of {result['read_bandwidth'] / 1e9:.1f} GB/s read bandwidth", "{:.0%}"),
        ("load_s", "load, s", "{:.2f}"),
        ("first_token_s", "start to first token, s", "{:.2f}"),
        ("peak_rss_bytes", "peak memory, bytes", "{:.3e}"),
        ("error", "error of the logits against exact mode", "{:.1e}"),
    ]
    for key, label, style in rows:
        if key not in result:
            continue
        cells = [style.format(result[key])]
        if reference:
            cells.append(style.format(reference[key]) if key in reference else "")
            cells.append(f"{result[key] / reference[key]:.2f}" if key.endswith("tps") else "")
        table.add_row(label, *cells)
    return table
