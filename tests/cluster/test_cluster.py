"""`cloudrt-infer --cluster` on a real Ray cluster of two nodes: the bytes of a single machine, also after failures."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.clusters import NODE, WARNINGS_OF_RAY, two_nodes
from support.files import failures
from support.poison import SITE
from support.stores import s3_server, upload
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli.infer import infer
from cloudrt.cluster.nodes import connected

pytest.importorskip("ray")
from ray.cluster_utils import Cluster

pytestmark = WARNINGS_OF_RAY
COUNT = 44


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", (64, 96), SMALL_GRIDS, presence=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        write_jpeg(folder / f"part,{number % 3}" / f"{number:02}.jpg", number)
    (folder / "part,1" / "cut.jpg").write_bytes((folder / "part,0" / "00.jpg").read_bytes()[:-300])
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, of one CPU each."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    with two_nodes(site) as made:
        yield made


def options(model: Path, output: Path, *more: str) -> list[str]:
    common = ["--provider", "cpu", "--batch-size", "4", "--threads", "1"]
    return ["-m", str(model), "-o", str(output), *common, *more]


def single(images: Path | str, model: Path, output: Path, *more: str) -> bytes:
    """Return the bytes of the submission of a single machine."""
    done = CliRunner().invoke(infer, [str(images), *options(model, output, *more)])
    assert done.exit_code in (0, 1), done.output
    return output.read_bytes()


def spread(images: Path | str, model: Path, output: Path, address: str, *more: str) -> Result:
    words = [str(images), *options(model, output, *more), "--cluster", address]
    return CliRunner().invoke(infer, words, catch_exceptions=False)


def parts(output: Path) -> dict[str, int]:
    """Return the files of finished partitions, without checksums, and when they were written, in nanoseconds."""
    folder = output.with_name(f"{output.name}.parts")
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*") if not path.match("*.sums.json")}


def child_of(process: int, name: str) -> int:
    """Return the id of the child process with this name."""
    tasks = Path(f"/proc/{process}/task")
    children = [child for file in tasks.glob("*/children") for child in file.read_text().split()]
    (found,) = [int(child) for child in children if Path(f"/proc/{child}/comm").read_text().strip() == name]
    return found


def last_line(done: Result) -> str:
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return done.output.splitlines()[-1]


@pytest.mark.parametrize("form", [pytest.param("parquet", marks=pytest.mark.slow), "csv"])
def test_the_submission_has_the_bytes_of_a_single_machine(
    cluster: Cluster, images: Path, model: Path, tmp_path: Path, form: str
) -> None:
    whole = single(images, model, tmp_path / "one" / "s.csv")
    output = tmp_path / "many" / "s.csv"
    done = spread(images, model, output, cluster.address, "--partition-size", "8", "--partition-format", form)
    assert done.exit_code == 1, done.output
    assert "2 workers of 1 CPUs each" in done.output
    assert output.read_bytes() == whole
    assert failures(output) == failures(tmp_path / "one" / "s.csv")
    pieces = sorted(path for path in (tmp_path / "many" / "s.csv.parts").glob(f"part-?????.{form}"))
    assert len(pieces) == 6
    if form == "csv":  # pieces of the submission as they are
        header = whole.split(b"\n")[0] + b"\n"
        assert header + b"".join(piece.read_bytes().removeprefix(header) for piece in pieces) == whole
    assert "holds partitions already: --resume" in last_line(spread(images, model, output, cluster.address))
    for more in ([], ["--resume"]):  # that folder holds no run to resume
        again = spread(images, model, output, cluster.address, "--partitions", str(tmp_path / "other"), *more)
        assert "s.csv exists: give another --output, or --overwrite" in last_line(again)
    assert not (tmp_path / "other").exists()
    assert output.read_bytes() == whole


def test_a_killed_worker_loses_nothing_and_images_that_crash_it_fail_alone(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    """One image kills the first worker that decodes it, one every worker, one the ledger, and one raises."""
    folder = tmp_path / "in"
    for number in range(24):
        write_jpeg(folder / f"{number:02}.jpg", number)
    whole = single(folder, model, tmp_path / "one.csv").decode().splitlines()
    for number, ending in ((2, b"DIES"), (9, b"LEDGER"), (13, b"KILL"), (18, b"RAISE")):
        with (folder / f"{number:02}.jpg").open("ab") as file:
            file.write(ending)
    output = tmp_path / "many" / "s.csv"
    done = spread(folder, model, output, cluster.address, "--partition-size", "12")
    assert done.exit_code == 1, done.output
    assert failures(output) == {
        "13.jpg": "crashes the process that decodes or segments it",
        "18.jpg": "cannot be segmented: a fault of the decoder",
    }
    assert (folder / "02.jpg.died").exists()
    expected = [f"{row.split(',')[0]}," if row.startswith(("13.jpg", "18.jpg")) else row for row in whole]
    assert output.read_text().splitlines() == expected


def test_an_interrupted_run_continues_where_it_stopped(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(24):
        write_jpeg(folder / f"{number:02}.jpg", number)
    whole = single(folder, model, tmp_path / "one.csv")
    for number in range(8, 24):
        with (folder / f"{number:02}.jpg").open("ab") as file:
            file.write(b"SLOW")
    output = tmp_path / "many" / "s.csv"
    # A job in the background ignores SIGINT, and so do its children.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from cloudrt.cli import infer; infer()"
    command = [sys.executable, "-c", code, str(folder)]
    command += [*options(model, output, "--partition-size", "4"), "--cluster", cluster.address]
    for sent, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = len(parts(output))
        with subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            while len(parts(output)) == before and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(sent)
            _, said = process.communicate(timeout=60)
        assert process.returncode == status, said
        assert "Traceback" not in said and "***" not in said and "logging.cc" not in said
        assert "--resume continues" in said
        assert not output.exists()
    kept = parts(output)
    assert 2 <= len(kept) < 6
    assert "holds partitions already" in last_line(spread(folder, model, output, cluster.address))
    line = last_line(
        spread(folder, model, output, cluster.address, "--resume", "--partition-size", "8", "--format", "csv")
    )
    assert "partition_size was 4, now 8" in line
    done = spread(folder, model, output, cluster.address, "--resume")
    assert done.exit_code == 0, done.output
    assert output.read_bytes() == whole
    assert {name: parts(output)[name] for name in kept} == kept
    assert f"{4 * len(kept)} images are in finished partitions" in done.output


@pytest.mark.slow
def test_a_cluster_that_is_lost_altogether_gives_a_one_line_error(model: Path, tmp_path: Path) -> None:
    """Ray itself would end such a run with status 1 and without a message."""
    for number in range(24):
        write_jpeg(tmp_path / "in" / f"{number:02}.jpg", number)
    output = tmp_path / "s.csv"
    command = [sys.executable, "-c", "from cloudrt.cli import infer; infer()", str(tmp_path / "in")]
    command += [*options(model, output, "--partition-size", "1"), "--cluster"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not parts(output) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(child_of(process.pid, "raylet"), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert re.search(r"does not answer: start it again, then continue with --resume$", said.splitlines()[-1])
    assert not output.exists()


def test_overwrite_starts_the_partitions_again(cluster: Cluster, images: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.csv"
    small = images / "part,0"
    assert spread(small, model, output, cluster.address, "--partition-size", "4").exit_code == 0
    before = parts(output)
    done = spread(small, model, output, cluster.address, "--overwrite", "--partition-size", "8")
    assert done.exit_code == 0, done.output
    assert len(parts(output)) == -(-len(before) // 2)
    output.unlink()
    damaged = tmp_path / "s.csv.parts" / "part-00000.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    line = last_line(spread(small, model, output, cluster.address, "--resume"))
    assert "part-00000.parquet is damaged, incomplete or of another run: remove it, and run again with --resume" in line


def test_a_bucket_gives_the_bytes_of_a_folder_and_what_vanishes_fails_alone(
    cluster: Cluster, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = single(images, model, tmp_path / "one" / "s.csv").decode().splitlines()

    with s3_server() as (url, client):
        upload(client, images, "pictures", "clouds/")

        @contextmanager
        def lose_one(address: str) -> Iterator[None]:
            client.delete_object(Bucket="pictures", Key="clouds/part,2/05.jpg")
            with connected(address):
                yield

        monkeypatch.setattr("cloudrt.cluster.driver.connected", lose_one)
        output = tmp_path / "many" / "s.csv"
        place = ["--partitions", "s3://pictures/rows", "--partition-size", "16", "--endpoint", url]
        done = spread("s3://pictures/clouds", model, output, cluster.address, *place)
        assert done.exit_code == 1, done.output
        lost = {"part,2/05.jpg": "cannot be read: it was removed after it was listed"}
        assert failures(output) == failures(tmp_path / "one" / "s.csv") | lost
        empty = [row if "part,2/05" not in row else row[: row.rindex(",") + 1] for row in whole]
        assert output.read_text().splitlines() == empty
        found = {one["Key"] for one in client.list_objects_v2(Bucket="pictures", Prefix="rows/")["Contents"]}
        assert found == {
            "rows/run.json",
            *(f"rows/part-0000{number}.{end}" for number in range(3) for end in ("parquet", "sums.json")),
        }


def test_machines_that_are_not_alike_are_refused_by_name(
    cluster: Cluster, images: Path, model: Path, tmp_path: Path
) -> None:
    """A node with another version of a library, and one that cannot keep the artifact."""
    other = tmp_path / "site" / "simplejpeg-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: simplejpeg\nVersion: 0.0.1\n")
    refused = (
        ({"PYTHONPATH": str(tmp_path / "site")}, "simplejpeg is 0.0.1 there and"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "cannot store model.onnx in /dev/null/cloudrt/artifacts"),
    )
    for environment, named in refused:
        node = cluster.add_node(**NODE, env_vars=environment)
        try:
            line = last_line(spread(images, model, tmp_path / "s.csv", cluster.address))
            assert named in line
            assert "machine " in line
        finally:
            cluster.remove_node(node)
        assert not (tmp_path / "s.csv.parts").exists()


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("127.0.0.1:9", "no cluster answers at 127.0.0.1:9"),
        ("ray://127.0.0.1:10001", "expected HOST:PORT"),
        ("in/", "expected HOST:PORT"),
    ],
)
def test_a_cluster_that_is_not_there_gives_a_one_line_error(
    images: Path, model: Path, tmp_path: Path, address: str, named: str
) -> None:
    assert named in last_line(spread(images, model, tmp_path / "s.csv", address))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--cluster", "--report"],
        ["--cluster", "--masks", "m"],
        ["--cluster", "--overlays", "o"],
        ["--cluster", "--stats", "s"],
        ["--cluster", "--save-probabilities", "p"],
        ["--cluster", "--devices", "0"],
        ["--partitions", "p"],
        ["--partition-size", "4"],
        ["--partition-format", "csv"],
        ["--endpoint", "http://x"],
    ],
)
def test_options_that_do_not_apply_are_refused_by_name(images: Path, tmp_path: Path, words: list[str]) -> None:
    done = CliRunner().invoke(infer, [str(images), "-o", str(tmp_path / "s.csv"), *words])
    assert next(word for word in words if word.startswith("--") and word != "--cluster") in last_line(done)
    assert not list(tmp_path.iterdir())


def test_no_images_give_a_one_line_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    line = last_line(spread(tmp_path / "in", model, tmp_path / "s.csv", "local"))
    assert "holds no images" in line
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
