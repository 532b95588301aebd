"""A JAX engine for Qwen3.5-family GGUF models that can prove itself right.

import scarlet_jax
model = scarlet_jax.load("model.gguf")
logits, state = model.forward([1, 2, 3])
"""

from scarlet_jax.errors import BadInput
from scarlet_jax.load import load
from scarlet_jax.model import Model

__all__ = ["BadInput", "Model", "load"]
