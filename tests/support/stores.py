"""An S3 server on loopback, which moto simulates, and a bucket of images in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[tuple[str, Any]]:
    """Run moto's server; yield its URL and a client, with the keys in the environment."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        try:
            yield url, boto3.client("s3", endpoint_url=url)
        finally:
            server.stop()


def upload(client: Any, folder: Path, bucket: str, prefix: str) -> None:
    """Make a bucket with the JPEGs below a folder."""
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*.jpg")):
        client.put_object(Bucket=bucket, Key=f"{prefix}{path.relative_to(folder).as_posix()}", Body=path.read_bytes())


def enforce(url: str, after: float) -> None:
    """Let the server accept `after` more requests with any credentials, and then check them."""
    from urllib.request import Request, urlopen

    plain = {"Content-Type": "text/plain"}  # otherwise, the server would parse the number as form data
    with urlopen(Request(f"{url}/moto-api/reset-auth", str(after).encode(), plain, method="POST")) as answer:
        assert answer.status == 200
