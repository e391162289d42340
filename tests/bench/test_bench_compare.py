"""Two benchmarks compared: only changes beyond the noise count, and a regression fails the command; the page."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cloudrt.bench.bench_page import write_bench_page
from cloudrt.bench.compare import compare
from cloudrt.bench.figures import SCHEMA
from support.commands import invoke
from support.html import Page

from cloudrt.cli.bench import bench


def bench_of(**ratios: float) -> dict[str, Any]:
    """Return the JSON values of a benchmark with these ratios to its peers."""

    def timing(seconds: float, spread: float = 0.0) -> dict[str, float]:
        return {"median_s": seconds, "iqr_s": spread * seconds}

    return {
        "machine": {"cpu": "a"},
        "versions": {},
        "model": {},
        "images": {},
        "stages": [
            {"name": "decode", "ratio": ratios.get("decode", 2.0), "ours": timing(1), "notebook": timing(2)},
            {"name": "infer", "ratio": ratios.get("infer", 3.0), "ours": timing(1, 0.2), "notebook": timing(3, 0.2)},
        ],
        "pipeline": {
            "whole": timing(1),
            "share_of_ceiling": ratios.get("share", 0.9),
            "peers": {"x": timing(2) | {"ratio": ratios.get("x", 2.0)}},
        },
        "postprocess": [
            {"kind": "dense", "form": "uint8", "peers": [{"name": "OpenCV", "ratio": 30.0, "low": 29.0, "high": 31.0}]}
        ],
        "search": None,
    }


@pytest.mark.parametrize(
    ("ratios", "worse", "better"),
    [
        ({}, [], []),
        ({"decode": 1.85}, [], []),  # within the tolerance
        ({"decode": 1.7}, ["decode, compared with the notebook's way"], []),
        ({"infer": 2.0}, [], []),  # noisy
        ({"infer": 0.5}, ["infer, compared with the notebook's way"], []),
        ({"share": 0.5, "x": 3.0}, ["files to CSV, share of the ceiling"], ["files to CSV, compared with x"]),
    ],
)
def test_only_falls_beyond_the_noise_are_regressions(
    ratios: dict[str, float], worse: list[str], better: list[str]
) -> None:
    found = compare(bench_of(), bench_of(**ratios))
    assert [change.name for change in found.regressions] == worse
    assert [change.name for change in found.changes if change.verdict == "better"] == better
    assert len(found.changes) == 5
    assert found.differences == []


def test_a_great_change_counts_in_any_noise() -> None:
    slow, fast = bench_of(x=1), bench_of(x=1000)
    for values in (slow, fast):
        values["pipeline"]["whole"]["iqr_s"] = 0.6 * values["pipeline"]["whole"]["median_s"]
    for before, after, verdict in ((fast, slow, "worse"), (slow, fast, "better")):
        found = compare(before, after)
        assert [change.verdict for change in found.changes if change.name.endswith("compared with x")] == [verdict]


def test_what_only_one_run_has_is_named() -> None:
    other = bench_of()
    other["pipeline"], other["machine"] = None, {"cpu": "b"}
    found = compare(bench_of(), other)
    assert found.only_before == ["files to CSV, share of the ceiling", "files to CSV, compared with x"]
    assert found.differences == ["cpu: a before, b now"]


def test_a_regression_fails_the_command(model: Path, images: Path, tmp_path: Path) -> None:
    words = (model, "--data", images, "--provider", "cpu", "--batch-size", 2, "--repeat", 2)
    only = ("--only", "pipeline", "--only", "throughput", "--only", "accuracy", "--only", "latency")
    first = invoke(bench, *words, *only, "-o", tmp_path / "a.json")
    assert first.exit_code == 0, first.output
    page = Page(tmp_path / "a.html")
    assert "Speed and accuracy" in page.text and "Throughput of the engine" in page.text
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["agreement"]["dice"] > 0  # measured although the stages were not
    sunk, raised = copy.deepcopy(values), copy.deepcopy(values)
    for changed, factor in ((sunk, 1e-3), (raised, 1e3)):
        changed["pipeline"]["share_of_ceiling"] *= factor
        for peer in changed["pipeline"]["peers"].values():
            peer["ratio"] *= factor
    (tmp_path / "sunk.json").write_text(json.dumps(sunk))
    (tmp_path / "raised.json").write_text(json.dumps(raised))
    again = (*words, "-o", tmp_path / "b.json", "--overwrite")
    better = invoke(bench, *again, "--only", "pipeline", "--compare", tmp_path / "sunk.json")
    assert better.exit_code == 0 and "better" in better.output
    worse = invoke(bench, *again, "--only", "pipeline", "--compare", tmp_path / "raised.json")
    assert worse.exit_code == 1 and "worse" in worse.output
    for content, said in (
        ("{}", "not a file of cloudrt-bench"),
        ("[]", "not a file of cloudrt-bench"),
        ("{", "or is damaged"),
        ("[" * 200_000, "or is damaged"),
        ('{"schema": 1}', "has schema 1"),
        (f'{{"schema": {SCHEMA}}}', "damaged, at 'stages'"),
    ):
        (tmp_path / "c.json").write_text(content)
        refused = invoke(bench, *again, "--compare", tmp_path / "c.json")
        assert refused.exit_code == 2 and said in refused.output
    nothing = invoke(bench, *again, "--only", "latency", "--compare", tmp_path / "a.json")
    assert nothing.exit_code == 2 and "no ratio in common" in nothing.output
    assert invoke(bench, model, "--truth", tmp_path / "a.json", "-o", tmp_path / "d.json").exit_code == 2


def test_the_page_makes_no_requests(tmp_path: Path) -> None:
    """Parts that were not measured are left out; names that look like HTML are shown as text."""
    values = bench_of() | {
        "pipeline": None,
        "stages": [],
        "postprocess": [],
        "accuracy": None,
        "throughput": None,
        "ceilings": None,
        "latency": None,
        "scaling": None,
        "startup": None,
        "skipped": {"<peer>": "why & how"},
        "command": ["<x>"],
        "versions": {"numpy": "2"},
        "model": {
            "file": "<m>.onnx",
            "architecture": "FPN",
            "encoder": "e",
            "precision": "fp16",
            "plan": "cpu",
            "input_size": [64, 96],
        },
        "images": {"count": 2, "source": "given images", "size": [64, 96]},
        "machine": {"cpu": "c", "usable_cores": 2},
    }
    write_bench_page(values, tmp_path / "b.html")
    page = Page(tmp_path / "b.html")
    assert "<m>.onnx" in page.text and "<peer>" in page.text and "why & how" in page.text and "<x>" in page.text
    assert re.findall(r'<h2 id="(\w+)"', page.source) == ["how"]
    assert "http" not in page.source and "<script" not in page.source
