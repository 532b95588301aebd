"""Says what a model file holds: architecture, tensors by type and role, memory, and what cannot run and why.

Only the file's header is read.

example: scarlet inspect model.gguf
         scarlet inspect model.gguf --memory 8GB --context 32768 --kv-dtype bf16   # will it fit?
         scarlet inspect owner/repo:Q4_K_M --json - | jq .memory
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from gguf.constants import Keys, LlamaFileType
from rich import box
from rich.bar import Bar
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from scarlet_jax import chat, configs, gguf, hub
from scarlet_jax.config import Config, as_dict
from scarlet_jax.errors import BadInput
from scarlet_jax.forward import init_state
from scarlet_jax.load import weights as load_weights
from scarlet_jax.memory import check, need
from scarlet_jax.ops import quants
from scarlet_jax.tokenizer import Tokenizer
from scarlet_jax.tools import common
from scarlet_jax.tools.common import bytes_text, count_text

CONTEXTS = (4096, 32768)  # to say the memory for, beside the model's own limit
CACHE_DTYPES = ("f32", "bf16")  # f16 takes what bf16 does
_SYMBOLS = "─●◆"  # kinds of blocks, in the order they come


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    common.add_model_argument(parser)
    fitting = parser.add_argument_group("will it fit?")
    add = fitting.add_argument
    add("--memory", metavar="SIZE", help="of one device, as 8GB or 512MiB: refuse what needs more")
    add("--context", metavar="N", type=int, default=4096, help="tokens of each sequence (4096)")
    add("--batch", metavar="B", type=int, default=1, help="sequences at a time (1)")
    add("--kv-dtype", choices=common.KV_DTYPES, default="f32", help="of attention's keys and values (f32)")
    add("--planes", action="store_true", help="packed weights in the form that a GPU holds them in")
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    path = hub.resolve(args.model)
    if args.memory is not None:
        fit(path, args)
        return
    report = inspect(path)
    if args.json:
        common.write_json(args.json, report.as_json())
    if args.json != "-":
        show(report, Console(highlight=False))


# --- Will it fit? -------------------------------------------------------------------------------------------


def fit(path: Path, args: argparse.Namespace) -> None:
    """Say what the model needs, as asked; BadInput, with the numbers, if it is more than --memory."""
    for flag, value in (("--context", args.context), ("--batch", args.batch)):
        if value < 1:
            raise BadInput(f"{flag} {value}: expected 1 or more")
    limit = parse_size("--memory", args.memory)
    file = gguf.read(path)
    arch = configs.find(file.architecture)
    cfg = arch.config(file.metadata)
    weights = load_weights(file, arch, cfg, mapped=True)
    dtype = common.KV_DTYPES[args.kv_dtype]
    needed = need(weights, cfg, batch=args.batch, context=args.context, kv_dtype=dtype, planes=args.planes)
    if args.json:
        common.write_json(args.json, dataclasses.asdict(needed) | {"total": needed.total, "memory": limit})
    check(needed, limit, f"--memory {args.memory}")
    if args.json != "-":
        parts = dataclasses.asdict(needed) | {"in all": needed.total, "of": limit}
        print(" · ".join(f"{name} {bytes_text(size)}" for name, size in parts.items()))


def parse_size(flag: str, text: str) -> int:
    """Bytes of a size such as 8GB, 1.5 GiB or 900000000."""
    match = re.fullmatch(r"\s*([\d.]+)\s*(?:([kmgt])?(i)?b?)?\s*", text.lower())
    try:
        assert match
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))
    except (AssertionError, ValueError):
        raise BadInput(f"{flag} {text}: expected a size such as 8GB or 512MiB") from None


# --- What there is to know ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Share:
    """Tensors that have a quant type in common, or a role; `types` counts them by quant type."""

    name: str
    tensors: int
    weights: int
    bytes: int
    bits_per_weight: float
    types: dict[str, int]
    shapes: list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Memory:
    """In bytes: the weights; what a sequence takes whatever its length; and a token, by the cache's dtype."""

    weights: int
    sequence: int
    token: dict[str, int]

    def total(self, context: int, dtype: str) -> int:
        """Everything, for one sequence of `context` tokens."""
        return self.weights + self.sequence + context * self.token[dtype]


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, the bytes it has (None if it does not say), and the longest sequence that fits (or None)."""

    name: str
    bytes: int | None
    context: int | None


@dataclasses.dataclass(frozen=True)
class Report:
    """A model file. Where the engine cannot run it `problems` say why, and what depends on that is None."""

    path: str
    name: str
    architecture: str
    file_type: str
    bytes: int
    weights: int
    config: Config | None
    tokenizer: dict[str, Any] | None
    types: list[Share]
    roles: list[Share]
    memory: Memory | None
    devices: list[Device]
    computed_by: str
    problems: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain | {
            "config": self.config and as_dict(self.config),
            "types": [dataclasses.asdict(share) for share in self.types],
            "roles": [dataclasses.asdict(share) for share in self.roles],
            "memory": self.memory and dataclasses.asdict(self.memory),
            "devices": [dataclasses.asdict(device) for device in self.devices],
        }


def inspect(path: Path) -> Report:
    """Describe a file; BadInput only if it is no GGUF that anybody could read."""
    file = gguf.read(path)
    problems: list[str] = []
    cfg = _attempt(lambda: configs.find(file.architecture).config(file.metadata), problems)
    tokenizer = _attempt(lambda: _describe_tokenizer(file), problems)
    problems += _undecodable(file)
    if cfg is not None:
        _attempt(lambda: _load_hollow(file, cfg), problems)
    memory = None if cfg is None else _memory(file, cfg)
    return Report(
        path=str(path),
        name=file.metadata.string(Keys.General.NAME, path.stem),
        architecture=file.architecture,
        file_type=_file_type(file),
        bytes=sum(tensor.data.nbytes for tensor in file.tensors.values()),
        weights=sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        config=cfg,
        tokenizer=tokenizer,
        types=_shares(file, lambda tensor: tensor.qtype),
        roles=_shares(file, lambda tensor: _role(tensor.name)),
        memory=memory,
        devices=[] if cfg is None or memory is None else [_device(d, memory, cfg) for d in jax.devices()],
        computed_by=common.compute_path(),
        problems=problems,
        notes=_notes(file, cfg),
    )


def _attempt(function: Callable[[], Any], problems: list[str]) -> Any:
    """What the function returns; or None, and its complaint among the problems."""
    try:
        return function()
    except BadInput as error:
        problems.append(str(error))
        return None


def _file_type(file: gguf.Gguf) -> str:
    """The mix that the file says it is, such as "Q4_K_M"."""
    number = file.metadata.integer(Keys.General.FILE_TYPE, LlamaFileType.GUESSED.value)
    known = {kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    return "" if number == LlamaFileType.GUESSED else known.get(number, f"file type {number}")


def _describe_tokenizer(file: gguf.Gguf) -> dict[str, Any]:
    tokenizer = Tokenizer.from_gguf(file)
    return {
        "model": file.metadata.string(Keys.Tokenizer.MODEL),
        "pre": file.metadata.string(Keys.Tokenizer.PRE),
        "tokens": len(tokenizer),
        "ends": [tokenizer.tokens[id] for id in sorted(tokenizer.eos_ids)],
        "begins": tokenizer.tokens[tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id else None,
    }


def _undecodable(file: gguf.Gguf) -> Iterator[str]:
    """Tensors of types that no kernel reads."""
    named: dict[str, list[str]] = collections.defaultdict(list)
    for tensor in file.tensors.values():
        if tensor.qtype not in quants.DECODERS:
            named[tensor.qtype].append(tensor.name)
    for qtype, names in named.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{others}: of type {qtype}, which has no decoder here"


def _load_hollow(file: gguf.Gguf, cfg: Config) -> None:
    """Load without any data, to hear what the loader has to say of names, types and shapes."""
    tensors = {name: dataclasses.replace(t, data=t.data[:0]) for name, t in file.tensors.items()}
    hollow = dataclasses.replace(file, tensors=tensors)
    load_weights(hollow, configs.find(file.architecture), cfg)


def _notes(file: gguf.Gguf, cfg: Config | None) -> list[str]:
    notes = []
    if not chat.has_template(file):
        notes.append("no chat template: `scarlet generate` continues prompts as they stand")
    if cfg is not None and cfg.nextn:
        notes.append(
            f"{len(cfg.nextn)} prediction block(s): `Model.forward_mtp` runs them, generation does not"
        )
    return notes


def _role(name: str) -> str:
    """What a tensor is for, in whichever block: "blk.3.attn_v.weight" -> "attn_v"."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def _shares(file: gguf.Gguf, key: Callable[[gguf.Tensor], str]) -> list[Share]:
    """The tensors grouped by a key, those of most bytes first."""
    groups: dict[str, list[gguf.Tensor]] = collections.defaultdict(list)
    for tensor in file.tensors.values():
        groups[key(tensor)].append(tensor)
    shares = []
    for name, group in groups.items():
        weights = sum(math.prod(tensor.shape) for tensor in group)
        size = sum(tensor.data.nbytes for tensor in group)
        types = collections.Counter(tensor.qtype for tensor in group)
        shapes = sorted({tensor.shape for tensor in group})
        shares.append(Share(name, len(group), weights, size, 8 * size / weights, dict(types), shapes))
    return sorted(shares, key=lambda share: -share.bytes)


