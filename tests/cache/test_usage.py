"""`ditr-cache du`: every byte that lies in a cache is counted once, under what it belongs to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from ditr_cache import open_cache
from ditr_cache.errors import CacheError
from ditr_cache.files import temporary_prefix
from ditr_cache.schema import VFMSpec
from ditr_cache.store import CacheWriter
from ditr_cache.usage import CacheUsage, disk_usage
from small_caches import in_memory, rooms_and_scans
from support import Run


@pytest.fixture(scope="module")
def specs(make_spec: Callable[..., VFMSpec]) -> tuple[VFMSpec, VFMSpec]:
    return make_spec(), make_spec(name="viewed", layout="views", fuse="none", dim=7, codec="int8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_metadata, make_arrays, specs) -> Path:
    path = tmp_path_factory.mktemp("made") / "cache"
    rooms_and_scans(CacheWriter.create(path, make_metadata()), make_arrays, *specs)
    return path


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "cache")


@pytest.fixture
def memory(made: Path) -> Iterator[str]:
    """The same cache in object storage."""
    with in_memory(made) as url:
        yield url


def check_sums(usage: CacheUsage) -> None:
    """Nothing is counted twice, nothing is left out."""
    stores = (usage.geometry, *usage.vfms)
    metadata = usage.bytes - sum(s.bytes for s in stores) - usage.temporary[1] - usage.orphans.total()
    assert 0 < metadata < 2000  # cache.json
    for store in stores:
        if not store.missing:
            assert sum(store.arrays.values()) + store.documents == store.bytes


def test_every_byte_is_counted(cache: Path, specs) -> None:
    usage = disk_usage(cache)
    sizes = [p.stat().st_size for p in cache.rglob("*") if p.is_file()]
    assert (usage.files, usage.bytes) == (len(sizes), sum(sizes))
    check_sums(usage)
    assert usage.orphans == {} and usage.temporary == (0, 0)
    reader = open_cache(cache)
    points = sum(s.points for r in reader.geometry.values() for s in r.samples)
    assert usage.geometry.partitions == 4 and usage.geometry.points == points
    table = sum(p.stat().st_size for p in cache.glob("geometry/*.zarr/coord/**/*") if p.is_file())
    assert usage.geometry.arrays["coord"] == table
    assert {s.spec.key: set(s.arrays) for s in usage.vfms} == {
        specs[0].key: {"table", "index"},
        specs[1].key: {"table", "index", "scale"},
    }
    for store in usage.vfms:
        records = [reader.feature_record(store.spec, p) for p in reader.geometry]
        assert (store.partitions, store.points) == (4, points) and store.rows == sum(r.rows for r in records)
        folder = cache / store.folder
        assert store.bytes == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        assert store.to_dict()["bytes_per_point"] == pytest.approx(store.bytes / points, abs=1e-3)
        assert store.to_dict()["bytes_per_row"] == pytest.approx(store.bytes / store.rows, abs=1e-3)


def test_in_object_storage(cache: Path, memory: str) -> None:
    usage, local = disk_usage(memory), disk_usage(cache)
    objects = {p: len(o.getvalue()) for p, o in fsspec.filesystem("memory").store.items() if "/.claims/" not in p}
    assert usage.files - usage.temporary[0] == len(objects) and usage.orphans == {}
    assert usage.bytes - usage.temporary[1] == sum(objects.values())
    check_sums(usage)
    for remote, on_disk in zip((usage.geometry, *usage.vfms), (local.geometry, *local.vfms), strict=True):
        assert remote.arrays == on_disk.arrays and remote.rows == on_disk.rows and remote.missing == 0
        assert remote.files < on_disk.files


def test_what_no_reader_sees(cache: Path, specs, make_arrays) -> None:
    fused, views = specs
    before = disk_usage(cache)
    (cache / "features" / fused.key / "room-0.json").unlink()  # arrays without a record
    record = cache / "features" / views.key / "room-1.json"
    record.write_text(record.read_text().replace("room-1", "room-x"))  # a damaged record
    (cache / "notes.txt").write_text("mine")
    (cache / "geometry" / f"{temporary_prefix()}x.tmp").mkdir()
    (cache / "geometry" / f"{temporary_prefix()}x.tmp" / "part").write_bytes(b"12345")
    usage = disk_usage(cache)
    check_sums(usage)
    assert usage.temporary == (1, 5)
    assert sorted(usage.orphans) == [
        f"features/{fused.key}/room-0.zarr",
        f"features/{views.key}/room-1.json",
        f"features/{views.key}/room-1.zarr",
        "notes.txt",
    ]
    assert usage.orphans["notes.txt"] == 4
    assert [s.partitions for s in usage.vfms] == [3, 3] and usage.geometry.bytes == before.geometry.bytes
    # Features of a geometry that was made again are refused by readers; so they are none of a store.
    infos, arrays = make_arrays([("room-2", 12)])
    CacheWriter(cache).commit_geometry("room-2", infos, arrays)
    usage = disk_usage(cache)
    check_sums(usage)
    assert [s.partitions for s in usage.vfms] == [2, 2]
    assert {f"features/{s.key}/room-2.{end}" for s in specs for end in ("json", "zarr")} <= set(usage.orphans)


def test_a_store_that_cannot_be_read_is_no_store(cache: Path, specs) -> None:
    (cache / "features" / specs[0].key / "vfm.json").write_text("{}")
    usage = disk_usage(cache)
    check_sums(usage)
    assert [s.spec.key for s in usage.vfms] == [specs[1].key] and len(usage.orphans) == 4 * 2 + 1


def test_missing_files_are_told(run: Run, cache: Path) -> None:
    next(p for p in cache.glob("geometry/room-0.zarr/coord/**/*") if p.is_file()).unlink()
    usage = disk_usage(cache)
    check_sums(usage)
    assert usage.geometry.missing == 1
    assert "1 files missing or cut" in run("du", cache).out


def test_the_command(run: Run, cache: Path, specs) -> None:
    found = run("du", cache, "--json").json
    assert set(found) == {"cache", "files", "bytes", "geometry", "vfms", "temporary", "orphans"}
    assert found["orphans"] == {"bytes": 0, "entries": []} and found["bytes"] == disk_usage(cache).bytes
    assert {v["key"] for v in found["vfms"]} == {s.key for s in specs}
    outcome = run("du", cache)
    assert outcome.code == 0 and "bytes per point" in outcome.out and "per row" in outcome.out
    assert all(name in outcome.out for name in ("geometry", specs[1].key, "table", "scale", "link_uv", "in all"))
    outcome = run("du", cache.parent)
    assert outcome.code == 2 and "not a cache" in outcome.err


def test_damaged_metadata_is_told(cache: Path) -> None:
    (cache / "cache.json").write_text("{}")
    with pytest.raises(CacheError):
        disk_usage(cache)


def test_links_are_not_followed(cache: Path) -> None:
    before = disk_usage(cache)
    (cache / "loop").symlink_to(cache / "geometry")
    usage = disk_usage(cache)
    assert usage.files == before.files + 1 and list(usage.orphans) == ["loop"]
