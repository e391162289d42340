"""The figures in README and docs, rendered from the JSON files in `bench/results`.

    python -m cloudrt.bench.studies.render README.md docs/benchmarks.md docs/how-to/cluster.md

replaces the text between `<!-- figures: NAME -->` and `<!-- end -->` with the result of `BLOCKS[NAME]`. A test checks
that the pages are up to date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from cloudrt.errors import DataError
from cloudrt.system.files import replacing

RESULTS = Path(__file__).parents[1] / "results"
_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

PIPELINES = {
    "cpu-full-originals": "shipped model, 2100x1400 images",
    "cpu-pipeline-copies": "shipped model, 525x350 images",
    "cpu-pipeline-se_resnext101": "se_resnext101_32x4d at 640x320 in int8, 2100x1400 images",
}
MAPS = {"dense": "dense", "smooth": "smooth", "network": "shipped model"}
PEERS = {
    "notebook": "notebook: a loop over components",
    "OpenCV": "OpenCV connectedComponentsWithStats, lookup table, NumPy RLE",
    "OpenCV, 16 bits": "the same with 16-bit labels",
    "scipy": "scipy.ndimage",
    "cc3d": "cc3d",
    "pycocotools encode": "pycocotools, encoding only",
    "floor": "reading the map once",
}
OPTIONS = {
    "flips": "both flips at validation (`--tta hv`)",
    "presence head": "classification head (`--presence head`)",
    "top-k presence": "mean of the highest pixels (`--presence top-k`)",
    "no-data kept": "no-data bands not masked out",
    "average of weights": "moving average of the weights (`--ema 0.99`)",
    "constant rates": "constant learning rates instead of `--schedule cosine`",
    "brightness first": "one of the three epochs on predicting brightness (`--pretrain-epochs 1`)",
}


def fill(text: str) -> str:
    """Return a page with the text between each pair of markers rendered again.

    Raises
    ------
    DataError
        A marker has a name that `BLOCKS` lacks.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise DataError(f"no figures are named {found[2]}; there are {', '.join(BLOCKS)}")
        return f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}"

    return _MARKED.sub(block, text)


def summary() -> str:
    """The few figures of the README: the shipped model's Dice, and ratios to peers."""
    validation = _load("cpu-validation")
    accuracy = validation["accuracy"]
    shipped = next(way for way in accuracy["ways"] if way["model"] == "clouds.onnx")
    dice = (
        f"The shipped model has a mean Dice of {shipped['dice']:.4f} on {validation['images']['count']:,} validation "
        f"images that it was not trained on;\nleaving every row empty scores {accuracy['all_empty']:.4f} "
        f"({_file('cpu-validation')})."
    )
    bench = _load("cpu-full-originals")
    whole, peers = bench["pipeline"]["whole"], bench["pipeline"]["peers"]
    chosen = [name for name in peers if name.startswith(("the notebook", "plain ONNX Runtime", "plain OpenVINO"))]
    rows = [
        ("JPEG files to submission", _peer(name), f"{_two(peers[name]['ratio'])}x{_spread(whole, peers[name])}")
        for name in sorted(chosen, key=lambda name: -peers[name]["ratio"])
    ]
    maps = next(one for one in bench["postprocess"] if one["kind"] == "network" and one["form"].startswith("uint8"))
    rows += [
        ("probability map to RLE text, one thread", PEERS[peer["name"]], f"{_two(peer['ratio'])}x")
        for peer in maps["peers"]
        if peer["name"] in ("notebook", "cc3d")
    ]
    search, loader = _load("cpu-search-444")["search"], _load("cpu-loader-originals")
    rows += [
        ("search of all rules", "nested loops", f"{search['ratio']:,.0f}x"),
        ("loading of training samples, one core", "notebook", f"{_two(loader['ratio'])}x"),
    ]
    machine = _machine("cpu-full-originals", "cpu-search-444", "cpu-loader-originals")
    return f"{dice}\n\n{_table(('work', 'compared with', 'speed of cloudrt'), rows)}\n\n{machine}"


def front() -> str:
    """The shipped network in each precision and provider: Dice and speed, files to submission."""
    accuracy = _load("cpu-validation")["accuracy"]
    ways = accuracy["ways"]
    plain = next(way for way in ways if way["provider"] == "cpu" and way["precision"] == "fp32")
    rows = [
        (
            f"{way['precision']}{', as shipped' if way['model'] == 'clouds.onnx' else ''}",
            {"cpu": "ONNX Runtime", "openvino": "OpenVINO"}[way["provider"]],
            f"{way['dice']:.4f}",
            f"{_relative_speed(way, plain):.2f}x",
        )
        for way in ways
    ]
    table = _table(
        ("artifact", "provider", "mean Dice", "speed relative to fp32 in ONNX Runtime"),
        [*rows, _empty(accuracy["all_empty"])],
    )
    return f"{table}\n\n{_machine('cpu-validation')}"


