import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.fusion import back_project, depth_normals, unproject
from ditr_cache.datasets.rgbd import RGBDDataset
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError
from ditr_cache.geometry import inside, project, to_camera
from ditr_cache.sample import Camera

CAMERA = Camera(width=80, height=60, fx=70, fy=70, cx=40, cy=30)
WALL = np.array([0.6, 0.0, 0.8])  # unit normal of the analytic plane WALL . x = OFFSET; colour is a function of y
OFFSET = 2.0
ANGLES = (0.0, 0.1, 0.2)


def pose_of(angle):
    pose = np.eye(4)
    pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    pose[:3, 3] = 0.3 * angle, 0.1, -angle
    return pose


def render(camera, pose):
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones_like(u)], axis=-1)
    z = (OFFSET - WALL @ pose[:3, 3]) / (rays @ pose[:3, :3].T @ WALL)
    world = (rays * z[..., None]) @ pose[:3, :3].T + pose[:3, 3]
    return z, color_at(world)


def color_at(world):
    green = (100 + 60 * world[..., 1]).clip(0, 255)
    return np.stack([np.full_like(green, 200), green, np.full_like(green, 30)], axis=-1).astype(np.uint8)


def raw_depth(camera, pose):
    raw = np.rint(render(camera, pose)[0] * 1000).astype(np.uint16)
    raw[0, 0], raw[0, 1] = 0, 65535
    return raw


def write_matrix(path, matrix):
    path.write_text("\n".join(" ".join(f"{x:.9f}" for x in row) for row in np.asarray(matrix)) + "\n")


def k_of(camera):
    return [[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]]


def write_seven_scenes(folder, *, intrinsics=True, suffix="png", depth_camera=CAMERA):
    folder.mkdir(parents=True)
    for i, angle in enumerate(ANGLES):
        pose = pose_of(angle)
        Image.fromarray(render(CAMERA, pose)[1]).save(folder / f"frame-{i:06}.color.{suffix}")
        Image.fromarray(raw_depth(depth_camera, pose)).save(folder / f"frame-{i:06}.depth.png")
        write_matrix(folder / f"frame-{i:06}.pose.txt", pose)
    if intrinsics:
        write_matrix(folder.parent / "camera-intrinsics.txt", k_of(CAMERA))
    return folder


