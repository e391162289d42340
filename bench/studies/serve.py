"""Throughput and latency of `cloudrt serve`, relative to `cloudrt-infer` on the same images and cores.

    python -m cloudrt.bench.studies.serve IMAGES -o FILE.json

Rounds of `cloudrt-infer` and of the server alternate, each in processes of their own, with the same provider, batch
size and threads. In a round of the server, 64 clients send one image after another, each on its own connection. They
are sockets of one process, which sends prepared requests and parses only the headers of the answers, because the
clients run on the same cores: their CPU time is reported too. For the latency at half load, requests arrive at random
times at half of the measured rate; a latency counts from the time of arrival, even if all connections are busy.

With PYTHONPATH=tests and Chromium, the time of a slider's move on the page is measured too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from cloudrt.images.image import find_images
from cloudrt.inference.pipeline import Segmenter
from cloudrt.system.machine import usable_cpus

from .clients import request_of, send_all
from .results import save

CLIENTS = 64


def process_cpu_seconds(process: int) -> float:
    """Return the CPU time of a running process (proc(5))."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:13])) / 100


@contextmanager
def serving(model: Path | None, options: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Run `cloudrt serve`; yields its port and its process."""
    call = "from cloudrt.cli import main; main(prog_name='cloudrt')"
    line = [sys.executable, "-c", call, "serve", *([str(model)] if model else []), "--port", "0", *options]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        said = ""
        while not (found := re.search(r"http://\S+:(\d+): ", said)):
            read = process.stderr.readline()
            if not read:
                raise click.ClickException(said)
            said += read
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        process.wait()


def infer_round(images: Path, times: int, model: Path | None, options: dict[str, Any]) -> dict[str, float]:
    """Run `cloudrt-infer` on `times` copies of a folder, in a process of its own, after a warm-up run on the folder.

    Returns
    -------
    dict
        Images per second, without the time to open the model; CPU time per image, including that of opening the model.
    """
    code = (
        "import cloudrt, resource, sys\n"
        f"cloudrt.infer({str(images)!r}, sys.argv[1], {str(model) if model else None!r}, **{options!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF)\n"
        f"done = cloudrt.infer(sys.argv[2], sys.argv[3], {str(model) if model else None!r}, **{options!r})\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(done.images_per_second, (used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime)"
        " / done.images)"
    )
    with TemporaryDirectory() as folder:
        for number in range(times):
            (Path(folder) / "images" / str(number)).mkdir(parents=True)
            for file in find_images(images):
                (Path(folder) / "images" / str(number) / file.path.name).write_bytes(file.path.read_bytes())
        line = [sys.executable, "-c", code, f"{folder}/a.csv", f"{folder}/images", f"{folder}/b.csv"]
        rate, cpu = map(float, subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())
    return {"images_per_s": rate, "cpu_s_per_image": cpu}


def serve_round(port: int, process: int, requests: Sequence[bytes]) -> dict[str, float]:
    """Send requests of 64 clients; return images per second and CPU times per image."""
    before = process_cpu_seconds(process)
    found = send_all(port, requests, None, CLIENTS)
    server = process_cpu_seconds(process) - before
    return {
        "images_per_s": len(requests) / found["seconds"],
        "cpu_s_per_image": server / len(requests),
        "client_cpu_s_per_image": found["client_cpu_s"] / len(requests),
    }


def half_load(port: int, requests: Sequence[bytes], rate: float, seed: int = 0) -> dict[str, float]:
    """Return percentiles of the latency in ms at half of a rate, in images per second."""
    gaps = np.random.default_rng(seed).exponential(2 / rate, len(requests))
    found = send_all(port, requests, np.cumsum(gaps).tolist(), CLIENTS)
    percentiles = {f"p{one}_ms": float(np.percentile(found["latency_ms"], one)) for one in (50, 90, 99)}
    return {"images": len(requests), "images_per_s": len(requests) / found["seconds"], **percentiles}


def slider_moves(port: int, image: Path, moves: int = 40) -> dict[str, Any]:
    """Return the time in ms from a slider's move to the new outline, as the page reports it."""
    from support.chromium import browsing

    times = []
    # Processes of the browser may write after it has ended.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, browsing(Path(folder)) as page:
        page.open(f"http://127.0.0.1:{port}", 1280)
        page.choose("#files", [image])
        page.until("cards.length === 1 && cards[0].levels")
        for move in range(moves):
            level = 40 + 4 * move
            page.run(
                f"{{ const one = find('threshold-{move % 2}'); one.value = {level}; "
                "one.dispatchEvent(new Event('input')); }"
            )
            page.until("waiting.size === 0")
            times.append(float(page.run("find('time').textContent").split()[-2]))
        size = page.run("`${width}x${height}`")
    return {"grid": size, "moves": moves, "median_ms": float(np.median(times)), "largest_ms": max(times)}


@click.command()
@click.argument("images", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--model", type=click.Path(path_type=Path, exists=True))
@click.option("--provider", default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.IntRange(1), default=20, show_default=True, help="Length of a round.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(images: Path, model: Path | None, provider: str, rounds: int, seconds: int, output: Path | None) -> None:
    """Measure the server and `cloudrt-infer` on IMAGES, repeated as needed."""
    files = find_images(images)
    data = [file.path.read_bytes() for file in files]
    with Segmenter(model, provider=provider) as segmenter:
        plan, size = segmenter.plan.describe(), segmenter.batch_size
    load = os.getloadavg()[0]  # of the last minute: other programs make the rates lower and less certain
    options = {"provider": provider, "batch_size": size}
    words = ["--provider", provider, "--batch-size", str(size)]
    inferred, served = [], []
    requests = [request_of(one) for one in data]
    with serving(model, words) as (port, process):
        rate = serve_round(port, process, requests[:CLIENTS] * 4)["images_per_s"]
        count = max(1, round(rate * seconds / len(requests)))
        for _ in range(rounds):
            inferred.append(infer_round(images, count, model, options))
            served.append(serve_round(port, process, requests * count))
            click.echo(f"cloudrt-infer {inferred[-1]}\nserver {served[-1]}", err=True)
        rate = float(np.median([one["images_per_s"] for one in served]))
        latency = half_load(port, requests * count, rate)
        page = slider_moves(port, files[0].path) if find_spec("support") else None
    ratios = [theirs["images_per_s"] / ours["images_per_s"] for theirs, ours in zip(served, inferred, strict=True)]
    busy = float(np.median([one["client_cpu_s_per_image"] for one in served]))
    cores = usable_cpus()
    alone = 1 / (1 / rate - busy / cores)
    plain = float(np.median([one["images_per_s"] for one in inferred]))
    lengths = ["--rounds", str(rounds), "--seconds", str(seconds)]
    found = {
        "command": ["python", "-m", "cloudrt.bench.studies.serve", "IMAGES", "--provider", provider, *lengths],
        "plan": plan,
        "images": len(files),
        "mean_bytes": round(float(np.mean([len(one) for one in data]))),
        "clients": CLIENTS,
        "infer": inferred,
        "serve": served,
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
        "ratio_without_the_clients_cpu": alone / plain,
        "cpu_ratio": float(np.median([one["cpu_s_per_image"] for one in inferred]))
        / float(np.median([one["cpu_s_per_image"] for one in served])),
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "half_load": latency,
        "slider": page,
    }
    save(found, output, "fastapi", "uvicorn", "h11", "httptools", "uvloop")


if __name__ == "__main__":
    main()
