"""Dask over many partitions, and while its parts come and go: what is kept, what is done again, what is left behind."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch

from dask_processes import STOCK, Address, wait_until
from ditr_cache import executors, partition
from ditr_cache.datasets.base import Partition
from ditr_cache.errors import ClusterError, DataError, UsageError
from ditr_cache.executors import AT_ONCE, IN_FLIGHT_PER_WORKER, distribute, run_on_dask
from ditr_cache.extract import ExtractRequest, extract, resolve
from ditr_cache.partition import ExtractSettings
from ditr_cache.progress import PartitionSummary
from ditr_cache.schema import VFMSpec
from ditr_cache.store import CacheWriter
from ditr_cache.synthesize import RoomsSettings, synthesize
from ditr_cache.vfm import FrozenVFM, VFMRequest
from support import assert_same

SCENES = 8

# Loaded by the workers (perhaps twice). Each partition that is extracted leaves a file for each time, takes a while,
# and one of them kills the first worker that is about to commit it.
OBSERVED = """
import os
import signal
import time
import uuid
from pathlib import Path

import ditr_cache.partition as partition

if not hasattr(partition, "unobserved"):
    partition.unobserved = partition.CacheWriter.commit_features

def observed(writer, spec, geometry, *arguments, **options):
    Path({starts!r}, f"{{geometry.partition}}.{{os.getpid()}}.{{uuid.uuid4().hex}}").touch()
    death = Path({starts!r}, "death")
    if geometry.partition == {victim!r} and not death.exists():
        death.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep({seconds})
    return partition.unobserved(writer, spec, geometry, *arguments, **options)

partition.CacheWriter.commit_features = observed
"""


def named(count: int) -> Iterator[Partition]:
    """Partitions that hold nothing; their ids are words, numbers, and words that look like a digest."""
    for number in range(count):
        word = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        yield Partition(word if number % 2 else f"{word}-{number:08x}", (word,))


def of_worker(seconds: float) -> Callable[[Partition], PartitionSummary]:
    """A partition that takes some time and tells where it ran. Defined in here, it travels by value."""

    def run(partition: Partition) -> PartitionSummary:
        time.sleep(seconds)
        return PartitionSummary(partition=partition.id, status=distributed.get_worker().address)

    return run


@contextlib.contextmanager
def in_process(workers: int, **options: Any) -> Iterator[distributed.LocalCluster]:
    """A cluster in threads of this process, which talk through sockets."""
    cluster = distributed.LocalCluster(
        n_workers=workers, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL, **{"threads_per_worker": 1, **options},
    )  # fmt: skip
    with cluster:
        yield cluster


@pytest.fixture(scope="module")
def settings(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ExtractSettings:
    folder = tmp_path_factory.mktemp("scale")
    small = RoomsSettings(frames=2, color_size=(48, 32), depth_size=(24, 16), point_spacing=0.4)
    synthesize(folder / "rooms", scenes=SCENES, seed=2, settings=small)
    vfm = VFMRequest(name="test_vit", checkpoint=str(make_checkpoint()), image_size=(32, 48), device="cpu")
    return ExtractSettings(dataset="rooms", root=str(folder / "rooms"), cache=str(folder / "clean"), vfm=vfm)


@pytest.fixture(scope="module")
def clean(settings: ExtractSettings) -> Path:
    """What one process makes of it."""
    assert extract(ExtractRequest(settings=settings, workers=0), quiet=True).partitions["done"] == SCENES
    return Path(settings.cache)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[Address]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    started = Address(folder)
    yield started
    started.stop()


def opened(settings: ExtractSettings, cache: Path) -> tuple[ExtractSettings, list[Partition], VFMSpec]:
    """Settings for a new cache that was created, all partitions, and the spec of the VFM."""
    settings = replace(settings, cache=str(cache))
    _, wanted, metadata = resolve(ExtractRequest(settings=settings))
    CacheWriter.create(settings.cache, metadata)
    return settings, wanted, settings.complete_spec(FrozenVFM(settings.vfm).spec)


def preload(folder: Path, victim: str = "", seconds: float = 0.0) -> tuple[Path, Path]:
    """The file that `dask worker --preload` takes, and the folder in which starts are counted."""
    starts = folder / "starts"
    starts.mkdir()
    file = folder / "observed.py"
    file.write_text(OBSERVED.format(starts=str(starts), victim=victim, seconds=seconds))
    return file, starts


# --- many partitions -------------------------------------------------------------------------------------------------


def test_the_scheduler_stays_flat() -> None:
    """What it keeps does not grow with the number of partitions, whatever their ids."""
    kept, ids = [], []
    with in_process(2) as cluster, distributed.Client(cluster) as client:
        for number, summary in enumerate(distribute(client, of_worker(0), named(600))):
            ids.append(summary.partition)
            if number % 30 == 0:
                scheduler = cluster.scheduler
                kept.append((len(scheduler.tasks), len(scheduler.task_prefixes), len(scheduler.task_groups)))
        assert len(client.futures) <= 2  # released in a moment
    assert Counter(ids) == Counter(p.id for p in named(600))
    assert max(tasks for tasks, _, _ in kept) <= 2 * IN_FLIGHT_PER_WORKER + 1
    assert {(prefixes, groups) for _, prefixes, groups in kept} == {(1, 1)}


def test_statistics_stay_flat_where_the_scheduler_runs_dry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask's spans hold every group of tasks that was forgotten, and one is when it has no tasks any more."""
    monkeypatch.setattr(executors, "IN_FLIGHT_PER_WORKER", 1)
    with in_process(1) as cluster, distributed.Client(cluster) as client:
        assert len(list(distribute(client, of_worker(0), named(300)))) == 300
        spans = cluster.scheduler.extensions["spans"].spans.values()
        assert sum(len(span.groups) for span in spans) == 1


