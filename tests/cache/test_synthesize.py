"""The generated rooms: exact depth, ScanNet's layout, determinism, and classes that only their texture tells apart."""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ditr_cache.datasets.base import open_dataset
from ditr_cache.errors import StorageError, UsageError
from ditr_cache.sample import Camera
from ditr_cache.synthesize import RoomsSettings, synthesize, writer
from ditr_cache.synthesize.boxes import ALL_FACES, Box, Faces
from ditr_cache.synthesize.layout import PANELS, RUGS
from ditr_cache.synthesize.raycast import TextureAtlas, cast
from ditr_cache.synthesize.textures import Canvas, Palette, bake

SMALL = RoomsSettings(
    frames=3, color_size=(64, 48), depth_size=(32, 24), point_spacing=0.15, texel=0.03, lost_pose_probability=0.5
)


@pytest.fixture(scope="module")
def scene() -> writer.Scene:
    """A room as the demo has it, but with coarse textures."""
    return writer.build_scene(0, seed=3, settings=RoomsSettings(texel=0.03))


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rooms") / "small"
    synthesize(root, scenes=4, seed=1, settings=SMALL)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# --- ray casting


def test_a_wall_ahead_has_the_depth_of_its_plane_at_every_pixel_centre() -> None:
    wall = Box(centre=(0.0, 2.05, 0.0), size=(1.0, 0.1, 0.5), label=1, texture=0)
    camera = Camera(width=40, height=30, fx=40.0, fy=40.0, cx=20.0, cy=15.0)
    pose = np.eye(4)
    pose[:3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # x right, z into +y, y down
    hits = cast(Faces.of([wall]), camera, pose)
    # 0.5 m to each side at 2 m are 10 pixels, so columns 10..29 and rows 10..19.
    expected = np.zeros((30, 40), dtype=np.float32)
    expected[10:20, 10:30] = 2.0
    np.testing.assert_allclose(hits.depth, expected, atol=1e-6)
    np.testing.assert_array_equal(hits.face >= 0, expected > 0)
    np.testing.assert_allclose(hits.s[15, 10:30], (np.arange(20) + 0.5) / 20, atol=1e-6)
    np.testing.assert_allclose(hits.t[10:20, 15], (np.arange(10) + 0.5) / 20, atol=1e-6)


def test_the_nearer_box_hides_the_farther_and_nothing_is_seen_behind_the_camera() -> None:
    camera = Camera(width=8, height=8, fx=8.0, fy=8.0, cx=4.0, cy=4.0)
    boxes = [
        Box(centre=(0.0, 0.0, z), size=(9.0, 9.0, 0.2), label=1, texture=0, yaw=yaw)
        for z, yaw in ((3.0, 0.3), (2.0, 1.1), (-2.0, 0.0))
    ]
    for order in (boxes, boxes[::-1]):
        np.testing.assert_allclose(cast(Faces.of(order), camera, np.eye(4)).depth, 1.9, atol=1e-6)


def test_faces_look_outwards_and_lie_on_their_box() -> None:
    box = Box(centre=(1.0, 2.0, 3.0), size=(0.5, 0.7, 0.9), yaw=0.7, label=1, texture=0)
    faces = Faces.of([box])
    assert len(faces) == len(ALL_FACES)
    middle = faces.origin + (faces.extent[:, :1] * faces.s_axis + faces.extent[:, 1:] * faces.t_axis) / 2
    np.testing.assert_allclose(box.distance(middle), 0, atol=1e-12)
    assert (np.einsum("kd,kd->k", middle - box.centre, faces.normal) > 0).all()
    # Seen from outside, s runs right and t down, so that writing is not mirrored.
    np.testing.assert_allclose(np.cross(faces.t_axis, faces.s_axis), faces.normal, atol=1e-12)
    np.testing.assert_allclose(box.distance([[1.0, 2.0, 3.0], [1.0, 2.0, 4.45]]), [-0.25, 1.0], atol=1e-12)


def test_atlas_reads_the_texel_and_its_mean_from_afar() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, 0::2] = 200
    atlas = TextureAtlas([image], texel=0.01)
    s, t = np.array([0.005, 0.015, 0.085], np.float32), np.full(3, 0.005, np.float32)
    texture = np.zeros(3, np.int64)
    assert atlas.sample(texture, s, t, np.full(3, 0.01, np.float32))[:, 0].tolist() == [200, 0, 200]
    assert atlas.sample(texture, s, t, np.full(3, 0.02, np.float32))[:, 0].tolist() == [100, 100, 100]


