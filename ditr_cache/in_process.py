"""Partitions in this process, two at a time: one is read and linked, or lifted and written, while one is embedded."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from ditr_cache.datasets.base import Partition
from ditr_cache.progress import PartitionSummary

if TYPE_CHECKING:
    from ditr_cache.partition import PartitionWorker

AT_ONCE = 2
"""Partitions that run at the same time. More would only hold memory: one is embedded at a time."""


def run_here(worker: PartitionWorker, partitions: Iterable[Partition]) -> Generator[PartitionSummary, None, None]:
    """Run partitions in threads of this process, begun in their order; yields summaries as they end.

    Closed early, or interrupted, it stops the worker: partitions that are not committed are given up, which takes as
    long as a forward pass or a write that is going on.

    Args:
        worker: stopped in the end.
        partitions: consumed as threads become free.
    """
    queue = iter(partitions)
    running: list[Future[PartitionSummary]] = []
    pool = ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="partition")
    try:
        while True:
            while len(running) < AT_ONCE and (partition := next(queue, None)) is not None:
                running.append(pool.submit(worker, partition))
            if not running:
                return
            wait(running, return_when=FIRST_COMPLETED)
            for future in [future for future in running if future.done()]:
                running.remove(future)
                yield future.result()
    finally:
        worker.stop()
        pool.shutdown(cancel_futures=True)
