import importlib.resources
import json
import logging
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ditr_cache.datasets import open_dataset
from ditr_cache.datasets.meshes import vertex_normals
from ditr_cache.datasets.scannet.dataset import ScanNetDataset
from ditr_cache.errors import DataError, MissingDataError, UnknownNameError
from ditr_cache.geometry import inside, project, to_camera
from ditr_cache.sample import Camera

# An analytic scan: a wall at z = 3 m whose colour is a function of position, seen by a camera that turns.
COLOR = Camera(width=96, height=72, fx=80, fy=80, cx=48, cy=36)
DEPTH = Camera(width=64, height=40, fx=50, fy=50, cx=32, cy=20)
WALL_Z = 3.0
FRAMES = {0: 0.0, 2: 0.15, 10: 0.3}  # frame number -> rotation about y


def wall_color(x, y):
    return np.stack([128 + 30 * x, 128 + 40 * y, np.full_like(x, 60)], axis=-1).clip(0, 255).astype(np.uint8)


def world_from_camera(angle):
    pose = np.eye(4)
    pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    pose[:3, 3] = 0.4, -0.2, angle
    return pose


def render(camera, pose):
    """Depth along z and world x, y of the wall at every pixel centre."""
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones_like(u)], axis=-1)
    directions = rays @ pose[:3, :3].T
    z = (WALL_Z - pose[2, 3]) / directions[..., 2]
    world = directions * z[..., None] + pose[:3, 3]
    return z, world[..., 0], world[..., 1]


def ply_bytes(columns, faces=()):
    """A binary PLY put together row by row."""
    codes = {"float": "f", "uchar": "B", "ushort": "H"}
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(columns[0][2])}"]
    lines += [f"property {kind} {name}" for name, kind, _ in columns]
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header\n"]
    row = "<" + "".join(codes[kind] for _, kind, _ in columns)
    out = "\n".join(lines).encode()
    out += b"".join(struct.pack(row, *values) for values in zip(*(c[2] for c in columns), strict=True))
    return out + b"".join(struct.pack("<B3i", 3, *face) for face in faces)


X, Y = (a.ravel() for a in np.meshgrid(np.linspace(-1, 1.5, 11), np.linspace(-1, 1, 9)))
NYU40 = np.resize(np.arange(41), len(X))


def write_mesh(scan, *, labels=NYU40, z=None):
    rgb = wall_color(X, Y)
    n = 11
    faces = [(i, i + 1, i + n) for r in range(8) for i in range(r * n, r * n + n - 1)]
    z = np.full(len(X), WALL_Z) if z is None else z
    columns = [("x", "float", X), ("y", "float", Y), ("z", "float", z)]
    colors = [(name, "uchar", rgb[:, i]) for i, name in enumerate(("red", "green", "blue"))]
    (scan / f"{scan.name}_vh_clean_2.ply").write_bytes(ply_bytes(columns + colors, faces))
    if labels is not None:
        table = [("x", "float", np.zeros(len(labels))), ("label", "ushort", labels)]
        (scan / f"{scan.name}_vh_clean_2.labels.ply").write_bytes(ply_bytes(table, faces))


def write_matrix(path, matrix):
    path.write_text("\n".join(" ".join(f"{value:f}" for value in row) for row in matrix) + "\n")


