"""Parts of a cluster run, without a cluster: stores, partitions, the ledger, division into workers, isolation."""

from __future__ import annotations

import datetime
import json
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.identity import make_identity
from support.stores import enforce, s3_server, upload
from support.tiny import SMALL_GRIDS, write_jpeg

from cloudrt.cluster import watch
from cloudrt.cluster.isolation import Ledger, PartitionState, segment
from cloudrt.cluster.listing import ListedImage, cut, pack, unpack
from cloudrt.cluster.nodes import ClusterError, Node, Share, _silent_start, connected, share_out, unwrapped
from cloudrt.cluster.partitions import FORMAT, Partitions
from cloudrt.cluster.storage import Place, open_place
from cloudrt.cluster.storage_errors import StorageError
from cloudrt.errors import DataError, ImageError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import Position
from cloudrt.images.image import ImageFile, find_images
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal_records import Record
from cloudrt.inference.results import Result

pytest.importorskip("pyarrow")
LABELS = SMALL_GRIDS
FIRST = make_identity(batch_size=2, partition_size=8, partition_format="csv")
SECOND = make_identity(batch_size=4, partition_size=8, partition_format="csv")
RECORDS = [
    Record("a,b/é_1.jpg", ("1 2 5 1", "", "3 1"), None, 0),
    Record("broken.jpg", ("", "", ""), 'is "empty", or so', 0),
    Record("cr\rlf\nx.jpg", ("", "7 1", ""), "is\rodd", 0),
    Record("NA", ("", "", "1 200000 " * 20000), None, 0),
]


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


def test_a_store_that_cannot_be_used_is_one_line(server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("form", ["parquet", "csv"])
@pytest.mark.parametrize("remote", [False, True])
def test_partitions_are_read_as_they_were_written(
    server: tuple[str, Any], tmp_path: Path, form: str, remote: bool
) -> None:
    url, client = server
    client.create_bucket(Bucket=f"rows-{form}")
    partitions = Partitions(open_place(f"s3://rows-{form}/x" if remote else str(tmp_path / "x"), url), form, LABELS)
    assert partitions.begin(FIRST, resume=True, overwrite=False) == set()
    partitions.write(0, RECORDS[:2])
    partitions.write(1, RECORDS[2:])
    images = [ListedImage(record.key, -1, "", 0) for record in RECORDS]
    assert list(partitions.records(cut(images, 2))()) == RECORDS
    assert partitions.name(1) in partitions.begin(FIRST, resume=True, overwrite=False)
    for resume, named in ((False, "holds partitions already"), (True, "batch_size was 2, now 4")):
        with pytest.raises(DataError, match=named):
            partitions.begin(SECOND, resume=resume, overwrite=False)
    with pytest.raises(DataError, match="holds other images"):
        list(partitions.records(cut(images[::-1], 2))())
    assert partitions.begin(SECOND, resume=False, overwrite=True) == set()
    assert partitions.place.names() == {"run.json"}


def test_images_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(100 * 2**30)
    with pytest.raises(ImageError, match="is oversized: 107,374,182,400 bytes"):
        open_place(str(tmp_path)).read_image(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_places_are_stored_beside_the_rows(tmp_path: Path, form: str) -> None:
    partitions = Partitions(open_place(str(tmp_path)), form, LABELS, placed=True)
    position = Position(-61.1, 24, 0.04, 0.04, date=datetime.date(2007, 12, 27))
    place = MaskGrid((350, 525), position, no_data="1 7", means=((0.1234, 0.5), (), (1.0,)))
    records = [replace(RECORDS[0], place=place), RECORDS[1], replace(RECORDS[3], place=MaskGrid((2, 3), wraps=True))]
    partitions.write(0, records)
    assert partitions.read(0) == records
    partitions.begin(FIRST, resume=False, overwrite=True)
    assert partitions.place.names() == {"run.json"}
    for text in ("", "[]", "[null, null, {}]", "7"):
        partitions.write(0, records)
        (tmp_path / "part-00000.places.json").write_text(text)
        with pytest.raises(DataError, match=rf"part-00000\.{form} is damaged"):
            partitions.read(0)


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_every_changed_byte_of_a_partition_is_noticed(tmp_path: Path, form: str) -> None:
    partitions = Partitions(open_place(str(tmp_path)), form, LABELS)
    partitions.write(0, RECORDS)
    files = sorted(tmp_path.iterdir())
    assert len(files) == {"parquet": 2, "csv": 3}[form]
    for file in files:
        data = file.read_bytes()
        for place in range(0, len(data), 7):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(DataError, match=rf"part-00000\.{form} is damaged, incomplete or of another run"):
                partitions.read(0)
        file.unlink()
        with pytest.raises(DataError, match=rf"part-00000\.{form} is damaged, incomplete or of another run"):
            partitions.read(0)
        file.write_bytes(data)
    assert partitions.read(0) == RECORDS


def test_another_run_in_the_same_place_is_noticed_before_the_output(tmp_path: Path) -> None:
    partitions = Partitions(open_place(str(tmp_path)), "csv", LABELS)
    images = [ListedImage(record.key, -1, "", 0) for record in RECORDS]
    partitions.begin(FIRST, resume=False, overwrite=False)
    partitions.write(0, RECORDS)
    records = partitions.records([images], FIRST)
    assert list(records()) == RECORDS
    (tmp_path / "run.json").write_text(json.dumps({"format": FORMAT, "identity": SECOND.to_dict()}))
    with pytest.raises(DataError, match="another run has begun"):
        list(records())


def test_rows_that_another_run_wrote_late_are_noticed(tmp_path: Path) -> None:
    """A bucket cannot be locked: a run that was overtaken may still write its rows for the same images."""
    place, images = open_place(str(tmp_path)), [ListedImage(record.key, -1, "", 0) for record in RECORDS]
    slow, fast = Partitions(place, "csv", LABELS), Partitions(place, "csv", LABELS)
    slow.begin(FIRST, resume=False, overwrite=False)
    fast.begin(SECOND, resume=False, overwrite=True)
    fast.write(0, RECORDS)
    slow.write(0, RECORDS)
    for resumed in (fast, Partitions(place, "csv", LABELS)):
        resumed.begin(SECOND, resume=True, overwrite=False)
        with pytest.raises(DataError, match=r"part-00000\.csv is damaged, incomplete or of another run"):
            list(resumed.records([images], SECOND)())
    fast.write(0, RECORDS)
    assert list(resumed.records([images], SECOND)()) == RECORDS


def test_a_record_of_the_run_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    partitions = Partitions(open_place(str(tmp_path)), "csv", LABELS)
    sound = FIRST.to_dict()
    damaged: list[Any] = [sound | {"partition_size": 0}, sound | {"partition_size": "8"}, {}, [], None]
    for identity in damaged:
        (tmp_path / "run.json").write_text(json.dumps({"format": FORMAT, "identity": identity}))
        with pytest.raises(DataError, match=r"run\.json is damaged \(.*--overwrite"):
            partitions.recorded()
    for text in ("", "[]", "{}"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(DataError, match=r"run\.json is damaged: use --overwrite"):
            partitions.recorded()
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "identity": {}}))
    with pytest.raises(DataError, match=r"run\.json has format 1, written by another version"):
        partitions.recorded()


