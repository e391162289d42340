"""Steps of `cloudrt.bench.gpu` that run the pipeline: its rate, running out of memory, and decoding on the GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
import numpy as np

from cloudrt.data.scenes import make_samples
from cloudrt.engines.binding import open_gpu
from cloudrt.engines.gpu_images import GpuImages
from cloudrt.engines.libraries import load_libraries
from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.engines.plan import Plan
from cloudrt.engines.pool import EnginePool
from cloudrt.engines.trial import measure_rate
from cloudrt.engines.widen import widen
from cloudrt.errors import MemoryExhausted, ProviderError
from cloudrt.images.gpu_decode import BACKENDS, INSTALL, GpuJpegDecoder
from cloudrt.images.headers import MAX_PIXELS
from cloudrt.images.image import ImageFile, is_plain_jpeg, load_image
from cloudrt.images.image import decode as decode_image
from cloudrt.images.resize import resize
from cloudrt.inference.pipeline import Segmenter
from cloudrt.model.onnx_file import load_model
from cloudrt.options import MAX_BATCH, RunOptions
from cloudrt.system.cuda import CudaDevice

from .gpu_task import GpuTask, NotRun, Part, Values, make_batch, measure_images_per_s
from .measure import write_ours
from .pipeline import measure_pipeline
from .workload import make_workload, repeat_images


def pipeline(task: GpuTask) -> Iterator[Part]:
    """The whole pipeline and each stage alone, for each set of images."""
    for name, files in task.image_sets().items():
        yield name, partial(measure_whole, task, files, "cpu")


def measure_whole(task: GpuTask, files: list[ImageFile], decoder: str) -> Values:
    """Return the rates from files to CSV and of each stage alone, and statistics of the stages."""
    options = RunOptions(provider=task.provider, batch_size=task.choose(0, 2), decoder=decoder)
    spent: list[float] = []
    with TemporaryDirectory(dir=task.scratch) as folder, Segmenter(task.model, options) as segmenter:
        work = make_workload(segmenter, files[:256], Path(folder))
        count = task.choose(4096, 4)
        work = replace(
            work,
            files=repeat_images(work.files, count),
            loaded=list(islice(cycle(work.loaded), count)),
            maps=list(islice(cycle(work.maps), count)),
        )
        opened = segmenter.pool.engines[0]
        alone = {"infer": measure_rate(opened, make_batch(segmenter.batch_size, work.artifact.input_size))}

        def whole() -> None:
            began = perf_counter()
            write_ours(work)
            spent.append(perf_counter() - began)

        times = measure_pipeline(work, whole, {}, task.choose(3, 1), lambda: None)
        stages = {name: stage.to_dict(sum(spent)) for name, stage in segmenter.stats.stages.items()}
        plan = segmenter.plan.describe()
    rate = 1 / times.whole.median
    on_cpu = ["decode", "post-process"] if decoder == "cpu" else ["post-process"]
    alone |= {name: 1 / times.stages[name].median for name in on_cpu}
    slowest = min(alone, key=lambda name: alone[name])
    limiting = max(stages, key=lambda name: stages[name]["load"])
    return {
        "result": f"{rate:,.0f} images/s; {rate / alone['infer']:.2f} of the engine alone, "
        f"{rate / alone[slowest]:.2f} of the slowest stage alone ({slowest}); limited by {limiting}",
        "plan": plan,
        "decoder": decoder,
        "images": count,
        "distinct_images": min(len(files), 256),
        "images_per_s": rate,
        "alone_images_per_s": alone,
        "share_of_engine": rate / alone["infer"],
        "share_of_slowest": rate / alone[slowest],
        "limiting_stage": limiting,
        "stages": stages,
        "timings": times.to_dict(),
    }


def memory(task: GpuTask) -> Iterator[Part]:
    """Another process takes the memory during a run: batches must be halved, and no image lost."""
    for pinned in (True, False):
        yield "pinned copies" if pinned else "copies by ONNX Runtime", partial(_run_out, task, pinned)


def _run_out(task: GpuTask, pinned: bool) -> Values:
    """Run small batches, then large ones, for which there is not enough memory.

    With pinned copies a batch that is too large fails when its engine opens; without, when it is run.
    """
    small, large = task.choose((8, 512), (1, 8))
    _, artifact = task.load()
    pictures = list(islice(cycle(make_samples(16, artifact.input_size, task.threads)), 3 * large))
    device = task.open_device()
    free = device.free_memory if isinstance(device, CudaDevice) else lambda: 0
    before = free()
    with Segmenter(task.model, provider=task.provider, plan=Plan(task.provider, small, pinned=pinned)) as segmenter:
        limit = _limit_batches(segmenter) if task.stand_in else None
        results = segmenter.predict(pictures)
        found = list(islice(results, small))
        used = before - free()
        with ExitStack() as stack:
            if limit:
                limit[0], held = large // 4, 0
            else:
                held = stack.enter_context(_hold_memory(used))
            segmenter.pool.resize(large)
            found += results
        end = segmenter.batch_size
    with Segmenter(task.model, provider=task.provider, plan=Plan(task.provider, small)) as segmenter:
        wanted = list(segmenter.predict(pictures))
    sound = [one for one in found if one.error is None]
    same = sum(one.rle == other.rle for one, other in zip(found, wanted, strict=False))
    values = {
        "result": f"batch {large} became {end}; {len(sound)} of {len(pictures)} images; {same} with the same rows",
        "batch_sizes": [small, large, end],
        "images": len(pictures),
        "results": len(found),
        "failed": len(found) - len(sound),
        "same_rows": same,
        "held_bytes": held,
        "used_bytes": used,
    }
    if len(sound) < len(pictures):
        return values | {"error": f"{len(pictures) - len(sound)} of {len(pictures)} images are lost"}
    return values | ({"error": f"batches of {large} fitted: nothing was halved"} if end == large else {})


@contextmanager
def _hold_memory(room: int) -> Iterator[int]:
    """Let another process allocate the GPU's memory except `room` bytes; yield the number of bytes allocated."""
    code = "import sys; from cloudrt.bench.gpu_pipeline import hold; hold(int(sys.argv[1]))"
    command = [sys.executable, "-P", "-c", code, str(room)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        line = holder.stdout.readline()
        if not line.strip().isdigit():
            raise ProviderError("the process that allocates the GPU's memory failed")
        yield int(line)


def hold(room: int) -> None:
    """Allocate the memory of GPU 0 except `room` bytes, print the number of bytes, and keep them until stdin closes."""
    load_libraries("cuda")
    gpu, pieces = open_gpu(0), []
    size = piece = gpu.free_memory() - room
    while (piece := min(piece, gpu.free_memory() - room)) > 2**24:
        try:
            pieces.append(gpu.allocate(piece))
        except RuntimeError:
            piece //= 2
    click.echo(size - max(0, gpu.free_memory() - room))
    sys.stdin.read()


def _limit_batches(segmenter: Segmenter) -> list[int]:
    """Replace the engines by CPU engines that refuse batches larger than the first value of the returned list."""
    limit = [MAX_BATCH]
    model, artifact, threads = segmenter.model, segmenter.artifact, segmenter.threads

    class Short(OrtEngine):
        def run(self, batch: Any) -> Any:
            if len(batch) > limit[0]:
                raise MemoryExhausted(f"the stand-in has no memory for a batch of {len(batch)}")
            return super().run(batch)

    loaded, size = widen(load_model(model)), segmenter.batch_size
    segmenter.pool.close()
    segmenter.pool = EnginePool(lambda _, size: Short(loaded, artifact, "cpu", size, threads), (0,), size)
    return limit


def decode(task: GpuTask) -> Iterator[Part]:
    """Decoding on the CPU and with nvImageCodec, kept on the device or copied back; the pipeline with --decoder gpu."""
    for name, files in task.image_sets().items():
        yield f"{name}, CPU threads", partial(_decode_on_cpu, task, files)
        for backends in task.choose([*((one,) for one in BACKENDS), BACKENDS], [("cpu",)]):
            yield f"{name}, nvImageCodec {' and '.join(backends)}", partial(_decode_on_gpu, task, files, backends)
        yield f"{name}, pipeline with --decoder gpu", partial(_decode_in_pipeline, task, files)


def _decode_on_cpu(task: GpuTask, files: list[ImageFile]) -> Values:
    _, artifact = task.load()
    chosen = repeat_images(files, task.choose(512, 4))
    with ThreadPoolExecutor(task.threads) as threads:

        def run(times: int) -> float:
            began = perf_counter()
            for _ in range(times):
                list(threads.map(lambda file: load_image(file.path, artifact.input_size), chosen))
            return perf_counter() - began

        rate = measure_images_per_s(run, len(chosen))
    return {"result": f"{rate:,.0f} images/s", "images_per_s": rate, "threads": task.threads}


def _decode_on_gpu(task: GpuTask, files: list[ImageFile], backends: tuple[str, ...]) -> Values:
    """Return images/s for each number of JPEGs per call, and the difference from a full decode on the CPU."""
    if find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None:
        raise NotRun(f"nvImageCodec is not installed: {INSTALL}")
    size = task.load()[1].input_size
    paths = {file.path: content for file in files[:256] if is_plain_jpeg(content := file.path.read_bytes(), MAX_PIXELS)}
    if not paths:
        raise NotRun("no image is a plain JPEG")
    decoder = GpuJpegDecoder(0, task.threads, backends=backends, on_cpu=task.stand_in)
    images = GpuImages(size, decoder, task.open_device())
    rates: dict[str, float] = {}
    for count in task.choose((16, 64, 256), (2,)):
        jpegs = list(islice(cycle(paths.values()), count))
        kept, copied = images.empty(count), np.zeros((count, *size, 3), np.uint8)
        for where, batch in (("kept on the device", kept), ("copied back", copied)):

            def run(times: int, jpegs: list[bytes] = jpegs, batch: Any = batch) -> float:
                began = perf_counter()
                for _ in range(times):
                    done = images.decode(jpegs, batch, range(len(jpegs)))
                if not all(done):
                    raise ProviderError(f"{done.count(False)} of {len(done)} JPEGs were not decoded")
                return perf_counter() - began

            rates[f"{count} at once, {where}"] = measure_images_per_s(run, count)
    differences = [
        np.abs(copied[row].astype(int) - resize(decode_image(path.read_bytes()), size)).mean()
        for row, path in zip(range(count), paths, strict=False)
    ]
    best = max(rates, key=lambda name: rates[name])
    return {
        "result": f"{rates[best]:,.0f} images/s, {best}; {np.mean(differences):.2f} levels from the CPU's full decode",
        "images_per_s": rates,
        "mean_difference": float(np.mean(differences)),
    }


def _decode_in_pipeline(task: GpuTask, files: list[ImageFile]) -> Values:
    task.require_gpu()
    return measure_whole(task, files, "gpu")
