"""Errors for mistyped names, with suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cloudrt.errors import DataError


def check_name(what: str, name: str, known: Sequence[str]) -> None:
    """Check that a name is one of `known`.

    Parameters
    ----------
    what
        Kind of the name, for the message, such as "encoder".
    name
        The name to check.
    known
        The valid names.

    Raises
    ------
    DataError
        `name` is not valid; the message suggests similar names, or lists all names if none is similar.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5 if len(name) > 3 else 0.7)  # "gpu" is not "cpu"
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(sorted(known))}"
        raise DataError(f"no {what} named {name!r}{hint}")
