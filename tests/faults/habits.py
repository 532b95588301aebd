"""What other engines and tools do that is no fault: their arithmetics, their conventions, their layouts.

Each habit turns a right float64 forward into a reference; comparing it with ours must not end in a fault.

    OMP_NUM_THREADS=1 python tests/faults/habits.py [--models a,m,lfm2,falcon-h1,qwen3next]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
import numpy as np
import oracle
from faults import changes, run, tiny
from faults.dress import DRESSES

from scarlet_jax.tools.parity import Dump, compare
from scarlet_jax.tools.parity.arithmetic import bf16, f16, tf32
from scarlet_jax.tools.parity.names import rename

Rounding = Callable[[np.ndarray], np.ndarray]
Habit = Callable[[oracle.Model, np.ndarray], Dump]


def model(name: str) -> oracle.Model:
    """A tiny model of the fault benchmark, or one of another architecture."""
    if name in tiny.SIZES:
        return tiny.make(name, 97)
    shape = (models.RECURRENT_SHAPES | models.MOE_SHAPES | models.DENSE_SHAPES)[name]
    opened = oracle.load(models.path(shape))
    return dataclasses.replace(opened, weights={name: opened.weights[name] for name in opened.weights})


def dump(model: oracle.Model, tokens: np.ndarray, noise: int = 0) -> Dump:
    """As `run.dump`, of the model's own architecture."""
    arch = model.metadata["general.architecture"]
    return dataclasses.replace(run.dump(model, tokens, noise), arch=arch)


def changed(change: Callable[[str, np.ndarray], np.ndarray | None], **fields) -> Habit:
    """The right taps, each through `change`, which drops those it gives None for."""

    def habit(model: oracle.Model, tokens: np.ndarray) -> Dump:
        right = dump(model, tokens, 1)
        taps = {name: change(name, right[name]) for name in right}
        taps = {name: x for name, x in taps.items() if x is not None}
        return Dump(
            taps, **(dict(engine="other", arch=right.arch, tokens=right.tokens, format="npz") | fields)
        )

    return habit


def computed(activations: Rounding, weights: Rounding, taps: Rounding | None = None) -> Habit:
    """Products of rounded factors; and all that is stored rounded, where an engine keeps nothing in f32."""

    def linear(original, self: oracle.Model, name: str, x: np.ndarray) -> np.ndarray:
        weight = weights(self.weights[f"{name}.weight"])
        return activations(x) @ weight.T * self.scale(name) + self.bias(name)

    def habit(model: oracle.Model, tokens: np.ndarray) -> Dump:
        with contextlib.ExitStack() as stack:
            original = oracle.Model.linear
            stack.callback(setattr, oracle.Model, "linear", original)
            oracle.Model.linear = lambda *args: linear(original, *args)
            if taps is not None:
                stored = changes.tap(".*", lambda x, _: taps(x) if x.dtype.kind == "f" else x)
                stack.enter_context(stored(model))
            return dataclasses.replace(dump(model, tokens), engine="other", format="npz")

    return habit


def eight_bits(x: np.ndarray) -> np.ndarray:
    """Integers to 127 and a scale for every few channels."""
    size = next(size for size in (32, 16, 8, 4, 2, 1) if x.shape[-1] % size == 0)
    blocks = x.reshape(*x.shape[:-1], -1, size)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scale, scale, 1)) * scale).reshape(x.shape)


def _op(name: str) -> str:
    return name.rpartition("-")[0] or name


def _heads(name: str, x: np.ndarray) -> np.ndarray:
    """Query heads in reverse order, wherever there are some."""
    per_head = ("Qcur", "Qcur_normed", "Qcur_reshaped", "kq", "kq_soft_max", "kqv")
    return x[:, ::-1] if _op(name) in per_head and x.ndim == 3 else x


def _scaled_queries(name: str, x: np.ndarray) -> np.ndarray:
    return x * np.float32(x.shape[-1] ** -0.5) if _op(name) in ("Qcur", "Qcur_normed") and x.ndim == 3 else x


def _transposed_states(name: str, x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2) if "state" in name and x.ndim > 1 else x


_ENDS = ("norm", "h_nextn", "result_norm", "result_output")


def _padded(side: str) -> Callable[[str, np.ndarray], np.ndarray]:
    def pad(name: str, x: np.ndarray) -> np.ndarray:
        if "state" in name or x.ndim < 2:
            return x
        more = np.full((5, *x.shape[1:]), 0.1, x.dtype)
        return np.concatenate([more, x] if side == "left" else [x, more])

    return pad


