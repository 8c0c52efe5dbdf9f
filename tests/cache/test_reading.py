"""Rows of arrays are read from the chunks that hold them, fast, and without anything left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ditr_cache import arrays as array_files
from ditr_cache import open_cache
from ditr_cache.arrays import ArrayGroup, array_infos, array_sums, fill_group
from ditr_cache.chunks import FolderFiles, LocalFile
from ditr_cache.errors import CorruptCacheError, UsageError
from ditr_cache.schema import VFMSpec
from ditr_cache.store import CacheWriter

PIPELINES = ["zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs.ZarrsCodecPipeline"]
ROWS, CHUNK_ROWS = 1000, 32


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_files, "CHUNK_BYTES", 1 << 9)
    monkeypatch.setattr(array_files, "SHARD_BYTES", 1 << 12)


@pytest.fixture(params=PIPELINES)
def pipeline(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a user of this process has set for zarr."""
    if request.param.startswith("zarrs"):
        pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": request.param}):
        yield request.param


def contents(seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of every codec: noise, repeated rows, zeros; rows of 16 bytes, and one number a row."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-127, 128, (ROWS, 16)).astype(np.int8)
    noise[400:600] = noise[400]
    noise[700:800] = 0
    return {
        "table": noise,
        "scale": rng.random(ROWS).astype(np.float32),
        "index": np.arange(ROWS, dtype=np.int32),
        "coord": rng.normal(size=(ROWS, 3)).astype(np.float32),
    }


def group_of(folder: Path, arrays: dict[str, np.ndarray], *, sums: bool = True) -> ArrayGroup:
    folder.mkdir()
    fill_group(folder, arrays)
    return ArrayGroup(str(folder), array_infos(arrays), sums=array_sums(arrays) if sums else None)


# --- the right rows -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups() -> Iterator[tuple[dict[str, np.ndarray], list[ArrayGroup]]]:
    arrays = contents()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_files, "CHUNK_BYTES", 1 << 9)
        patch.setattr(array_files, "SHARD_BYTES", 1 << 12)
        yield arrays, [group_of(Path(folder) / str(sums), arrays, sums=sums) for sums in (True, False)]


SUBSETS = st.one_of(
    st.sets(st.integers(0, ROWS - 1)).map(sorted),
    st.tuples(st.integers(0, ROWS), st.integers(0, ROWS), st.integers(1, 40)).map(lambda r: list(range(*r))),
)


@given(st.sampled_from(["table", "scale", "index", "coord"]), SUBSETS, st.sampled_from([np.int64, np.int32, np.uint32]))
def test_rows_are_those_of_fancy_indexing(groups, name, rows, dtype):
    arrays, stored = groups
    wanted = np.array(rows, dtype=dtype)
    for group in stored:
        got = group.read_rows(name, wanted)
        assert got.dtype == arrays[name].dtype and np.array_equal(got, arrays[name][wanted])


@given(st.sampled_from(["table", "scale", "index", "coord"]), st.integers(0, ROWS), st.integers(0, ROWS))
def test_slices_are_those_of_numpy(groups, name, start, stop):
    arrays, stored = groups
    for group in stored:
        assert np.array_equal(group.read(name, slice(start, stop)), arrays[name][start:stop])


@settings(max_examples=30)
@given(
    st.integers(1, 200),
    st.sampled_from([(), (1,), (7,), (2, 3)]),
    st.sampled_from(["<f2", "<f4", "|u1", "|i1", "<i4", "<u4", "<i8"]),
    st.sampled_from(["table", "other"]),
    st.integers(0, 2**32 - 1),
)
def test_zarr_reads_the_same(rows, width, dtype, name, seed):
    rng = np.random.default_rng(seed)
    array = (rng.random((rows, *width)) * 100).astype(dtype)
    array[rng.random(rows) < 0.5] = 0
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_files, "CHUNK_BYTES", 1 << 7)
        patch.setattr(array_files, "SHARD_BYTES", 1 << 9)
        group = group_of(Path(folder) / "group", {name: array})
        oracle = zarr.open_array(f"{folder}/group/{name}", mode="r")[...]
        assert np.array_equal(oracle, array) and group.read(name).tobytes() == array.tobytes()


