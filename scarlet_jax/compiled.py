"""Compiled programs, kept in the user's cache folder: the next process starts without compiling them again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
from absl import logging

LARGEST = 2**30  # bytes of programs that are kept; the longest unused go first


def keep() -> None:
    """Keep what is compiled from now on, if the folder can be written.

    Nothing is changed where JAX's own settings (JAX_COMPILATION_CACHE_DIR and others) have settled it. No
    program is too small: a model has tens, each a few milliseconds from the cache and tens from the compiler.
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is not None or not settings["jax_enable_compilation_cache"]:
        return
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.info("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder()))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def folder() -> Path:
    """Where this platform keeps what can be made again: `$XDG_CACHE_HOME` and its likes."""
    if sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "scarlet_jax" / "compiled"
