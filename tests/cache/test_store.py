import contextlib
import errno
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditr_cache import arrays as array_files
from ditr_cache import files, groups, open_cache, store
from ditr_cache.arrays import array_digest, array_infos
from ditr_cache.errors import (
    CorruptCacheError,
    DataError,
    FormatVersionError,
    MismatchError,
    MissingDataError,
    StorageError,
    UnknownNameError,
    UsageError,
)
from ditr_cache.files import file_name, location, remove_leftovers
from ditr_cache.store import CacheReader, CacheWriter
from ditr_cache.verify import verify
from plain_rows import decode, encode
from support import read_array

POINT_ARRAYS = ("coord", "color", "strength", "segment", "instance")


def files_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file())


def assert_reads(reader: CacheReader, sample: str, written: dict, rows: slice = slice(None), key: str | None = None):
    got = reader.read(sample, key)
    for name in POINT_ARRAYS:
        array = getattr(got, name)
        assert array.dtype == written[name].dtype and np.array_equal(array, written[name][rows])
    assert got.normal.dtype == np.float32 and np.array_equal(got.normal, written["normal"][rows].astype(np.float32))
    assert got.source_index.dtype == np.int64 and np.array_equal(got.source_index, written["source_index"][rows])
    counts = np.bincount(written["link_point"], minlength=len(written["coord"]))[rows]
    assert np.array_equal(got.link_count, counts)
    if key is not None:
        features, index = written[key]
        spec = reader.vfms[key]
        every = np.zeros((len(index), spec.dim), np.float32)
        every[index >= 0] = decode(**vars(encode(features, spec.codec)))[index[index >= 0]]
        assert np.array_equal(got.feature, every[rows]) and np.array_equal(got.valid, (index >= 0)[rows])


# --- arrays ---------------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from(["<f2", "<f4", "|u1", "|i1", "<i2", "<i4", "<u4", "<i8", "<u2"])


SHAPES = st.tuples(st.integers(0, 70)) | st.tuples(st.integers(0, 70), st.integers(1, 9))


@settings(max_examples=25)
@given(DTYPES.flatmap(lambda d: hnp.arrays(d, SHAPES)))
def test_arrays_round_trip_bit_by_bit(array):
    with tempfile.TemporaryDirectory() as folder:
        groups.write_arrays(Path(folder) / "a.zarr", {"x": array})
        back = read_array(Path(folder) / "a.zarr", "x", array_infos({"x": array})["x"])
    assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes()


def test_arrays_of_many_chunks_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(array_files, "SHARD_BYTES", 1 << 13)
    array = np.random.default_rng(0).normal(size=(5000, 7)).astype(np.float32)
    array[1000:3000] = 0
    files = groups.write_arrays(tmp_path / "a.zarr", {"x": array})
    info = array_infos({"x": array})["x"]
    assert np.array_equal(read_array(tmp_path / "a.zarr", "x", info), array)
    assert np.array_equal(read_array(tmp_path / "a.zarr", "x", info, slice(999, 1024)), array[999:1024])
    assert 5 < len(files) < 40


def test_one_file_per_array_where_it_fits(writer, make_partition):
    make_partition(writer, "scene", [("scene", 3000)])
    assert len([p for p in files_of(writer.paths.geometry) if p.name not in ("zarr.json", "scene.json")]) == 11


def test_digests_tell_dtype_shape_and_content_apart():
    base = np.arange(12, dtype=np.int32)
    others = [base.reshape(3, 4), base.astype(np.uint32), base[::-1], base.astype(np.int64), base[:0]]
    assert len({array_digest(a) for a in [base, *others]}) == 6
    assert array_digest(base.reshape(3, 4).T) == array_digest(base.reshape(3, 4).T.copy())


# --- partitions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_a_sample_comes_back(writer, make_partition, make_spec, codec):
    spec = make_spec(codec=codec)
    written = make_partition(writer, "scene", [("scene", 200)], spec)
    reader = open_cache(writer.paths.root)
    assert reader.samples == ["scene"] == reader.split_ids("train") == reader.samples_with("fake")
    assert reader.metadata == writer.metadata and reader.vfms == {spec.key: spec}
    assert_reads(reader, "scene", written, key=spec.key)
    stored = reader.read_stored("scene", None)
    assert stored.features is None and np.array_equal(stored.coord, written["coord"])
    features = reader.read_stored("scene", "fake").features
    assert features.table.dtype == np.dtype(codec) and (features.scale is None) == (codec == "float16")
    assert features.spec == spec and features.index.dtype == np.int32


def test_a_sample_is_a_mapping(writer, make_partition, make_spec):
    make_partition(writer, "scene", [("scene", 20)], make_spec())
    sample = open_cache(writer.paths.root).read("scene")
    data = dict(sample)
    assert {"coord", "color", "normal", "segment", "feature", "valid", "source_index"} <= data.keys()
    assert data["feature"].shape == (20, 5) and "nothing" not in sample
    with pytest.raises(KeyError):
        sample["nothing"]


def test_several_samples_in_a_partition(writer, make_partition, make_spec):
    sizes = [("a", 30), ("b", 1), ("c", 57), ("d", 12)]
    specs = make_spec(), make_spec(codec="int8", dim=3)
    written = make_partition(writer, "scans-0", sizes, *specs)
    reader = open_cache(writer.paths.root)
    assert reader.samples == ["a", "b", "c", "d"] and reader.splits == ["train", "val"]
    assert reader.split_ids("val") == ["b", "d"]
    start = 0
    for name, points in sizes:
        rows = slice(start, start + points)
        for spec in specs:
            assert_reads(reader, name, written, rows, spec.key)
            features = reader.read_stored(name, spec.key).features
            used = features.index[features.index >= 0]
            assert len(features.table) == (used.max() + 1 if len(used) else 0)  # only the sample's own rows are read
        start += points


def test_a_sample_of_a_partition_without_features(writer, make_arrays, make_spec):
    """Every point of the second sample is invisible: it has no rows at all."""
    spec = make_spec()
    infos, arrays = make_arrays([("a", 10), ("b", 5)])
    record = writer.commit_geometry("p", infos, arrays)
    index = np.r_[np.arange(10), np.full(5, -1)].astype(np.int32)
    features = writer.commit_features(spec, record, encode(np.ones((10, 5)), "float16"), index, images=2)
    assert features.valid_points == (10, 0) and features.rows == 10
    sample = open_cache(writer.paths.root).read("b")
    assert not sample.valid.any() and sample.feature.shape == (5, 5) and not sample.feature.any()


def test_optional_arrays_may_be_absent(writer, make_arrays):
    infos, arrays = make_arrays([("s", 9)])
    for name in store.OPTIONAL_POINT_ARRAYS:
        del arrays[name]
    writer.commit_geometry("s", infos, arrays)
    sample = open_cache(writer.paths.root).read("s")
    assert all(sample[name] is None for name in (*store.OPTIONAL_POINT_ARRAYS, "feature"))
    assert not sample.valid.any() and sample.valid.shape == (9,)


def test_two_vfms_beside_each_other(writer, make_partition, make_spec):
    specs = make_spec(), make_spec(name="other", dim=3), make_spec(name="other", dim=3, codec="int8")
    written = make_partition(writer, "scene", [("scene", 60)], *specs)
    reader = open_cache(writer.paths.root)
    for spec in specs:
        assert_reads(reader, "scene", written, key=spec.key)
    assert reader.resolve_vfm("fake") == specs[0]
    with pytest.raises(UsageError, match="several VFMs, name one by its key"):
        reader.resolve_vfm()
    with pytest.raises(UsageError, match="several VFMs named 'other'"):
        reader.read("scene", "other")
    with pytest.raises(UnknownNameError, match="did you mean 'other'"):
        reader.resolve_vfm("othr")


def test_features_of_some_samples_only(writer, make_partition, make_spec):
    make_partition(writer, "one", [("one", 20)], make_spec())
    make_partition(writer, "two", [("two", 20)])
    reader = open_cache(writer.paths.root)
    assert reader.samples == ["one", "two"] and reader.samples_with() == ["one"]
    with pytest.raises(MissingDataError, match=r"'two' has no features of 'fake-.*extract --vfm fake"):
        reader.read("two", "fake")


def test_names_that_are_not_there(writer, make_partition):
    make_partition(writer, "scene0000_00", [("scene0000_00", 5)])
    reader = open_cache(writer.paths.root)
    with pytest.raises(UnknownNameError, match="did you mean 'scene0000_00'"):
        reader.read("scene0000_01")
    with pytest.raises(UnknownNameError, match=r"split .* 'tran': did you mean 'train'"):
        reader.split_ids("tran")
    with pytest.raises(UsageError, match="holds no features yet"):
        reader.resolve_vfm()


ODD = [
    "a/b", "..", ".", "vfm", "ü", "a b", "%2E", "%", ".hidden", "a\\b", "a:b", "x" * 300, "x" * 299 + "y", "CON",
    "日本", "a.json", "a.zarr", "~", "a\nb", "🙂" * 60,
]  # fmt: skip


@pytest.mark.parametrize("label", [2, -2, 300])
def test_labels_beyond_the_classes_are_refused(writer, make_arrays, label):
    infos, arrays = make_arrays([("scene", 9)])
    arrays["segment"][4] = label
    with pytest.raises(DataError, match=rf"labels 0 to 1 of the dataset's 2 classes, or -1 .*for example {label}"):
        writer.commit_geometry("scene", infos, arrays)
    assert writer.geometry("scene") is None


def test_ids_with_odd_characters(writer, make_arrays, make_spec):
    spec = make_spec()
    written = {}
    for i, name in enumerate(ODD):
        infos, arrays = make_arrays([(name, 4 + i)])
        written[name] = arrays["coord"]
        kept = {k: arrays[k] for k in ("coord", "source_index", "link_point")}
        record = writer.commit_geometry(name, infos, kept)
        index = np.full(4 + i, -1, np.int32)
        writer.commit_features(spec, record, encode(np.zeros((0, 5)), "float16"), index, images=0)
    reader = open_cache(writer.paths.root)
    assert reader.samples == sorted(ODD) == reader.samples_with()
    for name in ODD:
        assert np.array_equal(reader.read(name).coord, written[name])
    assert verify(writer.paths.root).ok == 2 * len(ODD) + 1
    assert all(writer.paths.root in p.resolve().parents for p in files_of(writer.paths.root))


@given(st.text(min_size=1), st.text(min_size=1))
def test_file_names_are_safe_and_one_per_id(a, b):
    for identifier in (a, b):
        name = file_name(identifier)
        assert (
            0 < len(name) <= 180 and "/" not in name and not name.startswith(".") and name.isascii() and name != "vfm"
        )
    assert (file_name(a) == file_name(b)) == (a == b)


def test_cache_urls(tmp_path, writer, make_partition):
    assert location("a/b") == Path("a/b") == location(Path("a/b"))
    assert location("file:///data/my%20cache") == Path("/data/my cache")
    assert open_cache(writer.paths.root.as_uri()).samples == []
    with pytest.raises(UsageError, match="no storage for nowhere://"):
        open_cache("nowhere://bucket/cache")
    with pytest.raises(UsageError, match="expected PROTOCOL://BUCKET/FOLDER"):
        open_cache("memory://")


def test_readers_pickle_and_hold_no_files(writer, make_arrays, make_spec):
    spec = make_spec()
    infos, arrays = make_arrays([("scene", 30)])
    kept = {k: arrays[k] for k in ("coord", "source_index", "link_point")}
    record = writer.commit_geometry("scene", infos, kept)
    writer.commit_features(spec, record, encode(np.ones((1, 5)), "float16"), np.zeros(30, np.int32), images=1)
    reader = pickle.loads(pickle.dumps(open_cache(writer.paths.root)))
    assert np.array_equal(reader.read("scene").feature, np.ones((30, 5)))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(200):
        reader.read_stored("scene", "fake")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# --- commit protocol ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class Kill:
    """Stops the disk at the n-th change, as kill -9 does: that change and all later ones never happen."""

    CHANGES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left = at
        for name in self.CHANGES:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, change):
        def wrapped(*args, **kwargs):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return change(*args, **kwargs)

        return wrapped


def small(make_arrays, seed: int):
    infos, arrays = make_arrays([("scene", 12)], seed)
    kept = ("coord", "source_index")
    return infos, {k: v for k, v in arrays.items() if k in kept}


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_change_of_the_disk(writer, make_partition, make_arrays, make_spec, monkeypatch, overwrite):
    """A reader sees the partition as a whole, old or new, or not at all; what else is in the cache stays."""
    neighbour = make_partition(writer, "neighbour", [("neighbour", 10)], make_spec())
    others = {p: p.read_bytes() for p in files_of(writer.paths.root)}
    old, new = small(make_arrays, 1), small(make_arrays, 2)
    seen = {"none": 0, "old": 0, "new": 0}
    for at in range(0, 400, 1 if overwrite else 4):
        if overwrite:
            writer.commit_geometry("scene", *old)
        finished = False
        with monkeypatch.context() as patch:
            Kill(patch, at)
            try:
                writer.commit_geometry("scene", *new)
                finished = True
            except Killed:
                pass
        reader = open_cache(writer.paths.root)
        if "scene" in reader.samples:
            coord = reader.read_stored("scene", None).coord
            which = "new" if np.array_equal(coord, new[1]["coord"]) else "old"
            assert which == "new" or np.array_equal(coord, old[1]["coord"])
            assert writer.geometry("scene") is not None
        else:
            which = "none"
            assert writer.geometry("scene") is None
        seen[which] += 1
        assert all(path.read_bytes() == content for path, content in others.items())
        assert not finished or which == "new"
        with monkeypatch.context() as patch:
            patch.setattr(files, "is_alive", lambda pid: False)
            # kill -9 leaves no threads; here zarr's may still be ending, and put a file back while it is removed.
            for _ in range(100):
                with contextlib.suppress(OSError):
                    remove_leftovers(writer.paths.root)
                if not list(writer.paths.root.rglob("*.tmp")):
                    break
                time.sleep(0.02)
        assert not list(writer.paths.root.rglob("*.tmp"))
        if finished:
            break
        if not overwrite:  # the next run makes it, and all is well
            record = writer.paths.record(writer.paths.geometry, "scene")
            if which == "none":
                writer.commit_geometry("scene", *new)
                assert np.array_equal(open_cache(writer.paths.root).read_stored("scene", None).coord, new[1]["coord"])
            record.unlink()
            files.remove_group(record.with_suffix(".zarr"))
    else:
        pytest.fail("the commit never finished")
    assert verify(writer.paths.root).clean
    assert_reads(open_cache(writer.paths.root), "neighbour", neighbour, key=make_spec().key)
    assert seen["none"] > 3 and seen["new"] >= 1 and (seen["old"] >= 1) == overwrite


def test_a_failed_write_leaves_nothing_behind(writer, make_arrays, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(groups, "fill_group", full)
        with pytest.raises(StorageError, match=r"cannot write .*scene\.zarr.*No space left.*free space"):
            writer.commit_geometry("scene", *make_arrays([("scene", 5)]))
    assert [p.name for p in files_of(writer.paths.root)] == ["cache.json"]
    assert open_cache(writer.paths.root).samples == []


def test_leftovers(writer, make_partition):
    make_partition(writer, "scene", [("scene", 5)])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files.socket.gethostname()
    folder = writer.paths.geometry
    (folder / f".{host}+{dead.pid}+abc.tmp").mkdir()
    (folder / f".{host}+{dead.pid}+abc.tmp" / "x").write_text("half")
    (writer.paths.root / f".{host}+{dead.pid}+def.tmp").write_text("half")
    working = folder / f".{host}+{os.getpid()}+abc.tmp"
    foreign, old = folder / ".elsewhere+1+abc.tmp", folder / ".elsewhere+2+abc.tmp"
    for path in (working, foreign, old):
        path.write_text("half")
    os.utime(old, (0, time.time() - 90000))
    assert remove_leftovers(writer.paths.root) == 3
    assert working.exists() and foreign.exists() and not old.exists()
    assert verify(writer.paths.root).clean and open_cache(writer.paths.root).samples == ["scene"]


def test_only_a_folder_of_its_own(tmp_path, make_metadata):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty and not a cache"):
        CacheWriter.create(tmp_path, make_metadata())
    with pytest.raises(MissingDataError, match=r"has no cache\.json"):
        open_cache(tmp_path)
    with pytest.raises(MissingDataError):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(StorageError):
        CacheWriter.create(tmp_path / "notes.txt" / "cache", make_metadata())


def test_other_settings_are_refused_by_name(writer, make_metadata):
    assert CacheWriter.create(writer.paths.root, make_metadata()).metadata == writer.metadata
    links = make_metadata().links
    other = make_metadata(
        dataset_options={"views": "all"},
        links=type(links)(every_nth_frame=links.every_nth_frame, occlusion_tolerance=0.5),
    )
    with pytest.raises(MismatchError) as caught:
        CacheWriter.create(writer.paths.root, other)
    text = str(caught.value)
    assert "dataset_options: the cache has {}, asked for {'views': 'all'}" in text
    assert "links.occlusion_tolerance: the cache has 0.2, asked for 0.5" in text
    assert "class_names" not in text and "depth_min" not in text and "another --out" in text


def test_a_cache_of_another_dataset_is_refused_by_that_alone(writer, make_metadata):
    other = make_metadata(dataset="scannet", class_names=tuple(f"class {i}" for i in range(200)))
    with pytest.raises(MismatchError, match=r"is of dataset 'fake', asked for 'scannet'; use another --out$"):
        CacheWriter.create(writer.paths.root, other)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, make_partition, make_spec, make_metadata):
    """A cache to damage: its root, what was written, and its spec. Every test restores what it changes."""
    spec = make_spec(codec="int8")
    root = tmp_path_factory.mktemp("damaged") / "cache"
    writer = CacheWriter.create(root, make_metadata())
    written = make_partition(writer, "scene", [("scene", 90)], spec)
    return root, written, spec


def read_everything(root: Path, written: dict, key: str) -> None:
    reader = open_cache(root)
    assert_reads(reader, "scene", written, key=key)
    for name in ("link_uv", "link_depth"):
        record = reader.geometry["scene"]
        folder = reader.paths.arrays(reader.paths.geometry, "scene")
        assert np.array_equal(read_array(folder, name, record.arrays[name]), written[name])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_in_any_file_is_seen_or_harmless(damaged, data, caplog):
    root, written, spec = damaged
    path = data.draw(st.sampled_from(files_of(root)))
    good = path.read_bytes()
    position, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    altered = bytearray(good)
    altered[position] ^= 1 << bit
    path.write_bytes(altered)
    seen = clean = False
    try:
        try:
            with caplog.at_level(logging.CRITICAL):
                read_everything(root, written, spec.key)
        except (CorruptCacheError, FormatVersionError, MismatchError, UnknownNameError):
            seen = True
        try:
            clean = verify(root).clean
        except (CorruptCacheError, FormatVersionError):
            clean = False
    finally:
        path.write_bytes(good)
    assert not (seen and clean), "the reader refuses what verify finds right"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"separator": "/"', b'"separator": "."'),  # chunks would be looked for under another name
        (b'"fill_value": 0', b'"fill_value": 1'),  # what all-zero chunks, which are not stored, read as
        (b'"fill_value": 0', b'"fill_value": 8'),
    ],
)
@pytest.mark.parametrize("zeros", [True, False])
def test_altered_array_metadata_never_makes_other_values(tmp_path, old, new, zeros):
    array = np.zeros(9, np.int16) if zeros else np.arange(9, dtype=np.int16)
    groups.write_arrays(tmp_path / "a.zarr", {"x": array})
    path = tmp_path / "a.zarr" / "x" / "zarr.json"
    text = path.read_bytes()
    assert text.count(old) == 1
    path.write_bytes(text.replace(old, new))
    with contextlib.suppress(CorruptCacheError):
        assert np.array_equal(read_array(tmp_path / "a.zarr", "x", array_infos({"x": array})["x"]), array)


def test_a_missing_or_cut_file_is_seen_at_once(damaged):
    root, written, spec = damaged
    for path in files_of(root):
        if path.name == "cache.json":
            continue
        good = path.read_bytes()
        for change in ("missing", "cut", "longer"):
            if change == "missing":
                path.unlink()
            else:
                path.write_bytes(good[: len(good) // 2] if change == "cut" else good + b"\0")
            try:
                with pytest.raises((CorruptCacheError, MissingDataError, UnknownNameError, UsageError)):
                    read_everything(root, written, spec.key)
                if path.name not in ("scene.json", "vfm.json") or change != "missing":
                    assert not verify(root).clean, path
            finally:
                path.write_bytes(good)
    read_everything(root, written, spec.key)


def test_a_damaged_cache_json_says_so(damaged):
    root, _, _ = damaged
    path = root / "cache.json"
    good = path.read_bytes()
    try:
        path.write_bytes(good.replace(b"fake", b"fakd"))
        with pytest.raises(CorruptCacheError, match=r"cache\.json: .* altered after it was written"):
            open_cache(root)
        path.write_bytes(good.replace(b'"format_version": 1', b'"format_version": 2'))
        with pytest.raises(FormatVersionError, match=r"format version 2, .* upgrade"):
            open_cache(root)
    finally:
        path.write_bytes(good)


def test_features_of_another_geometry_are_refused(writer, make_partition, make_arrays, make_spec):
    """The same points in another order are another geometry."""
    spec = make_spec()
    make_partition(writer, "scene", [("scene", 40)], spec)
    infos, arrays = make_arrays([("scene", 40)], seed=5)
    for name in ("coord", "segment", "source_index"):
        arrays[name] = arrays[name][::-1]
    writer.commit_geometry("scene", infos, arrays)
    reader = open_cache(writer.paths.root)
    with pytest.raises(MismatchError, match=r"features of another geometry \(points, their order, or links\)"):
        reader.read("scene")
    with pytest.raises(MismatchError):
        reader.samples_with("fake")
    assert verify(writer.paths.root).mismatched == [f"features/{spec.key}/scene"]


def test_features_of_another_vfm_of_the_same_shape_are_refused(writer, make_partition, make_spec):
    mine, other = make_spec(), make_spec(weights_sha256="1" * 64)
    make_partition(writer, "scene", [("scene", 40)], mine, other)
    folders = [writer.paths.features(s.key) for s in (mine, other)]
    for name in ("scene.json", "scene.zarr"):
        files.remove_group(folders[0] / name) if name.endswith("zarr") else (folders[0] / name).unlink()
        (folders[1] / name).rename(folders[0] / name)
    with pytest.raises(MismatchError, match="features of another VFM"):
        open_cache(writer.paths.root).read("scene", mine.key)
    assert verify(writer.paths.root).mismatched == [f"features/{mine.key}/scene"]


def test_a_renamed_vfm_folder_is_refused(writer, make_partition, make_spec):
    spec = make_spec()
    make_partition(writer, "scene", [("scene", 10)], spec)
    folder = writer.paths.features(spec.key)
    folder.rename(folder.with_name("dinov2-large-01234567"))
    with pytest.raises(MismatchError, match=f"named 'dinov2-large-01234567' but describes '{spec.key}'"):
        open_cache(writer.paths.root)
    assert "features/dinov2-large-01234567/vfm.json" in verify(writer.paths.root).mismatched


def test_features_of_removed_geometry_do_not_exist(writer, make_partition, make_spec):
    make_partition(writer, "scene", [("scene", 10)], make_spec())
    writer.paths.record(writer.paths.geometry, "scene").unlink()
    reader = open_cache(writer.paths.root)
    assert reader.samples == [] == reader.samples_with()


def test_an_altered_geometry_record_hides_its_partition(writer, make_partition, caplog):
    make_partition(writer, "good", [("good", 10)])
    make_partition(writer, "bad", [("bad", 10)])
    path = writer.paths.record(writer.paths.geometry, "bad")
    path.write_text(path.read_text().replace('"points": 10', '"points": 11'))
    assert open_cache(writer.paths.root).samples == ["good"]
    assert "bad.json" in caplog.text and writer.geometry("bad") is None and writer.geometry("good") is not None


# --- a disk that refuses --------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path, make_metadata):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied; make it writable"):
        CacheWriter.create(tmp_path / "cache", make_metadata())
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_refused_writes_say_what_to_do(tmp_path, make_metadata, monkeypatch, code):
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    writer = CacheWriter.create(tmp_path / "there", make_metadata())
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    for root in (tmp_path / "new", tmp_path / "there"):
        with pytest.raises(StorageError, match=rf"{os.strerror(code)}; .*choose another --out"):
            CacheWriter.create(root, make_metadata())
    with pytest.raises(StorageError, match=os.strerror(code)):
        writer.commit_geometry("p", [], {"coord": np.zeros((1, 3), np.float32)})


FILL = """
import resource, sys
import numpy as np
from ditr_cache.errors import StorageError
from ditr_cache.store import CacheWriter, open_cache
from ditr_cache.schema import SampleInfo
from ditr_cache.verify import verify
root = sys.argv[1]
writer = CacheWriter(root)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
rng = np.random.default_rng(0)
info = SampleInfo(id="big", split="train", points=50_000, linked_points=0, views=())
arrays = {"coord": rng.normal(size=(50_000, 3)).astype(np.float32), "source_index": np.arange(50_000, dtype=np.uint32),
          "link_point": np.zeros(0, np.uint32)}
for name in ("big", "scene"):
    try:
        writer.commit_geometry(name, [info], arrays)
    except StorageError as error:
        print(error)
    else:
        sys.exit("written in spite of the limit")
reader = open_cache(root)
assert reader.samples == ["kept"], reader.samples
assert verify(root).clean
"""


def test_a_full_disk_damages_nothing(writer, make_partition, make_spec):
    """A true limit of the kernel, in a process of its own. Of a partition that is replaced, the old one goes first."""
    spec = make_spec()
    make_partition(writer, "scene", [("scene", 20)])
    written = make_partition(writer, "kept", [("kept", 20)], spec)
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(writer.paths.root)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot write") == 2 and "Traceback" not in done.stderr
    assert_reads(open_cache(writer.paths.root), "kept", written, key=spec.key)
    assert not list(writer.paths.root.rglob("*.tmp"))
