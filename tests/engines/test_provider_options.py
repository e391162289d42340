"""The options of the GPU providers, read by ONNX Runtime's own parsers: no GPU is needed for that."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as C
from support.gpu_stub import CAPI, build_stubs, python_with_stubs

from cloudrt.doctor import build_graph
from cloudrt.engines import tensorrt_rtx
from cloudrt.engines.base import EngineOptions
from cloudrt.engines.session import provider_options
from cloudrt.model.artifact import Artifact
from cloudrt.model.onnx_file import graph_bytes

ARTIFACTS = [Artifact(input_size=(64, 96), precision=precision) for precision in ("fp32", "fp16", "int8")]
GRAPHS = [EngineOptions(), EngineOptions(streams=2), EngineOptions(cuda_graph=True, device=1)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder several levels deep, none of which exists."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there"))
    return tmp_path / "not" / "there" / "cloudrt"


def initialise(name: str, options: dict[str, str]) -> None:
    """Open a session as `InferenceSession` does, up to the library of the provider, which need not load."""
    settings = C.SessionOptions()
    settings.log_severity_level = 4
    session = C.InferenceSession(settings, graph_bytes(build_graph()), False, False)
    session.initialize_session([name, "CPUExecutionProvider"], [options, {}], set())


needs_tensorrt = pytest.mark.skipif(
    "TensorrtExecutionProvider" not in onnxruntime.get_available_providers(), reason="built without TensorRT"
)


@needs_tensorrt
@pytest.mark.parametrize(("artifact", "batch", "options"), list(product(ARTIFACTS, (1, 32, None), GRAPHS)))
def test_tensorrts_options_are_parsed(artifact: Artifact, batch: int | None, options: EngineOptions) -> None:
    chosen = provider_options("tensorrt", artifact, batch, b"model", options)
    assert chosen["device_id"] == str(options.device)
    initialise("TensorrtExecutionProvider", chosen)


@needs_tensorrt
@pytest.mark.parametrize("options", [{"trt_cuda_graph_enable": "1"}, {"trt_nonsense": "True"}])
def test_the_parser_refuses_what_it_does_not_know(options: dict[str, str]) -> None:
    """Positive control of the test above."""
    with pytest.raises(RuntimeError, match=r"should be 'True' or 'False'|Invalid TensorRT EP option: trt_nonsense"):
        initialise("TensorrtExecutionProvider", options)


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_tensorrts_network_is_strongly_typed(artifact: Artifact) -> None:
    """ONNX Runtime builds such a network if no precision is enabled: layers kept in fp32 then run in fp32."""
    chosen = provider_options("tensorrt", artifact, 8, b"model")
    assert not {name for name in chosen if "fp16" in name or "int8" in name or "bf16" in name or "fp32" in name}


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_the_cache_folder_is_there(cache: Path, provider: str) -> None:
    """TensorRT's provider creates one level and no more."""
    chosen = provider_options(provider, ARTIFACTS[0], 8, b"model")
    folders = [Path(value) for name, value in chosen.items() if name.endswith("_path")]
    assert folders and all(folder.is_dir() and folder.parent == cache / provider for folder in folders)


@pytest.mark.parametrize("artifact", [*ARTIFACTS, Artifact(precision="fp16", kept_fp32=("encoder.conv1",))])
def test_cuda_computes_fp32_in_fp32(artifact: Artifact) -> None:
    assert provider_options("cuda", artifact, 8, b"model")["use_tf32"] == "0"


def test_bias_is_fused_in_nhwc_alone() -> None:
    """In NCHW it adds a synchronous memset to every convolution."""
    for channels_last in (False, True):
        chosen = provider_options("cuda", ARTIFACTS[1], 8, b"model", EngineOptions(channels_last=channels_last))
        assert chosen["prefer_nhwc"] == chosen["fuse_conv_bias"] == str(int(channels_last))


CUDA = """
import ctypes, json
from cloudrt.engines.libraries import cuda_libraries, cuda_major, find_library
for name in cuda_libraries(cuda_major()):
    ctypes.CDLL(str(find_library(name) or name))
from onnxruntime.capi import onnxruntime_pybind11_state as C
from cloudrt.doctor import build_graph
from cloudrt.model.onnx_file import graph_bytes
for options in json.loads(GIVEN):
    settings = C.SessionOptions()
    settings.log_severity_level = 4
    session = C.InferenceSession(settings, graph_bytes(build_graph()), False, False)
    try:
        session.initialize_session(["CUDAExecutionProvider", "CPUExecutionProvider"], [options, {}], set())
        print("fell back")
    except RuntimeError as error:
        print(" ".join(str(error).split()))
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = CAPI / "libonnxruntime_providers_cuda.so"
    if not library.is_file():
        pytest.skip("this ONNX Runtime was built without CUDA")
    from cloudrt.engines.libraries import cuda_major, is_present

    major = cuda_major()
    if not all(map(is_present, (f"libcudart.so.{major}", f"libcublas.so.{major}", "libcudnn.so.9"))):
        pytest.skip("needs the CUDA libraries that torch brings")
    return build_stubs(tmp_path_factory.mktemp("stubs"), library)


def test_cudas_options_are_parsed(stubs: Path) -> None:
    """The driver has no GPU; the parser of the CUDA provider reads all options before the provider looks for one."""
    ours = [
        provider_options("cuda", artifact, batch, b"model", options)
        for artifact, batch in product(ARTIFACTS, (8, None))
        for options in (*GRAPHS, EngineOptions(channels_last=True))
    ]
    for options in ours:
        del options["device_id"]  # calls the driver immediately, perhaps before the other options are read
    wrong = [{"nonsense": "1"}, {"cudnn_conv_algo_search": "BEST"}, {"prefer_nhwc": "2"}]
    done = python_with_stubs(stubs, f"GIVEN = {json.dumps([*ours, *wrong])!r}\n{CUDA}")
    lines = done.stdout.splitlines()
    assert len(lines) == len(ours) + len(wrong), done.stderr
    assert all("CUDA failure 100: no CUDA-capable device is detected" in line for line in lines[: len(ours)]), lines[0]
    assert all("provider option" in line for line in lines[len(ours) :]), lines[len(ours) :]


def test_the_plugins_options_are_in_its_header() -> None:
    """The wheel of TensorRT for RTX lists every name that its provider reads."""
    plugin = pytest.importorskip(tensorrt_rtx.MODULE)
    header = (Path(plugin.__file__).parent / "tensorrt_rtx_provider_options.h").read_text()
    chosen = provider_options("tensorrt-rtx", ARTIFACTS[1], 8, b"model", EngineOptions(cuda_graph=True))
    assert chosen["enable_cuda_graph"] == "1"
    for name in chosen:
        assert f'= "{name}";' in header, name
    assert {chosen[f"nv_profile_{edge}_shapes"] for edge in ("min", "opt", "max")} == {"image:8x64x96x3"}
    assert plugin.get_ep_name() == tensorrt_rtx.EP_NAME


def test_every_value_is_text() -> None:
    for provider, options in product(("cuda", "tensorrt", "tensorrt-rtx"), GRAPHS):
        chosen = provider_options(provider, ARTIFACTS[1], 8, b"model", options)
        assert all(type(value) is str for value in chosen.values()), asdict(options)
