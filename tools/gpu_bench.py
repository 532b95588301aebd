"""Checks the GPU's kernels against float64, and measures them and whole models beside the roofs of the machine.

The roofs are measured in the same run: copying memory, and a large bf16 product. Models are random ones of real
shapes, made as it goes. Beside them stand transformers (torch, bf16) with the same weights, where it can run, and
llama.cpp on the same file, if --lib names one that was built for this GPU; where not, the reason. --tiny goes through
everything on a CPU, with the kernels' checks interpreted and a model of a few rows in the CPU's own code: it shows
that the script works, and its times mean nothing.

example: scarlet gpu-bench --json docs/benchmarks-gpu.json
         scarlet gpu-bench --tiny
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from scarlet_jax.errors import BadInput
from scarlet_jax.load import load
from scarlet_jax.model import Model
from scarlet_jax.ops import gpu
from scarlet_jax.ops.gpu import planes
from scarlet_jax.ops.qtensor import QTensor, block_size
from scarlet_jax.ops.quants import decode
from scarlet_jax.tools import common, synth

KERNEL_LIMIT = 1e-5  # relative L2 from float64, of f32 products and sums


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, and how large."""

    types: tuple[str, ...]
    models: tuple[tuple[str, str], ...]  # size or shape's name, and quant
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    steps: int
    repeat: int
    copied: int  # bytes
    side: int  # of the square product


FULL = Plan(
    types=tuple(planes.LAYOUTS),
    models=tuple((size, quant) for size in ("0.8b", "4b", "9b") for quant in ("Q4_K_M", "Q8_0")),
    batches=(1, 4, 16),
    prompts=(512, 4096),
    steps=64,
    repeat=5,
    copied=2**30,
    side=8192,
)
TINY = Plan(("Q4_K", "Q8_0"), (("tiny", "Q8_0"),), (1, 2), (8,), 2, 1, 2**16, 64)
_TINY_SHAPE = synth.Shape(
    block_count=2, full_attention_interval=2, embedding_length=64, feed_forward_length=96, vocab_size=300,
    tied=True, head_count=4, head_count_kv=2, key_length=32, dimension_count=16, dimension_sections=(3, 3, 2, 0),
    conv_kernel=4, state_size=32, group_count=2, time_step_rank=4,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    parser.add_argument("--tiny", action="store_true", help="try the script, on a CPU")
    parser.add_argument("--folder", metavar="DIR", help="keep the models there (a temporary folder)")
    parser.add_argument("--lib", metavar="PATH", help="a libllama built for this GPU, to stand beside")
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if not args.tiny and jax.default_backend() != "gpu":
        raise BadInput(
            f"there is no GPU here: JAX computes on a {jax.default_backend()} (--tiny tries the script on it)"
        )
    with contextlib.ExitStack() as stack:
        folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(gpu.mode("interpreted") if args.tiny else contextlib.nullcontext())
        result = measure(TINY if args.tiny else FULL, Path(folder), tiny=args.tiny, lib=args.lib)
    if args.json:
        common.write_json(args.json, result)
    if args.json != "-":
        console = Console()
        for table in tables(result):
            console.print(table)
    if wrong := [c["what"] for c in result["checks"] if not c["error"] <= KERNEL_LIMIT]:
        raise BadInput(f"kernels further than {KERNEL_LIMIT:g} from float64: {', '.join(wrong)}")


def measure(plan: Plan, folder: Path, *, tiny: bool = False, lib: str | None = None) -> dict[str, Any]:
    """Everything, as plain data; says on stderr what it is at."""
    device = jax.devices()[0]
    result: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "tiny": tiny}
    result["checks"] = [_noted(what, check) for what, check in checks(plan)]
    result["copy_bandwidth"] = copy_bandwidth(plan)
    result["matmul_flops"] = matmul_rate(plan)
    result["models"] = []
    for size, quant in plan.models:
        _say(f"{size} {quant}")
        path = _model_file(folder, size, quant)
        result["models"].append(
            {"model": size, "quant": quant}
            | measure_model(path, plan, result["copy_bandwidth"], result["matmul_flops"])
            | {"transformers": _or_why_not(lambda path=path: beside_transformers(path, plan, tiny=tiny))}
            | {"llama.cpp": _or_why_not(lambda path=path: beside_llama_cpp(path, plan, lib))}
        )
    return result


