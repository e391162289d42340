"""Partitions of rows: read as they were written; damage, and rows of other runs, are noticed."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.identity import make_identity
from support.stores import s3_server
from support.tiny import SMALL_GRIDS

from cloudrt.cluster.listing import ListedImage, cut, pack, unpack
from cloudrt.cluster.partitions import FORMAT, Partitions
from cloudrt.cluster.storage import open_place
from cloudrt.errors import DataError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import Position
from cloudrt.images.image import ImageFile
from cloudrt.inference.journal_records import Record

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


def test_a_record_of_the_run_that_is_damaged_gives_a_one_line_error(tmp_path: Path) -> None:
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
