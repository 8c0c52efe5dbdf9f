"""`ditr-cache extract` run after run: what is reused, what is redone, what settings mean."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from ditr_cache import cli, open_cache
from ditr_cache.errors import UsageError
from ditr_cache.partition import PartitionWorker
from support import Run, assert_same, contents

Outcome = tuple[int, dict[str, Any], str]
Extract = Callable[..., Outcome]
ROOMS = ["scene0000_00", "scene0001_00", "scene0002_00"]


@pytest.fixture
def extract(
    tiny_rooms: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    run: Run,
) -> Extract:
    """`ditr-cache extract` of the tiny rooms with a tiny ViT, in this process: exit code, JSON object, stderr."""

    def call(*more: object, out: str = "cache", vfm: str = "test_vit", seed: int = 0) -> Outcome:
        named = ["--dataset", "rooms", "--root", tiny_rooms, "--out", tmp_path / out, "--vfm", vfm, "--workers", 0]
        named += ["--checkpoint", make_checkpoint(vfm, seed), "--image-size", "32x64", "--json"]
        outcome = run("extract", *named, *more)
        return outcome.code, outcome.json if outcome.out else {}, outcome.err

    return call


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("called, but geometry was there")


# --- again and again ------------------------------------------------------------------------------------------------


def test_a_second_run_reuses_everything(extract: Extract, tmp_path: Path) -> None:
    code, first, _ = extract()
    assert (code, first["partitions"]) == (0, {"done": 3, "reused": 0, "failed": 0})
    assert (first["geometry"], first["images"]) == ({"computed": 3, "reused": 0}, 12)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    code, second, _ = extract()
    assert (code, second["partitions"]) == (0, {"done": 0, "reused": 3, "failed": 0})
    assert second["geometry"] == {"computed": 0, "reused": 3}
    assert (second["images"], second["points"], second["bytes"]) == (0, 0, 0)
    assert second["coverage"] == first["coverage"] > 0.1
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()} == written


def test_an_interrupted_run_goes_on(extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PartitionWorker._make_features
    first_is_committed = Event()

    def stop(self: PartitionWorker, geometry: Any, *arguments: Any) -> Any:
        if geometry.partition == "scene0002_00":  # the second of three; its geometry is committed by now
            assert first_is_committed.wait(60)
            raise KeyboardInterrupt
        record = whole(self, geometry, *arguments)
        first_is_committed.set()
        return record

    with monkeypatch.context() as patch:
        patch.setattr(PartitionWorker, "_make_features", stop)
        assert extract()[0] == 1
    code, resumed, _ = extract()
    # The third was begun when the first was done, and got as far as it did.
    assert code == 0 and resumed["partitions"]["reused"] in (1, 2)
    assert resumed["partitions"]["done"] == 3 - resumed["partitions"]["reused"]
    assert resumed["geometry"]["reused"] >= 2
    extract(out="clean")
    assert_same(tmp_path / "cache", tmp_path / "clean")


def test_another_vfm_reuses_geometry(extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens no depth map, reads no points and projects nothing."""
    extract()
    geometry = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache/geometry").rglob("*")}
    for target in (
        "ditr_cache.datasets.scannet.dataset.read_depth",
        "ditr_cache.datasets.scannet.dataset.read_ply",
        "ditr_cache.datasets.scannet.dataset.read_mesh_points",
        "ditr_cache.link.project",
        "ditr_cache.link.to_camera",
        "ditr_cache.geometry_partition.link_view",
        "ditr_cache.partition.make_geometry",
        "ditr_cache.geometry_partition.morton_order",
    ):
        monkeypatch.setattr(target, refuse)
    code, totals, _ = extract(vfm="test_efficientnet")
    assert (code, totals["partitions"]) == (0, {"done": 3, "reused": 0, "failed": 0})
    assert (totals["geometry"], totals["images"]) == ({"computed": 0, "reused": 3}, 12)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache/geometry").rglob("*")} == geometry


