"""A run as other tools would have written it: a callback's text log, arrays named by module, heads laid out anew."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from scarlet_jax.tools.parity import Dump
from scarlet_jax.tools.parity.logs import read_log
from scarlet_jax.tools.parity.names import TRANSFORMERS


def printed(name, array, prefix="common_debug_cb_eval:", indent=(4, 8, 12), elision="..., "):
    """One tensor as common_debug_print_tensor writes it: first and last three of axes longer than six."""
    array = np.asarray(array)
    ne = [*array.shape[::-1], 1, 1, 1, 1][:4]
    values = array.reshape(ne[::-1])
    head = f"{prefix} {name:>24} = (f32)    MUL_MAT(blk.0.w.weight{{{ne[0]}, 7, 1, 1}}, x{{1, 2, 1, 1}}}}) = "
    lines = [head + "{" + ", ".join(map(str, ne)) + "}"]

    def shown(n):
        return list(range(n)) if n <= 6 else [0, 1, 2, None, n - 3, n - 2, n - 1]

    for i3 in range(ne[3]):
        lines.append(" " * indent[0] + "[")
        for i2 in shown(ne[2]):
            if i2 is None:
                lines.append(" " * indent[1] + elision)
                continue
            lines.append(" " * indent[1] + "[")
            for i1 in shown(ne[1]):
                if i1 is None:
                    lines.append(" " * indent[2] + elision)
                    continue
                row = ["..." if i0 is None else f"{values[i3, i2, i1, i0]:12.4f}" for i0 in shown(ne[0])]
                lines.append(" " * indent[2] + "[" + ", ".join(row) + "],")
            lines.append(" " * indent[1] + "],")
        lines.append(" " * indent[0] + "]")
        lines.append(" " * indent[0] + f"sum = {values.sum():f}")
    return "\n".join(lines)


def as_logged(name, x):
    """A tap in llama.cpp's own order of axes."""
    op = name.rpartition("-")[0]
    if op in ("kq", "kq_soft_max", "kqv"):
        return x.transpose(1, 0, 2)
    time_last = (
        "qkv_mixed_transposed",
        "conv_input",
        "conv_states",
        "conv_states_reshaped",
        "conv_state_last",
        "conv_state_update",
    )
    return x.T if op in time_last else x


def log(dump, **style):
    head = ["build: 4242 (abc1234)", f"number of input tokens = {len(dump.tokens)}"]
    head += [f"  {token}" for token in dump.tokens]
    return "\n".join(head + [printed(name, as_logged(name, dump[name]), **style) for name in dump])


def _relaid(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Dump], Dump]:
    """Arrays with heads (all but states, which have no token axis) through `change`, as some .npz holds them."""

    def dress(dump: Dump) -> Dump:
        heads = {
            name: change(x) if (x := dump[name]).ndim == 3 and "state" not in name else x for name in dump
        }
        return Dump(heads, tokens=dump.tokens, order=list(dump), format="npz")

    return dress


def modules(dump: Dump) -> Dump:
    """The taps that hooks on transformers' modules give, under the modules' paths, without token ids."""
    paths = {tap: path for path, tap in TRANSFORMERS.items()}
    taps = {}
    for name in dump:
        op, _, layer = name.rpartition("-")
        path = paths.get(f"{op}-{{}}" if layer.isdigit() else name)
        if path == "layers.{}.self_attn.o_proj" and f"z-{layer}" in dump:
            continue  # the same name for what the delta rule gives, which is no module's output
        if path is not None:
            x = dump[name]
            rows = x.reshape(len(x), -1) if "q_proj" in path or "v_proj" in path else x
            taps["model." + path.replace("{}", layer)] = rows
    return Dump(taps, engine="transformers", order=list(taps), format="npz")


def stream(dump: Dump) -> Dump:
    """Hidden states alone: the residual stream after each layer, and both ends."""
    ends = ("model.input_embed", "result_norm", "result_output")
    taps = {name: dump[name] for name in dump if name.startswith("l_out-") or name in ends}
    return Dump(taps, tokens=dump.tokens, order=list(taps), format="npz")


def halves(dump: Dump) -> Dump:
    """Stored in half precision by nobody in particular."""
    taps = {name: dump[name].astype(np.float16).astype(np.float32) for name in dump}
    return Dump(taps, tokens=dump.tokens, order=list(dump), format="npz")


DRESSES: dict[str, Callable[[Dump], Dump]] = {
    "plain": lambda dump: dump,
    "log": lambda dump: read_log(log(dump), "log"),
    "modules": modules,
    "stream": stream,
    "halves": halves,
    "flat": _relaid(lambda x: x.reshape(len(x), -1)),
    "head-major": _relaid(lambda x: x.transpose(1, 0, 2)),
}
