"""What changed between two benches: ratios that moved beyond their noise, and which of them are regressions.

Only ratios within one run are compared, since absolute times on another day or machine mean nothing: each stage beside
the notebook's way, the whole beside its ceiling and its peers, post-processing and RLE beside theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.errors import DataError

from .figures import SCHEMA


@dataclass(frozen=True)
class Change:
    """A ratio in both runs, higher is better; `noise` is the relative spread of the two together.

    `verdict` is "same" within the noise or the tolerance, else "better" or "worse".
    """

    name: str
    before: float
    after: float
    noise: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All that both runs measured, what only one did, and in what the runs themselves differ."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    differences: list[str]

    @property
    def regressions(self) -> list[Change]:
        """What became worse."""
        return [change for change in self.changes if change.verdict == "worse"]


def read_bench(path: Path) -> dict[str, Any]:
    """Read a bench.json.

    Raises
    ------
    DataError
        No such file, not one, or of another schema.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        schema = values["schema"]
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of cloudrt-bench: {error}") from error
    if schema != SCHEMA:
        raise DataError(f"{path} has schema {schema}, this version compares {SCHEMA}: measure it again")
    assert isinstance(values, dict)
    return values


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float = 0.1) -> Comparison:
    """Compare two contents of bench.json.

    Parameters
    ----------
    before, after
        See `read_bench`.
    tolerance
        Relative change that counts as the same, whatever the noise.
    """
    ours, theirs = dict(_ratios(after)), dict(_ratios(before))
    changes = []
    for name, (new, new_noise) in ours.items():
        if name not in theirs:
            continue
        old, old_noise = theirs[name]
        noise = float(np.hypot(old_noise, new_noise))
        moved = new / old - 1
        same = abs(moved) <= max(tolerance, 2 * noise)
        changes.append(Change(name, old, new, noise, "same" if same else "better" if moved > 0 else "worse"))
    differences = [
        f"{name}: {before.get(part, {}).get(name)} before, {after.get(part, {}).get(name)} now"
        for part in ("machine", "versions", "model", "images")
        for name in sorted({*before.get(part, {}), *after.get(part, {})})
        if before.get(part, {}).get(name) != after.get(part, {}).get(name)
    ]
    return Comparison(
        changes, [name for name in theirs if name not in ours], [name for name in ours if name not in theirs],
        differences,
    )  # fmt: skip


def _ratios(values: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield name -> (ratio, its relative noise) of everything that is a ratio."""
    for stage in values["stages"]:
        noise = np.hypot(_noise(stage["ours"]), _noise(stage["notebook"]))
        yield f"{stage['name']}, beside the notebook's way", (stage["ratio"], float(noise))
    whole = values["pipeline"]
    if whole:
        spread = _noise(whole["whole"])
        yield "files to CSV, share of the ceiling", (whole["share_of_ceiling"], spread)
        for name, peer in whole["peers"].items():
            yield f"files to CSV, beside {name}", (peer["ratio"], float(np.hypot(spread, _noise(peer))))
    for measured in values["postprocess"]:
        for peer in measured["peers"]:
            ratio = peer["ratio"]
            spread = (peer["high"] - peer["low"]) / ratio
            yield f"post-processing {measured['kind']}, {measured['form']}, beside {peer['name']}", (ratio, spread)
    if values["search"]:
        yield "search, beside nested loops", (values["search"]["ratio"], 0.0)


def _noise(timing: dict[str, Any]) -> float:
    return float(timing["iqr_s"] / timing["median_s"])