def _memory(file: gguf.Gguf, cfg: Config) -> Memory:
    """By the shapes of the state itself, whatever its mixers keep."""

    def state_bytes(slots: int, dtype: str) -> int:
        state = jax.eval_shape(lambda: init_state(cfg, 1, slots, common.KV_DTYPES[dtype]))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    return Memory(
        weights=sum(tensor.data.nbytes for tensor in file.tensors.values()),
        sequence=state_bytes(0, "f32"),
        token={dtype: state_bytes(1, dtype) - state_bytes(0, dtype) for dtype in CACHE_DTYPES},
    )


def _device(device: Any, memory: Memory, cfg: Config) -> Device:
    """A jax.Device, and what it has room for beside the weights."""
    size = _device_bytes(device)
    left = -1 if size is None else size - memory.total(0, "f32")
    fits = left // memory.token["f32"] if memory.token["f32"] else cfg.context_length
    return Device(str(device), size, None if left < 0 else min(fits, cfg.context_length))


def _device_bytes(device: Any) -> int | None:
    if device.platform == "cpu":
        known = hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(os.sysconf_names)
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    return (device.memory_stats() or {}).get("bytes_limit")


# --- What it looks like -------------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Print the report."""
    console.print()
    console.print(Text.assemble((report.name, "bold magenta"), "  ", (report.path, "dim")), soft_wrap=True)
    _section(console, "", _facts(report))
    _section(console, "Tensors by type", _types_table(report))
    _section(console, "Tensors by role", _roles_table(report))
    if report.config is not None and report.memory is not None:
        _section(console, "Memory for one sequence", _memory_table(report.memory, report.config))
        for device in report.devices:
            console.print(Padding.indent(_fit(device, report.config), 2))
    console.print()
    for note in report.notes:
        console.print(Text.assemble(("note  ", "yellow"), note))
    for problem in report.problems:
        console.print(Text.assemble(("cannot run  ", "bold red"), problem))
    if not report.problems:
        console.print(Text.assemble(("runs here  ", "bold green"), report.computed_by))
    console.print()


