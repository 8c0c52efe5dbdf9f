"""The local read-through cache: what it gives is what the object holds, and it keeps to its size."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditr_cache import block_cache, group_files
from ditr_cache.block_cache import BlockCache, local_cache, parse_bytes
from ditr_cache.errors import CorruptCacheError, UsageError
from ditr_cache.remote import RemotePath
from ditr_cache.store import CacheWriter, open_cache
from ditr_cache.verify import verify

BLOCK = 16
KEY = "0123456789abcdef"


class Source:
    """An object, and the ranges that were fetched of it."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.fetched: list[tuple[int, int]] = []

    def fetch(self, start: int, stop: int) -> bytes:
        self.fetched.append((start, stop))
        return self.content[start:stop]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", BLOCK)


def content_of(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- content --------------------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 150),
    ranges=st.lists(st.tuples(st.integers(0, 149), st.integers(0, 149)), min_size=1, max_size=8),
    limit=st.sampled_from([1, 60, 10_000]),
)
@settings(max_examples=60, deadline=None)
def test_it_gives_what_slicing_gives(
    tmp_path_factory: pytest.TempPathFactory, size: int, ranges: list[tuple[int, int]], limit: int
) -> None:
    source = Source(content_of(size))
    cache = BlockCache(tmp_path_factory.mktemp("blocks"), limit)
    for a, b in ranges:
        start, stop = sorted((min(a, size), min(b, size)))
        assert cache.read(KEY, size, start, stop, source.fetch) == source.content[start:stop]
    # Whole blocks, up to the end of the object.
    assert all(a % BLOCK == 0 and (b % BLOCK == 0 or b == size) for a, b in source.fetched)
    if limit == 10_000:
        touched = {n for a, b in source.fetched for n in range(a // BLOCK, -(-b // BLOCK))}
        assert sum(-(-b // BLOCK) - a // BLOCK for a, b in source.fetched) == len(touched)  # nothing twice


def test_a_run_of_missing_blocks_is_fetched_at_once(tmp_path: Path) -> None:
    source, cache = Source(content_of(100)), BlockCache(tmp_path, 10_000)
    cache.read(KEY, 100, 40, 41, source.fetch)
    cache.read(KEY, 100, 0, 100, source.fetch)
    assert source.fetched == [(32, 48), (0, 32), (48, 100)]
    cache.read(KEY, 100, 3, 99, source.fetch)
    assert len(source.fetched) == 3


def test_objects_are_kept_apart(tmp_path: Path) -> None:
    cache, other = BlockCache(tmp_path, 10_000), KEY.replace("f", "e")
    a, b = Source(content_of(50, 1)), Source(content_of(50, 2))
    for _ in range(2):
        assert cache.read(KEY, 50, 0, 50, a.fetch) == a.content
        assert cache.read(other, 50, 0, 50, b.fetch) == b.content
    assert len(a.fetched) == len(b.fetched) == 1
    cache.forget(KEY)
    cache.read(other, 50, 0, 50, b.fetch)
    cache.read(KEY, 50, 0, 50, a.fetch)
    assert (len(a.fetched), len(b.fetched)) == (2, 1)


@pytest.mark.parametrize("length", [0, 5, 16, 40])
def test_an_object_that_was_cut_gives_less_and_is_not_kept(tmp_path: Path, length: int) -> None:
    """Also where blocks behind the cut are there: they must not move forward."""
    source, cache = Source(content_of(100)), BlockCache(tmp_path, 10_000)
    cache.read(KEY, 100, 64, 100, source.fetch)
    whole, source.content = source.content, source.content[:length]
    got = cache.read(KEY, 100, 0, 100, source.fetch)
    assert got == whole[: len(got)] and len(got) <= length
    source.content = whole
    assert cache.read(KEY, 100, 0, 100, source.fetch) == whole


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:3], lambda b: b[:-1], lambda b: b[:4] + b"\0" + b[5:]])
def test_a_damaged_block_is_fetched_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    source, cache = Source(bytes(range(1, 101))), BlockCache(tmp_path, 10_000)
    cache.read(KEY, 100, 0, 100, source.fetch)
    block = next(tmp_path.rglob(f"{KEY}-2"))
    block.write_bytes(damage(block.read_bytes()))
    for _ in range(2):
        assert cache.read(KEY, 100, 0, 100, source.fetch) == source.content
    assert source.fetched == [(0, 100), (32, 48)]


# --- size -----------------------------------------------------------------------------------------------------------


def test_it_keeps_to_its_size_and_drops_what_was_not_used_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, now = 50 * (BLOCK + 4), 1_000_000.0
    monkeypatch.setattr(block_cache.time, "time", lambda: now)
    source, cache = Source(content_of(200 * BLOCK)), BlockCache(tmp_path, limit)
    for number in range(200):
        now += 100
        cache.read(KEY, 200 * BLOCK, number * BLOCK, number * BLOCK + 1, source.fetch)
        os.utime(tmp_path / KEY[:2] / f"{KEY}-{number}", (now, now)) if number else None
        cache.read(KEY, 200 * BLOCK, 0, 1, source.fetch)  # used again and again: stays
        assert stored_bytes(tmp_path) <= limit * 1.02 + BLOCK + 4
    assert source.fetched.count((0, BLOCK)) == 1
    kept = {int(path.name.rpartition("-")[2]) for path in tmp_path.rglob(f"{KEY}-*")}
    assert kept - {0} == set(range(200 - len(kept) + 1, 200)) and len(kept) >= 48


def _fill(folder: Path, limit: int, seed: int, failed: Any) -> None:
    source, cache = Source(content_of(60 * BLOCK)), BlockCache(folder, limit)
    rng = np.random.default_rng(seed)
    for _ in range(150):
        start, stop = np.sort(rng.integers(0, 60 * BLOCK, 2)).tolist()
        if cache.read(KEY, 60 * BLOCK, start, stop, source.fetch) != source.content[start:stop]:
            failed.set()


def test_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failed, limit = context.Event(), 30 * (BLOCK + 4)
    workers = [context.Process(target=_fill, args=(tmp_path, limit, i, failed)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert not failed.is_set()
    # A fiftieth of so little is less than a block: one for every process.
    assert stored_bytes(tmp_path) <= limit + 3 * (BLOCK + 4)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_only_costs_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source, cache = Source(content_of(100)), BlockCache(tmp_path, 10_000)
    monkeypatch.setattr(block_cache.tempfile, "mkstemp", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert cache.read(KEY, 100, 0, 100, source.fetch) == source.content
    assert len(source.fetched) == 3
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
    assert "No space left on device; reading goes on without it" in caplog.text


def test_a_folder_that_cannot_be_made_only_costs_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source, cache = Source(content_of(100)), BlockCache(tmp_path / "file" / "blocks", 10_000)
    assert cache.read(KEY, 100, 7, 70, source.fetch) == source.content[7:70]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 200 * 10**9), ("1.5 tb", 15 * 10**11), ("10m", 10**7), ("5", 5), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "many", "nan", "inf", "5GiB", "5XB", "5 G B"])
def test_sizes_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"DITR_LOCAL_CACHE_SIZE=.*expected a size, say 200GB"):
        parse_bytes(text)


