"""What commands share: the flags of a model, opening it, and writing results."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from rich.console import Console

from scarlet_jax import hub
from scarlet_jax.errors import BadInput
from scarlet_jax.generate import Stats
from scarlet_jax.load import load
from scarlet_jax.model import Model
from scarlet_jax.ops import cpu, implementations

BACKENDS = ("auto", "cpu", "gpu", "tpu")
KV_DTYPES = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}
# --precision: the implementation that the model is to use; None is its own choice, always an exact one.
PRECISIONS = {"exact": None, "fast": "cpu-fast"}
_THINK = {"on": True, "off": False}

# Characters that would move the cursor, or worse, as characters that show them: a model can write anything.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


# --- Flags --------------------------------------------------------------------------------------------------


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """MODEL alone, as `hub.resolve` takes it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a .gguf, or owner/repo[:QUANT] on the hub (the model in the box)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and how to run it."""
    add_model_argument(parser)
    running = parser.add_argument_group("running it")
    running.add_argument(
        "--context", metavar="N", type=int, help="most tokens to hold (the model's own limit)"
    )
    running.add_argument("--backend", choices=BACKENDS, default="auto", help="where to compute (auto)")
    running.add_argument(
        "--devices",
        metavar="N",
        type=int,
        default=1,
        help="devices that share the model; 0: all there are (1)",
    )
    running.add_argument("--threads", metavar="N", type=int, help="threads of the CPU kernels (all cores)")
    running.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="exact",
        help="fast: activations of 8 bits, where the processor has AVX-512 VNNI (exact)",
    )
    running.add_argument(
        "--kv-dtype", choices=KV_DTYPES, default="f32", help="of attention's keys and values (f32)"
    )


def add_sampling_arguments(
    parser: argparse.ArgumentParser,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> None:
    """How the next token is chosen, with these defaults."""
    add = parser.add_argument_group("choosing tokens").add_argument

    def add_number(flag: str, metavar: str, default: float, text: str) -> None:
        add(flag, metavar=metavar, type=type(default), default=default, help=f"{text} ({default:g})")

    add_number("--temperature", "T", temperature, "0 always takes the most likely")
    add_number("--top-k", "K", top_k, "only from the K most likely; 0 is off")
    add_number("--top-p", "P", top_p, "only from the most likely that make up P; 1 is off")
    add_number("--min-p", "P", min_p, "only what is P times as likely as the most likely; 0 is off")
    add("--seed", metavar="N", type=int, help="the same seed gives the same text (drawn)")


def add_limit_argument(parser: argparse.ArgumentParser, default: int) -> None:
    """How long an answer may be: see `token_limit`."""
    parser.add_argument(
        "-n",
        metavar="N",
        type=int,
        default=default,
        help=f"most tokens to generate; -1: no limit ({default})",
    )


def add_think_argument(parser: argparse.ArgumentParser) -> None:
    """Whether the model thinks first."""
    parser.add_argument(
        "--think",
        choices=("auto", *_THINK),
        default="auto",
        help="think before answering (auto: as the template has it)",
    )


def think_option(think: str) -> dict[str, bool]:
    """What a template is told for "auto", "on" or "off"."""
    return {} if think == "auto" else {"enable_thinking": _THINK[think]}


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Where results go for other programs."""
    parser.add_argument("--json", metavar="FILE", help="write the results there; - is the standard output")


