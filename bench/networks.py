"""Networks of peers: the artifact or its checkpoint, run as the libraries' documentation shows it, image by image.

None imports anything of cloudrt's engines; each names what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.widen import widen
from cloudrt.errors import ArtifactError, CloudrtError
from cloudrt.images.image import Image
from cloudrt.masks.postprocess import Rule, apply_rules
from cloudrt.model.artifact import Artifact, load_model, parse_artifact
from cloudrt.model.network_config import VIEWS

from .agreement import Maps
from .notebook import Network, Probability, has_data, rle_rows


class OnnxNetwork:
    """The artifact in ONNX Runtime on the CPU at batch 1, opened as its documentation shows.

    A fp16 artifact is widened to float32 first: emulating fp16 would punish the peer.
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

    def __call__(self, image: Image) -> tuple[Probability, NDArray[np.uint8] | None]:
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
        Not a checkpoint, or not the one that the artifact was exported from.
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

    def __call__(self, image: Image) -> tuple[Probability, NDArray[np.uint8] | None]:
        """See `Network`."""
        config = self.config
        normalised = (image - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
        batch = normalised.transpose(2, 0, 1)[None]
        answers = [self._answer(batch, view) for view in self.views]
        probability = np.mean([one for one, _ in answers], axis=0)
        if config.subtract_no_data:
            probability[:, ~has_data(image, config.labels.submit_grid)] = 0
        heads = [head for _, head in answers if head is not None]
        presence = None
        if heads:
            presence = np.mean(heads, axis=0)
        elif config.presence == "top-k":
            presence = np.sort(probability.reshape(len(probability), -1), axis=1)[:, -config.top_k :].mean(axis=1)
        return probability, None if presence is None else np.round(255 * presence).astype(np.uint8)

    def _answer(
        self, batch: NDArray[np.floating[Any]], view: tuple[int, ...]
    ) -> tuple[Probability, Probability | None]:
        """Return the probability on the grid, (C, H, W), and the head's, (C,), of an image flipped as `view`."""
        with self.torch.no_grad():
            found = self.network(self.torch.from_numpy(np.flip(batch, view).copy()))
        masks, head = found if isinstance(found, tuple) else (found, None)
        height, width = self.config.labels.submit_grid
        logits = np.flip(masks.numpy(), view)[0]
        resized = np.stack(
            [cv2.resize(np.ascontiguousarray(each), (width, height), interpolation=cv2.INTER_LINEAR) for each in logits]
        )
        return 1 / (1 + np.exp(-resized)), None if head is None else 1 / (1 + np.exp(-head[0].numpy()))


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

    def __call__(self, image: Image) -> tuple[Probability, NDArray[np.uint8] | None]:
        """See `Network`."""
        found = {next(iter(key.names)): value for key, value in self.compiled(image[None]).items()}
        presence = found.get("presence")
        return found["probability"][0].transpose(0, 2, 1).copy(), None if presence is None else presence[0].copy()


class TorchGraph:
    """The checkpoint in PyTorch with what speeds it up there: channels last and autocast, or torch.compile.

    Parameters
    ----------
    checkpoint
        The best.pth that the artifact was exported from.
    artifact
        The artifact.
    device
        "cpu", where autocast is to bf16, or "cuda", where it is to fp16.
    compiled
        Whether torch.compile is used, in fp32 on a CPU.

    Raises
    ------
    ModuleNotFoundError, ArtifactError
        As `TorchNetwork`.
    """

    def __init__(
        self, checkpoint: Path, artifact: Artifact, device: str = "cpu", compiled: bool = False, threads: int = 0
    ) -> None:
        import torch

        from cloudrt.model.network import InferenceGraph

        loaded = load_checkpoint(checkpoint, artifact)
        if threads:
            torch.set_num_threads(threads)
        self.torch, self.device = torch, device
        self.dtype = torch.float16 if device == "cuda" else torch.bfloat16
        self.autocast = device == "cuda" or not compiled
        precision = str(self.dtype).rpartition(".")[2].replace("bfloat", "bf").replace("float", "fp")
        self.name = f"PyTorch {'torch.compile' if compiled else 'channels last'} "
        self.name += f"{precision if self.autocast else 'fp32'}, batch 1"
        graph = InferenceGraph(loaded.network(), loaded.config).to(device)
        graph.network.to(memory_format=torch.channels_last)
        views = VIEWS[artifact.tta]

        def answer(image: Any) -> Any:
            return graph.levels(*graph.answers(image.to(torch.float32).permute(0, 3, 1, 2), views))

        self.graph: Callable[[Any], Any] = torch.compile(answer) if compiled else answer

    def __call__(self, image: Image) -> tuple[Probability, NDArray[np.uint8] | None]:
        """See `Network`."""
        torch = self.torch
        with torch.inference_mode(), torch.autocast(self.device, self.dtype, enabled=self.autocast):
            found = self.graph(torch.from_numpy(image[None]).to(self.device))
        levels, presence = found if isinstance(found, tuple) else (found, None)
        return (
            levels[0].cpu().numpy().transpose(0, 2, 1),
            None if presence is None else presence[0].cpu().numpy(),
        )


def load_checkpoint(checkpoint: Path, artifact: Artifact) -> Any:
    """Return the checkpoint that an artifact was exported from.

    Raises
    ------
    ModuleNotFoundError, ArtifactError
        As `TorchNetwork`.
    """
    from cloudrt.model.network import Checkpoint
    from cloudrt.system.files import sha256

    loaded = Checkpoint.load(checkpoint)
    if sha256(checkpoint) != artifact.checkpoint_sha256:
        raise ArtifactError(f"{checkpoint} is not the checkpoint that the artifact was exported from")
    if len(artifact.members) > 1:
        raise ArtifactError(f"the artifact is the mean of {len(artifact.members)} networks: {checkpoint} is but one")
    return loaded


LEAST_DICE = 0.97
"""Between a peer's masks and ours from the same images: below it, the peer answers another question."""


def open_networks(
    openers: dict[str, Callable[[], Network]], images: Sequence[Image], maps: Maps, rules: Sequence[Rule]
) -> tuple[dict[str, Network], dict[str, str]]:
    """Open each network and compare its answers with ours; return those that agree, and why the others are left out.

    Parameters
    ----------
    openers
        What a network is called until it is open -> how it is opened.
    images, maps
        Images of the input size, and what our engine says of them.
    rules
        One a class.
    """
    opened, skipped = {}, {}
    for title, opener in openers.items():
        try:
            network = opener()
            worst = least_dice(network, images, maps, rules)
        except ModuleNotFoundError as error:
            skipped[title] = f"{error.name} is not installed"
            continue
        except (CloudrtError, RuntimeError, OSError) as error:
            skipped[title] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        if worst < LEAST_DICE:
            skipped[title] = f"its masks are not ours: Dice {worst:.3f} from the same images, less than {LEAST_DICE}"
        else:
            opened[network.name] = network
    return opened, skipped


def least_dice(network: Network, images: Sequence[Image], maps: Maps, rules: Sequence[Rule]) -> float:
    """Return the mean Dice between the masks of a network and ours, over every (image, class)."""
    from cloudrt.masks.metric import dice
    from cloudrt.masks.rle import rle_decode

    scores = []
    for image, (levels, presence) in zip(images, maps, strict=True):
        probability, said = network(image)
        grid = probability.shape[1:]
        ours, theirs = apply_rules(levels, rules, presence), rle_rows(probability, rules, said)
        scores += [dice(rle_decode(a, grid), rle_decode(b, grid)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean(scores))
