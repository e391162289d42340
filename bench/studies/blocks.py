"""The blocks of figures in README and docs: one function each, from the JSON files in `bench/results`."""

from __future__ import annotations

from collections.abc import Callable

from .results import (
    describe_machine,
    load,
    name_file,
    name_peer,
    relative_speed,
    signed,
    speedup,
    spread,
    table,
    two_digits,
)

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
    "no-data kept": "no masking of no-data bands",
    "average of weights": "moving average of the weights (`--ema 0.99`)",
    "constant rates": "constant learning rates instead of `--schedule cosine`",
    "brightness first": "one of the three epochs on predicting brightness (`--pretrain-epochs 1`)",
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
    other = bench["model"]["sha256"] != validation["model"]["sha256"]
    note = (
        "\nThe rows of JPEG files and of probability maps were measured with the previous shipped model."
        if other
        else ""
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
            {"cpu": "ONNX Runtime", "openvino": "OpenVINO"}[way["provider"]],
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


def search() -> str:
    """The exact search."""
    found = load("cpu-search-444")["search"]
    return (
        f"{found['thresholds']} thresholds x {found['min_areas']} min areas x {found['classes']} classes on "
        f"{found['images']} images took {found['seconds']:.1f} s. Nested loops would take {found['ratio']:,.0f} times "
        f"as long, extrapolated from a sample ({name_file('cpu-search-444')})."
    )


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


def loader() -> str:
    """The cached loader compared with the notebook's."""
    originals, copies = load("cpu-loader-originals")["ratio"], load("cpu-loader-copies")["ratio"]
    return (
        f"On one core, the cached loader delivers {two_digits(originals)} times as many samples per second as the "
        f"notebook's loader from\n2100x1400 images, and {two_digits(copies)} times as many from 525x350 images "
        f"({name_file('cpu-loader-originals')}, {name_file('cpu-loader-copies')})."
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


def ablation() -> str:
    """The change of the Dice by each training option."""
    options = load("cpu-ablation")["options"]
    rows = sorted(
        (
            (
                one["gain"],
                (
                    OPTIONS[name],
                    f"{signed(one['gain'])} ± {one['standard_error']:.4f}",
                    *(signed(gain) for gain in one["gains"]),
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
    base = f"Mean Dice without any of them: {options['base']['dice']:.3f} ({name_file('cpu-ablation')})."
    return f"{table(heads, [row for _, row in rows])}\n\n{base}"


def export() -> str:
    """The gate's figures for each network and precision."""
    rows = []
    for run in load("cpu-export")["runs"]:
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
    return f"{table(heads, rows)}\n\n{describe_machine('cpu-export')}"


def flips() -> str:
    """Gain of each set of flips, averaged as probabilities or as logits."""
    found = load("cpu-flips")
    rows = [
        (one["views"], one["mean"], f"{one['dice']:.4f}", f"{one['gain']:+.4f} ± {one['error']:.4f}")
        for one in found["ways"]
        if one["views"] != "none"
    ]
    one_view = next(one for one in found["ways"] if one["views"] == "none")
    about = (
        f"Out-of-fold Dice on {found['images']} held-out images, with the network of the shipped model; one view has "
        f"{one_view['dice']:.4f} ({name_file('cpu-flips')}).\nThe error is that of the gain, over the images."
    )
    heads = ("`--tta`", "mean of the", "Dice", "gain over one view")
    return f"{table(heads, rows)}\n\n{about}"


def held_out() -> str:
    """Dice lost by choosing rules on few images."""
    found = load("cpu-held-out")
    rows = [
        (str(one["images"]), f"{one['dice']:.4f}", f"{one['lost']:.4f} ± {one['error']:.4f}" if one["lost"] else "0")
        for one in found["counts"]
    ]
    heads = ("images that the rules are chosen on", "Dice on unseen images", "lost")
    about = (
        f"Means over {found['repetitions']} random divisions of {found['images']:,} validation images with the shipped "
        f"model, and the standard errors of the means ({name_file('cpu-held-out')})."
    )
    return f"{table(heads, rows)}\n\n{about}"


def tensorrt() -> str:
    """Layers, engine size and build time in TensorRT for RTX."""
    rows = [
        (
            one["form"],
            one["precision"],
            str(one["layers"]),
            " / ".join(f"{engine['bytes'] / 1e6:.1f}" for engine in one["engines"]),
            " / ".join(f"{engine['seconds']:.0f}" for engine in one["engines"]),
        )
        for one in load("cpu-tensorrt-rtx")["artifacts"]
    ]
    heads = ("network", "precision", "layers", "engine in MB: sm86 / sm89 / sm120", "seconds to build")
    return f"{table(heads, rows)}\n\n{describe_machine('cpu-tensorrt-rtx')}"


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
    rate, belt = (found["rate"][name] for name in ("12000x3000", "36000x3000"))
    about = (
        f"{real['cropped'][0]['images']} whole validation images in mosaics that begin and end within an image, and "
        f"{drawn['cropped'][0]['images']} synthetic scenes; alone, the validation images have a Dice of "
        f"{real['labels_alone']:.3f} with their labels.\n"
        f"Tiles per second relative to the same number of single images: {rate['ratio']:.2f} for "
        f"{rate['panoramas']} panoramas of 12000x3000, and {belt['ratio']:.2f} for one of 36000x3000, whose "
        f"decoding overlaps with nothing; per second of CPU time, {rate['cpu_ratio']:.2f} and {belt['cpu_ratio']:.2f} "
        f"(medians of {len(rate['seconds']['tiles'])} alternate rounds; other processes ran on the machine).\n"
        f"Peak memory: {large:,.0f} MB for panoramas of 36000x3000, {small:,.0f} MB for 12000x3000: "
        f"{large / small:.2f} times as much."
    )
    return f"{table(heads, rows)}\n\n{about}\n{describe_machine('cpu-tiles')}"


_FUNCTIONS = (
    *(summary, front, stages, postprocess, pipeline, search),
    tiles,
    *(memory, scaling, cluster, loader, decode, ablation, export, flips, held_out, tensorrt),
)
BLOCKS: dict[str, Callable[[], str]] = {one.__name__: one for one in _FUNCTIONS}
"""Name in the markers of a page -> the function that renders its figures."""
