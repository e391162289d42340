"""What is installed, what this machine is, and which providers really work here.

`diagnose` runs a graph of three nodes in every provider that nothing obvious stands against, each in a process of its
own: a broken driver then ends the trial and not the doctor, and none of the libraries is loaded here.
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

from cloudrt.engines.availability import NAMES, obstacle, runtime_package
from cloudrt.engines.choice import open_engine
from cloudrt.errors import CloudrtError
from cloudrt.labels import Labels
from cloudrt.model.artifact import Artifact, write_metadata
from cloudrt.system.machine import Machine, describe_machine
from cloudrt.system.versions import installed_distributions

if TYPE_CHECKING:
    import onnx

LISTED = (
    *("cloudrt", "numpy", "numba", "pandas", "opencv-python-headless", "opencv-python", "simplejpeg"),
    *("onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "tensorrt", "nvidia-cudnn-cu13"),
    *("torch", "torchvision", "segmentation-models-pytorch", "timm", "albumentations", "pyarrow", "ray"),
)
"""The distributions whose versions matter; those that are not installed are left out."""

_SAME_FILES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "ort-nightly"),
    "cv2": ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
}
"""Module -> distributions that each write its files over those of the others."""

_TRIAL = "import sys; from cloudrt.doctor import try_provider; sys.exit(try_provider(sys.argv[1]))"
_PATIENCE = 120  # seconds; TensorRT takes several to start


UNTESTED = (
    "Not run yet by cloudrt's own tests: TensorRT. Its options, engine cache and int8 layout are tested as values; "
    "bench/tensorrt.sh in the repository checks them where it is installed.",
    "Not run yet by cloudrt's own tests: CUDA, several GPUs, CUDA graphs, nvImageCodec on a GPU. Tests run their code "
    "on the CPU, and skip the rest where there is no GPU.",
)
"""What stands in README too: what the figures and tests do not cover."""


@dataclass(frozen=True)
class ProviderState:
    """Whether a provider answered a small graph correctly; else why not, and what to install or do."""

    name: str
    works: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Parameters
    ----------
    versions
        Distribution -> version, and Python's.
    machine
        The computer.
    providers
        One state a provider, in the order of `cloudrt.engines.availability.NAMES`.
    conflicts
        One sentence for each module that two distributions overwrite, ending with the line that repairs it.
    advice
        What would make this machine faster.
    untested
        What cloudrt has never been run on by those who make it.
    """

    versions: dict[str, str]
    machine: Machine
    providers: tuple[ProviderState, ...]
    conflicts: tuple[str, ...]
    advice: tuple[str, ...]
    untested: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at the installation and the machine, and try every provider; takes a few seconds."""
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
    """Return a sentence, ending with the line that repairs it, for each module that two distributions overwrite."""
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
    """Try one provider, in a process of its own unless something obvious stands against it."""
    found = obstacle(name)
    if found is not None:
        return ProviderState(name, False, found.reason, found.remedy)
    try:
        # -P: as for an installed command, a file in the current folder is not mistaken for a module.
        trial = subprocess.run(
            [sys.executable, "-P", "-c", _TRIAL, name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ProviderState(name, False, f"gave no answer in {_PATIENCE} s", _reinstall(name))
    if trial.returncode == 0:
        return ProviderState(name, True)
    lines = [line for line in trial.stderr.splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else f"ended with status {trial.returncode}"
    if trial.returncode < 0:
        reason = f"crashed ({signal.Signals(-trial.returncode).name})"
    return ProviderState(name, False, reason, _reinstall(name))


def try_provider(name: str) -> str | None:
    """Run a small artifact in a provider, here, as `cloudrt-infer` does; return what went wrong, or None.

    Its answer is exact in every precision: a convolution whose sums are whole numbers below 256.
    """
    levels = np.arange(3 * 64, dtype=np.uint8).reshape(1, 8, 8, 3) % 80
    expected = levels.sum(axis=3, dtype=np.uint8)[:, None]
    try:
        with open_engine(build_graph(), name, 1, 1) as engine:
            answer = engine.probability(levels)
    except (CloudrtError, ImportError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None if np.array_equal(answer, expected) else "gave a wrong answer for a convolution of 64 pixels"


def build_graph() -> onnx.ModelProto:
    """Return an artifact of one class: the sum of the channels, by a 3x3 convolution, on a grid of 8x8 pixels."""
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
    package = {"openvino": "openvino", "cpu": runtime_package(), "cuda": "cloudrt[cuda]"}.get(
        name, "cloudrt[cuda,tensorrt]"
    )
    return f"pip install --force-reinstall '{package}'"


def _advice(providers: tuple[ProviderState, ...], machine: Machine) -> list[str]:
    """Return what would make this machine faster."""
    state = {provider.name: provider for provider in providers}
    advice = []
    if machine.gpus and not state["cuda"].works:
        advice.append(f"The GPU is idle, since CUDA does not work ({state['cuda'].reason}): {state['cuda'].remedy}")
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and not state["cuda"].works and state["openvino"].reason == "OpenVINO is not installed":
        advice.append(f"OpenVINO is faster than ONNX Runtime on some Intel and AMD CPUs: {state['openvino'].remedy}")
    return advice
