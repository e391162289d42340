"""The block of figures measured on a GPU, from `bench/results/gpu-h200.json`."""

from __future__ import annotations

from .results import load, name_file, table


def gpu() -> str:
    """Answers, and speeds of the engine and of decoding relative to what they are compared with."""
    found = load("gpu-h200")
    engine = found["engine_on_device"]["images_per_s"]
    fused = "transposed tail, channels last and bias fusion"
    pairs = [
        ("engine, batch 64", "the artifact before its last maps were transposed", "transposed tail", "shipped"),
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
    dice, difference = min(one["dice"] for one in parity), max(one["mean_difference"] for one in parity)
    share = found["pipeline"]["525x350"]["share_of_slowest"]
    return (
        f"{table(('what', 'compared with', 'speed'), rows)}\n\n"
        "Engine and PyTorch: images already on the GPU, no copies. JPEG engine: decoded at full size, kept on the GPU, "
        "not resized.\n"
        f"The fp16 artifact on {parity[0]['images']} images, compared with ONNX Runtime's CPU in fp32: with default "
        f"layout, channels last, two streams and a CUDA\ngraph, Dice of the submissions at least {dice:.4f}, mean "
        f"difference at most {difference:.2f} levels of 255. All nodes ran on the GPU.\n"
        f"Files of 525x350 to submission: {share:.2f} of the rate of decoding alone on the CPU, the slowest stage. The "
        "journal and the CSV were made faster afterwards.\n"
        f"Measured on {found['device'].partition(',')[0]}, {found['machine']['usable_cores']} cores "
        f"({name_file('gpu-h200')})."
    )
