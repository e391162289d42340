"""OpenVINO's own runtime, for Intel and other x86 CPUs."""

from __future__ import annotations

from io import BytesIO
from typing import Self

import numpy as np
import onnx
import openvino
from numpy.typing import NDArray

from cloudrt.artifact import Artifact
from cloudrt.engines.base import check_batch
from cloudrt.errors import ArtifactError


class OpenvinoEngine:
    """An artifact compiled by OpenVINO for the CPU, computing in float32; see `cloudrt.engines.Engine`.

    Raises
    ------
    ArtifactError
        OpenVINO refuses the graph.
    """

    def __init__(self, model: onnx.ModelProto, artifact: Artifact, batch_size: int | None, threads: int) -> None:
        self.artifact = artifact
        self.provider = "openvino"
        self.batch_size = batch_size
        core = openvino.Core()
        try:
            graph = core.read_model(BytesIO(model.SerializeToString()))
            if batch_size is not None:
                graph.reshape({"image": [batch_size, *artifact.input_size, 3]})
            self._compiled = core.compile_model(
                graph,
                "CPU",
                {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"},
            )
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO refuses the model: {str(error).splitlines()[-1]}") from error
        self._request = self._compiled.create_infer_request()
        self._outputs = [output.get_any_name() for output in self._compiled.outputs]

    def run(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (N, C, W_out, H_out) and presence (N, C), or None, of (N, H, W, 3) uint8 RGB images."""
        check_batch(batch, self.artifact, self.batch_size)
        values = self._request.infer({"image": batch}, share_inputs=True)
        # The request's output buffers are written again by the next call: copy.
        found = {name: np.array(values[i], np.uint8) for i, name in enumerate(self._outputs)}
        return found["probability"], found.get("presence")

    def probability(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the probability alone."""
        return self.run(batch)[0]

    def close(self) -> None:
        """Release the compiled model's memory."""
        self._request = self._compiled = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