def test_images_travel_as_bytes() -> None:
    images = [ListedImage("a/é.jpg", 0, "bucket/a/é.jpg", 5), ListedImage('"', -1, "/x/y", -1)]
    assert unpack(pack(images)) == images
    assert images[1].source([]) == ImageFile('"', Path("/x/y"))


def test_sharing_out() -> None:
    small, large, gpu, head = Node("a", "a", 4, 0), Node("b", "b", 16, 0), Node("c", "c", 32, 4), Node("d", "d", 0, 0)
    assert share_out([small, large, head], "auto", 0) == Share(5, 4, 0)
    assert share_out([small, large], "cpu", 8) == Share(2, 8, 0)
    assert share_out([small, gpu], "auto", 0) == Share(4, 8, 1)
    assert share_out([small, gpu], "openvino", 0) == Share(9, 4, 0)
    for nodes, provider, threads, named in (
        ([small], "cuda", 0, "no machine of the cluster has a GPU"),
        ([small], "cpu", 5, "has 5 CPUs, the largest has 4"),
        ([gpu], "auto", 64, "no machine with a GPU has 64 CPUs"),
        ([Node("e", "e", 0, 1), small], "auto", 0, "no machine with a GPU offers CPUs: start Ray there"),
        ([head], "auto", 0, "offers CPUs"),
    ):
        with pytest.raises(ClusterError, match=named):
            share_out(nodes, provider, threads)


