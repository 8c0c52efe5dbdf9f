"""Oracles are plain loops in float64, written from design.md and not from the code."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache.errors import DataError
from ditr_cache.geometry import (
    FRACTION_STEPS,
    inside,
    morton_order,
    patch_index,
    point_spacing,
    project,
    to_camera,
    to_fraction,
    visible_by_depth,
    visible_by_zbuffer,
)
from ditr_cache.sample import Camera

CAMERA = Camera(width=64, height=48, fx=50.0, fy=55.0, cx=31.5, cy=24.25)


def rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def pose(rng: np.random.Generator) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(rng), rng.normal(size=3)
    return matrix


def test_world_to_camera_to_pixel_by_hand():
    rng = np.random.default_rng(0)
    coord, camera_from_world = rng.normal(size=(40, 3)).astype(np.float32), pose(rng)
    camera_from_world[2, 3] += 8
    got = to_camera(coord, camera_from_world)
    assert got.dtype == np.float64
    u, v = project(got, CAMERA)
    for i, point in enumerate(coord.astype(float)):
        expected = [
            sum(camera_from_world[r, c] * point[c] for c in range(3)) + camera_from_world[r, 3] for r in range(3)
        ]
        assert got[i] == pytest.approx(expected, abs=1e-12)
        assert u[i] == pytest.approx(50 * expected[0] / expected[2] + 31.5, abs=1e-9)
        assert v[i] == pytest.approx(55 * expected[1] / expected[2] + 24.25, abs=1e-9)


def test_projection_is_float64_far_from_the_origin():
    """Geo-referenced coordinates: float32 arithmetic would be off by tens of centimetres."""
    camera_from_world = np.eye(4)
    camera_from_world[:3, 3] = -4_000_000.0, -500_000.0, 2.0
    z = to_camera(np.array([[4_000_000.25, 500_000.125, 0.0]]), camera_from_world)[0]
    assert z.tolist() == [0.25, 0.125, 2.0]


@pytest.mark.parametrize(
    ("u", "v", "expected"),
    [
        (0.0, 0.0, True),
        (-0.0, 5, True),
        (np.nextafter(0, -1), 5, False),
        (64.0, 5, False),
        (np.nextafter(64, 0), 5, True),
        (5, 48.0, False),
        (5, np.nextafter(48, 0), True),
        (5, -1e-12, False),
        (63.999, 47.999, True),
    ],
)
def test_image_bounds_are_half_open(u, v, expected):
    assert inside(np.array([u], float), np.array([v], float), CAMERA).tolist() == [expected]


@given(
    st.integers(1, 400), st.integers(1, 400), st.integers(1, 400), st.integers(1, 400),
    st.integers(-50, 50), st.integers(-50, 50), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_resized_and_cropped_cameras_agree_with_projecting(width, height, new_width, new_height, left, top, seed):
    """Projecting with the changed camera equals changing the image coordinates: a resize scales, a crop shifts."""
    rng = np.random.default_rng(seed)
    camera = Camera(width=width, height=height, fx=width * 0.9, fy=width * 1.1, cx=width * 0.47, cy=height * 0.55)
    points = np.c_[rng.normal(size=(20, 2)), rng.uniform(0.5, 5, 20)]
    u, v = project(points, camera)
    resized = camera.resized(width=new_width, height=new_height)
    ru, rv = project(points, resized)
    assert np.allclose(ru, u * new_width / width) and np.allclose(rv, v * new_height / height)
    assert (resized.width, resized.height) == (new_width, new_height)
    cropped = camera.cropped(left=left, top=top, width=new_width, height=new_height)
    cu, cv = project(points, cropped)
    assert np.allclose(cu, u - left) and np.allclose(cv, v - top)
    assert (cropped.width, cropped.height) == (new_width, new_height)


def test_camera_from_matrix():
    k = [[50, 0, 31.5, 0], [0, 55, 24.25, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert Camera.from_matrix(k, width=64, height=48) == CAMERA
    assert Camera.from_matrix(np.array(k)[:3, :3], width=64, height=48) == CAMERA
    for bad, message in (
        (np.eye(2), "3x3 or 4x4"),
        ([[50, 3, 31], [0, 55, 24], [0, 0, 1]], "without skew"),
        ([[50, 0, 31], [0, 55, 24], [0, 1, 1]], "without skew"),
        (np.zeros((3, 3)), "pinhole|singular"),
        ([[0, 0, 31], [0, 55, 24], [0, 0, 1]], "singular"),
        ([[np.nan, 0, 31], [0, 55, 24], [0, 0, 1]], "singular"),
        ([[50, 0, np.inf], [0, 55, 24], [0, 0, 1]], "singular"),
        ([[-50, 0, 31], [0, 55, 24], [0, 0, 1]], "singular"),
    ):
        with pytest.raises(DataError, match=message):
            Camera.from_matrix(bad, width=64, height=48)
    with pytest.raises(DataError, match="image size must be positive, got 0x48"):
        Camera.from_matrix(k, width=0, height=48)


def test_depth_visibility_by_hand():
    rng = np.random.default_rng(1)
    depth = np.where(rng.random((6, 8)) < 0.3, 0, rng.uniform(1, 3, (6, 8))).astype(np.float32)
    u, v, z = rng.uniform(0, 8, 500), rng.uniform(0, 6, 500), rng.uniform(0.5, 3.5, 500)
    got = visible_by_depth(u, v, z, depth, 0.2)
    for i in range(500):
        measured = float(depth[math.floor(v[i]), math.floor(u[i])])
        assert got[i] == (measured != 0 and abs(z[i] - measured) <= 0.2)
    assert 0 < got.sum() < 500


@pytest.mark.parametrize("measured", [0.0, np.nan, np.inf, -1.0])
def test_unknown_depth_shows_nothing(measured):
    depth = np.full((1, 1), measured, dtype=np.float32)
    for z in (1e-3, 0.1, 5.0):
        assert not visible_by_depth(np.array([0.5]), np.array([0.5]), np.array([z]), depth, 0.2).any()


def test_depth_tolerance_is_absolute_and_inclusive():
    depth = np.array([[2.0, 50.0]], dtype=np.float32)
    half = np.array([0.5, 0.5, 1.5, 1.5])
    z = np.array([2.25, 2.2501, 50.25, 50.2501])
    assert visible_by_depth(half, np.zeros(4) + 0.5, z, depth, 0.25).tolist() == [True, False, True, False]


def plane(z: float, half_width: float, step: float) -> np.ndarray:
    axis = np.arange(-half_width, half_width + step / 2, step)
    x, y = np.meshgrid(axis, axis)
    return np.c_[x.ravel(), y.ravel(), np.full(x.size, z)]


def zbuffer(points: np.ndarray, camera: Camera, spacing: float, tolerance: float = 0.2) -> np.ndarray:
    u, v = project(points, camera)
    assert inside(u, v, camera).all()
    return visible_by_zbuffer(u, v, points[:, 2], camera, spacing=spacing, tolerance=tolerance)


@pytest.mark.parametrize("jitter", [0.0, 0.4])
@pytest.mark.parametrize(("front_z", "back_z"), [(1.0, 3.0), (2.0, 2.5), (1.5, 6.0)])
def test_zbuffer_against_the_true_occlusion_of_a_square_before_a_wall(front_z, back_z, jitter):
    """A point of the wall is hidden where its ray meets the square; near the rim splats may hide a little more."""
    camera = Camera(width=320, height=240, fx=250, fy=250, cx=160, cy=120)
    rng, step = np.random.default_rng(0), 0.02
    front, back = plane(front_z, 0.25 * front_z, step), plane(back_z, 0.45 * back_z, step)
    points = np.concatenate([front, back])
    points[:, :2] += rng.uniform(-jitter, jitter, (len(points), 2)) * step
    visible = zbuffer(points, camera, step)
    is_front = points[:, 2] == front_z
    assert visible[is_front].all()
    # Where the ray from the camera to a wall point crosses the plane of the square, in metres beyond its rim.
    beyond = np.abs(points[:, :2] * front_z / points[:, 2:]).max(axis=1) - 0.25 * front_z
    cell = max(2**0.5 * step, front_z / camera.fx)  # the widest splat cell on the square's plane
    behind, clear = ~is_front & (beyond < -2 * step), ~is_front & (beyond > 3 * cell + step)
    assert behind.sum() > 100 and clear.sum() > 100
    assert visible[behind].mean() == 0
    assert visible[clear].all()


def test_zbuffer_shows_a_slanted_wall_whole():
    x, y = np.meshgrid(np.arange(-0.8, 0.8, 0.01), np.arange(-0.5, 0.5, 0.01))
    points = np.c_[x.ravel(), y.ravel(), 2 + x.ravel()]  # 45 degrees
    camera = Camera(width=320, height=240, fx=150, fy=150, cx=160, cy=120)
    assert zbuffer(points, camera, 0.01, tolerance=0.2).mean() > 0.999


def test_zbuffer_brute_force_on_random_points():
    """Plain loops over all pairs: hidden where a splat that is nearer by more than the tolerance covers the point."""
    rng = np.random.default_rng(3)
    camera = Camera(width=30, height=20, fx=25, fy=20, cx=15, cy=10)
    u, v, z = rng.uniform(0, 30, 150), rng.uniform(0, 20, 150), rng.uniform(0.5, 5, 150)
    got = visible_by_zbuffer(u, v, z, camera, spacing=0.08, tolerance=0.3)
    # Splats are wider than the spacing at their own depth by a factor of at most sqrt(2), and never below one pixel.
    level = [2 ** (math.floor(2 * math.log2(x)) / 2) for x in z]
    cell = [max(1.0, 0.08 * 25 / x) for x in level]
    for i in range(150):
        hidden = any(
            abs(int(u[i] / cell[j]) - int(u[j] / cell[j])) <= 1
            and abs(int(v[i] / cell[j]) - int(v[j] / cell[j])) <= 1
            and z[i] > z[j] + 0.3
            for j in range(150)
        )
        assert got[i] == (not hidden)
    assert 20 < got.sum() < 130


def test_zbuffer_of_an_image_of_many_cells():
    """Dense points over all rows and the outer columns of an image, against a comparison of all pairs."""
    rng = np.random.default_rng(4)
    camera = Camera(width=400, height=300, fx=300, fy=300, cx=200, cy=150)
    column = np.repeat([0.0, 200.0, 398.0], 500)
    u, v = column + rng.uniform(0, 2, 1500), np.tile(np.linspace(0, 299.999, 500), 3)
    z = rng.uniform(1, 4, 1500)
    got = visible_by_zbuffer(u, v, z, camera, spacing=0.001, tolerance=0.3)  # cells of one pixel
    near_u = np.abs(np.floor(u)[:, None] - np.floor(u)) <= 1
    near_v = np.abs(np.floor(v)[:, None] - np.floor(v)) <= 1
    hidden = (near_u & near_v & (z[:, None] > z + 0.3)).any(axis=1)
    assert np.array_equal(got, ~hidden)
    assert 100 < hidden.sum() < 1400


@given(st.integers(1, 700), st.floats(1e-3, 2), st.floats(0.3, 9))
def test_zbuffer_takes_points_on_the_very_edge(width, spacing, z):
    """The last float below the width, divided by the cell, may round up to a column that is not there."""
    camera = Camera(width=width, height=width, fx=width, fy=width, cx=width / 2, cy=width / 2)
    edge = np.array([0.0, np.nextafter(width, 0)])
    assert visible_by_zbuffer(edge, edge, np.full(2, z), camera, spacing=spacing, tolerance=0.1).all()
    for columns in range(2, 40):  # cells that divide the width exactly
        spacing = z / columns
        assert visible_by_zbuffer(edge, edge, np.full(2, z), camera, spacing=spacing, tolerance=0.1).all()


def test_zbuffer_of_nothing():
    empty = np.zeros(0)
    assert visible_by_zbuffer(empty, empty, empty, CAMERA, spacing=0.1, tolerance=0.2).shape == (0,)


@given(st.integers(1, 5000), st.data())
def test_fraction_stays_in_the_image_and_within_one_step(size, data):
    drawn = data.draw(st.lists(st.floats(0, size, exclude_max=True), min_size=1, max_size=20))
    u = np.array([*drawn, 0.0, np.nextafter(size, 0)])
    fraction = to_fraction(u, size)
    assert fraction.dtype == np.uint16
    back = fraction.astype(float) / FRACTION_STEPS * size
    assert (back >= 0).all() and (back < size).all()
    assert (np.abs(back - u) <= size / FRACTION_STEPS * (1 + 1e-9)).all()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 900), st.integers(1, 900), st.data())
def test_patch_index_is_row_times_columns_plus_column(rows, columns, width, height, data):
    u = data.draw(st.floats(0, width, exclude_max=True))
    v = data.draw(st.floats(0, height, exclude_max=True))
    uv = np.stack([to_fraction(np.array([u]), width), to_fraction(np.array([v]), height)], axis=1)
    got = int(patch_index(uv, (rows, columns))[0])
    assert 0 <= got < rows * columns
    row, column = divmod(got, columns)
    # Within one stored step of the patch that plain arithmetic finds.
    assert row in {math.floor(v / height * rows), math.floor(max(0, v / height - 1 / FRACTION_STEPS) * rows)}
    assert column in {math.floor(u / width * columns), math.floor(max(0, u / width - 1 / FRACTION_STEPS) * columns)}


def test_patch_index_corners_and_order():
    end = FRACTION_STEPS - 1
    uv = np.array([[0, 0], [end, 0], [0, end], [end, end], [end // 2, 0]], dtype=np.uint16)
    assert patch_index(uv, (30, 40)).tolist() == [0, 39, 29 * 40, 30 * 40 - 1, 19]
    # A point right of the middle and above it: column counts along u, row along v.
    assert patch_index(np.array([[50000, 10000]], dtype=np.uint16), (4, 8)).tolist() == [0 * 8 + 6]
    assert patch_index(np.zeros((0, 2), np.uint16), (4, 8)).shape == (0,)


@given(st.integers(0, 300), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e5]))
def test_morton_order_is_a_repeatable_permutation(count, seed, scale):
    coord = (np.random.default_rng(seed).normal(size=(count, 3)) * scale).astype(np.float32)
    order = morton_order(coord)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, morton_order(coord.copy()))


def interleaved(cell: np.ndarray) -> int:
    return sum(((int(cell[axis]) >> bit) & 1) << (3 * bit + axis) for bit in range(21) for axis in range(3))


def test_morton_order_by_hand():
    coord = np.random.default_rng(2).uniform(-4, 9, (200, 3)).astype(np.float32)
    low = coord.min(axis=0).astype(float)
    extent = float((coord.max(axis=0) - coord.min(axis=0)).astype(float).max())
    codes = [interleaved(np.floor((p - low) * ((2**21 - 1) / extent))) for p in coord.astype(float)]
    assert morton_order(coord).tolist() == sorted(range(200), key=lambda i: codes[i])


def test_morton_order_is_stable():
    coord = np.repeat(np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32), 5, axis=0)
    order = morton_order(coord).reshape(20, 5)
    assert (np.diff(order, axis=1) == 1).all()
    assert morton_order(np.ones((4, 3), np.float32)).tolist() == [0, 1, 2, 3]


def test_morton_order_keeps_neighbours_together():
    coord = np.random.default_rng(0).random((20_000, 3)).astype(np.float32)
    step = np.linalg.norm(np.diff(coord[morton_order(coord)], axis=0), axis=1)
    assert np.median(step) < 0.08 < np.median(np.linalg.norm(np.diff(coord, axis=0), axis=1))


def test_point_spacing():
    axis = np.arange(0, 2, 0.05)
    x, y = np.meshgrid(axis, axis)
    grid = np.c_[x.ravel(), y.ravel(), np.zeros(x.size)].astype(np.float32)
    assert point_spacing(grid[morton_order(grid)]) == pytest.approx(0.05, rel=0.5)
    assert point_spacing(grid[:1]) == 0 and point_spacing(grid[:0]) == 0
