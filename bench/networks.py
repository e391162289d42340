"""Networks of the peers: the artifact or its checkpoint, run one image at a time as the libraries' documentation shows.

None of them uses cloudrt's engines.
"""

from __future__ import annotations

from collections.abc import Callable
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
from cloudrt.system.files import sha256
from cloudrt.system.versions import install_command

from .agreement import open_networks
from .notebook import Network, Presence, Probability, has_data
from .options import BenchOptions
from .workload import Workload

if TYPE_CHECKING:
    from cloudrt.model.checkpoint import Checkpoint


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
    """The checkpoint in PyTorch, eager, float32, batch 1, on the CPU.

    Raises
    ------
    ModuleNotFoundError
        PyTorch or segmentation_models_pytorch is not installed.
    ArtifactError
        Not a checkpoint, or not the one the artifact was exported from.
    """

    name = "PyTorch eager fp32, batch 1"

    def __init__(self, checkpoint: Path, artifact: Artifact, threads: int = 0) -> None:
        import torch

        loaded = load_checkpoint(checkpoint, artifact)
        if threads:
            torch.set_num_threads(threads)
        self.torch = torch
        self.config = loaded.config
        self.views = VIEWS[artifact.tta]
        self.network = loaded.network()

    def __call__(self, image: Image) -> tuple[Probability, Presence]:
        """See `Network`."""
        config = self.config
        normalised = (image - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
        batch = normalised.transpose(2, 0, 1)[None]
        answers = [self._answer(batch, view) for view in self.views]
        probability = _sigmoid(np.mean([one for one, _ in answers], axis=0))
        if config.subtract_no_data:
            probability[:, ~has_data(image, config.labels.submit_grid)] = 0
        heads = [head for _, head in answers if head is not None]
        presence = None
        if heads:
            presence = _sigmoid(np.mean(heads, axis=0))
        elif config.presence == "top-k":
            presence = np.sort(probability.reshape(len(probability), -1), axis=1)[:, -config.top_k :].mean(axis=1)
        return probability, None if presence is None else np.round(255 * presence).astype(np.uint8)

    def _answer(
        self, batch: NDArray[np.floating[Any]], view: tuple[int, ...]
    ) -> tuple[Probability, Probability | None]:
        """Return the logits (C, H, W) on the submission grid, and (C,) of the presence head, for one view."""
        with self.torch.no_grad():
            found = self.network(self.torch.from_numpy(np.flip(batch, view).copy()))
        masks, head = found if isinstance(found, tuple) else (found, None)
        height, width = self.config.labels.submit_grid
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
    """A checkpoint in PyTorch with its usual speed-ups: channels last and half precision, or torch.compile.

    Parameters
    ----------
    checkpoint
        The checkpoint, loaded; see `load_checkpoint`.
    tta
        Flips of the artifact.
    device
        "cpu", with autocast to bf16, or "cuda", with the network in fp16.
    compiled
        Whether to use torch.compile, in fp32 on a CPU.
    threads
        CPU threads; 0 is PyTorch's default.
    """

    def __init__(
        self, checkpoint: Checkpoint, tta: str, device: str = "cpu", compiled: bool = False, threads: int = 0
    ) -> None:
        import torch

        from cloudrt.model.network import InferenceGraph

        if threads:
            torch.set_num_threads(threads)
        self.torch, self.device = torch, device
        dtype = torch.float16 if device == "cuda" else torch.float32
        self.autocast = device == "cpu" and not compiled
        precision = "fp16" if device == "cuda" else "bf16" if self.autocast else "fp32"
        self.name = f"PyTorch {'torch.compile' if compiled else 'channels last'} {precision}, batch 1"
        graph = InferenceGraph(checkpoint.network().to(dtype), checkpoint.config, dtype).to(device)
        graph.network.to(memory_format=torch.channels_last)
        views = VIEWS[tta]

        def answer(image: Any) -> Any:
            return graph.quantise_outputs(
                *graph.predict_probability(image.to(torch.float32).permute(0, 3, 1, 2), views)
            )

        self.graph: Callable[[Any], Any] = torch.compile(answer) if compiled else answer

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


def load_checkpoint(checkpoint: Path, artifact: Artifact) -> Checkpoint:
    """Return the checkpoint an artifact was exported from.

    Raises
    ------
    ModuleNotFoundError, ArtifactError
        See `TorchNetwork`.
    """
    from cloudrt.model.checkpoint import Checkpoint

    loaded = Checkpoint.load(checkpoint)
    if sha256(checkpoint) != artifact.checkpoint_sha256:
        raise ArtifactError(f"{checkpoint} is not the checkpoint the artifact was exported from")
    _refuse_ensemble(artifact)
    return loaded


def _refuse_ensemble(artifact: Artifact) -> None:
    """Raise ArtifactError for an artifact of several networks, of which PyTorch would run only one."""
    if len(artifact.members) > 1:
        raise ArtifactError(f"the artifact averages {len(artifact.members)} networks, and PyTorch would run only one")


def make_checkpoint(model: Any, artifact: Artifact) -> Checkpoint:
    """Return a checkpoint of an artifact's network with random weights, which is as fast.

    Raises
    ------
    ModuleNotFoundError, ArtifactError, DataError
        PyTorch is not installed; the artifact has several networks; the network cannot be built.
    """
    from cloudrt.model.checkpoint import Checkpoint
    from cloudrt.model.network import build_network

    _refuse_ensemble(artifact)
    has_presence = any(output.name == "presence" for output in model.graph.output)
    config = NetworkConfig(
        architecture=artifact.architecture,
        encoder=artifact.encoder,
        options=artifact.options,
        input_size=artifact.input_size,
        subtract_no_data=artifact.subtract_no_data,
        presence="head" if has_presence else "none",
        labels=artifact.labels,
    )
    return Checkpoint(config, build_network(config).state_dict(), (), 0.0, 0)


def open_peer(options: BenchOptions, work: Workload) -> tuple[Network, dict[str, str]]:
    """Return the network of the notebook's way, and the peers that are skipped: name -> reason.

    Raises
    ------
    ArtifactError
        The checkpoint is not that of the artifact.
    """
    threads, title, reason = options.run.threads, TorchNetwork.name, "no --checkpoint was given"
    if options.checkpoint:
        try:
            peer = TorchNetwork(options.checkpoint, work.artifact, threads)
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
    checkpoint = options.checkpoint
    if checkpoint:
        device = "cuda" if work.on_gpu else "cpu"
        openers |= {
            "PyTorch channels last": lambda: TorchGraph(
                load_checkpoint(checkpoint, artifact), artifact.tta, device, threads=threads
            ),
            "PyTorch torch.compile": lambda: TorchGraph(
                load_checkpoint(checkpoint, artifact), artifact.tta, device, compiled=True, threads=threads
            ),
        }
    return openers
