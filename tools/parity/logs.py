"""Text logs of llama.cpp's evaluation callback, from mainline and ik_llama.cpp.

A log prints each tensor as a header and nested brackets of numbers with four decimals, of which it leaves out the
middle: along the first three axes, axes longer than six show their first three and last three entries. What is
printed is kept as `Sampled` values with their places, and the rounding as the dump's resolution.

Tools that write it: llama-eval-callback, llama-debug, and anything built on `common_debug_cb_eval`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from scarlet_jax.errors import BadInput
from scarlet_jax.tools.parity.dump import Dump

RESOLUTION = 0.5e-4  # half a unit of the fourth decimal
_EDGE = 3  # entries printed at either end of a long axis

_HEADER = re.compile(
    r"^\s*(?:\S*(?:_cb_eval|ggml_debug|debug_callback)\S*:)\s+(?P<name>\S.*?)\s+=\s+\((?P<type>\w+)\)\s+"
    r"(?P<op>[\w -]+?)\((?P<sources>.*)\)\s+=\s+\{(?P<ne>[\d, ]+)\}"
)
_NUMBER = re.compile(r"[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\binf\b|\bnan\b)", re.IGNORECASE)
_SUM = re.compile(r"^\s*sum\s*=")
_TOKEN_COUNT = re.compile(r"number of input tokens\s*=\s*(\d+)|[Tt]oken ids? \((\d+)\)")
_WEIGHT = re.compile(r"^\s*([\w.]+\.weight)\{")

# Axes whose order in a log, once reversed, is not that of a dump: token axis first.
_AXES = {
    **dict.fromkeys(("kq", "kq_soft_max", "kqv"), (1, 0, 2)),
    **dict.fromkeys(("qkv_mixed_transposed", "conv_input", "conv_states", "conv_states_reshaped"), (1, 0)),
    **dict.fromkeys(("conv_state_last", "conv_state_update"), (1, 0)),
}


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Some entries of an array: `values[i, j, ...]` is the array's [index[0][i], index[1][j], ...]."""

    shape: tuple[int, ...]
    index: tuple[np.ndarray, ...]
    values: np.ndarray

    @property
    def size(self) -> int:
        """Elements of the whole array."""
        return math.prod(self.shape)

    @property
    def complete(self) -> bool:
        """Whether nothing was left out."""
        return self.values.size == self.size

    def of(self, whole: np.ndarray) -> np.ndarray:
        """The same entries of another array of this size."""
        return np.asarray(whole).reshape(self.shape)[np.ix_(*self.index)]

    def transpose(self, axes: tuple[int, ...]) -> Sampled:
        """Axes reordered."""
        return Sampled(
            tuple(self.shape[a] for a in axes),
            tuple(self.index[a] for a in axes),
            self.values.transpose(axes),
        )


@dataclasses.dataclass
class _Block:
    name: str
    ne: tuple[int, ...]
    sources: str
    numbers: list[float]

    def sampled(self) -> Sampled | None:
        """The printed entries; None if there is none or the block was cut."""
        if 0 in self.ne:  # a view of no rows, such as the other sequences' states
            return None
        if len(self.numbers) != math.prod(_count(n, axis) for axis, n in enumerate(self.ne)):
            return None  # before anything is made of the sizes that a line claims
        index = tuple(_printed(n, axis) for axis, n in enumerate(self.ne))[::-1]
        values = np.array(self.numbers, np.float32).reshape([len(i) for i in index])
        whole = Sampled(self.ne[::-1], index, values)
        keep = [axis for axis, n in enumerate(whole.shape) if n > 1] or [len(whole.shape) - 1]
        keep = list(
            range(keep[0], len(whole.shape))
        )  # leading axes of one entry go; later ones are the tensor's
        return Sampled(
            tuple(whole.shape[a] for a in keep),
            tuple(whole.index[a] for a in keep),
            values.reshape([len(whole.index[a]) for a in keep]),
        )


def looks_like_log(text: str) -> bool:
    """Whether a text's beginning has a tensor header."""
    return any(_HEADER.match(line) for line in text.splitlines())


def read_log(text: str, name: str) -> Dump:
    """A log as a dump of `Sampled` and whole arrays; a name printed again keeps the last.

    Raises BadInput if there is no whole tensor in it. A log cut in the middle gives what it holds, and says so.
    """
    notes, taps, weights, passes, seen = [], {}, {}, 1, set()
    cut = 0
    for block in _blocks(text):
        array = block.sampled()
        if array is None:
            cut += bool(block.numbers)
            continue
        if block.name in seen and block.name == next(iter(seen_order(taps)), None):
            passes += 1
        seen.add(block.name)
        plain = re.sub(r" \((?:view|reshaped|permuted|cont|transposed|copy[^)]*)\)", "", block.name)
        if plain != block.name and plain in taps:
            continue  # a view of what is there already
        base = re.sub(r"-\d+$", "", plain)
        if base in _AXES and len(array.shape) == len(_AXES[base]):
            array = array.transpose(_AXES[base])
        taps.pop(plain, None)
        taps[plain] = array.values if array.complete else array
        weight = _WEIGHT.match(block.sources)
        if weight:
            weights[plain] = (weight.group(1), "")
    if not taps:
        raise BadInput(
            f"{name}: no whole tensor in this log; expected llama-eval-callback or llama-debug output"
        )
    if cut:
        notes.append(f"{name}: {cut} tensor{'s' * (cut > 1)} cut short; what came before is used")
    if passes > 1:
        notes.append(f"{name}: {passes} passes (a warm-up or several batches); the last one counts")
    return Dump(
        taps,
        engine=_engine(text),
        tokens=_tokens(text),
        order=list(taps),
        weights={tap: w for tap, w in weights.items() if w[1]},
        format="llama.cpp log",
        resolution=RESOLUTION,
        notes=notes,
    )


def seen_order(taps: dict) -> Iterator[str]:
    """Names in the order they were first met."""
    return iter(taps)


def _blocks(text: str) -> Iterator[_Block]:
    block: _Block | None = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            if block is not None:
                yield block
            ne = tuple(int(n) for n in header["ne"].split(",") if n.strip())
            block = _Block(header["name"].strip(), ne, header["sources"], [])
        elif block is not None and not _SUM.match(line) and ("[" in line or "]" in line or "," in line):
            block.numbers += [float(number) for number in _NUMBER.findall(line)]
    if block is not None:
        yield block


def _count(n: int, axis: int) -> int:
    """How many entries of an axis of n are printed."""
    return n if axis >= 3 else min(n, 2 * _EDGE)


def _printed(n: int, axis: int) -> np.ndarray:
    if _count(n, axis) == n:
        return np.arange(n)
    return np.concatenate([np.arange(_EDGE), np.arange(n - _EDGE, n)])


def _tokens(text: str) -> list[int]:
    """Token ids where the tool printed them, one a line or in one line after their count."""
    found = _TOKEN_COUNT.search(text)
    if not found:
        return []
    count = int(found.group(1) or found.group(2))
    numbers = re.findall(r"(?<![\w.])-?\d+(?![\w.])", text[found.end() : found.end() + 40 * count + 200])
    tokens = [int(n) for n in numbers[:count]]
    return tokens if len(tokens) == count else []


def _engine(text: str) -> str:
    build = re.search(r"build:? *=? *(\d+ \(\w+\))", text)
    kind = "ik_llama.cpp" if re.search(r"\b(Qaux|fa|ffn_up_gate|q_fused)-\d+ =", text) else "llama.cpp"
    return f"{kind} {build.group(1)}" if build else kind
