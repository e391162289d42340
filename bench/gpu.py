"""Check and measure cloudrt on a GPU: one command for everything that the tests cannot run without a GPU.

    python -m cloudrt.bench.gpu OUT [--minutes 25] [--model M] [--checkpoint PTH]... [--image-folder F]... [--data F]
    python -m cloudrt.bench.gpu OUT --stand-in      without a GPU: on the CPU instead, with small batches

Each step runs in its own process, which is stopped at its time limit, so that a crash or hang of CUDA affects only one
step. NAME.json and NAME.log are written to OUT after each step, and summary.md at the end.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cloudrt.errors import DataError, ProviderError
from cloudrt.model.artifact import default_model, read_artifact
from cloudrt.system.files import sha256
from cloudrt.system.machine import describe_machine
from cloudrt.system.nvidia import nvidia_driver
from cloudrt.system.paths import check_outputs
from cloudrt.system.terminal import reports_errors
from cloudrt.system.versions import package_versions

from .gpu_process import GpuStep, run_steps
from .gpu_task import GpuTask
from .machine import machine, versions

LIBRARIES = (
    *("nvidia-cudnn-cu13", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "tensorrt-cu13", "tensorrt"),
    *("onnxruntime-ep-nv-tensorrt-rtx-cu13", "segmentation-models-pytorch"),
)
STEPS = (
    GpuStep("install", "what works, and the placement of nodes", 4, "gpu_steps"),
    GpuStep("answers", "tests that need a GPU, and parity with the CPU in fp32", 5, "gpu_steps"),
    GpuStep("engine", "the engine for each batch size and setting", 4, "gpu_steps"),
    GpuStep("pipeline", "files to submission, and the limiting stage", 4, "gpu_pipeline"),
    GpuStep("memory", "running out of memory during a run", 2, "gpu_pipeline"),
    GpuStep("decode", "decoding with nvImageCodec", 2, "gpu_pipeline"),
    GpuStep("pytorch", "PyTorch at the same batch size", 3, "gpu_peers"),
    GpuStep("tensorrt", "TensorRT", 6, "gpu_peers"),
    GpuStep("training", "training, in the remaining time", 3, "gpu_peers"),
)
"""In order of importance. The remaining time is divided among the remaining steps in proportion to `minutes`, so that a
step that ends early leaves time for later ones."""


def describe_run(task: GpuTask, command: list[str]) -> dict[str, Any]:
    """Return the fields that every record begins with: command, device, model, machine, driver and versions."""
    driver, found = nvidia_driver(), describe_machine()
    gpus = list(driver.gpus) if driver else []
    artifact = read_artifact(task.model)
    return {
        "command": " ".join(command),
        "stand_in": task.stand_in,
        "provider": task.provider,
        "device": found.cpu if task.stand_in else gpus[0],
        "model": {
            "file": Path(task.model).name,
            "sha256": sha256(task.model),
            "network": f"{artifact.architecture} with {artifact.encoder}",
            "precision": artifact.precision,
            "input_size": list(artifact.input_size),
            "tta": artifact.tta,
        },
        "machine": machine() | {"gpus": gpus},
        "driver": {
            "cuda": ".".join(map(str, driver.cuda)) if driver else "",
            "capabilities": [f"{major}.{minor}" for major, minor in driver.capabilities] if driver else [],
        },
        "versions": versions() | package_versions(*LIBRARIES),
    }


def summarise(records: Sequence[dict[str, Any]]) -> str:
    """Return the summary of a run as Markdown."""
    first = records[0]
    lines = [
        f"# cloudrt on {first['device']}",
        "",
        f"Provider {first['provider']}, {first['machine']['usable_cores']} cores, model {first['model']['file']} "
        f"({first['model']['network']}, {first['model']['precision']}).",
        *(["", "**Run on the CPU (--stand-in): these are not figures of a GPU.**"] if first["stand_in"] else []),
        *("", f"    {first['command']}", "", "| step | status | seconds | reason |", "|---|---|---|---|"),
    ]
    lines += [
        f"| {record['step']} | {record['status']} | {record.get('seconds', 0):.1f} | {_cell(record['reason'])} |"
        for record in records
    ]
    lines += ["", "| step | part | result |", "|---|---|---|"]
    for record in records:
        for name, values in record.get("results", {}).items():
            said = [values.get("result", "")]
            said += [
                f"{word}: {values[key]}" for key, word in (("error", "failed"), ("not_run", "not run")) if key in values
            ]
            lines.append(f"| {record['step']} | {name} | {_cell('; '.join(filter(None, said)))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Return a text for a cell of a table."""
    return text.replace("|", "\\|")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--minutes", type=click.FloatRange(0), default=25.0, show_default=True, help="Total time.")
