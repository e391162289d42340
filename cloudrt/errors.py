"""Exceptions that cloudrt raises for its users: each message states what was found, what was expected and what to do.

Messages name parameters of the Python interface in backquotes, such as `overwrite=True`. The command line prints them
as one line, without a traceback and with `--overwrite` for that parameter, and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class CloudrtError(Exception):
    """Base class of cloudrt's exceptions."""


class RleError(CloudrtError, ValueError):
    """Malformed run-length text (the message names the token and its position), or an invalid mask or shape."""


class DataError(CloudrtError, ValueError):
    """A table, a folder or an argument with unexpected content."""


class ImageError(CloudrtError):
    """An input that cannot be read or decoded completely: truncated, corrupt, empty, oversized, or not an image."""


class ArtifactError(CloudrtError):
    """A model file that is missing, damaged, or was not written by cloudrt."""


class ProviderError(CloudrtError):
    """An execution provider that cannot run on this machine; the message says what to install or do."""


class MemoryExhausted(ProviderError):
    """A batch that does not fit into the memory of the device; a smaller batch may fit."""


class ParityError(CloudrtError):
    """An exported model whose submission would differ from the checkpoint's.

    Parameters
    ----------
    message
        Summary in one line.
    verdicts
        Each figure with its limit; see `cloudrt.model.parity.Verdict`.
    title
        What was compared.
    """

    def __init__(self, message: str, verdicts: Sequence[Any] = (), title: str = "") -> None:
        super().__init__(message)
        self.verdicts = tuple(verdicts)
        self.title = title