def test_a_cache_of_several_vfms_is_read_by_key_or_name(extract: Extract, tmp_path: Path) -> None:
    extract("--limit", 1)
    extract("--limit", 1, vfm="test_efficientnet")
    extract("--limit", 1, seed=1)  # the same name with other weights
    cache = open_cache(tmp_path / "cache")
    assert len(cache.vfms) == 3
    with pytest.raises(UsageError, match="several VFMs, name one by its key"):
        cache.read(ROOMS[0])
    with pytest.raises(UsageError, match="several VFMs named 'test_vit'"):
        cache.read(ROOMS[0], vfm="test_vit")
    assert cache.read(ROOMS[0], vfm="test_efficientnet")["feature"].shape[1] == 48
    one, two = (cache.read(ROOMS[0], vfm=key) for key, spec in cache.vfms.items() if spec.name == "test_vit")
    np.testing.assert_array_equal(one.coord, two.coord)
    np.testing.assert_array_equal(one.valid, two.valid)
    assert np.abs(one["feature"] - two["feature"]).max() > 0.1
    assert all(cache.samples_with(key) == [ROOMS[0]] for key in cache.vfms)


# --- choice of partitions and views ---------------------------------------------------------------------------------


def test_limit_and_split_choose_partitions_and_the_rest_follows(extract: Extract, tmp_path: Path) -> None:
    assert extract("--limit", 1)[1]["partitions"] == {"done": 1, "reused": 0, "failed": 0}
    assert open_cache(tmp_path / "cache").samples == ROOMS[:1]
    assert extract("--limit", 2)[1]["partitions"] == {"done": 1, "reused": 1, "failed": 0}
    assert open_cache(tmp_path / "cache").splits == ["train"]
    assert extract("--split", "val")[1]["partitions"] == {"done": 1, "reused": 0, "failed": 0}
    cache = open_cache(tmp_path / "cache")
    assert (cache.split_ids("val"), cache.split_ids("train")) == ([ROOMS[1]], [ROOMS[0], ROOMS[2]])
    assert extract("--split", "train", "--split", "val")[1]["partitions"] == {"done": 0, "reused": 3, "failed": 0}
    code, _, error = extract("--split", "trian")
    assert code == 2
    assert "'train'" in error


@pytest.mark.parametrize(
    ("flags", "views"),
    [
        (("--every-nth-frame", 2), ["0", "2"]),
        (("--every-nth-frame", 9), ["0"]),
        (("--max-views", 1), ["0"]),
        (("--max-views", 2), ["0", "3"]),
        (("--max-views", 9), ["0", "1", "2", "3"]),
        (("--every-nth-frame", 2, "--max-views", 1), ["0"]),
    ],
)
def test_frames_are_selected(extract: Extract, tmp_path: Path, flags: tuple[object, ...], views: list[str]) -> None:
    _, totals, _ = extract("--limit", 1, *flags)
    info = open_cache(tmp_path / "cache").sample_info(ROOMS[0])
    assert [v.id for v in info.views] == views
    assert totals["images"] == sum(bool(v.links) for v in info.views)


@pytest.mark.parametrize(
    ("flag", "setting", "value"),
    [
        ("--every-nth-frame", "every_nth_frame", 2),
        ("--max-views", "max_views", 1),
        ("--occlusion-tolerance", "occlusion_tolerance", 0.05),
        ("--depth-min", "depth_min", 0.5),
        ("--depth-max", "depth_max", 3.0),
    ],
)
def test_link_settings_belong_to_the_cache(
    extract: Extract, tmp_path: Path, flag: str, setting: str, value: float
) -> None:
    extract("--limit", 1, flag, value)
    assert getattr(open_cache(tmp_path / "cache").metadata.links, setting) == value
    # Not given, they are the cache's; given again, they have to be.
    assert extract("--limit", 1)[1]["partitions"] == {"done": 0, "reused": 1, "failed": 0}
    assert extract("--limit", 1, flag, value)[1]["partitions"] == {"done": 0, "reused": 1, "failed": 0}
    before = contents(tmp_path / "cache")
    code, totals, error = extract("--limit", 1, flag, value + 1)
    assert (code, totals) == (2, {})
    assert f"links.{setting}: the cache has {value!r}, asked for {value + 1!r}" in error
    assert contents(tmp_path / "cache").keys() == before.keys()


