"""Blocks leave out only what no plain test of every single point would link: nothing visible is ever lost."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache.blocks import BLOCK, PointBlocks, sight_planes
from ditr_cache.geometry import depth_of, inside, project, to_camera
from ditr_cache.sample import Camera

PINHOLE = Camera(width=64, height=48, fx=50.0, fy=55.0, cx=31.5, cy=24.25)
CAMERAS = {
    "pinhole": PINHOLE,
    "off_axis": replace(PINHOLE, cx=-20.0, cy=90.0),
    "folded": replace(PINHOLE, model="radial_tangential", distortion=(-0.5, 0.1, 0.01, -0.01)),
    "widening": replace(PINHOLE, model="radial_tangential", distortion=(0.3, 0.05, 0.0, 0.01)),
    "rational": replace(PINHOLE, model="radial_tangential", distortion=(0.3, 0.05, 0.0, 0.01, 0.0, 0.2, 0.1, 0.01)),
    "fisheye": replace(PINHOLE, fx=20.0, fy=21.0, model="fisheye", distortion=(0.05, 0.01, 0.0, 0.0)),
    "folded_fisheye": replace(PINHOLE, fx=20.0, fy=21.0, model="fisheye", distortion=(-0.3, 0.0, 0.0, 0.0)),
    "panorama": Camera.panorama(width=100, height=50),
}


def pose_of(rng: np.random.Generator, far: float) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    matrix = np.eye(4)
    matrix[:3, :3] = q if np.linalg.det(q) > 0 else -q
    matrix[:3, 3] = -matrix[:3, :3] @ (far + rng.normal(size=3))
    return matrix


def in_sight(coord: np.ndarray, camera: Camera, pose: np.ndarray, depth_min: float, depth_max: float | None):
    """[N] bool, every point tested by itself."""
    in_camera = to_camera(coord, pose)
    z = depth_of(in_camera, camera)
    known = (z > 0) & (z >= depth_min) & (z <= (math.inf if depth_max is None else depth_max))
    u, v = project(in_camera[known], camera)
    known[known] = inside(u, v, camera)
    return known


@pytest.mark.parametrize("count", [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_blocks_hold_the_points_in_order_and_their_boxes(count):
    coord = np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)
    blocks = PointBlocks.of(coord)
    assert blocks.count == count and blocks.columns.shape == (3, math.ceil(count / BLOCK), BLOCK)
    assert np.array_equal(blocks.coord(), coord)
    for i in range(math.ceil(count / BLOCK)):
        own = coord[i * BLOCK : (i + 1) * BLOCK].astype(float)
        np.testing.assert_allclose(blocks.centre[i] - blocks.half[i], own.min(axis=0), atol=1e-12)
        np.testing.assert_allclose(blocks.centre[i] + blocks.half[i], own.max(axis=0), atol=1e-12)
        point, places = blocks.some(np.array([i]))
        assert np.array_equal(point, np.arange(i * BLOCK, (i + 1) * BLOCK))
        assert np.array_equal(places[: len(own)], coord[i * BLOCK : (i + 1) * BLOCK])
        assert np.isnan(places[len(own) :]).all()


def test_some_blocks_come_in_the_order_asked_for():
    coord = np.random.default_rng(0).normal(size=(4 * BLOCK, 3)).astype(np.float32)
    point, places = PointBlocks.of(coord).some(np.array([1, 3]))
    assert np.array_equal(point, np.r_[BLOCK : 2 * BLOCK, 3 * BLOCK : 4 * BLOCK])
    assert np.array_equal(places, coord[point])


@given(
    st.sampled_from(sorted(CAMERAS)), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e3, 4e6]),
    st.sampled_from([0.0, 0.1, 2.0]), st.sampled_from([None, 3.0]),
)  # fmt: skip
def test_no_point_in_sight_is_left_out(name, seed, far, depth_min, depth_max):
    """Blocks of one place each: there the test of a block is as sharp as it ever gets. Some places lie on borders."""
    rng = np.random.default_rng(seed)
    camera, pose = CAMERAS[name], pose_of(rng, far)
    z = rng.choice([1e-6, 0.1, 0.5, 2.0, 3.0, 50.0], 60)
    u, v = rng.uniform(-50, 100, (2, 60))
    borders = rng.choice([0.0, camera.width, -1e-9, camera.width / 2], 40)
    u[:40], v[20:] = borders, rng.choice([0.0, camera.height, camera.height + 1e-9, camera.height / 2], 40)
    rays = np.c_[(u - camera.cx) / camera.fx * z, (v - camera.cy) / camera.fy * z, z]
    # float64, although stored points are float32: as close to the border as may be, on either side of it.
    places = (rays - pose[:3, 3]) @ pose[:3, :3]
    kept = PointBlocks.of(np.repeat(places, BLOCK, axis=0)).maybe_seen(
        camera, pose, depth_min=depth_min, depth_max=depth_max
    )
    assert set(np.flatnonzero(in_sight(places, camera, pose, depth_min, depth_max))) <= set(kept.tolist())


@given(st.sampled_from(sorted(CAMERAS)), st.integers(0, 2**32 - 1), st.floats(0.05, 5))
def test_no_block_with_a_point_in_sight_is_left_out(name, seed, size):
    rng = np.random.default_rng(seed)
    camera, pose = CAMERAS[name], pose_of(rng, 0.0)
    middle = np.repeat(rng.normal(size=(12, 3)) * 4, BLOCK, axis=0)
    coord = (middle + rng.normal(size=middle.shape) * size).astype(np.float32)
    kept = PointBlocks.of(coord).maybe_seen(camera, pose, depth_min=0.1, depth_max=6.0)
    seen = np.flatnonzero(in_sight(coord, camera, pose, 0.1, 6.0)) // BLOCK
    assert set(seen.tolist()) <= set(kept.tolist())


@pytest.mark.parametrize(
    ("name", "place", "kept"),
    [
        ("pinhole", (0, 0, 2), True),
        ("pinhole", (0, 0, -2), False),
        ("pinhole", (0, 0, 0.02), False),
        ("pinhole", (0, 0, 7), False),
        ("pinhole", (-2, 0, 2), False),
        ("pinhole", (2, 0, 2), False),
        ("pinhole", (0, -2, 2), False),
        ("pinhole", (0, 2, 2), False),
        ("folded", (0.6, 0, 2), True),
        ("folded", (0, 0, -2), False),
        ("folded", (4, 0, 2), False),
        ("folded", (0, -4, 2), False),
        ("folded_fisheye", (1, 0, 2), True),
        ("folded_fisheye", (20, 0, 2), False),
        ("widening", (4, 0, 2), True),
        ("fisheye", (20, 0, 2), True),
        ("fisheye", (0, 0, -2), False),
        ("panorama", (0, 0, -2), True),
    ],
)
def test_what_is_left_out(name, place, kept):
    """A small block at each place: a pinhole leaves out all that is outside, others what they are surely blind to."""
    coord = np.random.default_rng(0).normal(size=(BLOCK, 3)) * 0.01 + place
    found = PointBlocks.of(coord.astype(np.float32)).maybe_seen(CAMERAS[name], np.eye(4), depth_min=0.1, depth_max=6.0)
    assert found.tolist() == [0] * kept


def test_planes_of_a_pinhole_by_hand():
    """A place is within all of them just where it is inside the image and the depth range."""
    rng = np.random.default_rng(1)
    places = np.c_[rng.normal(size=(2000, 2)) * 2, rng.uniform(-1, 5, 2000)]
    planes = sight_planes(PINHOLE, 0.5, 4.0)
    within = (places @ planes[:, :3].T + planes[:, 3] >= 0).all(axis=1)
    u, v = 50 * places[:, 0] / places[:, 2] + 31.5, 55 * places[:, 1] / places[:, 2] + 24.25
    expected = (places[:, 2] >= 0.5) & (places[:, 2] <= 4) & (u >= 0) & (u < 64) & (v >= 0) & (v < 48)
    assert np.array_equal(within, expected) and 50 < expected.sum() < 1500


def test_a_block_that_is_not_finite_is_kept():
    coord = np.zeros((BLOCK, 3), np.float32) - 5
    coord[3] = np.nan
    assert PointBlocks.of(coord).maybe_seen(PINHOLE, np.eye(4), depth_min=0.1, depth_max=None).tolist() == [0]