def _section(console: Console, title: str, content: RenderableType) -> None:
    if title:
        console.print(Text(f"\n{title}", "bold"))
    console.print(Padding.indent(content, 2))


def _facts(report: Report) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    bits = 8 * report.bytes / report.weights if report.weights else 0
    size = f"{count_text(report.weights)} in {bytes_text(report.bytes)}, {bits:.2f} bits each"
    grid.add_row("architecture", report.architecture)
    grid.add_row("weights", " · ".join(filter(None, (size, report.file_type))))
    if report.config is not None:
        for name, text in _config_facts(report.config):
            grid.add_row(name, text)
    if report.tokenizer is not None:
        tokenizer = report.tokenizer
        ends = ", ".join(tokenizer["ends"]) or "no token"
        grid.add_row("tokenizer", f"{tokenizer['model']} {tokenizer['pre']}, {tokenizer['tokens']:,} tokens")
        grid.add_row("", f"ends at {ends}" + (f"; begins with {b}" if (b := tokenizer["begins"]) else ""))
    return grid


def _config_facts(cfg: Config) -> Iterator[tuple[str, str]]:
    """Label and text of each part, in the words of the file's own keys."""
    order = [_kind(block.mixer) for block in cfg.blocks]
    symbols = dict(zip(dict.fromkeys(order), _SYMBOLS, strict=False))
    legend = "  ".join(f"{symbol} {order.count(kind)} {kind}" for kind, symbol in symbols.items())
    yield "blocks", "".join(symbols[kind] for kind in order) + "  " + legend
    yield "model", " · ".join(_words(cfg, exclude=("architecture", "name", "blocks", "nextn", "taps")))
    parts = [block.mixer for block in cfg.blocks] + [block.ffn for block in cfg.blocks if block.ffn]
    for part in dict.fromkeys(parts):
        yield _kind(part), " · ".join(_words(part, exclude=("layer_norm_rms_epsilon",)))