@pytest.mark.parametrize("rows", [[3, 2], [2, 2], [0, 5, 5]])
def test_rows_ascend(tmp_path, rows):
    group = group_of(tmp_path / "group", contents())
    with pytest.raises(UsageError, match="table: expected the positions of rows to ascend"):
        group.read_rows("table", np.array(rows))


@pytest.mark.parametrize("rows", [[-1, 5], [5, ROWS]])
def test_rows_that_are_not_there(tmp_path, rows):
    group = group_of(tmp_path / "group", contents())
    with pytest.raises(CorruptCacheError, match=rf"table: cannot be decoded \(IndexError: rows .* of {ROWS}"):
        group.read_rows("table", np.array(rows))


# --- from few bytes -------------------------------------------------------------------------------------------------


def test_only_chunks_that_hold_a_row_are_read(tmp_path, small_chunks, monkeypatch):
    # Noise is stored as it is; of 32 chunks the last is full.
    array = np.random.default_rng(0).integers(-127, 128, (32 * CHUNK_ROWS, 16)).astype(np.int8)
    group = group_of(tmp_path / "group", {"table": array})
    group.read("table", slice(0, 1))  # its metadata is remembered
    parts: list[int] = []
    into, read = LocalFile.read_into, LocalFile.read

    def noting_into(file: LocalFile, start: int, places: Any) -> None:
        parts.append(start)
        into(file, start, places)

    def noting(file: LocalFile, start: int, stop: int) -> bytes:
        assert stop - start == 16 * 8 + 4, "the index of a shard of 8 chunks, nothing else"
        return read(file, start, stop)

    monkeypatch.setattr(LocalFile, "read_into", noting_into)
    monkeypatch.setattr(LocalFile, "read", noting)
    for rows, chunks in (
        ([0], 1),
        ([31, 32], 2),
        ([5, 6, 7, 300, 900], 3),
        (range(64, 128), 2),
        (range(len(array)), 32),
    ):
        parts.clear()
        assert np.array_equal(group.read_rows("table", np.array(rows)), array[rows])
        assert len(parts) == chunks, f"{rows} are in {chunks} chunks of {CHUNK_ROWS}"


def test_a_crop_reads_its_share_of_the_bytes(tmp_path, small_chunks):
    array = np.random.default_rng(0).integers(-127, 128, (50 * ROWS, 16)).astype(np.int8)
    group = group_of(tmp_path / "group", {"table": array})

    def taken(rows: np.ndarray) -> int:
        def counter() -> int:
            return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])

        group.read("table", slice(0, 1))
        before = counter()
        group.read_rows("table", rows)
        return counter() - before

    assert taken(np.arange(10_000, 20_000)) < 0.25 * taken(np.arange(len(array)))


# --- whatever was set or done before --------------------------------------------------------------------------------


def test_what_is_set_for_zarr_changes_nothing(tmp_path, small_chunks, pipeline):
    """Neither what is written nor how it is read."""
    arrays = contents()
    group = group_of(tmp_path / "group", arrays)
    for name, array in arrays.items():
        assert np.array_equal(group.read(name), array), pipeline
        assert np.array_equal(zarr.open_array(tmp_path / "group" / name, mode="r")[...], array)


