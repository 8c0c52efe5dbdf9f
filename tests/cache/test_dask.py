"""Extraction on dask workers: the same arrays as in one process, bounded submission, workers that die."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
import torch

from dask_processes import Address
from ditr_cache import cli
from ditr_cache.errors import UsageError
from ditr_cache.executors import IN_FLIGHT_PER_WORKER
from ditr_cache.extract import ExtractRequest, extract
from ditr_cache.partition import ExtractSettings, PartitionWorker
from ditr_cache.progress import RunTotals
from ditr_cache.synthesize import RoomsSettings, synthesize
from ditr_cache.verify import verify
from ditr_cache.vfm import VFMRequest
from support import assert_same

SCENES = 8

# Loaded by every worker (perhaps twice): it dies in the middle of a partition that the test names, as often as it says.
DYING = """
import os
import signal
from pathlib import Path

import ditr_cache.partition as partition

if not hasattr(partition, "unharmed"):
    partition.unharmed = partition.CacheWriter.commit_features

deaths = Path({deaths!r})

def deadly(writer, spec, geometry, *arguments, **options):
    if geometry.partition == {victim!r} and len(list(deaths.iterdir())) < {times}:
        (deaths / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return partition.unharmed(writer, spec, geometry, *arguments, **options)

partition.CacheWriter.commit_features = deadly
"""


@pytest.fixture(scope="module")
def settings(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ExtractSettings:
    folder = tmp_path_factory.mktemp("dask")
    small = RoomsSettings(frames=2, color_size=(48, 32), depth_size=(24, 16), point_spacing=0.4)
    synthesize(folder / "rooms", scenes=SCENES, seed=1, settings=small)
    vfm = VFMRequest(name="test_vit", checkpoint=str(make_checkpoint()), image_size=(32, 48), device="cpu")
    return ExtractSettings(dataset="rooms", root=str(folder / "rooms"), cache=str(folder / "clean"), vfm=vfm)


@pytest.fixture(scope="module")
def clean(settings: ExtractSettings) -> Path:
    """What one process makes of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    totals = extract(ExtractRequest(settings=settings, workers=0), quiet=True)
    torch.set_num_threads(threads)
    assert totals.partitions["done"] == SCENES
    return Path(settings.cache)


def run(settings: ExtractSettings, cache: Path, **how: Any) -> RunTotals:
    return extract(ExtractRequest(settings=replace(settings, cache=str(cache)), **how), quiet=True)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    started = Address(tmp_path_factory.mktemp("scheduler"))
    yield started
    started.stop()


def command_line(settings: ExtractSettings, out: Path, scheduler: str) -> list[str]:
    named = ["ditr-cache", "extract", "--dataset", settings.dataset, "--root", settings.root, "--out", str(out)]
    named += ["--vfm", settings.vfm.name, "--checkpoint", str(settings.vfm.checkpoint), "--image-size", "32x48"]
    return [*named, "--scheduler", scheduler, "--json"]


def test_a_scheduler_without_workers_is_refused(
    settings: ExtractSettings,
    scheduler: Address,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", command_line(settings, tmp_path / "cache", scheduler.address))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "has no workers" in capsys.readouterr().err


def test_workers_of_a_scheduler_make_the_same_cache(
    settings: ExtractSettings,
    clean: Path,
    scheduler: Address,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And no more partitions are submitted at a time than the workers need to be busy."""
    scheduler.add_worker()
    submitted, held = 0, []
    submit, release = distributed.Client.submit, distributed.Future.release
    released: set[str] = set()

    def counted_submit(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal submitted
        submitted += 1
        held.append(submitted - len(released))
        return submit(self, *args, **kwargs)

    def counted_release(self: Any) -> None:
        released.add(self.key)
        release(self)

    monkeypatch.setattr(distributed.Client, "submit", counted_submit)
    monkeypatch.setattr(distributed.Future, "release", counted_release)
    monkeypatch.setattr(sys, "argv", command_line(settings, tmp_path / "cache", scheduler.address))
    cli.main()
    totals = json.loads(capsys.readouterr().out)
    assert (totals["partitions"], totals["failures"]) == ({"done": SCENES, "reused": 0, "failed": 0}, [])
    assert_same(tmp_path / "cache", clean)
    # And one task that is held as long as the run.
    assert len(held) == SCENES + 1 > IN_FLIGHT_PER_WORKER + 1
    assert max(held) <= IN_FLIGHT_PER_WORKER + 1
    # The workers are somebody else's: they outlive the run, and serve the next.
    assert run(settings, tmp_path / "cache", scheduler=scheduler.address).partitions["reused"] == SCENES


def test_no_scheduler_there(
    settings: ExtractSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Impatient(distributed.Client):
        def __init__(self, address: str, timeout: str) -> None:
            super().__init__(address, timeout="1s")

    monkeypatch.setattr(distributed, "Client", Impatient)
    monkeypatch.setattr(sys, "argv", command_line(settings, tmp_path / "cache", "tcp://127.0.0.1:1"))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "no dask scheduler answers at 'tcp://127.0.0.1:1'" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("times", "lost"), [(1, 0), (99, 1)])
def test_a_local_cluster_survives_workers_that_die(
    settings: ExtractSettings, clean: Path, tmp_path: Path, times: int, lost: int
) -> None:
    """One death costs nothing; a partition that kills every worker is lost alone, whoever waited behind it."""
    (tmp_path / "deaths").mkdir()
    preload = tmp_path / "dying.py"
    victim = f"scene{SCENES // 2:04d}_00"
    preload.write_text(DYING.format(deaths=str(tmp_path / "deaths"), victim=victim, times=times))
    # A second death would only take time: where nothing is forgiven, the first already condemns all that waited there.
    config = {"distributed.worker.preload": [str(preload)], "distributed.scheduler.allowed-failures": 0 if lost else 3}
    with dask.config.set(config):
        totals = run(settings, tmp_path / "cache", workers=2)
    assert len(list((tmp_path / "deaths").iterdir())) >= (1 if times == 1 else 2)
    assert totals.partitions == {"done": SCENES - lost, "reused": 0, "failed": lost}
    assert [f.sample for f in totals.failures] == [victim] * lost
    assert verify(tmp_path / "cache").clean
    if lost:
        assert "died" in totals.failures[0].error
        assert run(settings, tmp_path / "cache", workers=0).partitions["done"] == lost
    assert_same(tmp_path / "cache", clean)


def test_a_worker_with_other_weights_refuses(settings: ExtractSettings, clean: Path) -> None:
    assert clean.is_dir()
    with pytest.raises(UsageError, match="its weights or its version"):
        PartitionWorker(settings, expected_key="test_vit-00000000")
