"""A cache, a recipe or a capture from a stranger can do no harm: one test for each part of that promise."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
from PIL import Image

from ditr_cache.arrays import array_infos, fill_group
from ditr_cache.datasets.images import MAX_PIXELS, image_size, read_color
from ditr_cache.datasets.numpy_files import map_array
from ditr_cache.datasets.video import read_video_frame
from ditr_cache.errors import CacheError, CorruptCacheError, DataError, UsageError, WeightsError
from ditr_cache.pointcloud.readers import open_cloud
from ditr_cache.schema import Document, FeatureRecord, GeometryRecord, VFMSpec, canonical_digest
from ditr_cache.store import CacheWriter, open_cache
from ditr_cache.weights import load_weights
from ditr_train.checkpoint import load_checkpoint
from ditr_train.foreign.files import read_public_file
from ditr_train.recipe_files import load_recipe
from support import Run


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@contextmanager
def little_memory(room: int = 1 << 29) -> Iterator[None]:
    """No more address space than there is, and `room` bytes."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def signed(body: dict[str, Any]) -> bytes:
    """A document under the checksum that anyone can compute."""
    body = {k: v for k, v in body.items() if k != "checksum"}
    return json.dumps({**body, "checksum": canonical_digest(body)}).encode()


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_bytes(signed(body))


@pytest.fixture
def cache(writer: CacheWriter, make_partition: Callable[..., Any], make_spec: Callable[..., VFMSpec]) -> Path:
    make_partition(writer, "scene", [("one", 30), ("two", 20)], make_spec())
    assert isinstance(writer.paths.root, Path)
    return writer.paths.root


def chunk_of(cache: Path, name: str) -> Path:
    return next(p for p in (cache / "geometry" / "scene.zarr" / name / "c").rglob("*") if p.is_file())


def put(cache: Path, file: Path, content: bytes) -> None:
    """Replace a file of the partition; its record says the new size."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    name = file.relative_to(cache / "geometry" / "scene.zarr").as_posix()
    rewrite(cache / "geometry" / "scene.json", lambda body: body["files"].update({name: len(content)}))


# --- no pickle ------------------------------------------------------------------------------------------------------


def test_checkpoints_run_no_code(tmp_path: Path, run: Run, tiny_rooms: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "weights.pt"
    for content in ({"format_version": 1, "model": {"a": Bomb(mark)}}, {"state_dict": {"a": Bomb(mark)}}):
        torch.save(content, path)
        for read in (load_checkpoint, read_public_file, lambda p: load_weights(torch.nn.Linear(1, 1), "linear", p)):
            with pytest.raises((DataError, WeightsError)):
                read(path)
        done = run("extract", "--dataset", "rooms", "--root", tiny_rooms, "--out", tmp_path / "cache", "--vfm",
                   "test_vit", "--checkpoint", path)  # fmt: skip
        assert done.code == 2 and "without pickled objects" in done.err
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb of this test is none"


def test_arrays_are_decoded_by_no_other_codec(cache: Path, tmp_path: Path) -> None:
    """Version 2 of zarr's format knows a codec that unpickles; version 3 takes whatever is installed."""
    folder, mark = cache / "geometry" / "scene.zarr" / "coord", tmp_path / "mark"
    metadata = json.loads((folder / "zarr.json").read_text())
    old = {"zarr_format": 2, "shape": [50, 3], "chunks": [50, 3], "dtype": "<f4", "fill_value": 0, "order": "C",
           "filters": None, "compressor": {"id": "pickle", "protocol": 5}, "dimension_separator": "."}  # fmt: skip
    assert numcodecs.get_codec(old["compressor"]).codec_id == "pickle"
    put(cache, folder / ".zarray", json.dumps(old).encode())
    put(cache, folder / "0.0", pickle.dumps(Bomb(mark)))
    (folder / "zarr.json").unlink()
    rewrite(cache / "geometry" / "scene.json", lambda body: [body["files"].pop(n) for n in ("coord/zarr.json",)])
    with pytest.raises(CacheError):
        open_cache(cache).read("one")
    rewrite(cache / "geometry" / "scene.json", lambda body: [body["files"].pop(n) for n in list(body["files"])])
    with pytest.raises(CacheError):
        open_cache(cache).read("one")
    assert not mark.exists()
    for codecs in ([{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}], [{"name": "numcodecs.zlib"}]):
        put(cache, folder / "zarr.json", json.dumps({**metadata, "codecs": codecs}).encode())
        with pytest.raises(CorruptCacheError, match=r"coord"):
            open_cache(cache).read("one")