def token_limit(n: int) -> int | None:
    """-n as `generate` takes it."""
    if n < -1:
        raise BadInput(f"-n {n}: expected a number of tokens, or -1 for no limit")
    return None if n == -1 else n


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling_arguments` declared, as `generate` takes it."""
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}


# --- Models -------------------------------------------------------------------------------------------------


def load_model(args: argparse.Namespace) -> Model:
    """The model that MODEL names, to run as `add_model_arguments` has it."""
    if args.context is not None and args.context < 1:
        raise BadInput(f"--context {args.context}: expected 1 or more")
    if args.devices < 0:
        raise BadInput(f"--devices {args.devices}: expected a number of devices, or 0 for all")
    use_backend(args.backend)
    use_threads(args.threads)
    implementation = precision(args.precision)
    path = hub.resolve(args.model)
    with waiting(f"loading {path.name}"):
        return load(
            path,
            mesh=args.devices or jax.device_count(),
            context_length=args.context,
            kv_dtype=KV_DTYPES[args.kv_dtype],
            implementation=implementation,
        )


def precision(name: str) -> str | None:
    """The implementation that "exact" or "fast" asks for; BadInput where it cannot run."""
    implementation = PRECISIONS[name]
    if implementation is not None:
        try:
            implementations.check(implementation)
        except BadInput as error:
            raise BadInput(f"--precision {name}: {error}") from error
    return implementation


def exact(model: Model) -> Model:
    """The same weights in exact mode; the model itself if it is in it."""
    if model.implementation not in implementations.OPT_IN:
        return model
    return Model(model.gguf, model.config, model.weights, kv_dtype=model.kv_dtype, implementation="auto")


def use_backend(name: str) -> None:
    """Compute on "cpu", "gpu" or "tpu" from now on; "auto" is JAX's own choice."""
    if name == "auto":
        return
    jax.config.update("jax_platforms", name)
    try:
        jax.config.update("jax_default_device", jax.devices(name)[0])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"--backend {name}: JAX cannot use one here ({reason})") from error


def use_threads(count: int | None) -> None:
    """Have the CPU kernels use so many threads from now on; None leaves them all cores."""
    if count is None:
        return
    if count < 1:
        raise BadInput(f"--threads {count}: expected 1 or more")
    if reason := cpu.unavailable():
        raise BadInput(f"--threads {count}: there are no CPU kernels to run on them ({reason})")
    cpu.set_threads(count)


def compute_path(model: Model | None = None) -> str:
    """Which code does the work, for this model: "cpu kernels, avx512, 2 threads"."""
    implementation = "auto" if model is None else model.implementation
    if reason := cpu.unavailable():
        return f"portable code on {jax.default_backend()} ({reason})"
    if implementation == "portable":
        return f"portable code on {jax.default_backend()} (as asked)"
    mode = ", fast mode" if implementation == PRECISIONS["fast"] else ""
    return f"cpu kernels, {cpu.isa()}{mode}, {_plural(cpu.threads(), 'thread')}"


# --- Output -------------------------------------------------------------------------------------------------


def waiting(what: str) -> contextlib.AbstractContextManager[Any]:
    """A sign of life on stderr, where somebody is looking."""
    return Console(stderr=True).status(what) if sys.stderr.isatty() else contextlib.nullcontext()


def awaited(texts: Iterator[str], what: str) -> Iterator[str]:
    """`texts`, and a sign of life until the first of them."""
    with waiting(what):
        first = next(texts, "")
    yield first
    yield from texts


def visible(text: str) -> str:
    """Text for a terminal: control characters other than tab and line end are shown, not obeyed."""
    return text.translate(_VISIBLE)


def writer(stream: TextIO) -> Callable[[str], None]:
    """Writes text at once: as it is, or for a terminal as `visible` has it."""
    shown = visible if stream.isatty() else str

    def write(text: str) -> None:
        stream.write(shown(text))
        stream.flush()

    return write


def stats_json(stats: Stats) -> dict[str, Any]:
    """What a generation did, with its speeds in tokens a second."""
    return dataclasses.asdict(stats) | {"prefill_tps": stats.prefill_tps, "decode_tps": stats.decode_tps}


def print_stats(model: Model, stats: Stats, **seconds: float) -> None:
    """What a generation by `model` did, on one line of stderr; `seconds` are more times to begin with."""
    parts = [f"{name.replace('_', ' ')} {value:.2f} s" for name, value in seconds.items()]
    parts.append(_rate("prompt", stats.prompt_tokens, stats.prefill_tps))
    if stats.reused_tokens:
        parts.append(f"{_plural(stats.reused_tokens, 'token')} reused")
    parts.append(_rate("answer", stats.tokens, stats.decode_tps))
    parts += [f"seed {stats.seed}", compute_path(model)]
    Console(stderr=True, highlight=False, soft_wrap=True).print(" · ".join(parts), style="dim")


def _rate(name: str, tokens: int, rate: float | None) -> str:
    return f"{name} {_plural(tokens, 'token')}" + ("" if rate is None else f" at {rate:.1f}/s")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def write_json(destination: str, value: Any) -> None:
    """Write to a file, whole or not at all, or to the standard output for "-"."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        return
    try:
        with replacing(Path(destination)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--json {destination}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when all went well, and is removed when not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def count_text(count: float) -> str:
    """A large number in three digits: 262144 -> "262 k"."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T"))


def bytes_text(count: float) -> str:
    """A size in three digits: 1 << 20 -> "1.00 MiB"."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while value >= base - 0.5 and power < len(units) - 1:  # what would round to the next unit
        value, power = value / base, power + 1
    digits = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}".strip()