def matrix_of(camera):
    return [[camera.fx, 0, camera.cx, 0], [0, camera.fy, camera.cy, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def frame_arrays(angle):
    pose = world_from_camera(angle)
    _, x, y = render(COLOR, pose)
    depth, _, _ = render(DEPTH, pose)
    raw = np.rint(depth * 1000).astype(np.uint16)
    raw[0, :2] = 0, 65535
    return pose, wall_color(x, y), raw


def write_frames(scan):
    for name in ("color", "depth", "pose", "intrinsic"):
        (scan / name).mkdir(parents=True)
    for frame, angle in FRAMES.items():
        pose, image, raw = frame_arrays(angle)
        Image.fromarray(image).save(scan / "color" / f"{frame}.jpg", quality=95)
        Image.fromarray(raw).save(scan / "depth" / f"{frame}.png")
        write_matrix(scan / "pose" / f"{frame}.txt", pose)
    write_matrix(scan / "intrinsic" / "intrinsic_color.txt", matrix_of(COLOR))
    write_matrix(scan / "intrinsic" / "intrinsic_depth.txt", matrix_of(DEPTH))


def write_sens(scan, poses=None):
    out = struct.pack("<IQ", 4, 3) + b"iPd"
    for matrix in (matrix_of(COLOR), np.eye(4), matrix_of(DEPTH), np.eye(4)):
        out += np.asarray(matrix, "<f4").tobytes()
    out += struct.pack("<ii4IfQ", 2, 1, COLOR.width, COLOR.height, DEPTH.width, DEPTH.height, 1000, len(FRAMES))
    for i, angle in enumerate(FRAMES.values()):
        pose, image, raw = frame_arrays(angle)
        Image.fromarray(image).save(scan / "frame.jpg", quality=95)
        jpeg, blob = (scan / "frame.jpg").read_bytes(), zlib.compress(raw.astype("<u2").tobytes())
        pose = pose if poses is None else poses[i]
        out += np.asarray(pose, "<f4").tobytes() + struct.pack("<4Q", i, i, len(jpeg), len(blob)) + jpeg + blob
    (scan / "frame.jpg").unlink()
    (scan / f"{scan.name}.sens").write_bytes(out)


SCAN = "scene0191_00"  # of the official training list


@pytest.fixture
def scan(tmp_path):
    folder = tmp_path / "scans" / SCAN
    folder.mkdir(parents=True)
    write_mesh(folder)
    write_frames(folder)
    return folder


def read(scan):
    return ScanNetDataset(scan.parent.parent).read(scan.name)


def agreement(view, points, *, camera_from_world=None, depth=None, depth_camera=None, camera=None):
    """Fractions of points that agree with the view's depth (2 cm) and colour; arguments plant faults."""
    pose = view.camera_from_world if camera_from_world is None else camera_from_world
    c = to_camera(points.coord, pose)
    c = c[c[:, 2] > 0.1]
    depth_camera = depth_camera or view.depth_camera
    u, v = project(c, depth_camera)
    ok = inside(u, v, depth_camera)
    depth = view.load_depth() if depth is None else depth
    row = np.minimum(v[ok].astype(int), depth.shape[0] - 1)
    column = np.minimum(u[ok].astype(int), depth.shape[1] - 1)
    by_depth = np.abs(depth[row, column] - c[ok, 2]) < 0.02
    camera = camera or view.camera
    u, v = project(to_camera(points.coord, pose), camera)
    ok = inside(u, v, camera)
    difference = view.load_image()[v[ok].astype(int), u[ok].astype(int)].astype(int) - points.color[ok]
    return by_depth.mean() if len(by_depth) else 0.0, (np.abs(difference).max(axis=1) < 10).mean() if ok.any() else 0.0


def check_views(sample):
    points = sample.load_points()
    for view in sample.views:
        assert view.load_image().shape == (COLOR.height, COLOR.width, 3)
        assert view.load_depth().shape == (DEPTH.height, DEPTH.width)
        assert view.load_depth()[0, :2].tolist() == [0, 0]
        assert agreement(view, points) == (1.0, 1.0)


def test_exported_frames(scan):
    sample = read(scan)
    assert (sample.id, sample.split, sample.every_nth_frame, sample.broken_views) == (SCAN, "train", 1, ())
    assert [view.id for view in sample.views] == ["0", "2", "10"]  # by number, not by name
    assert sample.views[0].camera == COLOR and sample.views[0].depth_camera == DEPTH
    check_views(sample)


def test_sens_file_gives_the_same_views(scan, tmp_path):
    exported = read(scan)
    other = tmp_path / "other" / "scans" / SCAN
    other.mkdir(parents=True)
    write_mesh(other)
    write_sens(other)
    sample = read(other)
    assert [view.id for view in sample.views] == ["0", "1", "2"] and sample.every_nth_frame == 10
    check_views(sample)
    for a, b in zip(sample.views, exported.views, strict=True):
        np.testing.assert_array_equal(a.load_image(), b.load_image())
        np.testing.assert_array_equal(a.load_depth(), b.load_depth())
        np.testing.assert_allclose(a.camera_from_world, b.camera_from_world, atol=1e-5)


def test_planted_faults_are_seen(scan):
    sample = read(scan)
    points, view = sample.load_points(), sample.views[2]
    turned = agreement(view, points, camera_from_world=np.linalg.inv(view.camera_from_world))
    assert max(turned) < 0.5  # camera-to-world used as world-to-camera
    assert agreement(view, points, depth=view.load_depth() * 1000)[0] < 0.1  # millimetres read as metres
    assert agreement(view, points, depth_camera=COLOR)[0] < 0.9  # colour intrinsics used for depth
    resized = Camera(width=COLOR.width, height=COLOR.height, fx=DEPTH.fx, fy=DEPTH.fy, cx=DEPTH.cx, cy=DEPTH.cy)
    assert agreement(view, points, camera=resized)[1] < 0.5  # depth intrinsics used for colour


def test_points_with_color_normals_and_labels(scan):
    points = read(scan).load_points()
    np.testing.assert_array_equal(points.coord[:, 0], X.astype(np.float32))
    np.testing.assert_array_equal(points.color, wall_color(X, Y))
    assert points.normal is not None and points.segment is not None
    isolated = len(X) - 1  # the mesh has one triangle per cell, none at the far corner
    np.testing.assert_allclose(points.normal[:isolated], np.tile([0, 0, 1], (isolated, 1)), atol=1e-6)
    assert points.normal[isolated].tolist() == [0, 0, 0]
    benchmark = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39]
    expected = [benchmark.index(label) if label in benchmark else -1 for label in NYU40]
    assert points.segment.tolist() == expected and points.segment.dtype == np.int16


def test_classes_are_those_of_the_benchmark(scan):
    classes = ScanNetDataset(scan.parent.parent).classes
    assert len(classes) == 20
    assert [c.name for c in classes][:3] == ["wall", "floor", "cabinet"] and classes[19].name == "otherfurniture"
    assert classes[13].name == "curtain" and classes[13].color == (219, 219, 141)


def test_labels_beyond_nyu40_are_ignored(scan):
    write_mesh(scan, labels=np.resize([0, 40, 41, 65535, 1], len(X)))
    assert read(scan).load_points().segment[:5].tolist() == [-1, -1, -1, -1, 0]


def test_normals_are_weighted_by_area():
    coord = np.float32([[0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 1], [5, 5, 5]])
    faces = np.int32([[0, 1, 2], [0, 2, 3], [1, 1, 1]])  # areas 4.5 along z and 1.5 along x; one degenerate
    normal = vertex_normals(coord, faces)
    np.testing.assert_allclose(normal[0], np.array([1.5, 0, 4.5]) / np.hypot(1.5, 4.5), atol=1e-6)
    np.testing.assert_allclose(normal[[1, 3]], [[0, 0, 1], [1, 0, 0]], atol=1e-6)
    assert normal[4].tolist() == [0, 0, 0]


# Frames that cannot be used


def test_infinite_poses_stay_as_views_without_pose(scan):
    write_matrix(scan / "pose" / "2.txt", np.full((4, 4), -np.inf))
    sample = read(scan)
    assert [np.isfinite(v.camera_from_world).all() for v in sample.views] == [True, False, True]
    assert sample.broken_views == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 9 or 16 numbers"),
        ("1 0 0 0 0 1 zero", "expected the numbers of a matrix"),
        ("2 0 0 0 0 2 0 0 0 0 2 0 0 0 0 1", "expected a rotation and a translation"),
        ("-1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", "expected a rotation and a translation"),
        ("1 0 0 0 1 0 0 0 1", "expected a 4x4 matrix"),
        (None, "no such file"),
    ],
)
def test_unusable_pose_is_a_broken_view(scan, text, message):
    path = scan / "pose" / "2.txt"
    path.unlink() if text is None else path.write_text(text)
    sample = read(scan)
    assert [view.id for view in sample.views] == ["0", "10"]
    ((view_id, error),) = sample.broken_views
    assert view_id == "2" and message in error and str(path) in error


