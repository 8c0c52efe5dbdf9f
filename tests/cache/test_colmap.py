"""COLMAP models: every camera model against the lenses of the test bed, both encodings, and what is broken."""

import struct

import numpy as np
import pytest

import world as bed
from ditr_cache.datasets.colmap import CAMERA_MODELS, camera_of, has_model, read_cameras, read_images
from ditr_cache.errors import DataError, MissingDataError
from ditr_cache.geometry import inside, project
from ditr_cache.sample import Camera

SIZE = (320, 240)
POINTS = np.random.default_rng(0).uniform((-1.5, -1.1, 1), (1.5, 1.1, 3), (400, 3))
R, T, FISH = (-0.25, 0.07), (0.002, -0.003), (-0.03, 0.004, -0.001, 0.0002)
LENSES = {  # parameters, and the true lens
    "SIMPLE_PINHOLE": ((200.0, 155, 122), bed.pinhole, (200.0, 200.0, 155, 122), None),
    "PINHOLE": ((200.0, 205, 155, 122), bed.pinhole, (200.0, 205.0, 155, 122), None),
    "SIMPLE_RADIAL": ((200.0, 155, 122, -0.1), bed.distorted, (200.0, 200.0, 155, 122), (-0.1, 0, 0, 0)),
    "RADIAL": ((200.0, 155, 122, *R), bed.distorted, (200.0, 200.0, 155, 122), (*R, 0, 0)),
    "OPENCV": ((200.0, 205, 155, 122, *R, *T), bed.distorted, (200.0, 205.0, 155, 122), (*R, *T)),
    "FULL_OPENCV": (
        (200.0, 205, 155, 122, *R, *T, 0.01, 0.02, -0.01, 0.003),
        bed.distorted, (200.0, 205.0, 155, 122), (*R, *T, 0.01, 0.02, -0.01, 0.003),
    ),
    "OPENCV_FISHEYE": ((110.0, 112, 158, 118, *FISH), bed.fisheye, (110.0, 112.0, 158, 118), FISH),
    "SIMPLE_RADIAL_FISHEYE": ((110.0, 158, 118, -0.03), bed.fisheye, (110.0, 110.0, 158, 118), (-0.03, 0, 0, 0)),
    "RADIAL_FISHEYE": ((110.0, 158, 118, *FISH[:2]), bed.fisheye, (110.0, 110.0, 158, 118), (*FISH[:2], 0, 0)),
    "SIMPLE_FISHEYE": ((110.0, 158, 118), bed.fisheye, (110.0, 110.0, 158, 118), (0, 0, 0, 0)),
    "FISHEYE": ((110.0, 112, 158, 118), bed.fisheye, (110.0, 112.0, 158, 118), (0, 0, 0, 0)),
}  # fmt: skip
IDS = {
    "SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4, "OPENCV_FISHEYE": 5,
    "FULL_OPENCV": 6, "FOV": 7, "SIMPLE_RADIAL_FISHEYE": 8, "RADIAL_FISHEYE": 9, "SIMPLE_FISHEYE": 14, "FISHEYE": 15,
}  # fmt: skip
TURN = (0.4, -0.2, 0.7, 0.5)  # w, x, y, z, not of unit length
IMAGES = [(3, TURN, (0.1, -0.2, 1.5), 1, "a b/DSC 1.JPG"), (0, (2.0, 0, 0, 0), (0.0, 0, 0), 1, "frame_000020.jpg")]


def text_cameras(folder, *rows):
    (folder / "cameras.txt").write_text("# Camera list\n\n" + "".join(f"{row}\n" for row in rows))


def text_images(folder, points=""):
    rows = (f"{i} {' '.join(map(str, (*q, *t)))} {c} {name}\n{points}\n" for i, q, t, c, name in IMAGES)
    (folder / "images.txt").write_text("# Image list\n#   POINTS2D[] as (X, Y, POINT3D_ID)\n" + "".join(rows))


def binary_cameras(folder, *cameras):
    rows = (struct.pack(f"<iiQQ{len(p)}d", i, m, *SIZE, *p) for i, m, p in cameras)
    (folder / "cameras.bin").write_bytes(struct.pack("<Q", len(cameras)) + b"".join(rows))


def binary_images(folder, points=7):
    rows = (
        struct.pack("<I7dI", i, *q, *t, c) + name.encode() + b"\0" + struct.pack("<Q", points)
        + struct.pack("<ddq", 1.5, 2.5, -1) * points
        for i, q, t, c, name in IMAGES
    )  # fmt: skip
    (folder / "images.bin").write_bytes(struct.pack("<Q", len(IMAGES)) + b"".join(rows))


@pytest.mark.parametrize("model", LENSES)
def test_every_camera_model(tmp_path, model):
    parameters, lens, intrinsics, distortion = LENSES[model]
    text_cameras(tmp_path, f"7 {model} {SIZE[0]} {SIZE[1]} {' '.join(map(str, parameters))}")
    from_text = read_cameras(tmp_path)
    binary_cameras(tmp_path, (7, IDS[model], parameters))
    assert read_cameras(tmp_path) == from_text
    assert from_text == {7: camera_of(model, parameters, width=SIZE[0], height=SIZE[1], where="x")}
    eye = lens(*SIZE, *intrinsics, *([] if distortion is None else [distortion]), np.eye(4))
    u, v, seen = eye.project(POINTS)
    found_u, found_v = project(POINTS, from_text[7])
    np.testing.assert_array_equal(inside(found_u, found_v, from_text[7]), seen)
    assert seen.sum() > 100
    np.testing.assert_allclose(np.stack([found_u, found_v])[:, seen], np.stack([u, v])[:, seen], atol=1e-6)


