"""Partitions that run beside each other in one process: the same cache, whatever the order, and a quick end."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditr_cache import geometry_partition, in_process, partition
from ditr_cache.batcher import Stopped
from ditr_cache.datasets.base import Partition
from ditr_cache.errors import StorageError
from ditr_cache.extract import ExtractRequest, extract, resolve
from ditr_cache.in_process import AT_ONCE, run_here
from ditr_cache.partition import ExtractSettings, PartitionWorker
from ditr_cache.progress import PartitionSummary
from ditr_cache.store import CacheWriter
from ditr_cache.synthesize import RoomsSettings, synthesize
from ditr_cache.timeline import STAGES
from ditr_cache.vfm import FrozenVFM, VFMRequest
from support import assert_same

SOON = 60.0
"""Seconds after which a test takes it that something hangs."""

SCENES = 4


@pytest.fixture(scope="module")
def settings(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ExtractSettings:
    folder = tmp_path_factory.mktemp("in_process")
    small = RoomsSettings(frames=3, color_size=(48, 32), depth_size=(24, 16), point_spacing=0.4)
    synthesize(folder / "rooms", scenes=SCENES, seed=2, settings=small)
    vfm = VFMRequest(name="test_vit", checkpoint=str(make_checkpoint()), image_size=(32, 48), device="cpu")
    return ExtractSettings(dataset="rooms", root=str(folder / "rooms"), cache=str(folder / "clean"), vfm=vfm)


@pytest.fixture(scope="module")
def vfm(settings: ExtractSettings) -> FrozenVFM:
    return FrozenVFM(settings.vfm)


@pytest.fixture(scope="module")
def clean(settings: ExtractSettings, vfm: FrozenVFM) -> Path:
    """What one partition after the other makes of it."""
    worker, partitions = ready(settings, vfm, Path(settings.cache))
    assert [worker(p).status for p in partitions] == ["done"] * SCENES
    return Path(settings.cache)


def ready(
    settings: ExtractSettings, vfm: FrozenVFM, cache: Path, **changes: Any
) -> tuple[PartitionWorker, list[Partition]]:
    """A worker on a new cache, and the partitions of the dataset."""
    settings = replace(settings, cache=str(cache), **changes)
    dataset, partitions, metadata = resolve(ExtractRequest(settings=settings))
    CacheWriter.create(cache, metadata)
    return PartitionWorker(settings, vfm, dataset=dataset), partitions


# --- beside each other ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
@pytest.mark.parametrize("threads", [2, SCENES])
def test_any_number_at_once_make_the_same_cache_bit_by_bit(
    settings: ExtractSettings, vfm: FrozenVFM, clean: Path, tmp_path: Path, batch_size: int, threads: int
) -> None:
    """Also where batches mix the images of several partitions: tokens do not depend on their neighbours."""
    worker, partitions = ready(settings, vfm, tmp_path / "cache", batch_size=batch_size)
    launch, batches = vfm.launch, []
    worker._batcher._vfm = Counted(launch, batches)  # type: ignore[assignment]
    with ThreadPoolExecutor(max_workers=threads) as pool:
        assert {s.status for s in pool.map(worker, partitions)} == {"done"}
    assert_same(tmp_path / "cache", clean)
    assert set(batches) == {batch_size}


class Counted:
    """A VFM whose batches are counted."""

    def __init__(self, launch: Callable[..., Any], batches: list[int]) -> None:
        self._launch, self._batches = launch, batches

    def launch(self, images: Any) -> Any:
        self._batches.append(len(images))
        return self._launch(images)


def test_one_is_written_while_the_next_is_embedded_but_for_its_last_image(
    settings: ExtractSettings, vfm: FrozenVFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other would hang here. Both embedded to their ends, a kill would cost two partitions."""
    worker, partitions = ready(settings, vfm, tmp_path / "cache", batch_size=1)
    launched: list[int] = []
    worker._batcher._vfm = Counted(vfm.launch, launched)  # type: ignore[assignment]
    commit = CacheWriter.commit_features
    ahead: list[int] = []
    images: list[int] = []

    def patient(writer: CacheWriter, spec: Any, geometry: Any, *arguments: Any, **named: Any) -> Any:
        images.append(named["images"])
        if len(images) == 1:
            deadline = time.monotonic() + SOON
            while len(launched) < sum(images) + 1:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(0.1)
            ahead.append(len(launched) - sum(images))
        return commit(writer, spec, geometry, *arguments, **named)

    monkeypatch.setattr(CacheWriter, "commit_features", patient)
    summaries = list(run_here(worker, partitions[:2]))
    assert [s.status for s in summaries] == ["done"] * 2
    assert sorted(s.partition for s in summaries) == sorted(p.id for p in partitions[:2])
    assert ahead == [images[1] - 1] and len(launched) == sum(images)


def test_few_run_at_once_and_partitions_are_taken_as_threads_become_free(
    settings: ExtractSettings, vfm: FrozenVFM, tmp_path: Path
) -> None:
    lock, running, most, taken = threading.Lock(), 0, 0, 0

    class Slow:
        def __call__(self, partition: Partition) -> PartitionSummary:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.005)
            with lock:
                running -= 1
            return PartitionSummary(partition=partition.id, status="done")

        def stop(self) -> None:
            """Nothing is going on."""

    def many() -> Iterator[Partition]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield Partition(str(i), (str(i),))

    summaries = run_here(Slow(), many())  # type: ignore[arg-type]
    first = [next(summaries).partition for _ in range(10)]
    assert len(set(first)) == 10
    assert taken <= 10 + AT_ONCE
    summaries.close()
    assert most == AT_ONCE