def empty_color(scan):
    for frame in (scan / "color").iterdir():
        frame.unlink()


def test_poses_in_a_sens_file_that_cannot_be_used(scan):
    empty_color(scan)
    write_sens(scan, [np.diag([1, 1, 2, 1]), -np.eye(4), np.eye(4)])
    sample = read(scan)
    assert [v.id for v in sample.views] == ["2"]
    assert [view for view, _ in sample.broken_views] == ["0", "1"] and "frame 1" in sample.broken_views[1][1]


@pytest.mark.parametrize("exported", [True, False])
def test_zero_and_infinite_poses_are_lost_tracking(scan, exported):
    poses = [np.full((4, 4), -np.inf), np.zeros((4, 4)), np.eye(4)]
    if exported:
        for number, pose in zip(FRAMES, poses, strict=True):
            write_matrix(scan / "pose" / f"{number}.txt", pose)
    else:
        empty_color(scan)
        write_sens(scan, poses)
    sample = read(scan)
    assert [bool(np.isfinite(v.camera_from_world).all()) for v in sample.views] == [False, False, True]
    assert sample.broken_views == ()


def test_frame_without_depth_is_broken(scan):
    (scan / "depth" / "10.png").unlink()
    sample = read(scan)
    assert len(sample.views) == 2 and sample.broken_views[0][0] == "10"
    assert "no depth file for 10.jpg; export depth with" in sample.broken_views[0][1]


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_depth_was_not_exported_at_all(scan, folder):
    """One message, not one a frame."""
    shutil.rmtree(scan / "depth")
    if folder == "empty":
        (scan / "depth").mkdir()
    sample = read(scan)
    assert not sample.views
    ((view, error),) = sample.broken_views
    assert view == "" and f"{scan / 'depth'}: no depth maps of the 3 images" in error
    assert "SensReader (--export_depth_images), then run again with --retry-incomplete" in error


