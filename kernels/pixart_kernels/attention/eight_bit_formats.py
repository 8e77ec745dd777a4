"""The 8-bit numbers of attention: what its kernels and their reference round to."""

PRECISIONS = ("int8", "fp8")
KEYS = 64  # that share a scale, and that the kernel takes at most at a time
LARGEST_INTEGER = 127.0
LARGEST_E4M3 = 448.0
# Weights are at most 1: as many powers of two more use the range of e4m3, whose least is 2^-9.
SHIFT = {"int8": 0.0, "fp8": 8.0}
LEAST = 1e-30  # of a largest number that something is divided by
