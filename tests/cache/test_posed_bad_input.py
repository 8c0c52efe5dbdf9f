"""`posed`: what is wrong is found, named, and told how to be mended; the rest is read all the same."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_runs import Extracted, run_dataset
from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.posed.classes import read_classes
from ditr_cache.datasets.posed.depth import depth_map_size, read_depth_map
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.geometry import to_camera
from ditr_cache.sample import Points, Sample

SIZE = (32, 24)
COUNT = 60
INTRINSICS = {"w": 32, "h": 24, "fl_x": 30.0, "fl_y": 30.0, "cx": 16.0, "cy": 12.0, "camera_model": "OPENCV"}
POSE = [[1.0, 0, 0, 0], [0, 0, -1, -3], [0, 1, 0, 0], [0, 0, 0, 1]]  # from (0, -3, 0) along y, upright


def capture(folder: Path, frames: int = 3, **meta: Any) -> dict[str, Any]:
    """A wall before a camera that moves to the right, as `transforms.json`; returns its content."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for n in range(frames):
        pose = np.array(POSE)
        pose[0, 3] = 0.1 * n
        entries.append({"file_path": f"images/{n}.png", "transform_matrix": pose.tolist()})
        Image.new("RGB", SIZE, (50 * n, 90, 20)).save(folder / f"images/{n}.png")
    rng = np.random.default_rng(0)
    wall = np.stack([rng.uniform(-1, 1, COUNT), np.zeros(COUNT), rng.uniform(-0.8, 0.8, COUNT)], axis=1)
    write_ply(folder / "point_cloud.ply", wall, label=np.arange(COUNT) % 3)
    return describe(folder, INTRINSICS | {"frames": entries} | meta)


