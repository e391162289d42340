"""The figures of README and docs: rendered from the JSON files in `bench/results`, never typed.

    python -m cloudrt.bench.studies.render README.md docs/how-to/cluster.md

replaces what stands between `<!-- figures: NAME -->` and `<!-- end -->` by what `BLOCKS[NAME]` makes of those files. A
test does the same and compares.
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

RESULTS = Path(__file__).parent / "results"
_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

PIPELINES = {
    "cpu-full-originals": "shipped, 2100x1400 originals",
    "cpu-pipeline-copies": "shipped, 525x350",
    "cpu-pipeline-se_resnext101": "se_resnext101_32x4d at 640x320 in int8, originals",
}
MAPS = {"dense": "dense", "smooth": "smooth", "network": "this network's own"}
PEERS = {
    "notebook": "the notebook's loop over components",
    "OpenCV": "OpenCV's stats, look-up, numpy RLE",
    "OpenCV, 16 bits": "the same with 16-bit labels",
    "scipy": "scipy.ndimage",
    "cc3d": "cc3d",
    "pycocotools encode": "pycocotools, encoding only",
    "floor": "the floor",
}
OPTIONS = {
    "flips": "both flips in validation (`--tta hv`)",
    "presence head": "classification head (`--presence head`)",
    "top-k presence": "top-K mean (`--presence top-k`)",
    "no-data kept": "no-data bands not subtracted",
    "average of weights": "average of weights (`--ema 0.99`)",
    "constant rates": "constant rates instead of `--schedule cosine`",
    "brightness first": "one of the three epochs on brightness (`--pretrain-epochs 1`)",
}


def fill(text: str) -> str:
    """Return a page with every marked place filled anew.

    Raises
    ------
    DataError
        A marked place has a name that `BLOCKS` lacks.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise DataError(f"no figures are named {found[2]}; there are {', '.join(BLOCKS)}")
        return f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}"

    return _MARKED.sub(block, text)


def front() -> str:
    """The shipped network in each precision and provider: Dice and speed."""
    accuracy = _load("cpu-validation")["accuracy"]
    ways = accuracy["ways"]
    plain = next(way for way in ways if way["provider"] == "cpu" and way["precision"] == "fp32")
    rows = [
        (
            f"{way['precision']}{', shipped' if way['model'] == 'clouds.onnx' else ''}",
            {"cpu": "ONNX Runtime", "openvino": "OpenVINO"}[way["provider"]],
            f"{way['dice']:.4f}",
            f"{_beside(way, plain):.2f}x",
        )
        for way in ways
    ]
    table = _table(("artifact", "provider", "mean Dice", "speed, files to CSV"), [*rows, _empty(accuracy["all_empty"])])
    return f"{table}\n\n{_machine('cpu-validation')}"


def stages() -> str:
    """Each stage, and the whole, beside the notebook's way and the other peers."""
    bench = _load("cpu-full-originals")
    rows = [
        (stage["name"], f"{_two(stage['ratio'])}x{_spread(stage['ours'], stage['notebook'])}")
        for stage in bench["stages"][:-1]
    ]
    whole = bench["pipeline"]["whole"]
    peers = sorted(bench["pipeline"]["peers"].items(), key=lambda item: -item[1]["ratio"])
    rows += [(f"files to CSV, beside {name}", f"{_two(peer['ratio'])}x{_spread(whole, peer)}") for name, peer in peers]
    table = _table((f"stage; alone beside the notebook's way ({bench['notebook']})", "cloudrt is"), rows)
    return f"{table}\n\n{_machine('cpu-full-originals')}"


def postprocess() -> str:
    """Post-processing alone beside its peers."""
    measured = [one for one in _load("cpu-full-originals")["postprocess"] if one["form"].startswith("uint8")]
    heads = [f"{MAPS[one['kind']]}: {one['runs']:,.0f} runs, {one['components']:.1f} components" for one in measured]
    rows = [
        (PEERS[peer["name"]], *(f"{_two(one['peers'][index]['ratio'])}x" for one in measured))
        for index, peer in enumerate(measured[0]["peers"])
    ]
    return f"{_table(('', *heads), rows)}\n\n{_machine('cpu-full-originals')}"


def pipeline() -> str:
    """From files to CSV: the share of the machine that is used, and peers."""
    rows = []
    for name, what in PIPELINES.items():
        measured = _load(name)["pipeline"]
        whole = measured["whole"]
        peers = {
            key.partition(",")[0]: (key, f"{_two(peer['ratio'])}x{_spread(whole, peer)}")
            for key, peer in measured["peers"].items()
        }
        plain, (key, notebook) = peers["plain ONNX Runtime CPU fp32"][1], peers["the notebook's way"]
        network = "PyTorch eager" if "PyTorch" in key else "network in ONNX Runtime"
        link = f"[{what}](bench/results/{name}.json)"
        rows.append((link, f"{measured['share_of_ceiling']:.2f}{_spread(whole)}", plain, f"{notebook} ({network})"))
    heads = ("model, images", "share of what the cores allow", "plain ONNX Runtime fp32", "the notebook's way")
    return _table(heads, rows)


def search() -> str:
    """The exact search."""
    found = _load("cpu-search-444")["search"]
    return (
        f"{found['thresholds']} thresholds x {found['min_areas']} min areas x {found['classes']} classes on "
        f"{found['images']} images took {found['seconds']:.1f} s, where nested loops would take {found['ratio']:,.0f} "
        f"times as long ({_link('cpu-search-444')})."
    )


