"""The parity gate: compare an exported model with PyTorch, in the provider that will run it, before writing it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from cloudrt.engines.availability import problem
from cloudrt.engines.base import Engine, EngineOptions
from cloudrt.engines.choice import choose_provider, int8_problem, open_engine
from cloudrt.errors import ParityError, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.model.parity import Parity, Tolerances
from cloudrt.options import TENSORRT_PROVIDERS

from .graph import finish
from .half import emulate_half
from .keep import order_by_sensitivity, smallest_kept
from .parity import Reference, Runner

logger = logging.getLogger(__name__)

ADVICE = {
    "fp32": "other versions of torch and onnxscript (the conversion itself is wrong, at any precision), or wider "
    "tolerances",
    "fp16": "--precision fp32, or wider tolerances",
    "int8": "--precision fp16, more images like yours with --data FOLDER, or wider tolerances",
}


INT8_SPREAD = 0.05
"""Levels of 1/255 by which the mean difference of TensorRT's int8 can exceed the emulated one, because the rounding of
float32 can move a value across a tie of the quantisation. Measured on two trained networks with all layers in int8:
with ONNX Runtime's fused and unfused graphs, the mean difference was 14.911 and 14.912, and 18.05 and 17.98. These
differ by at most 0.4%, which is 0.02 at the limit of 4."""


@dataclass(frozen=True)
class Gate:
    """The comparison of a model in one precision with PyTorch, and its limits.

    Parameters
    ----------
    reference
        PyTorch's outputs.
    tolerances
        The limits.
    artifact
        The metadata of the model, with its precision and int8 target.
    provider
        Provider that runs the model; never "auto".
    batch_size
        Batch size of an engine that TensorRT builds; 0 takes the provider's default.
    """

    reference: Reference
    tolerances: Tolerances
    artifact: Artifact
    provider: str
    batch_size: int = 0

    @property
    def limits(self) -> Tolerances:
        """The limits, stricter by `INT8_SPREAD` where TensorRT's int8 is emulated."""
        if not self.emulates or self.artifact.precision != "int8":
            return self.tolerances
        return replace(self.tolerances, mean_difference=max(0.0, self.tolerances.mean_difference - INT8_SPREAD))

    @property
    def builds(self) -> bool:
        """Whether the provider builds an engine for each model, which takes up to minutes."""
        return self.provider in TENSORRT_PROVIDERS

    @property
    def emulates(self) -> str:
        """Description of what is emulated because the provider does not support it; empty if nothing is."""
        if self.provider != "cpu":
            return ""
        if self.artifact.precision == "fp16":
            return "fp16 rounding emulated"
        if self.artifact.int8_target == "tensorrt":
            return "TensorRT's int8 emulated"
        return ""

    def open(self, model: onnx.ModelProto) -> Engine:
        """Open a model in the engine of the comparison."""
        finished = finish(model, self.artifact)
        if self.emulates and self.artifact.precision == "fp16":
            emulated = emulate_half(finished)
            return open_engine(emulated, "cpu", None, options=EngineOptions(emulate=True))
        size = self.batch_size if self.builds else None
        return open_engine(finished, self.provider, size, options=EngineOptions(emulate=bool(self.emulates)))

    def measure(
        self, model: onnx.ModelProto, advance: Callable[[int], object] | None = None, *, give_up: bool = False
    ) -> Parity | None:
        """Return the differences of a model; with `give_up`, None as soon as it is certain to fail."""
        description = f"{self.provider}, {self.emulates}" if self.emulates else self.provider
        with self.open(model) as engine:
            return self.reference.measure(_any_size(engine), description, self.limits if give_up else None, advance)

    def check(self, model: onnx.ModelProto, advance: Callable[[int], object] | None = None) -> Parity:
        """Return the differences of a model that passes.

        Raises
        ------
        ParityError
            The model exceeds the tolerances.
        """
        parity = self.measure(model, advance)
        assert parity is not None
        if parity.faults(self.limits):
            raise refusal(self, parity)
        return parity

    def sensitivity(self, model: onnx.ModelProto) -> float:
        """Return the mean absolute difference on one batch, in levels of 1/255."""
        with self.open(model) as engine:
            return self.reference.sensitivity(_any_size(engine))


