"""Where partitions run: in this process, or on dask workers. The only importer of dask.

Dask distributes partitions and nothing else. A worker gets the settings once (a `WorkerPlugin` builds the
`PartitionWorker`, and with it the VFM), then one partition id after the other; it reads and writes by itself and
returns a small summary. Submissions are bounded, so neither the client nor the scheduler grows with the dataset.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ditr_cache.datasets.base import Partition
from ditr_cache.errors import CacheError, UsageError
from ditr_cache.partition import ExtractSettings, PartitionWorker
from ditr_cache.progress import PartitionSummary
from ditr_cache.schema import BrokenView

IN_FLIGHT_PER_WORKER = 3
"""Partitions submitted ahead per worker: enough that none idles, few enough that the scheduler stays flat."""

RETRIES = 2
"""How often a partition that raised is tried again. Where a worker died, dask tries again by itself."""

WORKER_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": 1 << 28, "MALLOC_MMAP_THRESHOLD_": 1 << 25, "OMP_NUM_THREADS": 1}
"""Of local workers. dask's own makes glibc hand every tensor back to the kernel: on a CPU, a convolutional VFM then
spends half of its time on page faults."""

_PLUGIN = "ditr-cache"


def run_here(worker: PartitionWorker, partitions: Iterable[Partition]) -> Generator[PartitionSummary, None, None]:
    """Run partitions in this process, one after the other."""
    for partition in partitions:
        yield worker(partition)


def run_on_dask(
    settings: ExtractSettings,
    expected_key: str,
    partitions: Iterable[Partition],
    *,
    workers: int,
    scheduler: str | None,
) -> Generator[PartitionSummary, None, None]:
    """Run partitions on dask workers; yields summaries as they finish.

    Args:
        settings: sent to every worker once.
        expected_key: the VFM key that every worker must arrive at.
        partitions: consumed as workers become free.
        workers: processes of a local cluster, one per GPU where there are any.
        scheduler: address of a running scheduler, used instead of a local cluster.

    Raises:
        UsageError: the scheduler does not answer or has no worker.
        CacheError: a worker cannot be set up (its data, cache or VFM is not what the client has).
    """
    import dask
    from distributed import Client, KilledWorker, LocalCluster, as_completed

    logging.getLogger("distributed").setLevel(logging.ERROR)  # its chatter hides ours
    with ExitStack() as stack:
        if scheduler is None:
            stack.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT}))
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address="127.0.0.1:0",  # None would still claim port 8787
                    silence_logs=logging.ERROR,
                )
            )
            client = stack.enter_context(Client(cluster))
        else:
            try:
                client = stack.enter_context(Client(scheduler, timeout="20s"))
            except (OSError, ValueError) as error:
                raise UsageError(f"no dask scheduler answers at {scheduler!r} within 20 s: {error}") from error
            if not client.scheduler_info()["workers"]:
                raise UsageError(f"the dask scheduler at {scheduler!r} has no workers; start some with `dask worker`")
        # Local workers share this machine's cores; how many threads a worker elsewhere may use, its owner has set.
        threads = max(1, (os.cpu_count() or 1) // workers) if scheduler is None else None
        _set_up(client, settings, expected_key, threads)
        resources = _gpu_resource(client)
        queue = iter(partitions)
        waiting: Any = as_completed()
        ids: dict[str, Partition] = {}

        def start(partition: Partition, key: str) -> Any:
            return client.submit(
                _run_on_worker, partition, pure=False, retries=RETRIES, resources=resources, key=f"{key}-{partition.id}"
            )

        def submit() -> bool:
            partition = next(queue, None)
            if partition is None:
                return False
            future = start(partition, "extract")
            ids[future.key] = partition
            waiting.add(future)
            return True

        for _ in range(IN_FLIGHT_PER_WORKER * max(1, len(client.scheduler_info()["workers"]))):
            if not submit():
                break
        suspects: list[Partition] = []
        for future in waiting:
            partition = ids.pop(future.key)
            death = None if future.status == "finished" else future.exception()
            if isinstance(death, KilledWorker):
                suspects.append(partition)
            else:
                yield _lost(partition, death) if death is not None else future.result()
            future.release()
            submit()
        # Dask blames a death on all that waited on the worker. Alone, only the partition that kills it is lost.
        for partition in suspects:
            future = start(partition, "suspect")
            death = future.exception()
            yield _lost(partition, death) if death is not None else future.result()
            future.release()


class _WorkerSetup:
    """Builds the `PartitionWorker` of a dask worker. Duck-typed `WorkerPlugin`, so that dask is imported lazily."""

    name = _PLUGIN
    idempotent = False

    def __init__(self, settings: ExtractSettings, expected_key: str, threads: int | None) -> None:
        self.settings, self.expected_key, self.threads = settings, expected_key, threads

    def setup(self, worker: Any) -> None:
        """Called by dask on every worker, also on those that join later."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        settings = self.settings
        if settings.vfm.device in ("auto", "cuda") and torch.cuda.device_count() > 1 and isinstance(worker.name, int):
            device = f"cuda:{worker.name % torch.cuda.device_count()}"
            settings = replace(settings, vfm=replace(settings.vfm, device=device))
        worker.ditr_partition_worker = PartitionWorker(settings, expected_key=self.expected_key)

    def teardown(self, worker: Any) -> None:
        """Called by dask when the plugin is taken off: frees the VFM's memory."""
        del worker.ditr_partition_worker


def _set_up(client: Any, settings: ExtractSettings, expected_key: str, threads: int | None) -> None:
    from distributed import WorkerPlugin

    plugin = type("DitrWorkerSetup", (_WorkerSetup, WorkerPlugin), {})(settings, expected_key, threads)
    for address, outcome in client.register_plugin(plugin).items():
        if outcome.get("status") == "error":
            error = outcome.get("exception")
            error = getattr(error, "data", error)
            raise error if isinstance(error, CacheError) else UsageError(f"worker {address} cannot be set up: {error}")


def _gpu_resource(client: Any) -> dict[str, int] | None:
    """Ask for the worker resource GPU where every worker declares it."""
    workers = client.scheduler_info()["workers"].values()
    return {"GPU": 1} if workers and all(w.get("resources", {}).get("GPU") for w in workers) else None


def _run_on_worker(partition: Partition) -> PartitionSummary:
    from distributed import get_worker

    worker: Any = get_worker()
    summary: PartitionSummary = worker.ditr_partition_worker(partition)
    return summary


def _lost(partition: Partition, error: Exception | None) -> PartitionSummary:
    text = f"its worker died or failed again and again (out of memory?): {error}"
    failures = tuple(BrokenView(sample=i, view="", error=text) for i in partition.sample_ids)
    return PartitionSummary(partition=partition.id, status="failed", failures=failures)
