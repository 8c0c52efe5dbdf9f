"""Bad input: a clear error or a recorded failure, never a traceback, never a damaged cache."""

from __future__ import annotations

import errno
import io
import json
import resource
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditr_cache.files
from ditr_cache import arrays, open_cache
from ditr_cache.datasets.ply import read_ply, write_ply
from ditr_cache.verify import verify
from support import Outcome, Run

ROOMS = ["scene0000_00", "scene0001_00", "scene0002_00"]
BAD = ROOMS[1]
OTHERS = [ROOMS[0], ROOMS[2]]


@pytest.fixture
def root(tiny_rooms: Path, tmp_path: Path) -> Path:
    """A copy of three rooms, to be damaged."""
    return shutil.copytree(tiny_rooms, tmp_path / "rooms")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def extract(run: Run, root: Path, cache: Path, make_checkpoint: Callable[..., Path]) -> Run:
    """Extract the rooms into `cache`; later flags win."""

    def call(*more: object) -> Outcome:
        named = ("--dataset", "rooms", "--root", root, "--out", cache, "--vfm", "test_vit", "--image-size", "32x48")
        return run("extract", *named, "--checkpoint", make_checkpoint(), "--workers", 0, "--json", *more)

    return call


def refused(outcome: Outcome, *parts: object) -> None:
    """Exit 2, one message on stderr that holds `parts`, nothing on stdout."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert [str(p) for p in parts if str(p) not in outcome.err] == [], outcome.err


def sample_failed(outcome: Outcome, cache: Path, *parts: object) -> None:
    """Room `BAD` failed with a message that holds `parts`; the others are done and the cache is clean."""
    assert outcome.code == 1, outcome
    assert outcome.json["partitions"] == {"done": 2, "reused": 0, "failed": 1}
    (failure,) = outcome.json["failures"]
    assert (failure["sample"], failure["view"]) == (BAD, None)
    assert [str(p) for p in parts if str(p) not in failure["error"]] == [], failure["error"]
    reader = open_cache(cache)
    assert reader.samples_with() == OTHERS
    assert verify(cache).clean


def view_failed(outcome: Outcome, cache: Path, view: str, *parts: object) -> None:
    """A view of room `BAD` was left out with a message that holds `parts`; all rooms are done."""
    assert outcome.code == 1, outcome
    assert outcome.json["partitions"] == {"done": 3, "reused": 0, "failed": 0}
    (failure,) = outcome.json["failures"]
    assert (failure["sample"], failure["view"]) == (BAD, view)
    assert [str(p) for p in parts if str(p) not in failure["error"]] == [], failure["error"]
    assert open_cache(cache).samples_with() == ROOMS
    assert open_cache(cache).read(BAD).valid.any()
    assert verify(cache).clean


def truncate(path: Path, keep: float = 0.5) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


# --- the request ----------------------------------------------------------------------------------------------------


def test_missing_root(extract: Run, cache: Path, tmp_path: Path) -> None:
    refused(extract("--root", tmp_path / "nowhere"), "'rooms'", tmp_path / "nowhere", "--root")
    (tmp_path / "file").touch()
    refused(extract("--root", tmp_path / "file"), tmp_path / "file")
    assert not cache.exists()


@pytest.mark.parametrize("dataset", ["scannet", "rgbd", "rooms"])
def test_empty_dataset(extract: Run, cache: Path, tmp_path: Path, dataset: str) -> None:
    (tmp_path / "empty/scans").mkdir(parents=True)
    refused(extract("--dataset", dataset, "--root", tmp_path / "empty"), f"'{dataset}'", tmp_path / "empty")
    (tmp_path / "empty/scans").rmdir()
    refused(extract("--dataset", dataset, "--root", tmp_path / "empty"), f"'{dataset}'", tmp_path / "empty")
    assert not cache.exists()


def test_unknown_dataset(extract: Run, cache: Path) -> None:
    refused(extract("--dataset", "scanet"), "'scanet'", "'scannet'")
    refused(extract("--dataset", "xyzzy"), "known: nuscenes, posed, rgbd, rooms, s3dis, scannet")
    assert not cache.exists()


def test_unknown_vfm(extract: Run, cache: Path) -> None:
    refused(extract("--vfm", "dinov2-lage"), "'dinov2-lage'", "'dinov2-large'")
    refused(extract("--vfm", "vit_smal_patch14_dinov2"), "'vit_small_patch14_dinov2'")
    assert not cache.exists()


def test_image_size_that_is_no_multiple_of_the_patch(extract: Run, cache: Path) -> None:
    refused(extract("--image-size", "420x560"), "multiples of its patch of 16", "--image-size 416x560")
    assert not cache.exists()


def test_cuda_that_is_absent(extract: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        refused(extract("--device", device), f"'{device}'", "no CUDA device", "--device cpu")
    refused(extract("--device", "gpu"), "'gpu'", "auto, cpu, cuda")
    assert not cache.exists()


def test_no_weights(run: Run, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network and checkpoint: the three ways to get weights."""
    monkeypatch.setattr("ditr_cache.weights._reachable", lambda endpoint: False)
    outcome = run("extract", "--dataset", "rooms", "--root", root, "--out", cache, "--vfm", "test_vit")
    refused(outcome, "no weights for 'test_vit'", "hub", "--checkpoint FILE", "efficientnet-lite0")
    assert not cache.exists()


