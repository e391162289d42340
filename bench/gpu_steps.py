"""The first steps of `cloudrt.bench.gpu`: installation, results, and the engine."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cloudrt.data.scenes import make_samples
from cloudrt.doctor import diagnose
from cloudrt.engines.availability import ORT_NAMES
from cloudrt.engines.base import EngineOptions
from cloudrt.engines.binding import Binding
from cloudrt.engines.choice import open_engine
from cloudrt.engines.libraries import load_libraries
from cloudrt.engines.plan import Plan
from cloudrt.engines.session import open_session, provider_options, session_options
from cloudrt.engines.trial import COMPARED, measure_rate
from cloudrt.engines.widen import widen
from cloudrt.errors import ProviderError
from cloudrt.images.image import Image, load_image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.model.artifact import write_metadata
from cloudrt.model.onnx_file import artifact_bytes, graph_bytes
from cloudrt.model.parity import TOLERANCES, ParityAccumulator, ReferenceOutputs, default_rules
from cloudrt.system.cuda import Arena

from .gpu_task import GpuTask, NotRun, Part, Values, make_batch, measure_images_per_s
from .workload import infer, repeat_images

SETTINGS: dict[str, dict[str, Any]] = {
    "one stream": {},
    "two streams": {"streams": 2},
    "CUDA graph": {"cuda_graph": True},
    "channels last": {"channels_last": True},
    "channels last, two streams": {"channels_last": True, "streams": 2},
    "channels last, CUDA graph": {"channels_last": True, "cuda_graph": True},
}
"""Settings of an engine that are compared."""


def install(task: GpuTask) -> Iterator[Part]:
    """What works on this machine, and which provider runs which nodes."""
    found = cache(diagnose)
    yield "doctor", lambda: _diagnosis(found())
    yield "provider", lambda: _require(found(), task.provider)
    for precision in ("fp16", "fp32"):
        yield f"placement, {precision}", partial(_place, task, precision)


def _diagnosis(found: Any) -> Values:
    works = [state.name for state in found.providers if state.works]
    return {
        "result": f"works: {', '.join(works)}",
        "providers": [asdict(state) for state in found.providers],
        "conflicts": list(found.conflicts),
        "advice": list(found.advice),
    }


def _require(found: Any, provider: str) -> Values:
    state = next(one for one in found.providers if one.name == provider)
    if not state.works:
        raise ProviderError(f"{provider} does not work here: {state.reason}: {state.remedy}")
    return {"result": f"{provider} works"}


def _place(task: GpuTask, precision: str) -> Values:
    """Return how many nodes each provider of ONNX Runtime runs, and which operators run on the CPU."""
    model, artifact = in_precision(task, precision)
    content, size = graph_bytes(model), task.choose(32, 2)
    load_libraries(task.provider)
    options = session_options(task.provider, size, task.threads)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen = (ORT_NAMES[task.provider], provider_options(task.provider, artifact, size, content))
    session = onnxruntime.InferenceSession(content, options, providers=[chosen], enable_fallback=0)
    placed = [
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    nodes = Counter(provider for provider, _ in placed)
    return {
        "result": ", ".join(f"{count} nodes on {provider}" for provider, count in nodes.items()),
        "nodes": nodes,
        "operators_on_cpu": Counter(kind for provider, kind in placed if provider == ORT_NAMES["cpu"]),
    }


def in_precision(task: GpuTask, precision: str) -> tuple[Any, Any]:
    """Return the model and its metadata in a precision: as it is, or an fp16 artifact widened to fp32."""
    model, artifact = task.load()
    if artifact.precision == precision:
        return model, artifact
    if (artifact.precision, precision) != ("fp16", "fp32"):
        raise NotRun(f"the artifact is {artifact.precision}, not {precision}")
    wide, artifact = widen(model), replace(artifact, precision="fp32")
    write_metadata(wide, artifact)
    return wide, artifact


def answers(task: GpuTask) -> Iterator[Part]:
    """Tests that need a GPU, and the parity of the artifact with ONNX Runtime's CPU provider in fp32."""
    yield "tests marked cuda", partial(_run_tests, task)
    reference = cache(partial(_find_outputs, task))
    for precision in ("fp16", "fp32"):
        for name, setting in SETTINGS.items():
            yield f"{precision}, {name}", partial(_compare, task, precision, setting, reference)