def stages() -> str:
    """Each stage and the whole pipeline, compared with the notebook and the other peers."""
    bench = _load("cpu-full-originals")
    notebook = f"notebook ({bench['notebook']})"
    rows = [
        (stage["name"], notebook, f"{_two(stage['ratio'])}x{_spread(stage['ours'], stage['notebook'])}")
        for stage in bench["stages"][:-1]
    ]
    whole = bench["pipeline"]["whole"]
    peers = sorted(bench["pipeline"]["peers"].items(), key=lambda item: -item[1]["ratio"])
    rows += [
        ("files to submission", _peer(name), f"{_two(peer['ratio'])}x{_spread(whole, peer)}") for name, peer in peers
    ]
    return f"{_table(('stage', 'compared with', 'speed of cloudrt'), rows)}\n\n{_machine('cpu-full-originals')}"


def postprocess() -> str:
    """Post-processing alone, compared with its peers."""
    measured = [one for one in _load("cpu-full-originals")["postprocess"] if one["form"].startswith("uint8")]
    heads = [f"{MAPS[one['kind']]}: {one['runs']:,.0f} runs, {one['components']:.1f} components" for one in measured]
    rows = [
        (PEERS[peer["name"]], *(f"{_two(one['peers'][index]['ratio'])}x" for one in measured))
        for index, peer in enumerate(measured[0]["peers"])
    ]
    return f"{_table(('time of the peer, in times of cloudrt', *heads), rows)}\n\n{_machine('cpu-full-originals')}"


def pipeline() -> str:
    """From files to submission: the share of the machine that is used, and two peers."""
    rows = []
    for name, what in PIPELINES.items():
        measured = _load(name)["pipeline"]
        whole, peers = measured["whole"], measured["peers"]
        plain, notebook = (
            next((key, peer) for key, peer in peers.items() if key.startswith(start))
            for start in ("plain ONNX Runtime", "the notebook")
        )
        network = "PyTorch" if "PyTorch" in notebook[0] else "ONNX Runtime"
        rows.append(
            (
                f"{what} (`{name}.json`)",
                f"{measured['share_of_ceiling']:.2f}{_spread(whole)}",
                f"{_two(plain[1]['ratio'])}x{_spread(whole, plain[1])}",
                f"{_two(notebook[1]['ratio'])}x{_spread(whole, notebook[1])} (network in {network})",
            )
        )
    heads = (
        "model and images",
        "share of the ceiling",
        "compared with plain ONNX Runtime fp32",
        "compared with the notebook",
    )
    return _table(heads, rows)


def search() -> str:
    """The exact search."""
    found = _load("cpu-search-444")["search"]
    return (
        f"{found['thresholds']} thresholds x {found['min_areas']} min areas x {found['classes']} classes on "
        f"{found['images']} images took {found['seconds']:.1f} s; nested loops would take {found['ratio']:,.0f} "
        f"times as long ({_file('cpu-search-444')})."
    )


def memory() -> str:
    """Resident memory over a long run."""
    resident = _load("cpu-memory")["resident_mb"]
    return (
        f"Resident memory was {resident['500']} MB after 500 images and {resident['5000']} MB after 5,000 "
        f"({_file('cpu-memory')})."
    )


def scaling() -> str:
    """Time per image in runs of different lengths."""
    found = _load("cpu-scaling")["scaling"]
    first = found["runs"][0]
    costs = [
        f"{run['seconds'] / first['seconds']:.2f} (processor time {run['cpu_seconds'] / first['cpu_seconds']:.2f}) "
        f"in a run of {run['images']:,} images"
        for run in found["runs"][1:]
    ]
    return (
        f"The time per image, relative to a run of {first['images']} images, was {' and '.join(costs)} "
        f"({_file('cpu-scaling')})."
    )


def cluster() -> str:
    """What a cluster adds to the time per image, and how throughput grows with workers."""
    overhead, scaling = _load("cpu-cluster-overhead"), _load("cpu-cluster-scaling")
    rounds = ", ".join(f"{one:+.1%}" for one in overhead["overhead_of_each_round"])
    rows = [
        (workers, f"{scaling['images_per_s'][workers]:.1f}", f"{share:.1%}")
        for workers, share in scaling["share_of_linear"].items()
    ]
    machine = f"{overhead['machine']['cpu']}, {overhead['machine'].get('usable_cores', overhead['threads'])} cores"
    return (
        f"Overhead: with {overhead['images']:,} images, the time per image changed by {overhead['overhead']:+.1%} "
        f"compared with a plain run on the same cores\n(rounds: {rounds}; byte-identical submissions; {machine}; "
        f"{_file('cpu-cluster-overhead')}).\nStarting the worker, "
        f"{max(overhead['seconds_to_start_the_worker']):.0f} s at most, is not included.\n\n"
        f"Scaling, with engines that sleep {scaling['seconds_per_batch']} s per batch of {scaling['batch']} images, so "
        f"that 16 of them fit on two cores\n({_file('cpu-cluster-scaling')}):\n\n"
        + _table(("workers", "images per second", "share of linear scaling"), rows)
    )


def loader() -> str:
    """The cached loader compared with the notebook's."""
    originals, copies = _load("cpu-loader-originals")["ratio"], _load("cpu-loader-copies")["ratio"]
    return (
        f"On one core, the cached loader delivers {_two(originals)} times as many samples per second as the notebook's "
        f"loader from\n2100x1400 images, and {_two(copies)} times as many from 525x350 images "
        f"({_file('cpu-loader-originals')}, {_file('cpu-loader-copies')})."
    )


