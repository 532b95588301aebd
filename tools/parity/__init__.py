"""engine-parity: two activation dumps in, one honest verdict out."""