def _run_tests(task: GpuTask) -> Values:
    root = Path(__file__).resolve().parents[1]
    if not (root / "tests" / "conftest.py").is_file():
        raise NotRun("no checkout: the tests are not installed")
    if find_spec("pytest") is None:
        raise NotRun("pytest is not installed")
    task.require_gpu()  # they would all be skipped
    files = [str(path) for path in sorted((root / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-rfEs", "--color=no", *files]
    limit = task.seconds * 0.6
    try:
        done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        click.echo(error.stdout or "")  # which test did not end
        raise
    click.echo(done.stdout)
    last = (done.stdout.splitlines() or ["no output"])[-1].strip("= ")
    return {"result": last} | ({"error": last} if done.returncode else {})


def _find_outputs(task: GpuTask) -> tuple[ReferenceOutputs, list[Image]]:
    """Return the outputs of ONNX Runtime's CPU provider in fp32, and the images."""
    _, artifact = task.load()
    count = task.choose(COMPARED, 4)
    if task.images:
        files = [file for files in task.image_sets().values() for file in files]
        images = [load_image(file.path, artifact.input_size) for file in repeat_images(files, count)]
    else:
        images = list(make_samples(count, artifact.input_size, task.threads))
    with Segmenter(task.model, provider="cpu", plan=Plan("cpu", 4)) as segmenter:
        levels, presence = zip(*infer(segmenter, images), strict=True)
    reference = ReferenceOutputs(
        names=[str(number) for number in range(count)],
        levels=np.stack(levels),
        rules=artifact.rules or default_rules(len(artifact.labels.classes)),
        has_rules=bool(artifact.rules),
        grid=artifact.labels.submit_grid,
        source="given images" if task.images else "synthetic images",
        presence=np.stack(presence) if presence[0] is not None else None,
    )
    return reference, images


def _compare(
    task: GpuTask,
    precision: str,
    setting: dict[str, Any],
    reference: Callable[[], tuple[ReferenceOutputs, list[Image]]],
) -> Values:
    task.require_gpu(unless=setting.keys() <= {"streams"})
    model, _ = in_precision(task, precision)
    path = Path(task.scratch) / f"{precision}.onnx"
    path.write_bytes(artifact_bytes(model))
    wanted, images = reference()
    with Segmenter(path, provider=task.provider, plan=Plan(task.provider, task.choose(32, 2), **setting)) as segmenter:
        tally = ParityAccumulator(wanted)
        for position, (levels, presence) in enumerate(infer(segmenter, images)):
            tally.add(position, levels, presence)
    parity = tally.lower_bound(task.provider)
    faults = "; ".join(parity.faults(TOLERANCES[precision]))
    result = f"Dice {parity.dice:.5f}, mean difference {parity.mean_difference:.4f} levels, {parity.images} images"
    return {"result": result} | parity.to_dict() | ({"error": faults} if faults else {})


def engine(task: GpuTask) -> Iterator[Part]:
    """The engine's rate for each batch size and setting, with and without copies between host and device."""
    for size in task.choose((32, 128, 8), (1, 2)):
        for name, setting in SETTINGS.items():
            yield f"batch {size}, {name}", partial(_rates, task, size, setting)


def _rates(task: GpuTask, size: int, setting: dict[str, Any]) -> Values:
    task.require_gpu(unless=setting.keys() <= {"streams"})
    model, artifact = task.load()
    options = EngineOptions(**setting)
    batch = make_batch(size, artifact.input_size)
    found = {}
    with open_engine(model, task.provider, size, task.threads, options) as opened:
        found["with_copies"] = measure_rate(opened, batch)
    found["without_copies"] = _compute_alone(task, size, options, batch)
    if not options.cuda_graph and not task.stand_in:
        with open_engine(model, task.provider, size, task.threads, replace(options, pinned=False)) as opened:
            found["copies_by_onnxruntime"] = measure_rate(opened, batch)
    result = ", ".join(f"{rate:,.0f} images/s {name.replace('_', ' ')}" for name, rate in found.items())
    return {"result": result, "batch_size": size, **setting, "images_per_s": found}


def _compute_alone(task: GpuTask, size: int, options: EngineOptions, batch: NDArray[np.uint8]) -> float:
    """Return images/s of a session whose batches are already on the device."""
    model, artifact = task.load()
    content = graph_bytes(widen(model) if task.stand_in else model)
    session = open_session(content, artifact, task.provider, size, task.threads, options)
    device = task.open_device()
    arena = Arena(device.allocate_host)
    with ExitStack() as stack:
        # A CUDA graph belongs to the thread that recorded it.
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(options.streams)]
        bindings = []
        for number, thread in enumerate(threads):
            graph = number if options.cuda_graph else None
            bindings.append(Binding(session, artifact, size, device, arena, graph))
            thread.submit(bindings[-1].warm_up, lambda work: work()).result()
            thread.submit(bindings[-1].run, batch).result()

        def loop(binding: Binding, times: int) -> None:
            for _ in range(times):
                binding.compute()

        def run(times: int) -> float:
            began = perf_counter()
            for done in [one.submit(loop, each, times) for one, each in zip(threads, bindings, strict=True)]:
                done.result()
            return perf_counter() - began

        return measure_images_per_s(run, size * options.streams)
