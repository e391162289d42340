"""The blocks of figures about training, tuning and export; see `blocks`."""

from __future__ import annotations

from .results import EARLIER, describe_machine, load, name_file, signed, table, two_digits

OPTIONS = {
    "flips": "both flips at validation (`--tta hv`)",
    "presence head": "classification head (`--presence head`)",
    "top-k presence": "mean of the highest pixels (`--presence top-k`)",
    "no-data kept": "no masking of no-data bands",
    "average of weights": "moving average of the weights (`--ema 0.99`)",
    "constant rates": "constant learning rates instead of `--schedule cosine`",
    "brightness first": "one of the three epochs on predicting brightness (`--pretrain-epochs 1`)",
}


def search() -> str:
    """The exact search."""
    found = load("cpu-search-444")["search"]
    return (
        f"{found['thresholds']} thresholds x {found['min_areas']} min areas x {found['classes']} classes on "
        f"{found['images']} images took {found['seconds']:.1f} s. Nested loops would take {found['ratio']:,.0f} times "
        f"as long, extrapolated from a sample ({name_file('cpu-search-444')})."
    )


def loader() -> str:
    """The cached loader compared with the notebook's."""
    originals, copies = load("cpu-loader-originals")["ratio"], load("cpu-loader-copies")["ratio"]
    return (
        f"On one core, the cached loader delivers {two_digits(originals)} times as many samples per second as the "
        f"notebook's loader from\n2100x1400 images, and {two_digits(copies)} times as many from 525x350 images "
        f"({name_file('cpu-loader-originals')}, {name_file('cpu-loader-copies')})."
    )


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
        f"Out-of-fold Dice on {found['images']} held-out images, with {EARLIER}; "
        f"one view has {one_view['dice']:.4f} ({name_file('cpu-flips')}).\n"
        "The error is that of the gain, over the images."
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
        f"Means over {found['repetitions']} random divisions of {found['images']:,} validation images with "
        f"{EARLIER}, and the standard errors of the means ({name_file('cpu-held-out')})."
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