def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DITR_LOCAL_CACHE", raising=False)
    assert local_cache() is None
    monkeypatch.setenv("DITR_LOCAL_CACHE", str(tmp_path))
    monkeypatch.delenv("DITR_LOCAL_CACHE_SIZE", raising=False)
    cache = local_cache()
    assert cache is not None and (cache.folder, cache.limit) == (tmp_path, 50 * 10**9)
    assert local_cache() is cache
    monkeypatch.setenv("DITR_LOCAL_CACHE_SIZE", "3MB")
    assert local_cache().limit == 3 * 10**6  # type: ignore[union-attr]


# --- under a reader -------------------------------------------------------------------------------------------------

URL = "memory://block-cache/rooms"


@pytest.fixture
def cached(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_metadata: Callable[..., Any],
    make_spec: Callable[..., Any],
    make_partition: Callable[..., dict],
) -> Any:
    """A remote cache of three rooms, read through a local one: how to read all of it, and the objects that it took."""
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setenv("DITR_LOCAL_CACHE", str(tmp_path / "blocks"))
    writer, spec = CacheWriter.create(URL, make_metadata()), make_spec(codec="int8")
    for name, points in (("a", 300), ("b", 310), ("c", 320)):
        make_partition(writer, name, [(name, points)], spec)
    fetched: list[str] = []
    read_range = RemotePath.read_range

    def counted(self: RemotePath, start: int, stop: int | None) -> bytes:
        if self.name.endswith(".zip"):
            fetched.append(self.name)
        return read_range(self, start, stop)

    monkeypatch.setattr(RemotePath, "read_range", counted)

    def read_all() -> list[np.ndarray]:
        """As a new process does."""
        monkeypatch.setattr(group_files, "_recent", group_files.Recent(group_files.RECENT_BYTES))
        fetched.clear()
        reader = open_cache(URL)
        return [reader.read(sample, spec.key).feature for sample in reader.samples]  # type: ignore[misc]

    yield read_all, fetched
    RemotePath.of("memory://block-cache").remove_tree()


def test_a_second_epoch_asks_for_no_data(cached: Any, tmp_path: Path) -> None:
    read_all, fetched = cached
    first = read_all()
    assert len(fetched) == 6
    second = read_all()
    assert fetched == []
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert stored_bytes(tmp_path / "blocks") > 0


def test_it_hides_no_damage_from_verify_and_keeps_none(cached: Any, tmp_path: Path) -> None:
    read_all, fetched = cached
    read_all()
    reader = open_cache(URL)
    pack = reader.paths.group(reader.paths.geometry, reader.geometry["b"])
    assert isinstance(pack, RemotePath)
    whole = pack.read_bytes()
    pack.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    read_all()  # from here
    assert fetched == []
    assert verify(URL).corrupt == ["geometry/b"]

    for block in (tmp_path / "blocks").rglob("*-*"):
        block.unlink()
    with pytest.raises(CorruptCacheError):
        read_all()
    pack.write_bytes(whole)
    read_all()
    assert pack.name in fetched


def test_a_size_that_cannot_be_used_is_found_at_once(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITR_LOCAL_CACHE_SIZE", "much")
    with pytest.raises(UsageError, match="DITR_LOCAL_CACHE_SIZE='much'"):
        open_cache(URL)
