"""Compile the kernels into one shared library: `python -m scarlet_jax.ops.cpu.build`, and `pip install`.

Only the standard library is used, because `setup.py` runs this file before anything else is there. The
sources need C++17 and the XLA FFI headers that jaxlib ships; the library needs no Python headers, so that
one library serves every Python. Each instruction set is a file compiled with its own flags (never the
build machine's), and `library.cc` chooses among them where it runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_FOLDER = Path(__file__).parent
LIBRARY = "libscarlet_cpu.so"
FAILURE_NOTE = "libscarlet_cpu.failed"  # beside where the library would be: why it was not built

# -ffp-contract=off: a decoded value is rounded where the format says; sums ask for fused operations.
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# GCC 12 takes the undefined upper halves in its own AVX-512 header for uninitialised variables.
AVX512_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    f"{part}_{isa}.cc": flags
    for part in ("isa", "mixers")
    for isa, flags in (("generic", []), ("avx2", AVX2_FLAGS), ("avx512", AVX512_FLAGS))
}
ISA_FLAGS["fixed_avx512vnni.cc"] = [*AVX512_FLAGS, "-mavx512vnni"]
ISA_FLAGS["amx_bf16.cc"] = [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
SANITIZER_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"]


class BuildError(Exception):
    """Why the library could not be compiled, in a line or with the compiler's own words."""


def source_names() -> list[str]:
    """The files that this machine's library is made of."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = [name for name in ISA_FLAGS if x86 or "generic" in name]
    return [*isas, "team.cc", "library.cc", "handlers.cc", "handlers_mixers.cc"]


def fingerprint() -> str:
    """A word for what is compiled here, and how; empty where the sources are not at hand (an installed wheel)."""
    sources = sorted(SOURCE_FOLDER.glob("*.cc")) + sorted(SOURCE_FOLDER.glob("*.h"))
    if not sources:
        return ""
    digest = hashlib.sha256(repr((COMMON_FLAGS, ISA_FLAGS)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(target: Path, *, sanitize: bool = False) -> None:
    """Compile into `target`, replacing it only when all went well.

    With `sanitize`, AddressSanitizer and UndefinedBehaviorSanitizer are built in (the process that loads
    the library must then preload libasan). Raises BuildError if there is no compiler, no header, or an
    error in compiling.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or _find_compiler()
    extra = SANITIZER_FLAGS if sanitize else []
    include = ["-isystem", str(_ffi_headers())]
    own = {"library.cc": [f'-DSCARLET_SOURCES="{fingerprint()}"']}
    with tempfile.TemporaryDirectory(prefix="scarlet_build_") as folder:

        def compile_one(name: str) -> str:
            output = str(Path(folder, name).with_suffix(".o"))
            flags = [*COMMON_FLAGS, *ISA_FLAGS.get(name, []), *own.get(name, []), *extra, *include]
            _run([*compiler, *flags, "-c", str(SOURCE_FOLDER / name), "-o", output])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, source_names()))
        library = Path(folder, LIBRARY)
        _run([*compiler, "-shared", "-pthread", *extra, *objects, "-o", str(library)])
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copyfile(library, beside)  # the temporary folder may be another file system
        os.replace(beside, target)


def build_or_note(folder: Path) -> str | None:
    """Compile into `folder`; if that fails, leave a note there for the package to quote, and return it."""
    note = folder / FAILURE_NOTE
    try:
        compile_library(folder / LIBRARY, sanitize=os.environ.get("SCARLET_CPU_SANITIZE") == "1")
    except BuildError as error:
        (folder / LIBRARY).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{error}\n", encoding="utf-8")
        return str(error)
    note.unlink(missing_ok=True)
    return None


def _find_compiler() -> list[str]:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler was found (c++, g++ or clang++; the variable CXX names another)")


def _ffi_headers() -> Path:
    spec = importlib.util.find_spec("jaxlib")
    headers = Path(spec.origin).parent / "include" if spec and spec.origin else None
    if headers is None or not (headers / "xla/ffi/api/ffi.h").exists():
        raise BuildError("jaxlib, whose headers the kernels need, was not found")
    return headers


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if result.returncode:
        raise BuildError(f"{shlex.join(command)}:\n{result.stderr.strip()}")


if __name__ == "__main__":
    if failure := build_or_note(SOURCE_FOLDER):
        sys.exit(f"the CPU kernels were not built: {failure}")
