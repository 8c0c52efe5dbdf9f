import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache.errors import DataError
from ditr_cache.link import Links, check_pose, concatenate, link_view, select_views
from ditr_cache.sample import Camera, Sample, View
from ditr_cache.schema import LinkSettings

CAMERA = Camera(width=40, height=30, fx=30.0, fy=30.0, cx=20.0, cy=15.0)


def rotation_y(angle: float) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    return pose


def view(
    name: str = "v",
    pose: np.ndarray | None = None,
    camera: Camera = CAMERA,
    depth: np.ndarray | None = None,
    depth_camera: Camera | None = None,
) -> View:
    return View(
        id=name,
        camera=camera,
        camera_from_world=np.eye(4) if pose is None else pose,
        load_image=lambda: np.zeros((camera.height, camera.width, 3), np.uint8),
        depth_camera=None if depth is None else depth_camera or camera,
        load_depth=None if depth is None else lambda: depth.astype(np.float32),
    )


def sample(views: Sequence[View], every: int = 1) -> Sample:
    def never() -> None:
        raise AssertionError("selecting views must not read points")

    return Sample(id="s", split="train", views=tuple(views), load_points=never, every_nth_frame=every)


# --- which views ----------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 7), st.none() | st.integers(1, 12))
def test_selected_views(posed, stride, limit):
    lost = np.full((4, 4), -np.inf)
    views = [view(str(i), None if ok else lost) for i, ok in enumerate(posed)]
    usable = [str(i) for i in range(0, len(posed), stride) if posed[i]]
    chosen = [v.id for v in select_views(sample(views), LinkSettings(every_nth_frame=stride, max_views=limit))]
    assert chosen == sorted(set(chosen), key=int) and set(chosen) <= set(usable)
    assert len(chosen) == min(len(usable), limit or len(usable))
    if chosen and (limit is None or limit > 1):
        assert chosen[0] == usable[0] and chosen[-1] == usable[-1]
        steps = np.diff([usable.index(c) for c in chosen])
        assert len(steps) == 0 or steps.max() - steps.min() <= 1


def test_the_dataset_recommends_a_stride_that_the_user_may_overrule():
    views = [view(str(i)) for i in range(9)]
    assert [v.id for v in select_views(sample(views, every=4), LinkSettings())] == ["0", "4", "8"]
    assert len(select_views(sample(views, every=4), LinkSettings(every_nth_frame=1))) == 9


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_infinite_entry_is_no_pose(bad):
    pose = np.eye(4)
    pose[1, 3] = bad
    assert select_views(sample([view("a", pose), view("b")]), LinkSettings())[0].id == "b"


def test_no_views():
    assert select_views(sample([]), LinkSettings(max_views=3)) == []


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        (np.diag([2.0, 2, 2, 1]), "not orthonormal"),
        (np.diag([1.0, 1, -1, 1]), "determinant -1"),
        (np.diag([1.0, 1, 1, 2]), "last row 0 0 0 1"),
        (np.eye(3), "4x4"),
        (np.eye(4).T + np.eye(4, k=-3), "last row"),
        (np.eye(4) + 0.2 * np.eye(4, k=1), "not orthonormal"),
    ],
)
def test_poses_that_are_no_rigid_motion_are_refused(pose, message):
    with pytest.raises(DataError, match=rf"pose of view 'v'.*{message}"):
        check_pose(view(pose=pose))
    with pytest.raises(DataError, match="pose of view 'v'"):
        link_view(np.ones((2, 3), np.float32), view(pose=pose), LinkSettings(), spacing=0.1)


def test_poses_rounded_in_a_text_file_pass():
    check_pose(view(pose=rotation_y(0.3).round(4)))


# --- which links ----------------------------------------------------------------------------------------------------


def plain_links(coord, seen_from: View, settings: LinkSettings) -> dict[int, tuple[float, float, float]]:
    """Point -> (u, v, z), by loops over the words of design.md; the view has a depth map."""
    found = {}
    depth = seen_from.load_depth()
    for i, p in enumerate(coord.astype(float)):
        x, y, z = (sum(seen_from.camera_from_world[r, c] * [*p, 1.0][c] for c in range(4)) for r in range(3))
        if z <= 0 or z < settings.depth_min or (settings.depth_max is not None and z > settings.depth_max):
            continue
        pixel = []
        for camera in (seen_from.camera, seen_from.depth_camera):
            u, v = camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy
            if 0 <= u < camera.width and 0 <= v < camera.height:
                pixel.append((u, v))
        if len(pixel) < 2:
            continue
        measured = float(depth[math.floor(pixel[1][1]), math.floor(pixel[1][0])])
        if measured > 0 and abs(measured - z) <= settings.occlusion_tolerance:
            found[i] = (*pixel[0], z)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("depth_size", [(40, 30), (20, 15), (64, 36)])
