"""How fast gigabytes are compared, and in how much memory: two dumps of many tokens, and a large head that is broken.

OMP_NUM_THREADS=1 taskset -c 0 python tests/faults/large.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from scarlet_jax.tools.parity import compare, write_dump
from scarlet_jax.tools.parity.weights import ModelWeights

TOKENS, WIDTH, INNER, LAYERS = 4096, 2048, 8192, 3


def taps() -> dict[str, np.ndarray]:
    """Layers that are consistent in all but their products."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, WIDTH), np.float32)
    made = {"model.input_embed": x}
    for layer in range(LAYERS):
        mixed, down = (rng.standard_normal((TOKENS, WIDTH), np.float32) for _ in range(2))
        gate, up = (rng.standard_normal((TOKENS, INNER), np.float32) for _ in range(2))
        residual = x + mixed
        arrays = {
            "attn_norm": _rms(x),
            "attn_output": mixed,
            "attn_residual": residual,
            "attn_post_norm": _rms(residual),
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_swiglu": gate / (1 + np.exp(-gate)) * up,
            "ffn_out": down,
            "l_out": residual + down,
        }
        made |= {f"{name}-{layer}": array for name, array in arrays.items()}
        x = arrays["l_out"]
    return made


def _rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def layers(folder: Path) -> list[Path]:
    """Two dumps of all that, with rounding errors of their own."""
    paths = [folder / side for side in "ab"]
    made = taps()
    for seed, path in enumerate(paths):
        rng = np.random.default_rng(seed)
        for array in made.values():
            array *= 1 + np.float32(6e-8) * rng.integers(-1, 2, array.shape, np.int8)
        write_dump(path, made, engine=path.name, arch="qwen3", tokens=list(range(TOKENS)))
    return paths


VOCABULARY, DEPTH, PROMPT = 150_000, 1024, 48


def head(folder: Path) -> list[Path]:
    """Dumps of a model whose head is large, ours with logits that are capped, and the model."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (VOCABULARY, DEPTH // 256, 210), np.uint8)  # Q6_K
    blocks[..., 192:208] &= 15  # scales
    blocks[..., 208:] = np.array([2e-3], np.float16).view(np.uint8)
    model = folder / "head.gguf"
    writer = gguf.GGUFWriter(model, "qwen3")
    writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", 1e-6)
    packed = blocks.reshape(VOCABULARY, -1)
    writer.add_tensor("output.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight"):
        writer.add_tensor(name, np.ones(DEPTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    x = rng.standard_normal((PROMPT, DEPTH), np.float32)
    normed = _rms(x)
    logits = ModelWeights(model).product((None, "output"), normed)
    paths = [folder / "capped", folder / "right"]
    for path, y in zip(paths, (30 * np.tanh(logits / 30), logits), strict=True):
        made = {"l_out-0": x, "result_norm": normed, "result_output": y}
        write_dump(path, made, engine=path.name, arch="qwen3", tokens=list(range(PROMPT)))
    return [*paths, model]


def in_process(paths: Sequence[Path]) -> str:
    """`measure` of these files in a process of its own, which never held the arrays: what it printed."""
    command = [sys.executable, __file__, *map(str, paths)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Write, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        for make in (layers, head):
            print(f"{make.__name__}: {in_process(make(Path(folder)))}", end="")


def measure(paths: Sequence[str]) -> None:
    """Compare two dumps, with a model if a third path is given, and print speed and peak memory."""
    size, start = sum(Path(path).stat().st_size for path in paths) / 1e9, time.process_time()
    report = compare(paths[0], paths[1], model=paths[2] if len(paths) > 2 else None)
    seconds = time.process_time() - start
    said = " ".join([report["verdict"], *([report["cause"]["name"]] if report["cause"] else [])])
    print(f"{said}: {size:.2f} GB in {seconds:.1f} s of one core, {size / seconds:.2f} GB/s, ", end="")
    print(f"peak memory {peak():.2f} GB")


def peak() -> float:
    """The most memory that this process has held, in GB (ru_maxrss has that of who started it, too)."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024 / 1e9


if __name__ == "__main__":
    measure(sys.argv[1:]) if sys.argv[1:] else main()
