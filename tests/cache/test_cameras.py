"""Camera models against cameras that project by formulas of their own, and views linked by them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import world as bed
from ditr_cache.datasets.fusion import back_project
from ditr_cache.errors import DataError
from ditr_cache.geometry import FRACTION_STEPS, depth_of, distort, pixel_rays, project, to_camera, undistort
from ditr_cache.link import link_view
from ditr_cache.sample import Camera, Projection, View
from ditr_cache.schema import LinkSettings

STANDS = bed.pose((0.2, 0.9, 1.4), yaw=0.2, pitch=0.15, roll=0.05)
NUMBERS = {"width": 320, "height": 240, "fx": 200.0, "fy": 205.0, "cx": 155.0, "cy": 122.0}
LENS = (200.0, 205.0, 155.0, 122.0)
WIDE = {"width": 320, "height": 240, "fx": 110.0, "fy": 112.0, "cx": 158.0, "cy": 118.0}
BENT, RATIONAL = (-0.25, 0.07, 0.002, -0.003), (0.12, -0.05, 0.001, 0.002, 0.02, 0.3, -0.04, 0.01)
ROUND = (-0.03, 0.004, -0.001, 0.0002)
PAIRS = {
    "pinhole": (Camera(**NUMBERS), bed.pinhole(320, 240, *LENS, STANDS)),
    "radial_tangential": (
        Camera(**NUMBERS, model="radial_tangential", distortion=BENT),
        bed.distorted(320, 240, *LENS, BENT, STANDS),
    ),
    "rational": (
        Camera(**NUMBERS, model="radial_tangential", distortion=RATIONAL),
        bed.distorted(320, 240, *LENS, RATIONAL, STANDS),
    ),
    "fisheye": (
        Camera(**WIDE, model="fisheye", distortion=ROUND),
        bed.fisheye(320, 240, 110.0, 112.0, 158.0, 118.0, ROUND, STANDS),
    ),
    "equirectangular": (Camera.panorama(width=480, height=240), bed.panorama(480, 240, STANDS)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_projections_agree(name):
    camera, eye = PAIRS[name]
    places, _ = bed.World().points(5000)
    in_camera = to_camera(places, STANDS)
    in_camera = in_camera[depth_of(in_camera, camera) > 0]
    u, v = project(in_camera, camera)
    true_u, true_v, seen = eye.to_pixel(in_camera)
    judged = seen & (true_u > -20) & (true_u < eye.width + 20) & (true_v > -20) & (true_v < eye.height + 20)
    assert judged.sum() > 500
    np.testing.assert_allclose(u[judged], true_u[judged], atol=1e-6)
    np.testing.assert_allclose(v[judged], true_v[judged], atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_rays_of_pixels_project_back(name):
    camera, eye = PAIRS[name]
    rays = pixel_rays(camera)
    known = np.isfinite(rays).all(axis=2)
    assert known.mean() > (0.85 if name == "fisheye" else 0.999)  # its corners look backwards
    u, v = project(2.5 * rays[known], camera)
    columns, rows = np.meshgrid(np.arange(eye.width) + 0.5, np.arange(eye.height) + 0.5)
    np.testing.assert_allclose(u, columns[known], atol=1e-4)
    np.testing.assert_allclose(v, rows[known], atol=1e-4)
    np.testing.assert_allclose(depth_of(2.5 * rays[known], camera), 2.5, atol=1e-9)


@given(
    st.sampled_from(sorted(PAIRS)),
    st.floats(0.2, 5), st.floats(0.2, 5), st.integers(-30, 30), st.integers(-30, 30),
)  # fmt: skip
def test_resize_and_crop_move_pixels_as_they_move_the_image(name, sx, sy, left, top):
    camera, _ = PAIRS[name]
    points = to_camera(bed.World().points(200, seed=1)[0], STANDS)
    points = points[depth_of(points, camera) > 0.1]
    u, v = project(points, camera)
    width, height = max(1, round(camera.width * sx)), max(1, round(camera.height * sy))
    resized = camera.resized(width=width, height=height)
    ru, rv = project(points, resized)
    np.testing.assert_allclose(ru, u * width / camera.width, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(rv, v * height / camera.height, rtol=1e-9, atol=1e-6)
    if name != "equirectangular":  # a cropped panorama no longer closes
        cu, cv = project(points, camera.cropped(left=left, top=top, width=100, height=100))
        np.testing.assert_allclose(cu, u - left, atol=1e-6)
        np.testing.assert_allclose(cv, v - top, atol=1e-6)


@pytest.mark.parametrize("name", ["radial_tangential", "fisheye"])
def test_beyond_the_fold_of_the_lens_nothing_is_seen(name):
    """r (1 - r^2 / 2) falls beyond r = 0.82: without a limit, points far outside return into the image."""
    k = (-0.5, 0.0, 0.0, 0.0)
    camera = Camera(**NUMBERS, model=name, distortion=k)
    angle = np.array([0.5, 1.3, 1.5])
    points = np.stack([np.tan(angle), np.zeros(3), np.ones(3)], axis=1)
    u, _ = project(points, camera)
    assert np.isfinite(u[0]) and np.isnan(u[1:]).all()


@pytest.mark.parametrize("k", [(0.44, -0.06, 0.002, -0.003, -0.023), (-0.35, 0.05, 0.004, 0.002, 0.002)])
def test_rays_reach_all_that_a_strong_lens_shows(k):
    """Far out a distorted place is no start for its own inverse: it may lie beyond the fold of the lens."""
    camera = Camera(**NUMBERS, model="radial_tangential", distortion=k)
    radius, angle = np.meshgrid(np.linspace(0, 1.05, 50), np.linspace(0, 6, 20))
    x, y = (radius * np.cos(angle)).ravel(), (radius * np.sin(angle)).ravel()
    np.testing.assert_allclose(undistort(*distort(x, y, camera), camera), (x, y), atol=1e-6)
    folded = replace(camera, distortion=(-0.5, 0.0, 0.0, 0.0))  # puts nothing beyond 0.55
    assert np.isnan(undistort(np.array([0.6]), np.array([0.0]), folded)).all()


def view(name: str, **changes) -> View:
    camera, eye = PAIRS[name]
    room = bed.World()
    base = View(
        id=name,
        camera=camera,
        camera_from_world=STANDS,
        load_image=lambda: room.image(eye),
        depth_camera=camera,
        load_depth=lambda: room.depth(eye, along_ray=name == "equirectangular").astype(np.float32),
    )
    return replace(base, **changes)


@pytest.mark.parametrize("name", PAIRS)
def test_links_of_every_camera(name):
    """Linked are just the points that the room's own ray casting finds visible, where it is sure."""
    _, eye = PAIRS[name]
    room = bed.World()
    places, _ = room.points(6000)
    found = link_view(places.astype(np.float32), view(name), LinkSettings(), spacing=0.05)
    u, v, inside = eye.project(places)
    _, distance = room.cast(eye.origin, places - eye.origin)
    length = np.linalg.norm(places - eye.origin, axis=1)
    in_camera = to_camera(places, STANDS)
    far = depth_of(in_camera, PAIRS[name][0]) > 0.15
    sure = inside & far & (distance > 1 - 1e-4)
    hidden = inside & ((1 - distance) * length > 0.6)
    linked = np.zeros(len(places), bool)
    linked[found.point] = True
    assert linked[sure].mean() > 0.97 and not linked[~inside].any()
    assert linked[hidden].mean() < 0.05 and hidden.sum() > 20
    uv = found.uv / FRACTION_STEPS * (eye.width, eye.height)
    np.testing.assert_allclose(uv[:, 0], u[found.point], atol=0.02)
    np.testing.assert_allclose(uv[:, 1], v[found.point], atol=0.02)