def test_an_empty_range_of_depth_is_refused_before_any_work(extract: Extract, tmp_path: Path) -> None:
    code, _, error = extract("--depth-min", 2, "--depth-max", 1)
    assert code == 2 and "nearer than --depth-max 1 and farther than --depth-min 2" in error
    assert not (tmp_path / "cache").exists()


def test_a_cache_belongs_to_one_dataset(extract: Extract) -> None:
    extract("--limit", 1)
    code, _, error = extract("--dataset", "scannet")
    assert code == 2
    assert "is of dataset 'rooms', asked for 'scannet'; use another --out" in error and "class" not in error


# --- fuse and codec -------------------------------------------------------------------------------------------------


def test_fuse_and_codec_are_stores_of_their_own(extract: Extract, tmp_path: Path) -> None:
    for fuse in ("mean", "last", "nearest"):
        for codec in ("float16", "int8"):
            _, totals, _ = extract("--limit", 1, "--fuse", fuse, "--codec", codec)
            assert totals["partitions"]["done"] == 1
    cache = open_cache(tmp_path / "cache")
    read = {(spec.fuse, spec.codec): cache.read(ROOMS[0], vfm=key) for key, spec in cache.vfms.items()}
    assert len(read) == 6
    exact = {fuse: read[fuse, "float16"] for fuse in ("mean", "last", "nearest")}
    for fuse, sample in exact.items():
        # float16 and int8 are two roundings of the same rows.
        peak = np.abs(sample["feature"]).max(axis=1, keepdims=True)
        bound = peak / 127 / 2 + np.abs(sample["feature"]) * 2**-11 + 1e-5
        assert (np.abs(read[fuse, "int8"]["feature"] - sample["feature"]) <= bound + peak * 2**-10).all()
        np.testing.assert_array_equal(sample.valid, exact["mean"].valid)
    once, often = exact["mean"].link_count == 1, exact["mean"].link_count > 1
    assert once.any() and often.any()
    for fuse in ("last", "nearest"):
        # Where one view sees a point there is nothing to reduce.
        np.testing.assert_array_equal(exact[fuse]["feature"][once], exact["mean"]["feature"][once])
        assert np.abs(exact[fuse]["feature"][often] - exact["mean"]["feature"][often]).max() > 1e-3


# --- what fails and what is incomplete ------------------------------------------------------------------------------


@pytest.fixture
def rooms(tiny_rooms: Path, tmp_path: Path) -> Path:
    """A copy of the rooms, to be damaged."""
    return shutil.copytree(tiny_rooms, tmp_path / "rooms")


def info(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["ditr-cache", "info", str(cache), "--json"])
    capsys.readouterr()
    cli.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("kind", ["color", "depth"])
def test_retry_incomplete_completes_a_sample_once_its_view_is_mended(
    extract: Extract,
    rooms: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    image = next((rooms / "scans" / ROOMS[2] / kind).glob("2.*"))
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])

    code, totals, _ = extract("--root", rooms)
    assert (code, totals["partitions"]) == (1, {"done": 3, "reused": 0, "failed": 0})
    assert [(f["sample"], f["view"]) for f in totals["failures"]] == [(ROOMS[2], "2")]
    assert totals["images"] == 11
    found = info(tmp_path / "cache", capsys, monkeypatch)
    # A colour image costs features only; without its depth a view cannot be linked, so geometry lacks it.
    expected = (0, 1) if kind == "color" else (1, 0)
    assert (found["incomplete"], found["vfms"][0]["incomplete"]) == expected
    assert open_cache(tmp_path / "cache").read(ROOMS[2]).valid.any()

    # Without --retry-incomplete it stays as it is; with it, and the file still broken, so does what it says.
    assert extract("--root", rooms)[1]["partitions"] == {"done": 0, "reused": 3, "failed": 0}
    code, totals, _ = extract("--root", rooms, "--retry-incomplete")
    assert (code, totals["partitions"]) == (1, {"done": 1, "reused": 2, "failed": 0})
    assert [(f["sample"], f["view"]) for f in totals["failures"]] == [(ROOMS[2], "2")]

    image.write_bytes(whole)
    code, totals, _ = extract("--root", rooms, "--retry-incomplete")
    assert (code, totals["partitions"]) == (0, {"done": 1, "reused": 2, "failed": 0})
    assert (totals["geometry"]["computed"], totals["images"], totals["failures"]) == (1, 4, [])
    found = info(tmp_path / "cache", capsys, monkeypatch)
    assert (found["incomplete"], found["vfms"][0]["incomplete"]) == (0, 0)
    extract(out="clean")
    assert_same(tmp_path / "cache", tmp_path / "clean")
    assert extract("--root", rooms, "--retry-incomplete")[1]["partitions"] == {"done": 0, "reused": 3, "failed": 0}


