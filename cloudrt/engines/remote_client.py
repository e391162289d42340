"""What clients of the Open Inference Protocol share: errors, limits, and checks of what a server returns.

Servers are not trusted: `cloudrt.engines.remote_http` and `remote_grpc` limit each response in bytes and in total time,
and check names, types, shapes and sizes of its tensors here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

TRANSIENT = (
    *("408", "429", "500", "502", "503", "504", "StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"),
    *("StatusCode.RESOURCE_EXHAUSTED", "StatusCode.ABORTED", "StatusCode.CANCELLED", "StatusCode.INTERNAL"),
)
"""HTTP and gRPC statuses after which the batch is sent again."""
MARGIN_BYTES = 1 << 20
"""Largest response without tensors, and the margin beyond the size of the tensors."""

Shapes = Mapping[str, tuple[int, ...]]
"""Name of an output -> its shape, batch included; all outputs are uint8."""


class ServerError(Exception):
    """A request that failed.

    Parameters
    ----------
    message
        What is wrong, in one line.
    again
        Whether the same request may succeed later: no connection, a timeout, or a status of `TRANSIENT`.
    status
        HTTP or gRPC status with which the server refused the request; "" if there was no valid response.
    """

    def __init__(self, message: str, *, again: bool = False, status: str = "") -> None:
        super().__init__(" ".join(message.split())[:300])
        self.again, self.status = again, status


class RemoteClient(Protocol):
    """A connection to a server, for one thread; all methods raise ServerError."""

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the metadata of a model."""

    def config(self, name: str) -> dict[str, Any]:
        """Return the configuration of a model."""

    def infer(self, name: str, batch: NDArray[np.uint8], shapes: Shapes) -> dict[str, NDArray[np.uint8]]:
        """Return the outputs of a model for a batch, which have the names and shapes of `shapes`."""

    def close(self) -> None:
        """Close the connection."""


def check_type(name: str, datatype: Any, shape: Any, expected: tuple[int, ...]) -> None:
    """Raise ServerError if an output does not state the expected type and shape."""
    if datatype != "UINT8" or shape != list(expected):
        raise ServerError(
            f"output {name} is {ascii(datatype)[:20]} {ascii(shape)[:80]}, expected UINT8 {list(expected)}"
        )


def to_tensor(name: str, data: Any, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the data of an output, an array or lists of numbers, as uint8 of `shape`; ServerError if it is not."""
    count = math.prod(shape)
    try:
        values = data if isinstance(data, np.ndarray) else read_numbers(data, count)
    except ValueError as error:
        raise ServerError(f"output {name} is malformed: {error}") from error
    if values.size != count or values.dtype != np.uint8:
        raise ServerError(f"output {name} has {values.size} values of {values.dtype}, expected {count} of uint8")
    return values.reshape(shape)


def read_numbers(data: Any, count: int) -> NDArray[np.uint8]:
    """Return `count` integers, in flat or nested lists from JSON, as a flat array.

    Raises
    ------
    ValueError
        Another number of values, or a value that is not an integer from 0 to 255.
    """
    values = np.array(data, object).ravel().tolist()  # object: numpy would pad strings to the length of the longest
    kinds = set(map(type, values))
    if len(values) != count or kinds - {int}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise ValueError(f"expected {count} integers, found {len(values)} values of type {names}")
    if values and not 0 <= min(values) <= max(values) <= 255:
        raise ValueError("the integers must be from 0 to 255")
    return np.frombuffer(bytes(values), np.uint8)


def require_all(found: dict[str, NDArray[np.uint8]], shapes: Iterable[str]) -> dict[str, NDArray[np.uint8]]:
    """Return the outputs; ServerError if one of `shapes` is missing."""
    missing = [name for name in shapes if name not in found]
    if missing:
        raise ServerError(f"the response has no output {', '.join(missing)}")
    return found