@pytest.mark.parametrize("sums", [True, False])
def test_a_flipped_byte_anywhere_in_a_chunk_is_found(tmp_path, small_chunks, pipeline, sums):
    arrays = {name: array[:CHUNK_ROWS] for name, array in contents().items()}
    arrays["table"] = np.concatenate([arrays["table"], np.ones((CHUNK_ROWS, 16), np.int8)])  # plain, and compressed
    group = group_of(tmp_path / "group", arrays, sums=sums)
    missed = []
    for name, array in arrays.items():
        for file in (p for p in (tmp_path / "group" / name / "c").rglob("*") if p.is_file()):
            good = file.read_bytes()
            # Headers, checksums and indices as a whole, and some of what is between.
            for at in sorted(
                {*range(40), *range(40, len(good) - 90, 11), *range(max(0, len(good) - 90), len(good))}
                & {*range(len(good))}
            ):
                file.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
                try:
                    if not np.array_equal(group.read(name), array):
                        missed.append((name, at))
                except CorruptCacheError:
                    continue
            file.write_bytes(good)
        assert np.array_equal(group.read(name), array)
    assert missed == []


def test_a_chunk_that_announces_more_than_its_place_is_refused(tmp_path, pipeline):
    """Decoders that believe it, zarr's own and that of zarrs, make room for 64 MiB first."""
    zeros = np.zeros(1 << 10, np.int8)
    group = group_of(tmp_path / "group", {"coord": zeros + np.int8(1)}, sums=False)
    bomb = zarr.codecs.ZstdCodec(level=1, checksum=True)._zstd_codec.encode(np.zeros(1 << 26, np.int8))
    file = next(p for p in (tmp_path / "group" / "coord" / "c").rglob("*") if p.is_file())
    file.write_bytes(bytes(np.frombuffer(bomb, np.uint8)))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCacheError, match="coord"):
            group.read("coord")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def _read_in_a_fork(folder: str, arrays: dict[str, np.ndarray], found: Any) -> None:
    group = ArrayGroup(folder, array_infos(arrays))
    same = all(np.array_equal(group.read(name), array) for name, array in arrays.items())
    found.put((same, len(list(Path("/proc/self/task").iterdir()))))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_that_has_read_may_fork(tmp_path):
    """Loader workers are forks: they read on, each in a single thread."""
    arrays = contents()
    group = group_of(tmp_path / "group", arrays)
    for name in arrays:
        group.read(name)
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    worker = context.Process(target=_read_in_a_fork, args=(group.where, arrays, found))
    worker.start()
    worker.join(60)
    if worker.exitcode is None:
        worker.kill()
        worker.join()
    assert worker.exitcode == 0 and found.get() == (True, 1)


# --- nothing left behind --------------------------------------------------------------------------------------------


def test_reading_again_and_again_takes_nothing(
    writer: CacheWriter, make_partition: Callable[..., Any], make_spec: Callable[..., VFMSpec]
) -> None:
    spec = make_spec(codec="int8", dim=16)
    for number in range(3):
        make_partition(writer, f"scene-{number}", [(f"scene-{number}", 300)], spec)
    reader = open_cache(writer.paths.root)

    def read(times: int) -> None:
        for i in range(times):
            features = reader.read_stored(f"scene-{i % 3}", spec.key).features
            assert features is not None
            features.take(np.arange(0, features.rows, 2))

    read(20)
    before = open_files()
    read(500)
    assert open_files() == before
    tracemalloc.start()
    try:
        read(20)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        read(100)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - held < 20_000, "200 bytes a read, where each reads some 10 kB"
    finally:
        tracemalloc.stop()


def open_files() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_no_file_stays_open_after_an_error(tmp_path):
    files = FolderFiles(tmp_path)
    (tmp_path / "file").write_bytes(b"12345678")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = open_files()
    with pytest.raises(EOFError, match="expected 9 bytes at 1, got 7"), files.opened("file") as file:
        assert file is not None
        file.read(1, 10)
    with pytest.raises(EOFError, match="expected 9 bytes"), files.opened("file") as file:
        assert file is not None
        file.read_into(1, [np.empty(9, np.uint8)])
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match=f"{name} is not a regular file"), files.opened(name):
            pass
    with files.opened("nothing") as file:
        assert file is None
    assert open_files() == before
