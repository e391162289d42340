"""Numba kernels: loops over contiguous arrays of fixed dtypes, without validation or I/O.

Their callers in `cloudrt.masks`, `cloudrt.search` and `cloudrt.geo` validate arguments and allocate outputs and work
space.
"""
