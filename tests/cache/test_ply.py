import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditr_cache.datasets.ply import read_ply, write_ply
from ditr_cache.errors import DataError, MissingDataError, UsageError

DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"]


def header(encoding, *lines):
    return "\n".join(["ply", f"format {encoding} 1.0", *lines, "end_header\n"]).encode()


XYZ = ("property float x", "property float y", "property float z")
TRIANGLE = ("element face 1", "property list uchar int vertex_indices")


@st.composite
def meshes(draw):
    n = draw(st.integers(1, 20))
    names = draw(st.lists(st.sampled_from(["x", "y", "z", "red", "nx", "label", "quality"]), min_size=1, unique=True))
    vertices = {name: draw(hnp.arrays(draw(st.sampled_from(DTYPES)), n)) for name in names}
    f = draw(st.none() | st.integers(0, 10))
    faces = None if f is None else draw(hnp.arrays(np.int32, (f, 3), elements=st.integers(0, n - 1)))
    return vertices, faces


@given(mesh=meshes())
def test_round_trip(tmp_path_factory, mesh):
    vertices, faces = mesh
    path = tmp_path_factory.getbasetemp() / "round_trip.ply"
    write_ply(path, vertices, faces)
    ply = read_ply(path)
    assert list(ply.vertices) == list(vertices)
    for name, column in vertices.items():
        assert ply.vertices[name].dtype == column.dtype
        np.testing.assert_array_equal(ply.vertices[name], column)
    if faces is None:
        assert ply.faces is None
    else:
        np.testing.assert_array_equal(ply.faces, faces)


@given(mesh=meshes(), cut=st.integers(1, 10_000))
def test_a_file_cut_anywhere_is_a_data_error(tmp_path_factory, mesh, cut):
    path = tmp_path_factory.getbasetemp() / "cut.ply"
    write_ply(path, *mesh)
    data = path.read_bytes()
    path.write_bytes(data[: -min(cut, len(data))])
    with pytest.raises(DataError, match=r"cut\.ply"):
        read_ply(path)


@pytest.mark.parametrize(("encoding", "order"), [("binary_little_endian", "<"), ("binary_big_endian", ">")])
def test_binary_file_of_a_foreign_writer(tmp_path, encoding, order):
    lines = ("comment x", "obj_info y", "element camera 1", "property int id", "element vertex 2")
    lines += ("property uchar red", "property double z", "property list ushort short extra", "property short label")
    lines += ("element face 3", "property uchar flag", "property list uchar uint vertex_index", "property float area")
    body = struct.pack(order + "i", 7)
    body += struct.pack(order + "BdHhh", 200, 1.5, 1, -9, -3) + struct.pack(order + "BdHhhh", 100, -2.5, 2, 1, 2, 4)
    body += struct.pack(order + "BBIIIf", 1, 3, 0, 1, 0, 0.5)
    body += struct.pack(order + "BBIIIIf", 1, 4, 1, 0, 1, 0, 0.5)
    body += struct.pack(order + "BBIIIf", 1, 3, 1, 1, 0, 0.5)
    path = tmp_path / "foreign.ply"
    path.write_bytes(header(encoding, *lines) + body)
    ply = read_ply(path)
    assert {k: v.tolist() for k, v in ply.vertices.items()} == {"red": [200, 100], "z": [1.5, -2.5], "label": [-3, 4]}
    assert {str(v.dtype) for v in ply.vertices.values()} == {"uint8", "float64", "int16"}
    assert ply.faces is not None and ply.faces.dtype == np.int32
    assert ply.faces.tolist() == [[0, 1, 0], [1, 0, 1], [1, 1, 0], [1, 1, 0]]  # the quad became a fan, in place


