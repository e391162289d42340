"""Networks of the peers: the artifact or its checkpoint, run one image at a time as the libraries' documentation shows.

None of them uses cloudrt's engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.widen import widen
from cloudrt.errors import ArtifactError
from cloudrt.images.image import Image
from cloudrt.model.artifact import Artifact, parse_artifact
from cloudrt.model.network_config import VIEWS, NetworkConfig
from cloudrt.model.onnx_file import load_model
from cloudrt.system.files import is_special, sha256
from cloudrt.system.versions import install_command

from .agreement import open_networks
from .notebook import Network, Presence, Probability, has_data
from .options import BenchOptions
from .workload import Workload

if TYPE_CHECKING:
    from cloudrt.export.ensemble import Ensemble


class OnnxNetwork:
    """The artifact in ONNX Runtime on the CPU at batch 1, opened as its documentation shows.

    An fp16 artifact is widened to float32 first, because emulating fp16 would slow the peer down.
    """

    def __init__(self, model: Path, threads: int = 0) -> None:
        import onnxruntime

        loaded = load_model(model)
        precision = "int8" if parse_artifact(loaded, model).precision == "int8" else "fp32"
        self.name = f"ONNX Runtime CPU {precision}, batch 1"
        content = widen(loaded).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, image: Image) -> tuple[Probability, Presence]:
        """See `Network`."""
        found = dict(zip(self.outputs, self.session.run(None, {"image": image[None]}), strict=True))
        presence = found.get("presence")
        return found["probability"][0].transpose(0, 2, 1), None if presence is None else presence[0]


class TorchNetwork:
    """The checkpoints in PyTorch, eager, float32, batch 1, on the CPU.

    Parameters
    ----------
    ensemble
        From `load_ensemble`.
    threads
        CPU threads; 0 is PyTorch's default.
    """

    name = "PyTorch eager fp32, batch 1"

    def __init__(self, ensemble: Ensemble, threads: int = 0) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.torch = torch
        self.configs = [one.config for one in ensemble.checkpoints]
        self.views = VIEWS[ensemble.tta]
        self.networks = [one.network() for one in ensemble.checkpoints]

    def __call__(self, image: Image) -> tuple[Probability, Presence]:
        """See `Network`."""
        answers = [self._member(*one, image) for one in zip(self.networks, self.configs, strict=True)]
        probability = np.mean([one for one, _ in answers], axis=0)
        heads = [head for _, head in answers if head is not None]
        config = self.configs[0]
        presence = None
        if heads:
            presence = np.mean(heads, axis=0)
        elif config.presence == "top-k":
            presence = np.sort(probability.reshape(len(probability), -1), axis=1)[:, -config.top_k :].mean(axis=1)
        return probability, None if presence is None else np.round(255 * presence).astype(np.uint8)

    def _member(self, network: Any, config: NetworkConfig, image: Image) -> tuple[Probability, Probability | None]:
        """Return the probability (C, H, W) of one network on the submission grid, and (C,) of its presence head."""
        normalised = (image - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
        batch = normalised.transpose(2, 0, 1)[None]
        answers = [self._answer(network, config, batch, view) for view in self.views]
        probability = _sigmoid(np.mean([one for one, _ in answers], axis=0))
        if config.subtract_no_data:
            probability[:, ~has_data(image, config.labels.submit_grid)] = 0
        heads = [head for _, head in answers if head is not None]
        return probability, _sigmoid(np.mean(heads, axis=0)) if heads else None

    def _answer(
        self, network: Any, config: NetworkConfig, batch: NDArray[np.floating[Any]], view: tuple[int, ...]
    ) -> tuple[Probability, Probability | None]:
        """Return the logits (C, H, W) on the submission grid, and (C,) of the presence head, for one view."""
        with self.torch.no_grad():
            found = network(self.torch.from_numpy(np.flip(batch, view).copy()))
        masks, head = found if isinstance(found, tuple) else (found, None)
        height, width = config.labels.submit_grid
        logits = np.flip(masks.numpy(), view)[0]
        resized = np.stack(
            [cv2.resize(np.ascontiguousarray(each), (width, height), interpolation=cv2.INTER_LINEAR) for each in logits]
        )
        return resized, None if head is None else head[0].numpy()


def _sigmoid(logits: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    return np.asarray(1 / (1 + np.exp(-logits)))


class OpenvinoNetwork:
    """The artifact in OpenVINO at batch 1, compiled and called as its documentation shows.

    Raises
    ------
    ModuleNotFoundError
        OpenVINO is not installed.
    """

    name = "OpenVINO, batch 1"

    def __init__(self, model: Path, threads: int = 0) -> None:
        import openvino

        loaded = widen(load_model(model))
        options = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        core = openvino.Core()
        self.compiled = core.compile_model(core.read_model(loaded.SerializeToString()), "CPU", options)

    def __call__(self, image: Image) -> tuple[Probability, Presence]:
        """See `Network`."""
        found = {next(iter(key.names)): value for key, value in self.compiled(image[None]).items()}
        presence = found.get("presence")
        return found["probability"][0].transpose(0, 2, 1).copy(), None if presence is None else presence[0].copy()


class TorchGraph:
    """The checkpoints in PyTorch with its usual speed-ups: channels last and half precision, or torch.compile.

    Parameters
    ----------
    ensemble
        From `load_ensemble`.
    device
        "cpu", with autocast to bf16, or "cuda", with the network in fp16.
    compiled
        Whether to use torch.compile, in fp32 on a CPU.
    threads
        CPU threads; 0 is PyTorch's default.
    """

    def __init__(self, ensemble: Ensemble, device: str = "cpu", compiled: bool = False, threads: int = 0) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.torch, self.device = torch, device
        dtype = torch.float16 if device == "cuda" else torch.float32
        self.autocast = device == "cpu" and not compiled
        precision = "fp16" if device == "cuda" else "bf16" if self.autocast else "fp32"
        self.name = f"PyTorch {'torch.compile' if compiled else 'channels last'} {precision}, batch 1"
        graph = ensemble.graph(dtype).to(device).to(memory_format=torch.channels_last)
        self.graph: Callable[[Any], Any] = torch.compile(graph) if compiled else graph

    def __call__(self, image: Image) -> tuple[Probability, Presence]:
        """See `Network`."""
        levels, presence = self.run(image[None])
        return levels[0].transpose(0, 2, 1), None if presence is None else presence[0]

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return levels (N, C, W, H) and presence (N, C), or None, of (N, H, W, 3) images, all on the host."""
        found = self.compute(self.torch.from_numpy(images).to(self.device))
        levels, presence = found if isinstance(found, tuple) else (found, None)
        return levels.cpu().numpy(), None if presence is None else presence.cpu().numpy()

    def compute(self, images: Any) -> Any:
        """Return the same as tensors on the device, from a tensor on the device; a GPU may still be computing them."""
        torch = self.torch
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            return self.graph(images)