def decode() -> str:
    """How the scaled decode changes the Dice."""
    parts = []
    for name, what in (
        ("cpu-scaled-decode-copies", "images of 525x350"),
        ("cpu-scaled-decode-originals", "images of 2100x1400"),
    ):
        found = _load(name)
        gain, error = found["dice_scaled"] - found["dice_full"], found["standard_error_of_the_difference"]
        parts.append(f"{gain:+.3f} ± {error:.3f} on {found['images']:,} {what} ({_file(name)})")
    return f"Compared with a full decode, the scaled decode changed the mean Dice by {' and by '.join(parts)}."


def ablation() -> str:
    """What the training options are worth."""
    options = _load("cpu-ablation")["options"]
    rows = sorted(
        (
            (
                one["gain"],
                (
                    OPTIONS[name],
                    f"{_sign(one['gain'])} ± {one['standard_error']:.4f}",
                    *(_sign(gain) for gain in one["gains"]),
                ),
            )
            for name, one in options.items()
            if name != "base"
        ),
        key=lambda row: -row[0],
    )
    heads = (
        "option",
        "change of Dice, mean of two seeds",
        *(f"seed {n}" for n in range(len(options["base"]["gains"]))),
    )
    base = f"Mean Dice without any of them: {options['base']['dice']:.3f} ({_file('cpu-ablation')})."
    return f"{_table(heads, [row for _, row in rows])}\n\n{base}"


def export() -> str:
    """The gate's figures for three networks in each precision."""
    rows = []
    for run in _load("cpu-export")["runs"]:
        for one in run["artifacts"]:
            parity, kept = one["parity"], len(one["kept_fp32"])
            provider = parity["provider"].replace("cpu", "ONNX Runtime").replace("openvino", "OpenVINO")
            speed = one["speed_beside_fp32"]
            rows.append(
                (
                    run["networks"][0].removeprefix("FPN with "),
                    one["precision"],
                    provider,
                    f"{one['bytes'] / 1e6:.1f}",
                    f"{parity['dice']:.4f}",
                    f"{parity['empty_mismatch']:.2%}",
                    f"{kept} of {one['layers']}" if one["layers"] else "",
                    f"{speed:.2f}x" if speed else "",
                )
            )
    heads = (
        "FPN with",
        "artifact",
        "provider",
        "MB",
        "Dice between the submissions",
        "rows empty in one only",
        "layers kept in fp32",
        "speed relative to fp32",
    )
    return f"{_table(heads, rows)}\n\n{_machine('cpu-export')}"


BLOCKS: dict[str, Callable[[], str]] = {
    one.__name__: one
    for one in (
        summary,
        front,
        stages,
        postprocess,
        pipeline,
        search,
        memory,
        scaling,
        cluster,
        loader,
        decode,
        ablation,
        export,
    )
}


def _load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def _file(name: str) -> str:
    return f"`bench/results/{name}.json`"


def _machine(*names: str) -> str:
    """Return where the figures of some files were measured: a line for each machine."""
    files: dict[str, list[str]] = {}
    for name in names:
        machine = _load(name)["machine"]
        cores = machine.get("usable_cores", machine.get("cores"))
        files.setdefault(f"{machine['cpu']}, {cores} cores", []).append(_file(name))
    return "\n".join(f"Measured on {machine} ({', '.join(those)})." for machine, those in files.items())


def _peer(name: str) -> str:
    """Return a peer as the tables name it: "the notebook's way, ONNX Runtime" is "notebook (ONNX Runtime)"."""
    what, _, how = name.partition(", ")
    return f"notebook ({how})" if what.startswith("the notebook") else name


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _empty(score: float) -> tuple[str, ...]:
    return "all rows empty", "", f"{score:.4f}", ""


def _relative_speed(way: dict[str, Any], plain: dict[str, Any]) -> float:
    """Return how many times as fast a way is as another that alternated with it: the median over the rounds."""
    pairs = zip(plain["timing"]["repetitions_s"], way["timing"]["repetitions_s"], strict=True)
    ratios = sorted(theirs / ours for theirs, ours in pairs)
    return float(ratios[len(ratios) // 2])


def _spread(*timings: dict[str, Any]) -> str:
    """Return half the interquartile range of a quotient of timings, relative to it."""
    return f" ± {np.hypot.reduce([timing['iqr_s'] / timing['median_s'] for timing in timings]) / 2:.0%}"


def _two(value: float) -> str:
    return f"{value:,.{0 if value >= 20 else 1 if value >= 5 else 2}f}"


def _sign(value: float) -> str:
    return f"{value:+.4f}" if abs(value) >= 0.00005 else "0.0000"


@click.command()
@click.argument("pages", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def render(pages: tuple[Path, ...]) -> None:
    """Render the figures of bench/results between the markers of PAGES, Markdown files."""
    for page in pages:
        filled = fill(page.read_text(encoding="utf-8"))
        with replacing(page) as partial:
            partial.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    render()
