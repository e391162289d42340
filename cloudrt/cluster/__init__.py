"""Inference on a Ray cluster, with the same functions as on a single machine.

    storage.py         local folders, S3-compatible stores and other file systems of pyarrow: list, read, write
    storage_errors.py  errors of file systems in one line
    listing.py         which images, in which order
    nodes.py           connect, and divide the cluster into workers
    checks.py          what every machine must have
    worker.py          one actor per GPU or group of cores, which turns partitions into files of rows
    isolation.py       isolate images that crash workers
    panoramas.py       segment panoramas, and check them against each other
    partitions.py      the files of rows, and merging them into the submission
    watch.py           notice that the cluster is lost
    execution.py       run partitions with Ray Data
    driver.py          the whole run: list -> partitions -> Ray Data -> files of rows -> submission

Ray and pyarrow are only imported where they are used; the rest of cloudrt does not need them.
"""

from __future__ import annotations

from cloudrt.cluster.driver import ClusterOptions, ClusterRun, infer_on_cluster

__all__ = ["ClusterOptions", "ClusterRun", "infer_on_cluster"]
