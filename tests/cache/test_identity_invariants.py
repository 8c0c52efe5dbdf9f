"""What must not change the identity of features or geometry: path, host, date, batch size, workers, device."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditr_cache.partition import ExtractSettings
from ditr_cache.store import open_cache
from identity_runs import ROOMS, geometry_digests, identities, run, settings_of, write_rooms


@pytest.fixture(scope="module")
def settings(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ExtractSettings:
    folder = tmp_path_factory.mktemp("invariants")
    made = settings_of(write_rooms(folder / "rooms"), folder / "cache", make_checkpoint())
    assert run(made).partitions["done"] == len(ROOMS)
    return made


@pytest.fixture(scope="module")
def expected(settings: ExtractSettings) -> dict[str, Any]:
    """Every digest of the cache, of every array."""
    return identities(Path(settings.cache))


def all_text(cache: Path) -> str:
    return "".join(path.read_text() for path in cache.rglob("*.json"))


def test_paths_do_not_matter(
    settings: ExtractSettings, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, weights and cache elsewhere, under other names and from another folder; then the cache is moved."""
    root = shutil.copytree(settings.root, tmp_path / "elsewhere" / "other rooms")
    weights = shutil.copy(settings.vfm.checkpoint, tmp_path / "weights of mine.bin")
    monkeypatch.chdir(tmp_path)
    moved = replace(
        settings,
        root=str(root.relative_to(tmp_path)),
        cache="some cache",
        vfm=replace(settings.vfm, checkpoint=str(weights)),
    )
    assert run(moved).partitions["done"] == len(ROOMS)
    assert identities(tmp_path / "some cache") == expected
    (tmp_path / "some cache").rename(tmp_path / "moved")
    assert identities(tmp_path / "moved") == expected
    assert run(replace(moved, cache=str(tmp_path / "moved"))).partitions["reused"] == len(ROOMS)
    for cache in (tmp_path / "moved", Path(settings.cache)):
        text = all_text(cache)
        assert "rooms" in text  # the dataset's name
        assert not [word for word in (str(tmp_path), settings.root, "other rooms", "weights of mine") if word in text]


def test_host_and_user_do_not_matter(
    settings: ExtractSettings, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-0815")
    monkeypatch.setattr(platform, "node", lambda: "node-0815")
    for name in ("HOSTNAME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "node-0815")
    run(replace(settings, cache=str(tmp_path / "cache")))
    assert identities(tmp_path / "cache") == expected
    assert "node-0815" not in all_text(tmp_path / "cache")


def test_the_date_does_not_matter(
    settings: ExtractSettings, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of the run nor those of the files, which change when they are copied."""
    root = shutil.copytree(settings.root, tmp_path / "rooms")
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    now, years = time.time, 10 * 365 * 86400
    monkeypatch.setattr(time, "time", lambda: now() + years)
    monkeypatch.setattr(time, "time_ns", lambda: int((now() + years) * 1e9))
    dated = replace(settings, root=str(root), cache=str(tmp_path / "cache"))
    run(dated)
    assert identities(tmp_path / "cache") == expected
    # And nothing is made again for its date.
    for path in [*root.rglob("*"), *(tmp_path / "cache").rglob("*")]:
        os.utime(path, (1.2e9, 1.2e9))
    assert run(dated).partitions["reused"] == len(ROOMS)


def keys_and_geometry(cache: Path) -> tuple[list[str], dict[str, str]]:
    return sorted(open_cache(cache).vfms), geometry_digests(cache)


def assert_same_up_to_rounding(cache: Path, other: Path, tolerance: float) -> None:
    """The same keys, geometry and points with features; the features themselves up to another order of sums."""
    assert keys_and_geometry(cache) == keys_and_geometry(other)
    for room in ROOMS:
        a, b = open_cache(cache).read(room), open_cache(other).read(room)
        assert a.valid.any()
        np.testing.assert_array_equal(a.valid, b.valid)
        np.testing.assert_allclose(a["feature"], b["feature"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_changes_no_key(settings: ExtractSettings, tmp_path: Path, batch_size: int) -> None:
    """A matrix product may sum in another order in a batch of another size: features agree up to float noise, keys and
    geometry exactly, and a run goes on with any size."""
    batched = replace(settings, cache=str(tmp_path / "cache"), batch_size=batch_size)
    run(batched, limit=1)
    assert run(replace(batched, batch_size=None)).partitions == {"done": 1, "reused": 1, "failed": 0}
    assert_same_up_to_rounding(Path(settings.cache), tmp_path / "cache", tolerance=2e-3)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_matter(
    settings: ExtractSettings,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """Of the same number of threads each; workers of this machine share its cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: workers)
    totals = run(replace(settings, cache=str(tmp_path / "cache")), workers=workers)
    assert totals.partitions["done"] == len(ROOMS)
    assert identities(tmp_path / "cache") == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_changes_no_key(settings: ExtractSettings, tmp_path: Path) -> None:
    """It computes in bfloat16: features agree as far as that goes."""
    on_gpu = replace(settings, cache=str(tmp_path / "cache"), vfm=replace(settings.vfm, device="cuda"))
    run(on_gpu)
    assert_same_up_to_rounding(Path(settings.cache), tmp_path / "cache", tolerance=0.15)