def _kind(part: Any) -> str:
    """A config class by its name, in words: DeltaNet -> "delta net"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(part).__name__).lower()


def _words(part: Any, exclude: tuple[str, ...] = ()) -> Iterator[str]:
    """The fields of a config: "head_count 8", "gated"."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        absent = value == () or (dataclasses.is_dataclass(value) and value == field.default)
        if field.name in exclude or absent:
            continue
        if dataclasses.is_dataclass(value):
            yield f"{field.name} ({', '.join(_words(value))})"
        elif isinstance(value, bool):
            yield field.name if value else f"not {field.name}"
        elif isinstance(value, tuple):
            yield f"{field.name} {' '.join(map(str, value))}"
        else:
            yield f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}"


def _types_table(report: Report) -> Table:
    table = _table("type", "tensors", "weights", "size", "bits")
    table.add_column("share of the bytes")
    for share in report.types:
        bar = Bar(report.bytes, 0, share.bytes, width=24, color="magenta")
        table.add_row(share.name, str(share.tensors), count_text(share.weights), *_size(share), bar)
    return table


def _roles_table(report: Report) -> Table:
    table = _table("role", "tensors", "size", "bits")
    table.add_column("types")
    table.add_column("shape", style="dim")
    for share in report.roles:
        types = share.types.items()
        types = ", ".join(f"{count} {name}" if len(types) > 1 else name for name, count in types)
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in share.shapes)
        table.add_row(share.name, str(share.tensors), *_size(share), types, shapes)
    return table


def _table(first: str, *numbers: str) -> Table:
    """A table without frame: a column of names, and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.header_style = "dim"
    table.add_column(first, style="cyan", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _size(share: Share) -> tuple[str, str]:
    return bytes_text(share.bytes), f"{share.bits_per_weight:.2f}"


def _memory_table(memory: Memory, cfg: Config) -> Table:
    table = _table("", *(f"{dtype} cache" for dtype in CACHE_DTYPES))
    same = {"weights": memory.weights, "state": memory.sequence}
    for name, size in same.items():
        table.add_row(name, *[bytes_text(size)] * len(CACHE_DTYPES))
    table.add_row("cache, a token", *(bytes_text(memory.token[dtype]) for dtype in CACHE_DTYPES))
    for context in sorted({*(c for c in CONTEXTS if c < cfg.context_length), cfg.context_length}):
        totals = (bytes_text(memory.total(context, dtype)) for dtype in CACHE_DTYPES)
        table.add_row(f"in all, {context:,} tokens", *totals)
    return table


def _fit(device: Device, cfg: Config) -> str:
    """What a device has room for."""
    if device.bytes is None:
        return f"{device.name} does not say how much it has"
    has = f"{device.name} has {bytes_text(device.bytes)}"
    if device.context is None:
        return f"{has}: the weights do not fit"
    whole = "the whole context" if device.context == cfg.context_length else f"{device.context:,} tokens"
    return f"{has}: room for {whole}"
