"""Training on a device: what is copied to it, how often the host waits for it, and the precision."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cloudrt.train.cache import open_cache
from cloudrt.train.config import TrainConfig
from cloudrt.train.dataset import CloudDataset, Feed
from cloudrt.train.distributed import Processes
from cloudrt.train.losses import RunningLoss
from cloudrt.train.optimise import build_autocast, find_precision
from cloudrt.train.start import start
from cloudrt.train.trainer import Trainer
from support.training import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.labels import CLOUDS
from cloudrt.model.network_config import NetworkConfig
from cloudrt.system import machine

CPU = torch.device("cpu")
WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default", "aten.equal.default")
"""Operators that return a value, or a shape that depends on values, to the host: on a GPU, each waits for all work."""


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators by name, and notes the dtypes of tensors that leave the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()
        self.copied: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        done = func(*args, **(kwargs or {}))
        self.count[str(func)] += 1
        source = args[1] if str(func).startswith("aten.copy_") else args[0] if args else None
        if isinstance(done, torch.Tensor) and isinstance(source, torch.Tensor) and source.device != done.device:
            self.copied.append(source.dtype)
        return done


def trainer(config: TrainConfig, scenes: Path, cached: Path) -> Trainer:
    torch.manual_seed(0)
    begun = start(config, CLOUDS)
    cache = open_cache(open_data(scenes), config.input_size, cached)
    dataset = CloudDataset(cache, np.arange(12), begun.config, config.augment, config.seed)
    network = begun.network.to(memory_format=torch.channels_last)
    return Trainer(config, network, dataset, CPU, Processes())


@pytest.mark.parametrize("interval", [math.inf, 0.0], ids=["once", "each"])
def test_an_epoch_waits_for_the_device_only_to_read_losses(
    interval: float, scenes: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser is left out: PyTorch keeps its step counters on the CPU, and reading them waits for no GPU."""
    monkeypatch.setattr("cloudrt.train.losses.READ_SECONDS", interval)
    config = replace(SMALL, batch_size=2, presence="head", masks="present", label_smoothing=0.1)
    one = trainer(config, scenes, cached)
    monkeypatch.setattr(one.optimizer, "step", lambda: None)
    reads = 0
    real = RunningLoss.read

    def read(self: RunningLoss) -> Any:
        nonlocal reads
        reads += bool(self._unread)
        return real(self)

    monkeypatch.setattr(RunningLoss, "read", read)
    operators, step = Operators(), one._batch

    def batch(*words: Any) -> torch.Tensor:
        with operators:
            return step(*words)

    monkeypatch.setattr(one, "_batch", batch)
    shown: list[float] = []
    mean = one.epoch(1, lambda n, loss: shown.append(loss))
    assert len(shown) == 6 and reads == (2 if interval else 6)  # the first one at once, the rest at the end
    assert operators.count["aten.convolution_backward.default"] and not any(operators.count[name] for name in WAITS)
    assert np.isfinite(mean) and (mean == shown[-1]) == (interval == 0)


def test_the_mean_of_losses_does_not_depend_on_when_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(40, generator=torch.Generator().manual_seed(1))
    for interval in (math.inf, 0.0):
        monkeypatch.setattr("cloudrt.train.losses.READ_SECONDS", interval)
        losses = RunningLoss()
        assert all(losses.add(value) is None for value in values) and losses.read() is None
        assert losses.mean == pytest.approx(float(values.double().mean()), rel=1e-12)
    losses = RunningLoss()
    losses.add(values[0])
    monkeypatch.setattr("cloudrt.train.losses.READ_SECONDS", math.inf)
    for value in (values[1], torch.tensor(float("inf")), torch.tensor(float("nan"))):
        assert losses.add(value) is None
    assert losses.read() == (3, math.inf)


def test_bytes_not_floats_are_copied_to_the_device() -> None:
    """Copied to PyTorch's meta device, which stores no data."""
    feed = Feed(NetworkConfig(input_size=(64, 96)), torch.device("meta"))
    image, mask = torch.zeros(2, 64, 96, 3, dtype=torch.uint8), torch.zeros(2, 4, 64, 96, dtype=torch.uint8)
    with Operators() as operators:
        pixels, truth = feed(image, mask)
    assert operators.copied == [torch.uint8, torch.uint8]
    assert (pixels.dtype, truth.dtype, pixels.device.type) == (torch.float32, torch.float32, "meta")


def test_auto_is_bf16_on_cpus_that_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cpu(flags: str) -> None:
        path = tmp_path / "cpuinfo"
        path.write_text(f"model name\t: a CPU\nflags\t\t: {flags}\n")
        found = replace(machine.describe_machine(), features=machine._read_cpuinfo(path)[1])
        monkeypatch.setattr("cloudrt.train.optimise.describe_machine", lambda: found)

    for flags, wanted in (
        ("fpu avx2", "fp32"),
        ("avx2 avx512f avx512_vnni", "fp32"),
        ("avx2 avx512f avx512_bf16", "bf16"),
        ("avx2 avx512f amx_bf16 amx_int8", "bf16"),
    ):
        cpu(flags)
        assert find_precision("auto", CPU) == wanted, flags
        context, scaled = build_autocast("auto", CPU)
        with context():
            assert torch.is_autocast_enabled("cpu") == (wanted == "bf16") and not scaled
        for named in ("fp32", "bf16"):
            assert find_precision(named, CPU) == named
    with pytest.raises(DataError, match="fp16 needs a GPU"):
        find_precision("fp16", CPU)


@pytest.mark.slow
def test_bf16_and_fp32_learn_alike(scenes: Path, cached: Path) -> None:
    """The loss falls to less than two thirds, and the two curves differ by less than 5% of that fall."""
    curves = {}
    for precision in ("fp32", "bf16"):
        config = replace(
            SMALL,
            precision=precision,
            augment="none",
            optimizer="adamw",
            encoder_lr=1e-3,
            decoder_lr=1e-3,
            schedule="constant",
        )
        one = trainer(config, scenes, cached)
        curves[precision] = np.array([one.epoch(number, lambda n, **fields: None) for number in range(1, 13)])
    fall = curves["fp32"][0] - curves["fp32"][-1]
    assert curves["fp32"][-1] < 2 / 3 * curves["fp32"][0]
    assert np.abs(curves["bf16"] - curves["fp32"]).max() < 0.05 * fall