def test_panoramas(tmp_path):
    text_cameras(tmp_path, "1 EQUIRECTANGULAR 480 240 480 240")
    assert read_cameras(tmp_path) == {1: Camera.panorama(width=480, height=240)}
    assert set(CAMERA_MODELS) == {*LENSES, "EQUIRECTANGULAR"}


@pytest.mark.parametrize("points", ["", "12.5 40.25 -1 13 41 7", "1 2 -1 " * 40_000])
def test_text_and_binary_give_the_same(tmp_path, points):
    text_cameras(tmp_path, "1 PINHOLE 4 3 1 1 2 1.5")
    assert not has_model(tmp_path)
    text_images(tmp_path, points)
    assert has_model(tmp_path)
    text = list(read_images(tmp_path))
    binary_images(tmp_path)
    for images in (text, list(read_images(tmp_path))):
        assert [(i.id, i.name, i.camera_id) for i in images] == [(i, name, c) for i, _, _, c, name in IMAGES]
        first = images[0].camera_from_world
        np.testing.assert_allclose(first[:3, :3] @ first[:3, :3].T, np.eye(3), atol=1e-12)
        np.testing.assert_array_equal(first[:, 3], (0.1, -0.2, 1.5, 1))
        np.testing.assert_array_equal(images[1].camera_from_world, np.eye(4))
    w, x, y, z = np.array(TURN) / np.linalg.norm(TURN)
    axis = np.array([x, y, z])
    vector = np.array([0.3, -1.2, 0.8])
    turned = vector + 2 * w * np.cross(axis, vector) + 2 * np.cross(axis, np.cross(axis, vector))  # q v q*
    np.testing.assert_allclose(first[:3, :3] @ vector, turned, atol=1e-12)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1 FOV 320 240 1 1 2 2 0.5", r"camera model FOV cannot be read, expected one of .*image_undistorter"),
        ("1 PINHOLE 320 240 1 1 2", r"camera model PINHOLE has 4 parameters, got 3"),
        ("1 PINHOLE 320 240 0 1 2 2", r"singular intrinsics"),
        ("1 PINHOLE 320 2.5 1 1 2 2", r"expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS"),
        ("1 PINHOLE", r"expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS"),
    ],
)
def test_broken_cameras(tmp_path, row, message):
    text_cameras(tmp_path, "5 PINHOLE 320 240 1 1 2 2", row)
    with pytest.raises(DataError, match=rf"cameras.txt line 4: .*{message}"):
        read_cameras(tmp_path)


def test_no_camera_or_one_twice(tmp_path):
    with pytest.raises(MissingDataError, match=r"cameras.txt: no such file, nor cameras.bin"):
        read_cameras(tmp_path)
    text_cameras(tmp_path)
    with pytest.raises(DataError, match=r"cameras.txt: no camera in it"):
        read_cameras(tmp_path)
    text_cameras(tmp_path, *["5 PINHOLE 320 240 1 1 2 2"] * 2)
    with pytest.raises(DataError, match=r"camera 5 stands there twice"):
        read_cameras(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1 1 0 0 0 0 0 0 1 a.jpg\n2 1 0 0 0 0 0 0 1 b.jpg\n", r"line 2: expected the 2D points .* but not left out"),
        ("1 1 0 0 0 0 0 0 1\n\n", r"line 1: expected IMAGE_ID QW .* two lines"),
        ("1 0 0 0 0 0 0 0 1 a.jpg\n\n", r"line 1: expected a rotation as a quaternion"),
        ("1 1 0 0 0 nan 0 0 1 a.jpg\n\n", r"line 1: expected a rotation as a quaternion"),
        ("1 inf 0 0 0 0 0 0 1 a.jpg\n\n", r"line 1: expected a rotation as a quaternion"),
        ("7" * 70_000, r"line 1: longer than 65536 bytes"),
    ],
)
def test_broken_images(tmp_path, lines, message):
    (tmp_path / "images.txt").write_text(lines)
    with pytest.raises(DataError, match=rf"images.txt {message}"):
        list(read_images(tmp_path))


def test_the_last_line_may_lack(tmp_path):
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 0 1 a.jpg")
    assert [image.name for image in read_images(tmp_path)] == ["a.jpg"]
    with pytest.raises(MissingDataError, match=r"images.txt: no such file"):
        read_images(tmp_path / "nothing")


def test_truncated_binary_models(tmp_path):
    binary_cameras(tmp_path, (1, 1, (1.0, 1, 2, 2)))
    binary_images(tmp_path)
    for name, read in (("cameras.bin", read_cameras), ("images.bin", lambda f: list(read_images(f)))):
        path = tmp_path / name
        content = path.read_bytes()
        for end in range(0, len(content), 5):
            path.write_bytes(content[:end])
            with pytest.raises(DataError, match=rf"{name}"):
                read(tmp_path)
    binary_cameras(tmp_path, (1, 99, (1.0, 1, 2, 2)))
    with pytest.raises(DataError, match=r"camera 1 has the unknown model 99"):
        read_cameras(tmp_path)
