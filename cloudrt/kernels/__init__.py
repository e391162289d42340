"""Numba kernels: loops over contiguous arrays of fixed dtypes, without validation or I/O.

Their callers in `cloudrt.masks` and `cloudrt.search` validate arguments and allocate outputs and work space.
"""