def test_checkpoints_that_do_not_serve(
    extract: Run, cache: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    refused(extract("--checkpoint", tmp_path / "none.pt"), tmp_path / "none.pt", "does not exist")
    whole = make_checkpoint()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:5000])
    refused(extract("--checkpoint", cut), cut, "cannot be read")
    cut.rename(tmp_path / "cut.safetensors")
    refused(extract("--checkpoint", tmp_path / "cut.safetensors"), "cannot be read")
    refused(extract("--checkpoint", make_checkpoint("test_efficientnet")), "do not fit", "missing", "unexpected")
    state = torch.load(whole, weights_only=True)
    name = next(iter(state))
    torch.save({**state, name: state[name][..., :1]}, tmp_path / "shape.pt")
    refused(extract("--checkpoint", tmp_path / "shape.pt"), "of another shape", name)
    torch.save({"state_dict": state, "when": cut}, tmp_path / "objects.pt")  # a pathlib.Path needs pickle
    refused(extract("--checkpoint", tmp_path / "objects.pt"), "without pickled objects")
    assert not cache.exists()


def test_weights_that_give_nan(extract: Run, cache: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    state = torch.load(make_checkpoint(), weights_only=True)
    state["norm.weight"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    outcome = extract("--checkpoint", tmp_path / "nan.pt")
    assert outcome.code == 1
    assert outcome.json["partitions"] == {"done": 0, "reused": 0, "failed": 3}
    assert all("NaN" in f["error"] for f in outcome.json["failures"])
    assert verify(cache).clean


# --- where the cache goes -------------------------------------------------------------------------------------------


def test_unwritable_out(extract: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before any work: a path below a file, a folder without permission, a folder that holds other things."""
    (tmp_path / "file").write_text("x")
    outcome = extract("--out", tmp_path / "file/cache")
    assert outcome.code == 2 and outcome.out == ""
    assert str(tmp_path / "file") in outcome.err and "Not a directory" in outcome.err

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(ditr_cache.files.tempfile, "mkstemp", denied)
        outcome = extract("--out", tmp_path / "denied")
    assert outcome.code == 2 and outcome.out == ""
    assert "Permission denied; make it writable or choose another --out" in outcome.err

    refused(extract("--out", tmp_path), "is not empty and not a cache", "--out")
    refused(extract("--out", "s3://bucket/cache"), "s3")


def written_calls(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> list[int]:
    """Make the call number `fail_at` to write an array or to flush to the disk find it full."""
    calls = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] >= fail_at:  # it stays full
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(arrays, "_write_array", counted(arrays._write_array))
    monkeypatch.setattr(ditr_cache.store.os, "fsync", counted(ditr_cache.store.os.fsync))
    return calls


@pytest.mark.parametrize("fail_at", [3, 20, 60, 110, 140])
def test_full_disk(extract: Run, cache: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    """The run stops and says why; what was committed stays, and the same command goes on later."""
    with monkeypatch.context() as patch:
        written_calls(patch, fail_at)
        outcome = extract()
    assert outcome.code == 1
    (failure,) = outcome.json["failures"]
    assert "No space left on device" in failure["error"] and "the same command then continues" in failure["error"]
    assert outcome.json["partitions"]["failed"] == 1, "a full disk ends the run at once"
    assert verify(cache).clean
    assert [p for p in cache.rglob(".*") if p.name.endswith(".tmp")] == []
    resumed = extract()
    assert resumed.code == 0
    assert sum(resumed.json["partitions"].values()) == 3
    assert resumed.json["partitions"]["reused"] == outcome.json["partitions"]["done"]
    assert verify(cache).clean


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The operating system itself refuses to let any file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_system_refuses_to_write(extract: Run, cache: Path) -> None:
    with files_at_most(20_000):
        outcome = extract()
    assert outcome.code == 1
    assert "File too large" in outcome.json["failures"][0]["error"]
    assert "the same command continues" in outcome.json["failures"][0]["error"]
    assert verify(cache).clean
    assert extract().code == 0


def test_a_cache_of_a_newer_format(extract: Run, run: Run, cache: Path, tmp_path: Path) -> None:
    extract("--limit", 1)
    documents = (cache / "cache.json", cache / f"geometry/{ROOMS[0]}.json", *cache.glob("features/*/vfm.json"))
    for document in documents:
        text = document.read_text()
        document.write_text(text.replace('"format_version": 1', '"format_version": 2'))
        for outcome in (
            extract("--limit", 1),
            extract("--limit", 1, "--dry-run"),
            run("info", cache),
            run("verify", cache),
            run("verify", cache, "--repair"),
            run("show", cache, ROOMS[0], "-o", tmp_path / "x.png"),
        ):
            if document.name == "vfm.json" and outcome.code == 0:
                continue  # a command that need not read this document
            refused(outcome, document, "format version 2", "upgrade ditr")
        assert '"format_version": 2' in document.read_text(), "never repaired away"
        document.write_text(text)
    assert verify(cache).clean


def test_features_of_another_geometry(
    extract: Run, run: Run, cache: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    """Same shape, same VFM, other points: refused by every reader, found by verify, rebuilt by extract."""
    extract("--limit", 1)
    extract("--limit", 1, "--out", tmp_path / "other", "--max-views", 2)
    for end in (".json", ".zarr"):
        target, source = cache / f"geometry/{ROOMS[0]}{end}", tmp_path / f"other/geometry/{ROOMS[0]}{end}"
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    refused(run("show", cache, ROOMS[0], "-o", tmp_path / "x.png"), "geometry", "digest", "extract")
    report = run("verify", cache, "--json")
    assert (report.code, len(report.json["mismatched"])) == (1, 1)
    again = extract("--limit", 1)
    assert (again.code, again.json["geometry"]) == (0, {"computed": 0, "reused": 1})
    assert verify(cache).clean


# --- the data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["color", "depth"])
@pytest.mark.parametrize("keep", [0, 0.6])
def test_truncated_jpeg_or_png(extract: Run, root: Path, cache: Path, kind: str, keep: float) -> None:
    image = truncate(next((root / "scans" / BAD / kind).glob("1.*")), keep)
    view_failed(extract(), cache, "1", image)


def test_image_of_another_size(extract: Run, root: Path, cache: Path) -> None:
    path = root / "scans" / BAD / "color/2.jpg"
    Image.new("RGB", (97, 64)).save(path)
    view_failed(extract(), cache, "2", path, "97x64")


@pytest.mark.parametrize("name", ["_vh_clean_2.ply", "_vh_clean_2.labels.ply"])
@pytest.mark.parametrize("keep", [0.001, 0.999])
def test_truncated_ply(extract: Run, root: Path, cache: Path, name: str, keep: float) -> None:
    path = truncate(root / "scans" / BAD / f"{BAD}{name}", keep)
    sample_failed(extract(), cache, path)


def test_ply_header_that_promises_more(extract: Run, root: Path, cache: Path) -> None:
    path = root / "scans" / BAD / f"{BAD}_vh_clean_2.ply"
    count = read_ply(path).num_vertices
    for promised in (count + 10**6, 10**15):
        data = path.read_bytes()
        path.write_bytes(data.replace(f"element vertex {count}\n".encode(), f"element vertex {promised}\n".encode()))
        sample_failed(extract("--out", cache.with_name(f"cache-{promised}")),
                      cache.with_name(f"cache-{promised}"), path, "truncated")  # fmt: skip
        path.write_bytes(data)


def test_nan_points(extract: Run, root: Path, cache: Path) -> None:
    path = root / "scans" / BAD / f"{BAD}_vh_clean_2.ply"
    mesh = read_ply(path)
    mesh.vertices["y"][[7, 9]] = np.nan, np.inf
    write_ply(path, mesh.vertices, mesh.faces)
    sample_failed(extract(), cache, path, "2 of", "first at index 7")


def test_labels_of_another_length(extract: Run, root: Path, cache: Path) -> None:
    path = root / "scans" / BAD / f"{BAD}_vh_clean_2.labels.ply"
    mesh = read_ply(path)
    write_ply(path, {name: column[:-1] for name, column in mesh.vertices.items()})
    count = mesh.num_vertices
    sample_failed(extract(), cache, path, f"{count - 1} labels for the {count} vertices")


@pytest.mark.parametrize(
    "matrix", ["0 0 48\n0 0 32\n0 0 1\n", "nan 0 48\n0 70 32\n0 0 1\n", "70 0 48\n0 -70 32\n0 0 1"]
)
@pytest.mark.parametrize("kind", ["color", "depth"])
def test_singular_intrinsics(extract: Run, root: Path, cache: Path, kind: str, matrix: str) -> None:
    path = root / "scans" / BAD / f"intrinsic/intrinsic_{kind}.txt"
    assert path.is_file()
    path.write_text(matrix)
    sample_failed(extract(), cache, path)


def nothing_seen(outcome: Outcome, cache: Path, *parts: object) -> None:
    """Room `BAD` is committed with its points and no feature, and said to be incomplete."""
    assert outcome.code == 1, outcome
    assert outcome.json["partitions"] == {"done": 3, "reused": 0, "failed": 0}
    failure = outcome.json["failures"][-1]
    assert (failure["sample"], failure["view"]) == (BAD, None)
    assert [str(p) for p in parts if str(p) not in failure["error"]] == [], failure["error"]
    sample = open_cache(cache).read(BAD)
    assert len(sample.coord) > 100 and not sample.valid.any() and not sample.link_count.any()
    assert sample.feature is not None and sample.feature.shape == (len(sample.coord), 64)
    assert verify(cache).clean


def test_zero_views(extract: Run, run: Run, root: Path, cache: Path, tmp_path: Path) -> None:
    for image in (root / "scans" / BAD / "color").iterdir():
        image.unlink()
    nothing_seen(extract(), cache, "0 usable views")
    assert run("show", cache, BAD, "-o", tmp_path / "x.png").code == 0
    info = json.loads(run("info", cache, "--json").out)
    assert (info["samples"], info["incomplete"]) == (3, 1)


def test_no_frames_at_all(extract: Run, root: Path, cache: Path) -> None:
    """The points are kept, without features, and the file that is missing is named."""
    for kind in ("color", "depth", "pose", "intrinsic"):
        shutil.rmtree(root / "scans" / BAD / kind)
    outcome = extract()
    nothing_seen(outcome, cache)
    assert f"{BAD}.sens" in outcome.json["failures"][0]["error"]


def test_all_points_invisible(extract: Run, root: Path, cache: Path) -> None:
    """Cameras a hundred metres away; the message says what to look at."""
    for path in (root / "scans" / BAD / "pose").iterdir():
        pose = np.eye(4)
        pose[:3, 3] = 100, 100, 100
        np.savetxt(path, pose)
    nothing_seen(extract(), cache, "is visible in any of its 4 usable views", "poses, depth units and depth range")


def test_all_poses_lost(extract: Run, root: Path, cache: Path) -> None:
    for path in (root / "scans" / BAD / "pose").iterdir():
        np.savetxt(path, np.full((4, 4), -np.inf))
    nothing_seen(extract(), cache, "0 usable views (of 4)")


@pytest.mark.parametrize("text", ["", "1 2 3", "a b c d\n" * 4, "2 0 0 0\n0 2 0 0\n0 0 2 0\n0 0 0 1\n"])
def test_pose_that_is_none(extract: Run, root: Path, cache: Path, text: str) -> None:
    path = root / "scans" / BAD / "pose/1.txt"
    path.write_text(text)
    view_failed(extract(), cache, "1", path)


def to_sens(scan: Path) -> Path:
    """Replace a scan's exported frames by a .sens file; returns it."""
    frames = sorted(int(p.stem) for p in (scan / "color").iterdir())
    matrices = [np.loadtxt(scan / f"intrinsic/intrinsic_{kind}.txt") for kind in ("color", "depth")]
    header = b"".join(m.astype("<f4").tobytes() for m in (matrices[0], np.eye(4), matrices[1], np.eye(4)))
    sizes: list[int] = []
    for kind, name in (("color", f"{frames[0]}.jpg"), ("depth", f"{frames[0]}.png")):
        with Image.open(scan / kind / name) as image:
            sizes += image.size
    body = io.BytesIO()
    body.write(struct.pack("<IQ", 4, 4) + b"test" + header)
    body.write(struct.pack("<2i4IfQ", 2, 1, *sizes, 1000.0, len(frames) * 10))
    for frame in range(10 * len(frames)):  # of a .sens file every tenth frame is taken
        number = frames[frame // 10]
        color = (scan / f"color/{number}.jpg").read_bytes()
        with Image.open(scan / f"depth/{number}.png") as image:
            depth = zlib.compress(np.asarray(image).astype("<u2").tobytes())
        body.write(np.loadtxt(scan / f"pose/{number}.txt").astype("<f4").tobytes())
        body.write(struct.pack("<4Q", 0, 0, len(color), len(depth)) + color + depth)
    for kind in ("color", "depth", "pose", "intrinsic"):
        shutil.rmtree(scan / kind)
    path = scan / f"{scan.name}.sens"
    path.write_bytes(body.getvalue())
    return path


def test_sens_damaged_and_whole(extract: Run, root: Path, cache: Path) -> None:
    """A file that was cut fails its sample, a damaged frame its view; whole, it gives what its frames gave."""
    frames = open_cache(cache) if extract("--out", cache).code == 0 else None
    assert frames is not None
    path = to_sens(root / "scans" / BAD)
    whole = path.read_bytes()

    whole_cache = cache.with_name("whole")
    outcome = extract("--out", whole_cache)
    assert outcome.code == 0, outcome
    np.testing.assert_array_equal(open_cache(whole_cache).read(BAD).feature, frames.read(BAD).feature)

    for keep in (0, 3, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        cut = cache.with_name(f"cut-{keep}")
        sample_failed(extract("--out", cut), cut, path)

    start = whole.index(b"\xff\xd8\xff", len(whole) // 3)  # of a later JPEG; frames 20 to 29 hold the same one
    image = whole[start : whole.index(b"\xff\xd9", start) + 2]
    damaged = whole.replace(image, bytes(len(image)))
    path.write_bytes(damaged)
    broken = cache.with_name("broken")
    outcome = extract("--out", broken)
    view = outcome.json["failures"][0]["view"]
    assert view in ("10", "20")
    view_failed(outcome, broken, view, path, f"frame {view}")


def test_rgbd_capture_without_intrinsics_or_poses(extract: Run, cache: Path, tmp_path: Path) -> None:
    capture = tmp_path / "captures/room"
    capture.mkdir(parents=True)
    for frame in range(2):
        Image.new("RGB", (64, 48), (90, 60, 30)).save(capture / f"frame-00000{frame}.color.png")
        Image.fromarray(np.full((48, 64), 1500, np.uint16)).save(capture / f"frame-00000{frame}.depth.png")
        np.savetxt(capture / f"frame-00000{frame}.pose.txt", np.eye(4))
    arguments = ("--dataset", "rgbd", "--root", tmp_path / "captures")
    outcome = extract(*arguments)
    assert outcome.code == 1
    assert "camera-intrinsics.txt" in outcome.json["failures"][0]["error"]
    (capture / "camera-intrinsics.txt").write_text("60 0 32\n0 60 24\n0 0 1\n")
    (capture / "frame-000001.pose.txt").unlink()
    outcome = extract(*arguments)
    assert (outcome.code, outcome.json["partitions"]["done"]) == (1, 1)
    (failure,) = outcome.json["failures"]
    assert (failure["sample"], failure["view"]) == ("room", "frame-000001")
    assert "frame-000001.pose.txt" in failure["error"]
    assert open_cache(cache).read("room").valid.mean() > 0.9
    assert verify(cache).clean
