"""The identity of a run, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cloudrt.inference.identity import Identity


def make_identity(**changes: Any) -> Identity:
    """Return the identity of a run on a CPU, with some fields changed."""
    identity = Identity(
        artifact="ab" * 32,
        provider="cpu",
        batch_size=4,
        streams=1,
        compute_precision="fp32",
        cuda_graph=False,
        channels_last=False,
        device="a processor",
        precision="fp32",
        threads=2,
        decoder="cpu",
        max_pixels=100_000_000,
        versions={"onnxruntime": "1.31.1"},
        images=12,
        inputs="cd" * 32,
    )
    return replace(identity, **changes)
