"""Numba loops alone: no validation, no I/O, contiguous arrays of fixed dtypes.

The modules above them validate and allocate.
"""
