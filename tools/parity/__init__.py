"""engine-parity: two activation dumps in, one honest verdict out."""

from scarlet_jax.tools.parity.compare import compare
from scarlet_jax.tools.parity.dump import Dump, read_dump, write_dump

__all__ = ["Dump", "compare", "read_dump", "write_dump"]