def test_partitions_are_taken_as_workers_become_free() -> None:
    taken = 0

    def counted() -> Iterator[Partition]:
        nonlocal taken
        for item in named(50):
            taken += 1
            yield item

    with in_process(1) as cluster, distributed.Client(cluster) as client:
        for finished, _ in enumerate(distribute(client, of_worker(0), counted()), 1):
            assert taken - finished <= IN_FLIGHT_PER_WORKER


def test_a_partition_that_raises_is_tried_again_and_then_reported() -> None:
    def raising(partition: Partition) -> PartitionSummary:
        worker = distributed.get_worker()
        seen = worker.__dict__.setdefault("seen", Counter())
        seen[partition.id] += 1
        if partition.id == "b" or (partition.id == "d" and seen["d"] < 3):
            raise MemoryError(f"time {seen[partition.id]}")
        return PartitionSummary(partition=partition.id, status="done")

    with in_process(1) as cluster, distributed.Client(cluster) as client:
        found = {s.partition: s for s in distribute(client, raising, named(4))}
    assert {name: s.status for name, s in found.items() if s.status != "done"} == {"b": "failed"}
    assert "time 3" in found["b"].failures[0].error


# --- workers come and go ---------------------------------------------------------------------------------------------


def test_a_worker_that_joins_late_gets_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.1)
    where: list[str] = []
    with in_process(1) as cluster, distributed.Client(cluster) as client:
        for summary in distribute(client, of_worker(0.03), named(60)):
            where.append(summary.status)
            if len(where) == 5:
                cluster.scale(2)
                client.wait_for_workers(2)
    assert len(where) == 60
    first, late = Counter(where).most_common()
    assert late[1] >= 15, (first, late)


@pytest.mark.parametrize("threads", range(1, AT_ONCE + 1))
def test_a_killed_worker_costs_only_what_it_was_at(
    settings: ExtractSettings, clean: Path, address: Address, tmp_path: Path, threads: int
) -> None:
    """Two workers as documented; one is killed in the middle of a partition. At most one is lost for each thread."""
    settings, wanted, spec = opened(settings, tmp_path / "cache")
    file, starts = preload(tmp_path, victim=wanted[3].id, seconds=0.1)
    workers = {address.add_worker(*STOCK, "--nthreads", threads, "--preload", file).pid for _ in range(2)}
    summaries = list(run_on_dask(settings, spec.key, wanted, workers=0, scheduler=address.address))
    assert [p.poll() for p in address.processes[1:]].count(-signal.SIGKILL) == 1
    assert sorted(s.partition for s in summaries) == sorted(p.id for p in wanted)
    assert {s.status for s in summaries} <= {"done", "reused"}
    begun = [path.name.split(".") for path in starts.iterdir() if path.name != "death"]
    times = Counter(name for name, *_ in begun)
    again = {name for name, count in times.items() if count > 1}
    assert wanted[3].id in again and len(again) <= threads and max(times.values()) == 2
    assert {int(pid) for _, pid, _ in begun} == workers
    assert_same(tmp_path / "cache", clean)


