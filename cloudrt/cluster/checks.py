"""Check every machine of a cluster before any work, so that a run fails at its start and names the machine.

Each machine must have cloudrt and the libraries that results depend on, in the driver's versions; have the same
folders; have read access to the stores; and be able to store the artifact. All must have the same CPU or GPU model.
"""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cloudrt.cluster.nodes import ClusterError, Node, Share, ask
from cloudrt.cluster.storage import Place
from cloudrt.errors import CloudrtError
from cloudrt.system.machine import describe_machine
from cloudrt.system.versions import OPENCV, package_versions

PACKAGES = (
    "cloudrt",
    "numpy",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    *OPENCV,
    "simplejpeg",
    "numba",
    "pyarrow",
    "rasterio",
)
"""Distributions that results and files depend on."""


def check_nodes(
    nodes: Sequence[Node],
    share: Share,
    folders: Sequence[str],
    firsts: Sequence[tuple[Place, str]],
    keep: Callable[[bytes], object],
    model: bytes,
) -> None:
    """Refuse a cluster whose machines would give different results or lack files; store the artifact on each.

    Parameters
    ----------
    nodes, share
        The machines, and the division into workers.
    folders
        Local paths that must exist on all machines.
    firsts
        One path in each store that all machines must be able to read.
    keep
        Stores the artifact on the machine that it is called on.
    model
        Bytes of the artifact.

    Raises
    ------
    ClusterError
        Names the machine, what was found and what was expected.
    """
    ours = package_versions(*PACKAGES)
    working = [node for node in nodes if (node.gpus if share.gpus else node.cpus)]
    packed = pickle.dumps((list(folders), bool(share.gpus), list(firsts), keep, model))
    kinds: dict[str, list[str]] = defaultdict(list)
    # The function is sent by value: a machine without cloudrt could not import it.
    for node, (theirs, found) in zip(working, ask(working, _make_inspection(), PACKAGES, ours, packed), strict=True):
        if found is None:
            _refuse_versions(node, ours, theirs)
            continue
        problem, kind = found
        if problem:
            raise ClusterError(f"machine {node.address} {problem}")
        kinds[kind].append(node.address)
    if len(kinds) > 1:
        named = "; ".join(f"{kind} ({', '.join(addresses[:3])})" for kind, addresses in sorted(kinds.items()))
        raise ClusterError(f"machines of different models give different results: {named}; use identical machines")


def _refuse_versions(node: Node, ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    if "cloudrt" not in theirs:
        raise ClusterError(
            f"machine {node.address} has no cloudrt: install version {ours.get('cloudrt', '')} with the extra ray there"
        )
    differences = [
        f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
        for name in PACKAGES
        if ours.get(name) != theirs.get(name)
    ]
    raise ClusterError(f"machine {node.address}: {'; '.join(differences)}; install the same versions on all machines")


def _make_inspection() -> Callable[[Sequence[str], Mapping[str, str], bytes], Any]:
    def inspect(names: Sequence[str], expected: Mapping[str, str], packed: bytes) -> Any:
        """Return the versions here and, if they are as expected, the result of `inspect_machine`."""
        import pickle

        try:
            from cloudrt.system.versions import package_versions
        except ImportError:
            return {}, None
        found = package_versions(*names)
        if found != expected:
            return found, None
        from cloudrt.cluster.checks import inspect_machine

        return found, inspect_machine(*pickle.loads(packed))

    return inspect


def inspect_machine(
    folders: Sequence[str],
    gpu: bool,
    firsts: Sequence[tuple[Place, str]],
    keep: Callable[[bytes], object],
    model: bytes,
) -> tuple[str, str]:
    """Return what is wrong with this machine (or ""), and its CPU or GPU model; see `check_nodes`."""
    machine = describe_machine()
    kind = ", ".join(sorted(set(machine.gpus))) if gpu else machine.cpu
    missing = next((folder for folder in folders if not os.path.lexists(folder)), None)
    if missing:
        shared = "use a folder that all machines share, or a store such as s3://BUCKET/PREFIX"
        return f"has no {missing}: {shared}", kind
    try:
        for place, path in firsts:
            place.try_one(path)
        keep(model)
    except CloudrtError as error:
        return str(error), kind
    return "", kind
