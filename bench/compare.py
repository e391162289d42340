"""Compare two benchmark files: which ratios changed by more than their noise, and which are regressions.

Only ratios within a run are compared, because absolute times of another day or machine are not comparable. They are
the speed of each stage relative to the notebook's, of the pipeline relative to its ceiling and its peers, of
post-processing relative to its peers, of the search relative to nested loops, and the ratios of the host part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.errors import DataError

from .figures import SCHEMA


@dataclass(frozen=True)
class Change:
    """A ratio in both runs; higher is better.

    Parameters
    ----------
    name
        What is compared with what.
    before, after
        The ratio in each run.
    noise
        Relative spreads of the two ratios, combined.
    verdict
        "same" within twice the noise or within the tolerance, else "better" or "worse".
    """

    name: str
    before: float
    after: float
    noise: float
    verdict: str


@dataclass(frozen=True)
class BenchComparison:
    """Ratios in both runs, names of ratios in only one, and differences of machine, versions, model and images."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    differences: list[str]

    @property
    def regressions(self) -> list[Change]:
        """The ratios that became worse."""
        return [change for change in self.changes if change.verdict == "worse"]


def read_bench(path: Path) -> dict[str, Any]:
    """Read a bench.json.

    Raises
    ------
    DataError
        The file is missing, is not a bench.json, or has another schema.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a file of cloudrt-bench, or is damaged: {error}") from error
    if not isinstance(values, dict) or "schema" not in values:
        raise DataError(f"{path} is not a file of cloudrt-bench: it has no schema")
    if values["schema"] != SCHEMA:
        raise DataError(f"{path} has schema {values['schema']}, this version reads {SCHEMA}: run the benchmark again")
    try:
        dict(_ratios(values))
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"{path} is damaged, at {error}: run the benchmark again") from error
    return values


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float = 0.1) -> BenchComparison:
    """Compare two bench.json files.

    Parameters
    ----------
    before, after
        Output of `read_bench`.
    tolerance
        Relative change up to which a ratio counts as the same, whatever the noise.
    """
    ours, theirs = dict(_ratios(after)), dict(_ratios(before))
    changes = []
    for name, (new, new_noise) in ours.items():
        if name not in theirs:
            continue
        old, old_noise = theirs[name]
        noise = float(np.hypot(old_noise, new_noise))
        moved = new / old - 1
        times = max(new / old, old / new) - 1  # symmetric: halving and doubling count alike
        same = abs(moved) <= tolerance or times <= 2 * noise
        changes.append(Change(name, old, new, noise, "same" if same else "better" if moved > 0 else "worse"))
    differences = [
        f"{name}: {before.get(part, {}).get(name)} before, {after.get(part, {}).get(name)} now"
        for part in ("machine", "versions", "model", "images")
        for name in sorted({*before.get(part, {}), *after.get(part, {})})
        if before.get(part, {}).get(name) != after.get(part, {}).get(name)
    ]
    return BenchComparison(
        changes,
        [name for name in theirs if name not in ours],
        [name for name in ours if name not in theirs],
        differences,
    )


def _ratios(values: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield name, (ratio, relative noise) for every ratio."""
    for stage in values["stages"]:
        noise = np.hypot(_noise(stage["ours"]), _noise(stage["notebook"]))
        yield f"{stage['name']}, compared with the notebook's way", (stage["ratio"], float(noise))
    whole = values["pipeline"]
    if whole:
        spread = _noise(whole["whole"])
        yield "files to CSV, share of the ceiling", (whole["share_of_ceiling"], spread)
        for name, peer in whole["peers"].items():
            yield f"files to CSV, compared with {name}", (peer["ratio"], float(np.hypot(spread, _noise(peer))))
    for measured in values["postprocess"]:
        for peer in measured["peers"]:
            ratio = peer["ratio"]
            spread = (peer["high"] - peer["low"]) / ratio
            what = f"post-processing {measured['kind']}, {measured['form']}, compared with {peer['name']}"
            yield what, (ratio, spread)
    host = values.get("host")
    if host:
        spread = _widest(host["handover"].values())
        yield "host, slowest batch size compared with the fastest", (host["evenness"], spread)
        for size, one in host["postprocess"].items():
            noise = float(np.hypot(_noise(one["alone"]), _noise(one["pipeline"])))
            yield f"host, batch {size}, compared with post-processing alone", (one["share"], noise)
        yield "host, three stages compared with one", (host["overlap"]["share"], _noise(host["overlap"]["batch"]))
    if values["search"]:
        yield "search, compared with nested loops", (values["search"]["ratio"], 0.0)


def _widest(timings: Iterable[dict[str, Any]]) -> float:
    return max(map(_noise, timings))


def _noise(timing: dict[str, Any]) -> float:
    return float(timing["iqr_s"] / timing["median_s"])
