"""`posed`: captures by nerfstudio, Instant-NGP and COLMAP, with clouds in every format, as an independent writer makes
them; and what each golden fault, planted in the reader, makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_runs import Extracted, run_dataset
from ditr_cache.datasets import colmap as colmap_module
from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.posed import classes as posed_classes
from ditr_cache.datasets.posed import colmap_model as posed_colmap
from ditr_cache.datasets.posed import dataset as posed_module
from ditr_cache.datasets.posed import frames as posed_frames
from ditr_cache.datasets.posed import transforms as posed_transforms
from ditr_cache.geometry import inside, project, to_camera
from ditr_cache.sample import Camera, Points, View
from layouts import posed as layout
from layouts.clouds import CLASSES
from world import Array, Eye, Truth, World

ROOM = World()
MAP = (452_300.0, 5_411_800.0, 210.0)  # metres east and north in UTM, and up
MAP_OFFSET = (452_000.0, 5_412_000.0, 0.0)
HALL = ("hall",)

RELEASES: dict[str, dict[str, Any]] = {
    "nerfstudio": {"depth": True},
    "colmap": {"kind": "colmap", "model": "FULL_OPENCV", "points": "las", "label_name": "label", "depth": True},
    "colmap-text": {
        "kind": "colmap", "binary": False, "rig": False, "points": "pcd", "label_file": "txt", "classes": "json",
        "names": HALL,
    },
    "colmap-dense": {"kind": "colmap", "model": "PINHOLE", "dense": True, "depth": True, "names": HALL},
    "ngp": {"kind": "ngp", "model": "PINHOLE", "points": "pcd-compressed", "depth": True, "names": HALL},
    "fisheye": {
        "model": "OPENCV_FISHEYE", "applied_transform": True, "listed": False, "per_frame_intrinsics": True,
        "points": "laz", "depth": True, "names": HALL,
    },
    "panorama": {"model": "EQUIRECTANGULAR", "applied_transform": True, "depth": True, "names": HALL},
    "map": {"origin": MAP, "points": "las", "label_file": "npy", "depth": True, "names": ("",), "split_lists": False},
}  # fmt: skip
"""Written releases whose images are looked at."""


@dataclass(frozen=True)
class DarkWorld(World):
    """The room, photographed in the dark: quick, where only geometry and points matter."""

    def image(self, eye: Eye) -> Any:
        return np.zeros((eye.height, eye.width, 3), np.uint8)


@dataclass(frozen=True)
class Written:
    root: Path
    truths: tuple[Truth, ...]


Write = Callable[[str], Written]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A release of `RELEASES`, written once."""

    @cache
    def write(name: str) -> Written:
        root = tmp_path_factory.mktemp(name) / "captures"
        return Written(root, tuple(layout.write(root, count=5_000, **RELEASES[name])))

    return write


@pytest.fixture
def extract(written: Write, tmp_path: Path, position_checkpoint: Path) -> Callable[..., Extracted]:
    def run(name: str, split: str | None = None) -> Extracted:
        links = {} if RELEASES[name].get("depth") else {"occlusion": "none"}
        return run_dataset(
            "posed",
            written(name).root,
            tmp_path / "cache",
            position_checkpoint,
            grid=(24, 48) if name == "panorama" else (12, 16),
            links=links,
            splits=None if split is None else (split,),
        )

    return run


def is_right(found: Extracted, truth: Truth, name: str) -> bool:
    if name == "map":
        truth = replace(truth, coord=truth.coord - MAP_OFFSET)
    return found.report(truth, ROOM).right(occlusion=bool(RELEASES[name].get("depth")), at_least=100)


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASES)
def test_extracted_features_lie_on_their_points(extract, written, name):
    found, truths = extract(name), written(name).truths
    assert not found.totals.failures
    assert sorted(found.cache.samples) == sorted(t.sample_id for t in truths)
    for truth in truths:
        assert is_right(found, truth, name)
        sample = found.sample(truth.sample_id)
        assert sample.split == truth.split
        check_channels(sample, truth, RELEASES[name].get("points", "ply"), sample.source_index)