def test_links_against_plain_loops(seed, depth_size):
    """Depth of another size and field of view than colour, unknown depth, a depth range, random poses."""
    rng = np.random.default_rng(seed)
    width, height = depth_size
    depth_camera = Camera(width=width, height=height, fx=0.8 * width, fy=0.9 * width, cx=0.48 * width, cy=0.5 * height)
    depth = np.where(rng.random((height, width)) < 0.2, 0, rng.uniform(1, 4, (height, width)))
    pose = rotation_y(rng.uniform(-0.5, 0.5))
    pose[:3, 3] = rng.normal(size=3) * 0.3
    seen_from = view(pose=pose, depth=depth, depth_camera=depth_camera)
    settings = LinkSettings(depth_min=1.2, depth_max=3.6, occlusion_tolerance=0.4)
    coord = np.c_[rng.uniform(-3, 3, (2000, 2)), rng.uniform(-1, 5, 2000)].astype(np.float32)
    links = link_view(coord, seen_from, settings, spacing=0.1)
    expected = plain_links(coord, seen_from, settings)
    assert len(expected) > 10
    assert links.point.tolist() == sorted(expected)
    assert (links.point.dtype, links.uv.dtype, links.depth.dtype) == (np.uint32, np.uint16, np.float16)
    for point, fraction, z in zip(links.point, links.uv, links.depth, strict=True):
        u, v, true_z = expected[int(point)]
        assert fraction[0] in (math.floor(u / 40 * 65536), math.floor(u / 40 * 65536 - 1e-6))
        assert fraction[1] in (math.floor(v / 30 * 65536), math.floor(v / 30 * 65536 - 1e-6))
        assert z == np.float16(true_z)


def test_range_is_inclusive_and_nothing_behind_the_camera_is_linked():
    coord = np.array([[0, 0, z] for z in (-1, 0, 0.05, 0.1, 2, 3, 3.01)], dtype=np.float32)
    settings = LinkSettings(depth_min=float(np.float32(0.1)), depth_max=3.0, occlusion_tolerance=100)
    assert link_view(coord, view(), settings, spacing=0.01).point.tolist() == [3, 4, 5]
    no_minimum = LinkSettings(depth_min=0, occlusion_tolerance=100)
    assert link_view(coord, view(), no_minimum, spacing=0.01).point.tolist() == [2, 3, 4, 5, 6]


def test_unknown_depth_links_nothing():
    coord = np.array([[0, 0, 2]], dtype=np.float32)
    assert len(link_view(coord, view(depth=np.zeros((30, 40))), LinkSettings(), spacing=0.1).point) == 0
    assert len(link_view(coord, view(depth=np.full((30, 40), 2.1)), LinkSettings(), spacing=0.1).point) == 1


def test_without_depth_the_points_hide_each_other():
    x, y = np.meshgrid(np.arange(-0.4, 0.4, 0.02), np.arange(-0.3, 0.3, 0.02))
    near = np.c_[x.ravel(), y.ravel(), np.full(x.size, 1.0)]
    coord = np.concatenate([near, near * 3, [[1.9, 0, 3]]]).astype(np.float32)
    point = link_view(coord, view(), LinkSettings(), spacing=0.02).point
    assert point.tolist() == [*range(x.size), 2 * x.size]


def test_depth_of_an_unexpected_size_names_the_view():
    broken = view("frame7", depth=np.ones((15, 20)), depth_camera=CAMERA)
    with pytest.raises(DataError, match="depth of view 'frame7': expected 30x40 pixels, got 15x20"):
        link_view(np.ones((1, 3), np.float32), broken, LinkSettings(), spacing=0.1)


def test_no_points_and_nothing_visible():
    for coord in (np.zeros((0, 3), np.float32), np.full((5, 3), -2, np.float32)):
        for seen_from in (view(), view(depth=np.ones((30, 40)))):
            links = link_view(coord, seen_from, LinkSettings(), spacing=0.1)
            assert links.point.shape == (0,) and links.uv.shape == (0, 2) and links.depth.shape == (0,)


def test_concatenate():
    part = Links(point=np.array([3, 4], np.uint32), uv=np.ones((2, 2), np.uint16), depth=np.ones(2, np.float16))
    both = concatenate([part, part])
    assert both.point.tolist() == [3, 4, 3, 4] and both.uv.shape == (4, 2) and both.depth.shape == (4,)
    none = concatenate([])
    assert (none.point.dtype, none.uv.dtype, none.uv.shape) == (np.uint32, np.uint16, (0, 2))
