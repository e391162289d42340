"""The page in Chromium: a real upload, rules applied in the browser, no script error, no request to another host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.browser import needs_chromium
from support.chromium import Tab, browsing
from support.html import Names
from support.server import Server, serving
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rule import Rule
from cloudrt.serve.settings import ServeSettings

RULES = (Rule(110, 40), Rule(120, 9, gate_threshold=150, gate_pixels=30), Rule(127, 0, presence=120))
WIDTHS = [1280, 390]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    tiny_artifact(folder / "clouds.onnx", (64, 96), SMALL_GRIDS, presence=True, rules=RULES)
    for seed in range(3):
        write_jpeg(folder / f"{seed}.jpg", seed)
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:1000])
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def page(browser: Tab, server: Server) -> Iterator[Tab]:
    """The browser; the test fails on script errors and on requests to another host."""
    browser.complaints.clear()
    browser.requests.clear()
    yield browser
    refused = "Failed to load resource: the server responded with a status of 4"  # the page shows the reason
    assert [one for one in browser.complaints if not one.startswith(refused)] == []
    assert all(url.startswith((server.url, "blob:", "data:")) for url in browser.requests), browser.requests


def rows(page: Tab) -> list[str]:
    """Return the rows that the page offers for download."""
    text: str = page.run("rowsOf(cards)")
    assert text.startswith("Image_Label,EncodedPixels\n")
    return text.splitlines()[1:]


def expected(segmenter: Segmenter, paths: list[Path], rules: tuple[Rule, ...]) -> list[str]:
    lines = []
    for path, inferred in zip(paths, segmenter.infer(paths), strict=True):
        assert inferred.probability is not None
        texts = apply_rules(inferred.probability, rules, inferred.presence)
        lines += [f"{path.name}_{name},{text}" for name, text in zip(SMALL_GRIDS.classes, texts, strict=True)]
    return lines


def move(page: Tab, kind: str, index: int, value: int) -> None:
    page.run(f"{{ const one = find('{kind}-{index}'); one.value = {value}; one.dispatchEvent(new Event('input')); }}")
    page.until("waiting.size === 0")


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS)
def test_an_upload_shows_masks_and_sliders_change_them(
    page: Tab, server: Server, segmenter: Segmenter, folder: Path, width: int, tmp_path: Path
) -> None:
    paths = [folder / f"{seed}.jpg" for seed in range(3)]
    page.open(server.url, width)
    page.choose("#files", [*paths[:2], folder / "broken.jpg", paths[2]])
    page.until("cards.length === 4 && cards.filter((card) => card.levels).length === 3")
    page.until("document.querySelector('.note')")
    assert rows(page) == expected(segmenter, paths, RULES)
    (failure,) = [one.error for one in segmenter.predict([folder / "broken.jpg"])]
    assert page.run("document.querySelector('.note').textContent") == failure
    rules = list(RULES)
    for index, kind, value in ((0, "threshold", 90), (1, "min_area", 500), (2, "presence", 0), (0, "min_area", 3)):
        move(page, kind, index, value)
        rules[index] = Rule.from_dict(rules[index].to_dict() | {kind: value})
        assert rows(page) == expected(segmenter, paths, tuple(rules)), kind
    for level in (0, 60, 128, 200, 255):
        move(page, "threshold", 1, level)
        rules[1] = Rule.from_dict(rules[1].to_dict() | {"threshold": level})
        assert rows(page) == expected(segmenter, paths, tuple(rules)), level
    assert page.run("find('time').textContent").startswith("Applied to 3 images in ")
    page.run("find('reset').click()")
    page.until("waiting.size === 0")
    assert rows(page) == expected(segmenter, paths, RULES)
    assert page.run("document.documentElement.scrollWidth") == width
    page.photograph(tmp_path / "seen.png")
    seen = cv2.imread(str(tmp_path / "seen.png"), cv2.IMREAD_GRAYSCALE)
    assert seen is not None and seen.std() > 10


@needs_chromium
def test_outlines_enclose_the_pixels_of_the_mask(page: Tab, server: Server) -> None:
    """The traced path, filled by the browser, covers the centres of exactly the pixels that are on."""
    page.open(server.url, 1280)
    random = np.random.default_rng(2)
    for density in (0.2, 0.5, 0.8):
        mask = (random.random((17, 23)) < density).astype(np.uint8)
        levels = np.ascontiguousarray(mask.T).ravel().tolist()
        script = f"""
        (() => {{
          const {{ runs }} = applyRule(Uint8Array.from({levels}), 17, {{ threshold: 0, min_area: 0 }}, null);
          const path = new Path2D(traceRuns(runs, 23, 17)), drawing = document.createElement("canvas").getContext("2d");
          const on = [];
          for (let y = 0; y < 17; y++)
            for (let x = 0; x < 23; x++) on.push(drawing.isPointInPath(path, x + .5, y + .5, "evenodd") ? 1 : 0);
          return on;
        }})()
        """
        assert page.run(script) == mask.ravel().tolist()


@needs_chromium
def test_outlines_can_be_hidden_and_images_removed(page: Tab, server: Server, folder: Path) -> None:
    page.open(server.url, 1280)
    page.choose("#files", [folder / "1.jpg"])
    page.until("cards.length === 1 && cards[0].levels")
    visible = "getComputedStyle(document.querySelector('.scene .k0')).display"
    assert page.run(visible) != "none"
    page.run("find('show-0').click()")
    assert page.run(visible) == "none"
    label = page.run("document.querySelector('.scene').getAttribute('aria-label')")
    assert label.startswith("1.jpg: Fish ")
    assert page.run("find('status').textContent") == label
    page.run("[...document.querySelectorAll('figure button')].at(-1).click()")
    assert page.run("[cards.length, gallery.children.length]") == [0, 0]
    assert page.run("[find('none').hidden, find('rows').disabled]") == [False, True]
    assert page.run("document.activeElement.id") == "files"


@needs_chromium
def test_images_can_be_dropped(page: Tab, server: Server, segmenter: Segmenter, folder: Path) -> None:
    """Before the first image, sliders change only the rules."""
    page.open(server.url, 1280)
    move(page, "threshold", 0, 90)
    page.run("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    assert page.run("[classes[0].rule.threshold, find('time').textContent]") == [90, ""]
    data = list((folder / "2.jpg").read_bytes())
    page.run(
        f"""{{
          const files = new DataTransfer();
          files.items.add(new File([Uint8Array.from({data})], "2.jpg"));
          for (const kind of ["dragover", "drop"])
            find("drop").dispatchEvent(new DragEvent(kind, {{ dataTransfer: files, cancelable: true }}));
        }}"""
    )
    page.until("cards.length === 1 && cards[0].levels")
    (inferred,) = segmenter.infer([folder / "2.jpg"])
    assert inferred.presence is not None
    rules = (Rule.from_dict(RULES[0].to_dict() | {"threshold": 90}), *RULES[1:])
    assert rows(page) == expected(segmenter, [folder / "2.jpg"], rules)
    seen = page.run("[...document.querySelectorAll('.areas span:not(.swatch)')].map((one) => one.textContent)")
    assert [one.rpartition(" ")[2] for one in seen] == [f"{round(level / 2.55)}%" for level in inferred.presence]
    assert [one.split(" ")[0] for one in seen] == list(SMALL_GRIDS.classes)


@needs_chromium
def test_the_keyboard_reaches_and_moves_every_control(page: Tab, server: Server, folder: Path) -> None:
    page.open(server.url, 1280)
    page.choose("#files", [folder / "1.jpg"])
    page.until("cards.length === 1 && cards[0].levels")
    page.run("document.body.focus()")
    reached = []
    for _ in range(24):
        page.press("Tab", 9)
        reached.append(page.run("document.activeElement.id || document.activeElement.textContent"))
    controls = [f"{kind}-{index}" for index in range(3) for kind in ("show", "threshold", "min_area", "presence")]
    order = ["files", "scene", *controls, "reset", "rows"]
    assert [one for one in reached if one in order][: len(order)] == order
    assert "Download picture (PNG)" in reached
    page.run("find('threshold-0').focus()")
    page.press("ArrowRight", 39)
    page.until("waiting.size === 0")
    assert page.run("classes[0].rule.threshold") == 111
    assert page.run("find('threshold-0').getAttribute('aria-valuetext')") == "111, level 0 to 255"


@needs_chromium
def test_colour_schemes_and_the_downloads_of_a_scene(page: Tab, server: Server, tmp_path: Path) -> None:
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    backgrounds = []
    for scheme in ("light", "dark"):
        page.open(server.url, 1280, scheme=scheme)
        backgrounds.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert len(set(backgrounds)) == 2
    page.run("find('scene').click()")
    page.until("cards.length === 1 && cards[0].levels")
    text = page.run("rowsOf(cards)")
    page.run("find('rows').click()")
    page.run("document.querySelector('figure button').click()")
    page.wait_for(tmp_path / "submission.csv", tmp_path / "scene-0.jpg.png")
    assert (tmp_path / "submission.csv").read_text() == text
    picture = cv2.imread(str(tmp_path / "scene-0.jpg.png"))
    assert picture is not None and picture.shape[:2] == (12 * 60, 12 * 90) and picture.std() > 10


@needs_chromium
def test_the_page_asks_for_a_token(page: Tab, segmenter: Segmenter, folder: Path) -> None:
    with serving(segmenter, ServeSettings(token="secret")) as guarded:
        page.open(guarded.url, 390)
        page.choose("#files", [folder / "1.jpg"])
        page.until("!find('access').hidden && document.querySelector('.note')")
        assert page.run("document.querySelector('.note').textContent") == "a bearer token is required"
        page.run("find('token').value = 'secret'")
        page.run("find('retry').click()")
        page.until("cards[0].levels")
        assert all(url.startswith((guarded.url, "blob:", "data:")) for url in page.requests)
    page.requests.clear()


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS)
def test_the_documentation(page: Tab, server: Server, width: int) -> None:
    page.open(f"{server.url}/docs", width)
    text = page.run("document.body.innerText")
    described = server.ask("/openapi.json").json
    assert all(path in text for path in described["paths"])
    assert page.run("document.documentElement.scrollWidth") == width


def test_the_page_states_the_gates_and_openapi_describes_every_key(server: Server) -> None:
    page = server.ask("/").body.decode()
    assert page.count("Empty if fewer than") == 1
    assert "Empty if fewer than 30 pixels are above level 150." in page
    schemas = server.ask("/openapi.json").json["components"]["schemas"]
    ours = {name: schema for name, schema in schemas.items() if "Validation" not in name}  # FastAPI's own
    assert "ModelAnswer" in ours
    assert all(key.get("description") for schema in ours.values() for key in schema["properties"].values())


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_are_named_for_screen_readers_and_allow_no_other_host(server: Server, path: str) -> None:
    answer = server.ask(path)
    text = answer.body.decode()
    assert Names(text).wrong == []
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "<style" not in text and " style=" not in text and " onclick=" not in text
    assert "http://" not in text and "https://" not in text
    assert server.ask("/static/other.js").status == 404
    assert json.loads(server.ask("/openapi.json").body)["info"]["title"] == "cloudrt"