def check_channels(found: Any, truth: Truth, points: str, order: Any = slice(None)) -> None:
    """Colour, normals, strength and instances are those of the file, and no others."""
    scale = 65535 if points in ("las", "laz") else 1  # LAS says that intensity spans 16 bits
    for channel in ("color", "normal", "strength", "instance"):
        actual, expected = getattr(found, channel), truth.channels.get(channel)
        assert (actual is None) == (expected is None), channel
        if expected is not None:
            expected = expected[order] / (scale if channel == "strength" else 1)
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-3 if channel == "normal" else 0)


def test_classes_and_splits_are_the_user_s(written, extract):
    dataset = open_dataset("posed", written("nerfstudio").root)
    assert {c.name: c.color for c in dataset.classes} == CLASSES and list(CLASSES) == [c.name for c in dataset.classes]
    assert dataset.splits == ("train", "val")
    assert dataset.sample_ids("train") == ["hall"] and dataset.sample_ids("val") == ["site b/Büro 2.1 (east)"]
    views = dataset.read("hall").views
    assert [v.id for v in views] == [f"images/frame_{n:05d}.png" for n in (1, 2, 3, 4)]
    text = written("colmap-text")
    names = [entry["name"] for entry in json.loads((text.root / "classes.json").read_text())]
    assert [c.name for c in open_dataset("posed", text.root).classes] == names


def test_points_are_fused_from_depth_where_there_is_no_cloud(written, tmp_path):
    """They lie on the surfaces of the room, and have the colours of their places."""
    root = tmp_path / "captures"
    shutil.copytree(written("nerfstudio").root, root)
    for cloud in root.rglob("*.ply"):
        cloud.unlink()
    for path in root.rglob("transforms.json"):
        path.write_text(path.read_text().replace("ply_file_path", "no_cloud"))
    for truth in written("nerfstudio").truths:
        points = open_dataset("posed", root, {"voxel_size": 0.05}).read(truth.sample_id).load_points()
        places = room_from(truth, points.coord)
        assert len(places) > 3_000 and points.normal is not None and points.segment is None
        low, high = np.array([-2.5, 0, 0]), np.array([2.5, 4.5, 3])
        near = np.minimum(np.abs(places - low), np.abs(places - high)).min(axis=1)
        near = np.minimum(near, np.minimum(np.abs(places[:, 1] - 3.1), np.abs(places[:, 0] - 1.7)))
        assert np.quantile(near, 0.98) < 0.03
        assert np.quantile(np.abs(points.color - ROOM.color(places)), 0.9) < 4
    named = open_dataset("posed", written("nerfstudio").root, {"points": "depth"}).read("hall")
    assert named.load_points().segment is None


def room_from(truth: Truth, coord: Array) -> Array:
    """Places in the room, by the truth's own pairs of coordinates and places."""
    ones = np.ones((len(truth.coord), 1))
    matrix = np.linalg.lstsq(np.hstack([truth.coord, ones]), truth.world, rcond=None)[0]
    return coord @ matrix[:3] + matrix[3]


def test_the_world_of_a_map_is_moved_by_whole_kilometres(written):
    """Float32 holds no half metre there; what was subtracted is what the documentation says."""
    release = written("map")
    sample = open_dataset("posed", release.root).read("captures")
    moved_by = release.truths[0].coord - sample.load_points().coord
    np.testing.assert_allclose(moved_by, np.broadcast_to(MAP_OFFSET, moved_by.shape), atol=1e-3)
    assert np.abs(sample.views[0].camera_from_world).max() < 1e3


# --- every lens -----------------------------------------------------------------------------------------------------

LENSES = [("colmap", model, binary) for model in layout.COLMAP_MODELS for binary in (True, False)]
LENSES += [("nerfstudio", model, True) for model in layout.NERFSTUDIO_MODELS]
LENSES += [("ngp", model, True) for model in layout.NERFSTUDIO_MODELS[:6]]


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("model", ["OPENCV", "OPENCV_FISHEYE", "PINHOLE"])
def test_distortion_as_a_list(tmp_path, model, per_frame):
    settings = {"distortion_list": True, "per_frame_intrinsics": per_frame}
    (truth,) = layout.write(tmp_path / "x", world=DarkWorld(), model=model, names=HALL, count=800, **settings)
    views = open_dataset("posed", tmp_path / "x").read("hall").views
    assert sum(pixels_apart(view, truth) for view in views) > 300


