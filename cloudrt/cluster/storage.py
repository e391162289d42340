"""Places that hold images and rows: local folders, S3-compatible stores, and other file systems of pyarrow.

    s3://bucket/prefix   endpoint from --endpoint or AWS_ENDPOINT_URL; keys from AWS_*, else the role of the machine
    gs://bucket/prefix   and hdfs://, abfs://, file://: see pyarrow's FileSystem.from_uri
    folder               a local path

A `Place` is sent to the workers together with the credentials in the driver's environment. Writes are atomic: an object
appears in a store only when its upload is complete.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from cloudrt.cluster.storage_errors import StorageError, error_kind, error_sentence, explained, first_line
from cloudrt.errors import DataError, ImageError
from cloudrt.images.image import SUFFIXES, refuse_large
from cloudrt.system.files import replacing

CONNECT_SECONDS = 5
ATTEMPTS = 3


@dataclass(frozen=True)
class Stored:
    """A listed object: its path relative to the place, its path in the file system, its size in bytes."""

    key: str
    path: str
    size: int


@dataclass(frozen=True)
class Place:
    """A folder of a file system.

    Parameters
    ----------
    uri
        As given by the user, without credentials; used in errors.
    path
        Path of the folder in the file system.
    files
        pyarrow's file system.
    local
        Whether it is a local folder.
    """

    uri: str
    path: str
    files: Any = field(repr=False)
    local: bool

    def images(self) -> list[Stored]:
        """List the images below, subfolders included, in the order of their keys; hidden files are skipped.

        If the place is a file, not a folder, only this file is listed.

        Raises
        ------
        DataError
            The place does not exist or holds no image.
        StorageError
            The store does not answer or denies access.
        """
        from pyarrow.fs import FileSelector, FileType

        with explained(self.uri, "read"):
            itself = self.files.get_file_info(self.path)
            if itself.type == FileType.File:
                return [Stored(PurePosixPath(self.path).name, self.path, itself.size)]
            # A prefix of a bucket has no entry: only listing it shows whether it exists.
            found = self.files.get_file_info(FileSelector(self.path, recursive=True))
        images = []
        for info in found:
            key = info.path[len(self.path) :].strip("/")
            parts = PurePosixPath(key)
            if (
                info.type == FileType.File
                and parts.suffix.lower() in SUFFIXES
                and not any(part.startswith(".") for part in parts.parts)
            ):
                images.append(Stored(key, info.path, info.size))
        if not images:
            raise DataError(f"{self.uri} holds no images ({', '.join(sorted(SUFFIXES))})")
        return sorted(images, key=lambda one: one.key)

    def read_image(self, path: str) -> bytes:
        """Return the bytes of an image.

        Raises
        ------
        ImageError
            The image is missing, too large or cannot be read; other images may be readable.
        StorageError
            The store does not answer, or reading fails for another reason.
        """
        try:
            with self.files.open_input_file(path) as file:
                refuse_large(file.size())
                data: bytes = file.read()
        except FileNotFoundError:
            raise ImageError("cannot be read: it was removed after it was listed") from None
        except OSError as error:
            kind = error_kind(error)
            if kind == "gone":
                raise ImageError("cannot be read: it was removed after it was listed") from error
            if kind == "refused":
                raise ImageError("cannot be read: the store denies access") from error
            raise StorageError(error_sentence(self.uri, "read", error)) from error
        return data

    def read_beside(self, path: str, suffix: str) -> bytes | None:
        """Return the bytes of the file with the name of an image and another suffix; None if it cannot be read.

        Raises
        ------
        StorageError
            The store does not answer.
        """
        try:
            return self.read_image(str(PurePosixPath(path).with_suffix(suffix)))
        except ImageError:  # a store without the right to list denies access to a missing object
            return None

    def try_one(self, path: str) -> None:
        """Check that an image can be read; a missing one is ignored.

        Raises
        ------
        StorageError
            The store denies access or does not answer.
        """
        try:
            self.read_image(path)
        except ImageError as error:
            if "denies" in str(error):
                raise StorageError(error_sentence(self.uri, "read", PermissionError("access denied"))) from error

    def names(self) -> set[str]:
        """Return the names of the files in the folder, without subfolders; empty if there is no folder."""
        from pyarrow.fs import FileSelector, FileType

        with explained(self.uri, "read"):
            found = self.files.get_file_info(FileSelector(self.path, allow_not_found=True))
        return {info.base_name for info in found if info.type == FileType.File}

    def read(self, name: str) -> bytes:
        """Return the content of a file in the folder; see `explained` for the errors."""
        with explained(self.uri, "read"), self.files.open_input_file(f"{self.path}/{name}") as file:
            data: bytes = file.read()
            return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file in the folder atomically; see `explained` for the errors."""
        if self.local:
            with explained(self.uri, "write"), replacing(Path(self.path, name)) as partial:
                partial.write_bytes(data)
            return
        with explained(self.uri, "write"), self.files.open_output_stream(f"{self.path}/{name}") as file:
            file.write(data)

    def remove(self, name: str) -> None:
        """Remove a file in the folder."""
        with explained(self.uri, "write"):
            self.files.delete_file(f"{self.path}/{name}")


