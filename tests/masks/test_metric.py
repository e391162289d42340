"""The competition's Dice, compared with plain loops and with values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from support import reference

from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.masks.metric import PresenceScore, dice, score
from cloudrt.masks.rle import rle_decode

pairs = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: st.tuples(*[arrays.arrays(np.uint8, shape, elements=st.integers(0, 1))] * 2)
)


@given(pairs)
def test_dice_equals_the_plain_loop(masks: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    a, b = masks
    expected = reference.dice(a, b)
    assert dice(a, b) == dice(b, a) == dice(a.astype(bool), np.asfortranarray(b) * 255) == pytest.approx(expected)


def test_dice_at_its_ends() -> None:
    empty, full = np.zeros((3, 4), np.uint8), np.ones((3, 4), np.uint8)
    assert dice(empty, empty) == 1.0
    assert dice(full, full) == 1.0
    assert dice(empty, full) == 0.0
    half = full.copy()
    half[:, 2:] = 0
    assert dice(half, full) == pytest.approx(2 * 6 / 18)
    assert dice(full[:0], full[:0]) == 1.0


def test_masks_of_two_shapes_are_not_compared() -> None:
    with pytest.raises(DataError, match=r"\(3, 4\) and \(4, 3\)"):
        dice(np.zeros((3, 4)), np.zeros((4, 3)))


LABELS = Labels(("Fish", "Flower"), (4, 8), (2, 4))


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["Image_Label,EncodedPixels", *rows]) + "\n")
    return path


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    # On the 8x4 grid. a: the left quarter (two columns), which is column 1 of the 4x2 grid. b: the right half.
    return table(tmp_path / "truth.csv", "a.jpg_Fish,1 8", "a.jpg_Flower,", "b.jpg_Fish,17 16", "b.jpg_Flower,")


def test_score_by_hand(tmp_path: Path, truth: Path) -> None:
    predicted = table(
        tmp_path / "submission.csv",
        "a.jpg_Fish,1 4",  # columns 1 and 2 of 4: 2 * 2 / (4 + 2)
        "a.jpg_Flower,1 1",  # something where nothing is: 0
        "b.jpg_Fish,5 4",  # right
        "b.jpg_Flower,",  # both empty: 1
    )
    found = score(predicted, truth, LABELS)
    assert found.per_class == {"Fish": pytest.approx((2 / 3 + 1) / 2), "Flower": pytest.approx(0.5)}
    assert found.mean == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert found.all_empty == pytest.approx(0.5)
    assert found.images == 2
    fish, flower = found.by_presence["Fish"], found.by_presence["Flower"]
    assert (fish.absent, fish.present, fish.dice_absent, fish.correct) == (0, 2, None, 1.0)
    assert fish.dice_present == fish.dice_found == pytest.approx((2 / 3 + 1) / 2)
    assert flower == PresenceScore(2, 0, 0.5, None, None, 0.5)


def test_presence_and_masks_are_scored_apart(tmp_path: Path) -> None:
    """Random rows against a plain loop over the texts."""
    random = np.random.default_rng(3)
    texts = [[str(random.choice(["", "1 4", "5 4", "3 3"])) for _ in range(40)] for _ in range(2)]
    paths = [
        table(tmp_path / f"{name}.csv", *(f"{number}.jpg_Fish,{text}" for number, text in enumerate(rows)))
        for name, rows in zip(("truth", "predicted"), texts, strict=True)
    ]
    found = score(paths[1], paths[0], LABELS, LABELS.submit_grid).by_presence["Fish"]
    absent: list[float] = []
    present: list[float] = []
    both: list[float] = []
    right = 0
    for wanted, predicted in zip(*texts, strict=True):
        ours, theirs = (rle_decode(text, LABELS.submit_grid) for text in (predicted, wanted))
        right += bool(wanted) == bool(predicted)
        (present if wanted else absent).append(dice(ours, theirs))
        both += [dice(ours, theirs)] * bool(wanted and predicted)
    assert (found.absent, found.present) == (len(absent), len(present))
    means = [found.dice_absent, found.dice_present, found.dice_found, found.correct]
    assert means == pytest.approx([np.mean(absent), np.mean(present), np.mean(both), right / 40])


def test_an_empty_submission_scores_the_all_empty_figure(tmp_path: Path, truth: Path) -> None:
    rows = [line.split(",")[0] + "," for line in truth.read_text().splitlines()[1:]]
    found = score(table(tmp_path / "submission.csv", *rows), truth, LABELS)
    assert found.mean == found.all_empty == 0.5


def test_order_and_further_rows_do_not_matter(tmp_path: Path, truth: Path) -> None:
    rows = ["b.jpg_Flower,", "c.jpg_Fish,1 1", "a.jpg_Flower,1 1", "b.jpg_Fish,5 4", "a.jpg_Fish,1 4"]
    found = score(table(tmp_path / "submission.csv", *rows), truth, LABELS)
    assert found.mean == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert found.images == 2


def test_only_the_rows_of_the_truth_count(tmp_path: Path) -> None:
    truth = table(tmp_path / "truth.csv", "a.jpg_Fish,1 8")
    found = score(table(tmp_path / "submission.csv", "a.jpg_Fish,1 2", "a.jpg_Flower,1 1"), truth, LABELS)
    assert (found.mean, found.per_class, found.all_empty) == (1.0, {"Fish": 1.0}, 0.0)


def test_truth_on_the_submission_grid(tmp_path: Path) -> None:
    rows = ["a.jpg_Fish,1 2", "a.jpg_Flower,8 1"]
    same = table(tmp_path / "same.csv", *rows)
    assert score(same, same, LABELS, LABELS.submit_grid).mean == 1.0
    with pytest.raises(DataError, match=r"must be 8x4 or 4x2 .width x height., found 5x3"):
        score(same, same, LABELS, (3, 5))


def test_random_tables_equal_the_plain_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    true_rows, rows, expected = [], [], []
    for index in range(20):
        for label in LABELS.classes:
            wanted = (rng.random(LABELS.label_grid) < rng.choice([0, 0.5, 0.8])).astype(np.uint8)
            found = (rng.random(LABELS.submit_grid) < rng.choice([0, 0.5])).astype(np.uint8)
            true_rows.append(f"{index}.jpg_{label},{reference.rle_encode(wanted)}")
            rows.append(f"{index}.jpg_{label},{reference.rle_encode(found)}")
            expected.append(reference.dice(found, reference.shrink(wanted, LABELS.block)))
    rng.shuffle(rows)
    found_score = score(table(tmp_path / "s.csv", *rows), table(tmp_path / "t.csv", *true_rows), LABELS)
    assert found_score.mean == pytest.approx(np.mean(expected))
    assert found_score.per_class["Fish"] == pytest.approx(np.mean(expected[::2]))


def test_missing_rows_are_named(tmp_path: Path, truth: Path) -> None:
    predicted = table(tmp_path / "submission.csv", "a.jpg_Fish,", "b.jpg_Flower,")
    with pytest.raises(DataError, match=r"lacks 2 of 4 rows .*a\.jpg.*Flower"):
        score(predicted, truth, LABELS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("1", "odd"), ("9 1", r"out of bounds: the 4x2"), ("3 1 1 1", "ascend"), ("x 1", "whole number"), ("1 0", "zero")],
)
def test_bad_rle_is_named_by_its_row(tmp_path: Path, truth: Path, text: str, reason: str) -> None:
    rows = ["a.jpg_Fish,", "a.jpg_Flower,", f"b.jpg_Fish,{text}", "b.jpg_Flower,"]
    with pytest.raises(DataError, match=rf"submission.csv, row b.jpg_Fish: RLE token \d .*{reason}"):
        score(table(tmp_path / "submission.csv", *rows), truth, LABELS)
    with pytest.raises(DataError, match=r"truth.csv, row b.jpg_Fish: .*8x4"):
        score(truth, table(tmp_path / "truth.csv", "b.jpg_Fish,33 1"), LABELS)


def test_a_truth_without_rows_is_refused(tmp_path: Path) -> None:
    empty = table(tmp_path / "empty.csv")
    with pytest.raises(DataError, match="no rows"):
        score(empty, empty, LABELS)


def test_the_clouds_are_the_default(tmp_path: Path) -> None:
    # Two of 2100 columns: half of every block at the left edge.
    truth = table(tmp_path / "truth.csv", "a.jpg_Sugar,1 2800")
    assert score(table(tmp_path / "right.csv", "a.jpg_Sugar,1 350"), truth).per_class == {"Sugar": 1.0}
    with pytest.raises(DataError, match="525x350"):
        score(table(tmp_path / "wrong.csv", "a.jpg_Sugar,183750 2"), truth)
