"""Links bit by bit: blocks, columns and pieces of the work change no link. The oracle takes all points as they come.

Coordinates and poses are of so few bits that sums of their products are exact, in whatever order and with whatever
instructions they are added.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from ditr_cache.blocks import BLOCK, PointBlocks
from ditr_cache.geometry import morton_order, project
from ditr_cache.link import Links, link_view
from ditr_cache.sample import Camera, Projection, View
from ditr_cache.schema import LinkSettings

PINHOLE = Camera(width=320, height=240, fx=250.0, fy=255.0, cx=158.5, cy=121.25)
CAMERAS = {
    "pinhole": PINHOLE,
    "radial_tangential": replace(PINHOLE, model="radial_tangential", distortion=(-0.4, 0.1, 0.003, -0.002)),
    "fisheye": replace(PINHOLE, fx=120.0, fy=121.0, model="fisheye", distortion=(-0.1, 0.01, 0.0, 0.0)),
    "equirectangular": Camera.panorama(width=320, height=160),
}
SPACING = 0.05


def exact_pose(rng: np.random.Generator, eye: np.ndarray) -> np.ndarray:
    """A camera at `eye` that looks anywhere: a rotation but for 2^-13, which passes for one read from a text file."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    pose = np.eye(4)
    pose[:3, :3] = np.round((q if np.linalg.det(q) > 0 else -q) * 4096) / 4096
    pose[:3, 3] = np.round(-pose[:3, :3] @ eye * 1024) / 1024
    return pose


def room(rng: np.random.Generator, count: int) -> np.ndarray:
    """[N, 3] float32 points on the walls of 6 x 5 x 3 m, in multiples of 2^-8 m, in Morton order."""
    size = np.array([6.0, 5.0, 3.0])
    coord, wall = rng.random((count, 3)) * size, rng.integers(0, 6, count)
    for axis in range(3):
        coord[wall == 2 * axis, axis], coord[wall == 2 * axis + 1, axis] = 0, size[axis]
    coord = (np.round(coord * 256) / 256).astype(np.float32)
    return coord[morton_order(coord)]


