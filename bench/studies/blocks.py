"""The blocks of figures in README and docs: one function each, from the JSON files in `bench/results`."""

from __future__ import annotations

from collections.abc import Callable

from .gpu_blocks import gpu
from .results import (
    describe_machine,
    load,
    name_file,
    name_peer,
    relative_speed,
    speedup,
    spread,
    table,
)
from .training_blocks import ablation, export, flips, held_out, loader, search, tensorrt

PIPELINES = {
    "cpu-full-originals": "the shipped model, 2100x1400 images",
    "cpu-pipeline-copies": "the shipped model, 525x350 images",
    "cpu-pipeline-se_resnext101": "se_resnext101_32x4d at 640x320 in int8, 2100x1400 images",
}
PROVIDERS = {"cpu": "ONNX Runtime", "openvino": "OpenVINO"}
MAPS = {"dense": "dense", "smooth": "smooth", "network": "the shipped model"}
PEERS = {
    "notebook": "notebook: a loop over components",
    "OpenCV": "OpenCV connectedComponentsWithStats, lookup table, NumPy RLE",
    "OpenCV, 16 bits": "the same with 16-bit labels",
    "scipy": "scipy.ndimage",
    "cc3d": "cc3d",
    "pycocotools encode": "pycocotools, encoding only",
    "floor": "reading the map once",
}


def summary() -> str:
    """The figures of the README: the Dice of the shipped model, and ratios to peers."""
    validation = load("cpu-validation")
    accuracy = validation["accuracy"]
    shipped = next(way for way in accuracy["ways"] if way["model"] == "clouds.onnx")
    dice = (
        f"The shipped model has a mean Dice of {shipped['dice']:.4f} on {validation['images']['count']:,} validation "
        f"images that it was not trained on;\nleaving every row empty scores {accuracy['all_empty']:.4f} "
        f"({name_file('cpu-validation')})."
    )
    bench = load("cpu-full-originals")
    whole, peers = bench["pipeline"]["whole"], bench["pipeline"]["peers"]
    chosen = [name for name in peers if name.startswith(("the notebook", "plain ONNX Runtime", "plain OpenVINO"))]
    rows = [
        (
            "JPEG files to submission",
            name_peer(name),
            speedup(peers[name]["ratio"], whole, peers[name]),
        )
        for name in sorted(chosen, key=lambda name: -peers[name]["ratio"])
    ]
    maps = next(one for one in bench["postprocess"] if one["kind"] == "network" and one["form"].startswith("uint8"))
    rows += [
        ("probability map to RLE text, one thread", PEERS[peer["name"]], speedup(peer["ratio"]))
        for peer in maps["peers"]
        if peer["name"] in ("notebook", "cc3d")
    ]
    search, loader = load("cpu-search-444")["search"], load("cpu-loader-originals")
    rows += [
        ("search of all rules", "nested loops, extrapolated", f"{search['ratio']:,.0f}x"),
        ("loading of training samples, one core", "notebook", speedup(loader["ratio"])),
    ]
    machine = describe_machine("cpu-full-originals", "cpu-search-444", "cpu-loader-originals")
    model = bench["model"]
    used = {"file": model["precision"], "provider": model["provider"], "computes_in": model["compute"]}
    way = next(one for one in load("cpu-variants-shipped")["ways"] if used.items() <= one.items())
    ours = f"{PROVIDERS[model['provider']]} in {model['compute']} (Dice {way['dice']:.4f})"
    note = (
        f" In the first rows, cloudrt ran {ours}, which was the fastest. The search was measured "
        "with an earlier network, on 140 thresholds and 17 minimum areas."
    )
    heads = ("work", "compared with", "speed of cloudrt")
    return f"{dice}\n\n{table(heads, rows)}\n\n{machine}{note}"


