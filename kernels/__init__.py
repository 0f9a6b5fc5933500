"""Triton kernels, one file per operation; imported as `fastgan.kernels`."""
