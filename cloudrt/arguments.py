"""Checks of the arguments of the Python interface: a wrong type is a `DataError` that names the argument.

Without them, Python raises a TypeError or AttributeError from inside, or a wrong value gives a wrong result: "Fish" as
the classes would be the four classes F, i, s and h.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from cloudrt.errors import CloudrtError, DataError

Kinds = type | tuple[type, ...]


def shown(value: object) -> str:
    """Return a value as text for an error message, of at most about 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return f"a value of type {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_type(name: str, value: object, kinds: Kinds, expected: str, error: type[CloudrtError] = DataError) -> None:
    """Raise DataError, or another `error`, unless a value is of one of `kinds`; a bool does not count as an int."""
    accepted = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        raise error(f"{name} must be {expected}, found {shown(value)}")


def check_path(name: str, value: Any) -> Path:
    """Return a path; raise DataError for another type, or a path with a NUL character, which no file can have."""
    check_type(name, value, (str, os.PathLike), "a path")
    try:
        path = Path(value)
    except TypeError:  # os.PathLike of bytes
        raise DataError(f"{name} must be a path, found {shown(value)}") from None
    if "\0" in str(path):
        raise DataError(f"{name} must be a path without NUL characters, found {shown(value)}")
    return path


def check_array(name: str, value: object, expected: str, error: type[CloudrtError] = DataError) -> None:
    """Raise DataError, or another `error`, for a value that is not a NumPy array."""
    import numpy as np

    check_type(name, value, np.ndarray, f"a numpy array, {expected}", error)


def check_callable(name: str, value: object) -> None:
    """Raise DataError for a value that cannot be called."""
    if not callable(value):
        raise DataError(f"{name} must be a function, found {shown(value)}")


def check_number(name: str, value: Any) -> float:
    """Return a real number as float; raise DataError for another type, NaN, or an integer beyond the range of float."""
    try:
        number = float("nan") if isinstance(value, bool | str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if math.isnan(number):
        raise DataError(f"{name} must be a number, found {shown(value)}")
    return number


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raise DataError unless a value is an int from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise DataError(f"{name} must be a whole number from {least} to {most:,}, found {shown(value)}")


def check_switch(name: str, value: object) -> None:
    """Raise DataError unless a value is True, False or None."""
    if value is not None and type(value) is not bool:
        raise DataError(f"{name} must be True, False or None, found {shown(value)}")


def check_grid(name: str, value: Any, least: int = 0, error: type[CloudrtError] = DataError) -> tuple[int, int]:
    """Return height and width; raise DataError, or another `error`, unless they are two whole numbers from `least`."""
    import numpy as np

    if isinstance(value, tuple | list) and len(value) == 2:
        height, width = value
        whole = all(isinstance(side, int | np.integer) and not isinstance(side, bool) for side in value)
        if whole and least <= height < 2**31 and least <= width < 2**31:
            return int(height), int(width)
    raise error(f"{name} must be (height, width), two whole numbers from {least} to 2**31 - 1, found {shown(value)}")
