"""A stand-in for a GPU: a session that reports CUDA's provider and runs on the CPU, with the host as its device."""

from __future__ import annotations

import threading
from contextlib import suppress

import onnxruntime
import pytest

from cloudrt.system.cuda import HostDevice

SESSION = onnxruntime.InferenceSession


class OnTheCpu:
    """A session that reports CUDA's provider and runs on the CPU.

    It records the providers that were requested, the threads that ran it, the ids of CUDA graphs, and the most runs at
    once.
    """

    def __init__(
        self, content: bytes, options: object, providers: list[tuple[str, dict[str, str]]], enable_fallback: int
    ) -> None:
        self.real = SESSION(content, options, providers=["CPUExecutionProvider"])
        self.asked, self.threads, self.graphs = providers, set[int](), set[str]()
        self.lock, self.running, self.most = threading.Lock(), 0, 0

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[object]:
        return []

    def get_outputs(self) -> object:
        return self.real.get_outputs()

    def run(self, *words: object) -> object:
        return self.real.run(*words)

    def io_binding(self) -> object:
        return self.real.io_binding()

    def run_with_iobinding(self, binding: object, options: onnxruntime.RunOptions) -> None:
        self.threads.add(threading.get_ident())
        with suppress(RuntimeError):  # raised if the run has no CUDA graph
            self.graphs.add(options.get_run_config_entry("gpu_graph_id"))
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.real.run_with_iobinding(binding, options)
        with self.lock:
            self.running -= 1


def stand_in_for_a_gpu(monkeypatch: pytest.MonkeyPatch, device: HostDevice | None = None) -> None:
    """Let `OrtEngine` open sessions of the provider "cuda" on the CPU."""
    monkeypatch.setattr("cloudrt.engines.session.onnxruntime.InferenceSession", OnTheCpu)
    monkeypatch.setattr("cloudrt.engines.session.load_libraries", lambda provider: None)
    monkeypatch.setattr("cloudrt.engines.onnxruntime.open_gpu", lambda number: device or HostDevice())
