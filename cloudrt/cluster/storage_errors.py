"""Errors of file systems as one line with a remedy.

pyarrow raises OSError for nearly every error, so the kind of an error is recognised by its message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cloudrt.errors import DataError

_SIGNS = {
    "gone": ("no_such_key", "no_such_bucket", "path does not exist", "not found", "status 404", "http status: 404"),
    "refused": (
        *("access_denied", "access denied", "invalid_access_key", "invalidaccesskey", "invalid_client_token_id"),
        *("signature", "status 403", "http status: 403", "expired_token", "unauthorized", "permission denied"),
    ),
    "silent": (
        *("network_connection", "curlcode", "connect", "timeout", "timed out", "resolve", "unreachable"),
        *("slow_down", "service_unavailable", "status 503"),
    ),
}
"""Parts of the file systems' error messages, in lower case."""


class StorageError(DataError):
    """A store does not answer or denies access; not an error of a single image."""


@contextmanager
def explained(uri: str, what: str) -> Iterator[None]:
    """Turn errors of a file system into one line; `what` is the operation, "read" or "write".

    Raises
    ------
    DataError
        The place does not exist.
    StorageError
        Any other OSError, such as a store that does not answer or denies access.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{uri} is missing: give an existing bucket and prefix, or folder") from error
    except OSError as error:
        raise StorageError(error_sentence(uri, what, error)) from error


def error_kind(error: OSError) -> str:
    """Return "gone", "refused", "silent" or "other"."""
    text = str(error).lower()
    return next((kind for kind, signs in _SIGNS.items() if any(sign in text for sign in signs)), "other")


def error_sentence(uri: str, what: str, error: OSError) -> str:
    """Return the line for the user, with a remedy if one is known; `what` is "read" or "write"."""
    done = "read" if what == "read" else "written"
    in_store = "://" in uri and not uri.startswith("file://")
    reason = {
        "gone": "is missing: give an existing bucket and prefix",
        "refused": f"cannot be {done} with these credentials: set AWS_ACCESS_KEY_ID "
        "and AWS_SECRET_ACCESS_KEY, or the credentials of your store, or give the machine a role with access"
        if in_store
        else f"cannot be {done} by this user: change its permissions, or give another folder",
        "silent": "does not answer: check the network, and --endpoint or AWS_ENDPOINT_URL",
    }.get(error_kind(error), f"cannot be {done}")
    return f"{uri} {reason} ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """Return the beginning of an error message on one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text if len(text) <= 160 else text[:157] + "..."
