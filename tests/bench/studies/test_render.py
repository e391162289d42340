"""The figures in README and docs are those of bench/results; no ratio is typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from cloudrt.bench.studies.blocks import BLOCKS
from cloudrt.bench.studies.render import fill, render
from cloudrt.bench.studies.results import RESULTS
from support.paths import PAGES, ROOT

from cloudrt.errors import DataError

TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)
MARKED = re.compile(r"<!-- figures: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)


def stored(name: str) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((RESULTS / f"{name}.json").read_text())
    return loaded


def test_pages_show_the_stored_figures() -> None:
    assert fill(TEXT) == TEXT, "run make figures"
    assert {name for name, _ in MARKED.findall(TEXT)} == set(BLOCKS)


def test_make_figures_fills_every_page_with_markers() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = [line for line in makefile.splitlines() if "studies.render" in line]
    marked = {str(page.relative_to(ROOT)) for page in PAGES if MARKED.search(page.read_text(encoding="utf-8"))}
    assert set(line.partition("studies.render ")[2].split()) == marked


def test_no_ratio_is_typed_by_hand() -> None:
    prose = MARKED.sub("", TEXT)
    assert re.findall(r"(?<![\w.])\d[\d,.]*x(?![\w])", prose) == []


def test_tables_hold_the_stored_numbers() -> None:
    text = dict(MARKED.findall(TEXT))
    accuracy = stored("cpu-validation")["accuracy"]
    assert isinstance(accuracy, dict)
    shipped = next(way for way in accuracy["ways"] if way["model"] == "clouds.onnx" and way["provider"] == "cpu")
    assert f"{shipped['dice']:.4f}" in text["front"] and f"{accuracy['all_empty']:.4f}" in text["front"]
    stages = stored("cpu-full-originals")["stages"]
    assert isinstance(stages, list)
    for stage in stages[:-1]:
        row = next(line for line in text["stages"].splitlines() if line.startswith(f"| {stage['name']} "))
        shown = float(re.findall(r"([\d.,]+)x", row)[0].replace(",", ""))
        assert shown == pytest.approx(stage["notebook"]["median_s"] / stage["ours"]["median_s"], rel=0.05)


def test_command_fills_a_page_and_refuses_unknown_names(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- figures: memory -->\nold\n<!-- end -->\nb\n")
    assert CliRunner().invoke(render, [str(page)]).exit_code == 0
    assert page.read_text() == f"a\n<!-- figures: memory -->\n{BLOCKS['memory']()}\n<!-- end -->\nb\n"
    with pytest.raises(DataError, match="no figures are named nonsense; there are summary"):
        fill("<!-- figures: nonsense -->\n<!-- end -->")
