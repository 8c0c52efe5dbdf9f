"""`ditr-cache copy`: the same content elsewhere, or under another codec; resumable; nothing damaged is passed on."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ditr_cache import codec_state, open_cache, store, transcode
from ditr_cache.claims import Claims, features_claim, geometry_claim
from ditr_cache.codec_state import CodecState, find_fitted
from ditr_cache.codecs import EncodedRows, make_codec
from ditr_cache.errors import MismatchError, UnknownNameError, UsageError
from ditr_cache.files import file_name
from ditr_cache.fitted_codecs import fit_codec
from ditr_cache.schema import VFMSpec
from ditr_cache.store import CacheReader, CacheWriter
from ditr_cache.transcode import CopyRequest, CopyTotals, copy, spread, training_rows
from ditr_cache.verify import verify
from small_caches import (
    ROOMS,
    Interrupter,
    alter_silently,
    assert_same_content,
    everything,
    forget_memory,
    interrupted_runs,
    rooms_and_scans,
    write_features,
)
from support import Run

PARTITIONS = (*ROOMS, "scans")


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of a cache in object storage."""
    yield "memory://bucket/caches/copy"
    forget_memory()


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VFMSpec]) -> VFMSpec:
    return make_spec()


@pytest.fixture(scope="module")
def views(make_spec: Callable[..., VFMSpec]) -> VFMSpec:
    return make_spec(name="viewed", layout="views", fuse="none", dim=7)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_metadata, make_arrays, spec: VFMSpec, views: VFMSpec) -> Path:
    """A cache of two VFMs, in both layouts; tests leave it as it is."""
    path = tmp_path_factory.mktemp("made") / "source"
    rooms_and_scans(CacheWriter.create(path, make_metadata()), make_arrays, spec, views)
    return path


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    """The same, for a test to do what it likes with."""
    return shutil.copytree(made, tmp_path / "source")


def copied(source: object, target: object, *vfms: str, codec: str | None = None) -> CopyTotals:
    request = CopyRequest(source=str(source), target=str(target), vfms=vfms, codec=codec)
    return copy(request, quiet=True)


def files_of(root: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in root.rglob("*") if p.is_file() and ".claims" not in p.parts)
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# --- as they are ----------------------------------------------------------------------------------------------------


def test_a_copy_is_the_same(source: Path, tmp_path: Path) -> None:
    before = files_of(source)
    totals = copied(source, tmp_path / "target")
    assert (totals.geometry, totals.features) == ({"copied": 4, "reused": 0}, {"copied": 8, "reused": 0})
    assert totals.failures == [] and totals.bytes > 0
    assert_same_content(source, tmp_path / "target")
    assert verify(tmp_path / "target").clean
    assert files_of(source) == before


def test_to_object_storage_and_back(source: Path, memory: str, tmp_path: Path) -> None:
    copied(source, memory)
    assert_same_content(source, memory)
    assert copied(memory, tmp_path / "back").features == {"copied": 8, "reused": 0}
    assert_same_content(source, tmp_path / "back")


def test_again_writes_nothing(source: Path, tmp_path: Path) -> None:
    copied(source, tmp_path / "target")
    before = files_of(tmp_path / "target")
    totals = copied(source, tmp_path / "target")
    assert (totals.geometry["reused"], totals.features["reused"], totals.bytes) == (4, 8, 0)
    assert files_of(tmp_path / "target") == before


def test_only_what_is_named(source: Path, tmp_path: Path, views: VFMSpec) -> None:
    assert copied(source, tmp_path / "target", "viewed").keys == {views.key: views.key}
    reader = open_cache(tmp_path / "target")
    assert list(reader.vfms) == [views.key] and sorted(reader.geometry) == sorted(PARTITIONS)
    copied(source, tmp_path / "target")
    assert_same_content(source, tmp_path / "target")


def test_a_fitted_codec_goes_along(source: Path, tmp_path: Path, spec: VFMSpec) -> None:
    copied(source, source, spec.key, codec="pca2-int8")
    copied(source, tmp_path / "target")
    assert_same_content(source, tmp_path / "target")
    key = next(k for k, s in open_cache(source).vfms.items() if s.codec == "pca2-int8")
    got, expected = (open_cache(c).read("scan-1", key).feature for c in (tmp_path / "target", source))
    np.testing.assert_array_equal(got, expected)