# --- kernels against float64 ----------------------------------------------------------------------------------


def checks(plan: Plan) -> Iterator[tuple[str, Callable[[], float]]]:
    """A name, and how to get the relative L2 distance from float64, of every kernel."""
    for qtype in plan.types:
        for rows in (1, 40):
            yield f"{qtype} x {rows}", lambda qtype=qtype, rows=rows: _product_error(qtype, rows)
    yield "three products of one input", _products_error
    for tokens in (1, 100):
        yield f"delta rule, {tokens} tokens", lambda tokens=tokens: _delta_error(tokens)
    yield "attention over a cache", _attention_error


def _product_error(qtype: str, rows: int) -> float:
    rng = np.random.default_rng(rows)
    w, values = _weight(rng, qtype, 70)
    x = rng.standard_normal((rows, 512)).astype(np.float32)
    return _distance(jax.jit(gpu.qmatmul)(x, w), x.astype(float) @ values.T)


def _products_error() -> float:
    """One token by weights of several sizes and types, in one launch."""
    rng = np.random.default_rng(0)
    sizes = (("Q4_K", 70), ("Q6_K", 6), ("Q8_0", 33))
    ws, values = zip(*(_weight(rng, qtype, out) for qtype, out in sizes), strict=True)
    x = rng.standard_normal((1, 512)).astype(np.float32)
    got = jax.jit(gpu.qmatmul_many)(x, ws)
    return max(_distance(y, x.astype(float) @ w.T) for y, w in zip(got, values, strict=True))


