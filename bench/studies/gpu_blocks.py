"""The block of figures measured on a GPU, from `bench/results/gpu-h200.json`."""

from __future__ import annotations

import math

from .results import load, name_file, table


def gpu() -> str:
    """Parity with the CPU, and relative speeds of the engine and of decoding."""
    found = load("gpu-h200")
    engine = found["engine_on_device"]["images_per_s"]
    fused = "transposed tail, channels last and bias fusion"
    pairs = [
        (
            "engine, batch 64",
            "the previous artifact, which transposed the maps after enlarging them",
            "transposed tail",
            "shipped",
        ),
        ("engine, batch 64, channels last with fused bias", "default layout", fused, "transposed tail"),
    ]
    rows = [(what, other, f"{engine[f'{a}, batch 64'] / engine[f'{b}, batch 64']:.2f}x") for what, other, a, b in pairs]
    rate = engine[f"{fused}, CUDA graph, batch 32"]
    eager = found["pytorch"]["images_per_s"]["without_copies"]
    rows.append(
        ("engine, batch 32, channels last, CUDA graph", "PyTorch fp16, channels last, eager", f"{rate / eager:.2f}x")
    )
    for size, rates in found["decode"]["images_per_s"].items():
        ratio = rates["JPEG engine"] / rates["CPU, 16 threads, at the network's size"]
        rows.append((f"JPEGs of {size}, the GPU's JPEG engine", "16 CPU threads, resize included", f"{ratio:.1f}x"))
    parity = [one for one in found["answers"].values() if "dice" in one]
    dice, difference = (
        math.floor(1e4 * min(one["dice"] for one in parity)) / 1e4,
        max(one["mean_difference"] for one in parity),
    )
    share = found["pipeline"]["525x350"]["share_of_slowest"]
    return (
        f"{table(('what', 'compared with', 'speed'), rows)}\n\n"
        "Engine and PyTorch: images already on the GPU, no copies. JPEG engine: decoded at full size, kept on the GPU, "
        "not resized.\n"
        f"The fp16 artifact on {parity[0]['images']} images, compared with ONNX Runtime's CPU provider in fp32, in "
        f"{len(parity)} settings (default layout with one stream, two\nstreams or a CUDA graph; channels last with one "
        f"or two streams): Dice of the submissions at least {dice:.4f}, mean difference at\nmost {difference:.2f} "
        "levels of 255. All nodes ran on the GPU.\n"
        f"From 525x350 files to submission, the rate was {share:.2f} of that of decoding alone on the CPU. The journal "
        "and the CSV were made\nfaster after this measurement.\n"
        f"Measured on {found['device'].partition(',')[0]}, {found['machine']['usable_cores']} cores "
        f"({name_file('gpu-h200')})."
    )