@pytest.mark.parametrize(("kind", "model", "binary"), LENSES)
def test_every_lens_projects_as_the_writer_s(tmp_path, kind, model, binary):
    """To a hundredth of a pixel; of nerfstudio in a world that was turned, with intrinsics in the frames."""
    options = {"applied_transform": True, "per_frame_intrinsics": True} if kind == "nerfstudio" else {}
    (truth,) = layout.write(
        tmp_path / "x", world=DarkWorld(), kind=kind, model=model, binary=binary, names=HALL, count=800, **options
    )
    views = open_dataset("posed", tmp_path / "x").read("hall").views
    assert {Path(v.id).name for v in views} == {Path(name).name for name in truth.eyes}
    assert sum(pixels_apart(view, truth) for view in views) > 300


def pixels_apart(view: View, truth: Truth) -> int:
    """Number of points that both see; asserts that they see the same ones, in the same places."""
    eye = next(eye for name, eye in truth.eyes.items() if Path(name).name == Path(view.id).name)
    assert (view.camera.width, view.camera.height) == (eye.width, eye.height)
    u, v, seen = eye.project(truth.world)
    in_camera = to_camera(truth.coord, view.camera_from_world)
    front = in_camera[:, 2] > 0 if view.camera.model != "equirectangular" else np.ones(len(in_camera), bool)
    mine_u, mine_v = project(np.where(front[:, None], in_camera, (0, 0, 1)), view.camera)
    mine = front & inside(mine_u, mine_v, view.camera)
    assert (mine == seen & front).mean() > 0.995
    both = mine & seen
    across = np.abs(mine_u - u)[both]
    assert np.minimum(across, np.abs(eye.width - across)).max() < 0.01 and np.abs(mine_v - v)[both].max() < 0.01
    return int(both.sum())


# --- every cloud ----------------------------------------------------------------------------------------------------

CLOUDS: list[dict[str, Any]] = [
    {"binary": False},
    {"label_name": "scalar_label"},
    {"label_name": "class"},
    {"label_name": "scalar_Classification", "classes": "json"},
    {"label_file": "npy"},
    {"label_file": "txt", "points": "laz"},
    {"points": "las"},
    {"points": "las", "classes": "json"},
    {"points": "laz", "label_name": "Label"},
    {"points": "pcd"},
    {"points": "pcd", "binary": False},
    {"points": "pcd-compressed", "classes": "json"},
    {"labels": False},
    {"applied_transform": True},
    {"kind": "colmap", "points": "pcd"},
    {"kind": "colmap", "model": "SIMPLE_PINHOLE", "dense": True},
    {"origin": MAP, "points": "ply", "binary": False},
    {"origin": MAP, "points": "pcd"},
]


@pytest.mark.parametrize("options", CLOUDS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_every_cloud_is_read_as_written(tmp_path, options):
    root = tmp_path / "x"
    (truth,) = layout.write(root, world=DarkWorld(), **{"names": HALL, "count": 700, "model": "PINHOLE"} | options)
    dataset = open_dataset("posed", root)
    points = dataset.read("hall").load_points()
    offset = MAP_OFFSET if "origin" in options else (0, 0, 0)
    np.testing.assert_allclose(points.coord, truth.coord - offset, atol=1e-3)
    assert labels_of(points, [c.name for c in dataset.classes]) == (None if truth.label is None else [*truth.label])
    check_channels(points, truth, options.get("points", "ply"))


def labels_of(points: Points, names: list[str]) -> list[str] | None:
    return None if points.segment is None else [[*names, ""][i] for i in points.segment]


def test_normals_are_estimated_where_asked(tmp_path):
    (truth,) = layout.write(tmp_path / "x", world=DarkWorld(), points="las", names=HALL, count=6_000, model="PINHOLE")
    assert open_dataset("posed", tmp_path / "x").read("hall").load_points().normal is None
    normal = open_dataset("posed", tmp_path / "x", {"normals": "estimate"}).read("hall").load_points().normal
    centre = np.array([0, 2.0, 1.5])
    cameras = truth.coord[np.linalg.norm(truth.world - centre, axis=1).argmin()]
    assert ((normal * (cameras - truth.coord)).sum(axis=1) > 0).mean() > 0.8
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-5)