def _weight(rng: np.random.Generator, qtype: str, out: int) -> tuple[Any, np.ndarray]:
    """Random planes of (out, 512), and their values in float64."""
    elements, size = block_size(qtype)
    blocks = rng.integers(0, 256, (out, 512 // elements * size), np.uint8) & 0x3F  # no scale is then infinite
    return gpu.prepare(QTensor(blocks, qtype)), np.asarray(decode(jnp.asarray(blocks), qtype), np.float64)


def _delta_error(tokens: int) -> float:
    rng = np.random.default_rng(tokens)
    q, k, v = rng.standard_normal((3, 1, tokens, 2, 128))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g, beta = -rng.exponential(size=(1, tokens, 2)), rng.uniform(size=(1, tokens, 2))
    state = rng.standard_normal((1, 2, 128, 128))
    arrays = [x.astype(np.float32) for x in (q, k, v, g, beta, state)]
    o, _ = jax.jit(gpu.delta_rule)(*arrays)
    q, k, v, g, beta, state = (x.astype(np.float64) for x in arrays)
    expected = np.empty(v.shape)
    for t, h in np.ndindex(tokens, 2):
        s = np.exp(g[0, t, h]) * state[0, h]
        s += beta[0, t, h] * np.outer(v[0, t, h] - s @ k[0, t, h], k[0, t, h])
        state[0, h], expected[0, t, h] = s, s @ q[0, t, h]
    return _distance(o, expected)


def _attention_error() -> float:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 1, 8, 64)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 512, 2, 64)).astype(np.float32)
    position = np.array([[400], [17]], np.int32)
    got = jax.jit(lambda *x: gpu.attend(*x, scale=0.125))(q, k, v, position)
    expected = np.empty(q.shape)
    for b, n in np.ndindex(2, 8):
        seen = slice(0, position[b, 0] + 1)
        weights = np.exp(k[b, seen, n // 4].astype(float) @ q[b, 0, n] * 0.125)
        expected[b, 0, n] = weights / weights.sum() @ v[b, seen, n // 4].astype(float)
    return _distance(got, expected)


def _distance(ours: Any, truth: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - truth) / np.linalg.norm(truth))


def _noted(what: str, check: Callable[[], float]) -> dict[str, Any]:
    _say(what)
    return {"what": what, "error": check()}


# --- roofs ----------------------------------------------------------------------------------------------------


def copy_bandwidth(plan: Plan) -> float:
    """Bytes a second of a copy, read and written."""
    x = jnp.zeros(plan.copied, jnp.uint8)
    return 2 * plan.copied / _median(lambda: jax.block_until_ready(_increment(x)), plan.repeat)


_increment = jax.jit(lambda x: x + 1)


def matmul_rate(plan: Plan) -> float:
    """Operations a second of a square product in bf16."""
    x = jnp.ones((plan.side, plan.side), jnp.bfloat16)
    product = jax.jit(jnp.dot)
    return 2 * plan.side**3 / _median(lambda: jax.block_until_ready(product(x, x)), plan.repeat)


# --- models -----------------------------------------------------------------------------------------------------


def measure_model(path: Path, plan: Plan, bandwidth: float, flops: float) -> dict[str, Any]:
    """Speeds and what part of the roofs they are, and the distance of the logits from those of the CPU path."""
    model = load(path)
    blocks = jax.tree.leaves((model.weights.blocks, model.weights.output_norm, model.weights.output))
    held = sum(leaf.nbytes for leaf in blocks)
    elements = sum(int(np.prod(tensor.shape)) for tensor in model.gguf.tensors.values())
    prefill, decode_ = {}, {}
    for count in plan.prompts:
        tokens = np.arange(count) % model.config.vocabulary_size
        tokens_s = count / _median(lambda tokens=tokens: _ready(model.last_logits(tokens)), plan.repeat)
        prefill[count] = {"tokens_s": tokens_s, "of_matmul_rate": 2 * elements * tokens_s / flops}
    for batch in plan.batches:
        seconds = _decode_seconds(model, batch, plan)
        decode_[batch] = {"tokens_s": batch / seconds, "of_bandwidth": held / seconds / bandwidth}
    return {
        "bytes": held,
        "prefill": prefill,
        "decode": decode_,
        "from_cpu_path": _from_cpu_path(path, model),
    }


def _decode_seconds(model: Model, batch: int, plan: Plan) -> float:
    """Seconds a step: for one sequence in a block on the device, for several one after another."""
    _, state = model.last_logits([[1, 2, 3]] * batch)
    if batch == 1:
        from scarlet_jax.sampling import Sampling

        options: dict[str, Any] = {"stop": (), "count": plan.steps, "block": plan.steps}
        key, params = jax.random.key(0), Sampling()
        times = []
        for _ in range(plan.repeat + 1):
            began = time.perf_counter()
            _, state = model.decode_block(1, state, key, 1, params, **options)
            times.append((time.perf_counter() - began) / plan.steps)
        return statistics.median(times[1:])
    times = []
    for _ in range(plan.steps + 1):
        began = time.perf_counter()
        logits, state = model.last_logits([[1]] * batch, state, consume=True)
        jax.block_until_ready(logits)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _from_cpu_path(path: Path, model: Model) -> float:
    """Relative L2 distance of the logits after a prompt from those of the portable code on this machine's CPU."""
    tokens = [1, 2, 3, 5, 8]
    with jax.default_device(jax.devices("cpu")[0]):
        expected = load(path, implementation="portable").last_logits(tokens)[0]
    return _distance(model.last_logits(tokens)[0], np.asarray(expected, np.float64))


def _model_file(folder: Path, size: str, quant: str) -> Path:
    path = folder / f"{size}-{quant}.gguf"
    shape = _TINY_SHAPE if size == "tiny" else synth.SIZES["qwen35", size]
    return path if path.exists() else synth.write(path, shape, quant)


def _or_why_not(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What another engine does, or the reason why it does not: another project raises what it likes."""
    try:
        return measured()
    except Exception as error:
        return {"reason": " ".join(str(error).split())[:200]}


def beside_transformers(path: Path, plan: Plan, *, tiny: bool) -> dict[str, Any]:
    """transformers in bf16 with the weights of that file, decoded: prompts, and decoding in batches."""
    from scarlet_jax.tools.engines import transformers_model

    torch, _ = transformers_model.libraries()
    if not tiny and not torch.cuda.is_available():
        raise BadInput("torch finds no GPU")
    device = "cpu" if tiny else "cuda"
    language = transformers_model.load(path).model.to(device, torch.bfloat16)
    finished = (lambda: None) if tiny else torch.cuda.synchronize

    def prefill(count: int) -> None:
        language(torch.arange(count, device=device)[None] % language.config.vocab_size, logits_to_keep=1)
        finished()

    def decode_(batch: int) -> None:
        ids = torch.ones((batch, 3), dtype=torch.long, device=device)
        language.generate(ids, max_new_tokens=plan.steps, min_new_tokens=plan.steps, do_sample=False)
        finished()

    with torch.no_grad():
        return _speeds(prefill, decode_, plan, plan.batches)


def beside_llama_cpp(path: Path, plan: Plan, lib: str | None) -> dict[str, Any]:
    """llama.cpp by that library on the same file, with its defaults: prompts, and decoding of one sequence."""
    from scarlet_jax.tools.bench import LlamaCpp

    if lib is None:
        raise BadInput("--lib names none")
    engine = LlamaCpp(path, max(plan.prompts) + plan.steps, lib)

    def decode_(_batch: int) -> None:
        token = engine.prefill([1, 2, 3])
        for _ in range(plan.steps - 1):
            token = engine.decode(token)

    return _speeds(lambda count: engine.prefill([1] * count), decode_, plan, (1,))


def _speeds(
    prefill: Callable[[int], Any], decode_: Callable[[int], Any], plan: Plan, batches: tuple[int, ...]
) -> dict[str, Any]:
    """Tokens a second of prompts, and of `plan.steps` tokens after a short one, by count and batch."""
    prompts = {n: n / _median(lambda n=n: prefill(n), plan.repeat) for n in plan.prompts}
    decoded = {n: n * plan.steps / _median(lambda n=n: decode_(n), plan.repeat) for n in batches}
    return {
        what: {n: {"tokens_s": speed} for n, speed in speeds.items()}
        for what, speeds in (("prefill", prompts), ("decode", decoded))
    }


def _ready(result: Any) -> None:
    jax.block_until_ready(result)


def _median(job: Callable[[], Any], repeat: int) -> float:
    """Seconds, the first run left out."""
    job()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        job()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _say(what: str) -> None:
    print(f"gpu-bench: {what}", file=sys.stderr, flush=True)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The kernels' errors, and the models' speeds."""
    kernels = Table(title=f"{result['device']}: kernels against float64", title_justify="left")
    kernels.add_column("kernel")
    kernels.add_column("error", justify="right")
    for check in result["checks"]:
        kernels.add_row(check["what"], f"{check['error']:.1e}")
    yield kernels
    roofs = f"copy {result['copy_bandwidth'] / 1e9:.0f} GB/s, bf16 product {result['matmul_flops'] / 1e12:.1f} TFLOP/s"
    speeds = Table(title=roofs, title_justify="left")
    others = ("transformers", "llama.cpp")
    for heading in ("model", "what", "tokens/s", "of roof", *others):
        justify = "left" if heading in ("model", "what") else "right"
        speeds.add_column(heading, justify=justify, no_wrap=True)
    for figures in result["models"]:
        name = f"{figures['model']} {figures['quant']}"
        for what, label, roof in (
            ("prefill", "prefill {}", "of_matmul_rate"),
            ("decode", "decode, batch {}", "of_bandwidth"),
        ):
            for count, one in figures[what].items():
                theirs = (figures[other].get(what, {}).get(count) for other in others)
                beside = [f"{their['tokens_s']:.1f}" if their else "-" for their in theirs]
                cells = f"{one['tokens_s']:.1f}", f"{one[roof]:.0%}", *beside
                speeds.add_row(name, label.format(count), *cells)
        reasons = [f"{other}: {figures[other]['reason']}" for other in others if "reason" in figures[other]]
        speeds.caption = "; ".join(reasons) or None
    yield speeds
