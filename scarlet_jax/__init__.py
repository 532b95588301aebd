"""A JAX engine for Qwen3.5-family GGUF models that can prove itself right."""
