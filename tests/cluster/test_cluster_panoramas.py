"""Panoramas on a Ray cluster: the bytes of a single machine in every format; failures affect no other image."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.clusters import WARNINGS_OF_RAY, two_nodes
from support.files import contents, failures
from support.stores import s3_server, upload
from support.tiled import tiled_model, write_picture
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.cli.infer import infer
from cloudrt.data.scenes import draw_scene

pytest.importorskip("ray")

pytestmark = WARNINGS_OF_RAY
REASONS = {
    "cut20200102_0-4_0-3.jpg": "is a damaged JPEG",
    "day20200101_0-4_0-3.jpg": "taken by a20200101_0-4_0-3.jpg",
    "grid20200109_0-5_0-3.jpg": "another grid than the first image",
    "world20200108.jpg": "another grid than the first image",
}
"""Images that fail in a store of days; in other formats, only the first fails."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiled_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def panoramas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    names = [f"{'abcdef'[day - 1]}2020010{day}_0-4_0-3.jpg" for day in range(1, 7)]
    for seed, name in enumerate([*names, *REASONS]):
        size = (300, 500) if name.startswith("grid") else (300, 400)
        write_picture(folder / name, draw_scene(seed, size).image)
    cut = folder / "cut20200102_0-4_0-3.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    (folder / "world20200108.jgw").write_text("0.01 0 0 -0.01 20.005 9.995")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as made:
        yield made


def run(inputs: Path | str, model: Path, output: Path, *more: str) -> Result:
    common = ["--provider", "cpu", "--batch-size", "4", "--threads", "1"]
    words = [str(inputs), "-m", str(model), "-o", str(output), *common, *more]
    return CliRunner().invoke(infer, words, catch_exceptions=False)


@pytest.mark.parametrize(
    ("name", "partitions"),
    [
        ("s.geojson", "parquet"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("s.csv", "csv"), ("s.geoparquet", "csv"), ("s.zarr", "parquet"))
        ),
    ],
)
def test_the_output_has_the_bytes_of_a_single_machine(
    cluster: Any, panoramas: Path, model: Path, tmp_path: Path, name: str, partitions: str
) -> None:
    one, many = tmp_path / "one" / name, tmp_path / "many" / name
    words = ["--tile", "--overlap", "0.3"]
    alone = run(panoramas, model, one, *words)
    assert alone.exit_code == 1
    cluster_words = ["--cluster", cluster.address, "--partition-size", "3", "--partition-format", partitions]
    done = run(panoramas, model, many, *words, *cluster_words)
    assert done.exit_code == 1, done.output
    for output in (alone.output, done.output):
        assert "a20200101_0-4_0-3.jpg: position from its file name: 0 to 4, 0 to 3 (EPSG:4326)" in output
        assert "world20200108.jpg: position from its world file" in output or name == "s.zarr"  # which refuses it
    assert contents(many) == contents(one) and sum(map(len, contents(many).values())) > 2000
    assert failures(many) == failures(one)
    expected = REASONS if name == "s.zarr" else dict(list(REASONS.items())[:1])
    assert failures(many).keys() == expected.keys()
    assert all(reason in failures(many)[key] for key, reason in expected.items())
    line = run(panoramas, model, many, "--tile", *cluster_words, "--resume").output.splitlines()[-1]
    assert "tiling was Tiling(overlap=0.3" in line
    if name == "s.geojson":
        line = run(panoramas, model, many, *words, "--simplify", "0", *cluster_words, "--resume").output
        assert "simplify was 0.5, now 0.0" in line
    assert "already finished" in run(panoramas, model, many, *words, *cluster_words, "--resume").output


@pytest.mark.slow
def test_a_bucket_has_world_files_too(cluster: Any, panoramas: Path, model: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one" / "s.geojson", tmp_path / "many" / "s.geojson"
    assert run(panoramas, model, one).exit_code == 1
    with s3_server() as (url, client):
        upload(client, panoramas, "pictures", "days/")
        world = (panoramas / "world20200108.jgw").read_bytes()
        client.put_object(Bucket="pictures", Key="days/world20200108.jgw", Body=world)
        words = ["--partitions", "s3://pictures/rows", "--partition-size", "4", "--endpoint", url]
        done = run("s3://pictures/days", model, many, "--cluster", cluster.address, *words)
        found = {item["Key"] for item in client.list_objects_v2(Bucket="pictures", Prefix="rows/")["Contents"]}
    assert done.exit_code == 1, done.output
    assert contents(many) == contents(one) and b"20.0" in many.read_bytes()
    assert {f"rows/part-0000{number}.places.json" for number in range(3)} < found


@pytest.mark.slow
def test_days_are_appended_and_an_interrupted_merge_is_done_again(
    cluster: Any, panoramas: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, days in ((first, "ab"), (second, "cd")):
        folder.mkdir()
        for day in days:
            (file,) = panoramas.glob(f"{day}2020*.jpg")
            shutil.copy(file, folder)
    one, many = tmp_path / "one.zarr", tmp_path / "many.zarr"
    for folder in (first, second):
        assert run(folder, model, one).exit_code == 0
    words = ["--cluster", cluster.address]
    assert run(first, model, many, *words).exit_code == 0
    alone = contents(many)

    def die(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cloudrt.geo.store._consolidate", die)
        stopped = run(second, model, many, *words)  # the partitions of the first run are not needed again
        assert stopped.exit_code == 2 and "No space left" in stopped.output.splitlines()[-1]
    assert contents(many)[".zmetadata"] == alone[".zmetadata"]
    refused = run(second, model, many, *words)
    assert refused.exit_code == 2 and "holds partitions already: --resume" in refused.output
    done = run(second, model, many, *words, "--resume")
    assert done.exit_code == 0 and "2 images are in finished partitions" in done.output
    assert contents(many) == contents(one)


def test_what_cannot_start_is_one_line_before_any_work(panoramas: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "notes.txt").write_text("mine")
    odd = tiny_artifact(tmp_path / "odd.onnx", (64, 96), SMALL_GRIDS, field_of_view=(130, 180))
    for artifact, name, more, reason in (
        (model, "mine.zarr", [], "is not a store"),
        (odd, "a.csv", ["--tile"], "not a multiple of its submission grid"),
        (model, "a.csv", ["--bounds", "0,0,4,3"], "--bounds places panoramas"),
    ):
        done = run(panoramas, artifact, tmp_path / name, *more, "--cluster", "127.0.0.1:9")
        assert done.exit_code == 2 and reason in done.output.splitlines()[-1], done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.zarr", "odd.onnx"]