def memory() -> str:
    """Resident memory over a long run."""
    resident = _load("cpu-memory")["resident_mb"]
    return (
        f"**Flat memory**: {resident['500']} MB resident after 500 images, {resident['5000']} MB after 5,000 "
        f"({_link('cpu-memory')})."
    )


def scaling() -> str:
    """The cost of an image in runs of different lengths."""
    found = _load("cpu-scaling")["scaling"]
    first = found["runs"][0]
    costs = [
        f"{run['seconds'] / first['seconds']:.2f} of the time and {run['cpu_seconds'] / first['cpu_seconds']:.2f} of "
        f"the processor time\nin one of {run['images']:,}"
        for run in found["runs"][1:]
    ]
    return (
        f"**Flat cost**: of what an image takes in a run of {first['images']}, it takes {', '.join(costs)} "
        f"({_link('cpu-scaling')})."
    )


def cluster() -> str:
    """What a cluster costs an image, and how it grows; for a page of the docs, where no link reaches the files."""
    overhead, scaling = _load("cpu-cluster-overhead"), _load("cpu-cluster-scaling")
    rounds = ", ".join(f"{one:+.1%}" for one in overhead["overhead_of_each_round"])
    rows = [
        (workers, f"{scaling['images_per_s'][workers]:.1f}", f"{share:.1%}")
        for workers, share in scaling["share_of_linear"].items()
    ]
    machine = f"{overhead['machine']['cpu']}, {overhead['machine'].get('usable_cores', overhead['threads'])} cores"
    return (
        f"Overhead: {overhead['images']:,} images took {overhead['overhead']:+.1%} of an image's time beside the plain "
        f"pipeline on the same cores\n(turns: {rounds}; the same bytes; {machine}; "
        "`bench/results/cpu-cluster-overhead.json`). Starting the worker is\nnot in it: "
        f"{max(overhead['seconds_to_start_the_worker']):.0f} s at most.\n\n"
        f"Scaling, with engines that sleep {scaling['seconds_per_batch']} s a batch of {scaling['batch']}, so that "
        "16 of them fit on two cores\n(`bench/results/cpu-cluster-scaling.json`):\n\n"
        + _table(("workers", "images/s", "of so many times one worker's"), rows)
    )


def loader() -> str:
    """The cached loader beside the notebook's."""
    originals, copies = _load("cpu-loader-originals")["ratio"], _load("cpu-loader-copies")["ratio"]
    return (
        f"On one core the cache gives {_two(originals)} times as many samples a second as the notebook's loader on the "
        f"2100x1400\noriginals, {_two(copies)} times on copies of 525x350 ({_link('cpu-loader-originals')}, "
        f"{_link('cpu-loader-copies', 'copies')})."
    )


def decode() -> str:
    """What the scaled decode changes."""
    parts = []
    for name, what in (("cpu-scaled-decode-copies", "images of 525x350"), ("cpu-scaled-decode-originals", "originals")):
        found = _load(name)
        gain, error = found["dice_scaled"] - found["dice_full"], found["standard_error_of_the_difference"]
        parts.append(f"{gain:+.3f} ± {error:.3f} on {found['images']:,} {what} ({_link(name)})")
    return f"Against decoding every pixel, it changes the Dice by {', by '.join(parts)}."


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
    heads = ("option", "gain, mean of two seeds", *(f"seed {n}" for n in range(len(options["base"]["gains"]))))
    base = f"Without any of them: {options['base']['dice']:.3f} ({_link('cpu-ablation')})."
    return f"{_table(heads, [row for _, row in rows])}\n\n{base}"


def export() -> str:
    """The gate's figures."""
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
        "compared in",
        "MB",
        "Dice of the submissions",
        "empty in one only",
        "layers kept in fp32",
        "speed beside fp32 there",
    )
    return f"{_table(heads, rows)}\n\n{_machine('cpu-export')}"


BLOCKS: dict[str, Callable[[], str]] = {
    one.__name__: one
    for one in (
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


def _link(name: str, words: str = "figures") -> str:
    return f"[{words}](bench/results/{name}.json)"


def _machine(name: str) -> str:
    machine = _load(name)["machine"]
    return f"{machine['cpu']}, {machine.get('usable_cores', machine.get('cores'))} cores ({_link(name)})."


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _empty(score: float) -> tuple[str, ...]:
    return "no mask anywhere", "", f"{score:.4f}", ""


def _beside(way: dict[str, Any], plain: dict[str, Any]) -> float:
    """How many times as fast a way is as another that took turns with it: the median over the turns."""
    pairs = zip(plain["timing"]["repetitions_s"], way["timing"]["repetitions_s"], strict=True)
    ratios = sorted(theirs / ours for theirs, ours in pairs)
    return float(ratios[len(ratios) // 2])


def _spread(*timings: dict[str, Any]) -> str:
    """Return half the interquartile range of a quotient of timings, as a part of it."""
    return f" ± {np.hypot.reduce([timing['iqr_s'] / timing['median_s'] for timing in timings]) / 2:.0%}"


def _two(value: float) -> str:
    return f"{value:,.{0 if value >= 20 else 1 if value >= 5 else 2}f}"


def _sign(value: float) -> str:
    return f"{value:+.4f}" if abs(value) >= 0.00005 else "0.0000"


@click.command()
@click.argument("pages", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def render(pages: tuple[Path, ...]) -> None:
    """Fill the marked places of PAGES, Markdown files, with the figures of bench/results."""
    for page in pages:
        filled = fill(page.read_text(encoding="utf-8"))
        with replacing(page) as partial:
            partial.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    render()
