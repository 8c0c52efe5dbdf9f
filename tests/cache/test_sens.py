import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ditr_cache.datasets.scannet import sens as sens_module
from ditr_cache.datasets.scannet.sens import open_sens
from ditr_cache.errors import DataError, MissingDataError

COLOR_SIZE, DEPTH_SIZE, FRAMES = (32, 24), (16, 12), 4


def color_of(frame):
    image = np.zeros((COLOR_SIZE[1], COLOR_SIZE[0], 3), np.uint8)
    image[..., 0], image[..., 1], image[:, 16:, 2] = 40 * frame, 200, 90
    return image


def depth_of(frame):
    raw = (1000 * (frame + 1) + np.arange(DEPTH_SIZE[0] * DEPTH_SIZE[1])).reshape(DEPTH_SIZE[1], DEPTH_SIZE[0])
    raw[0, 0], raw[0, 1] = 0, 65535
    return raw.astype("<u2")


def pose_of(frame):
    pose = np.eye(4, dtype=np.float32)
    pose[:3, 3] = frame, -1, 2
    return pose if frame != 2 else np.full((4, 4), -np.inf, np.float32)


def encode(array, kind):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def sens_bytes(*, color=1, depth=1, version=4, shift=1000.0, frames=FRAMES, announced=None):
    """A .sens file put together byte by byte from the format's description."""
    intrinsic = np.eye(4, dtype="<f4")
    intrinsic[:2, :3] = [[30, 0, 16], [0, 30, 12]]
    half = np.eye(4, dtype="<f4")
    half[:2, :3] = [[15, 0, 8], [0, 15, 6]]
    out = struct.pack("<I", version) + struct.pack("<Q", 6) + b"sensor"
    for matrix in (intrinsic, np.eye(4, dtype="<f4"), half, np.eye(4, dtype="<f4")):
        out += matrix.tobytes()
    out += struct.pack("<ii", color, depth) + struct.pack("<IIII", *COLOR_SIZE, *DEPTH_SIZE) + struct.pack("<f", shift)
    out += struct.pack("<Q", frames if announced is None else announced)
    for frame in range(frames):
        image = encode(color_of(frame), "PNG" if color == 1 else "JPEG")
        raw = depth_of(frame).tobytes()
        blob = zlib.compress(raw) if depth == 1 else raw
        out += pose_of(frame).astype("<f4").tobytes() + struct.pack("<QQ", 10 * frame, 10 * frame + 1)
        out += struct.pack("<QQ", len(image), len(blob)) + image + blob
    return out


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "scene0000_00.sens"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("depth", [0, 1], ids=["raw", "zlib"])
@pytest.mark.parametrize("color", [1, 2], ids=["png", "jpeg"])
def test_every_frame_by_random_access(write, color, depth):
    sens = open_sens(write(sens_bytes(color=color, depth=depth)))
    assert len(sens) == FRAMES and sens.sensor_name == "sensor"
    assert sens.color_size == COLOR_SIZE and sens.depth_size == DEPTH_SIZE and sens.depth_shift == 1000
    np.testing.assert_array_equal(sens.intrinsic_color[:2, :3], [[30, 0, 16], [0, 30, 12]])
    np.testing.assert_array_equal(sens.intrinsic_depth[:2, :3], [[15, 0, 8], [0, 15, 6]])
    for frame in (3, 0, 2, 1):
        np.testing.assert_array_equal(sens.world_from_camera[frame], pose_of(frame))
        np.testing.assert_allclose(sens.read_color(frame).astype(int), color_of(frame), atol=0 if color == 1 else 30)
        metres = sens.read_depth(frame)
        assert metres.dtype == np.float32
        assert metres[0, 0] == 0 and metres[0, 1] == 0  # both marks of unknown depth
        np.testing.assert_allclose(metres[1:], depth_of(frame)[1:] / 1000, rtol=1e-6)


def test_index_reads_no_pixels(write, monkeypatch):
    path = write(sens_bytes() + b"inertial measurements follow")
    lengths = []
    pread = sens_module.os.pread
    monkeypatch.setattr(sens_module.os, "pread", lambda f, n, o: lengths.append(n) or pread(f, n, o))
    sens = open_sens(path)
    assert sum(lengths) == 12 + 6 + 292 + FRAMES * 96
    lengths.clear()
    sens.read_depth(1)
    assert lengths == [int(sens.depth_span[1, 1])]


def test_other_depth_shift(write):
    sens = open_sens(write(sens_bytes(shift=4000.0)))
    np.testing.assert_allclose(sens.read_depth(0)[5, 5], depth_of(0)[5, 5] / 4000, rtol=1e-6)


@pytest.mark.parametrize("cut", range(1, 40))
def test_truncated_anywhere(write, cut):
    data = sens_bytes()
    with pytest.raises(DataError, match=r"scene0000_00\.sens.*truncated"):
        open_sens(write(data[: -cut * len(data) // 40]))


def test_truncated_names_the_frame(write):
    with pytest.raises(DataError, match="frame 3 of 4 needs"):
        open_sens(write(sens_bytes()[:-5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 4, got version 3"),
        ({"color": 0}, "got raw and zlib_ushort"),
        ({"depth": 2}, "got png and occi_ushort; export"),
        ({"color": -1}, "got code -1"),
        ({"shift": 0.0}, "positive depth shift"),
        ({"shift": float("nan")}, "positive depth shift"),
        ({"announced": 2**60}, "truncated"),
        ({"announced": FRAMES + 1}, "truncated"),
    ],
)
def test_headers_that_cannot_be_used(write, change, message):
    with pytest.raises(DataError, match=message):
        open_sens(write(sens_bytes(**change)))


@pytest.mark.parametrize("at", ["depth", "color"])
@pytest.mark.parametrize("damage", ["zeros", "tail"])
def test_damaged_frame_fails_alone(write, at, damage):
    data = bytearray(sens_bytes())
    path = write(bytes(data))
    offset, length = (int(x) for x in getattr(open_sens(path), f"{at}_span")[1])
    start = offset if damage == "zeros" else offset + length // 2
    data[start : offset + length] = bytes(offset + length - start)
    sens = open_sens(write(bytes(data)))
    with pytest.raises(DataError, match=r"scene0000_00\.sens frame 1"):
        getattr(sens, f"read_{at}")(1)
    getattr(sens, f"read_{at}")(0)
    getattr(sens, f"read_{at}")(2)


def test_zlib_bomb_is_not_unpacked(write):
    data = sens_bytes(frames=1)
    spans = open_sens(write(data))
    start = int(spans.depth_span[0, 0])
    bomb = zlib.compress(bytes(50_000_000))
    data = data[:start] + bomb
    at = start - int(spans.color_span[0, 1]) - 8
    data = data[:at] + struct.pack("<Q", len(bomb)) + data[at + 8 :]
    with pytest.raises(DataError, match="got more"):
        open_sens(write(data)).read_depth(0)


def test_missing_file(tmp_path):
    with pytest.raises(MissingDataError, match="no such file"):
        open_sens(tmp_path / "none.sens")
