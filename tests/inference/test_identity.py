"""The identity of a run: it round-trips through JSON, and differences are named."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from support.identity import make_identity

from cloudrt.engines import tensorrt_rtx
from cloudrt.engines.plan import Plan
from cloudrt.errors import DataError
from cloudrt.inference.identity import Identity, identify
from cloudrt.options import RunOptions
from cloudrt.system.machine import Machine
from cloudrt.system.versions import OPENCV


def test_an_identity_round_trips_through_json() -> None:
    identity = make_identity(partition_size=8, partition_format="csv")
    assert Identity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity
    assert make_identity(provider="openvino", streams=2, compute_precision="bf16").plan() == Plan(
        "openvino", 4, 2, "bf16"
    )


def test_every_difference_is_named() -> None:
    one = make_identity()
    for field in fields(Identity):
        value = getattr(one, field.name)
        other = {"x": "1"} if isinstance(value, dict) else (not value if isinstance(value, bool) else value * 2 or 7)
        if field.name == "partition_format":
            other = "csv"
        differences = one.differences(make_identity(**{field.name: other}))
        if field.name == "versions":
            assert differences == ["onnxruntime version was 1.31.1, now absent", "x version was absent, now 1"]
        else:
            was = value[:12] if field.name in ("artifact", "inputs") else value
            note = " (digests of the names and sizes of the images)" if field.name == "inputs" else ""
            assert differences == [f"{field.name} was {was}, now {other}{note}"]
    assert one.differences(make_identity()) == []
    one.require_same(make_identity(), "s.csv.journal")
    with pytest.raises(DataError) as caught:
        one.require_same(make_identity(threads=1, decoder="gpu"), "s.csv.journal")
    said = "s.csv.journal belongs to another run: threads was 2, now 1; decoder was cpu, now gpu. "
    assert str(caught.value).startswith(said)
    assert "`overwrite=True`" in str(caught.value)


def test_every_distribution_of_opencv_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudrt.inference.identity.package_versions", lambda *names: dict.fromkeys(names, "1"))
    assert set(OPENCV) <= identify("ab", "fp32", Plan("cpu", 4), RunOptions(), 1).versions.keys()


@pytest.mark.parametrize(
    ("provider", "decoder", "names"),
    [
        ("cuda", "cpu", {"nvidia-cudnn-cu13", "nvidia-cublas"}),
        ("cuda", "gpu", {"nvidia-nvimgcodec-cu13", "nvidia-nvjpeg"}),
        ("tensorrt", "cpu", {"tensorrt-cu13", "nvidia-cudnn-cu13"}),
        ("tensorrt-rtx", "cpu", set(tensorrt_rtx.PACKAGES)),
    ],
)
def test_the_libraries_of_a_gpu_are_recorded(
    monkeypatch: pytest.MonkeyPatch, provider: str, decoder: str, names: set[str]
) -> None:
    machine = Machine("Linux", "CPU", (), 2, 8.0, ("NVIDIA H200, 140 GiB",))
    monkeypatch.setattr("cloudrt.inference.identity.describe_machine", lambda: machine)
    monkeypatch.setattr("cloudrt.inference.identity.package_versions", lambda *names: dict.fromkeys(names, "1"))
    found = identify("ab", "fp16", Plan(provider, 8), RunOptions(decoder=decoder), 1)
    assert found.device == "NVIDIA H200, 140 GiB"
    assert names <= found.versions.keys()


@pytest.mark.parametrize("values", [None, [], 5, {}, {"artifact": "ab"}])
def test_what_is_no_identity_is_refused(values: object) -> None:
    with pytest.raises(DataError, match="has other fields than this version"):
        Identity.from_dict(values)


def test_values_of_other_types_are_refused_by_name() -> None:
    values = make_identity().to_dict()
    with pytest.raises(DataError, match="other fields"):
        Identity.from_dict(values | {"batch size": 4})
    for name, wrong in (("batch_size", "4"), ("cuda_graph", 0), ("versions", []), ("images", True), ("inputs", None)):
        with pytest.raises(DataError, match=f"value of the wrong type: {name}"):
            Identity.from_dict(values | {name: wrong})


def test_digests_are_shortened_in_differences() -> None:
    ours, theirs = make_identity(artifact="ab" * 32), make_identity(artifact="cd" * 32)
    assert ours.differences(theirs) == ["artifact was abababababab, now cdcdcdcdcdcd"]