def _any_size(engine: Engine) -> Runner:
    """Return a function that runs any number of images; for a fixed batch size, the last batch is padded."""
    size = engine.batch_size
    if size is None:
        return engine.run

    def run(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        count = len(images)
        found = [engine.run(images[np.arange(begin, begin + size) % count]) for begin in range(0, count, size)]
        heads = [head for _, head in found if head is not None]
        return np.concatenate([one for one, _ in found])[:count], np.concatenate(heads)[:count] if heads else None

    return run


def choose_gate_provider(artifact: Artifact, wanted: str = "auto") -> str:
    """Return the provider that runs the comparison: the one that will run the artifact, if it works here.

    Raises
    ------
    ProviderError
        The provider cannot run here, or has no int8 kernels for the artifact's int8 layers.
    """
    if artifact.precision != "int8":
        return choose_provider(wanted).provider
    if artifact.int8_target == "tensorrt":
        if wanted == "auto":
            reason = problem("tensorrt")
            if reason:
                logger.warning("TensorRT's int8 is compared by emulation on the CPU: %s", reason)
            return "cpu" if reason else "tensorrt"
        if wanted == "cpu":
            return "cpu"
    if wanted == "auto":
        return "cpu"
    reason = int8_problem(wanted, artifact)
    if reason:
        raise ProviderError(f"--provider {wanted} is refused for int8: {reason}")
    return choose_provider(wanted).provider


def lower(
    gate: Gate,
    layers: Sequence[str],
    convert: Callable[[Collection[str]], onnx.ModelProto],
    advance: Callable[[int], object] | None = None,
) -> tuple[onnx.ModelProto, Parity, tuple[str, ...]]:
    """Convert a model to a lower precision, keeping as few layers as possible in fp32 so that it passes.

    Where the provider builds an engine for each model, layers are searched by emulation on the CPU, and one engine is
    built, for the model that passes there.

    Parameters
    ----------
    gate
        The comparison and its limits.
    layers
        Layers that can be lowered; empty in fp32.
    convert
        Layers kept in fp32 -> model.
    advance
        Called with the number of images compared since the last call, during the first comparison.

    Returns
    -------
    The model, its differences, and the layers kept in fp32.

    Raises
    ------
    ParityError
        The model does not pass, or only if all layers are kept in fp32.
    """
    if gate.builds:
        model, _, kept_there = lower(replace(gate, provider="cpu"), layers, convert, advance)
        return model, gate.check(model), kept_there
    model = convert(())
    parity = gate.measure(model, advance)
    assert parity is not None
    if not parity.faults(gate.limits):
        return model, parity, ()
    if not layers or gate.measure(convert(layers), give_up=True) is None:
        raise refusal(gate, parity)
    logger.info("%s does not pass: searching for the layers to keep in fp32", gate.artifact.precision)

    def sensitivity(lowered: Sequence[str]) -> float:
        chosen = set(lowered)
        return gate.sensitivity(convert([layer for layer in layers if layer not in chosen]))

    def passes(kept: Sequence[str]) -> bool:
        found = gate.measure(convert(kept), give_up=True)
        passed = found is not None and not found.faults(gate.limits)
        if passed:
            logger.info("passes with %d of %d layers in fp32; trying fewer", len(kept), len(layers))
        return passed

    kept = set(smallest_kept(order_by_sensitivity(layers, sensitivity), passes))
    if len(kept) == len(layers):
        raise refusal(gate, parity)
    ordered = tuple(layer for layer in layers if layer in kept)
    model = convert(ordered)
    return model, gate.check(model), ordered


def refusal(gate: Gate, parity: Parity) -> ParityError:
    """Return the error that names the limits exceeded and what to try."""
    precision = gate.artifact.precision
    worst = f"; worst images: {', '.join(parity.worst)}" if parity.worst else ""
    return ParityError(
        f"{precision} would change the submission: {'; '.join(parity.faults(gate.limits))}{worst}. "
        f"Nothing was written; try {ADVICE[precision]}",
        verdicts=parity.verdicts(gate.limits),
        title=make_title(precision, parity),
    )


def make_title(precision: str, parity: Parity) -> str:
    """Return the title of a table of figures: the precision, the images, and the provider with what it emulated."""
    return f"{precision} compared with PyTorch fp32 on {parity.images} {parity.source}, in {parity.provider}"