def test_ascii_file_and_carriage_returns(tmp_path):
    path = tmp_path / "ascii.ply"
    text = header("ascii", "element vertex 3", *XYZ, "property uchar red", *TRIANGLE).replace(b"\n", b"\r\n")
    path.write_bytes(text + b"0 0 1e-1 255\r\n1 0 0 0\r\n0 nan 0 7\r\n3 0 1 2\r\n")
    ply = read_ply(path)
    np.testing.assert_array_equal(ply.vertices["z"], np.float32([0.1, 0, 0]))
    assert np.isnan(ply.vertices["y"][2]) and ply.vertices["red"].tolist() == [255, 0, 7]
    assert ply.faces is not None and ply.faces.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not a PLY file", id="empty"),
        pytest.param(b"\x89PNG\r\n", "not a PLY file", id="another format"),
        pytest.param(b"ply\nformat ascii 1.0\nelement vertex 3\n", "without 'end_header'", id="header cut"),
        pytest.param(header("binary_little_endian", "element vertex x", *XYZ), "not understood", id="count"),
        pytest.param(header("ascii", "element vertex 0", "property quad x"), "not understood", id="type"),
        pytest.param(header("ascii", "property float x"), "not understood", id="property without element"),
        pytest.param(header("ascii", "element vertex 0", *XYZ, *XYZ), "a property twice", id="twice"),
        pytest.param(header("ascii", "element face 0"), "no element 'vertex'|no list property", id="no vertex"),
        pytest.param(header("ascii", "element vertex 1", *XYZ) + b"1 2 x", "not a number", id="word"),
        pytest.param(header("ascii", "element vertex 1", "property uchar x") + b"256", "value 256", id="overflow"),
        pytest.param(header("ascii", "element vertex 1", "property int x") + b"0.5", "value 0.5", id="fraction"),
        pytest.param(
            header("ascii", "element vertex 2", *XYZ) + b"1 2 3 4 5", "needs 6 values, got 5", id="ascii promises more"
        ),
        pytest.param(
            header("binary_little_endian", "element vertex 1000000000000", *XYZ) + b"123",
            "of 1000000000000 rows needs 12000000000000 bytes, got 3",
            id="promises a terabyte",
        ),
        pytest.param(
            header("binary_little_endian", "element vertex 1", "property uchar x", *TRIANGLE) + b"\0\x03" + bytes(11),
            "'face' of 1 rows needs at least 13 bytes, got 12",
            id="face cut",
        ),
        pytest.param(
            header("binary_little_endian", "element vertex 1", "property uchar x", *TRIANGLE) + b"\0\xff" + bytes(40),
            "'face'.*truncated",
            id="face of 255 corners",
        ),
        pytest.param(
            header("ascii", "element vertex 1", "property uchar x", *TRIANGLE) + b"1 -3 0 0 0",
            "list of -3",
            id="negative",
        ),
        *(
            pytest.param(
                header("ascii", "element vertex 1", "property uchar x", *TRIANGLE) + f"1 {count} 0 0 0".encode(),
                f"list of {count} entries",
                id=f"{count} corners",
            )
            for count in ("inf", "nan", "2.5")
        ),
        pytest.param(
            header("ascii", "element vertex 1", "property uchar x", *TRIANGLE) + b"1 3 0 0 1",
            r"faces name vertices 0\.\.1, expected 0\.\.0",
            id="index out of range",
        ),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.ply"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_ply(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(MissingDataError, match="no such file"):
        read_ply(tmp_path / "none.ply")


@pytest.mark.parametrize(
    ("vertices", "faces"),
    [
        ({"x": np.zeros(3), "y": np.zeros(2)}, None),
        ({"x": np.zeros((3, 3))}, None),
        ({"x": np.zeros(3, dtype=np.int64)}, None),
        ({"x": np.zeros(3)}, np.zeros((2, 4), dtype=np.int32)),
    ],
)
def test_writer_refuses_what_ply_cannot_hold(tmp_path, vertices, faces):
    with pytest.raises(UsageError):
        write_ply(tmp_path / "a.ply", vertices, faces)


def test_large_mesh_is_read_without_loops(tmp_path):
    rng = np.random.default_rng(0)
    vertices = {axis: rng.random(200_000, dtype=np.float32) for axis in "xyz"}
    faces = rng.integers(0, 200_000, (400_000, 3), dtype=np.int32)
    write_ply(tmp_path / "large.ply", vertices, faces)
    start = time.process_time()
    ply = read_ply(tmp_path / "large.ply")
    assert time.process_time() - start < 1.0  # 0.03 s where this was written; a loop over rows takes several
    np.testing.assert_array_equal(ply.faces, faces)