def test_one_partition_at_a_time_is_read_and_each_sample_once(
    settings: ExtractSettings, vfm: FrozenVFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, partitions = ready(settings, vfm, tmp_path / "cache")
    make, at_work, read = partition.make_geometry, [], worker.dataset.read
    samples: list[str] = []

    def alone(*arguments: Any, **named: Any) -> Any:
        at_work.append(1)
        assert len(at_work) == 1
        time.sleep(0.02)
        record = make(*arguments, **named)
        at_work.pop()
        return record

    def counted(sample_id: str) -> Any:
        samples.append(sample_id)
        return read(sample_id)

    monkeypatch.setattr(partition, "make_geometry", alone)
    monkeypatch.setattr(worker.dataset, "read", counted)
    assert {s.status for s in run_here(worker, partitions)} == {"done"}
    assert sorted(samples) == sorted(i for p in partitions for i in p.sample_ids)


# --- the end --------------------------------------------------------------------------------------------------------


def test_closed_early_it_ends_soon_and_what_was_committed_stays(
    settings: ExtractSettings, vfm: FrozenVFM, clean: Path, tmp_path: Path
) -> None:
    worker, partitions = ready(settings, vfm, tmp_path / "cache")
    summaries = run_here(worker, partitions)
    first = next(summaries)
    summaries.close()
    assert first.status == "done"
    assert not [t for t in threading.enumerate() if t.name.startswith("partition")]
    with pytest.raises(Stopped):
        worker(partitions[-1])
    again, _ = ready(settings, vfm, tmp_path / "cache")
    assert {s.status for s in run_here(again, partitions)} == {"done", "reused"}
    assert_same(tmp_path / "cache", clean)


def test_a_failing_storage_ends_the_run(
    settings: ExtractSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def full(writer: CacheWriter, spec: Any, geometry: Any, *arguments: Any, **named: Any) -> Any:
        tries.append(geometry.partition)
        raise StorageError("no space left")

    monkeypatch.setattr(CacheWriter, "commit_features", full)
    request = ExtractRequest(settings=replace(settings, cache=str(tmp_path / "cache")), workers=0)
    totals = extract(request, quiet=True)
    assert totals.partitions["failed"] == 1 and "no space left" in totals.failures[0].error
    assert len(tries) <= 1 + AT_ONCE


@pytest.mark.parametrize("where", ["link_view", "commit_features"])
def test_interrupted_it_ends_at_the_next_view_or_batch(
    settings: ExtractSettings, vfm: FrozenVFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Only what cannot be cut in two is completed: here a view's links, or a commit."""
    worker, partitions = ready(settings, vfm, tmp_path / "cache")
    calls: list[int] = []

    def slow(whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(1)
            time.sleep(0.2)
            return whole(*arguments, **named)

        return call

    owner: Any = geometry_partition if where == "link_view" else CacheWriter
    monkeypatch.setattr(owner, where, slow(getattr(owner, where)))

    def interrupt(*arguments: Any, **named: Any) -> Any:
        deadline = time.monotonic() + SOON
        while not calls:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(in_process, "wait", interrupt)  # as where the signal finds the main thread
    with pytest.raises(KeyboardInterrupt):
        list(run_here(worker, partitions))
    assert len(calls) <= AT_ONCE


# --- what it tells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_profile_holds_every_stage_of_every_partition(
    settings: ExtractSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    request = ExtractRequest(
        settings=replace(settings, cache=str(tmp_path / "cache")), workers=workers, profile=tmp_path / "trace.json"
    )
    with caplog.at_level(logging.INFO, "ditr_cache"):
        totals = extract(request, quiet=True)
    assert totals.partitions["done"] == SCENES and len(totals.workers) == 1
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert {(e["args"]["partition"], e["name"]) for e in events} == {
        (f"scene{i:04d}_00", stage) for i in range(SCENES) for stage in STAGES
    }
    by_stage = {stage: sum(e["dur"] for e in events if e["name"] == stage) / 1e6 for stage in STAGES}
    assert by_stage == pytest.approx(totals.stages, rel=1e-3, abs=1e-3)
    assert totals.images == len([e for e in events if e["name"] == "decode"]) > 2 * SCENES
    (line,) = [r.getMessage() for r in caplog.records if "seconds per stage" in r.getMessage()]
    assert all(stage in line for stage in STAGES) and "forward" in line


def test_without_a_profile_no_span_is_kept(settings: ExtractSettings, vfm: FrozenVFM, tmp_path: Path) -> None:
    worker, partitions = ready(settings, vfm, tmp_path / "cache")
    (summary,) = run_here(worker, partitions[:1])
    assert summary.spans == () and all(summary.stages[stage] > 0 for stage in STAGES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_partitions_beside_each_other_make_what_one_after_the_other_makes(
    settings: ExtractSettings, tmp_path: Path
) -> None:
    gpu = FrozenVFM(replace(settings.vfm, device="cuda"))
    caches = []
    for threads in (1, SCENES):
        caches.append(tmp_path / f"{threads}")
        worker, partitions = ready(settings, gpu, caches[-1], batch_size=4)
        with ThreadPoolExecutor(max_workers=threads) as pool:
            assert {s.status for s in pool.map(worker, partitions)} == {"done"}
    assert_same(*caches)