def test_what_the_target_has_damaged_is_made_again(source: Path, tmp_path: Path, spec: VFMSpec) -> None:
    target = tmp_path / "target"
    copied(source, target)
    store.remove_group(target / "features" / spec.key / "room-1.zarr")
    assert copied(source, target).features == {"copied": 1, "reused": 7}
    assert_same_content(source, target)


# --- under another codec --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_rows_are_encoded_again(source: Path, tmp_path: Path, spec: VFMSpec, views: VFMSpec, codec: str) -> None:
    totals = copied(source, tmp_path / "target", codec=codec)
    expected = {s.key: replace(s, codec=codec) for s in (spec, views)}
    assert totals.keys == {key: s.key for key, s in expected.items()}
    before, after = everything(source), everything(tmp_path / "target")
    for key, target in expected.items():
        for partition in PARTITIONS:
            rows = make_codec(codec, target.dim).encode(before[f"{key}/{partition}/table"].astype(np.float32))
            np.testing.assert_array_equal(after[f"{target.key}/{partition}/table"], rows.table)
            np.testing.assert_array_equal(after[f"{target.key}/{partition}/scale"], rows.scale)
            np.testing.assert_array_equal(after[f"{target.key}/{partition}/index"], before[f"{key}/{partition}/index"])
    assert verify(tmp_path / "target").clean


def test_beside_in_the_same_cache(source: Path, spec: VFMSpec, views: VFMSpec) -> None:
    before = files_of(source)
    totals = copied(source, source, codec="int8")
    assert totals.geometry == {"copied": 0, "reused": 0} and totals.features == {"copied": 8, "reused": 0}
    after = files_of(source)
    assert {name: after[name] for name in before} == before
    assert len(open_cache(source).vfms) == 4 and verify(source).clean
    assert copied(source, f"{source}/../source", codec="int8").features == {"copied": 0, "reused": 8}


def test_blocks_change_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(source, tmp_path / "whole", codec="int8")
    monkeypatch.setattr(transcode, "BLOCK_VALUES", 35)
    copied(source, tmp_path / "blocks", codec="int8")
    assert_same_content(tmp_path / "whole", tmp_path / "blocks")


def test_no_rows_at_all(tmp_path: Path, make_metadata, make_arrays, spec: VFMSpec) -> None:
    writer = CacheWriter.create(tmp_path / "source", make_metadata())
    infos, arrays = make_arrays([("unseen", 9)])
    geometry = writer.commit_geometry("unseen", infos, arrays)
    none = EncodedRows(table=np.empty((0, spec.dim), np.float16), scale=None)
    writer.commit_features(spec, geometry, none, np.full(9, -1, np.int32), images=0)
    copied(tmp_path / "source", tmp_path / "target", codec="int8")
    sample = open_cache(tmp_path / "target").read("unseen")
    assert not sample.valid.any() and sample.feature is not None and sample.feature.shape == (9, spec.dim)


