"""Trains the model in the box: a small Qwen3.5 on text that this package makes itself."""