def test_features_of_geometry_that_was_completed_are_made_again(extract: Extract, rooms: Path, tmp_path: Path) -> None:
    """Geometry that a retry changed outdates the other VFM's features: they are rebuilt, never mixed up."""
    depth = rooms / "scans" / ROOMS[0] / "depth/1.png"
    whole = depth.read_bytes()
    depth.write_bytes(whole[:100])
    extract("--root", rooms)
    extract("--root", rooms, vfm="test_efficientnet")
    depth.write_bytes(whole)
    assert extract("--root", rooms, "--retry-incomplete")[1]["partitions"]["done"] == 1
    code, totals, _ = extract("--root", rooms, vfm="test_efficientnet")
    assert (code, totals["partitions"]) == (0, {"done": 1, "reused": 2, "failed": 0})
    assert totals["geometry"] == {"computed": 0, "reused": 3}
    extract(out="clean")
    extract(out="clean", vfm="test_efficientnet")
    assert_same(tmp_path / "cache", tmp_path / "clean")


def test_a_broken_sample_fails_and_the_others_go_on(extract: Extract, rooms: Path, tmp_path: Path) -> None:
    mesh = rooms / "scans" / ROOMS[0] / f"{ROOMS[0]}_vh_clean_2.ply"
    whole = mesh.read_bytes()
    mesh.write_bytes(whole[: len(whole) // 3])
    code, totals, _ = extract("--root", rooms)
    assert (code, totals["partitions"]) == (1, {"done": 2, "reused": 0, "failed": 1})
    (failure,) = totals["failures"]
    assert (failure["sample"], failure["view"]) == (ROOMS[0], None)
    assert str(mesh) in failure["error"]
    assert open_cache(tmp_path / "cache").samples == ROOMS[1:]
    # Nothing was committed, so no --retry-incomplete is needed.
    mesh.write_bytes(whole)
    code, totals, _ = extract("--root", rooms)
    assert (code, totals["partitions"]) == (0, {"done": 1, "reused": 2, "failed": 0})
    extract(out="clean")
    assert_same(tmp_path / "cache", tmp_path / "clean")


def test_images_gone_between_two_vfms_fail_one_sample(extract: Extract, rooms: Path, tmp_path: Path) -> None:
    extract("--root", rooms)
    shutil.rmtree(rooms / "scans" / ROOMS[1] / "color")
    code, totals, _ = extract("--root", rooms, vfm="test_efficientnet")
    assert (code, totals["partitions"]) == (1, {"done": 2, "reused": 0, "failed": 1})
    assert {f["sample"] for f in totals["failures"]} == {ROOMS[1]}
    assert open_cache(tmp_path / "cache").samples_with("test_vit") == ROOMS


def test_batches_do_not_change_the_features(extract: Extract, tmp_path: Path) -> None:
    """Up to the rounding of another order of sums."""
    extract("--limit", 1)
    extract("--limit", 1, "--batch-size", 1, out="single")
    a, b = (open_cache(tmp_path / name).read(ROOMS[0]) for name in ("cache", "single"))
    np.testing.assert_array_equal(a.valid, b.valid)
    np.testing.assert_allclose(a["feature"], b["feature"], rtol=2e-3, atol=2e-3)