def test_arrays_of_objects_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.array([Bomb(tmp_path / "mark")]), allow_pickle=True)
    with pytest.raises(DataError, match="not a readable array"):
        map_array(tmp_path / "labels.npy", "get it again")
    assert not (tmp_path / "mark").exists()


# --- no path leads out ----------------------------------------------------------------------------------------------


def test_names_of_a_cache_lead_nowhere_else(writer: CacheWriter, make_partition: Callable[..., Any]) -> None:
    """Ids may be anything; what is written and read stays below the cache."""
    root = writer.paths.root
    assert isinstance(root, Path)
    beside = set(root.parent.iterdir())
    for name in ("../../out", "/etc/out", "..", "a/../../b", "con\x00", "~/x"):
        make_partition(writer, name, [(name, 9)])
        assert len(open_cache(root).read(name).coord) == 9
    assert set(root.parent.iterdir()) == beside
    assert all(p.resolve().is_relative_to(root.resolve()) for p in root.rglob("*"))


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a/../b", "..", "a//b", "", ".hidden", "a\\..\\b", "a\0b", "x" * 999]
)
@pytest.mark.parametrize("field", ["files", "offsets", "arrays"])
def test_records_name_files_of_their_own_folder(cache: Path, field: str, name: str) -> None:
    path = cache / "geometry" / "scene.json"
    rewrite(
        path, lambda body: body[field].update({name: next(iter(body["arrays"].values())) if field == "arrays" else 1})
    )
    with pytest.raises(CorruptCacheError, match=rf"scene.json: {field}\[.*expected (the path|the name)"):
        GeometryRecord.from_json(path.read_bytes(), str(path))
    assert open_cache(cache).samples == []


def test_links_lead_to_nothing_without_end(cache: Path, tmp_path: Path) -> None:
    """A link may lead to where a file is kept, but not to a device or a pipe."""
    coord = chunk_of(cache, "coord")
    kept = coord.rename(tmp_path / "kept")
    coord.symlink_to(kept)
    assert len(open_cache(cache).read("one").coord) == 30
    os.mkfifo(tmp_path / "pipe")
    for target in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        coord.unlink()
        coord.symlink_to(target)
        rewrite(cache / "geometry" / "scene.json", lambda body: body["files"].update({"coord/c/0/0": 0}))
        with pytest.raises(CorruptCacheError, match="coord"):
            open_cache(cache).read("one")
        record = cache / "geometry" / "other.json"
        record.symlink_to(target)
        with pytest.raises(CacheError, match=r"other\.json"):
            open_cache(cache)
        record.unlink()


