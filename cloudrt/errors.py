"""The errors that cloudrt raises on purpose: each is one line that says what was found and what to do.

The command line prints them without a traceback and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class CloudrtError(Exception):
    """Base of every error raised on purpose."""


class RleError(CloudrtError, ValueError):
    """A run-length text that is malformed; names the token and its position."""


class DataError(CloudrtError, ValueError):
    """A table, folder or description of data that does not hold what it should."""


class ImageError(CloudrtError):
    """An image that cannot be decoded faithfully: truncated, corrupt, empty, oversized, or no image."""


class ArtifactError(CloudrtError):
    """A model file that is missing, damaged, or was not written by cloudrt."""


class ProviderError(CloudrtError):
    """An execution provider that was asked for and cannot run here; says what to install."""


class MemoryExhausted(ProviderError):
    """A batch for which the device or the machine has no memory; a smaller one may fit."""


class ParityError(CloudrtError):
    """An exported model that would not give the same submission as the one it came from.

    Parameters
    ----------
    message
        One line.
    verdicts
        Every figure beside what is allowed; see `cloudrt.model.parity.Verdict`.
    """

    def __init__(self, message: str, verdicts: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.verdicts = tuple(verdicts)
