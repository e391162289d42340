"""Steps of `cloudrt.bench.gpu`: other runtimes (PyTorch, TensorRT), and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from cloudrt.data.synth import write_dataset
from cloudrt.engines.availability import problem
from cloudrt.engines.base import EngineOptions
from cloudrt.engines.choice import int8_problem, open_engine
from cloudrt.engines.trial import measure_rate
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.run import infer
from cloudrt.masks.metric import score
from cloudrt.model.artifact import read_artifact
from cloudrt.model.parity import TOLERANCES
from cloudrt.options import TENSORRT_PROVIDERS
from cloudrt.system.progress import Advance, progress_bar

from .gpu_task import GpuTask, NotRun, Part, Values, make_batch, measure_images_per_s
from .networks import TorchGraph, load_ensemble, make_ensemble

TEST_IMAGES = 64
"""Number of images that are segmented in TensorRT."""
WARM_UP = 10
"""Number of batches of training before the clock starts: torch.compile compiles in the first."""
FINISH_S = 60
"""Seconds reserved for the last validation and the search of rules."""


def pytorch(task: GpuTask) -> Iterator[Part]:
    """The network in PyTorch, fp16 and channels last, eager and compiled, and the engine at the same batch size."""
    size = task.choose(32, 2)
    ours = cache(partial(_our_rate, task, size))
    yield "cloudrt", ours
    for compiled in (False, True):
        yield "PyTorch torch.compile" if compiled else "PyTorch eager", partial(_torch_rate, task, size, compiled, ours)


def _our_rate(task: GpuTask, size: int) -> Values:
    model, artifact = task.load()
    rates = {}
    for layout in task.choose((False, True), (False,)):
        with open_engine(model, task.provider, size, task.threads, EngineOptions(channels_last=layout)) as engine:
            rates["channels last" if layout else "default"] = measure_rate(
                engine, make_batch(size, artifact.input_size)
            )
    best = max(rates, key=lambda name: rates[name])
    return {"result": f"{rates[best]:,.0f} images/s, {best}", "batch_size": size, "images_per_s": rates[best]}


def _torch_rate(task: GpuTask, size: int, compiled: bool, ours: Any) -> Values:
    if compiled and task.stand_in:
        raise NotRun("no GPU, and torch.compile takes minutes on a CPU")
    model, artifact = task.load()
    ensemble = load_ensemble(task.checkpoints, artifact) if task.checkpoints else make_ensemble(model, artifact)
    network = TorchGraph(ensemble, task.choose("cuda", "cpu"), compiled, task.threads)
    torch, batch = network.torch, make_batch(size, artifact.input_size)
    on_device = torch.from_numpy(batch).to(network.device)

    def with_copies(times: int) -> float:
        began = perf_counter()
        for _ in range(times):
            network.run(batch)
        return perf_counter() - began

    def without_copies(times: int) -> float:
        began = perf_counter()
        for _ in range(times):
            network.compute(on_device)
        if not task.stand_in:
            torch.cuda.synchronize()
        return perf_counter() - began

    rates = {
        "with_copies": measure_images_per_s(with_copies, size),
        "without_copies": measure_images_per_s(without_copies, size),
    }
    ratio = ours()["images_per_s"] / rates["with_copies"]
    return {
        "result": f"{rates['with_copies']:,.1f} images/s with copies, {rates['without_copies']:,.1f} without; "
        f"cloudrt is {ratio:.2f} times as fast",
        "name": network.name.rpartition(",")[0],
        "batch_size": size,
        "images_per_s": rates,
        "ratio": ratio,
        "weights": "of the checkpoint" if task.checkpoints else "random",
    }


def tensorrt(task: GpuTask) -> Iterator[Part]:
    """TensorRT, if it is installed: the submission compared with the CPU's, the engine cache, and the rate.

    With a checkpoint, it is exported in fp16 and int8, with the gate in TensorRT.
    """
    reference = cache(partial(_cpu_submission, task))
    for provider in task.choose(TENSORRT_PROVIDERS, ("cpu",)):
        for precision in ("fp16", "int8") if task.checkpoints else ("",):
            name = f"{provider}, {precision or 'the artifact'}"
            yield name, partial(_run_tensorrt, task, provider, precision, reference)


def _tensorrt_images(task: GpuTask) -> list[Path]:
    images = [file.path for file in next(iter(task.image_sets().values()))]
    return images[:: -(-len(images) // task.choose(TEST_IMAGES, 2))]


def _cpu_submission(task: GpuTask) -> Path:
    """Return the submission of ONNX Runtime's CPU provider, in fp32 if there is a checkpoint."""
    model = _export(task, "cpu", "fp32")[0] if task.checkpoints else Path(task.model)
    path = Path(task.scratch) / "cpu.csv"
    infer(_tensorrt_images(task), path, model, provider="cpu", batch_size=task.choose(32, 2), overwrite=True)
    return path


