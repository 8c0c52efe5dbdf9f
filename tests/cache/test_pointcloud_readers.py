"""Readers of point files against files that other libraries wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plyfile import PlyData, PlyElement
from pypcd4 import Encoding
from pypcd4 import PointCloud as Pypcd

from ditr_cache.errors import CacheError, DataError, MissingDataError, UsageError
from ditr_cache.pointcloud.cloud import Chunk, PointCloud, color_factor
from ditr_cache.pointcloud.readers import open_cloud


def read(path: Path, size: int = 7) -> Chunk:
    """A whole file, read in small chunks."""
    cloud = open_cloud(path)
    chunks = list(cloud.chunks(size))
    assert all(len(c) == size for c in chunks[:-1]) and sum(map(len, chunks)) == cloud.count

    def joined(name: str) -> Any:
        parts = [getattr(c, name) for c in chunks]
        assert (name in cloud.channels) == (parts[0] is not None)
        return None if parts[0] is None else np.concatenate(parts)

    assert chunks[0].coord.dtype == cloud.coord_dtype
    return Chunk(coord=joined("coord"), color=joined("color"), normal=joined("normal"), strength=joined("strength"))


# --- PLY ------------------------------------------------------------------------------------------------------------

XYZ = ("x", "y", "z")
RGB = ("red", "green", "blue")
NORMAL = ("nx", "ny", "nz")


@st.composite
def ply_layouts(draw: st.DrawFn) -> dict[str, Any]:
    coord = draw(st.sampled_from(["f4", "f8", "i2"]))
    columns = dict.fromkeys(XYZ, coord)
    if draw(st.booleans()):
        names = draw(st.sampled_from([RGB, ("r", "g", "b"), ("Red", "Green", "Blue")]))
        columns |= dict.fromkeys(names, draw(st.sampled_from(["u1", "u2", "f4"])))
    if draw(st.booleans()):
        columns |= dict.fromkeys(NORMAL, "f4")
    if draw(st.booleans()):
        columns[draw(st.sampled_from(["intensity", "scalar_Intensity", "reflectance"]))] = draw(
            st.sampled_from(["f4", "u2"])
        )
    columns |= {f"extra{i}": t for i, t in enumerate(draw(st.lists(st.sampled_from(["i1", "u4", "f8"]), max_size=3)))}
    return {
        "order": draw(st.permutations(sorted(columns))),
        "columns": columns,
        "text": draw(st.booleans()),
        "byte_order": draw(st.sampled_from("<>")),
        "faces": draw(st.sampled_from([None, "before", "after"])),
        "points": draw(st.integers(1, 20)),
        "seed": draw(st.integers(0, 99)),
    }


@given(layout=ply_layouts())
def test_ply_of_any_layout(layout: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    rng, columns = np.random.default_rng(layout["seed"]), layout["columns"]
    table = np.empty(layout["points"], [(n, columns[n]) for n in layout["order"]])
    for name in layout["order"]:
        is_float = columns[name][0] == "f"
        table[name] = rng.normal(0, 5, len(table)) if is_float else rng.integers(0, 120, len(table))
    faces = np.empty(3, [("vertex_indices", "O"), ("flag", "i2")])
    for i in range(3):
        faces[i] = (np.arange(3 + i, dtype=np.int32), i)
    other = {"before": 0, "after": 1}.get(layout["faces"] or "")
    elements = [PlyElement.describe(table, "vertex")]
    if other is not None:
        elements.insert(other, PlyElement.describe(faces, "face"))
        elements.insert(other, PlyElement.describe(np.zeros(2, [("k", "f8")]), "camera"))
    path = tmp_path_factory.mktemp("ply") / "a.ply"
    PlyData(elements, text=layout["text"], byte_order="=" if layout["text"] else layout["byte_order"]).write(str(path))

    got = read(path)
    assert got.coord.dtype == (np.float64 if columns["x"] == "f8" else np.float32)
    close = {"rtol": 1e-6} if layout["text"] else {"rtol": 0}
    np.testing.assert_allclose(got.coord, np.stack([table[n] for n in XYZ], 1), **close)
    names = {n.lower(): n for n in layout["order"]}
    color = next((c for c in (RGB, ("r", "g", "b")) if c[0] in names), None)
    assert (color is None) == (got.color is None)
    if color is not None and got.color is not None:
        np.testing.assert_allclose(got.color, np.stack([table[names[c]] for c in color], 1), **close)
        assert got.color.dtype == columns[names[color[0]]]
    if got.normal is not None:
        np.testing.assert_allclose(got.normal, np.stack([table[n] for n in NORMAL], 1), **close)
    strength = next((n for n in ("intensity", "scalar_Intensity", "reflectance") if n in columns), None)
    if strength is not None and got.strength is not None:
        np.testing.assert_allclose(got.strength, table[strength].astype(np.float32), **close)
    assert (NORMAL[0] in columns, strength is not None) == (got.normal is not None, got.strength is not None)


def write_ply(path: Path, points: int = 10) -> Path:
    table = np.zeros(points, [(n, "f4") for n in XYZ])
    table["x"] = np.arange(points)
    PlyData([PlyElement.describe(table, "vertex")]).write(str(path))
    return path


def test_ply_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    for content, message in (
        (b"", "not a PLY file"),
        (b"solid cube\n", "not a PLY file"),
        (b"ply\nformat ascii 1.0\n", "without 'end_header'"),
        (b"ply\nformat ascii 2.0\nend_header\n", "line not understood: 'format ascii 2.0'"),
        (b"ply\nelement vertex 1\nproperty float x\nend_header\n", "no line 'format'|columns x, y and z"),
        (b"ply\nformat ascii 1.0\nelement face 1\nend_header\n", "no element 'vertex', got face"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n", "columns x, y and z, got x"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float x\nend_header\n1\n",
            "a property twice",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_cloud(path)
    header = b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
    for extra, body, message in (
        (b"", b"1 2 3\n", r"announces 2 points, the file ends after 1; it is truncated"),
        (b"", b"1 2 3\n1 2\n", "cannot be read"),
        (b"", b"1 2 3 4\n1 2 3 4\n", "expected 3 values per point, got 4"),
        (b"", b"1 2 three\n1 2 3\n", "cannot be read"),
        (
            b"property uchar red\nproperty uchar green\nproperty uchar blue\n",
            b"1 2 3 0 0 300\n" * 2,
            "has the value 300",
        ),
    ):
        path.write_bytes(header + extra + b"end_header\n" + body)
        with pytest.raises(DataError, match=message):
            list(open_cloud(path).chunks(10))
    path.write_bytes(header + b"property list uchar int seen_by\nend_header\n1 2 3 0\n1 2 3 0\n")
    with pytest.raises(DataError, match="vertices with a list"):
        open_cloud(path)
    write_ply(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="ends after 9"):
        open_cloud(path)
    with pytest.raises(DataError, match="no points"):
        open_cloud(write_ply(tmp_path / "none.ply", points=0))


# --- PCD ------------------------------------------------------------------------------------------------------------

PCD_TYPES = {"f4": np.float32, "f8": np.float64, "u1": np.uint8, "i2": np.int16}


@given(
    encoding=st.sampled_from([Encoding.ASCII, Encoding.BINARY, Encoding.BINARY_COMPRESSED]),
    extras=st.lists(st.sampled_from(sorted(PCD_TYPES)), max_size=3),
    normals=st.booleans(),
    coord=st.sampled_from(["f4", "f8"]),
    points=st.integers(1, 40),
    shuffle=st.randoms(use_true_random=False),
)
def test_pcd_of_any_layout(
    encoding: Encoding, extras: list[str], normals: bool, coord: str, points: int, shuffle: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    columns = dict.fromkeys(XYZ, coord) | {"intensity": "f4"} | {f"e{i}": t for i, t in enumerate(extras)}
    if normals:
        columns |= dict.fromkeys(("normal_x", "normal_y", "normal_z"), "f4")
    names = sorted(columns)
    shuffle.shuffle(names)
    rng = np.random.default_rng(points)
    values = {n: rng.integers(0, 100, points).astype(PCD_TYPES[columns[n]]) for n in names}
    path = tmp_path_factory.mktemp("pcd") / "a.pcd"
    cloud = Pypcd.from_points([values[n] for n in names], tuple(names), tuple(PCD_TYPES[columns[n]] for n in names))
    cloud.save(path, encoding)
    got = read(path)
    np.testing.assert_array_equal(got.coord, np.stack([values[n] for n in XYZ], 1))
    assert got.strength is not None and (got.normal is not None) == normals
    np.testing.assert_array_equal(got.strength, values["intensity"])
    if got.normal is not None:
        np.testing.assert_array_equal(got.normal[:, 1], values["normal_y"])


@pytest.mark.parametrize("encoding", [Encoding.BINARY, Encoding.BINARY_COMPRESSED])
def test_pcd_with_packed_colour(tmp_path: Path, encoding: Encoding) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (30, 3), dtype=np.uint8)
    points = np.random.default_rng(1).normal(size=(30, 3)).astype(np.float32)
    packed = Pypcd.encode_rgb(rgb)
    cloud = Pypcd.from_xyzrgb_points(np.column_stack([points, packed.reshape(-1)]))
    cloud.save(tmp_path / "a.pcd", encoding)
    got = read(tmp_path / "a.pcd")
    np.testing.assert_array_equal(got.coord, points)
    np.testing.assert_array_equal(got.color, rgb)

    header = (tmp_path / "a.pcd").read_bytes().split(b"DATA")[0].decode()
    lines = [" ".join(map(repr, map(float, (*p, c)))) for p, c in zip(points, packed.reshape(-1), strict=True)]
    (tmp_path / "b.pcd").write_text(header + "DATA ascii\n" + "\n".join(lines) + "\n")
    np.testing.assert_array_equal(read(tmp_path / "b.pcd").color, rgb)


PCD = (
    "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z _ rgba _\nSIZE 4 4 4 1 4 1\nTYPE F F F U U U\nCOUNT 1 1 1 4 1 2\n"
    "WIDTH 2\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 2\nDATA {data}\n"
)


def test_pcd_with_padding_and_packed_integers(tmp_path: Path) -> None:
    path = tmp_path / "a.pcd"
    row = [("p", "<f4", 3), ("a", "u1", 4), ("c", "<u4"), ("b", "u1", 2)]
    rows = np.array([((1, 2, 3), 0, 0xFF0A141E, 0), ((4, 5, 6), 0, 0xFF000001, 0)], row)
    path.write_bytes(PCD.format(data="binary").encode() + rows.tobytes())
    got = read(path, 1)
    np.testing.assert_array_equal(got.coord, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(got.color, [[10, 20, 30], [0, 0, 1]])
    lines = "1 2 3 0 0 0 0 4278850590 0 0\n4 5 6 0 0 0 0 1 0 0\n"
    path.write_text(PCD.format(data="ascii") + lines)
    np.testing.assert_array_equal(read(path, 1).color, got.color)


def test_pcd_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.pcd"
    good = PCD.format(data="binary").encode()
    for content, message in (
        (b"ply\n", "not a PCD file"),
        (good[:40], "cut within its header|not understood"),
        (good.replace(b"DATA binary", b"DATA zip"), "expected DATA ascii"),
        (good.replace(b"SIZE 4 4 4 1 4 1", b"SIZE 4 4"), "as many entries"),
        (good.replace(b"TYPE F F F", b"TYPE F F X"), "not understood"),
        (good.replace(b"POINTS 2", b"POINTS two"), "how many POINTS"),
        (good.replace(b"FIELDS x y z", b"FIELDS a y z"), "columns x, y and z"),
        (good.replace(b"POINTS 2", b"POINTS 0"), "no points"),
        (good + b"\0" * 30, "ends after 1"),
        (PCD.format(data="binary_compressed").encode() + b"\0" * 6, "truncated"),
        (PCD.format(data="binary_compressed").encode() + np.array([0, 9], "<u4").tobytes(), "holds 9 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_cloud(path)
    for data, body, message in (
        ("ascii", b"1 2 3 0 0 0 0 1 0 0\n", "ends after 1"),
        ("ascii", b"1 2 3\n1 2 3\n", "expected 10 values per point, got 3"),
        ("ascii", b"1 2 x 0 0 0 0 1 0 0\n" * 2, "cannot be read"),
        ("binary_compressed", np.array([5, 44], "<u4").tobytes() + b"\xff\xff\xff\xff\xff", "damaged"),
    ):
        path.write_bytes(PCD.format(data=data).encode() + body)
        with pytest.raises(DataError, match=message):
            list(open_cloud(path).chunks(10))


# --- LAS ------------------------------------------------------------------------------------------------------------


def write_las(path: Path, coord: np.ndarray, color: np.ndarray | None = None, **extra: np.ndarray) -> Path:
    header = laspy.LasHeader(point_format=2 if color is not None else 0, version="1.2")
    header.offsets, header.scales = np.floor(coord.min(axis=0)), np.full(3, 0.001)
    for name in extra:
        if name != "intensity":
            header.add_extra_dim(laspy.ExtraBytesParams(name=name, type=np.float32))
    las = laspy.LasData(header)
    las.x, las.y, las.z = coord.T
    if color is not None:
        las.red, las.green, las.blue = color.T
    for name, values in extra.items():
        las[name] = values
    las.write(str(path))
    return path


@pytest.mark.parametrize("extension", ["las", "laz", "LAS"])
def test_las(tmp_path: Path, extension: str) -> None:
    rng = np.random.default_rng(0)
    coord = (rng.random((50, 3)) * 100).round(3) + np.array([500_000, 5_600_000, 100])
    color = rng.integers(0, 65536, (50, 3)).astype(np.uint16)
    intensity = rng.integers(0, 65536, 50).astype(np.uint16)
    normals = {f"normal_{axis}": rng.normal(size=50).astype(np.float32) for axis in XYZ}
    got = read(write_las(tmp_path / f"a.{extension}", coord, color, intensity=intensity, **normals))
    assert got.coord.dtype == np.float64
    np.testing.assert_allclose(got.coord, coord, atol=1e-6, rtol=0)  # float32 would be off by 0.25 m
    np.testing.assert_array_equal(got.color, color)
    assert got.strength is not None and got.normal is not None
    np.testing.assert_allclose(got.strength, intensity / 65535, rtol=1e-6)
    np.testing.assert_allclose(got.normal[:, 2], normals["normal_z"])


def test_las_without_colour(tmp_path: Path) -> None:
    path = write_las(tmp_path / "a.las", np.zeros((3, 3)))
    assert open_cloud(path).channels == ("coord", "strength") and read(path).color is None


@pytest.mark.parametrize("extension", ["las", "laz"])
def test_las_that_cannot_be_used(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    path.write_bytes(b"LASF" + b"\0" * 20)
    with pytest.raises(DataError, match="cannot be read as LAS"):
        open_cloud(path)
    write_las(path, np.random.default_rng(0).random((1000, 3)))
    content = path.read_bytes()
    for cut in (len(content) // 2, len(content) - 300):
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"truncated|get the file again|cannot be read as LAS"):
            list(open_cloud(path).chunks(100))
    laspy.LasData(laspy.LasHeader(point_format=0, version="1.2")).write(str(path))
    with pytest.raises(DataError, match="no points"):
        open_cloud(path)


# --- KITTI and all --------------------------------------------------------------------------------------------------


def test_kitti(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(33, 4)).astype(np.float32)
    points.tofile(tmp_path / "000000.bin")
    got = read(tmp_path / "000000.bin")
    np.testing.assert_array_equal(got.coord, points[:, :3])
    np.testing.assert_array_equal(got.strength, points[:, 3])
    (tmp_path / "000000.bin").write_bytes(points.tobytes()[:-3])
    with pytest.raises(DataError, match="no multiple"):
        open_cloud(tmp_path / "000000.bin")
    (tmp_path / "a.pcd.bin").write_bytes(points.tobytes())
    with pytest.raises(DataError, match="a scan of nuScenes has five values"):
        open_cloud(tmp_path / "a.pcd.bin")
    (tmp_path / "none.bin").touch()
    with pytest.raises(DataError, match="no points"):
        open_cloud(tmp_path / "none.bin")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.ply, \.las.*got '\.xyz'"):
        open_cloud(tmp_path / "a.xyz")
    with pytest.raises(MissingDataError, match="no such file"):
        open_cloud(tmp_path / "a.ply")
    (tmp_path / "folder.ply").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        open_cloud(tmp_path / "folder.ply")


def test_libraries_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_las(tmp_path / "a.laz", np.zeros((1, 3)))
    for module in ("laspy", "lazrs"):
        with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"pip install 'ditr\[io\]'"):
            patch.setitem(sys.modules, module, None)
            open_cloud(path)


@pytest.mark.parametrize(
    ("dtype", "maximum", "expected"),
    [("u1", 3, 1), ("u1", 255, 1), ("u2", 255, 1), ("u2", 65535, 255 / 65535), ("f4", 1.0, 255), ("f8", 254.0, 1)],
)
def test_range_of_colours(dtype: str, maximum: float, expected: float) -> None:
    assert color_factor(np.dtype(dtype), maximum) == pytest.approx(expected)


@given(content=st.binary(max_size=400), extension=st.sampled_from(["ply", "pcd", "bin", "las", "laz"]))
def test_noise_is_an_error_with_a_message(
    content: bytes, extension: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("noise") / f"a.{extension}"
    path.write_bytes(content)
    try:
        cloud: PointCloud = open_cloud(path)
        assert sum(map(len, cloud.chunks(5))) == cloud.count
    except CacheError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("extension", ["bin", "ply"])
def test_a_file_that_goes_away_is_an_error_with_a_message(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{extension}"
    points = np.zeros(3, "<f4,<f4,<f4,<f4").tobytes()
    header = b"ply\nformat binary_little_endian 1.0\nelement vertex 3\n" + b"".join(
        b"property float %s\n" % name for name in (b"x", b"y", b"z", b"intensity")
    )
    path.write_bytes(points if extension == "bin" else header + b"end_header\n" + points)
    cloud = open_cloud(path)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: cannot be read"):
        list(cloud.chunks(2))