def describe(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    (folder / "transforms.json").write_text(json.dumps(document))
    return document


def write_ply(path: Path, coord: Any, **columns: Any) -> None:
    head = f"ply\nformat ascii 1.0\nelement vertex {len(coord)}\n"
    head += "".join(f"property double {name}\n" for name in ("x", "y", "z", *columns))
    rows = np.column_stack([coord, *columns.values()])
    path.write_text(head + "end_header\n" + "".join(" ".join(f"{v:.6f}" for v in row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one capture `a`, and classes."""
    capture(tmp_path / "root" / "a")
    (tmp_path / "root" / "classes.txt").write_text("wall 255 0 0\nfloor\nold chair 1,2,3\n")
    return tmp_path / "root"


def read(root: Path, sample: str = "a", **options: Any) -> Sample:
    return open_dataset("posed", root, options).read(sample)


def edit(root: Path, **meta: Any) -> None:
    path = root / "a" / "transforms.json"
    describe(path.parent, json.loads(path.read_text()) | meta)


def edit_frame(root: Path, which: int, **entry: Any) -> None:
    path = root / "a" / "transforms.json"
    document = json.loads(path.read_text())
    document["frames"][which] |= entry
    describe(path.parent, document)


def refused(root: Path, *words: str, error: type[Exception] = DataError, **options: Any) -> None:
    """Reading the capture, or its points, ends with an error that says all of `words`."""
    with pytest.raises(error) as caught:
        read(root, **options).load_points()
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {caught.value}"


def test_the_capture_of_these_tests_is_fine(root):
    sample = read(root)
    assert [v.id for v in sample.views] == ["images/0.png", "images/1.png", "images/2.png"] and not sample.broken_views
    points: Points = sample.load_points()
    assert points.segment is not None and points.segment.tolist() == [0, 1, 2] * (COUNT // 3)
    z = to_camera(points.coord, sample.views[0].camera_from_world)[:, 2]
    np.testing.assert_allclose(z, 3)
    classes = open_dataset("posed", root).classes
    assert [c.name for c in classes] == ["wall", "floor", "old chair"] and classes[2].color == (1, 2, 3)


# --- what is missing ------------------------------------------------------------------------------------------------


def test_no_capture(tmp_path):
    with pytest.raises(MissingDataError, match=r"no capture at .* expected folders with transforms\.json.*ns-process"):
        open_dataset("posed", tmp_path)


def test_unknown_names(root):
    with pytest.raises(UnknownNameError, match="sample"):
        read(root, "b")
    with pytest.raises(UnknownNameError, match="split"):
        open_dataset("posed", root).sample_ids("val")


def test_half_a_colmap_model(root):
    model = root / "a" / "sparse" / "0"
    model.mkdir(parents=True)
    (root / "a" / "transforms.json").unlink()
    (model / "images.txt").write_text("# Image list\n1 1 0 0 0 0 0 3 1 0.png\n\n")
    refused(root, "cameras", "no such file", "COLMAP", error=MissingDataError)


def test_no_cloud_and_no_depth(root):
    (root / "a" / "point_cloud.ply").unlink()
    refused(root, "no point cloud", "point_cloud.ply", "stereo_fusion", "points=NAME", error=MissingDataError)
    edit(root, ply_file_path="sparse_pc.ply")
    refused(root, "sparse_pc.ply: no such file", "ply_file_path", error=MissingDataError)
    refused(root, "scan.las: no such file", "points=scan.las", error=MissingDataError, points="scan.las")


def test_no_intrinsics(root):
    edit(root, fl_x=None, fl_y=None)
    refused(root, "transforms.json", "no focal length", "fl_x", "none of its 3 frames", "ns-process-data")


def test_one_image_is_missing(root):
    (root / "a" / "images" / "1.png").unlink()
    sample = read(root)
    assert [v.id for v in sample.views] == ["images/0.png", "images/2.png"]
    ((view, error),) = sample.broken_views
    assert view == "images/1.png" and "1.png: no such file" in error and "transforms.json" in error


def extracted(root: Path, out: Path, checkpoint: Path) -> Extracted:
    return run_dataset("posed", root, out, checkpoint, grid=(2, 2))


def test_without_images_points_are_kept_and_it_says_so(root, tmp_path, position_checkpoint):
    shutil.rmtree(root / "a" / "images")
    found = extracted(root, tmp_path / "cache", position_checkpoint)
    sample = found.sample("a")
    assert len(sample.coord) == COUNT and sample.valid is not None and not sample.valid.any()
    told = "\n".join(failure.error for failure in found.totals.failures)
    assert "none of its 3 images is there" in told and "--retry-incomplete" in told


def test_broken_images_are_left_out(root, tmp_path, position_checkpoint):
    """A truncated one is found when it is decoded, a cropped one before."""
    path = root / "a" / "images" / "0.png"
    path.write_bytes(path.read_bytes()[:-30])
    Image.new("RGB", (32, 20)).save(root / "a" / "images" / "1.png")
    found = extracted(root, tmp_path / "cache", position_checkpoint)
    told = {failure.view: failure.error for failure in found.totals.failures}
    assert "0.png" in told["images/0.png"] and "truncated or damaged" in told["images/0.png"]
    assert "32x20 pixels, expected 32x24" in told["images/1.png"] and "intrinsics of their own" in told["images/1.png"]
    assert found.sample("a").valid.any()


def test_smaller_copies_of_the_images(root):
    Image.new("RGB", (16, 12)).save(root / "a" / "images" / "1.png")
    camera = read(root).views[1].camera
    assert (camera.width, camera.fx, camera.cx) == (16, 15.0, 8.0)


# --- poses and intrinsics -------------------------------------------------------------------------------------------


def broken(root: Path, *words: str) -> None:
    """Frame 1 is left out, for a reason that says all of `words`; the others stay."""
    sample = read(root)
    assert len(sample.views) == 2 and len(sample.broken_views) == 1
    for word in ("transforms.json", *words):
        assert word in sample.broken_views[0][1], f"{word!r} not in {sample.broken_views[0][1]}"


def scaled(by: Any) -> list[list[float]]:
    matrix = np.array(POSE)
    matrix[:3, :3] *= by
    return matrix.tolist()


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (scaled(0.33), ("scales by 0.33", "divide the rotation")),
        (scaled(-1.0), ("expected a rotation",)),
        (scaled([[1], [1], [1.2]]), ("expected a rotation",)),
        (scaled(0.0), ("expected a rotation",)),
        ([[1, 2], [3, 4]], ("3x4 or 4x4",)),
        ("none", ("expected a matrix",)),
        (None, ("expected a matrix",)),
    ],
)
def test_a_pose_that_is_no_rigid_motion(root, matrix, words):
    edit_frame(root, 1, transform_matrix=matrix)
    broken(root, "transform_matrix", *words)


def test_a_pose_that_is_not_finite_is_no_pose(root):
    edit_frame(root, 0, transform_matrix=np.full((4, 4), np.nan).tolist())
    sample = read(root)
    assert len(sample.views) == 3 and np.isnan(sample.views[0].camera_from_world).all()
    assert np.isfinite(sample.load_points().coord).all()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"k4": 0.01}, ("k4=0.01", "undistort")),
        ({"camera_model": "OPENCV_FISHEYE", "p1": 0.1}, ("p1=0.1", "fisheye")),
        ({"camera_model": "FISHEYE624"}, ("FISHEYE624", "cannot be read", "undistort")),
        ({"camera_model": ["OPENCV"]}, ("cannot be read",)),
        ({"latlong": True}, ("latlong",)),
        ({"orthographic": True}, ("orthographic", "undistort")),
        ({"distortion_params": [0.1] * 12}, ("distortion_params", "six numbers k1, k2, k3, k4, p1, p2", "undistort")),
        ({"distortion_params": [0.1, 0, 0, 0, "x", 0]}, ("p1", "'x'")),
        ({"distortion_params": 0.1}, ("six numbers", "0.1")),
        ({"fl_x": "wide"}, ("fl_x", "finite number")),
        ({"cx": float("nan")}, ("cx", "finite number")),
        ({"fl_x": 0.0}, ("singular intrinsics",)),
        ({"w": -32}, ("w, h", "size in pixels")),
        ({"x_fov": 180}, ("less than 180 degrees",)),
    ],
)
def test_intrinsics_that_no_camera_has(root, keys, words):
    edit_frame(root, 1, **keys)
    broken(root, *words)


def test_a_field_of_view_wins_over_a_focal_length(root):
    edit_frame(root, 0, x_fov=90)
    edit_frame(root, 1, fl_x=None, fl_y=None, camera_angle_x=np.pi / 2, w=None)
    edit(root, fl_x=None, fl_y=20.0)
    views = read(root).views
    assert [(v.camera.fx, v.camera.fy) for v in views] == [pytest.approx((16, 20)), pytest.approx((16, 20)), (20, 20)]


def test_a_list_of_distortion_wins_over_single_coefficients(root):
    edit(root, k1=0.5, p2=0.5, distortion_params=[0.1, 0.02, 0.003, 0, 0.04, 0.05])
    edit_frame(root, 1, k2=0.5, distortion_params=[0, 0, 0, 0, 0.01, 0.02])
    cameras = [view.camera for view in read(root).views]
    assert [camera.model for camera in cameras] == ["radial_tangential"] * 3
    assert [camera.distortion for camera in cameras[:2]] == [(0.1, 0.02, 0.04, 0.05, 0.003), (0, 0, 0.01, 0.02, 0)]


@pytest.mark.parametrize("where", ["file", "frame"])
def test_a_rolling_shutter_is_warned_of(root, where, caplog):
    edit(root, rolling_shutter=[0, 0, 0])
    read(root)
    assert "rolling_shutter" not in caplog.text
    edit(root, rolling_shutter=[0, 0.01, 0]) if where == "file" else edit_frame(root, 1, rolling_shutter=[0, 0, 0, 0.5])
    read(root)
    (record,) = [record for record in caplog.records if "rolling_shutter" in record.getMessage()]
    assert record.levelname == "WARNING" and "transforms.json" in record.getMessage()


def test_a_frame_twice_and_frames_out_of_order(root):
    document = json.loads((root / "a" / "transforms.json").read_text())
    first, second, third = document["frames"]
    edit(root, frames=[third, first, second | {"file_path": "./images/../images/1.png"}, second])
    sample = read(root)
    assert [v.id for v in sample.views] == ["images/0.png", "images/1.png", "images/2.png"]
    assert "stands there twice" in sample.broken_views[0][1]


@pytest.mark.parametrize("path", ["../../secret.png", "/etc/passwd", "images/../../../x.png"])
def test_paths_do_not_lead_out_of_the_root(root, path):
    edit_frame(root, 1, file_path=path)
    broken(root, "leads out of", "--root")
    edit_frame(root, 1, file_path="images/1.png", depth_file_path=path)
    broken(root, "depth_file_path", "leads out of")
    edit(root, ply_file_path=path)
    refused(root, "ply_file_path", "leads out of")


@pytest.mark.parametrize("path", [None, 7, "", "a\0b", "\ud800.png", "x" * 5000, ["a"]])
def test_paths_that_are_none(root, path):
    edit_frame(root, 1, file_path=path)
    broken(root, "file_path", "expected the path of a file")


def test_images_beside_the_capture(root):
    """Inside the root, they may lie anywhere."""
    shutil.move(root / "a" / "images", root / "pictures")
    for n in range(3):
        edit_frame(root, n, file_path=f"../pictures/{n}.png")
    assert [v.id for v in read(root).views] == [f"../pictures/{n}.png" for n in range(3)]


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"frames": []}', '{"frames": {}}', "\0\1"])
def test_a_description_that_is_none(root, text):
    (root / "a" / "transforms.json").write_text(text)
    refused(root, "transforms.json", "ns-process-data")


@pytest.mark.parametrize(
    "meta",
    [{"applied_transform": [[1]]}, {"applied_transform": scaled(2)}, {"applied_scale": 0}, {"applied_scale": "x"}],
)
def test_a_world_that_is_none(root, meta):
    edit(root, **meta)
    refused(root, "transforms.json", next(iter(meta)))


def test_applied_scale_is_undone(root):
    document = json.loads((root / "a" / "transforms.json").read_text())
    before = [v.camera_from_world for v in read(root).views]
    for frame in document["frames"]:
        for row in frame["transform_matrix"][:3]:
            row[3] *= 0.25
    describe(root / "a", document | {"applied_scale": 0.25})
    np.testing.assert_allclose([v.camera_from_world for v in read(root).views], before, atol=1e-12)


def test_an_old_capture_beside_colmap_s_model(root, monkeypatch):
    """Without `applied_transform`, nerfstudio takes it for what it once applied."""
    before = read(root).views[1].camera_from_world
    (root / "a" / "colmap" / "sparse" / "0").mkdir(parents=True)
    applied = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1.0]])
    np.testing.assert_allclose(read(root).views[1].camera_from_world, before @ applied)
    edit(root, ply_file_path="point_cloud.ply")
    np.testing.assert_allclose(read(root).views[1].camera_from_world, before)
    monkeypatch.chdir(root)
    np.testing.assert_allclose(read(Path()).views[1].camera_from_world, before)


# --- COLMAP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(root: Path) -> Path:
    """The capture, described by COLMAP instead."""
    (root / "a" / "transforms.json").unlink()
    folder = root / "a" / "sparse" / "0"
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text("# Camera list\n1 PINHOLE 32 24 30 30 16 12\n")
    lines = [f"{n + 1} 0.7071067811865476 0.7071067811865475 0 0 {-0.1 * n} 0 3 1 {n}.png\n\n" for n in range(3)]
    (folder / "images.txt").write_text("".join(lines))
    return folder


def test_the_model_of_these_tests_is_fine(root, model):
    sample = read(root)
    z = to_camera(sample.load_points().coord, sample.views[2].camera_from_world)[:, 2]
    np.testing.assert_allclose(z, 3, atol=1e-6)


def test_a_lens_that_is_not_known(root, model):
    (model / "cameras.txt").write_text("1 FOV 32 24 30 30 16 12 0.9\n")
    refused(root, "cameras.txt line 1", "FOV", "image_undistorter")


def test_images_of_a_camera_that_is_not_there(root, model):
    text = (model / "images.txt").read_text()
    (model / "images.txt").write_text(text.replace(" 1 1.png", " 2 ../../../1.png").replace(" 1 2.png", " 9 2.png"))
    sample = read(root)
    errors = dict(sample.broken_views)
    assert len(sample.views) == 1 and "camera 9, which is not there" in errors["2.png"]
    text = (model / "images.txt").read_text().replace(" 2 ../../../1.png", " 1 ../../../1.png")
    (model / "images.txt").write_text(text)
    assert "leads out of" in dict(read(root).broken_views)["../../../1.png"]


def test_a_binary_model_that_ends_early(root, model):
    (model / "images.bin").write_bytes(struct.pack("<Q", 5) + struct.pack("<I7dI", 1, *range(1, 8), 1) + b"0.png\0")
    refused(root, "images.bin", "truncated")


def test_several_models_are_told(root, model, caplog):
    shutil.copytree(model, model.with_name("1"))
    shutil.copytree(model, model.with_name("10"))
    with caplog.at_level(logging.WARNING):
        assert len(read(root).views) == 3
    assert "several models" in caplog.text and "taking 0, leaving out 1, 10" in caplog.text


# --- points and labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npy", "txt"])
def test_labels_of_another_cloud(root, suffix):
    path = root / "a" / f"labels.{suffix}"
    np.save(path, np.zeros(COUNT - 1, int)) if suffix == "npy" else path.write_text("0\n" * (COUNT - 1))
    refused(root, path.name, f"{COUNT - 1} labels for the {COUNT} points of point_cloud.ply", "one label per point")
    path.unlink()
    np.save(path, np.zeros((COUNT, 1), int)) if suffix == "npy" else path.write_text("0\n" * COUNT)
    assert read(root).load_points().segment.tolist() == [0] * COUNT


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", b"wall\n" * COUNT),
        ("labels.txt", b"0.5\n" * COUNT),
        ("labels.txt", b""),
        ("labels.txt", b"0 " * 100_000),
        ("labels.npy", b"\x93NUMPY\1\0"),
        ("labels.npy", b"0\n" * COUNT),
    ],
)
def test_labels_that_are_none(root, name, content):
    (root / "a" / name).write_bytes(content)
    refused(root, name)


def test_labels_of_other_types(root):
    np.save(root / "a" / "labels.npy", np.array([["x"]] * COUNT))
    refused(root, "labels.npy", "expected numbers [60], got <U1")
    np.save(root / "a" / "labels.npy", np.array([None] * COUNT), allow_pickle=True)
    refused(root, "labels.npy", "not a readable array of NumPy")
    (root / "a" / "labels.npy").unlink()
    labels = np.arange(COUNT) % 2 + 0.0
    labels[0], labels[1] = np.nan, 7
    write_ply(root / "a" / "point_cloud.ply", np.zeros((COUNT, 3)), scalar_Label=labels)
    assert read(root).load_points().segment.tolist()[:4] == [-1, -1, 0, 1]
    write_ply(root / "a" / "point_cloud.ply", np.zeros((COUNT, 3)), label=labels + 0.25)
    refused(root, "point_cloud.ply", "whole numbers", "7.25 at point 1")


def test_labels_without_classes_are_left_out_and_told(root, caplog):
    (root / "classes.txt").unlink()
    assert not open_dataset("posed", root).classes
    assert read(root).load_points().segment is None and "no classes.txt or classes.json" in caplog.text
    (root / "a" / "classes.json").write_text('[{"id": 77, "name": "x"}]')
    assert set(read(root).load_points().segment) == {-1} and "none of its labels is one of the 1 classes" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("classes.txt", "", "0 classes"),
        ("classes.txt", "wall\n\nfloor\n", "line 2: empty"),
        ("classes.txt", "wall\nwall\n", "'wall' stands there 2 times"),
        ("classes.txt", "wall 1 2 256\n", "0..255"),
        ("classes.json", "{", "not JSON"),
        ("classes.json", "7", "expected a list"),
        ("classes.json", '[{"id": 1}]', "expected a name"),
        ("classes.json", '[{"id": 1.5, "name": "a"}]', "whole number as id"),
        ("classes.json", '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "label 1 stands there 2 times"),
        ("classes.json", '[{"name": "a", "color": [1, 2, true]}]', "three numbers 0..255"),
    ],
)
def test_classes_that_are_none(root, name, text, word):
    (root / "classes.txt").unlink()
    (root / name).write_text(text)
    with pytest.raises(DataError) as caught:
        open_dataset("posed", root)
    assert (
        str(root / name) in str(caught.value) and word in str(caught.value) and "one class a line" in str(caught.value)
    )


def test_other_forms_of_classes(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text('{"5": "wall", "2": "floor"}')
    assert read_classes(path).labels == (5, 2)
    path.write_text('["wall", "floor"]')
    table = read_classes(path)
    assert table.labels == (0, 1) and len({c.color for c in table.infos}) == 2
    assert table.index(np.array([1, 0, 2, -1], np.int8), "x").tolist() == [1, 0, -1, -1]


def test_captures_have_one_list_of_classes(root):
    capture(root / "b")
    shutil.move(root / "classes.txt", root / "a" / "classes.txt")
    assert len(open_dataset("posed", root).classes) == 3
    (root / "b" / "classes.txt").write_text("other\n")
    with pytest.raises(DataError, match=r"b/classes\.txt: other classes than .*a/classes\.txt; .*at its root"):
        open_dataset("posed", root)


def test_which_cloud_is_taken(root, caplog):
    folder = root / "a"
    shutil.move(folder / "point_cloud.ply", folder / "scan one.ply")
    assert len(read(root).load_points().coord) == COUNT
    write_ply(folder / "scan two.PLY", np.zeros((5, 3)))
    refused(root, "2 point clouds (scan one.ply, scan two.PLY)", "points=scan one.ply")
    assert len(read(root, points="scan two.PLY").load_points().coord) == 5
    (folder / "dense").mkdir()
    write_ply(folder / "dense" / "fused.ply", np.zeros((6, 3)))
    assert len(read(root).load_points().coord) == 6
    edit(root, ply_file_path="scan two.PLY")
    assert len(read(root).load_points().coord) == 5
    write_ply(folder / "point_cloud.ply", np.zeros((7, 3)))
    (folder / "point_cloud.pcd").write_text("")
    assert len(read(root).load_points().coord) == 7 and "taking point_cloud.ply, not point_cloud.pcd" in caplog.text


def test_clouds_that_are_none(root):
    path = root / "a" / "point_cloud.ply"
    text = path.read_text()
    write_ply(path, np.zeros((0, 3)))
    refused(root, "point_cloud.ply", "no points")
    path.write_text(text[:-200])
    refused(root, "point_cloud.ply", "truncated")
    write_ply(path, np.full((3, 3), np.nan))
    refused(root, "point_cloud.ply", "3 of 3 coordinates are not finite", "remove these points")
    write_ply(path, np.full((3, 3), 450_000.0))
    refused(root, "point_cloud.ply", "are cloud and poses in the same frame")


def test_colours_of_any_range(root):
    path = root / "a" / "point_cloud.ply"
    for values in ([0.0, 0.5, 1.0], [0.0, 128.0, 255.0], [0.0, np.nan, 255.0]):
        write_ply(path, np.zeros((3, 3)), red=values, green=values, blue=values)
        color = read(root).load_points().color
        assert color[:, 0].tolist() == [0, 128 if np.isfinite(values[1]) else 0, 255]


def test_a_far_cloud_without_images(root):
    edit(root, frames=[{"file_path": "images/9.png", "transform_matrix": np.full((4, 4), np.inf).tolist()}])
    write_ply(root / "a" / "point_cloud.ply", np.array([[452_300.25, 5_411_800.5, 210.0]] * 2))
    assert read(root).load_points().coord[0].tolist() == [300.25, -199.5, 210.0]


# --- depth ----------------------------------------------------------------------------------------------------------


def test_depth_of_one_frame_is_missing(root):
    for n in range(3):
        edit_frame(root, n, depth_file_path=f"depth/{n}.npy")
    (root / "a" / "depth").mkdir()
    for n in (0, 2):
        np.save(root / "a" / "depth" / f"{n}.npy", np.full((12, 16), 3000, np.uint16))
    sample = read(root)
    assert len(sample.views) == 2 and "1.npy: no such depth map" in sample.broken_views[0][1]
    assert "--option depth=none" in sample.broken_views[0][1]
    camera = sample.views[0].depth_camera
    assert camera is not None and (camera.width, camera.fx) == (16, 15.0) and np.all(sample.views[0].load_depth() == 3)
    assert all(v.load_depth is None for v in read(root, depth="none").views)
    assert np.all(read(root, depth_unit=0.01).views[0].load_depth() == 30)
    np.save(root / "a" / "depth" / "1.npy", np.zeros((12, 20)))
    assert "20x12 pixels, expected 32x24" in read(root).broken_views[0][1]


def test_all_depth_maps_are_missing(root):
    """With the images there, and with one of them gone, too."""
    for n in range(3):
        edit_frame(root, n, depth_file_path=f"depth/{n}.npy")
    ((view, error),) = read(root).broken_views
    assert view == "" and "of its 3 frames 3 lack the depth map: points without features" in error
    assert "0.npy: no such file; copy the depth maps" in error and "--option depth=none" in error
    (root / "a" / "images" / "0.png").unlink()
    ((_, error),) = read(root).broken_views
    assert "of its 3 frames 2 lack the depth map and 1 the image" in error and "1.npy: no such file" in error
    assert len(read(root, depth="none").views) == 2


def test_the_library_of_normals_is_named_at_construction(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert open_dataset("posed", root)
    with pytest.raises(UsageError, match=r"estimated normals need .*pip install 'ditr\[datasets\]'"):
        open_dataset("posed", root, {"normals": "estimate"})


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.bin", b"16&12&1&" + b"\0" * 7, "truncated"),
        ("a.bin", b"16&12&3&" + b"\0" * 16 * 12 * 12, "of normals"),
        ("a.bin", b"depth", "width&height"),
        ("a.bin", b"999999999&999999999&1&", "at most"),
        ("a.npy", b"\x93NUMPY\1\0", "NumPy"),
        ("a.png", b"\x89PNG", "not a readable image"),
    ],
)
def test_depth_maps_that_are_none(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=word):
        depth_map_size(tmp_path / name)


def test_depth_maps_of_every_kind(tmp_path):
    values = np.array([[0.5, 1.0, np.nan], [-1.0, np.inf, 2.0]], np.float32)
    (tmp_path / "a.bin").write_bytes(b"3&2&1&" + values.tobytes())
    np.save(tmp_path / "a.npy", values[:, :, None])
    for path in (tmp_path / "a.bin", tmp_path / "a.npy"):
        assert depth_map_size(path) == (3, 2)
        depth = read_depth_map(path, size=(3, 2), unit=1.0)
        assert depth.dtype == np.float32 and depth.tolist() == [[0.5, 1.0, 0.0], [0.0, 0.0, 2.0]]
        with pytest.raises(DataError, match="expected 2x3 values, got 3x2"):
            read_depth_map(path, size=(2, 3), unit=1.0)
    for bad in (np.zeros((2, 3, 3)), np.zeros((2, 3), bool), np.array([[None]])):
        np.save(tmp_path / "b.npy", bad, allow_pickle=bad.dtype == object)
        with pytest.raises(DataError, match=r"b\.npy"):
            depth_map_size(tmp_path / "b.npy")
    for name, dtype in (("c.png", np.uint16), ("c.tif", np.int32)):
        Image.fromarray(np.array([[0, 1500, 65535]], dtype)).save(tmp_path / name)
        assert read_depth_map(tmp_path / name, size=(3, 1), unit=1e-3).tolist() == [[0, 1.5, 0]]


# --- splits and options ---------------------------------------------------------------------------------------------


def test_split_lists(root, caplog):
    capture(root / "deep" / "er" / "b (ü) #1")
    capture(root / "c")
    (root / "train.txt").write_text("\ufeffa\r\n\r\n./deep/er/b (ü) #1/\r\nnowhere\r\n", "utf-8")
    dataset = open_dataset("posed", root)
    assert dataset.splits == ("train",) and dataset.sample_ids("train") == ["a", "deep/er/b (ü) #1"]
    assert "1 captures are in no split list and left out: c" in caplog.text
    assert "1 captures are listed, but not on disk: nowhere" in caplog.text
    (root / "val.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"val\.txt: capture 'a' is in train\.txt, too"):
        open_dataset("posed", root)


def test_lists_of_images_are_no_split_lists(root):
    (root / "a" / "train.txt").write_text("images/0.png\n")
    assert open_dataset("posed", root / "a").sample_ids("train") == ["a"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"depth_unit": 0.0}, "depth_unit"),
        ({"voxel_size": -1.0}, "voxel_size"),
        ({"depth_max": float("nan")}, "depth_max"),
        ({"points": "depth", "depth": "none"}, "needs depth maps"),
        ({"points": "../x.ply"}, "no path"),
    ],
)
def test_options_that_cannot_be(root, options, word):
    with pytest.raises(UsageError, match=word):
        open_dataset("posed", root, options)


def test_a_sample_travels_to_workers(root):
    import multiprocessing.reduction

    dumps: Callable[..., Any] = multiprocessing.reduction.ForkingPickler.dumps
    sample = read(root)
    assert dumps(sample.load_points) and dumps(sample.views[0].load_image)