def front() -> str:
    """The shipped network in each precision and provider: Dice and speed, files to submission."""
    accuracy = load("cpu-validation")["accuracy"]
    ways = accuracy["ways"]
    plain = next(way for way in ways if way["provider"] == "cpu" and way["precision"] == "fp32")
    rows = [
        (
            f"{way['precision']}{', as shipped' if way['model'] == 'clouds.onnx' else ''}",
            PROVIDERS[way["provider"]],
            f"{way['dice']:.4f}",
            f"{relative_speed(way, plain):.2f}x" if len(way["timing"]["repetitions_s"]) > 1 else "one round, not shown",
        )
        for way in ways
    ]
    rows.append(("all rows empty", "", f"{accuracy['all_empty']:.4f}", ""))
    heads = ("artifact", "provider", "mean Dice", "speed relative to fp32 in ONNX Runtime")
    return f"{table(heads, rows)}\n\n{describe_machine('cpu-validation')}"


def stages() -> str:
    """Each stage and the whole pipeline, compared with the notebook and the other peers."""
    bench = load("cpu-full-originals")
    notebook = f"notebook ({bench['notebook']})"
    rows = [
        (stage["name"], notebook, speedup(stage["ratio"], stage["ours"], stage["notebook"]))
        for stage in bench["stages"][:-1]
    ]
    whole = bench["pipeline"]["whole"]
    peers = sorted(bench["pipeline"]["peers"].items(), key=lambda item: -item[1]["ratio"])
    rows += [("files to submission", name_peer(name), speedup(peer["ratio"], whole, peer)) for name, peer in peers]
    return f"{table(('stage', 'compared with', 'speed of cloudrt'), rows)}\n\n{describe_machine('cpu-full-originals')}"


def postprocess() -> str:
    """Post-processing alone, compared with its peers."""
    measured = [one for one in load("cpu-full-originals")["postprocess"] if one["form"].startswith("uint8")]
    heads = [f"{MAPS[one['kind']]}: {one['runs']:,.0f} runs, {one['components']:.1f} components" for one in measured]
    rows = [
        (PEERS[peer["name"]], *(speedup(one["peers"][index]["ratio"]) for one in measured))
        for index, peer in enumerate(measured[0]["peers"])
    ]
    heads = ["time of the peer relative to cloudrt", *heads]
    return f"{table(heads, rows)}\n\n{describe_machine('cpu-full-originals')}"


def pipeline() -> str:
    """From files to submission: the share of the ceiling, and two peers."""
    rows = []
    for name, what in PIPELINES.items():
        measured = load(name)["pipeline"]
        whole, peers = measured["whole"], measured["peers"]
        plain, notebook = (
            next((key, peer) for key, peer in peers.items() if key.startswith(start))
            for start in ("plain ONNX Runtime", "the notebook")
        )
        network = "PyTorch" if "PyTorch" in notebook[0] else "ONNX Runtime"
        rows.append(
            (
                f"{what} (`{name}.json`)",
                f"{measured['share_of_ceiling']:.2f}{spread(whole)}",
                speedup(plain[1]["ratio"], whole, plain[1]),
                f"{speedup(notebook[1]['ratio'], whole, notebook[1])} (network in {network})",
            )
        )
    heads = (
        "model and images",
        "share of the ceiling",
        "compared with plain ONNX Runtime fp32",
        "compared with the notebook",
    )
    return table(heads, rows)


def memory() -> str:
    """Resident memory over a long run."""
    resident = load("cpu-memory")["resident_mb"]
    return (
        f"Resident memory was {resident['500']} MB after 500 images and {resident['5000']} MB after 5,000 "
        f"({name_file('cpu-memory')})."
    )


def scaling() -> str:
    """Time per image in runs of different lengths."""
    found = load("cpu-scaling")["scaling"]
    first = found["runs"][0]
    costs = [
        f"{run['seconds'] / first['seconds']:.2f} (processor time {run['cpu_seconds'] / first['cpu_seconds']:.2f}) "
        f"in a run of {run['images']:,} images"
        for run in found["runs"][1:]
    ]
    return (
        f"The time per image, relative to a run of {first['images']} images, was {' and '.join(costs)} "
        f"({name_file('cpu-scaling')})."
    )


