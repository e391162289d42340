"""Diagnosis of the installation: package versions, hardware, and which providers work on this machine.

`diagnose` runs a small graph in each provider that `cloudrt.engines.availability` does not rule out. Each provider runs
in a separate process, so that a crash in a driver or library does not end the calling process.
"""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cloudrt.engines.availability import EXTRAS, NAMES, obstacle, runtime_package
from cloudrt.engines.base import DIAGNOSIS
from cloudrt.engines.choice import open_engine
from cloudrt.engines.plan import Plan
from cloudrt.errors import CloudrtError
from cloudrt.labels import Labels
from cloudrt.model.artifact import Artifact, write_metadata
from cloudrt.options import GPU_PROVIDERS
from cloudrt.system.machine import Machine, describe_machine
from cloudrt.system.versions import OPENCV, install_command, installed_distributions

if TYPE_CHECKING:
    import onnx

LISTED = (
    *("cloudrt", "numpy", "numba", "pandas", *OPENCV, "simplejpeg"),
    *("onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "tensorrt", "nvidia-cudnn-cu13"),
    *("torch", "torchvision", "segmentation-models-pytorch", "timm", "albumentations", "pyarrow", "ray"),
)
"""The distributions whose versions are reported, if they are installed."""

_SAME_FILES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "ort-nightly"),
    "cv2": OPENCV,
}
"""Module -> the distributions that install it; installing two of them overwrites files of the first."""

_TRIAL = "import sys; from cloudrt.doctor import try_provider; sys.exit(try_provider(sys.argv[1]))"
_TIMEOUT_S = 120  # TensorRT takes several seconds to start


UNTESTED = (
    "cloudrt's tests do not run TensorRT: they check its options with ONNX Runtime's parser, and build engines with "
    "TensorRT for RTX, which run only on a GPU. "
    "python -m cloudrt.bench.gpu runs it on a machine with TensorRT.",
    "cloudrt was run once with CUDA, on an NVIDIA H200; several GPUs and the current version of `--decoder gpu` "
    "have never been used. Without a GPU, the tests run as much of that code as possible on the CPU and skip the rest.",
)
"""What the tests do not cover."""


@dataclass(frozen=True)
class ProviderState:
    """Whether a provider computed a small graph correctly; if not, the reason and what to install or do."""

    name: str
    works: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`.

    Parameters
    ----------
    versions
        Distribution -> version; Python's version has the key "python".
    machine
        The hardware that this process may use.
    providers
        One state per provider, in the order of `cloudrt.engines.availability.NAMES`.
    conflicts
        One sentence for each module that several installed distributions overwrite, with the command that fixes it.
    advice
        What to install or repair to make cloudrt faster on this machine.
    untested
        See `UNTESTED`.
    """

    versions: dict[str, str]
    machine: Machine
    providers: tuple[ProviderState, ...]
    conflicts: tuple[str, ...]
    advice: tuple[str, ...]
    untested: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Inspect the installation and the hardware, and test every provider; takes a few seconds."""
    installed = installed_distributions()
    versions = {"python": platform.python_version()} | {name: installed[name] for name in LISTED if name in installed}
    with ThreadPoolExecutor(len(NAMES)) as pool:
        providers = tuple(pool.map(provider_state, NAMES))
    machine = describe_machine()
    return Diagnosis(
        versions,
        machine,
        providers,
        tuple(find_conflicts(set(installed))),
        tuple(_advice(providers, machine)),
        UNTESTED,
    )


def find_conflicts(installed: set[str]) -> list[str]:
    """Return `Diagnosis.conflicts` for the names of the installed distributions."""
    conflicts = []
    for module, names in _SAME_FILES.items():
        there = [name for name in names if name in installed]
        if len(there) > 1:
            keep = runtime_package() if module == "onnxruntime" else names[0]
            conflicts.append(
                f"{' and '.join(there)} overwrite each other's files: "
                f"pip uninstall -y {' '.join(there)} && pip install {keep}"
            )
    return conflicts


def provider_state(name: str) -> ProviderState:
    """Test one provider in a separate process, unless `obstacle` finds why it cannot run."""
    found = obstacle(name)
    if found is not None:
        return ProviderState(name, False, found.reason, found.remedy)
    try:
        # -P: do not import modules from the current folder, as in an installed command.
        trial = subprocess.run(
            [sys.executable, "-P", "-c", _TRIAL, name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ProviderState(name, False, f"did not finish within {_TIMEOUT_S} s", _reinstall(name))
    if trial.returncode == 0:
        return ProviderState(name, True)
    lines = [line for line in trial.stderr.splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else f"ended with status {trial.returncode}"
    reason = reason.removesuffix(f": {DIAGNOSIS}")
    if trial.returncode < 0:
        reason = f"crashed ({signal.Signals(-trial.returncode).name})"
    return ProviderState(name, False, reason, _reinstall(name))


def try_provider(name: str) -> str | None:
    """Run a small artifact in a provider, in this process; return what went wrong, or None.

    The engine has the options that `cloudrt-infer` starts its measurements from: one stream and no CUDA graph.
    The result is exact in every precision, because all sums are integers below 256.
    """
    levels = np.arange(3 * 64, dtype=np.uint8).reshape(1, 8, 8, 3) % 80
    expected = levels.sum(axis=3, dtype=np.uint8)[:, None]
    try:
        with open_engine(build_graph(), name, 1, 1, Plan(name, 1).options()) as engine:
            answer = engine.probability(levels)
    except (CloudrtError, ImportError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None if np.array_equal(answer, expected) else "returned a wrong result for a convolution"


def build_graph() -> onnx.ModelProto:
    """Return an artifact of one class that sums the channels of an 8x8 image with a 3x3 convolution."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.zeros((1, 3, 3, 3), np.float32)
    weight[:, :, 1, 1] = 1
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["levels"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["planes", "weight"], ["sums"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node("Cast", ["sums"], ["probability"], to=TensorProto.UINT8),
        ],
        "doctor",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info("probability", TensorProto.UINT8, ["N", 1, 8, 8])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    write_metadata(model, Artifact(labels=Labels(("Cloud",), (8, 8), (8, 8)), input_size=(8, 8)))
    return model


def _reinstall(name: str) -> str:
    if name == "cpu":
        return f"pip install --force-reinstall {runtime_package()}"
    command = install_command(EXTRAS.get(name, name), "--force-reinstall")
    return f"if nvidia-smi fails, repair the driver; otherwise {command}" if name in GPU_PROVIDERS else command


def _advice(providers: tuple[ProviderState, ...], machine: Machine) -> list[str]:
    """Return `Diagnosis.advice`."""
    state = {provider.name: provider for provider in providers}
    advice = []
    if machine.gpus and not state["cuda"].works:
        advice.append(
            f"The GPU is not used, because CUDA does not work ({state['cuda'].reason}): {state['cuda'].remedy}"
        )
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and not state["cuda"].works and state["openvino"].reason == "OpenVINO is not installed":
        advice.append(f"OpenVINO is faster than ONNX Runtime on some Intel and AMD CPUs: {state['openvino'].remedy}")
    return advice