def test_a_video_is_no_list_of_other_files(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "secret.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    assert read_video_frame(tmp_path / "secret.mkv", 0, size=(64, 64), where="frame").shape == (64, 64, 3)
    (tmp_path / "rgb.mkv").write_text("ffconcat version 1.0\nfile secret.mkv\n")
    with pytest.raises(DataError, match="not a video"):
        read_video_frame(tmp_path / "rgb.mkv", 0, size=(64, 64), where="frame")


# --- no bombs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coord", "link_point"])
def test_chunks_that_announce_more_are_not_unpacked(cache: Path, name: str) -> None:
    """A gigabyte of zeros in some kilobytes, as Zstandard (coord) and Blosc (link_point)."""
    zeros = np.zeros(1 << 28, np.uint8)
    bomb = numcodecs.Zstd(checksum=True).encode(zeros)
    if name == "link_point":
        bomb = bytes(numcodecs.Blosc("zstd").encode(zeros))
        bomb = bytes(numcodecs.CRC32C(location="end").encode(bomb))
    del zeros
    put(cache, chunk_of(cache, name), bytes(bomb))
    with little_memory(1 << 27), pytest.raises(CorruptCacheError, match=rf"a chunk of \d+ bytes announces {1 << 28}"):
        open_cache(cache).read("one")


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**40, 3]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [50, 2**40]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 1]}}},
        {"shape": [2**40, 3]},
        {"data_type": "float64"},
        {"fill_value": 1.0},
        {
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": 1}},
            ]
        },
    ],
    ids=lambda change: next(iter(change)),
)
def test_metadata_of_arrays_is_such_as_we_write(cache: Path, change: dict[str, Any]) -> None:
    path = cache / "geometry" / "scene.zarr" / "coord" / "zarr.json"
    put(cache, path, json.dumps({**json.loads(path.read_text()), **change}).encode())
    with little_memory(), pytest.raises(CorruptCacheError, match=r"coord: "):
        open_cache(cache).read("one")


