"""llama.cpp as a reference engine: any libllama, by default the one in the xllamacpp wheel."""

from __future__ import annotations

from scarlet_jax.tools.engines.ggml import quantize, to_float

__all__ = ["quantize", "to_float"]
