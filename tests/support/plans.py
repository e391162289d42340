"""Plans of a tiny model, with simulated rates of the providers."""

from __future__ import annotations

from importlib.util import find_spec

import onnx
import pytest
from support.tiny import SMALL_GRIDS, tiny_model

from cloudrt.engines.candidates import NOTHING_FIXED, FixedSettings, Setting
from cloudrt.engines.plan import Plan, make_plan
from cloudrt.engines.trial import ProviderTrial
from cloudrt.model.artifact import Artifact, parse_artifact
from cloudrt.options import RunOptions

MODEL = tiny_model(labels=SMALL_GRIDS)
ARTIFACT = parse_artifact(MODEL, "model.onnx")
needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")


def simulate_rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Simulate the providers; return a dictionary of their rates, and of the counts of comparisons and measurements.

    A provider works, and agrees with the reference, once a test has set its rate in the dictionary.
    """
    found: dict[str, float] = {"comparisons": 0, "measurements": 0}
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None if name in found else f"no {name}")

    def agree(self: ProviderTrial, provider: str, precision: str) -> None:
        found["comparisons"] += 1

    def measure_settings(
        self: ProviderTrial, provider: str, precision: str, given: FixedSettings = NOTHING_FIXED
    ) -> list[Setting]:
        found["measurements"] += 1
        streams = given.streams or (2 if provider == "openvino" else 1)
        return [Setting(given.batch_size or 4, streams, bool(given.cuda_graph), found[provider])]

    monkeypatch.setattr(ProviderTrial, "disagreement", agree)
    monkeypatch.setattr(ProviderTrial, "measure_settings", measure_settings)
    return found


def plan(options: RunOptions, artifact: Artifact = ARTIFACT, model: onnx.ModelProto = MODEL) -> Plan:
    return make_plan(model, artifact, options)
