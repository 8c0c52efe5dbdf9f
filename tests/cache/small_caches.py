"""Small caches of random features, on disk or in memory, for tests of what looks after caches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from ditr_cache import groups, open_cache
from ditr_cache.files import write_text
from ditr_cache.schema import FeatureRecord, GeometryRecord, VFMSpec
from ditr_cache.store import CacheReader, CacheWriter
from ditr_cache.transcode import CopyRequest, copy
from plain_rows import encode

ROOMS = ("room-0", "room-1", "room-2")
SCANS = [("scan-0", 90), ("scan-1", 80)]  # in one partition; the first is for training, the second validates


def write_features(writer: CacheWriter, spec: VFMSpec, geometry: GeometryRecord, seed: int = 0) -> NDArray[np.float32]:
    """Commit random rows of a partition, one per linked point, or in the layout `views` per link; returns the rows."""
    rng = np.random.default_rng([seed, len(geometry.partition), spec.dim])
    point = writer.read_arrays(geometry, ("link_point",))["link_point"]
    if spec.layout == "views":
        index = np.arange(len(point), dtype=np.int32)
    else:
        index = np.full(sum(s.points for s in geometry.samples), -1, dtype=np.int32)
        visible = np.unique(point)
        index[visible] = np.arange(len(visible))
    rows = rng.normal(size=(int(index.max(initial=-1)) + 1, spec.dim)).astype(np.float32) * 3 + 1
    writer.commit_features(spec, geometry, encode(rows, spec.codec), index, images=2, seconds=1.5)
    return rows


def rooms_and_scans(writer: CacheWriter, make_arrays: Callable[..., tuple], *specs: VFMSpec) -> None:
    """Three partitions of one sample and one of two, with features of every spec."""
    for partition, samples in [*((room, [(room, 60 + i)]) for i, room in enumerate(ROOMS)), ("scans", SCANS)]:
        infos, arrays = make_arrays(samples, seed=len(samples))
        geometry = writer.commit_geometry(
            partition, infos, arrays, seconds=2.5, calibration=["a" * 24 * len(i.views) for i in infos]
        )
        for spec in specs:
            write_features(writer, spec, geometry)


def alter_silently(reader: CacheReader, folder: Path, record: GeometryRecord | FeatureRecord, name: str) -> None:
    """Write one array of a committed partition anew with another value, where only the digest in its record tells.

    The checksums of zarr's codecs fit; the record has none of its own, as older ones do not.
    """
    group = groups.open_group(reader.paths, folder, record)
    arrays = {array: group.read(array) for array in record.arrays}
    raw = arrays[name].copy()
    raw.reshape(-1).view(np.uint8)[0] ^= 1
    files = groups.write_arrays(reader.paths.arrays(folder, record.partition), arrays | {name: raw})
    assert files == record.files, "the sizes alone would tell"
    write_text(reader.paths.record(folder, record.partition), replace(record, checksums={}).to_json())


class Interrupter:
    """Raises `KeyboardInterrupt` at the n-th call of any of the functions that it replaces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, places: Sequence[tuple[object, str]]) -> None:
        self.left = -1
        self._lock = threading.Lock()
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            with self._lock:
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
            return function(*arguments, **named)

        return call


def interrupted_runs(interrupter: Interrupter, run: Callable[[], object]) -> Iterator[int]:
    """Run again and again, stopped at the first call, the second, ...; yields after each, until one is not stopped."""
    for calls in range(1, 200):
        interrupter.left = calls
        try:
            run()
        except KeyboardInterrupt:
            interrupter.left = -1
            yield calls
        else:
            return
    raise AssertionError("never came to an end")


def everything(url: object) -> dict[str, NDArray]:
    """Every array that a reader of a cache can get at, by place, partition and name."""
    reader = open_cache(url)
    found = {}
    for partition, geometry in reader.geometry.items():
        records = {"geometry": (reader.paths.geometry, geometry)}
        for spec in reader.vfms.values():
            record = reader.feature_record(spec, partition)
            if record is not None:
                records[spec.key] = reader.paths.features(spec.key), record
        for place, (folder, record) in records.items():
            group = groups.open_group(reader.paths, folder, record)
            found.update({f"{place}/{partition}/{name}": group.read(name) for name in record.arrays})
    return found


def assert_same_content(a: object, b: object) -> None:
    """Two caches hold the same arrays, bit by bit, under the same records."""
    of_a, of_b = everything(a), everything(b)
    assert of_a.keys() == of_b.keys()
    for name, array in of_a.items():
        assert array.dtype == of_b[name].dtype and array.tobytes() == of_b[name].tobytes(), name
    reader_a, reader_b = open_cache(a), open_cache(b)
    assert reader_a.vfms == reader_b.vfms and reader_a.metadata == reader_b.metadata
    for partition, geometry in reader_a.geometry.items():
        other = reader_b.geometry[partition]
        assert geometry.digest == other.digest
        for name in ("samples", "arrays", "broken_views", "seconds", "calibration", "projection_version"):
            assert getattr(geometry, name) == getattr(other, name), name
        for spec in reader_a.vfms.values():
            record, copied = (r.feature_record(spec, partition) for r in (reader_a, reader_b))
            assert (record is None) == (copied is None)
            if record is not None:
                for name in ("vfm_digest", "geometry_digest", "arrays", "rows", "valid_points", "images", "seconds"):
                    assert getattr(record, name) == getattr(copied, name), name


@contextmanager
def in_memory(cache: Path) -> Iterator[str]:
    """The URL of the same cache in object storage, for as long as this lasts."""
    url = f"memory://bucket/caches/{cache.name}"
    copy(CopyRequest(source=str(cache), target=url), quiet=True)
    yield url
    forget_memory()


def forget_memory() -> None:
    """Remove all that lies in fsspec's storage in memory, which all tests of a process share."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