def _run_tensorrt(task: GpuTask, provider: str, precision: str, reference: Callable[[], Path]) -> Values:
    """Run an artifact twice and compare the bytes.

    The first run builds an engine, unless the gate of the export or an earlier use of the cache has built it.
    """
    reason = problem(provider)
    if reason:
        raise NotRun(reason)
    images = _tensorrt_images(task)
    model = Path(task.model)
    values: Values = {}
    if precision:
        model, values = _export(task, provider, precision)
    artifact = read_artifact(model)
    if int8_problem(provider, artifact):
        return values | {"result": "exported", "not_run": int8_problem(provider, artifact)}
    seconds = {}
    folder = Path(task.scratch)
    files = {name: folder / f"{provider}-{name}.csv" for name in ("first", "again")}
    for name, path in files.items():
        began = perf_counter()
        infer(images, path, model, provider=provider, batch_size=task.choose(32, 2), overwrite=True)
        seconds[name] = perf_counter() - began
    with Segmenter(model, provider=provider, batch_size=task.choose(32, 2)) as segmenter:
        batch = make_batch(segmenter.batch_size, artifact.input_size)
        rate = measure_rate(segmenter.pool.engines[0], batch)
        plan = segmenter.plan.describe()
    labels = artifact.labels
    dice = score(files["first"], reference(), labels, labels.submit_grid).mean
    identical = files["first"].read_bytes() == files["again"].read_bytes()
    least = TOLERANCES[artifact.precision].dice
    values |= {
        "result": f"{rate:,.0f} images/s; Dice with the CPU's submission {dice:.4f}; "
        f"first run {seconds['first']:.1f} s, second {seconds['again']:.1f} s",
        "precision": artifact.precision,
        "plan": plan,
        "images": len(images),
        "images_per_s": rate,
        "dice": dice,
        "same_bytes": identical,
        "seconds": seconds,
    }
    if dice < least or not identical:
        values["error"] = (
            f"Dice {dice:.4f}, expected at least {least}" if dice < least else "the second run gave other bytes"
        )
    return values


def _export(task: GpuTask, provider: str, precision: str) -> tuple[Path, Values]:
    """Export the checkpoint with the gate in a provider; return the artifact and the gate's figures."""
    from cloudrt.export.request import ExportRequest
    from cloudrt.export.run import run_export
    from cloudrt.export.source import SourceOptions

    load_ensemble(task.checkpoints, task.load()[1])  # they are those of the artifact
    output = Path(task.scratch) / f"{provider}-{precision}.onnx"
    data = Path(task.images[0]) if task.images else None
    options = SourceOptions(tta=task.load()[1].tta, data=data, max_images=task.choose(TEST_IMAGES, 2))
    request = ExportRequest(
        tuple(map(Path, task.checkpoints)),
        output,
        precision=precision,
        int8_target="tensorrt" if precision == "int8" else "cpu",
        provider=provider,
        options=options,
        overwrite=True,
    )
    done = run_export(request, progress_bar, lambda _: None)
    return output, {"gate": done.written[0].parity.to_dict()}