def test_the_documented_worker_runs_no_more_at_once_than_intended(
    settings: ExtractSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it has one thread, the documented two, or one for every core; with and without a GPU declared."""
    running, most = 0, []
    lock = threading.Lock()
    extract_one = partition.PartitionWorker._extract

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal running
        with lock:
            running += 1
            most.append(running)
        try:
            time.sleep(0.05)
            return extract_one(self, *arguments)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(partition.PartitionWorker, "_extract", counted)
    cases: list[tuple[int, dict[str, int]]] = [(1, {"GPU": 1}), (2, {"GPU": 1}), (8, {})]
    for case, (threads, resources) in enumerate(cases):
        settings, wanted, spec = opened(settings, tmp_path / f"cache{case}")
        most.clear()
        with in_process(1, threads_per_worker=threads, resources=resources) as cluster:
            done = list(run_on_dask(settings, spec.key, wanted, workers=0, scheduler=cluster.scheduler_address))
        assert [s.status for s in done] == ["done"] * SCENES
        assert max(most) == min(threads, AT_ONCE)


def test_a_late_worker_that_cannot_be_set_up_is_taken_out(
    settings: ExtractSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else it would fail partitions quicker than others do them."""
    settings, wanted, spec = opened(settings, tmp_path / "cache")
    build = partition.PartitionWorker.__init__
    built = 0

    def once(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal built
        built += 1
        if built > 1:
            raise DataError("this host does not see the data")
        build(self, *arguments, **options)

    monkeypatch.setattr(partition.PartitionWorker, "__init__", once)
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.05)
    slow = partition.PartitionWorker.__call__
    monkeypatch.setattr(partition.PartitionWorker, "__call__", lambda *a: (time.sleep(0.1), slow(*a))[1])
    with in_process(1) as cluster:
        done = []
        for summary in run_on_dask(settings, spec.key, wanted, workers=0, scheduler=cluster.scheduler_address):
            done.append(summary)
            if len(done) == 1:
                cluster.scale(2)
        assert sorted((s.partition, s.status) for s in done) == sorted((p.id, "done") for p in wanted)
        assert built == 2 and "this host does not see the data" in caplog.text
        assert len(cluster.scheduler.workers) == 1


def test_a_first_worker_that_cannot_be_set_up_ends_the_run(
    settings: ExtractSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, wanted, _ = opened(settings, tmp_path / "cache")
    with in_process(1) as cluster:
        with pytest.raises(UsageError, match="its weights or its version"):
            list(run_on_dask(settings, "test_vit-00000000", wanted, workers=0, scheduler=cluster.scheduler_address))
        monkeypatch.setattr(partition, "PartitionWorker", None)
        with pytest.raises(UsageError, match=r"worker tcp://.* cannot be set up: .*not callable"):
            list(run_on_dask(settings, "test_vit-00000000", wanted, workers=0, scheduler=cluster.scheduler_address))


def test_two_runs_share_a_cluster(
    settings: ExtractSettings, clean: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Each with its own VFM and cache, and the same partition ids."""
    other = replace(settings, vfm=replace(settings.vfm, checkpoint=str(make_checkpoint(seed=1))))
    runs = [opened(settings, tmp_path / "one"), opened(other, tmp_path / "two")]
    keys = [spec.key for _, _, spec in runs]
    assert keys[0] != keys[1]
    with in_process(2) as cluster:
        streams = [
            run_on_dask(s, spec.key, wanted, workers=0, scheduler=cluster.scheduler_address) for s, wanted, spec in runs
        ]
        summaries = list(zip(*streams, strict=True))
    assert len(summaries) == SCENES and {s.status for pair in summaries for s in pair} == {"done"}
    assert_same(tmp_path / "one", clean)
    for (_, wanted, spec), folder in zip(runs, ("one", "two"), strict=True):
        records = (tmp_path / folder / "features" / spec.key).glob("*.json")
        assert {p.id for p in wanted} <= {path.stem for path in records}


# --- the scheduler or the client goes away ---------------------------------------------------------------------------


def test_a_scheduler_that_dies_is_a_clear_error(
    settings: ExtractSettings, address: Address, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing else is said."""
    settings, wanted, spec = opened(settings, tmp_path / "cache")
    file, _ = preload(tmp_path, seconds=0.3)
    address.add_worker(*STOCK, "--preload", file)
    summaries = run_on_dask(settings, spec.key, wanted, workers=0, scheduler=address.address)
    next(summaries)
    address.scheduler.kill()
    with pytest.raises(ClusterError, match=r"the dask scheduler at 'tcp://127.* went away") as error:
        list(summaries)
    assert error.value.exit_code == 1
    assert "run the same command to go on" in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_scheduler_that_is_told_to_stop(address: Address) -> None:
    address.add_worker()
    with distributed.Client(address.address, timeout="2s") as client:
        summaries = distribute(client, of_worker(0.1), named(100))
        next(summaries)
        address.scheduler.terminate()
        with pytest.raises(ClusterError, match="went away"):
            list(summaries)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_client_that_stops_leaves_the_workers_clean(
    settings: ExtractSettings, clean: Path, address: Address, tmp_path: Path, how: signal.Signals
) -> None:
    """Alive, without plugin, VFM or partition; what was committed stays, and the next run goes on from there."""
    file, starts = preload(tmp_path, seconds=0.5)
    worker = address.add_worker(*STOCK, "--preload", file)
    command = [str(Path(sys.executable).with_name("ditr-cache")), "extract", "--dataset", "rooms"]
    command += ["--root", settings.root]
    command += ["--out", str(tmp_path / "cache"), "--vfm", "test_vit", "--checkpoint", str(settings.vfm.checkpoint)]
    command += ["--image-size", "32x48", "--scheduler", address.address, "--json"]
    # A shell starts what runs in its background deaf to SIGINT, and so would be the client.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heard) as client:
        wait_until(lambda: len(list(starts.iterdir())) >= 3 or client.poll() is not None)
        client.send_signal(how)
        out, err = client.communicate(timeout=60)
    assert not out and "Traceback" not in err
    if how == signal.SIGINT:
        assert client.returncode == 1 and "stopped; the same command goes on from here" in err

    def state(dask_worker: Any) -> tuple[int, int, int]:
        import gc

        ours = [name for name in dask_worker.plugins if name.startswith("ditr-cache")]
        models = [o for o in gc.get_objects() if type(o).__name__ in ("FrozenVFM", "PartitionWorker")]
        return len(ours), len(models), dask_worker.state.executing_count

    def left_on_scheduler(dask_scheduler: Any) -> tuple[int, list[str]]:
        plugins = [*dask_scheduler.plugins, *dask_scheduler.worker_plugins]
        return len(dask_scheduler.tasks), [name for name in plugins if name.startswith("ditr-cache")]

    with distributed.Client(address.address) as other:
        wait_until(lambda: list(other.run(state).values()) == [(0, 0, 0)], seconds=30)
        assert other.run_on_scheduler(left_on_scheduler) == (0, [])
    assert worker.poll() is None
    begun = len(list(starts.iterdir()))
    assert begun < SCENES
    done = extract(
        ExtractRequest(settings=replace(settings, cache=str(tmp_path / "cache")), scheduler=address.address), quiet=True
    )
    assert done.partitions["reused"] >= 1 and sum(done.partitions.values()) == SCENES
    assert_same(tmp_path / "cache", clean)


# --- which device a worker takes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "name", "asked", "taken"),
    [
        (True, 5, "auto", "cuda:1"),
        (True, 5, "cuda", "cuda:1"),
        (True, 5, "cuda:3", "cuda:3"),
        (True, 5, "cpu", "cpu"),
        (False, 5, "auto", "auto"),  # dask-cuda names its workers so, and shows each its own GPU first
        (False, "tcp://127.0.0.1:1", "auto", "auto"),
    ],
)
def test_the_device_of_a_worker(
    settings: ExtractSettings,
    monkeypatch: pytest.MonkeyPatch,
    local: bool,
    name: object,
    asked: str,
    taken: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(partition, "PartitionWorker", lambda settings, expected_key: settings.vfm.device)
    asking = replace(settings, vfm=replace(settings.vfm, device=asked))
    setup = executors._WorkerSetup(asking, "key", threads=None, local=local)
    assert setup._build(name) == taken
