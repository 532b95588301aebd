"""C++ kernels behind the XLA foreign function interface."""