def plain_zbuffer(u, v, near, camera: Camera, tolerance: float) -> np.ndarray:
    """[N] bool, by loops over points and the nine cells around each."""
    spacing = SPACING * max(camera.fx, camera.fy)
    farthest = math.ceil(2 * math.log2(spacing))
    level = [min(math.floor(2 * math.log2(x)), farthest) for x in near]
    nearest = np.full(len(near), np.inf)
    for k in set(level):
        cell = max(1.0, spacing / 2 ** (k / 2))
        at = list(zip((u / cell).astype(int).tolist(), (v / cell).astype(int).tolist(), strict=True))
        least: dict[tuple[int, int], float] = {}
        for (a, b), depth, own in zip(at, near.tolist(), level, strict=True):
            if own == k:
                for key in ((a + i, b + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                    least[key] = min(least.get(key, math.inf), depth)
        nearest = np.minimum(nearest, [least.get(key, math.inf) for key in at])
    return near <= nearest + tolerance


def plain_links(coord: np.ndarray, view: View, settings: LinkSettings) -> Links:
    """All points at once, in the order in which the words of design.md stand."""
    in_camera = coord.astype(float) @ view.camera_from_world[:3, :3].T + view.camera_from_world[:3, 3]
    distance = np.sqrt(in_camera[:, 0] ** 2 + in_camera[:, 1] ** 2 + in_camera[:, 2] ** 2)
    z = distance if view.camera.model == "equirectangular" else in_camera[:, 2]
    point = np.flatnonzero((z > 0) & (z >= settings.depth_min) & (z <= (settings.depth_max or np.inf)))
    u, v = project(in_camera[point], view.camera)
    keep = (u >= 0) & (u < view.camera.width) & (v >= 0) & (v < view.camera.height)
    point, u, v = point[keep], u[keep], v[keep]
    visible = np.ones(len(point), dtype=bool)
    if settings.occlusion == "none":
        pass
    elif view.load_depth is not None:
        a, b = project(in_camera[point], view.depth_camera)
        for i, p in enumerate(point):
            visible[i] = 0 <= a[i] < view.depth_camera.width and 0 <= b[i] < view.depth_camera.height
            if visible[i]:
                measured = float(view.load_depth()[math.floor(b[i]), math.floor(a[i])])
                visible[i] = measured > 0 and abs(z[p] - measured) <= settings.occlusion_tolerance
    else:
        near = distance if view.camera.model == "fisheye" else z
        visible = plain_zbuffer(u, v, near[point], view.camera, settings.occlusion_tolerance)
    fractions = np.stack([u[visible] * (65536 / view.camera.width), v[visible] * (65536 / view.camera.height)], axis=1)
    steps = np.minimum(fractions, 65535).astype(np.uint16)
    return Links(point=point[visible].astype(np.uint32), uv=steps, depth=z[point[visible]].astype(np.float16))


def same(a: Links, b: Links) -> bool:
    """Bit by bit."""
    return all(
        getattr(a, name).dtype == getattr(b, name).dtype and np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("point", "uv", "depth")
    )


@pytest.mark.parametrize("occlusion", ["depth", "depth of another camera", "zbuffer", "none"])
@pytest.mark.parametrize("name", CAMERAS)
def test_links_are_those_of_plain_code_bit_by_bit(name, occlusion):
    rng = np.random.default_rng([len(name), len(occlusion)])
    camera = CAMERAS[name]
    linked = 0
    for count, eye, settings in (
        (9000, np.array([3.0, 2.5, 1.5]), LinkSettings(depth_min=0.5)),  # in the room
        (2 * BLOCK + 1, np.array([0.5, 0.5, 1.0]), LinkSettings(depth_max=4.0)),
        (9000, np.array([-3.0, 9.0, 5.0]), LinkSettings(depth_min=0.0)),  # from outside
    ):
        with_depth = occlusion.startswith("depth")
        settings = replace(settings, occlusion="none" if occlusion == "none" else "auto")
        settings = replace(settings, occlusion_tolerance=2.0 if with_depth else 0.4)  # depth is at random
        coord = room(rng, count)
        for _ in range(2):
            other = occlusion == "depth of another camera" and name != "equirectangular"
            depth_camera = PINHOLE.resized(width=200, height=150).cropped(left=10, top=8, width=180, height=130)
            depth_camera = depth_camera if other else camera
            depth = rng.uniform(1, 8, (depth_camera.height, depth_camera.width)).astype(np.float32)
            depth[rng.random(depth.shape) < 0.1] = 0
            view = View(
                id="v",
                camera=camera,
                camera_from_world=exact_pose(rng, eye),
                load_image=lambda: np.zeros((1, 1, 3), np.uint8),
                depth_camera=depth_camera if with_depth else None,
                load_depth=(lambda depth=depth: depth) if with_depth else None,
            )
            expected = plain_links(coord, view, settings)
            found = link_view(PointBlocks.of(coord), view, settings, spacing=SPACING)
            assert same(found, expected)
            assert same(link_view(coord, view, settings, spacing=SPACING), expected)
            linked += len(expected.point)
    assert linked > 300


@pytest.mark.parametrize("name", CAMERAS)
def test_links_do_not_depend_on_the_order_of_the_points(name):
    """Points in any order: the boxes of the blocks are then as large as the room, and in other blocks."""
    rng = np.random.default_rng(5)
    coord = room(rng, 5000)
    shuffled = rng.permutation(len(coord))
    view = View(
        id="v",
        camera=CAMERAS[name],
        camera_from_world=exact_pose(rng, np.array([3.0, 2.5, 1.5])),
        load_image=lambda: np.zeros((1, 1, 3), np.uint8),
    )
    ordered = link_view(coord, view, LinkSettings(), spacing=SPACING)
    found = link_view(coord[shuffled], view, LinkSettings(), spacing=SPACING)
    back = np.argsort(shuffled[found.point], kind="stable")
    assert len(ordered.point) > 100
    assert same(
        ordered,
        Links(point=shuffled[found.point][back].astype(np.uint32), uv=found.uv[back], depth=found.depth[back]),
    )


def test_released_projections_are_kept_within_the_depth_range_and_the_image():
    rng = np.random.default_rng(6)
    coord = room(rng, 1500)
    point = rng.choice(len(coord), 900, replace=False)
    u, v = rng.uniform(-5, PINHOLE.width + 5, 900), rng.uniform(-5, PINHOLE.height + 5, 900)
    pose = exact_pose(rng, np.array([3.0, 2.5, 1.5]))
    view = View(
        id="v",
        camera=PINHOLE,
        camera_from_world=pose,
        load_image=lambda: np.zeros((1, 1, 3), np.uint8),
        load_projection=lambda: Projection(point=point, u=u, v=v),
    )
    found = link_view(PointBlocks.of(coord), view, LinkSettings(depth_min=0.5, depth_max=2.5), spacing=SPACING)
    expected = []
    for i in np.argsort(point):
        z = float(sum(pose[2, c] * float(coord[point[i], c]) for c in range(3)) + pose[2, 3])
        if 0.5 <= z <= 2.5 and 0 <= u[i] < PINHOLE.width and 0 <= v[i] < PINHOLE.height:
            expected.append((point[i], int(u[i] * (65536 / 320)), int(v[i] * (65536 / 240)), np.float16(z)))
    assert len(expected) > 50
    assert [(p, *uv, z) for p, uv, z in zip(found.point, found.uv, found.depth, strict=True)] == expected
