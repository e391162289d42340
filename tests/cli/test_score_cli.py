"""`cloudrt score`: the table, JSON, other grids and classes, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cloudrt.cli.score import score

HEADER = "Image_Label,EncodedPixels\n"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(score, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images. First: Fish correct, Flower half correct, Gravel missed, Sugar correctly empty; second: no masks."""
    truth = {"Fish": "1 10", "Flower": "1 20", "Gravel": "5 5", "Sugar": ""}
    found = {"Fish": "1 10", "Flower": "11 20", "Gravel": "", "Sugar": ""}
    for name, rows in (("truth", truth), ("submission", found)):
        lines = [f"a.jpg_{label},{text}\n" for label, text in rows.items()]
        lines += [f"b_1.jpg_{label},\n" for label in rows]
        (tmp_path / f"{name}.csv").write_text(HEADER + "".join(lines))
    return tmp_path


def test_json(folder: Path) -> None:
    result = run(folder / "submission.csv", folder / "truth.csv", "--truth-grid", "525x350", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["per_class"] == {"Fish": 1.0, "Flower": 0.75, "Gravel": 0.5, "Sugar": 1.0}
    assert (values["mean"], values["all_empty"], values["images"]) == (0.8125, 0.625, 2)
    assert values["by_presence"]["Gravel"] == {
        "absent": 1,
        "present": 1,
        "dice_absent": 1.0,
        "dice_present": 0.0,
        "dice_found": None,
        "correct": 0.5,
    }


def test_table(folder: Path) -> None:
    result = run(folder / "submission.csv", folder / "truth.csv", "--truth-grid", "525x350")
    assert result.exit_code == 0 and result.stderr == ""
    for text in ("mean", "0.8125", "all rows empty", "0.6250", "2 images"):
        assert text in result.stdout
    cells = {row[0]: row[1:] for row in (line.split("│")[1:-1] for line in result.stdout.splitlines() if "│" in line)}
    rows = {name.strip(): [cell.strip() for cell in row] for name, row in cells.items()}
    assert rows["Flower"] == ["0.7500", "1.0000", "0.5000", "0.5000", "100.0%"]
    assert rows["Gravel"] == ["0.5000", "1.0000", "0.0000", "-", "50.0%"]
    assert rows["Sugar"] == ["1.0000", "1.0000", "-", "-", "100.0%"]


def test_rows_that_the_truth_lacks_are_counted_by_name(folder: Path) -> None:
    arguments = (folder / "submission.csv", folder / "truth.csv", "--truth-grid", "525x350", "--json")
    before = json.loads(run(*arguments).stdout)
    with (folder / "submission.csv").open("a") as file:
        file.write("c.jpg_Sugar,1 5\nc.jpg_Fish,\n")
    result = run(*arguments)
    assert result.exit_code == 0
    assert "2 rows of" in result.stderr and "were not scored, first c.jpg_Sugar" in result.stderr
    after = json.loads(result.stdout)
    assert (after["ignored_rows"], after["first_ignored"]) == (2, "c.jpg_Sugar")
    assert {**after, "ignored_rows": 0, "first_ignored": ""} == before


def test_label_grid_is_the_default(folder: Path) -> None:
    # One block of 4x4 pixels on the label grid, rows 1 to 4 of columns 1 to 4, is pixel 1 of the submission grid.
    block = " ".join(f"{1400 * column + 1} 4" for column in range(4))
    (folder / "truth.csv").write_text(HEADER + f"a.jpg_Fish,{block}\n")
    (folder / "submission.csv").write_text(HEADER + "a.jpg_Fish,1 1\n")
    result = run(folder / "submission.csv", folder / "truth.csv", "--json")
    assert json.loads(result.stdout)["per_class"] == {"Fish": 1.0}


def test_classes_of_other_data(folder: Path) -> None:
    (folder / "data.json").write_text('{"classes": ["cat"], "label_grid": [4, 4], "submit_grid": [2, 2]}')
    (folder / "truth.csv").write_text(HEADER + "x.png_cat,1 4\n")  # a column of 4, or half of two 2x2 blocks
    (folder / "submission.csv").write_text(HEADER + "x.png_cat,1 1\n")
    arguments = (folder / "submission.csv", folder / "truth.csv", "--data", folder, "--json")
    assert json.loads(run(*arguments).stdout)["per_class"] == {"cat": 2 / 3}
    on_submit_grid = json.loads(run(*arguments, "--truth-grid", "2x2").stdout)
    assert on_submit_grid["per_class"] == {"cat": 0.4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.csv", "truth.csv"), "none.csv is missing"),
        (("submission.csv", "truth.csv", "--truth-grid", "3x3"), "grid"),
        (("submission.csv", "truth.csv", "--truth-grid", "wide"), "WIDTHxHEIGHT"),
        (("submission.csv", "truth.csv", "--data", "none"), "none is not a folder"),
        (("short.csv", "truth.csv", "--truth-grid", "525x350"), "lacks 7 of 8 rows"),
        (("bad.csv", "bad.csv"), "RLE token 2"),
        (("large.csv", "submission.csv"), "it fits the grid of the truth: are the two tables swapped?"),
    ],
)
def test_mistakes_give_a_one_line_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (folder / "short.csv").write_text(HEADER + "a.jpg_Fish,\n")
    lines = (folder / "submission.csv").read_text().splitlines()[1:]
    large = "".join(f"{line.split(',')[0]},2900001 400\n" for line in lines)
    (folder / "large.csv").write_text(HEADER + large)
    (folder / "bad.csv").write_text(HEADER + "a.jpg_Fish,1 0\n")
    monkeypatch.chdir(folder)
    result = run(*arguments)
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and line.startswith("Error: ") and message in line and result.stdout == ""