# --- rooms: depth against surfaces and points


def test_back_projected_depth_lies_on_the_surfaces(scene: writer.Scene) -> None:
    camera = scene.depth_camera
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    for frame in (0, 7, 14):
        depth = writer.render_depth(scene, frame) / 1000
        rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones_like(u)], axis=-1)
        seen = depth > 0
        world = (rays * depth[..., None])[seen][::7] @ scene.poses[frame][:3, :3].T + scene.poses[frame][:3, 3]
        nearest = np.min([np.abs(box.distance(world)) for box in scene.room.boxes], axis=0)
        assert nearest.max() < 2e-3  # depth is stored in whole millimetres


def test_points_agree_with_the_depth_of_the_frames_that_see_them(scene: writer.Scene) -> None:
    camera, covered = scene.depth_camera, np.zeros(len(scene.mesh.coord), dtype=bool)
    normal = scene.faces.normal[scene.mesh.surface]
    errors = []
    for frame, pose in enumerate(scene.poses):
        offset = scene.mesh.coord - pose[:3, 3]
        local = offset @ pose[:3, :3]
        z = local[:, 2]
        u, v = (
            local[:, i] / np.maximum(z, 1e-6) * f + c
            for i, f, c in ((0, camera.fx, camera.cx), (1, camera.fy, camera.cy))
        )
        inside = (z > 0.1) & (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
        depth = np.zeros(len(z))
        depth[inside] = writer.render_depth(scene, frame)[v[inside].astype(int), u[inside].astype(int)] / 1000
        visible = inside & (np.abs(depth - z) < 0.2)
        covered |= visible
        # A pixel's centre is not the point's own place: compare where the surface faces the camera.
        cosine = -np.einsum("nd,nd->n", offset, normal) / np.linalg.norm(offset, axis=1)
        errors.append(np.abs(depth - z)[visible & (cosine > 0.9)])
    assert covered.mean() >= 0.85
    found = np.concatenate(errors)
    assert len(found) > 5000
    assert (found < 0.02).mean() > 0.97


def test_mesh_is_a_scan_of_what_can_be_seen(scene: writer.Scene) -> None:
    mesh = scene.mesh
    assert 20_000 < len(mesh.coord) < 60_000
    for number, box in enumerate(scene.room.boxes):
        others = scene.faces.box[mesh.surface] != number
        assert box.distance(mesh.coord[others]).min() > -0.012  # surface noise reaches a little into a neighbour
    corners = mesh.coord[mesh.faces].astype(np.float64)
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outward = np.einsum("fd,fd->f", cross, scene.faces.normal[mesh.surface[mesh.faces[:, 0]]])
    assert (outward > 0).all()
    assert np.array_equal(np.unique(mesh.faces), np.arange(len(mesh.coord)))  # every vertex has a normal


def test_cameras_stand_inside_the_room_above_the_furniture(scene: writer.Scene) -> None:
    for pose in scene.poses:
        x, y, z = pose[:3, 3]
        assert 0.4 < x < scene.room.width - 0.4
        assert 0.4 < y < scene.room.depth - 0.4
        assert 1.2 < z < 1.75
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
        assert pose[2, 1] < 0  # the camera's y points down


# --- the official layout, through the real reader


def test_the_reader_reads_what_was_written(rooms: Path) -> None:
    dataset = open_dataset("rooms", rooms)
    train, val = dataset.sample_ids("train"), dataset.sample_ids("val")
    assert list(train) == ["scene0000_00", "scene0002_00", "scene0003_00"]
    assert list(val) == ["scene0001_00"]
    lost = 0
    for number, name in enumerate(["scene0000_00", "scene0001_00", "scene0002_00", "scene0003_00"]):
        expected, sample = writer.build_scene(number, seed=1, settings=SMALL), dataset.read(name)
        points = sample.load_points()
        np.testing.assert_array_equal(points.coord, expected.mesh.coord)
        np.testing.assert_array_equal(points.color, expected.mesh.color)
        assert points.segment is not None
        assert points.normal is not None
        assert points.segment.min() >= 0
        assert len(np.unique(points.segment)) >= 10
        names = np.array([info.name for info in dataset.classes])[points.segment]
        assert (names[expected.mesh.label == 20] == "floor mat").all()
        agreement = np.einsum("nd,nd->n", points.normal, expected.faces.normal[expected.mesh.surface])
        assert agreement.min() > 0.9
        assert len(sample.views) == 3
        for frame, view in enumerate(sample.views):
            if not np.isfinite(view.camera_from_world).all():
                assert frame in expected.lost
                lost += 1
                continue
            assert frame not in expected.lost
            np.testing.assert_allclose(view.camera_from_world @ expected.poses[frame], np.eye(4), atol=1e-7)
            assert view.depth_camera is not None
            assert view.load_depth is not None
            for camera, true in ((view.camera, expected.color_camera), (view.depth_camera, expected.depth_camera)):
                *numbers, model, distortion = astuple(camera)
                *true_numbers, true_model, true_distortion = astuple(true)
                assert numbers == pytest.approx(true_numbers)
                assert (model, distortion) == (true_model, true_distortion)
            assert view.load_image().shape == (48, 64, 3)
            np.testing.assert_array_equal(
                view.load_depth(), writer.render_depth(expected, frame).astype(np.float32) / np.float32(1000)
            )
    assert lost > 0


def test_rooms_of_both_splits_differ(rooms: Path) -> None:
    meshes = {p.read_bytes() for p in rooms.glob("scans/*/*_vh_clean_2.ply")}
    assert len(meshes) == 4


# --- determinism and resuming


def test_same_files_whatever_the_workers_and_the_number_of_rooms(rooms: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synthesize(tmp_path / "a", scenes=2, seed=1, settings=SMALL, workers=2, progress=lambda *c: seen.append(c))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    first = contents(tmp_path / "a")
    whole = contents(rooms)
    assert {k for k, v in first.items() if whole[k] != v} == {"scannetv2_train.txt"}
    seen.clear()
    synthesize(tmp_path / "a", scenes=4, seed=1, settings=SMALL, progress=lambda *c: seen.append(c))
    assert seen == [(2, 4), (3, 4), (4, 4)]
    assert contents(tmp_path / "a") == whole


def test_another_seed_gives_other_rooms(rooms: Path) -> None:
    other = writer.build_scene(0, seed=2, settings=SMALL)
    this = writer.build_scene(0, seed=1, settings=SMALL)
    assert other.room.width != this.room.width


def test_a_stopped_run_leaves_no_half_room_and_is_continued(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(scene: writer.Scene, frame: int) -> NDArray[np.uint16]:
        raise OSError(28, "No space left on device")

    root = tmp_path / "rooms"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "render_depth", full_disk)
        with pytest.raises(StorageError, match=r"No space left.*run again"):
            synthesize(root, scenes=4, seed=1, settings=SMALL)
    assert not any((root / "scans").iterdir())
    (root / "scans" / ".scene0000_00.1.partial").mkdir()  # as a killed run leaves it
    synthesize(root, scenes=4, seed=1, settings=SMALL)
    assert contents(root) == contents(rooms)
    shutil.rmtree(root / "scans" / "scene0002_00")
    synthesize(root, scenes=4, seed=1, settings=SMALL)
    assert contents(root) == contents(rooms)


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenes": 1}, "at least one for training and one for validation, got 1 rooms"),
        ({"scenes": 20_000}, "from 2 to 10000"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"workers": 0}, "at least one worker, got 0"),
    ],
)
def test_wrong_arguments(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        synthesize(tmp_path / "rooms", settings=SMALL, **change)
    assert not (tmp_path / "rooms").exists()


@pytest.mark.parametrize(
    "change", [{"frames": 0}, {"point_spacing": float("nan")}, {"color_size": (0, 10)}, {"val_fraction": 1.0}]
)
def test_wrong_settings(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        RoomsSettings(**change)  # type: ignore[arg-type]


def test_folders_that_are_not_ours(rooms: Path, tmp_path: Path) -> None:
    before = contents(rooms)
    with pytest.raises(UsageError, match=r"another seed: expected \{'seed': 2\}, got \{'seed': 1\}"):
        synthesize(rooms, scenes=4, seed=2, settings=SMALL)
    with pytest.raises(UsageError, match="another settings"):
        synthesize(rooms, scenes=4, seed=1, settings=replace(SMALL, frames=4))
    assert contents(rooms) == before

    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="not generated rooms"):
        synthesize(tmp_path, settings=SMALL)
    with pytest.raises(UsageError, match="is a file"):
        synthesize(tmp_path / "photo.jpg", settings=SMALL)
    with pytest.raises(StorageError, match="cannot write"):
        synthesize(tmp_path / "photo.jpg" / "below", settings=SMALL)
    (tmp_path / "cut").mkdir()
    for text in ("{", json.dumps([1])):
        (tmp_path / "cut" / "rooms.json").write_text(text)
        with pytest.raises(UsageError, match="another folder"):
            synthesize(tmp_path / "cut", settings=SMALL)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


# --- the point of the rooms


def nearest_centroid(features: NDArray[np.float64], labels: NDArray[np.int64], train: NDArray[np.bool_]) -> float:
    """Accuracy on the rest of standardised features under a nearest-centroid classifier made of `train`."""
    z = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    classes = np.unique(labels)
    centroids = np.stack([z[train & (labels == c)].mean(axis=0) for c in classes])
    predicted = classes[((z[:, None] - centroids) ** 2).sum(axis=-1).argmin(axis=1)]
    return float((predicted == labels)[~train].mean())


def test_panels_are_not_told_apart_by_colour_and_geometry() -> None:
    settings = RoomsSettings(texel=0.03, point_spacing=0.08)
    rows, labels, train = [], [], []
    for number in range(24):
        scene = writer.build_scene(number, seed=0, settings=settings)
        owner = scene.faces.box[scene.mesh.surface]
        for i, box in enumerate(scene.room.boxes[5:], start=5):
            if box.label not in PANELS or box.size[1] > 0.025 or not (owner == i).any():
                continue
            color = scene.mesh.color[owner == i].astype(np.float64)
            rows.append([*color.mean(axis=0), *color.std(axis=0), *box.size, box.centre[2]])
            labels.append(box.label)
            train.append(not settings.is_val(number))
    accuracy = nearest_centroid(np.array(rows), np.array(labels), np.array(train))
    assert accuracy < 2 / len(PANELS)  # chance is 1 of 7


def test_textures_are_told_apart_by_their_pattern() -> None:
    patterns = {**PANELS, 100: RUGS[2], 101: RUGS[20]}
    rows, labels, train = [], [], []
    for label, pattern in patterns.items():
        for number in range(12):
            image = bake(np.random.default_rng((label, number)), pattern, 0.8, 0.8, 0.01).astype(np.float64)
            grey = image.mean(axis=-1)
            spectrum = np.abs(np.fft.fft2((grey - grey.mean()) / grey.std()))[:41, :41]
            coarse = np.log(spectrum[:40, :40].reshape(8, 5, 8, 5).mean(axis=(1, 3)))
            rows.append(coarse.ravel())
            labels.append(label)
            train.append(number < 8)
    assert nearest_centroid(np.array(rows), np.array(labels), np.array(train)) > 0.85


def test_all_patterns_share_one_distribution_of_colours() -> None:
    """With one palette every pattern gets the same share of dark, middle and bright texels."""
    quantiles = []
    for label, pattern in {**PANELS, **RUGS}.items():
        canvas = Canvas(np.random.default_rng((7, label)), 1.0, 1.0, 0.005)
        image = Palette(np.random.default_rng(7)).paint(pattern(canvas))
        quantiles.append(np.quantile(image.astype(np.float64), np.linspace(0.02, 0.98, 33), axis=(0, 1)))
    assert np.ptp(quantiles, axis=0).max() < 6  # grey levels
