"""Partitions on dask workers, of this machine or of a cluster. The only importer of dask.

Dask distributes partitions and nothing else. A worker gets the settings once (a `WorkerPlugin` builds the
`PartitionWorker`, and with it the VFM), then partition after partition; it reads and writes by itself and returns a
small summary. Submissions are bounded, so neither the client nor the scheduler grows with the dataset.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from ditr_cache.datasets.base import Partition
from ditr_cache.errors import CacheError, ClusterError, UsageError
from ditr_cache.in_process import AT_ONCE
from ditr_cache.progress import PartitionSummary
from ditr_cache.schema import BrokenView

if TYPE_CHECKING:  # the scheduler imports this module, and needs no torch
    from ditr_cache.partition import ExtractSettings, PartitionWorker

log = logging.getLogger(__name__)

IN_FLIGHT_PER_WORKER = 2 * AT_ONCE
"""Partitions submitted at a time per worker: enough that none idles, few enough that the scheduler stays flat."""

RETRIES = 2
"""How often a partition that raised is tried again. Where a worker died, dask tries again by itself."""

POLL_SECONDS = 2.0
"""How often the scheduler is asked how many workers there are."""

WORKER_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": 1 << 28, "MALLOC_MMAP_THRESHOLD_": 1 << 25, "OMP_NUM_THREADS": 1}
"""Of local workers. dask's own makes glibc hand every tensor back to the kernel: on a CPU, a convolutional VFM then
spends half of its time on page faults."""


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
        scheduler: address of a running scheduler, used instead of a local cluster. Its workers outlive the run, and
            are left without VFM, however the client ends.

    Raises:
        UsageError: the scheduler does not answer or has no worker.
        CacheError: a worker cannot be set up (its data, cache or VFM is not what the client has).
        ClusterError: the scheduler went away.
    """
    import distributed

    for name in (distributed.__name__, distributed.client.__name__):  # importing it gives both a level of their own
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its chatter hides ours
    with ExitStack() as stack:
        client = _local_cluster(stack, workers) if scheduler is None else _connected(stack, scheduler)
        run = f"ditr-cache-{uuid.uuid4().hex[:8]}"  # two runs may share a cluster
        # Local workers share this machine's cores; how many threads a worker elsewhere may use, its owner has set.
        threads = max(1, (os.cpu_count() or 1) // workers) if scheduler is None else None
        _set_up(client, run, settings, expected_key, threads=threads, local=scheduler is None)
        yield from distribute(client, partial(_run_on_worker, run), partitions, resources=_gpu_resource(client))


def distribute(
    client: Any,
    function: Callable[[Partition], PartitionSummary],
    partitions: Iterable[Partition],
    *,
    resources: dict[str, float] | None = None,
) -> Generator[PartitionSummary, None, None]:
    """Call a function for every partition on the workers of a `distributed.Client`, in a bounded number of tasks.

    Workers that join get their share, partitions of workers that leave are run by others. A partition that raises is
    tried again; one that kills its workers is given up, and reported as failed.

    Args:
        client: connected.
        function: importable where the scheduler and the workers run.
        partitions: consumed as workers become free.
        resources: of dask, that each call takes from its worker.

    Raises:
        ClusterError: the scheduler went away.
    """
    from distributed import KilledWorker

    tasks = _Tasks(client, function, resources)
    queue = iter(partitions)
    suspects: list[Partition] = []
    alone = False
    while True:
        limit = 1 if alone else tasks.limit()
        while tasks.count < limit and (partition := next(queue, None)) is not None:
            tasks.submit(partition)
        if not tasks.count:
            if not suspects:
                return
            # Dask blames a death on all that waited on the worker. Alone, only the partition that kills it is lost.
            queue, suspects, alone = iter(suspects), [], True
        for partition, outcome in tasks.ended():
            if isinstance(outcome, PartitionSummary):
                yield outcome
            elif isinstance(outcome, KilledWorker) and not alone:
                suspects.append(partition)
            else:
                yield _lost(partition, outcome)


class _Tasks:
    """The tasks of one run that the scheduler knows at a time."""

    def __init__(
        self, client: Any, function: Callable[[Partition], PartitionSummary], resources: dict[str, float] | None
    ) -> None:
        self._client, self._function, self._resources = client, function, resources
        # Of a tuple, dask takes the first entry for its statistics by kind of task; an id there would be kept forever.
        self._group = f"extract-{uuid.uuid4().hex[:8]}"
        # Dask's spans keep every group that was ever without tasks, so one stays in it as long as the run.
        self._anchor = client.submit(int, key=(self._group, 0), pure=False)
        self._running: dict[Any, tuple[Partition, int]] = {}
        self._ended: SimpleQueue[Any] = SimpleQueue()
        self._submitted = 0
        self._workers, self._asked = 0, 0.0
        self._taken_out: set[str] = set()

    @property
    def count(self) -> int:
        """Tasks that were submitted and have not ended."""
        return len(self._running)

    def limit(self) -> int:
        """How many tasks the workers that are there now need to be busy."""
        if time.monotonic() - self._asked > POLL_SECONDS:
            try:
                workers = len(self._client.nthreads())
            except Exception as error:  # of sockets, of the event loop, of dask: whatever it is, nobody answers
                raise self._gone(error) from error
            if not workers and self._workers:
                log.warning("no dask worker is left; waiting for one to join")
            self._workers, self._asked = workers, time.monotonic()
        return IN_FLIGHT_PER_WORKER * max(1, self._workers)

    def submit(self, partition: Partition, attempt: int = 0) -> None:
        """Hand a partition to the scheduler."""
        self._submitted += 1
        try:
            future = self._client.submit(
                self._function,
                partition,
                key=(self._group, self._submitted, partition.id),
                pure=False,
                resources=self._resources,
            )
        except RuntimeError as error:  # the client has closed
            raise self._gone(error) from error
        self._running[future] = partition, attempt
        future.add_done_callback(self._ended.put)

    def ended(self) -> Iterator[tuple[Partition, PartitionSummary | BaseException]]:
        """Tasks that have ended, each with its partition and what became of it; none after a while of silence."""
        try:
            future = self._ended.get(timeout=POLL_SECONDS)
        except Empty:
            return
        partition, attempt = self._running.pop(future)
        outcome = self._outcome(future)
        future.release()
        if isinstance(outcome, _UnfitWorkerError):
            self._take_out(outcome)
            self.submit(partition, attempt)
        elif isinstance(outcome, Exception) and not _is_death(outcome) and attempt < RETRIES:
            self.submit(partition, attempt + 1)
        else:
            yield partition, outcome

    def _outcome(self, future: Any) -> PartitionSummary | BaseException:
        from distributed import CancelledError

        try:
            error: BaseException | None = future.exception()
            return future.result() if error is None else error
        except (CancelledError, OSError) as lost:
            raise self._gone(lost) from lost

    def _take_out(self, unfit: _UnfitWorkerError) -> None:
        """Partitions would go on failing there, quicker than they are done elsewhere."""
        address, reason = unfit.args
        if address not in self._taken_out:
            self._taken_out.add(address)
            log.warning("worker %s is taken out of the cluster: %s", address, reason)
            self._client.retire_workers([address])

    def _gone(self, error: BaseException) -> ClusterError:
        address = getattr(self._client.scheduler, "address", "")
        return ClusterError(
            f"the dask scheduler at {address!r} went away while partitions were under way ({type(error).__name__}); "
            "what was committed stays, start the scheduler and its workers again and run the same command to go on"
        )


class _UnfitWorkerError(Exception):
    """A worker could not be set up. Arguments: its address, the reason."""


class _WorkerSetup:
    """The `PartitionWorker` of a dask worker. Becomes a `WorkerPlugin` later, so that dask is imported lazily."""

    idempotent = False

    def __init__(self, settings: ExtractSettings, expected_key: str, *, threads: int | None, local: bool) -> None:
        self.settings, self.expected_key, self.threads, self.local = settings, expected_key, threads, local
        self.partition_worker: PartitionWorker | None = None
        self.error = ""

    async def setup(self, worker: Any) -> None:
        """Called by dask on every worker, also on those that join later."""
        self.address = worker.address
        self.turn = threading.BoundedSemaphore(AT_ONCE)
        try:
            # In a thread, as large weights take longer to load than a worker may be silent.
            self.partition_worker = await asyncio.to_thread(self._build, worker.name)
        except CacheError as error:
            error.add_note(f"(worker {self.address})")
            self.error = str(error)
            raise
        except Exception as error:
            self.error = f"worker {self.address} cannot be set up: {type(error).__name__}: {error}"
            raise UsageError(self.error) from error

    def _build(self, name: object) -> PartitionWorker:
        import torch

        from ditr_cache.partition import PartitionWorker

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        settings = self.settings
        # Elsewhere a worker is shown its GPU by CUDA_VISIBLE_DEVICES, and dask-cuda puts it first of all that it shows.
        if self.local and isinstance(name, int) and settings.vfm.device in ("auto", "cuda"):
            count = torch.cuda.device_count()
            if count > 1:
                settings = replace(settings, vfm=replace(settings.vfm, device=f"cuda:{name % count}"))
        return PartitionWorker(settings, expected_key=self.expected_key)

    def __call__(self, partition: Partition) -> PartitionSummary:
        """Extract a partition, in a thread of the worker."""
        with self.turn:  # a worker may have more threads
            partition_worker = self.partition_worker
            if partition_worker is None:
                raise _UnfitWorkerError(self.address, self.error)
            try:
                return partition_worker(partition)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            finally:
                del partition_worker
                if self.partition_worker is None:  # taken off while this partition was under way
                    _free_memory()
        # Dask logs errors with all that their frames hold, and would keep the VFM with the original one.
        raise RuntimeError(problem)

    def teardown(self, worker: Any) -> None:
        """Called by dask when the plugin is taken off: ends partitions under way, and frees the VFM's memory."""
        if self.partition_worker is not None:
            self.partition_worker.stop()
            self.partition_worker = None
            _free_memory()


class _TakeOff:
    """Takes the plugin off the workers when the client leaves, however it does. Becomes a `SchedulerPlugin`."""

    idempotent = False

    def __init__(self, client: str, run: str) -> None:
        self.client, self.run = client, run

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Called by dask on the scheduler."""
        if client == self.client:
            scheduler.loop.add_callback(self._take_off, scheduler)

    async def _take_off(self, scheduler: Any) -> None:
        scheduler.remove_plugin(name=self.run)
        with contextlib.suppress(OSError):  # a worker that goes away meanwhile has nothing to be taken off
            await scheduler.unregister_worker_plugin(comm=None, name=self.run)


def _local_cluster(stack: ExitStack, workers: int) -> Any:
    import dask
    from distributed import Client, LocalCluster

    config = {
        "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT,
        "distributed.deploy.lost-worker-timeout": "120s",  # a busy machine starts a worker again in more than dask's 15
    }
    stack.enter_context(dask.config.set(config))
    cluster = LocalCluster(
        n_workers=workers,
        threads_per_worker=AT_ONCE,
        processes=True,
        dashboard_address="127.0.0.1:0",  # None would still claim port 8787
        silence_logs=logging.ERROR,
    )
    stack.callback(_close, cluster)
    return stack.enter_context(Client(cluster))


def _close(cluster: Any) -> None:
    try:
        cluster.close()
    except TimeoutError:  # of a worker that had just been started again: the work is done, and its totals matter more
        log.info("a worker of the local cluster did not stop in time")


def _connected(stack: ExitStack, scheduler: str) -> Any:
    from distributed import Client

    try:
        client = stack.enter_context(Client(scheduler, timeout="20s"))
    except (OSError, ValueError) as error:
        raise UsageError(f"no dask scheduler answers at {scheduler!r} within 20 s: {error}") from error
    if not client.nthreads():
        raise UsageError(f"the dask scheduler at {scheduler!r} has no workers; start some with `dask worker`")
    return client


def _set_up(
    client: Any, run: str, settings: ExtractSettings, expected_key: str, *, threads: int | None, local: bool
) -> None:
    from distributed import SchedulerPlugin, WorkerPlugin

    client.register_plugin(type("DitrTakeOff", (_TakeOff, SchedulerPlugin), {})(client.id, run), name=run)
    setup: Any = type("DitrWorkerSetup", (_WorkerSetup, WorkerPlugin), {})
    client.register_plugin(setup(settings, expected_key, threads=threads, local=local), name=run)


def _gpu_resource(client: Any) -> dict[str, float] | None:
    """Ask for the worker resource GPU where every worker declares it."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return {"GPU": 1 / AT_ONCE} if workers and all(w.get("resources", {}).get("GPU") for w in workers) else None


def _run_on_worker(run: str, partition: Partition) -> PartitionSummary:
    from distributed import get_worker

    setup: Any = get_worker().plugins[run]
    summary: PartitionSummary = setup(partition)
    return summary


def _is_death(error: BaseException) -> bool:
    from distributed import KilledWorker

    return isinstance(error, KilledWorker)


def _free_memory() -> None:
    """Give the memory of models that nobody holds any more back, on a GPU also that which torch keeps for later."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _lost(partition: Partition, error: BaseException) -> PartitionSummary:
    text = f"its worker died or failed again and again (out of memory?): {error}"
    failures = tuple(BrokenView(sample=i, view="", error=text) for i in partition.sample_ids)
    return PartitionSummary(partition=partition.id, status="failed", failures=failures)