def training(task: GpuTask) -> Iterator[Part]:
    """Training in bf16 with and without torch.compile, then the model's network for the rest of the time."""
    began = perf_counter()
    for compiled in (False, True):
        name = f"notebook's network, bf16{', torch.compile' if compiled else ''}"
        yield name, partial(_train, task, {"compile": compiled, "batch_size": 32}, task.seconds / 4)

    def rest() -> Values:
        _, artifact = task.load()
        network = {
            "architecture": artifact.architecture,
            "encoder": artifact.encoder,
            "options": artifact.options,
            "input_size": artifact.input_size,
            "init": task.checkpoints[0] if task.checkpoints else "",
            "batch_size": task.choose(64, 2),
        }
        left = task.seconds - (perf_counter() - began) - task.choose(FINISH_S, 0)
        return _train(task, network, left, "the model's network")

    yield "the model's network, the rest of the time", rest


def _train(task: GpuTask, settings: dict[str, Any], seconds: float, name: str = "") -> Values:
    """Train for some time, and return the rate after the first batches; a run with a name is kept in `task.out`.

    The time budget of the training is half of `seconds`, because validation takes time, too.
    """
    if not name:
        task.require_gpu()
    if seconds < 1:
        raise NotRun("no time left")
    from cloudrt.train.config import TrainConfig
    from cloudrt.train.loop import train

    config = replace(
        TrainConfig(),
        encoder_weights="none",
        epochs=task.choose(1000, 1),
        accumulate=1,
        schedule="cosine",
        precision=task.choose("bf16", "auto"),
        device=task.choose("cuda", "cpu"),
        workers=task.choose(min(8, task.threads), 0),
        time_budget=task.choose(seconds / 2, 0.0),
        **settings,
    )
    data = Path(task.data) if task.data else Path(task.scratch) / "data"
    if not data.is_dir():
        write_dataset(data, task.choose(400, 8), task.choose((350, 525), (140, 210)))
    folder = Path(task.out if name else task.scratch) / f"training{'' if name else '-compiled' * config.compile}"
    clock, dice = _Clock(perf_counter() + seconds), None
    try:
        dice = train(config, data, folder, Path(task.scratch) / "cache", clock.bar).dice
    except _TimeUp:
        click.echo("stopped after the time of this part")
    rate = clock.images_per_s()
    values = {
        "result": f"{rate:,.1f} images/s" + (f"; held-out Dice {dice:.4f}" if dice is not None else ""),
        "images_per_s": rate,
        "network": f"{config.architecture} with {config.encoder}",
        "input_size": list(config.input_size),
        "batch_size": config.batch_size,
        "precision": config.precision,
        "compiled": config.compile,
        "seconds": seconds,
        "images": sum(count for epoch in clock.epochs for _, count in epoch),
        "dice": dice,
    }
    return values if rate else values | {"error": f"fewer than two batches in {seconds:.0f} s"}


class _TimeUp(Exception):
    """Ends a training."""


class _Clock:
    """Records when the batches of each epoch are done, and ends the training after `deadline`."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.epochs: list[list[tuple[float, int]]] = []

    @contextmanager
    def bar(self, description: str, _total: int) -> Iterator[Advance]:
        """Show nothing; record the batches of epochs."""
        noted: list[tuple[float, int]] = []
        if description.startswith("Epoch"):
            self.epochs.append(noted)

        def advance(n: int = 1, **_: Any) -> None:
            noted.append((perf_counter(), n))
            if perf_counter() > self.deadline:
                raise _TimeUp

        yield advance
        noted.append((perf_counter(), 0))  # the end of the epoch, which synchronises with the device

    def images_per_s(self) -> float:
        """Return the rate without the first `WARM_UP` batches, if there are more, and without validation."""
        first, *others = self.epochs or [[]]
        chosen = [first[WARM_UP:] if len(first) > WARM_UP + 1 else first, *others]
        images = sum(count for epoch in chosen for _, count in epoch[1:])
        seconds = sum(epoch[-1][0] - epoch[0][0] for epoch in chosen if epoch)
        return images / seconds if seconds else 0.0