@pytest.mark.parametrize("name", PAIRS)
def test_depth_of_every_camera_gives_points_on_the_surfaces(name):
    coord, color, normal = back_project(view(name), (0.2, 9))
    room = bed.World()
    assert (room.surface_of(coord) >= 0).mean() > 0.99
    np.testing.assert_allclose(color, room.color(coord), atol=4)
    assert (np.linalg.norm(normal, axis=1) > 0.5).mean() > 0.7


def test_the_dataset_s_own_projection_stands_in_place_of_ours():
    places, _ = bed.World().points(1000)
    order = np.random.default_rng(3).permutation(len(places))
    given_points = np.array([5, 17, 400])
    released = Projection(point=given_points, u=np.array([10.5, 200.0, 300.0]), v=np.array([3.0, 100.0, 239.0]))
    everywhere = LinkSettings(depth_min=0.0, occlusion="auto")
    seen = to_camera(places, STANDS)[given_points, 2] > 0
    found = link_view(
        places[order].astype(np.float32),
        view("pinhole", load_projection=lambda: released),
        everywhere, spacing=0.05, order=order,
    )  # fmt: skip
    back = {int(order[p]): tuple(uv) for p, uv in zip(found.point, found.uv, strict=True)}
    assert set(back) == set(given_points[seen]) and seen.any()
    for point, u in zip(given_points[seen], released.u[seen], strict=True):
        assert back[point][0] == int(u / 320 * FRACTION_STEPS)
    assert (np.diff(found.point.astype(int)) > 0).all()
    wrong = Projection(point=np.array([1000]), u=np.array([1.0]), v=np.array([1.0]))
    with pytest.raises(DataError, match="names points 1000 to 1000, expected 0 to 999"):
        link_view(
            places.astype(np.float32), view("pinhole", load_projection=lambda: wrong), everywhere, spacing=0.05
        )  # fmt: skip


def test_without_an_occlusion_test_hidden_points_are_linked():
    room = bed.World()
    places = room.points(4000)[0].astype(np.float32)
    tested = link_view(places, view("pinhole"), LinkSettings(), spacing=0.05)
    every = link_view(places, view("pinhole"), LinkSettings(occlusion="none"), spacing=0.05)
    assert len(every.point) > 1.1 * len(tested.point)
    u, v = project(to_camera(places, STANDS)[every.point], PAIRS["pinhole"][0])
    assert (u >= 0).all() and (v < 240).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "omni"}, "unknown model 'omni'"),
        ({"model": "fisheye", "distortion": (0.1,)}, "fisheye takes 4 finite"),
        ({"model": "radial_tangential", "distortion": (0.1, 0, np.nan, 0)}, "takes 4 or 5 or 8 finite"),
        ({"distortion": (0.1, 0, 0, 0)}, "pinhole takes 0"),
    ],
)
def test_cameras_that_make_no_sense(changes, message):
    with pytest.raises(DataError, match=message):
        Camera(**NUMBERS, **changes)
