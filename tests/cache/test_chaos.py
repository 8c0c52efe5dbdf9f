"""Faults of every kind, a few of each; `make chaos` injects thousands. And that the suite can fail."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ditr_cache import open_cache, store
from ditr_cache.arrays import array_sums
from ditr_cache.checksums import block_sums, check_blocks
from ditr_cache.errors import CorruptCacheError, MismatchError
from ditr_cache.files import remove_leftovers
from ditr_cache.store import CacheWriter
from ditr_cache.verify import verify

SUITE = Path(__file__).parents[1] / "chaos" / "run.py"


def test_a_few_faults_of_each_kind() -> None:
    command = [sys.executable, str(SUITE), "--short", "--kills", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("5 of them kills; 0 silent corruptions"), done.stdout
    faults = [line.partition("  ")[0] for line in lines[1:-1]]
    for name in ("kill, one process", "ENOSPC", "EIO at call n of a reader", "torn", "two writers", "clock jumps"):
        assert any(fault.startswith(name) for fault in faults), done.stdout


# --- what the suite found -------------------------------------------------------------------------------------------


def test_exchanged_files_of_the_same_size_are_refused(writer: CacheWriter, make_arrays, make_spec) -> None:
    """Each is whole, and its own checksums fit."""
    for partition, seed in (("a", 1), ("b", 2)):
        infos, arrays = make_arrays([(partition, 30)], seed)
        kept = {name: arrays[name] for name in ("coord", "source_index", "link_point")}
        record = writer.commit_geometry(partition, infos, kept)
        assert record.checksums == array_sums(kept)
    first, second = (writer.paths.geometry / f"{p}.zarr" / "coord/c/0/0" for p in "ab")
    contents = first.read_bytes(), second.read_bytes()
    assert len(contents[0]) == len(contents[1])
    first.write_bytes(contents[1])
    with pytest.raises(CorruptCacheError, match=r"coord: rows 0 to 29 are whole, but not what was committed"):
        open_cache(writer.paths.root).read("a")
    assert verify(writer.paths.root).corrupt == ["geometry/a"]


def test_a_file_that_goes_away_under_a_reader_is_no_zeros(writer: CacheWriter, make_partition, monkeypatch) -> None:
    make_partition(writer, "scene", [("scene", 30)])
    chunk = writer.paths.geometry / "scene.zarr/coord/c/0/0"
    monkeypatch.setattr(store, "check_files", lambda *_: chunk.unlink(missing_ok=True))
    with pytest.raises(CorruptCacheError, match=r"coord.*expected CRC-32C"):
        open_cache(writer.paths.root).read("scene")


def test_a_record_under_another_name_is_no_commit(writer: CacheWriter, make_partition, make_spec) -> None:
    spec = make_spec()
    for partition in ("a", "b"):
        make_partition(writer, partition, [(partition, 20)], spec)
    for folder in (writer.paths.geometry, writer.paths.features(spec.key)):
        (folder / "b.json").write_bytes((folder / "a.json").read_bytes())
    assert open_cache(writer.paths.root).samples == ["a"]
    assert writer.geometry("b") is None and writer.features(spec, "b") is None
    assert verify(writer.paths.root).mismatched == ["geometry/b", f"features/{spec.key}/b"]


def test_features_under_another_name_are_refused_too(writer: CacheWriter, make_partition, make_spec) -> None:
    spec = make_spec()
    make_partition(writer, "a", [("a", 20)], spec)
    folder = writer.paths.features(spec.key)
    (folder / "b.json").write_bytes((folder / "a.json").read_bytes())
    assert verify(writer.paths.root).mismatched == [f"features/{spec.key}/b"]
    with pytest.raises(MismatchError):
        store.read_record(folder / "b.json", store.FeatureRecord)


def test_a_disk_that_fails_at_the_document_of_a_group(writer: CacheWriter, make_partition, monkeypatch) -> None:
    """Only other readers need it, and `verify` looks at it."""
    make_partition(writer, "scene", [("scene", 30)])

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("ditr_cache.chunks.LocalFile.read", fails)
    report = verify(writer.paths.root)
    assert "zarr.json: cannot be decoded" in report.reasons["geometry/scene"]


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_leftovers_are_judged_by_no_clock_of_this_host(writer: CacheWriter, jump: float, monkeypatch) -> None:
    """This process lives, and the other host's file was written just now, as the file system dates files."""
    import time

    now = time.time()
    left = [writer.paths.root / f"{store.temporary_prefix()}x.tmp", writer.paths.root / ".elsewhere+1+x.tmp"]
    for path in left:
        path.write_text("half")
    monkeypatch.setattr(time, "time", lambda: now + jump)
    assert remove_leftovers(writer.paths.root) == 0 and all(path.exists() for path in left)


def test_a_process_of_the_same_number_is_another_one(writer: CacheWriter) -> None:
    host, process, _ = store.temporary_prefix().split("+")
    pid, _, started = process.partition(".")
    left = writer.paths.root / f"{host}+{pid}.{int(started) - 1}+x.tmp"
    left.write_text("half")
    assert remove_leftovers(writer.paths.root) == 1


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_each_block_has_its_checksum(rows: int) -> None:
    array = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    sums = block_sums(array, rows)
    assert len(sums) == 8 * -(-20 // rows)
    check_blocks(array, 0, rows, sums, "x")
    for row in range(20):
        altered = array.copy()
        altered.view(np.uint8)[row, 0] ^= 1
        with pytest.raises(CorruptCacheError, match=rf"x: rows {row // rows * rows} to "):
            check_blocks(altered, 0, rows, sums, "x")
    with pytest.raises(CorruptCacheError, match="expected CRC-32C none"):
        check_blocks(array, 1, 20, block_sums(array, 20), "x")


@pytest.mark.parametrize("content", [b"", b"\0" * 66, b"[]", b'{"zarr_format": 3, "node_type": "array"}'])
def test_a_damaged_group_document_is_found(writer: CacheWriter, make_partition, content: bytes) -> None:
    """Readers of this package do without it, other readers of zarr do not."""
    make_partition(writer, "a", [("a", 20)])
    path = writer.paths.geometry / "a.zarr/zarr.json"
    path.write_bytes(content.ljust(path.stat().st_size))
    assert verify(writer.paths.root).corrupt == ["geometry/a"]