@click.option(
    "--model", type=click.Path(path_type=Path), help="The artifact. Default: ./model.onnx, or the shipped one."
)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The best.pth of the artifact, which the step tensorrt exports in fp16 and int8; once for each network.",
)
@click.option(
    "--image-folder",
    "images",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of images; can be repeated. Default: synthetic images of 525x350 and of 2100x1400.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Labelled data set to train on. Default: synthetic images.",
)
@click.option("--only", multiple=True, type=click.Choice([step.name for step in STEPS]), help="Step; can be repeated.")
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run in OUT.")
@click.option("--stand-in", is_flag=True, help="Use the CPU instead of a GPU, to test this command.")
@reports_errors
def main(
    out: Path,
    minutes: float,
    model: Path | None,
    checkpoints: tuple[Path, ...],
    images: tuple[Path, ...],
    data: Path | None,
    only: tuple[str, ...],
    overwrite: bool,
    stand_in: bool,
) -> None:
    """Check and measure cloudrt on the first GPU, and write the results to OUT.

    If a step fails, the reason is recorded, the next step runs, and the exit status is 1. The steps, in order:
    installation, results, engine, pipeline, running out of memory, decoding on the GPU, PyTorch, TensorRT, training.
    """
    if not math.isfinite(minutes):
        raise DataError(f"--minutes {minutes:g} is not a finite number")
    driver = nvidia_driver()
    if not stand_in and not (driver and driver.gpus):
        raise ProviderError("no NVIDIA GPU, or no driver: run this on a GPU, or check the command with --stand-in")
    chosen = model or default_model()
    steps = [step for step in STEPS if not only or step.name in only]
    names = [*(f"{step.name}{suffix}" for step in steps for suffix in (".json", ".log")), "summary.md"]
    reads: dict[str, Path | None] = {"--model": chosen, "--data": data}
    reads |= {f"--checkpoint {number}": path for number, path in enumerate(checkpoints, 1)}
    outputs = {f"{name} of OUT": out / name for name in names}
    folders = {"training of OUT": out / "training"} if any(step.name == "training" for step in steps) else {}
    check_outputs(outputs, reads, folders=folders, overwrite=overwrite)
    words = ["python -m cloudrt.bench.gpu OUT", f"--minutes {minutes:g}", f"--model {chosen.name}"]
    words += [f"--checkpoint {path.name}" for path in checkpoints]
    words += ["--image-folder DIR"] * len(images) + ["--data DIR"] * bool(data)
    words += [f"--only {name}" for name in only] + ["--stand-in"] * stand_in
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cloudrt-gpu-", ignore_cleanup_errors=True) as scratch:
        task = GpuTask(
            model=str(chosen.resolve()),
            out=str(out.resolve()),
            scratch=scratch,
            checkpoints=tuple(str(path.resolve()) for path in checkpoints),
            images=tuple(str(one.resolve()) for one in images),
            data=str(data.resolve()) if data else "",
            stand_in=stand_in,
        )
        records = run_steps(steps, task, minutes, describe_run(task, words), click.echo)
    text = summarise(records)
    (out / "summary.md").write_text(text, encoding="utf-8")
    click.echo(f"\n{text}")
    if any(record["status"] in ("failed", "timed out") for record in records):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
