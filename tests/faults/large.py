"""Two dumps of gigabytes and how fast they are compared: OMP_NUM_THREADS=1 taskset -c 0 python tests/faults/large.py"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from scarlet_jax.tools.parity import compare, write_dump

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


def main() -> None:
    """Write, and compare in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / side for side in "ab"]
        made = taps()
        for seed, path in enumerate(paths):
            rng = np.random.default_rng(seed)
            for array in made.values():
                array *= 1 + np.float32(6e-8) * rng.integers(-1, 2, array.shape, np.int8)
            write_dump(path, made, engine=path.name, arch="qwen3", tokens=list(range(TOKENS)))
        subprocess.run([sys.executable, __file__, *paths], check=True)  # which never held the arrays


def measure(paths: list[str]) -> None:
    """Compare two dumps and print speed and peak memory."""
    size, start = sum(Path(path).stat().st_size for path in paths) / 1e9, time.process_time()
    report = compare(*paths)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{report['verdict']}: {size:.2f} GB in {seconds:.1f} s of one core, {size / seconds:.2f} GB/s")
    print(f"peak memory {peak:.2f} GB")


if __name__ == "__main__":
    measure(sys.argv[1:]) if sys.argv[1:] else main()
