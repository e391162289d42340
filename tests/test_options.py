"""`RunOptions`: errors name the option, JSON round trips, and every field is also a keyword argument."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

import cloudrt
from cloudrt import options as module
from cloudrt.errors import DataError
from cloudrt.inference.task import InferSettings, InferTask
from cloudrt.options import (
    CudaOptions,
    OpenvinoOptions,
    RemoteOptions,
    RunOptions,
    RunSettings,
    TensorrtOptions,
    TensorrtRtxOptions,
)

EVERYTHING = RunOptions(
    provider="openvino",
    batch_size=7,
    compute_precision="bf16",
    threads=3,
    devices=(2, 0),
    allow_cpu=True,
    decoder="gpu",
    max_pixels=123,
    cuda=CudaOptions(streams=1, graph=True, channels_last=False),
    tensorrt=TensorrtOptions(streams=2, graph=False),
    tensorrt_rtx=TensorrtRtxOptions(streams=1, graph=True),
    openvino=OpenvinoOptions(streams=5),
)
"""All options but `remote`, which excludes some of them, differ from their defaults."""
REMOTE = RunOptions(
    remote=RemoteOptions(
        urls=("http://a", "grpc://b"), model="m", rules="rules.onnx", streams=3, attempts=2, timeout_s=0.5
    )
)
"""All fields of `remote` differ from their defaults."""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"provider": "cudda"}, "no provider named 'cudda'; did you mean cuda"),
        ({"provider": "gpu"}, "no provider named 'gpu'; known: auto, cpu, cuda, "),
        ({"provider": None}, "no provider named None; known: auto, cpu, cuda, "),
        ({"compute_precision": "f32"}, "no compute precision named 'f32'; did you mean fp32"),
        ({"decoder": "tpu"}, "no decoder named 'tpu'; known: cpu, gpu"),
        ({"batch_size": -1}, "batch_size must be a whole number from 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number from 0 to 65,536, found 2.5"),
        ({"batch_size": 10**9}, "batch_size must be a whole number from 0"),
        ({"batch_size": True}, "batch_size must be a whole number from 0"),
        ({"threads": "2"}, "threads must be a whole number from 0 to 4,096, found '2'"),
        ({"threads": 5000}, "threads must be a whole number"),
        ({"max_pixels": 0}, "max_pixels must be a whole number from 1"),
        ({"devices": ()}, "devices must be one or more GPU numbers"),
        ({"devices": (0, 0)}, "devices must be one or more GPU numbers"),
        ({"devices": (-1,)}, "devices must be a tuple of GPU numbers such as"),
        ({"devices": "0,1"}, "devices must be a tuple of GPU numbers such as"),
        ({"devices": 0}, "devices must be a tuple of GPU numbers such as"),
        ({"allow_cpu": "no"}, "allow_cpu must be True or False, found 'no'"),
        ({"cuda": {"streams": 2}}, "cuda must be of type CudaOptions"),
        ({"openvino": CudaOptions()}, "openvino must be of type OpenvinoOptions"),
        ({"provider": "cpu", "compute_precision": "bf16"}, "`compute_precision='bf16'` applies to"),
    ],
)
def test_a_wrong_value_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    makers: tuple[Callable[..., RunOptions], ...] = (RunOptions, RunOptions().changed)
    for make in makers:
        with pytest.raises(DataError) as caught:
            make(**changes)
        assert named in str(caught.value)


@pytest.mark.parametrize("kind", [CudaOptions, TensorrtOptions, OpenvinoOptions])
@pytest.mark.parametrize("streams", [-1, 65, 1.0, True, "2"])
def test_streams_are_whole_numbers_in_range(kind: type, streams: object) -> None:
    with pytest.raises(DataError, match="streams must be a whole number from 0 to 64"):
        kind(streams=streams)


@pytest.mark.parametrize("kind", [CudaOptions, TensorrtOptions])
def test_a_cuda_graph_runs_one_batch_at_a_time(kind: type) -> None:
    with pytest.raises(DataError, match="use one stream with it"):
        kind(streams=2, graph=True)
    with pytest.raises(DataError, match="graph must be True, False or None, found 'yes'"):
        kind(graph="yes")
    assert kind(streams=1, graph=True).graph and kind(streams=2, graph=False).streams == 2


@pytest.mark.parametrize(
    ("name", "near"), [("batchsize", "batch_size"), ("thread", "threads"), ("compute", "compute_precision")]
)
def test_an_unknown_option_suggests_the_one_that_was_meant(name: str, near: str) -> None:
    with pytest.raises(DataError) as caught:
        RunOptions().changed(**{name: 1})
    assert f"no option named {name!r}; did you mean " in str(caught.value)
    assert near in str(caught.value)
    with pytest.raises(DataError, match="no option named 'zzz'; known: allow_cpu, batch_size, "):
        RunOptions().changed(zzz=1)


def test_changes_make_a_copy() -> None:
    one = RunOptions(provider="cpu", threads=2)
    assert one.changed(threads=3, devices=[1, 0]) == RunOptions(provider="cpu", threads=3, devices=(1, 0))
    assert one == RunOptions(provider="cpu", threads=2)
    with pytest.raises(AttributeError):
        one.threads = 5  # type: ignore[misc]
    assert cloudrt.RunOptions is RunOptions


def test_the_examples_set_every_option() -> None:
    assert {
        one.name for one in fields(RunOptions) if getattr(EVERYTHING, one.name) == getattr(RunOptions(), one.name)
    } == {"remote"}
    assert not [one.name for one in fields(RemoteOptions) if getattr(REMOTE.remote, one.name) == one.default]


@pytest.mark.parametrize("options", [RunOptions(), EVERYTHING, REMOTE])
def test_options_round_trip_through_json(options: RunOptions) -> None:
    assert RunOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_options_from_json_are_checked() -> None:
    assert RunOptions.from_dict({}) == RunOptions()
    assert RunOptions.from_dict({"threads": 2, "cuda": {"streams": 3}}) == RunOptions(
        threads=2, cuda=CudaOptions(streams=3)
    )
    for values, named in (
        ({"treads": 2}, "did you mean threads"),
        ({"threads": -2}, "threads must be a whole number"),
        ({"cuda": {"steams": 3}}, "invalid provider options"),
        ({"cuda": 5}, "invalid provider options"),
        ({"decoder": 5}, "no decoder named 5; known: cpu, gpu"),
        ({"remote": {"timeout_s": "60"}}, "timeout_s must be a number, found '60'"),
        ({"cuda": {"streams": 3, "graph": True}}, "use one stream with it"),
    ):
        with pytest.raises(DataError, match=named):
            RunOptions.from_dict(values)


def test_keywords_are_the_fields() -> None:
    """A field without its keyword could not be given to `Segmenter` or `infer`; a wrong type would mislead mypy."""
    options = {one.name for one in fields(RunOptions)}
    assert RunSettings.__annotations__.keys() == options
    hints = get_type_hints(RunOptions, vars(module))
    assert get_type_hints(RunSettings, vars(module)) == hints
    task = {one.name for one in fields(InferTask)} - {"inputs", "output", "model", "run"}
    assert InferSettings.__annotations__.keys() == options | task
    assert not options & task