def write_open3d(folder, *, log="odometry.log", nested=False):
    (folder / "color").mkdir(parents=True)
    (folder / "depth").mkdir()
    lines = []
    for i, angle in enumerate(ANGLES):
        pose = pose_of(angle)
        Image.fromarray(render(CAMERA, pose)[1]).save(folder / "color" / f"{i:05}.jpg", quality=95)
        Image.fromarray(raw_depth(CAMERA, pose)).save(folder / "depth" / f"{i:05}.png")
        lines += [f"{i} {i} {i + 1}", *("\t".join(f"{x:.9f}" for x in row) for row in pose)]
    (folder / log).write_text("\n".join(lines) + "\n")
    camera = {"width": 80, "height": 60, "intrinsic_matrix": np.array(k_of(CAMERA)).T.ravel().tolist()}
    document = {"intrinsic": camera, "extrinsic": [0] * 16} if nested else camera
    (folder.parent / "camera_primesense.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(params=["7-Scenes", "7-Scenes jpg", "Open3D", "Open3D trajectory"])
def capture(request, tmp_path):
    folder = tmp_path / "room" / "seq-01"
    if request.param == "7-Scenes":
        return write_seven_scenes(folder)
    if request.param == "7-Scenes jpg":
        return write_seven_scenes(folder, suffix="jpg")
    if request.param == "Open3D":
        return write_open3d(folder)
    return write_open3d(folder, log="trajectory.log", nested=True)


@pytest.fixture
def seven_scenes(tmp_path):
    return write_seven_scenes(tmp_path / "room" / "seq-01")


def read(folder):
    return RGBDDataset(folder.parent).read(folder.name)


def test_points_lie_on_the_analytic_surface(capture):
    sample = read(capture)
    assert len(sample.views) == 3 and sample.broken_views == () and sample.split == "train"
    points = sample.load_points()
    assert len(points.coord) > 1000 and points.segment is None
    np.testing.assert_allclose(points.coord @ WALL, OFFSET, atol=0.002)  # millimetres of the depth map
    assert np.abs(points.color.astype(int) - color_at(points.coord)).max() <= 8
    length = np.linalg.norm(points.normal, axis=1)
    assert ((np.abs(length - 1) < 1e-5) | (length == 0)).all() and (length > 0).mean() > 0.8
    assert np.median(points.normal[length > 0] @ -WALL) > 0.99  # towards the cameras
    cells = np.floor(points.coord / 0.02)
    assert len(np.unique(cells, axis=0)) > 0.98 * len(cells)  # one point per voxel, up to rounding at its faces


def overlap(a, b, *, pose=None, scale=1.0):
    """Fraction of a's pixels that fall into b, and of those the fraction that agrees with b's depth within 5 cm."""
    depth = a.load_depth() * np.float32(scale)
    points = unproject(depth, a.depth_camera)[depth > 0]
    world_from_a = np.linalg.inv(a.camera_from_world)
    c = to_camera(points @ world_from_a[:3, :3].T + world_from_a[:3, 3], b.camera_from_world if pose is None else pose)
    in_front = c[:, 2] > 0
    u, v = project(c[in_front], b.depth_camera)
    ok = inside(u, v, b.depth_camera)
    measured = b.load_depth()[v[ok].astype(int), u[ok].astype(int)]
    known = measured > 0
    error = np.abs(measured[known] - c[in_front][ok, 2][known])
    return ok.sum() / len(points), (error < 0.05).mean() if known.any() else 0.0


def test_views_agree_and_planted_faults_do_not(capture):
    a, b = read(capture).views[0], read(capture).views[2]
    inlier, agreeing = overlap(a, b)
    assert inlier > 0.7 and agreeing > 0.999
    assert overlap(a, b, pose=np.linalg.inv(b.camera_from_world))[1] < 0.5  # camera-to-world as world-to-camera
    assert overlap(a, b, scale=1000)[1] < 0.1  # millimetres read as metres
    assert a.load_depth()[0, :2].tolist() == [0, 0]


def test_fusion_is_deterministic_and_does_not_depend_on_batches(seven_scenes, monkeypatch):
    sample = read(seven_scenes)
    first, second = sample.load_points(), sample.load_points()
    np.testing.assert_array_equal(first.coord, second.coord)
    monkeypatch.setattr("ditr_cache.datasets.fusion._MERGE_ROWS", 1)
    merged = sample.load_points()
    np.testing.assert_allclose(first.coord, merged.coord, atol=1e-6)
    assert np.abs(first.color.astype(int) - merged.color).max() <= 1


def test_voxel_size_and_depth_range(seven_scenes):
    coarse = RGBDDataset(seven_scenes.parent, voxel_size=0.1).read("seq-01").load_points()
    fine = read(seven_scenes).load_points()
    assert 5 * len(coarse.coord) < len(fine.coord)
    near = RGBDDataset(seven_scenes.parent, depth_range=(0.1, 2.2)).read("seq-01")
    for view in near.views:
        coord, _, _ = back_project(view, (0.1, 2.2))
        assert to_camera(coord, view.camera_from_world)[:, 2].max() <= 2.2 + 1e-6
    assert len(near.load_points().coord) < len(fine.coord)


def test_normals_stop_at_jumps_and_unknown_depth():
    depth = np.full((30, 40), 2.0, np.float32)
    depth[:, 20:] = 3.0
    depth[10, 5] = 0
    normals = depth_normals(unproject(depth, Camera(width=40, height=30, fx=40, fy=40, cx=20, cy=15)), depth)
    known = np.linalg.norm(normals, axis=2) > 0
    assert not known[:, 17:23].any() and not known[10, 5] and not known[7, 5] and not known[:3].any()
    assert known[15, 12] and known[15, 30]
    np.testing.assert_allclose(normals[known], np.tile([0, 0, -1], (known.sum(), 1)), atol=1e-5)


def test_depth_of_another_size(tmp_path):
    small = CAMERA.resized(width=40, height=30)
    folder = write_seven_scenes(tmp_path / "a" / "seq-01", depth_camera=small)
    sample = read(folder)
    assert sample.views[0].depth_camera == small and sample.views[0].camera == CAMERA
    np.testing.assert_allclose(sample.load_points().coord @ WALL, OFFSET, atol=0.002)

    other = Camera(width=50, height=30, fx=45, fy=44, cx=24, cy=16)
    folder = write_seven_scenes(tmp_path / "b" / "seq-01", depth_camera=other)
    with pytest.raises(DataError, match=r"colour is 80x60 and depth 50x30.*depth-intrinsics\.txt"):
        read(folder)
    write_matrix(folder / "depth-intrinsics.txt", k_of(other))
    points = read(folder).load_points()
    np.testing.assert_allclose(points.coord @ WALL, OFFSET, atol=0.002)
    assert np.abs(points.color.astype(int) - color_at(points.coord)).max() <= 3


# Discovery and splits


def test_sample_ids_are_paths_below_the_root(tmp_path):
    write_seven_scenes(tmp_path / "data" / "office" / "seq-01")
    write_seven_scenes(tmp_path / "data" / "office" / "seq-02", intrinsics=False)
    write_open3d(tmp_path / "data" / "mine" / "RGBD")
    assert RGBDDataset(tmp_path / "data").sample_ids("train") == ["mine/RGBD", "office/seq-01", "office/seq-02"]
    assert RGBDDataset(tmp_path / "data" / "office").sample_ids("train") == ["seq-01", "seq-02"]
    assert RGBDDataset(tmp_path / "data" / "mine" / "RGBD").sample_ids("train") == ["RGBD"]
    assert RGBDDataset(tmp_path).sample_ids("train")[0] == "data/mine/RGBD"
    assert RGBDDataset(tmp_path).classes == ()
    with pytest.raises(UnknownNameError, match="split"):
        RGBDDataset(tmp_path).sample_ids("val")
    with pytest.raises(UnknownNameError, match="did you mean 'data/office/seq-0"):
        RGBDDataset(tmp_path).read("data/office/seq-03")


def test_seven_scenes_split_lists(tmp_path, caplog):
    for i in (1, 2, 3, 4):
        write_seven_scenes(tmp_path / "chess" / f"seq-0{i}")
    (tmp_path / "chess" / "TrainSplit.txt").write_text("sequence1\r\nsequence4\r\n")
    (tmp_path / "chess" / "TestSplit.txt").write_text("sequence2\n")
    with caplog.at_level(logging.WARNING):
        dataset = RGBDDataset(tmp_path / "chess")
    assert dataset.splits == ("train", "test")
    assert dataset.sample_ids("train") == ["seq-01", "seq-04"] and dataset.sample_ids("test") == ["seq-02"]
    assert dataset.read("seq-02").split == "test" and "seq-03" in caplog.text


def test_root_without_captures(tmp_path):
    with pytest.raises(MissingDataError, match="no capture at"):
        open_dataset("rgbd", tmp_path)
    with pytest.raises(MissingDataError, match="is not a folder"):
        open_dataset("rgbd", tmp_path / "none")


# Intrinsics


def test_seven_scenes_default_intrinsics(tmp_path, caplog, monkeypatch):
    folder = write_seven_scenes(tmp_path / "seq-01", intrinsics=False)
    with pytest.raises(MissingDataError, match=r"no intrinsics .*camera-intrinsics\.txt' with three lines"):
        read(folder)
    for path in folder.glob("*.color.png"):
        Image.new("RGB", (640, 480)).save(path)
    for path in folder.glob("*.depth.png"):
        Image.fromarray(np.full((480, 640), 1000, np.uint16)).save(path)
    with caplog.at_level(logging.WARNING):
        assert read(folder).views[0].camera == Camera(width=640, height=480, fx=585, fy=585, cx=320, cy=240)
    assert "585" in caplog.text


def test_intrinsics_are_not_looked_for_above_the_root(seven_scenes):
    with pytest.raises(MissingDataError, match="no intrinsics"):
        RGBDDataset(seven_scenes).read("seq-01")


def test_nearest_intrinsics_win(seven_scenes):
    write_matrix(seven_scenes / "intrinsics.txt", [[77, 0, 40], [0, 77, 30], [0, 0, 1]])
    assert read(seven_scenes).views[0].camera.fx == 77


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("intrinsics.txt", "0 0 40 0 0 30 0 0 1", "singular intrinsics"),
        ("intrinsics.txt", "70 0 40 0 70 30", "expected 9 or 16 numbers"),
        ("intrinsics.txt", "nan 0 40 0 70 30 0 0 1", "singular intrinsics"),
        ("intrinsics.txt", "140 0 80 0 140 60 0 0 1", "another image size"),
        ("camera.json", "{", "not a camera as Open3D writes it"),
        ("camera.json", "[]", "not a camera as Open3D writes it"),
        ("camera.json", '{"width": 80, "height": 60}', "not a camera as Open3D writes it"),
        (
            "camera.json",
            '{"width": 80, "height": 45, "intrinsic_matrix": [70, 0, 0, 0, 70, 0, 40, 22, 1]}',
            "of 80x45 images, but those of the capture have 80x60",
        ),
    ],
)
def test_intrinsics_that_cannot_be_used(seven_scenes, name, text, message):
    (seven_scenes / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read(seven_scenes)
    assert str(seven_scenes / name) in str(caught.value)


def test_json_of_a_larger_image_is_scaled(seven_scenes):
    document = {"width": 160, "height": 120, "intrinsic_matrix": [140, 0, 0, 0, 140, 0, 80, 60, 1]}
    (seven_scenes / "camera.json").write_text(json.dumps(document))
    assert read(seven_scenes).views[0].camera == CAMERA


# Frames that cannot be used


def test_damaged_frames_are_left_out_of_the_fusion(seven_scenes, caplog):
    path = seven_scenes / "frame-000001.depth.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=str(path)):
        read(seven_scenes).views[1].load_depth()
    with caplog.at_level(logging.WARNING):
        points = read(seven_scenes).load_points()
    assert "frame-000001 left out of the fusion" in caplog.text
    np.testing.assert_allclose(points.coord @ WALL, OFFSET, atol=0.002)


def test_truncated_jpeg(tmp_path):
    folder = write_seven_scenes(tmp_path / "room" / "seq-01", suffix="jpg")
    path = folder / "frame-000000.color.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=str(path)):
        read(folder).views[0].load_image()


def test_infinite_and_broken_poses(seven_scenes):
    write_matrix(seven_scenes / "frame-000000.pose.txt", np.full((4, 4), np.inf))
    (seven_scenes / "frame-000001.pose.txt").unlink()
    sample = read(seven_scenes)
    assert [np.isfinite(v.camera_from_world).all() for v in sample.views] == [False, True]
    assert sample.broken_views[0][0] == "frame-000001" and "no such file" in sample.broken_views[0][1]
    np.testing.assert_allclose(sample.load_points().coord @ WALL, OFFSET, atol=0.002)


def test_frame_without_depth(capture):
    paths = (capture / "frame-000001.depth.png", capture / "depth" / "00001.png")
    next(path for path in paths if path.is_file()).unlink()
    sample = read(capture)
    assert len(sample.views) == 2 and "no depth map" in sample.broken_views[0][1]


def test_far_away_pose_is_left_out(seven_scenes, caplog):
    pose = pose_of(0)
    pose[0, 3] = 1e12
    write_matrix(seven_scenes / "frame-000000.pose.txt", pose)
    with caplog.at_level(logging.WARNING):
        assert np.abs(read(seven_scenes).load_points().coord).max() < 10
    assert "the pose is damaged" in caplog.text


def test_all_frames_unusable(seven_scenes):
    for path in seven_scenes.glob("*.depth.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="not a readable image"):
        read(seven_scenes)
    for path in seven_scenes.glob("*.depth.png"):
        Image.fromarray(np.zeros((60, 80), np.uint16)).save(path)
    with pytest.raises(DataError, match="no points: 0 of 3 frames"):
        read(seven_scenes).load_points()
    for path in seven_scenes.glob("*.pose.txt"):
        path.write_text("0 " * 16)
    sample = read(seven_scenes)
    assert sample.views == () and len(sample.broken_views) == 3
    with pytest.raises(DataError, match="no points"):
        sample.load_points()


def test_log_that_does_not_fit_the_frames(tmp_path):
    folder = write_open3d(tmp_path / "a" / "RGBD")
    log = folder / "odometry.log"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-3]))
    with pytest.raises(DataError, match=r"expected five lines for each of the 3 images .* got 12 lines"):
        read(folder)
    log.write_text("\n".join(lines).replace("1.000000000", "9.000000000"))
    assert len(read(folder).broken_views) == 3
    log.unlink()
    with pytest.raises(MissingDataError, match=r"no poses, expected odometry\.log"):
        read(folder)


