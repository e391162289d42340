"""Suggestions for mistyped names and missing files."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from cloudrt.arguments import shown
from cloudrt.errors import DataError

CHECKPOINTS = (".pth", ".pt", ".ckpt")
"""Suffixes of PyTorch's checkpoints."""


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
    if not isinstance(name, str) or name not in known:
        text = shown(name) if not isinstance(name, str) else name  # JSON may hold another type
        cutoff = 0.5 if len(text) > 3 else 0.7  # do not suggest "cpu" for "gpu"
        near = difflib.get_close_matches(text, known, n=3, cutoff=cutoff)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(sorted(known))}"
        raise DataError(f"no {what} named {shown(name)}{hint}")


def nearest_checkpoint(path: str | Path) -> Path | None:
    """Return the checkpoint that a missing `path` may mean: of the same stem, else best.pth in the same folder."""
    path = Path(path)
    beside = [*map(path.with_suffix, CHECKPOINTS), path.with_name("best.pth")]
    return next((one for one in beside if one.is_file()), None)
