"""Kernels: arrays in, arrays out. Nothing here knows a model or its configuration."""
