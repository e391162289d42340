"""Names that users mistype: the error suggests what they may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cloudrt.errors import DataError


def check_name(what: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Raises
    ------
    DataError
        Suggests the nearest names, or lists all where none is near.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(sorted(known))}"
        raise DataError(f"no {what} named {name!r}{hint}")