def cluster() -> str:
    """The overhead of a cluster per image, and the throughput for each number of workers."""
    overhead, scaling = load("cpu-cluster-overhead"), load("cpu-cluster-scaling")
    rounds = ", ".join(f"{one:+.1%}" for one in overhead["overhead_of_each_round"])
    rows = [
        (workers, f"{scaling['images_per_s'][workers]:.1f}", f"{share:.1%}")
        for workers, share in scaling["share_of_linear"].items()
    ]
    machine = f"{overhead['machine']['cpu']}, {overhead['machine'].get('usable_cores', overhead['threads'])} cores"
    return (
        f"Overhead: for {overhead['images']:,} images, the time per image differed by {overhead['overhead']:+.1%} from "
        f"a run without a cluster on the same cores\n(rounds: {rounds}; byte-identical submissions; {machine}; "
        f"{name_file('cpu-cluster-overhead')}).\nThe start of the worker, "
        f"{max(overhead['seconds_to_start_the_worker']):.0f} s at most, is not included.\n\n"
        f"Scaling, with stand-ins for the engine that sleep {scaling['seconds_per_batch']} s per batch of "
        f"{scaling['batch']} images, so that 16 workers fit on two cores\n({name_file('cpu-cluster-scaling')}):\n\n"
        + table(("workers", "images per second", "share of linear scaling"), rows)
    )


def decode() -> str:
    """How the scaled decode changes the Dice."""
    parts = []
    for name, what in (
        ("cpu-scaled-decode-copies", "images of 525x350"),
        ("cpu-scaled-decode-originals", "images of 2100x1400"),
    ):
        found = load(name)
        gain, error = found["dice_scaled"] - found["dice_full"], found["standard_error_of_the_difference"]
        parts.append(f"{gain:+.3f} ± {error:.3f} on {found['images']:,} {what} ({name_file(name)})")
    return f"Compared with a full decode, the scaled decode changed the mean Dice by {' and by '.join(parts)}."


def tiles() -> str:
    """Agreement of panoramas with single images for each overlap, and speed and memory."""
    found = load("cpu-tiles")
    real, drawn = found["agreement"]["real"], found["agreement"]["synthetic"]
    rows = [
        (
            f"{one['overlap']:g}" + (" (default)" if one["overlap"] == found["default_overlap"] else ""),
            str(found["belt_tiles"][f"{one['overlap']:g}"]),
            f"{one['pieces']:.3f}",
            f"{one['labels']:.3f}",
            f"{scene['pieces']:.3f}",
            f"{one['step_at_borders']} / {one['step_elsewhere']}",
        )
        for one, scene in zip(real["cropped"], drawn["cropped"], strict=True)
    ]
    heads = (
        "overlap",
        "tiles of 36000x3000",
        "Dice with the single images",
        "Dice with their labels",
        "synthetic: Dice with the single images",
        "largest step in level at borders / elsewhere",
    )
    small, large = (found["peak_mb"][name] for name in ("12000x3000", "36000x3000"))
    rounds = sorted({len(one["seconds"]["tiles"]) for one in found["rate"]})
    rates = [
        f"{one['ratio']:.2f} for {one['panoramas']} of {one['size']} (in CPU time {one['cpu_ratio']:.2f})"
        for one in found["rate"]
    ]
    about = (
        f"{real['cropped'][0]['images']} whole validation images in mosaics, with images that are cut at the edges "
        "around them, and "
        f"{drawn['cropped'][0]['images']} synthetic scenes. Alone, all {real['images']} validation "
        f"images of the mosaics have a Dice of {real['labels_alone']:.3f} with their labels.\n"
        f"Tiles per second relative to the same number of single images, by number and size of the panoramas: "
        f"{', '.join(rates)}; medians of {' or '.join(map(str, rounds))} alternating rounds. Until the first panorama "
        f"is decoded, no tile can be segmented; this time is a larger share of a run on one panorama.\n"
        f"Peak memory: {large:,.0f} MB for panoramas of 36000x3000, {small:,.0f} MB for 12000x3000: "
        f"{large / small:.2f} times as much."
    )
    return f"{table(heads, rows)}\n\n{about}\n{describe_machine('cpu-tiles')}"


_FUNCTIONS = (
    *(summary, front, stages, postprocess, pipeline, search),
    *(tiles, gpu),
    *(memory, scaling, cluster, loader, decode, ablation, export, flips, held_out, tensorrt),
)
BLOCKS: dict[str, Callable[[], str]] = {one.__name__: one for one in _FUNCTIONS}
"""Name in the markers of a page -> the function that renders its figures."""