def test_errors_that_add_up_are_told(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copied(source, tmp_path / "int8", "fake", codec="int8")
    assert "add up" not in caplog.text
    copied(tmp_path / "int8", tmp_path / "again", codec="float16")
    assert "rows of int8 are encoded again as float16" in caplog.text and "add up" in caplog.text
    got, first = (open_cache(tmp_path / c).read("room-1").feature for c in ("again", "int8"))
    np.testing.assert_array_equal(got, first.astype(np.float16).astype(np.float32))


# --- fitted codecs --------------------------------------------------------------------------------------------------


def decoded_rows(cache: Path, key: str, samples: list[str]) -> np.ndarray:
    reader = open_cache(cache)
    parts = [reader.read_stored(sample, key).features.decoded() for sample in samples]
    return np.concatenate(parts)


def test_a_codec_is_fitted_to_training_rows_alone(source: Path, tmp_path: Path, spec: VFMSpec) -> None:
    totals = copied(source, tmp_path / "target", spec.key, codec="pca2-int8")
    fitted = open_cache(tmp_path / "target").vfms[totals.keys[spec.key]]
    oracle = fit_codec("pca2-int8", decoded_rows(source, spec.key, [*ROOMS, "scan-0"]))
    assert fitted.codec_digest == CodecState.of(oracle).digest
    assert fitted.explained_variance == oracle.explained_variance
    with_validation = fit_codec("pca2-int8", decoded_rows(source, spec.key, [*ROOMS, "scan-0", "scan-1"]))
    assert fitted.codec_digest != CodecState.of(with_validation).digest
    for sample in ("scan-1", "room-2"):
        rows = oracle.encode(decoded_rows(source, spec.key, [sample]))
        expected = oracle.decode(rows.table, rows.scale)
        np.testing.assert_array_equal(decoded_rows(tmp_path / "target", fitted.key, [sample]), expected)


def test_without_a_training_split_all_samples_are_taken(
    tmp_path: Path, make_metadata, make_arrays, spec: VFMSpec, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CacheWriter.create(tmp_path / "source", make_metadata())
    infos, arrays = make_arrays([("a", 50), ("b", 40)])
    writer.commit_geometry("p", [replace(info, split="all") for info in infos], arrays)
    write_features(writer, spec, open_cache(tmp_path / "source").geometry["p"])
    totals = copied(tmp_path / "source", tmp_path / "source", codec="pca2-int8")
    assert "no features of a split 'train'" in caplog.text and "(all)" in caplog.text
    oracle = fit_codec("pca2-int8", decoded_rows(tmp_path / "source", spec.key, ["a", "b"]))
    assert open_cache(tmp_path / "source").vfms[totals.keys[spec.key]].codec_digest == CodecState.of(oracle).digest


def test_the_rows_of_a_fit_are_few_and_evenly_spread(
    source: Path, spec: VFMSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcode, "FIT_ROWS", 40)
    rows = training_rows(open_cache(source), spec, PARTITIONS)
    each = [decoded_rows(source, spec.key, [s]) for s in (*ROOMS, "scan-0")]
    expected = [of[[i * len(of) // 10 for i in range(10)]] for of in each]
    np.testing.assert_array_equal(rows, np.concatenate(expected))
    monkeypatch.setattr(transcode, "FIT_SAMPLES", 2)
    assert len(training_rows(open_cache(source), spec, PARTITIONS)) == 40


@pytest.mark.parametrize(("count", "most"), [(0, 5), (3, 5), (5, 5), (7, 5), (1000, 3)])
def test_spread_is_ascending_and_even(count: int, most: int) -> None:
    chosen = spread(count, most)
    assert len(chosen) == min(count, most) and (np.diff(chosen) >= 1).all()
    if len(chosen):
        assert chosen[0] == 0 and chosen[-1] < count
        assert np.ptp(np.diff([*chosen, count])) <= 1


def test_going_on_reuses_what_was_fitted(source: Path, spec: VFMSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    totals = copied(source, source, spec.key, codec="pca2-int8")
    key = totals.keys[spec.key]
    finished = everything(source)
    for partition in ("room-1", "scans"):
        (source / "features" / key / f"{partition}.json").unlink()

    def not_again(*_: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(transcode, "fit_codec", not_again)
    assert copied(source, source, spec.key, codec="pca2-int8").features == {"copied": 2, "reused": 2}
    again = everything(source)
    assert again.keys() == finished.keys() and all(np.array_equal(again[n], finished[n]) for n in finished)


def test_find_fitted(source: Path, spec: VFMSpec) -> None:
    wanted = replace(spec, codec="pca2-int8")
    writer = CacheWriter(source)
    assert find_fitted(writer.paths, wanted) is None
    key = copied(source, source, spec.key, codec="pca2-int8").keys[spec.key]
    found = find_fitted(writer.paths, wanted)
    assert found is not None and found.key == key
    for other in (replace(wanted, codec="pca3-int8"), replace(wanted, fuse="last"), replace(wanted, name="x"), spec):
        assert find_fitted(writer.paths, other) is None
    second = fit_codec("pca2-int8", np.random.default_rng(0).normal(size=(40, spec.dim)))
    writer.create_codec(replace(wanted, codec_digest=CodecState.of(second).digest), second)
    with pytest.raises(UsageError, match="ditr-cache rm"):
        find_fitted(writer.paths, wanted)


# --- stopped, and going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, "pca2-int8"])
def test_stopped_at_any_write_the_same_command_goes_on(
    tmp_path: Path, make_metadata, make_arrays, spec: VFMSpec, monkeypatch: pytest.MonkeyPatch, codec: str | None
) -> None:
    source, clean = tmp_path / "source", tmp_path / "clean"
    writer = CacheWriter.create(source, make_metadata())
    for partition, samples in (("room", [("room", 30)]), ("scans", [("scan-0", 20), ("scan-1", 25)])):
        write_features(writer, spec, writer.commit_geometry(partition, *make_arrays(samples)))
    copied(source, clean, codec=codec)
    places = [(store, "write_text"), (store, "write_group"), (codec_state, "write_text")]
    interrupter = Interrupter(monkeypatch, places)
    targets = (tmp_path / f"target-{i}" for i in itertools.count())
    target = next(targets)

    def run() -> None:
        copied(source, target, codec=codec)

    stops = 0
    for _ in interrupted_runs(interrupter, run):
        if (target / "cache.json").exists():
            reader = open_cache(target)
            for key in reader.vfms:
                for sample in reader.samples_with(key):
                    assert np.isfinite(reader.read(sample, key).feature).all()
            assert verify(target).clean
        run()
        assert_same_content(clean, target)
        target = next(targets)
        stops += 1
    assert stops == 1 + 2 * 4 + 1 + (codec is not None)


def test_what_another_run_is_making_is_waited_for(
    source: Path, tmp_path: Path, spec: VFMSpec, make_metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    writer = CacheWriter.create(target, make_metadata())
    other = Claims(writer.paths, "another run")
    names = [geometry_claim("room-0"), features_claim(spec.key, "room-2")]
    assert all(other.take(name) for name in names)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(sorted(open_cache(target).geometry))
        other.release(names.pop())

    monkeypatch.setattr(transcode, "time", SimpleNamespace(sleep=sleep, perf_counter=time.perf_counter))
    totals = copied(source, target)
    assert len(slept) == 2 and "room-0" not in slept[0]
    assert totals.features == {"copied": 8, "reused": 0} and totals.geometry == {"copied": 4, "reused": 0}
    assert_same_content(source, target)


# --- damaged sources ------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_silent_flip_is_not_laundered(source: Path, tmp_path: Path, spec: VFMSpec, views: VFMSpec) -> None:
    """The bytes were altered under checksums that fit: only what the record says tells."""
    reader = open_cache(source)
    alter_silently(reader, reader.paths.features(spec.key), reader.feature_record(spec, "room-1"), "table")
    alter_silently(reader, reader.paths.geometry, reader.geometry["scans"], "normal")
    for codec in (None, "int8"):
        target = tmp_path / f"target-{codec}"
        totals = copied(source, target, codec=codec)
        assert [entry for entry, _ in totals.failures] == [f"features/{spec.key}/room-1", "geometry/scans"]
        assert all("not what was committed" in reason for _, reason in totals.failures)
        got = open_cache(target)
        assert sorted(got.geometry) == sorted(ROOMS) and verify(target).clean
        assert got.samples_with(totals.keys[spec.key]) == ["room-0", "room-2"]
        assert got.samples_with(totals.keys[views.key]) == list(ROOMS)


@pytest.mark.parametrize(
    ("damage", "damaged", "entry"),
    [
        (flip, "geometry/room-1.json", "geometry/room-1"),
        (flip, "geometry/room-1.zarr", "geometry/room-1"),
        (Path.unlink, "geometry/room-1.zarr", "geometry/room-1"),
        (flip, "features/{key}/room-1.json", "features/{key}/room-1"),
        (flip, "features/{key}/room-1.zarr", "features/{key}/room-1"),
        (Path.unlink, "features/{key}/room-1.zarr", "features/{key}/room-1"),
        (flip, "features/{key}/vfm.json", "features/{key}/vfm.json"),
    ],
)
def test_what_is_damaged_is_left_out_and_reported(
    run: Run, source: Path, tmp_path: Path, spec: VFMSpec, views: VFMSpec, damage: Callable, damaged: str, entry: str
) -> None:
    path = source / damaged.format(key=spec.key)
    damage(largest(path) if path.is_dir() else path)
    outcome = run("copy", source, tmp_path / "target", "--json")
    assert outcome.code == 1
    failures = {f["entry"]: f["error"] for f in outcome.json["failures"]}
    assert entry.format(key=spec.key) in failures
    reader = open_cache(tmp_path / "target")
    assert verify(tmp_path / "target").clean
    assert {"room-0", "room-2", "scan-0", "scan-1"} <= set(reader.samples_with(views.key))
    assert ("room-1" in reader.samples) == damaged.startswith("features")
    if "vfm.json" not in damaged:
        assert reader.samples_with(spec.key) == ["room-0", "room-2", "scan-0", "scan-1"]


def test_features_of_a_codec_that_is_damaged_are_left_out(source: Path, tmp_path: Path, spec: VFMSpec, views) -> None:
    key = copied(source, source, spec.key, codec="pca2-int8").keys[spec.key]
    flip(source / "features" / key / "codec.json")
    totals = copied(source, tmp_path / "target")
    assert [entry for entry, _ in totals.failures] == [f"features/{key}/codec.json"]
    assert sorted(open_cache(tmp_path / "target").vfms) == sorted([spec.key, views.key])


def test_features_of_another_geometry_are_left_out(source: Path, tmp_path: Path, make_arrays, spec: VFMSpec) -> None:
    infos, arrays = make_arrays([("room-1", 44)], seed=9)
    CacheWriter(source).commit_geometry("room-1", infos, arrays)
    totals = copied(source, tmp_path / "target", spec.key)
    assert [entry for entry, _ in totals.failures] == [f"features/{spec.key}/room-1"]
    assert open_cache(tmp_path / "target").sample_info("room-1").points == 44
    # The target now has this geometry; that of an older copy of the source is refused.
    infos, arrays = make_arrays([("room-1", 45)], seed=9)
    CacheWriter(source).commit_geometry("room-1", infos, arrays)
    totals = copied(source, tmp_path / "target", spec.key)
    reasons = dict(totals.failures)
    assert "another geometry" in reasons["geometry/room-1"]
    assert open_cache(tmp_path / "target").sample_info("room-1").points == 44


# --- wrong use ------------------------------------------------------------------------------------------------------


def test_wrong_use_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, make_metadata, spec: VFMSpec, views: VFMSpec
) -> None:
    before, target = files_of(source), tmp_path / "target"
    with pytest.raises(UsageError, match="same cache"):
        copied(source, source)
    with pytest.raises(UnknownNameError, match="did you mean 'int8'"):
        copied(source, target, codec="int9")
    with pytest.raises(UnknownNameError, match=r"unknown VFM.*did you mean 'fake'"):
        copied(source, target, "fakes")
    with pytest.raises(UsageError, match="not float16 already"):
        copied(source, source, codec="float16")
    CacheWriter.create(tmp_path / "empty", make_metadata())
    with pytest.raises(UsageError, match="no features"):
        copied(tmp_path / "empty", target, codec="int8")
    assert not target.exists() and files_of(source) == before
    CacheWriter.create(target, make_metadata(class_names=("a", "b")))
    with pytest.raises(MismatchError, match="class_names"):
        copied(source, target)


def test_two_that_would_become_one_are_refused(source: Path, tmp_path: Path, spec: VFMSpec) -> None:
    copied(source, source, spec.key, codec="int8")
    with pytest.raises(UsageError, match=r"same store under pca2-int8.*--vfm"):
        copied(source, tmp_path / "target", codec="pca2-int8")
    assert copied(source, tmp_path / "target", spec.key, codec="pca2-int8").failures == []


def test_the_command(run: Run, source: Path, tmp_path: Path, spec: VFMSpec, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "target"
    outcome = run("copy", source, target, "--vfm", spec.key, "--codec", "int8", "--json")
    assert outcome.code == 0 and outcome.err == ""
    assert set(outcome.json) == {"vfms", "geometry", "features", "bytes", "seconds", "failures"}
    assert outcome.json["vfms"][spec.key] in open_cache(target).vfms and outcome.json["failures"] == []
    outcome = run("copy", source, target)
    assert outcome.code == 0 and "geometry: 0 copied, 4 already there; features: 8 copied" in outcome.out
    assert "ETA 0 s" in outcome.err and "/s" in outcome.err
    assert run("copy", source, source).code == 2
    assert run("copy", tmp_path / "nothing", target).code == 2
    caplog.set_level(logging.CRITICAL)
    flip(largest(source / "features" / spec.key / "room-1.zarr"))
    outcome = run("copy", source, tmp_path / "other")
    assert outcome.code == 1
    assert f"skipped features/{spec.key}/room-1: " in outcome.err and "ditr-cache verify" in outcome.err


def test_a_record_is_committed_last(source: Path, tmp_path: Path, spec: VFMSpec) -> None:
    """What is copied has records of its own, with sizes of its own files."""
    target = tmp_path / "target"
    copied(source, target)
    for record in (target / "features" / file_name(spec.key)).glob("room-*.json"):
        files = json.loads(record.read_text())["files"]
        assert all((record.with_suffix(".zarr") / name).stat().st_size == size for name, size in files.items())


def test_a_reader_of_the_source_may_be_open(source: Path, tmp_path: Path) -> None:
    reader = CacheReader(source)
    copied(source, source, codec="int8")
    assert reader.read("room-0", "fake").feature is not None