def load_ensemble(checkpoints: Sequence[str | Path], artifact: Artifact) -> Ensemble:
    """Return the checkpoints an artifact was exported from, in its order, with its flips.

    Raises
    ------
    ModuleNotFoundError
        PyTorch or segmentation_models_pytorch is not installed.
    ArtifactError
        A file is not a checkpoint, or the checkpoints are not exactly those that the artifact was exported from.
    """
    from cloudrt.export.ensemble import Ensemble

    from cloudrt.model.checkpoint import Checkpoint

    wanted = [str(member.get("sha256")) for member in artifact.members] or [artifact.checkpoint_sha256]
    for path in checkpoints:
        if is_special(path):
            raise ArtifactError(f"{path} is not a regular file")
    found = {sha256(Path(path)): path for path in checkpoints}
    if len(found) < len(checkpoints):
        raise ArtifactError("one of the checkpoints is given twice: give each once")
    for digest, path in found.items():
        if digest not in wanted:
            raise ArtifactError(f"{path} is not a checkpoint the artifact was exported from")
    if len(found) < len(wanted):
        raise ArtifactError(
            f"the artifact averages {len(wanted)} networks, found {len(found)} of their checkpoints: give all of them"
        )
    return Ensemble(tuple(Checkpoint.load(found[digest]) for digest in wanted), tuple(wanted), artifact.tta)


def make_ensemble(model: Any, artifact: Artifact) -> Ensemble:
    """Return the networks of an artifact with random weights; the speed is the same.

    An artifact has the options of its first network only; the others are assumed to have the same.

    Raises
    ------
    ModuleNotFoundError, DataError
        PyTorch is not installed; a network cannot be built.
    """
    from cloudrt.export.ensemble import Ensemble

    from cloudrt.model.checkpoint import Checkpoint
    from cloudrt.model.network import build_network

    has_presence = any(output.name == "presence" for output in model.graph.output)
    checkpoints = []
    for member in artifact.members or [{}]:
        config = NetworkConfig(
            architecture=member.get("architecture", artifact.architecture),
            encoder=member.get("encoder", artifact.encoder),
            options=artifact.options,
            input_size=artifact.input_size,
            subtract_no_data=artifact.subtract_no_data,
            presence="head" if has_presence else "none",
            labels=artifact.labels,
        )
        checkpoints.append(Checkpoint(config, build_network(config).state_dict(), (), 0.0, 0))
    return Ensemble(tuple(checkpoints), tta=artifact.tta)


def open_peer(options: BenchOptions, work: Workload) -> tuple[Network, dict[str, str]]:
    """Return the network of the notebook's way, and the peers that are skipped: name -> reason.

    Raises
    ------
    ArtifactError
        The checkpoints are not those of the artifact.
    """
    threads, title, reason = options.run.threads, TorchNetwork.name, "no --checkpoint was given"
    if options.checkpoints:
        try:
            peer = TorchNetwork(load_ensemble(options.checkpoints, work.artifact), threads)
        except ModuleNotFoundError as error:
            reason = f"{error.name} is not installed: {install_command('train')}"
        else:
            opened, skipped = open_networks({title: lambda: peer}, work)
            if opened:
                return peer, {}
            reason = skipped[title]
    return OnnxNetwork(work.segmenter.model, threads), {title: reason}


def list_openers(options: BenchOptions, work: Workload) -> dict[str, Callable[[], Network]]:
    """Return the peers of the pipeline: title -> function that opens the network."""
    model, threads, artifact = options.baseline or work.segmenter.model, options.run.threads, work.artifact
    openers: dict[str, Callable[[], Network]] = {
        "ONNX Runtime": lambda: OnnxNetwork(model, threads),
        "OpenVINO": lambda: OpenvinoNetwork(model, threads),
    }
    if options.checkpoints:
        device = "cuda" if work.on_gpu else "cpu"

        def load() -> Ensemble:
            return load_ensemble(options.checkpoints, artifact)

        openers |= {
            "PyTorch channels last": lambda: TorchGraph(load(), device, threads=threads),
            "PyTorch torch.compile": lambda: TorchGraph(load(), device, compiled=True, threads=threads),
        }
    return openers
