"""Pallas kernels on packed FP4 weights. Knows arrays of bytes, not modules or checkpoints; needs JAX alone."""