@pytest.mark.parametrize(("name", "load"), [("color/2.jpg", "load_image"), ("depth/2.png", "load_depth")])
@pytest.mark.parametrize("damage", ["half", "empty", "text"])
def test_damaged_image_names_its_file(scan, name, load, damage):
    data = (scan / name).read_bytes()
    (scan / name).write_bytes({"half": data[: len(data) // 2], "empty": b"", "text": b"not an image"}[damage])
    view = read(scan).views[1]
    with pytest.raises(DataError, match=str(scan / name)):
        getattr(view, load)()


def test_image_of_another_size_fails_when_loaded(scan):
    Image.new("RGB", (48, 36)).save(scan / "color" / "2.jpg")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(scan / "depth" / "2.png")
    view = read(scan).views[1]
    with pytest.raises(DataError, match=r"expected 96x72 pixels .* got 48x36"):
        view.load_image()
    with pytest.raises(DataError, match=r"expected 64x40 pixels .* got 8x8"):
        view.load_depth()


def test_image_kinds_that_are_not_what_they_should_be(scan):
    Image.fromarray(np.zeros((DEPTH.height, DEPTH.width), np.uint8)).save(scan / "depth" / "2.png")
    (scan / "color" / "2.jpg").unlink()
    Image.fromarray(np.zeros((COLOR.height, COLOR.width), np.uint16)).save(scan / "color" / "2.png")
    view = read(scan).views[1]
    with pytest.raises(DataError, match="expected a 16-bit grey depth map"):
        view.load_depth()
    with pytest.raises(DataError, match="expected an 8-bit colour image"):
        view.load_image()


def test_huge_image_is_not_decoded(scan):
    path = scan / "color" / "0.png"
    (scan / "color" / "0.jpg").unlink()

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    bomb = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    with pytest.raises(DataError, match=r"0\.png"):
        read(scan).views[0].load_image()


def test_two_files_of_one_frame(scan):
    Image.new("RGB", (96, 72)).save(scan / "color" / "02.jpg")
    with pytest.raises(DataError, match="two files have frame number 2"):
        read(scan)


def without_frames(sample):
    """The points are kept, and the file that is missing is named once."""
    assert sample.views == () and len(sample.load_points().coord) == 99
    ((view, error),) = sample.broken_views
    assert view == "" and re.search(r"scene0191_00\.sens: no such file, .*--type \.sens", error)


def test_an_export_without_images_hides_no_sens_file(scan):
    empty_color(scan)
    (scan / "color" / "Thumbs.db").write_bytes(b"")
    without_frames(read(scan))
    write_sens(scan)
    check_views(read(scan))
    assert len(read(scan).views) == 3


@pytest.mark.parametrize("left", [("color",), ("color", "depth", "pose", "intrinsic"), ("depth",)])
def test_half_an_export_and_no_sens_file(scan, left):
    empty_color(scan)
    for name in {"color", "depth", "pose", "intrinsic"} - {*left}:
        shutil.rmtree(scan / name)
    without_frames(read(scan))


# Intrinsics


def write_info(scan, **values):
    lines = ["axisAlignment = 1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", "sceneType = Office"]
    (scan / f"{scan.name}.txt").write_text("\n".join([*lines, *(f"{k} = {v}" for k, v in values.items())]) + "\n")


def test_images_resized_on_export_with_intrinsics_left_as_calibrated(scan):
    write_matrix(scan / "intrinsic" / "intrinsic_color.txt", matrix_of(COLOR.resized(width=1296, height=968)))
    with pytest.raises(DataError, match=r"intrinsic_color\.txt: principal point .* another image size"):
        read(scan)
    write_info(scan, colorWidth=1296, colorHeight=968)
    sample = read(scan)
    for field in ("width", "height", "fx", "fy", "cx", "cy"):
        assert getattr(sample.views[0].camera, field) == pytest.approx(getattr(COLOR, field), rel=1e-4)
    check_views(sample)


def test_images_and_intrinsics_resized_together(scan):
    write_info(scan, colorWidth=1296, colorHeight=968, depthWidth=640, depthHeight=480)
    check_views(read(scan))


def test_intrinsics_from_the_scan_information(scan):
    (scan / "intrinsic" / "intrinsic_color.txt").unlink()
    (scan / "intrinsic" / "intrinsic_depth.txt").unlink()
    with pytest.raises(MissingDataError, match=r"intrinsic_color\.txt: no such file, and .*--export_intrinsics"):
        read(scan)
    values = {f"{k}_{kind}": v for kind, c in (("color", COLOR), ("depth", DEPTH)) for k, v in
              (("fx", c.fx), ("fy", c.fy), ("mx", c.cx), ("my", c.cy))}  # fmt: skip
    write_info(scan, **values)
    check_views(read(scan))


def test_singular_intrinsics(scan):
    write_matrix(scan / "intrinsic" / "intrinsic_depth.txt", [[0, 0, 32, 0], [0, 0, 20, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with pytest.raises(DataError, match=r"intrinsic_depth\.txt: camera: singular intrinsics"):
        read(scan)


# Points that cannot be used


def test_labels_of_another_length(scan):
    write_mesh(scan, labels=NYU40[:-1])
    with pytest.raises(DataError, match="98 labels for the 99 vertices"):
        read(scan).load_points()


def test_nan_vertices(scan):
    z = np.full(len(X), WALL_Z)
    z[7] = np.nan
    write_mesh(scan, z=z)
    with pytest.raises(DataError, match=r"_vh_clean_2\.ply: points: 1 of 99 coordinates are not finite"):
        read(scan).load_points()


@pytest.mark.parametrize("suffix", ["_vh_clean_2.ply", "_vh_clean_2.labels.ply"])
def test_truncated_and_missing_mesh(scan, suffix):
    path = scan / f"{SCAN}{suffix}"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="truncated"):
        read(scan).load_points()
    path.unlink()
    with pytest.raises(MissingDataError, match=f"no such file; download it .*--type {suffix}"):
        read(scan).load_points()


# Instances


def write_objects(scan, *, table=True):
    """Every vertex is a segment; NYU40 ids as categories, each an object."""
    groups = [
        {"id": i, "label": f"thing {i}", "segments": (10 * np.flatnonzero(i == NYU40)).tolist()} for i in range(41)
    ]
    (scan / f"{SCAN}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    segments = {"segIndices": (10 * np.arange(len(X))).tolist()}
    (scan / f"{SCAN}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segments))
    if table:
        rows = [f"{1000 + i}\tthing {i}\t{i}\n" for i in range(41)]
        (scan.parents[1] / "scannetv2-labels.combined.tsv").write_text("id\traw_category\tnyu40id\n" + "".join(rows))


def test_objects_give_instances_and_the_same_labels(scan, caplog):
    by_vertex = read(scan).load_points()
    write_objects(scan)
    caplog.clear()
    (scan / f"{SCAN}_vh_clean_2.labels.ply").unlink()  # it is not needed then
    by_object = read(scan).load_points()
    assert by_vertex.instance is None and by_object.instance.tolist() == NYU40.tolist()
    np.testing.assert_array_equal(by_object.segment, by_vertex.segment)
    assert not caplog.records


@pytest.mark.parametrize("missing", [".aggregation.json", "_vh_clean_2.0.010000.segs.json", "table"])
def test_without_a_file_of_the_objects_there_are_no_instances_and_it_says_so_once(scan, missing, caplog):
    write_objects(scan, table=missing != "table")
    (scan / f"{SCAN}{missing}").unlink(missing_ok=True)
    dataset = ScanNetDataset(scan.parents[1])
    with caplog.at_level(logging.WARNING):
        points = dataset.read(SCAN).load_points()
        dataset.read(SCAN)
    assert points.instance is None and (points.segment >= 0).any()
    (said,) = (record.getMessage() for record in caplog.records)
    expected = scan.parents[1] / "scannetv2-labels.combined.tsv" if missing == "table" else scan / f"{SCAN}{missing}"
    assert f"{expected} is missing" in said and "scannet/plain-strong" in said and "--label_map" in said


def test_generated_rooms_have_no_instances_and_say_nothing(scan, caplog):
    with caplog.at_level(logging.WARNING):
        rooms = open_dataset("rooms", scan.parents[1])
        caplog.clear()
        assert rooms.read(SCAN).load_points().instance is None
    assert not caplog.records


# Splits


def make_scans(root, *names, folder="scans"):
    for name in names:
        (root / folder / name).mkdir(parents=True)


def test_shipped_lists_are_whole(tmp_path):
    make_scans(tmp_path, "scene0191_00", "scene0000_00", "scene0011_00")
    make_scans(tmp_path, "scene0707_00", folder="scans_test")
    dataset = ScanNetDataset(tmp_path)
    assert {s: dataset.sample_ids(s) for s in dataset.splits} == {
        "train": ["scene0000_00", "scene0191_00"],
        "val": ["scene0011_00"],
        "test": ["scene0707_00"],
    }
    folder = importlib.resources.files("ditr_cache.datasets.scannet") / "splits"
    lists = [set((folder / f"scannetv2_{split}.txt").read_text().split()) for split in ("train", "val", "test")]
    assert [len(ids) for ids in lists] == [1201, 312, 100] and len(set().union(*lists)) == 1613


def test_test_scans_have_no_labels(tmp_path):
    scan = tmp_path / "scans_test" / "scene0707_00"
    scan.mkdir(parents=True)
    write_mesh(scan, labels=None)
    write_frames(scan)
    sample = ScanNetDataset(tmp_path).read("scene0707_00")
    assert sample.split == "test" and sample.load_points().segment is None


@pytest.mark.parametrize("folder", [".", "splits", "meta_data", "Tasks/Benchmark"])
def test_lists_next_to_the_data_win(tmp_path, folder, caplog):
    make_scans(tmp_path, "scene0191_00", "room_1", "room_2", "stray")
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / "scannetv2_train.txt").write_text("room_2\r\nscene0191_00\nnot_downloaded\n")
    (tmp_path / folder / "scannetv2_val.txt").write_text("room_1\n\n")
    with caplog.at_level(logging.WARNING):
        dataset = ScanNetDataset(tmp_path)
    assert dataset.splits == ("train", "val")
    assert dataset.sample_ids("train") == ["room_2", "scene0191_00"] and dataset.sample_ids("val") == ["room_1"]
    assert "1 scans" in caplog.text and "stray" in caplog.text
    with pytest.raises(UnknownNameError, match="stray"):
        dataset.read("stray")


def test_without_any_list_all_scans_are_training(tmp_path, caplog):
    make_scans(tmp_path, "b", "a", ".hidden")
    with caplog.at_level(logging.WARNING):
        dataset = ScanNetDataset(tmp_path)
    assert dataset.splits == ("train",) and dataset.sample_ids("train") == ["a", "b"]
    assert "no split list" in caplog.text


def test_unknown_names(scan):
    dataset = ScanNetDataset(scan.parent.parent)
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        dataset.sample_ids("trian")
    with pytest.raises(UnknownNameError, match="did you mean 'scene0191_00'"):
        dataset.read("scene0191_01")


def test_roots_that_are_not_the_dataset(tmp_path, scan):
    with pytest.raises(MissingDataError, match="is not a folder"):
        open_dataset("scannet", tmp_path / "nowhere")
    root = scan.parent.parent
    below = tmp_path / "1" / "up" / "scannet"
    (below / "scans").mkdir(parents=True)
    for near, right in ((below.parent, below), (scan, root)):
        with pytest.raises(MissingDataError, match=f"no folder 'scans' in .*; pass '{right}' with --root"):
            open_dataset("scannet", near)
    with pytest.raises(MissingDataError, match=f"pass its parent '{root}'"):
        open_dataset("scannet", scan.parent)
    (tmp_path / "1" / "2" / "3").mkdir(parents=True)
    with pytest.raises(
        MissingDataError, match=r"; expected scans/<id>/<id>_vh_clean_2\.ply there, from: download-scann"
    ):
        open_dataset("scannet", tmp_path / "1" / "2" / "3")
    with pytest.raises(MissingDataError, match=r"; expected scans/<id>/ there, from: ditr-cache synthesize"):
        open_dataset("rooms", tmp_path / "1" / "2" / "3")
    (tmp_path / "empty" / "scans").mkdir(parents=True)
    with pytest.raises(MissingDataError, match="no scan in"):
        open_dataset("scannet", tmp_path / "empty")


def test_rooms_have_classes_of_their_own(scan):
    rooms = open_dataset("rooms", scan.parent.parent)
    assert rooms.sample_ids("train") == [SCAN]
    assert [c.name for c in rooms.classes] == [
        "wall", "floor", "cabinet", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "curtain",
        "floor mat", "whiteboard",
    ]  # fmt: skip
    assert len({c.color for c in rooms.classes}) == 13
    ids = [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 16, 20, 30]
    segment = rooms.read(SCAN).load_points().segment
    assert segment.tolist() == [ids.index(label) if label in ids else -1 for label in NYU40]
