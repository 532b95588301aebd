"""Fills the table of `graph` with every operation there is; importing it is all it takes."""

from scarlet_jax.tools.parity import ops_attention, ops_delta, ops_ffn, ops_trunk

__all__ = ["ops_attention", "ops_delta", "ops_ffn", "ops_trunk"]