# --- golden faults, planted -----------------------------------------------------------------------------------------


def swapped_principal_point(**values: Any) -> Camera:
    return Camera(**values | {"cx": values["cy"], "cy": values["cx"]})


def wxyz_taken_for_xyzw(quaternion: Any, translation: Any, where: str, original=colmap_module._pose) -> Array:
    return original((*quaternion[1:], quaternion[0]), translation, where)


def camera_to_world(folder: Path, original=posed_colmap.read_images) -> Any:
    for image in original(folder):
        yield replace(image, camera_from_world=np.linalg.inv(image.camera_from_world))


def first_camera_for_all(folder: Path, original=posed_colmap.read_cameras) -> Any:
    cameras = original(folder)
    return dict.fromkeys(cameras, next(iter(cameras.values())))


def intrinsics_not_resized(camera: Camera, size: tuple[int, int], *_: Any) -> Camera:
    return replace(camera, width=size[0], height=size[1])


def blue_first(*args: Any, original=posed_frames.read_color, **kwargs: Any) -> Any:
    return original(*args, **kwargs)[:, :, ::-1]


def lines_sorted(text: str, path: Path, original=posed_classes._text_rows) -> Any:
    return original("\n".join(sorted(text.splitlines())), path)


def applied_inverted(meta: Any, folder: Path, original=posed_transforms._poses_from_original) -> Array:
    return np.linalg.inv(original(meta, folder))


def fisheye_as_radial(keys: Any, model: str) -> tuple[str, tuple[float, ...]]:
    return "radial_tangential", tuple(keys[f"k{i}"] for i in (1, 2, 3, 4))


def half_the_angle(keys: Any, axis: str, pixels: int) -> float | None:
    return None if axis == "y" else pixels / 2 / np.tan(keys["camera_angle_x"])


FAULTS: dict[str, tuple[str, str, Any, str, Any]] = {
    "poses not inverted": ("nerfstudio", "train", posed_transforms, "invert_pose", posed_transforms.rigid_pose),
    "OpenGL's axes taken for OpenCV's": ("nerfstudio", "train", posed_transforms, "_OPENCV_FROM_OPENGL", np.eye(4)),
    "millimetres read as metres": ("nerfstudio", "train", posed_transforms, "_unit_of_depth", lambda *_: 1.0),
    "distortion ignored": ("nerfstudio", "train", posed_transforms, "_distortion", lambda *_: ("pinhole", ())),
    "x and y swapped": ("nerfstudio", "train", posed_transforms, "Camera", swapped_principal_point),
    "another size without other intrinsics": ("nerfstudio", "val", posed_frames, "_of_size", intrinsics_not_resized),
    "blue before red": ("nerfstudio", "train", posed_frames, "read_color", blue_first),
    "classes by name, not by label": ("nerfstudio", "train", posed_classes, "_text_rows", lines_sorted),
    "fisheye taken for radial": ("fisheye", "train", posed_transforms, "_distortion", fisheye_as_radial),
    "applied_transform ignored": ("fisheye", "train", posed_transforms, "_poses_from_original", lambda *_: None),
    "applied_transform inverted": ("fisheye", "train", posed_transforms, "_poses_from_original", applied_inverted),
    "half the field of view": ("ngp", "train", posed_transforms, "_focal", half_the_angle),
    "Instant-NGP's unit of depth ignored": ("ngp", "train", posed_transforms, "_unit_of_depth", lambda *_: 1e-3),
    "quaternion's real part last": ("colmap", "train", colmap_module, "_pose", wxyz_taken_for_xyzw),
    "COLMAP's poses inverted": ("colmap", "train", posed_colmap, "read_images", camera_to_world),
    "one camera for all images": ("colmap", "train", posed_colmap, "read_cameras", first_camera_for_all),
    "points moved without poses": ("map", "train", posed_module, "moved", lambda frame, _: frame),
}
"""Fault -> release, split, and the name of a module that is replaced. Unplanted, `RELEASES` pass above."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(extract, written, monkeypatch, fault):
    name, split, module, attribute, planted = FAULTS[fault]
    assert hasattr(module, attribute)
    monkeypatch.setattr(module, attribute, planted)
    truth = next(t for t in written(name).truths if t.split == split)
    assert not is_right(extract(name, split), truth, name)