HABITS: dict[str, Habit] = {
    "the same numbers": changed(lambda name, x: x),
    "a log": lambda model, tokens: DRESSES["log"](dump(model, tokens, 1)),
    "heads flat": lambda model, tokens: DRESSES["flat"](dump(model, tokens, 1)),
    "heads before tokens": lambda model, tokens: DRESSES["head-major"](dump(model, tokens, 1)),
    "bf16 in everything": computed(bf16, bf16, bf16),
    "f16 in everything": computed(f16, f16, f16),
    "bf16 factors, f32 sums": computed(bf16, bf16),
    "bf16 weights": computed(lambda x: x, bf16),
    "tf32": computed(tf32, tf32),
    "8-bit activations": computed(eight_bits, lambda w: w),
    "stored in bf16": changed(lambda name, x: bf16(x)),
    "f64": changed(lambda name, x: x.astype(np.float64)),
    "big-endian": changed(lambda name, x: x.astype(x.dtype.newbyteorder(">"))),
    "Fortran order": changed(lambda name, x: np.asfortranarray(x)),
    "a batch axis": changed(lambda name, x: x[None]),
    "tokens last": changed(lambda name, x: x.T if x.ndim == 2 else x),
    "logits of the last token": changed(lambda name, x: x[-1:] if name in _ENDS else x),
    "padded on the left": changed(_padded("left")),
    "padded on the right": changed(_padded("right")),
    "states transposed": changed(_transposed_states),
    "taps that nobody knows": changed(lambda name, x: x if len(name) % 3 else None),
    "query heads reversed": changed(_heads),
    "the scale in the queries": changed(_scaled_queries),
    "gains in the next matrix": changed(lambda name, x: None if _op(name) == "attn_norm" else x),
}


def _weights(model: oracle.Model, change: Callable[[str, np.ndarray], np.ndarray]) -> oracle.Model:
    return dataclasses.replace(model, weights={n: change(n, w) for n, w in model.weights.items()})


def _of_embedding(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[oracle.Model], oracle.Model]:
    return lambda model: _weights(model, lambda name, w: change(w) if name == "token_embd.weight" else w)


def _empty(*words: str) -> Callable[[oracle.Model], oracle.Model]:
    return lambda model: _weights(model, lambda name, w: 0 * w if any(x in name for x in words) else w)


# Models with activations that are out of the ordinary.
MODELS: dict[str, Callable[[oracle.Model], oracle.Model]] = {
    "": lambda model: model,
    "one channel 1000 times the others": _of_embedding(
        lambda w: w * np.where(np.arange(w.shape[1]) == 3, 1000, 1)
    ),
    "rows of zeros": _of_embedding(lambda w: w * (np.arange(len(w)) % 3 > 0)[:, None]),
    "layers that add nothing": _empty("ssm_out", "attn_output", "ffn_down", "out_proj"),
}


def pairs(
    name: str, lengths: tuple[int, ...] = (40, 1, 2, 310)
) -> Iterator[tuple[str, Dump, Dump, oracle.Model]]:
    """Every habit on a model, and some of them on odd ones and on prompts of other lengths."""
    for odd, change in MODELS.items():
        made = change(model(name))
        vocabulary = len(made.weights["token_embd.weight"])
        for length in lengths if not odd else lengths[:1]:
            tokens = np.random.default_rng(length).integers(0, vocabulary, length)
            ours = rename(dump(made, tokens, 2))
            for habit, of in HABITS.items():
                short = "in everything" in habit or habit in ("a log", "tf32", "8-bit activations")
                if short or (not odd and length == lengths[0]):
                    yield f"{habit}, {length} tokens{odd and ', '}{odd}", ours, rename(of(made, tokens)), made


def alarms(name: str, **options) -> Iterator[tuple[str, bool, dict]]:
    """Each pair compared with the dumps alone and with the weights: what was said of it."""
    for pair, ours, reference, made in pairs(name, **options):
        for weights in (None, run.InMemory(made)):
            yield pair, weights is not None, compare(ours, reference, model=weights)


def main() -> None:
    """Run and print what was taken for a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="a,m,lfm2,falcon-h1,qwen3next,llama,qwen3moe")
    for name in parser.parse_args().models.split(","):
        said = list(alarms(name))
        for pair, known, report in said:
            if report["exit"]:
                first = (report["first"] or {}).get("tap")
                how = "with the weights" if known else "dumps only"
                print(f"ALARM {name}, {pair}, {how}: {report['verdict']} {first} {report['why']}")
        print(f"{name}: {len(said)} comparisons", flush=True)


if __name__ == "__main__":
    main()