def test_errors_are_one_line() -> None:
    outer = RuntimeError("ray::Worker() (pid=1)\n  File x\ncloudrt.errors.DataError: what is wrong")
    assert str(unwrapped(outer)) == "what is wrong"
    advised = RuntimeError(f"{outer}\n\nTo change retry attempts, configure `ray.data.DataContext.get_current()`.")
    assert str(unwrapped(advised)) == "what is wrong"
    lines = "ray.exceptions.ActorDiedError: It died.\n\tpid: 1\nThe actor is dead: memory\n"
    lines += "\nray.UserCodeException: UDF failed.\nTo change retry attempts, configure it."
    assert str(unwrapped(RuntimeError(lines))) == "It died."
    outer.__cause__ = DataError("what is wrong inside")
    assert str(unwrapped(outer, "machine a: ")) == "machine a: what is wrong inside"


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an overloaded machine, Ray raises a plain Exception."""
    ray = pytest.importorskip("ray")

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen")

    monkeypatch.setattr(ray, "init", init)
    said = r"^Ray does not start on this machine: The current node .* This could"
    with pytest.raises(ClusterError, match=said), connected("local"):
        pass


def test_only_a_long_silence_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local server that stops for less, then for more, than the time limit."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "GRACE", {"the head": 1.0})
    said: queue.Queue[str] = queue.Queue()
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    looking = threading.Thread(target=watch.look, args=({"the head": address}, said.put, threading.Event()))
    looking.start()
    server.close()
    time.sleep(0.4)
    server = socket.create_server(address)
    time.sleep(0.8)
    assert said.empty()
    server.close()
    assert (
        said.get(timeout=5)
        == f"the head, 127.0.0.1:{address[1]}, does not answer: start it again, then continue with --resume"
    )
    looking.join(5)
    assert not looking.is_alive()


class Fragile:
    """A predictor of batches of 4 that raises, exits or continues, depending on the keys of the images."""

    batch_size, labels = 4, LABELS

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def predict(self, inputs: Iterable[Any]) -> Iterator[Result]:
        for one in inputs:
            if self.broken:
                raise RuntimeError("no engine")
            if isinstance(one, np.ndarray):
                yield Result("black", dict.fromkeys(LABELS.classes, ""), None, LABELS)
                continue
            if one.key.startswith("raise"):
                raise ValueError(f"{one.key} is odd")
            if one.key.startswith("kill"):
                raise KeyboardInterrupt  # not caught: it ends the worker
            yield Result(one.key, dict.fromkeys(LABELS.classes, f"1 {len(one.key)}"), None, LABELS)

    def identity(self) -> Identity:
        return make_identity()


def run(keys: list[str]) -> tuple[list[Record], int]:
    """Run a partition again until no worker exits."""
    images = [ListedImage(key, -1, key, 0) for key in keys]
    ledger, deaths = Ledger(), 0
    while True:
        care = ledger.begin(7)
        try:
            found = segment(
                Fragile(), images, [image.source([]) for image in images], care, lambda at: ledger.note(7, at)
            )
        except KeyboardInterrupt:
            deaths += 1
            assert deaths < 20
            continue
        ledger.finish(7, {"images": len(found)})
        assert ledger.begin(7).done == {"images": len(found)}
        return found, deaths


@pytest.mark.parametrize(
    ("bad", "deaths"),
    [([], 0), (["raise"], 0), (["kill"], 3), (["raise", "raise2", "kill"], 1), (["kill", "kill2"], 5)],
)
def test_images_that_raise_or_kill_fail_alone(bad: list[str], deaths: int) -> None:
    keys = [f"{i:02}" for i in range(10)]
    for place, key in zip((5, 2, 6), bad, strict=False):
        keys[place] = key
    found, died = run(keys)
    assert [record.key for record in found] == keys
    assert died == deaths
    for record in found:
        if record.key in bad:
            assert record.texts == ("",) * 3
            reason = (
                "crashes the process" if record.key.startswith("kill") else f"cannot be segmented: {record.key} is odd"
            )
            assert reason in str(record.error)
        else:
            assert record == Record(record.key, (f"1 {len(record.key)}",) * 3, None, 0)


def test_a_broken_engine_is_not_a_failure_of_images() -> None:
    images = [ListedImage("a", -1, "a", 0)]
    with pytest.raises(RuntimeError, match="no engine"):
        segment(Fragile(broken=True), images, [ImageFile("a", Path("a"))], PartitionState(), lambda _: None)


@pytest.mark.parametrize("verbose", [False, True])
def test_what_ray_prints_while_it_starts_is_shown_with_v_only(
    verbose: bool, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG if verbose else logging.INFO, "cloudrt")
    with _silent_start():
        os.write(2, b"Set ray log level\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err.splitlines() == ["Set ray log level", "after"][0 if verbose else 1 :]
