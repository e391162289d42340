"""The plugin of TensorRT for RTX as far as it goes without a GPU: it registers, and says which GPUs it supports."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
from support.gpu_stub import build_stubs, python_with_stubs
from support.tiny import SMALL_GRIDS, tiny_model

from cloudrt.engines import tensorrt_rtx
from cloudrt.engines.base import EngineOptions
from cloudrt.engines.choice import open_engine
from cloudrt.engines.tensorrt_rtx import EP_NAME, find_device, register, supports
from cloudrt.errors import ProviderError
from cloudrt.system.nvidia import Driver


@pytest.mark.parametrize(
    ("capability", "supported"),
    [
        *[((8, 6), True), ((8, 9), True), ((12, 0), True), ((12, 1), True), ((13, 0), True)],
        *[((7, 5), False), ((8, 0), False), ((8, 7), False), ((9, 0), False), ((10, 0), False), ((10, 3), False)],
    ],
)
def test_supported_gpus(capability: tuple[int, int], supported: bool) -> None:
    """RTX 30, 40 and 50; neither A100, H100 nor B200."""
    assert supports(capability) is supported


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plugin = pytest.importorskip(tensorrt_rtx.MODULE)
    folder = Path(plugin.__file__).parent
    libraries = (folder / "libonnxruntime_providers_nv_tensorrt_rtx.so", folder / "libtensorrt_plugins.so")
    return build_stubs(tmp_path_factory.mktemp("stubs"), *libraries)


REGISTER = """
import sys
from cloudrt.engines.tensorrt_rtx import EP_NAME, MODULE, find_device, register
from cloudrt.errors import ProviderError
try:
    find_device(0)
except ProviderError as error:
    print(error)
print(MODULE in sys.modules)
"""


def test_the_plugin_registers_and_finds_no_gpu(stubs: Path) -> None:
    """The driver lists a GPU that CUDA cannot use; a second call of `register` does nothing."""
    done = python_with_stubs(stubs, f"{REGISTER}register()\nregister()", STUB_GPUS="8.9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "TensorRT for RTX finds 0 GPUs, but not GPU 0: cloudrt doctor checks the driver and the libraries",
        "True",
    ]


def test_an_unsupported_gpu_is_named_before_anything_is_loaded(stubs: Path) -> None:
    done = python_with_stubs(stubs, REGISTER, STUB_GPUS="9.0 8.9")
    assert done.stdout.splitlines() == [
        "GPU 0, NVIDIA Stub, 8 GiB, has compute capability 9.0, but TensorRT for RTX needs 8.6, 8.9, or 12.0 and "
        "later: use provider cuda or tensorrt",
        "False",
    ]


def test_a_library_of_the_driver_that_is_missing_is_named(stubs: Path, tmp_path: Path) -> None:
    """A container without the driver's `utility` part has no libnvidia-ml."""
    (tmp_path / "libcuda.so.1").symlink_to(stubs / "libcuda.so.1")
    done = python_with_stubs(tmp_path, REGISTER, STUB_GPUS="8.9")
    if "finds 0 GPUs" in done.stdout:
        pytest.skip("this machine has libnvidia-ml")
    line = done.stdout.splitlines()[0]
    assert line.startswith("the plugin of TensorRT for RTX cannot be loaded: ") and "libnvidia-ml.so.1" in line


class Device:
    """One of ONNX Runtime's devices."""

    def __init__(self, name: str, number: int) -> None:
        self.ep_name, self.number = name, number


def test_the_device_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin lists only the GPUs that it supports."""
    driver = Driver((13, 0), ("A", "B", "C"), ((9, 0), (8, 9), (12, 0)))
    monkeypatch.setattr(tensorrt_rtx, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(tensorrt_rtx, "register", lambda: None)
    devices = [Device("CPUExecutionProvider", 0), Device(EP_NAME, 1), Device(EP_NAME, 2)]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices)
    assert [find_device(number).number for number in (1, 2)] == [1, 2]
    with pytest.raises(ProviderError, match=r"GPU 0, A, has compute capability 9\.0"):
        find_device(0)


def test_a_plugin_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, tensorrt_rtx.MODULE, None)
    register.cache_clear()
    with pytest.raises(ProviderError, match=r"pip install '\.\[tensorrt-rtx\]'"):
        register()


def test_an_error_of_the_plugin_without_a_message_has_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError

    plugin = SimpleNamespace(__file__="/none/plugin.py", get_library_path=lambda: "/none/plugin.so")
    monkeypatch.setitem(sys.modules, tensorrt_rtx.MODULE, plugin)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", refuse)
    register.cache_clear()
    with pytest.raises(ProviderError, match="cannot be loaded: RuntimeError: cloudrt doctor checks the driver"):
        register()


def test_a_session_gets_device_and_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through `add_provider_for_devices`, without a list of providers, which would replace it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[Any] = []
    real = onnxruntime.InferenceSession

    class Settings:
        def __init__(self) -> None:
            self.__dict__["real"] = onnxruntime_options()

        def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
            asked.append((devices, options))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["real"], name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.__dict__["real"], name, value)

    onnxruntime_options = onnxruntime.SessionOptions

    def open_session(content: bytes, settings: Any, **words: Any) -> Any:
        assert words == {"enable_fallback": 0}
        session = real(content, settings.__dict__["real"], providers=["CPUExecutionProvider"])
        session.get_providers = lambda: [EP_NAME, "CPUExecutionProvider"]
        session.get_provider_graph_assignment_info = list
        return session

    monkeypatch.setattr("cloudrt.engines.session.onnxruntime.SessionOptions", Settings)
    monkeypatch.setattr("cloudrt.engines.session.onnxruntime.InferenceSession", open_session)
    monkeypatch.setattr(tensorrt_rtx, "find_device", lambda number: f"device {number}")
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None)
    model = tiny_model(labels=SMALL_GRIDS)
    options = EngineOptions(cuda_graph=True, device=1)
    with open_engine(model, "tensorrt-rtx", 8, 1, options) as engine:
        assert engine.provider == "tensorrt-rtx"
    ((devices, chosen),) = asked
    assert devices == ["device 1"]
    assert chosen["enable_cuda_graph"] == "1"
    assert chosen["nv_profile_opt_shapes"] == "image:8x64x96x3"
    assert Path(chosen["nv_runtime_cache_path"]).parent == tmp_path / "cloudrt" / "tensorrt-rtx"