# Real captures, with the figures that were measured independently


def real(name):
    repository = Path(__file__).parents[2]
    root = Path(os.environ.get("DITR_REALDATA", repository.parent / "shared" / "realdata")) / name
    if not root.is_dir():
        pytest.skip(f"no real data at {root}")
    return root


def test_real_seven_scenes():
    dataset = open_dataset("rgbd", real("7scenes/room"))
    assert dataset.sample_ids("train") == ["seq-01"]
    sample = dataset.read("seq-01")
    assert len(sample.views) == 50 and sample.views[1].id == "frame-000020"
    inlier, agreeing = overlap(*sample.views[:2])
    assert inlier == pytest.approx(0.946, abs=0.005) and agreeing == pytest.approx(0.983, abs=0.005)
    turned = overlap(*sample.views[:2], pose=np.linalg.inv(sample.views[1].camera_from_world))
    assert turned[1] < 0.7


def test_real_open3d():
    dataset = open_dataset("rgbd", real("open3d_rgbd"))
    assert dataset.sample_ids("train") == ["RGBD"]
    sample = dataset.read("RGBD")
    assert sample.views[0].camera == Camera(width=640, height=480, fx=525, fy=525, cx=319.5, cy=239.5)
    for view in sample.views[1:]:
        inlier, agreeing = overlap(sample.views[0], view)
        assert inlier > 0.98 and 0.97 < agreeing < 0.99
    points = sample.load_points()
    assert 20_000 < len(points.coord) < 40_000
    assert (np.linalg.norm(points.normal, axis=1) > 0.99).mean() > 0.9
