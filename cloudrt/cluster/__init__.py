"""Inference on a cluster: the single machine's functions, run by Ray Data where the images are many.

    storage.py     local folders, S3-compatible stores and whatever else pyarrow opens: list, read, write whole
    listing.py     which images, in which order
    nodes.py       the cluster: connect, how many workers of how many cores; checks.py: what its machines must have
    worker.py      one actor a GPU or group of cores: a partition in, a file of rows out; care.py: images that do harm
    partitions.py  the files of rows: what is finished, and the submission that they are merged to
    run.py         the whole: list -> partitions -> Ray Data -> files of rows -> submission

Ray and pyarrow are imported where they are used, because nothing else of cloudrt needs them.
"""

from __future__ import annotations

from cloudrt.cluster.driver import ClusterOptions, ClusterRun, infer_on_cluster

__all__ = ["ClusterOptions", "ClusterRun", "infer_on_cluster"]
