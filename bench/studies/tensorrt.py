"""Layers, engine size and build time of the artifacts that the slow tests build with TensorRT for RTX.

    pytest tests/engines/test_tensorrt_rtx.py -o junit_family=xunit1 --junitxml junit.xml
    python -m cloudrt.bench.studies.tensorrt junit.xml -o bench/results/cpu-tensorrt-rtx.json

Building needs no GPU. Build times depend on what else the machine does.
"""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import click

from .results import save


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("junit", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file.")
def tensorrt(junit: Path, output: Path | None) -> None:
    """Collect the engines that the tests recorded in JUNIT."""
    artifacts = []
    for case in ET.parse(junit).iter("testcase"):
        recorded = [one.get("value", "") for one in case.iter("property") if one.get("name") == "tensorrt"]
        named = re.search(r"\[(.+)-(fp32|fp16|int8)\]|\[(fp32|fp16|int8)-(.+)\]", case.get("name", ""))
        if recorded and named:
            form, precision = named[1] or named[4], named[2] or named[3]
            artifacts.append({"form": form, "precision": precision, **ast.literal_eval(recorded[0])})
    if not artifacts:
        raise click.UsageError(
            f"{junit} records no engines: run tests/engines/test_tensorrt_rtx.py, slow tests included"
        )
    save(
        {"artifacts": sorted(artifacts, key=lambda one: (one["form"], one["precision"]))},
        output,
        "tensorrt-rtx-cu13-libs",
    )


if __name__ == "__main__":
    tensorrt()
