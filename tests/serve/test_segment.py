"""The interface /v1: its answers are those of cloudrt-infer on the same images, byte for byte."""

from __future__ import annotations

import csv
import io
import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from support.commands import invoke
from support.server import WAIT_S, Server, serving
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli import main
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.rule import Rule
from cloudrt.serve import answers, geojson, inference_protocol
from cloudrt.serve.batcher import Batcher
from cloudrt.serve.settings import ServeSettings

MEGAPIXELS = 0.1
LIMIT = 200_000
RULES = (Rule(110, 40), Rule(120, 9, gate_threshold=150, gate_pixels=30), Rule(127, 0, presence=120))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images of every kind, and the output of cloudrt-infer for them."""
    folder = tmp_path_factory.mktemp("served")
    model = tiny_artifact(folder / "clouds.onnx", (64, 96), SMALL_GRIDS, presence=True, rules=RULES)
    for seed in range(6):
        write_jpeg(folder / "images" / f"{seed}.jpg", seed)
    sound = (folder / "images" / "0.jpg").read_bytes()
    pixels = cv2.imread(str(folder / "images" / "1.jpg"))
    assert pixels is not None
    cv2.imwrite(str(folder / "images" / "lossless.png"), pixels)
    cv2.imwrite(str(folder / "images" / "large.png"), np.zeros((400, 400, 3), np.uint8))
    (folder / "images" / "cut.jpg").write_bytes(sound[: len(sound) // 2])
    (folder / "images" / "empty.jpg").write_bytes(b"")
    (folder / "images" / "text.png").write_bytes(b"no image")
    words: list[object] = [
        "infer",
        folder / "images",
        "--model",
        model,
        "--provider",
        "cpu",
        "--batch-size",
        "4",
        "--output",
    ]
    words += [folder / "submission.csv", "--masks", folder / "masks", "--max-megapixels", MEGAPIXELS]
    invoke(main, *words, status=1)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    settings = ServeSettings(max_upload_bytes=LIMIT)
    options: Any = {"provider": "cpu", "batch_size": 4, "max_pixels": int(MEGAPIXELS * 1e6)}
    with Segmenter(folder / "clouds.onnx", **options) as segmenter, serving(segmenter, settings) as running:
        yield running


def images(folder: Path) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted((folder / "images").iterdir())]


def table(header: list[str], rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def test_rows_and_failures_are_those_of_infer(server: Server, folder: Path) -> None:
    answer = server.upload("/v1/segment", images(folder))
    assert answer.status == 200
    results = answer.json["images"]
    rows = [
        [f"{one['image']}_{name}", one["classes"].get(name, {"rle": ""})["rle"]]
        for one in results
        for name in SMALL_GRIDS.classes
    ]
    failures = [[one["image"], one["error"]] for one in results if one["error"]]
    assert len(failures) == 4
    assert table(["Image_Label", "EncodedPixels"], rows) == (folder / "submission.csv").read_text()
    assert table(["image", "reason"], failures) == (folder / "submission.failures.csv").read_text()


def test_one_image_in_the_body_is_answered_like_a_form(server: Server, folder: Path) -> None:
    sound = ("5.jpg", (folder / "images" / "5.jpg").read_bytes())  # a form in which every image fails is refused
    for name, data in images(folder):
        in_form = server.upload("/v1/segment", [(name, data), sound]).json["images"][0]
        alone = server.ask("/v1/segment", data)
        if in_form["error"]:
            assert (alone.status, alone.json) == (422, {"detail": in_form["error"]})
        else:
            assert alone.json["images"] == [in_form | {"image": "image-0"}]


@pytest.mark.parametrize("name", ["0.jpg", "lossless.png"])
def test_an_image_that_curl_stripped_is_refused_and_the_option_named(server: Server, folder: Path, name: str) -> None:
    data = (folder / "images" / name).read_bytes()
    answer = server.ask("/v1/segment", data.translate(None, b"\0\r\n"))
    assert answer.status == 422 and "--data-binary" in answer.json["detail"]


def test_areas_presence_and_levels(server: Server, folder: Path) -> None:
    data = (folder / "images" / "2.jpg").read_bytes()
    (one,) = server.ask("/v1/segment?levels=true", data).json["images"]
    with Segmenter(folder / "clouds.onnx", provider="cpu", batch_size=4) as segmenter:
        (inferred,) = segmenter.infer([data])
        (result,) = segmenter.predict([data])
    assert inferred.probability is not None and inferred.presence is not None
    assert b64decode(one["levels"]) == inferred.probability.tobytes()
    for index, name in enumerate(SMALL_GRIDS.classes):
        mask = result.mask(name)
        found = one["classes"][name]
        assert (found["area"], found["share"]) == (mask.sum(), mask.mean())
        assert found["presence"] == inferred.presence[index]
    assert server.ask("/v1/segment", data).json["images"][0]["levels"] is None


def test_png_of_a_class_is_the_file_of_masks(server: Server, folder: Path) -> None:
    data = (folder / "images" / "3.jpg").read_bytes()
    for name in SMALL_GRIDS.classes:
        answer = server.ask(f"/v1/segment?class={name}", data, {"Accept": "image/png"})
        assert answer.headers["content-type"] == "image/png"
        assert answer.body == (folder / "masks" / name / "3.jpg.png").read_bytes()


def test_png_of_all_classes_is_transparent_where_no_class_is(server: Server, folder: Path) -> None:
    data = (folder / "images" / "3.jpg").read_bytes()
    body = server.ask("/v1/segment", data, {"Accept": "text/html, image/*;q=0.9"}).body
    picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    masks = [cv2.imread(str(folder / "masks" / name / "3.jpg.png"), 0) for name in SMALL_GRIDS.classes]
    assert picture is not None
    np.testing.assert_array_equal(
        picture[..., 3] > 0, np.any(np.stack([mask for mask in masks if mask is not None]), axis=0)
    )


@pytest.mark.parametrize(
    ("path", "headers", "status", "words"),
    [
        ("/v1/segment", {"Accept": "text/html"}, 406, "image/png or application/geo+json"),
        ("/v1/segment", {"Accept": "application/json;q=0"}, 406, "image/png or application/geo+json"),
        ("/v1/segment?class=Sheep", {}, 400, "no class named 'Sheep': Fish, Flower, Gravel"),
        ("/v1/segment?classes=Fish", {}, 400, "no parameter named 'classes': class, levels, rules, bounds"),
        ("/v1/segment?rules=%7B", {}, 400, "rules: give JSON such as"),
        ("/v1/segment?rules=[1]", {}, 400, "rules: give JSON such as"),
        ("/v1/segment?rules=%7B%22Sheep%22:%7B%7D%7D", {}, 400, "rules: no class named 'Sheep'"),
        ("/v1/segment?rules=%7B%22Fish%22:%7B%22threshold%22:256%7D%7D", {}, 400, "rules: Rule.threshold must be"),
        ("/v1/segment?rules=%7B%22Fish%22:%7B%22other%22:1%7D%7D", {}, 400, "rules: not a Rule"),
        ("/v1/segment?bounds=1,2", {"Accept": "application/geo%2Bjson"}, 406, "application/geo+json"),
        ("/v1/segment?bounds=1,2,3", {"Accept": "application/geo+json"}, 400, "bounds 1,2,3: give LON1,LAT1"),
        ("/v1/segment?bounds=1,9,3,2", {"Accept": "application/geo+json"}, 400, "is not above south"),
        ("/v1/segment", {"Content-Type": "multipart/form-data"}, 400, "boundary"),
        ("/v1/segment", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "multipart/form-data"),
    ],
)
def test_wrong_requests(server: Server, path: str, headers: dict[str, str], status: int, words: str) -> None:
    answer = server.ask(path, b"no form", headers)
    assert answer.status == status
    assert words in answer.json["detail"]


def test_png_is_for_one_image(server: Server, folder: Path) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\n1\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Accept": "image/png"}
    assert server.ask("/v1/segment", part + part + b"--x--\r\n", headers).status == 400
    no_file = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n'
    assert "file name" in server.ask("/v1/segment", no_file, headers).json["detail"]


def test_uploads_are_limited_before_they_are_read(server: Server) -> None:
    for body in (bytes(LIMIT + 1), iter([bytes(LIMIT), bytes(1)])):
        answer = server.ask("/v1/segment", body)
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert f"{LIMIT:,} bytes" in answer.json["detail"]


def test_all_failed_images_of_a_form_are_named(server: Server) -> None:
    for second in ("b.jpg", "a.jpg"):
        answer = server.upload("/v1/segment", [("a.jpg", b""), (second, b"?")])
        assert answer.status == 422
        assert answer.json["detail"] == f"a.jpg is empty; {second} is not a JPEG, PNG, WebP, TIFF or BMP image"


def test_a_form_that_is_cut_off_is_refused(server: Server, folder: Path) -> None:
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="a"; filename="' + name.encode() + b'"\r\n\r\n' + data + b"\r\n"
        for name, data in images(folder)[:2]
    ]
    form, headers = b"".join(parts) + b"--x--", {"Content-Type": "multipart/form-data; boundary=x"}
    assert server.ask("/v1/segment", form, headers).status == 200
    for cut in (2, 5, 100, len(parts[1])):
        answer = server.ask("/v1/segment", form[:-cut], headers)
        assert (answer.status, "cut off" in answer.json["detail"]) == (400, True)


@pytest.mark.parametrize("name", ["", "; filename*=UTF-8''%C3%A9.jpg"])
def test_a_form_with_a_part_that_is_not_a_file_is_refused(server: Server, folder: Path, name: str) -> None:
    data = images(folder)[0][1]
    heads = [f'--x\r\nContent-Disposition: form-data; name="a"{one}\r\n\r\n' for one in ('; filename="a.jpg"', name)]
    form = b"".join(head.encode() + data + b"\r\n" for head in heads) + b"--x--"
    answer = server.ask("/v1/segment", form, {"Content-Type": "multipart/form-data; boundary=x"})
    assert (answer.status, "a part without a file name" in answer.json["detail"]) == (400, True)


def test_large_images_of_a_form_are_not_written_to_files(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda *_: pytest.fail("a temporary file"))
    name, data = images(folder)[0]
    with Segmenter(folder / "clouds.onnx", provider="cpu", batch_size=2) as segmenter, serving(segmenter) as large:
        assert large.upload("/v1/segment", [(name, data + bytes(2 << 20))]).status == 200


def test_names_that_are_not_unicode_are_replaced(server: Server, folder: Path) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="\\ud800.jpg"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    answer = server.ask("/v1/segment", part + images(folder)[0][1] + b"\r\n--x--\r\n", headers)
    assert [image["image"] for image in answer.json["images"]] == ["?.jpg"]


def test_models_health_and_metrics(server: Server, folder: Path) -> None:
    (model,) = server.ask("/v1/models").json["models"]
    assert model["name"] == "clouds"
    assert [Rule.from_dict(model["rules"][name]) for name in SMALL_GRIDS.classes] == list(RULES)
    assert (model["grid"], model["has_presence"], model["max_upload_bytes"]) == ([60, 90], True, LIMIT)
    assert server.ask("/healthz").json == {"status": "ok"}
    path = 'path="/v1/segment",status='
    before = server.metric(f'cloudrt_requests_total{{{path}"200"}}'), server.metric("cloudrt_failed_images_total")
    server.upload("/v1/segment", [("a.jpg", b""), images(folder)[0]])
    after = server.metric(f'cloudrt_requests_total{{{path}"200"}}'), server.metric("cloudrt_failed_images_total")
    assert after == (before[0] + 1, before[1] + 1)
    assert server.metric("cloudrt_batch_images_sum") >= 6


def test_an_unexpected_exception_is_counted_as_500(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> None:
        raise RuntimeError("unexpected")

    counter = 'cloudrt_requests_total{path="/v1/segment",status="500"}'
    before = server.metric(counter)
    monkeypatch.setattr(Batcher, "segment", fails)
    assert server.ask("/v1/segment", images(folder)[0][1]).status == 500
    assert server.metric(counter) == before + 1


def test_a_server_whose_engines_are_closed_is_not_ready(folder: Path) -> None:
    ready = ("/readyz", "/v2/health/ready", "/v2/models/clouds/ready")
    with Segmenter(folder / "clouds.onnx", provider="cpu", batch_size=4) as segmenter, serving(segmenter) as server:
        assert [server.ask(path).status for path in ready] == [200] * 3
        segmenter.close()
        assert [server.ask(path).status for path in ready] == [503] * 3
        assert [server.ask(path).status for path in ("/healthz", "/v2/health/live")] == [200] * 2
        assert "restart the server" in server.ask("/readyz").json["detail"]


@pytest.mark.parametrize(
    ("owner", "name", "path"),
    [
        (answers, "image_answer", "/v1/segment"),
        (answers, "masks_png", "/v1/segment"),
        (geojson, "feature_collection", "/v1/segment"),
        (inference_protocol, "_response", "/v2/models/clouds/infer"),
    ],
)
def test_encoding_keeps_the_slot_and_leaves_the_event_loop_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, path: str
) -> None:
    begun, go_on, encode = threading.Event(), threading.Event(), getattr(owner, name)

    def slow(*given: Any, **named: Any) -> Any:
        begun.set()
        assert go_on.wait(WAIT_S)
        return encode(*given, **named)

    monkeypatch.setattr(owner, name, slow)
    pixels = [0] * (64 * 96 * 3)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 64, 96, 3], "data": pixels}
    body = json.dumps({"inputs": [tensor]}).encode() if "v2" in path else images(folder)[0][1]
    kinds = {"masks_png": "image/png", "feature_collection": "application/geo+json"}
    headers = {"Accept": kinds.get(name, "application/json")}
    with (
        Segmenter(folder / "clouds.onnx", provider="cpu", batch_size=4, threads=1) as segmenter,
        serving(segmenter) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(server.ask, path, body, headers)
        try:
            assert begun.wait(WAIT_S)
            assert server.metric("cloudrt_requests_in_progress") == 1
        finally:
            go_on.set()
        assert asked.result().status == 200
        assert server.metric("cloudrt_requests_in_progress") == 0


def test_scenes_are_images_that_can_be_segmented(server: Server) -> None:
    first, second = (server.ask(f"/v1/scenes/{seed}.jpg") for seed in (1, 2))
    assert first.headers["content-type"] == "image/jpeg" and first.body != second.body
    assert server.ask("/v1/scenes/1000.jpg").status == 422
    assert server.ask("/v1/scenes/x.jpg").status == 422


def test_token_and_origins(folder: Path) -> None:
    settings = ServeSettings(token="secret", allow_origins=("https://example.org",))
    with (
        Segmenter(folder / "clouds.onnx", provider="cpu", batch_size=4) as segmenter,
        serving(segmenter, settings) as server,
    ):
        data = (folder / "images" / "0.jpg").read_bytes()
        for path in ("/v1/models", "/metrics", "/v1/scenes/1.jpg", "/v2/models/clouds", "/v2"):
            answer = server.ask(path)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        for path in ("/healthz", "/readyz", "/v2/health/ready"):
            assert server.ask(path).status == 200
        assert server.ask("/v1/segment", data, {"Authorization": "Bearer secre"}).status == 401
        headers = {"Authorization": "Bearer secret", "Origin": "https://example.org"}
        answer = server.ask("/v1/segment", data, headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        assert answer.status == 200
        other = server.ask("/v1/segment", data, headers | {"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers
