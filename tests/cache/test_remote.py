"""A cache in object storage: written, read, checked and repaired through a real S3 server, and other storages."""

from __future__ import annotations

import datetime
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ditr_cache import files, group_files, remote, store
from ditr_cache.errors import CorruptCacheError, MissingDataError, StorageError, UnwritableError, UsageError
from ditr_cache.files import Paths, entries, groups_of, location, read_documents, remove_leftovers
from ditr_cache.groups import open_group
from ditr_cache.remote import RemotePath, read_many
from ditr_cache.schema import FeatureRecord, GeometryRecord
from ditr_cache.store import CacheReader, CacheWriter, open_cache
from ditr_cache.verify import verified_arrays, verify
from object_store import BUCKET, ObjectStore, reconnect, running, use
from small_caches import write_features
from support import Run

server = pytest.fixture(scope="session")(running)

URL = f"s3://{BUCKET}/caches/tiny"
KEY = "caches/tiny"
MEMORY = "memory://caches/tiny"


@pytest.fixture
def s3(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The server, empty, with the environment of this process pointing to it."""
    use(server, monkeypatch)
    forget()
    return server


@pytest.fixture
def in_storage(request: pytest.FixtureRequest) -> Iterator[None]:
    """S3 where a test asks for it by its parameter, else memory, which is quicker; either is empty."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("url") == URL:
        request.getfixturevalue("s3")
    forget()
    yield
    RemotePath.of("memory://caches").remove_tree()


def forget() -> None:
    """What another process would not remember."""
    group_files._recent.__init__(group_files.RECENT_BYTES)  # type: ignore[misc]


def arrays_of(url: str | Path) -> dict[str, NDArray[Any]]:
    """Every array of every commit of a cache, each compared with its record."""
    reader = open_cache(url)
    found = {}
    for folder in (reader.paths.geometry, *(reader.paths.features(key) for key in reader.vfms)):
        cls = GeometryRecord if folder.name == "geometry" else FeatureRecord
        for _, record in read_documents(reader.paths.records(folder), cls):
            assert not isinstance(record, CorruptCacheError)
            for name, array in verified_arrays(reader.paths, folder, record):
                found[f"{folder.name}/{record.partition}/{name}"] = array
    return found


def assert_equal(first: str | Path, second: str | Path) -> None:
    a, b = arrays_of(first), arrays_of(second)
    assert a.keys() == b.keys() and a
    for name, array in a.items():
        assert array.dtype == b[name].dtype, name
        np.testing.assert_array_equal(array, b[name], err_msg=name)


@pytest.fixture
def make_tiny(
    make_metadata: Callable[..., Any], make_spec: Callable[..., Any], make_partition: Callable[..., dict]
) -> Callable[..., Any]:
    """Write a cache of three rooms of one partition each, or of one partition of three scans; returns its VFM."""

    def make(url: str | Path, *, together: bool = False, points: int = 40, dim: int = 5) -> Any:
        writer, spec = CacheWriter.create(url, make_metadata()), make_spec(dim=dim, codec="int8")
        samples = [("a", points), ("b", points + 1), ("c", points + 2)]
        if together:
            make_partition(writer, "scans", samples, spec)
        else:
            for name, count in samples:
                make_partition(writer, name, [(name, count)], spec)
        return spec

    return make


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["s3", "memory", "local"])
def folder(request: pytest.FixtureRequest, s3: ObjectStore, tmp_path: Path) -> Iterator[RemotePath]:
    """An empty folder in a storage; `local` stands for those that have folders, as sftp."""
    found = {"s3": f"s3://{BUCKET}/some/features", "memory": "memory://some/features", "local": f"local://{tmp_path}/f"}
    path = RemotePath.of(found[request.param])
    yield path
    path.remove_tree()


def test_objects_are_written_read_listed_and_removed(folder: RemotePath, tmp_path: Path) -> None:
    path = folder / "deep" / "features"
    assert not path.exists() and folder.children() == {} and folder.tree() == {}
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    with pytest.raises(FileNotFoundError):
        path.size()
    path.write_bytes(b"0123456789")
    assert (path.exists(), path.size(), path.read_bytes()) == (True, 10, b"0123456789")
    assert [path.read_range(*r) for r in ((2, 5), (8, 20), (10, 12), (50, 60))] == [b"234", b"89", b"", b""]
    path.write_bytes(b"")
    assert (path.size(), path.read_bytes()) == (0, b"")
    (tmp_path / "file").write_bytes(b"abc")
    (folder / "features").upload(tmp_path / "file")
    # An object may bear the name of its folder.
    assert folder.children() == {"deep": None, "features": 3}
    assert (folder / "deep").children() == {"features": 0}
    assert folder.tree() == {"deep/features": 0, "features": 3}
    age = datetime.datetime.now(datetime.UTC) - path.modified()
    assert abs(age) < datetime.timedelta(hours=1)
    assert read_many([path, folder / "gone", folder / "features"]) == {path: b"", folder / "features": b"abc"}
    (folder / "features").unlink()
    (folder / "features").unlink(missing_ok=True)
    assert folder.children() == {"deep": None}
    folder.remove_tree()
    folder.remove_tree()
    assert folder.children() == {}


def test_only_one_creates_an_object(folder: RemotePath) -> None:
    assert (folder / "claim").create(b"1")
    assert not (folder / "claim").create(b"2")
    assert (folder / "claim").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "PROTOCOL://BUCKET/FOLDER"),
        ("s3:///", "PROTOCOL://BUCKET/FOLDER"),
        ("s3://bucket/*", "without any of"),
        ("zip://a.zip::s3://bucket", "without any of"),
        ("nonsense://bucket/cache", "name a folder, or a URL that fsspec knows"),
    ],
)
def test_urls_that_name_no_folder_are_refused(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        location(url)


def test_the_package_that_a_storage_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match="pip install gcsfs"):
        location("gs://bucket/cache")


def test_a_file_url_is_a_folder_here(tmp_path: Path) -> None:
    assert location(f"file://{tmp_path}/a%20b") == tmp_path / "a b"


# --- the same cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_a_cache_there_is_the_cache_here(
    s3: ObjectStore, tmp_path: Path, make_tiny: Callable[..., Any], together: bool
) -> None:
    for url in (URL, tmp_path / "cache"):
        spec = make_tiny(url, together=together)
    assert_equal(URL, tmp_path / "cache")
    here, there = open_cache(tmp_path / "cache"), open_cache(URL)
    assert here.samples == there.samples and here.metadata == there.metadata
    assert {p: r.digest for p, r in here.geometry.items()} == {p: r.digest for p, r in there.geometry.items()}
    for sample in here.samples:
        a, b = here.read(sample, spec.key), there.read(sample, spec.key)
        for name, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)
    # Two objects a commit, no folders, nothing left over.
    commits = 2 * (1 if together else 3)
    assert len(s3.keys) == 2 * commits + 2
    assert sum(key.endswith(".zarr.zip") for key in s3.keys) == commits


def test_arrays_of_many_chunks_and_few_rows_of_them(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_tiny: Callable[..., Any]
) -> None:
    monkeypatch.setattr("ditr_cache.arrays.CHUNK_BYTES", 1 << 9)
    monkeypatch.setattr("ditr_cache.arrays.SHARD_BYTES", 1 << 12)
    monkeypatch.setattr("ditr_cache.arrays.GAP_BYTES", 1 << 10)
    monkeypatch.setattr("ditr_cache.group_files.REMEMBERED_BYTES", 100)
    for url in (URL, tmp_path / "cache"):
        spec = make_tiny(url, together=True, points=700)
    assert_equal(URL, tmp_path / "cache")
    here, there = open_cache(tmp_path / "cache"), open_cache(URL)
    rng = np.random.default_rng(0)
    for sample in here.samples:
        a, b = (reader.read_stored(sample, spec.key).features for reader in (here, there))
        assert a is not None and b is not None
        for count in (0, 1, 3, a.rows // 2, a.rows):
            rows = np.sort(rng.choice(a.rows, count, replace=False))
            s3.taken()
            np.testing.assert_array_equal(a.take(rows).table, b.take(rows).table)


def test_memory_and_other_storages(tmp_path: Path, make_tiny: Callable[..., Any]) -> None:
    for url in ("memory://caches/tiny", f"local://{tmp_path}/there", tmp_path / "here"):
        make_tiny(url)
    assert_equal("memory://caches/tiny", tmp_path / "here")
    assert_equal(f"local://{tmp_path}/there", tmp_path / "here")
    assert verify("memory://caches/tiny").clean
    RemotePath.of("memory://caches").remove_tree()


def test_copies_are_read_either_way(s3: ObjectStore, tmp_path: Path, make_tiny: Callable[..., Any]) -> None:
    """`aws s3 sync` of a cache made here, and of one made there."""
    spec = make_tiny(tmp_path / "here", together=True)
    for path in (tmp_path / "here").rglob("*"):
        if path.is_file():
            s3.put(f"copy/{path.relative_to(tmp_path / 'here')}", path.read_bytes())
    assert_equal(f"s3://{BUCKET}/copy", tmp_path / "here")
    assert verify(f"s3://{BUCKET}/copy").clean
    assert open_cache(f"s3://{BUCKET}/copy").read("b", spec.key).valid.any()

    make_tiny(URL)
    for key in s3.keys:
        path = tmp_path / "down" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.content(key))
    assert_equal(URL, tmp_path / "down" / KEY)
    assert verify(tmp_path / "down" / KEY).clean
    # Extracted again there, a partition becomes a folder.
    make_tiny(tmp_path / "down" / KEY)
    assert_equal(URL, tmp_path / "down" / KEY)
    assert len(list((tmp_path / "down" / KEY / "geometry").glob("*.zarr"))) == 3


# --- commits --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_before_the_record_has_committed_nothing(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_tiny: Callable[..., Any]
) -> None:
    write = files.write_text

    def killed(path: Any, text: str) -> None:
        if path.name == "b.json":
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(store, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        make_tiny(URL)
    assert open_cache(URL).samples == ["a"] and verify(URL).clean
    assert any("geometry/b." in key for key in s3.keys)
    monkeypatch.setattr(store, "write_text", write)
    make_tiny(URL)
    make_tiny(tmp_path / "clean")
    assert_equal(URL, tmp_path / "clean")
    assert sum(key.endswith(".zarr.zip") for key in s3.keys) == 6  # the same content has the same name


def test_a_reader_of_a_replaced_commit_gets_an_error_and_no_other_data(
    s3: ObjectStore, make_tiny: Callable[..., Any], make_arrays: Callable[..., Any]
) -> None:
    make_tiny(URL, together=True)
    reader = open_cache(URL)
    before = reader.read_stored("a", None)
    infos, arrays = make_arrays([("a", 40), ("b", 41), ("c", 42)], seed=len("scans"))
    assert np.array_equal(arrays["coord"][:40], before.coord)
    # As many bytes, so that nothing but the name of the object tells that they are others.
    arrays["coord"] = arrays["coord"][::-1].copy()
    packs = [key for key in s3.keys if key.startswith(f"{KEY}/geometry") and key.endswith("zip")]
    CacheWriter(URL).commit_geometry("scans", infos, arrays)
    assert [k for k in s3.keys if k.startswith(f"{KEY}/geometry") and k.endswith("zip")] != packs
    assert sum(key.startswith(f"{KEY}/geometry") for key in s3.keys) == 2
    forget()
    with pytest.raises(CorruptCacheError, match=r"committed but missing.*this command again"):
        reader.read_stored("a", None)
    assert np.array_equal(open_cache(URL).read_stored("a", None).coord, arrays["coord"][:40])


def test_what_nobody_committed_goes_after_a_day(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, make_tiny: Callable[..., Any]
) -> None:
    make_tiny(URL)
    kept = s3.keys
    other = "0123456789abcdef"
    s3.put(f"{KEY}/geometry/a.{other}.zarr.zip", b"of a run that was killed")
    s3.put(f"{KEY}/geometry/z.{other}.zarr.zip", b"of a run that was killed")
    assert verify(URL).clean
    assert remove_leftovers(location(URL)) == 0
    modified = RemotePath.modified

    def older(self: RemotePath) -> datetime.datetime:
        return modified(self) - datetime.timedelta(days=2 * self.name.endswith(".zip"))

    monkeypatch.setattr(RemotePath, "modified", older)
    assert remove_leftovers(location(URL)) == 2
    assert s3.keys == kept


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(content: bytes) -> bytes:
    return content[:300] + bytes([content[300] ^ 1]) + content[301:]


def cut(content: bytes) -> bytes:
    return content[:400]


def emptied(_: bytes) -> bytes:
    return b""


DAMAGES = [(flip, "corrupt"), (cut, "corrupt"), (emptied, "corrupt"), (None, "missing")]


@pytest.mark.parametrize(
    ("url", "part", "damage", "kind"),
    [(MEMORY, part, *damage) for part in ("geometry", "features") for damage in DAMAGES]
    + [(URL, "features", emptied, "corrupt"), (URL, "features", None, "missing")],
)
def test_damage_is_found_refused_and_repaired(
    in_storage: None,
    tmp_path: Path,
    make_tiny: Callable[..., Any],
    url: str,
    part: str,
    damage: Callable[[bytes], bytes] | None,
    kind: str,
) -> None:
    spec = make_tiny(url, points=400)
    reader = open_cache(url)
    folder = reader.paths.geometry if part == "geometry" else reader.paths.features(spec.key)
    (pack,) = groups_of(folder / "b.json")
    assert isinstance(pack, RemotePath)
    if damage is None:
        pack.unlink()
    else:
        pack.write_bytes(damage(pack.read_bytes()))
    with pytest.raises(CorruptCacheError):
        sample = reader.read_stored("b", spec.key)
        assert sample.features is not None
        sample.features.take(np.arange(sample.features.rows))
    reader.read_stored("a", spec.key)
    report = verify(url, repair=True)
    assert getattr(report, kind) and all(entry.endswith("/b") for entry in report.reasons)
    assert groups_of(folder / "b.json") == [] and not (folder / "b.json").exists()
    assert verify(url).clean
    make_tiny(url, points=400)
    assert verify(url).clean
    # The reader of before does not remember the damage.
    again = reader.read_stored("b", spec.key)
    assert again.coord.shape == (401, 3) and again.features is not None
    again.features.take(np.arange(again.features.rows))


@pytest.mark.parametrize("content", [b"", b"{", None])
def test_damaged_records(in_storage: None, make_tiny: Callable[..., Any], content: bytes | None) -> None:
    make_tiny(MEMORY)
    path = RemotePath.of(MEMORY) / "geometry" / "b.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert open_cache(MEMORY).samples == ["a", "c"]
    assert not verify(MEMORY, repair=True).clean
    make_tiny(MEMORY)
    assert verify(MEMORY).clean and open_cache(MEMORY).samples == ["a", "b", "c"]


# --- requests -------------------------------------------------------------------------------------------------------


def read_all(reader: CacheReader, vfm: str) -> None:
    for sample in reader.samples:
        features = reader.read_stored(sample, vfm).features
        assert features is not None
        features.take(np.arange(features.rows))


def test_a_sample_of_its_own_takes_two_requests(s3: ObjectStore, make_tiny: Callable[..., Any]) -> None:
    spec = make_tiny(URL, points=400)
    s3.taken()
    reader = open_cache(URL)
    reader.samples_with(spec.key)
    opened = s3.taken()
    assert sum(key.endswith(".json") and "/vfm" not in key and "/cache" not in key for _, key in opened) == 6
    assert len(opened) == 6 + 4  # records; the cache, its VFM, two listings
    for _ in range(2):
        forget()
        read_all(reader, spec.key)
        assert [method for method, _ in s3.taken()] == ["GET"] * 6
    read_all(reader, spec.key)  # so small a cache is remembered
    assert s3.taken() == []


@pytest.mark.parametrize(
    ("layout", "shard_rows", "requests"), [("fused", 1 << 18, 4), ("views", 1 << 18, 5), ("fused", 1 << 13, 6)]
)
def test_a_scan_of_many_takes_a_handful_of_requests(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, make_tiny: Callable[..., Any], make_spec: Callable[..., Any],
    layout: str, shard_rows: int, requests: int,
) -> None:  # fmt: skip
    """All arrays of points, index, table, scale; in the layout `views` the points of links; where its rows lie in two
    shards, table and scale once more."""
    monkeypatch.setattr("ditr_cache.arrays.CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr("ditr_cache.arrays.PACKED_SHARD_ROWS", shard_rows)
    monkeypatch.setattr("ditr_cache.group_files.REMEMBERED_BYTES", 1 << 11)
    spec = make_tiny(URL, together=True, points=6_000 if layout == "fused" else 2_000, dim=32)
    if layout == "views":
        spec = make_spec(dim=32, codec="int8", layout="views")
        writer = CacheWriter(URL)
        geometry = writer.geometry("scans")
        assert geometry is not None
        write_features(writer, spec, geometry)
    reader = open_cache(URL)
    read_all(reader, spec.key)  # metadata and indices of shards, once a partition
    s3.taken()
    stored = reader.read_stored("b", spec.key)
    assert stored.features is not None
    stored.features.take(np.arange(stored.features.rows))
    assert [method for method, _ in s3.taken()] == ["GET"] * requests


def test_shards_that_do_not_lie_together_are_asked_for_one_by_one(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, make_tiny: Callable[..., Any]
) -> None:
    monkeypatch.setattr("ditr_cache.arrays.CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr("ditr_cache.group_files.REMEMBERED_BYTES", 1 << 11)
    monkeypatch.setattr("ditr_cache.group_files.TOGETHER_BYTES", 1 << 10)
    spec = make_tiny(URL, together=True, points=6_000, dim=32)
    reader = open_cache(URL)
    read_all(reader, spec.key)
    s3.taken()
    reader.read_stored("b", None)
    assert [method for method, _ in s3.taken()] == ["GET"] * 7


def test_a_commit_takes_three_requests(
    s3: ObjectStore, make_tiny: Callable[..., Any], make_arrays: Callable[..., Any]
) -> None:
    make_tiny(URL)
    writer = CacheWriter(URL)
    s3.taken()
    writer.commit_geometry("new", *make_arrays([("new", 50)]))
    assert [method for method, _ in s3.taken()] == ["GET", "PUT", "PUT"]
    assert writer.geometry("new") is not None
    assert [method for method, _ in s3.taken()] == ["GET", "HEAD"]


def test_memory_is_bounded() -> None:
    fetched: list[int] = []

    def fetch(start: int, stop: int) -> bytes:
        fetched.append(start)
        return bytes(stop - start)

    recent = group_files.Recent(100)
    for i in range(50):
        recent.get("a", 10 * i, 10 * i + 10, fetch)
    assert recent._bytes == 100 and len(recent._parts) == 10
    recent.get("a", 400, 410, fetch)
    assert len(fetched) == 50
    recent.get("a", 0, 200, fetch)  # more than it may hold: given, not kept
    assert recent._bytes == 0
    recent.get("b", 0, 10, fetch)
    recent.get("a", 0, 10, fetch)
    recent.forget("b")
    assert recent._bytes == 10 and [key for key, *_ in recent._parts] == ["a"]


# --- what cannot be used --------------------------------------------------------------------------------------------


def test_no_bucket(s3: ObjectStore, make_metadata: Callable[..., Any]) -> None:
    with pytest.raises(UnwritableError, match="check the credentials, the bucket and the endpoint"):
        CacheWriter.create("s3://absent/cache", make_metadata())
    with pytest.raises(MissingDataError, match=r"'s3://absent/cache' is not a cache"):
        open_cache("s3://absent/cache")


def without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    reconnect(monkeypatch)


def test_no_credentials(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, make_metadata: Callable[..., Any]) -> None:
    without_credentials(monkeypatch)
    with pytest.raises(UnwritableError, match="check the credentials"):
        CacheWriter.create(URL, make_metadata())
    with pytest.raises(StorageError, match="check the credentials"):
        open_cache(URL)
    assert s3.taken() == []


def test_no_endpoint(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, make_metadata: Callable[..., Any]) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    reconnect(monkeypatch)
    with pytest.raises(StorageError, match=r"cannot read .* connect to the endpoint"):
        open_cache(URL)


def test_a_storage_that_refuses(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, make_tiny: Callable[..., Any]
) -> None:
    """Whatever a client raises names the object and the remedy."""
    make_tiny(URL)
    reader = open_cache(URL)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(remote._filesystem("s3"), "cat_file", refuse)
    forget()
    with pytest.raises(StorageError, match=rf"cannot read '{URL}/geometry/a\.\w+\.zarr\.zip': PermissionError"):
        reader.read_stored("a", None)


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tiny_rooms: Path, make_checkpoint: Callable[..., Path]) -> list[object]:
    named = ["extract", "--dataset", "rooms", "--root", tiny_rooms, "--vfm", "test_vit", "--image-size", "32x64"]
    return [*named, "--checkpoint", make_checkpoint(), "--json", "--limit", 2]


def test_commands(s3: ObjectStore, run: Run, arguments: list[object], tmp_path: Path) -> None:
    first = run(*arguments, "--workers", 0, "--out", URL)
    assert (first.code, first.json["partitions"]) == (0, {"done": 2, "reused": 0, "failed": 0})
    again = run(*arguments, "--workers", 0, "--out", URL)
    assert (again.code, again.json["partitions"]) == (0, {"done": 0, "reused": 2, "failed": 0})
    run(*arguments, "--workers", 0, "--out", tmp_path / "here")
    assert_equal(URL, tmp_path / "here")

    info, here = run("info", URL, "--json").json, run("info", tmp_path / "here", "--json").json
    assert info == here and info["samples"] == 2
    assert run("show", URL, "scene0000_00", "-o", tmp_path / "picture.png").code == 0
    assert (tmp_path / "picture.png").stat().st_size > 1000

    shutil.rmtree(tmp_path / "here")
    key = next(k for k in s3.keys if "/features/" in k and k.endswith("zip"))
    s3.put(key, flip(s3.content(key)))
    assert run("verify", URL).code == 1
    repaired = run("verify", URL, "--repair", "--json")
    assert repaired.code == 1 and len(repaired.json["corrupt"]) == 1
    third = run(*arguments, "--workers", 0, "--out", URL)
    assert third.json["partitions"] == {"done": 1, "reused": 1, "failed": 0}
    assert third.json["geometry"] == {"computed": 0, "reused": 2}
    assert run("verify", URL).code == 0


def test_dask_workers_write_there(s3: ObjectStore, run: Run, arguments: list[object], tmp_path: Path) -> None:
    there = run(*arguments, "--workers", 1, "--out", URL)
    assert (there.code, there.json["partitions"]["done"]) == (0, 2)
    run(*arguments, "--workers", 0, "--out", tmp_path / "here")
    a, b = arrays_of(URL), arrays_of(tmp_path / "here")
    assert a.keys() == b.keys()
    for name, array in a.items():
        # The order of a sum in the VFM, and so its last bit, depends on the number of threads.
        tolerance = 0.02 if name.endswith("table") else 0
        np.testing.assert_allclose(array, b[name], atol=tolerance, rtol=tolerance, err_msg=name)


def test_what_cannot_be_written_is_found_before_work(
    s3: ObjectStore, run: Run, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditr_cache.partition.PartitionWorker.__call__", None)
    assert run(*arguments, "--workers", 0, "--out", "s3://absent/cache").code == 2
    assert run(*arguments, "--workers", 0, "--out", "nonsense://bucket/cache").code == 2
    without_credentials(monkeypatch)
    refused = run(*arguments, "--workers", 0, "--out", URL)
    assert refused.code == 2 and "check the credentials" in refused.err
    assert run("info", URL).code == 1
    assert s3.keys == []


def test_groups_are_told_from_those_of_partitions_with_alike_names(s3: ObjectStore) -> None:
    digest = "0123456789abcdef"
    names = [f"a.{digest}.zarr.zip", "a.zarr/x/zarr.json", f"a.{digest}.{digest}.zarr.zip", "ab.zarr/zarr.json"]
    for name in names:
        s3.put(f"{KEY}/geometry/{name}", b"1")
    paths = Paths(location(URL))
    assert [p.name for p in groups_of(paths.geometry / "a.json")] == [f"a.{digest}.zarr.zip", "a.zarr"]
    assert len(entries(paths.geometry, "")) == 4


def test_a_group_is_read_as_it_lies_there(s3: ObjectStore, make_tiny: Callable[..., Any]) -> None:
    """`verify` is not told what memory holds."""
    make_tiny(URL)
    reader = open_cache(URL)
    reader.read_stored("a", None)
    record = reader.geometry["a"]
    s3.remove(next(k for k in s3.keys if "/geometry/a." in k and k.endswith("zip")))
    open_group(reader.paths, reader.paths.geometry, record).read("coord")
    with pytest.raises(CorruptCacheError):
        open_group(reader.paths, reader.paths.geometry, record, whole=True).read("coord")