def test_headers_of_images_ask_for_no_memory(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    for side in (60_000, 9_000):  # beyond Pillow's limit, and beyond ours
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        path = tmp_path / f"{side}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
        assert side * side > MAX_PIXELS
        with little_memory(), pytest.raises(DataError, match=rf"{side}.png"):
            image_size(path)
        with little_memory(), pytest.raises(DataError, match=rf"{side}.png"):
            read_color(path, size=(side, side), where=str(path))


def test_images_of_other_formats_are_not_decoded(tmp_path: Path) -> None:
    """Pillow hands EPS to Ghostscript, whatever the file's name ends in."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "EPS"
    with pytest.raises(DataError, match="not a readable image"):
        read_color(tmp_path / "x.png", size=(8, 8), where="x")


def test_headers_of_clouds_ask_for_no_memory(tmp_path: Path) -> None:
    many = 2**60
    columns = "".join(f"property float {axis}\n" for axis in "xyz")
    files = {
        "a.ply": f"ply\nformat binary_little_endian 1.0\nelement vertex {many}\n{columns}end_header\n",
        "b.ply": f"ply\nformat ascii 1.0\nelement vertex {many}\n{columns}end_header\n0 0 0\n",
        "c.ply": f"ply\nformat ascii 1.0\nelement face {many}\nproperty int i\nelement vertex 1\n{columns}end_header\n",
        "d.pcd": f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {many}\nHEIGHT 1\nDATA binary\n",
        "e.pcd": "FIELDS x y z _\nSIZE 4 4 4 1\nTYPE F F F U\nCOUNT 1 1 1 2000000000\nPOINTS 1\nDATA ascii\n0 0 0\n",
        "f.pcd": "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 300000000\nHEIGHT 1\nDATA binary_compressed\n",
    }  # fmt: skip
    for name, text in files.items():
        tail = struct.pack("<II", 4, 3_600_000_000) + b"\0" * 4 if name == "f.pcd" else b""
        (tmp_path / name).write_bytes(text.encode() + tail)
        with little_memory(), pytest.raises(DataError, match=name):
            for _ in open_cloud(tmp_path / name).chunks(1 << 16):
                pass


def test_checkpoints_are_not_unpacked(tmp_path: Path) -> None:
    """torch writes archives without compression, but reads others, too."""
    torch.save({"format_version": 1, "model": {"a": torch.zeros(1 << 20)}}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
    load_checkpoint(tmp_path / "whole.pt")
    assert torch.load(tmp_path / "bomb.pt", weights_only=True), "torch no longer reads such archives"
    for read in (load_checkpoint, read_public_file, lambda p: load_weights(torch.nn.Linear(1, 1), "linear", p)):
        with pytest.raises((DataError, WeightsError)):
            read(tmp_path / "bomb.pt")


# --- no absurd values -----------------------------------------------------------------------------------------------

ARRAY = {"shape": [50, 3], "dtype": "<f4", "sha256": "0" * 64}
GEOMETRY_CHANGES = [
    ("samples", [{"id": "a", "split": "train", "points": -1, "linked_points": 0, "views": []}]),
    ("samples", [{"id": "a", "split": "train", "points": 2**62, "linked_points": 0, "views": []}]),
    ("samples", [{"id": "a", "split": "train", "points": 1.5, "linked_points": 0, "views": []}]),
    ("samples", [{"id": "a", "split": "train", "points": True, "linked_points": 0, "views": []}]),
    ("samples", [{"id": 7, "split": "train", "points": 50, "linked_points": 0, "views": []}]),
    ("samples", [{"id": "a", "split": "train", "points": 50, "linked_points": 0, "views": [{"id": "v", "links": -3}]}]),
    ("samples", [["a"]]),
    ("samples", {"a": 1}),
    ("samples", None),
    ("arrays", []),
    ("arrays", {}),
    ("arrays", {"coord": {**ARRAY, "dtype": "|O"}}),
    ("arrays", {"coord": {**ARRAY, "dtype": "|V8"}}),
    ("arrays", {"coord": {**ARRAY, "shape": [-50, 3]}}),
    ("arrays", {"coord": {**ARRAY, "shape": [2**62, 3]}}),
    ("arrays", {"coord": {**ARRAY, "shape": ["50", 3]}}),
    ("arrays", {"coord": {**ARRAY, "shape": [50, 2**31]}}),
    ("arrays", {"coord": {**ARRAY, "sha256": "../x"}}),
    ("arrays", {"coord": 3}),
    ("files", {"zarr.json": -1}),
    ("files", {"zarr.json": 2**62}),
    ("files", ["zarr.json"]),
    ("partition", 7),
    ("seconds", float("nan")),
    ("seconds", "1"),
]


@pytest.mark.parametrize(("field", "value"), GEOMETRY_CHANGES)
def test_records_of_absurd_values_are_refused(cache: Path, field: str, value: object) -> None:
    path = cache / "geometry" / "scene.json"
    body = json.loads(path.read_text())
    if field == "arrays" and value:
        value = {**body["arrays"], **value} if isinstance(value, dict) else value
    rewrite(path, lambda body: body.update({field: value}))
    with pytest.raises(CorruptCacheError, match=rf"scene.json: (fields are missing|{field}).*"):
        GeometryRecord.from_json(path.read_bytes(), str(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("dim", 0), ("dim", 2**40), ("grid", [1]), ("grid", [0, 5]), ("image_size", [1, 2, 3]), ("mean", [float("inf")]),
     ("layout", "other"), ("weights_sha256", "x"), ("name", None), ("norm", 1), ("std", {"a": 1})],
)  # fmt: skip
def test_models_of_absurd_values_are_refused(make_spec: Callable[..., VFMSpec], field: str, value: object) -> None:
    body = {**json.loads(make_spec().to_json()), field: value}
    with pytest.raises(CorruptCacheError, match=rf"here: {field}"):
        VFMSpec.from_json(signed(body), "here")


@pytest.mark.parametrize("cls", [GeometryRecord, FeatureRecord, VFMSpec])
@pytest.mark.parametrize("depth", [200, 900, 990, 100_000])
def test_documents_nested_deeply_are_refused(cls: type[Document], depth: int) -> None:
    text = f'{{"format_version": 1, "kind": "{cls.kind}", "x": {"[" * depth}{"]" * depth}, "checksum": ""}}'
    with pytest.raises(CorruptCacheError, match="here: "):
        cls.from_json(text, "here")


def test_a_record_that_promises_more_than_its_files_hold(cache: Path) -> None:
    """Chunks that are not there are zeros: a record of some bytes could ask for any amount of them."""
    path = cache / "geometry" / "scene.json"
    points = 2**31

    def change(body: dict[str, Any]) -> None:
        body["samples"] = [{"id": "a", "split": "train", "points": points, "linked_points": 0, "views": []}]
        body["arrays"] = {
            "coord": {**ARRAY, "shape": [points, 3]}, "source_index": {**ARRAY, "shape": [points], "dtype": "<u4"},
        }  # fmt: skip

    rewrite(path, change)
    with pytest.raises(CorruptCacheError, match="bytes in memory"):
        GeometryRecord.from_json(path.read_bytes(), str(path))


@pytest.mark.parametrize("name", ["link_point", "index"])
def test_indices_of_what_is_not_there(cache: Path, name: str) -> None:
    """Arrays with right checksums whose values would ask for gigabytes, or for rows behind the last."""
    record_file = next(cache.glob("features/*/scene.json")) if name == "index" else cache / "geometry" / "scene.json"
    group = record_file.with_suffix(".zarr")
    reader = open_cache(cache)
    spec = reader.resolve_vfm()
    infos = reader.geometry["scene"].arrays if name != "index" else reader.feature_record(spec, "scene").arrays  # type: ignore[union-attr]
    arrays = {n: np.zeros(i.shape, np.dtype(i.dtype)) for n, i in infos.items()}
    arrays[name][:] = np.iinfo(arrays[name].dtype).max
    shutil.rmtree(group)
    group.mkdir()
    fill_group(group, arrays)
    files = {p.relative_to(group).as_posix(): p.stat().st_size for p in group.rglob("*") if p.is_file()}
    said = {n: {"shape": i.shape, "dtype": i.dtype, "sha256": i.sha256} for n, i in array_infos(arrays).items()}
    rewrite(record_file, lambda body: body.update(files=files, arrays=json.loads(json.dumps(said)), checksums={}))
    if name == "link_point":
        digest = GeometryRecord.from_json(record_file.read_bytes(), "x").digest
        rewrite(next(cache.glob("features/*/scene.json")), lambda body: body.update(geometry_digest=digest))
    with little_memory(), pytest.raises(CorruptCacheError, match=rf"{name}: expected"):
        open_cache(cache).read("one", spec.key)


# --- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system ['true']", "constructor"),
        ("a: !!python/name:os.system", "constructor"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)), "values"),
        ("a: " + "[" * 50_000, "within each other"),
        ("a: " + "{b: " * 5_000, "within each other"),
        ("a: " + "9" * 5_000, "digits"),
        ("a: 2001-99-99", "month"),
        ("- x\n" * 300_000, "larger than"),
        ("a: \0", "not YAML"),
    ],
    ids=["call", "name", "laughs", "brackets", "braces", "digits", "date", "size", "null"],
)  # fmt: skip
def test_recipes_are_plain_values_within_limits(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with little_memory(), pytest.raises(DataError, match=rf"recipe .*recipe.yaml.*{words}|(?s:.*{words})"):
        load_recipe(str(path))


def test_recipes_that_extend_each_other_many_times(tmp_path: Path) -> None:
    """Each file is read once: twice each, forty of them would be read a million million times."""
    for i in range(40):
        (tmp_path / f"r{i}.yaml").write_text(f"extends: [r{i + 1}.yaml, r{i + 1}.yaml]\nseed: {i}\n")
    (tmp_path / "r40.yaml").write_text("seed: -1\n")
    with pytest.raises(UsageError, match="data: field required"):
        load_recipe(str(tmp_path / "r0.yaml"))
    for i in range(40, 60):
        (tmp_path / f"r{i}.yaml").write_text(f"extends: r{i + 1}.yaml\n")
    with pytest.raises(UsageError, match="more than 50 files"):
        load_recipe(str(tmp_path / "r0.yaml"))