def is_uri(text: str) -> bool:
    """Return whether a text is a URI and not a local path."""
    return "://" in text


def open_place(uri: str, endpoint: str | None = None, environment: Mapping[str, str] = os.environ) -> Place:
    """Return the place of a URI or a local path, without connecting to it.

    Parameters
    ----------
    uri
        See the module.
    endpoint
        URL of an S3-compatible store; AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL otherwise.
    environment
        Environment of the driver: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, if set, are sent to the workers.

    Raises
    ------
    DataError
        pyarrow has no file system for the scheme, an S3 URI has no bucket or contains keys or a query, or the endpoint
        is not a URL.
    """
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not is_uri(uri):
        return Place(uri, str(Path(uri).absolute()), LocalFileSystem(), True)
    parts = urlsplit(uri)
    if parts.scheme == "s3":
        if not parts.netloc or "@" in parts.netloc or parts.query:
            raise DataError(f"{_public(uri)} is not s3://BUCKET/PREFIX: give endpoint and keys separately")
        key = f"{parts.path}#{parts.fragment}" if "#" in uri else parts.path
        return Place(uri, f"{parts.netloc}{key}".rstrip("/"), _s3(uri, endpoint, environment), False)
    limited = f"{uri}{'&' if parts.query else '?'}retry_limit_seconds=60" if parts.scheme in ("gs", "gcs") else uri
    try:
        files, path = FileSystem.from_uri(limited)
    except (ValueError, TypeError, OSError, ArrowException) as error:
        raise DataError(f"{_public(uri)} cannot be opened: {first_line(error)}") from error
    return Place(_public(uri), path.rstrip("/") or "/", files, isinstance(files, LocalFileSystem))


def _s3(uri: str, endpoint: str | None, environment: Mapping[str, str]) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    url = endpoint or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "request_timeout": 60,
        "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    }
    if url:
        there = urlsplit(url)
        if there.scheme not in ("http", "https") or not there.netloc:
            raise DataError(
                f"the endpoint of {uri} must be a URL such as https://store.example.org:9000, found {url!r}"
            )
        options |= {"endpoint_override": there.netloc, "scheme": there.scheme}
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if region or url:
        options["region"] = region or "us-east-1"
    if environment.get("AWS_ACCESS_KEY_ID") and environment.get("AWS_SECRET_ACCESS_KEY"):
        options |= {
            "access_key": environment["AWS_ACCESS_KEY_ID"],
            "secret_key": environment["AWS_SECRET_ACCESS_KEY"],
            "session_token": environment.get("AWS_SESSION_TOKEN"),
        }
    return S3FileSystem(**options)


def _public(uri: str) -> str:
    """Return a URI without credentials."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
