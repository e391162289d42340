"""Places that hold images: listed, read and written alike in a folder and a bucket, with errors of one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.stores import enforce, s3_server, upload
from support.tiny import write_jpeg

from cloudrt.cluster.storage import Place, open_place
from cloudrt.cluster.storage_errors import StorageError, error_sentence
from cloudrt.errors import DataError, ImageError
from cloudrt.images.image import find_images

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Any]]:
    with s3_server() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("in")
    for name in ("b.jpg", "a/c d.jpg", "a/é.jpg", ".hidden/x.jpg", "a/.y.jpg"):
        write_jpeg(found / name, 1)
    (found / "a" / "notes.txt").write_text("no image")
    return found


def test_a_bucket_lists_what_a_folder_does(server: tuple[str, Any], folder: Path) -> None:
    url, client = server
    upload(client, folder, "pictures", "deep/er/")
    client.put_object(Bucket="pictures", Key="deep/er/a/notes.txt", Body=b"")
    client.put_object(Bucket="pictures", Key="deep/erratic/z.jpg", Body=b"")
    place = open_place("s3://pictures/deep/er", url)
    listed = place.images()
    files = find_images(folder)
    assert [one.key for one in listed] == [file.key for file in files]
    assert [one.size for one in listed] == [file.path.stat().st_size for file in files]
    assert [place.read_image(one.path) for one in listed] == [file.path.read_bytes() for file in files]
    client.put_object(Bucket="pictures", Key="deep/er#1/x.jpg", Body=b"")
    assert [one.path for one in open_place("s3://pictures/deep/er#1/", url).images()] == ["pictures/deep/er#1/x.jpg"]
    alone = open_place("s3://pictures/deep/er/b.jpg", url).images()
    assert [one.key for one in alone] == ["b.jpg"]
    by_uri = open_place(folder.as_uri()).images()
    assert [one.key for one in by_uri] == [file.key for file in files]
    client.delete_object(Bucket="pictures", Key="deep/er/b.jpg")
    with pytest.raises(ImageError, match="removed after it was listed"):
        place.read_image("pictures/deep/er/b.jpg")


def test_a_store_that_cannot_be_used_gives_a_one_line_error(
    server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, client = server
    client.create_bucket(Bucket="closed")
    with pytest.raises(DataError, match="s3://nowhere is missing: give an existing bucket"):
        open_place("s3://nowhere", url).images()
    with pytest.raises(DataError, match="s3://closed/empty"):
        open_place("s3://closed/empty", url).images()
    with pytest.raises(StorageError, match="does not answer: check the network, and --endpoint"):
        open_place("s3://closed", "http://127.0.0.1:9").images()
    for uri, endpoint, named in (
        ("s3://", url, "is not s3://BUCKET/PREFIX"),
        ("s3://key:secret@bucket/x", url, "s3://bucket/x is not s3://BUCKET/PREFIX"),
        ("s3://closed", "localhost:9000", "must be a URL such as"),
        ("ftp://host/x", None, "ftp://host/x cannot be opened"),
    ):
        with pytest.raises(DataError, match=named):
            open_place(uri, endpoint)
    enforce(url, 0)
    try:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for use in (Place.images, Place.names, lambda place: place.write("x", b"1")):
            with pytest.raises(StorageError, match="with these credentials: set AWS_ACCESS_KEY_ID"):
                use(open_place("s3://closed", url))
    finally:
        enforce(url, float("inf"))


def test_a_folder_is_not_given_the_advice_of_a_bucket() -> None:
    denied, full = PermissionError(13, "Permission denied"), OSError(28, "No space left on device")
    for uri in ("/data/rows", "file:///data/rows"):
        text = error_sentence(uri, "write", denied)
        assert text.startswith(f"{uri} cannot be written by this user: ")
        assert "AWS" not in text
        assert error_sentence(uri, "write", full) == f"{uri} cannot be written (No space left on device)"
    assert "set AWS_ACCESS_KEY_ID" in error_sentence("s3://bucket/rows", "write", denied)


def test_images_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(100 * 2**30)
    with pytest.raises(ImageError, match="is oversized: 107,374,182,400 bytes"):
        open_place(str(tmp_path)).read_image(str(tmp_path / "a.jpg"))
