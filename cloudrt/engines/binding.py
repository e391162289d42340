"""Buffers that stay on the device: a batch is copied in, run, and copied out, without an allocation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cloudrt.model.artifact import Artifact


class Binding:
    """One stream's buffers in a session of ONNX Runtime. One thread at a time may use it.

    Parameters
    ----------
    session
        The `onnxruntime.InferenceSession`; several bindings may run in one at once.
    artifact
        Gives the shapes.
    batch_size
        The fixed N.
    kind, device
        Where the buffers lie: "cuda" and the number of the GPU; "cpu" for tests.
    """

    def __init__(self, session: Any, artifact: Artifact, batch_size: int, kind: str, device: int = 0) -> None:
        self._session = session
        self._binding = session.io_binding()
        shapes = {"probability": artifact.output_shape, "presence": (len(artifact.labels.classes),)}
        self._image = self._allocate((batch_size, *artifact.input_size, 3), kind, device)
        self._binding.bind_ortvalue_input("image", self._image)
        self._outputs = {}
        for output in session.get_outputs():
            value = self._allocate((batch_size, *shapes[output.name]), kind, device)
            self._binding.bind_ortvalue_output(output.name, value)
            self._outputs[output.name] = value

    def run(self, batch: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
        """Return each output of a (N, H, W, 3) uint8 batch, in memory of its own."""
        self._image.update_inplace(np.ascontiguousarray(batch))
        self._session.run_with_iobinding(self._binding)
        # On the CPU numpy() is a view of the buffer, which the next batch overwrites.
        return {name: np.array(value.numpy()) for name, value in self._outputs.items()}

    def warm_up(self) -> None:
        """Run a black batch, twice: a CUDA graph is recorded by the first run that follows a plain one."""
        for _ in range(2):
            self.run(np.zeros(self._image.shape(), np.uint8))

    @staticmethod
    def _allocate(shape: tuple[int, ...], kind: str, device: int) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, kind, device)
