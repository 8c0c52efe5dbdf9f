"""Renderings of Structured3D: their cameras, and the points that all renderings of a room show together.

Facts: data_organization.md of https://github.com/bertjiazheng/Structured3D, and Pointcept's preprocessing. The house's
frame is in millimetres, z up.

- A perspective looks along `t` of its `camera_pose.txt`, "vx vy vz tx ty tz ux uy uz xfov yfov 1", with `u` upwards
  and both fields of view halved, in radians. Its depth is along the optical axis.
- A panorama stands level at `camera_xyz.txt`, its middle column looks along +y and +x is to the right of that (the
  documentation's negative y-axis is where its left and right border look). Its depth is along the ray.
- Depth is antialiased: at the border of an object a pixel holds a mean of both distances and hangs in mid-air.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.frames import invert_pose
from ditr_cache.datasets.fusion import depth_normals, first_of_voxels, unproject
from ditr_cache.datasets.images import MILLIMETRES, image_size, read_color, read_depth, read_ids
from ditr_cache.datasets.nyu40 import STRUCTURED3D25, nyu40_to_index
from ditr_cache.errors import DataError, MissingDataError
from ditr_cache.sample import Camera, Points, View

_LOG = logging.getLogger(__name__)

_GRAZING = 0.15  # least cosine between a ray and the surface's normal (Pointcept): pixels in mid-air have less
_ANY_JUMP = 1e6  # of the depth, between neighbours: what is too much shows in the normal
_BACKGROUND = 65535  # of instance.png
_PARALLEL = 0.99  # cosine between the view's direction and up from which on they say nothing of the image's roll
_SQUARE = 0.01  # by how much the sides of a pixel may differ
_TEXT_BYTES = 4096  # of a camera's file, which holds twelve numbers


@dataclass(frozen=True, kw_only=True)
class Images:
    """Files of one rendering.

    Args:
        color: what the VFM sees.
        rawlight: the colours of the points.
        depth, semantic: see there.
        instance: None where it was not downloaded; it comes with an archive of its own.
        pose: text file with the camera.
    """

    color: Path
    rawlight: Path
    depth: Path
    semantic: Path
    instance: Path | None
    pose: Path


@dataclass(frozen=True, kw_only=True, eq=False)
class Rendering:
    """One rendering: its view, and the files that say what its pixels show."""

    view: View
    images: Images


def open_rendering(name: str, images: Images, *, panorama: bool) -> Rendering:
    """Describe a rendering; its pixels are read only when asked for.

    Args:
        name: id of the view.
        images: the files.
        panorama: whether it is one.

    Raises:
        MissingDataError: a file is missing.
        DataError: the camera's file, or the header of the image, cannot be used.
    """
    size = image_size(images.color)
    camera, pose = (panorama_camera if panorama else perspective_camera)(images.pose, size, images.color)
    view = View(
        id=name,
        camera=camera,
        camera_from_world=pose,
        load_image=partial(read_color, images.color, size=size, where=str(images.color)),
        depth_camera=camera,
        load_depth=partial(read_depth, images.depth, size=size, where=str(images.depth)),
    )
    return Rendering(view=view, images=images)


def perspective_camera(path: Path, size: tuple[int, int], image: Path) -> tuple[Camera, NDArray[np.float64]]:
    """Camera and `camera_from_world` [4, 4], in metres, of a `camera_pose.txt`.

    Args:
        path: the file.
        size: (width, height) of the image.
        image: names the image in errors.

    Raises:
        MissingDataError: no such file.
        DataError: not twelve numbers, directions that are no camera's, or a field of view that does not fit the image.
    """
    numbers = _numbers(path, 12)
    width, height = size
    x_fov, y_fov = numbers[9:11]
    if not (0 < x_fov < np.pi / 2 and 0 < y_fov < np.pi / 2):
        raise DataError(
            f"{path}: expected half fields of view between 0 and pi/2 radians, got {x_fov:g} and {y_fov:g}; the file "
            "is damaged, unpack it again"
        )
    fx, fy = width / 2 / np.tan(x_fov), height / 2 / np.tan(y_fov)
    if abs(fx / fy - 1) > _SQUARE:
        raise DataError(
            f"{image}: {width}x{height} pixels do not fit the fields of view in {path.name} (released images are "
            "1280x720); the image was cropped or squeezed: take the released one"
        )
    camera = Camera(width=width, height=height, fx=fx, fy=fy, cx=width / 2, cy=height / 2)
    world_from_camera = np.eye(4)
    world_from_camera[:3, :3] = _rotation(numbers[3:6], numbers[6:9], path)
    world_from_camera[:3, 3] = numbers[:3] / MILLIMETRES
    return camera, invert_pose(world_from_camera)


def _rotation(forward: NDArray[np.float64], up: NDArray[np.float64], path: Path) -> NDArray[np.float64]:
    """[3, 3] `world_from_camera` of a view's direction and what is up: of that, the part at a right angle to it."""
    length, up_length = float(np.linalg.norm(forward)), float(np.linalg.norm(up))
    if min(length, up_length) < 1e-6 or abs(float(forward @ up)) > _PARALLEL * length * up_length:
        raise DataError(
            f"{path}: expected a view direction and another direction that is up, got {forward.tolist()} and "
            f"{up.tolist()}; the file is damaged, unpack it again"
        )
    forward = forward / length
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward], axis=1)


def panorama_camera(path: Path, size: tuple[int, int], image: Path) -> tuple[Camera, NDArray[np.float64]]:
    """Camera and `camera_from_world` [4, 4], in metres, of a `camera_xyz.txt`.

    Args:
        path: the file.
        size: (width, height) of the image.
        image: names the image in errors.

    Raises:
        MissingDataError: no such file.
        DataError: not three numbers, or an image that is no full panorama.
    """
    numbers = _numbers(path, 3)
    width, height = size
    if width != 2 * height:
        raise DataError(
            f"{image}: a panorama is twice as wide as high (released ones are 1024x512), got {width}x{height} pixels; "
            "the image was cropped: take the released one"
        )
    world_from_camera = np.eye(4)
    world_from_camera[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]  # columns: right is x, down is -z, forward is y
    world_from_camera[:3, 3] = numbers / MILLIMETRES
    return Camera.panorama(width=width, height=height), invert_pose(world_from_camera)


def _numbers(path: Path, count: int) -> NDArray[np.float64]:
    try:
        with path.open("rb") as file:
            words = file.read(_TEXT_BYTES).decode("ascii", errors="replace").split()
        numbers = np.array([float(word) for word in words])
    except FileNotFoundError as error:
        raise MissingDataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected {count} numbers of a camera ({error}); unpack it again") from error
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise DataError(
            f"{path}: expected {count} finite numbers of a camera, got {len(numbers)}: {' '.join(words[:12])}; "
            "the file is damaged, unpack it again"
        )
    return numbers


def room_points(renderings: Sequence[Rendering], *, where: str, voxel_size: float) -> Points:
    """The first point in every voxel of all that the renderings show, in their order.

    A rendering that cannot be read is left out, with a logged warning. There are instances where every rendering has
    a file of them.

    Args:
        renderings: of one room.
        where: names the room in errors.
        voxel_size: metres.

    Raises:
        DataError: no rendering gave a point.
    """
    failures: list[str] = []
    instances = all(rendering.images.instance is not None for rendering in renderings)

    def readable() -> Iterator[Points]:
        for rendering in renderings:
            try:
                yield rendering_points(rendering, instances=instances, where=where)
            except DataError as error:
                failures.append(str(error))
                _LOG.warning("%s: its points do without %s: %s", where, rendering.view.id, error)

    points = first_of_voxels(readable(), voxel_size)
    if points is None:
        cause = f" ({failures[0]})" if failures else ""
        raise DataError(
            f"{where}: no points: {len(failures)} of {len(renderings)} renderings cannot be read{cause}, the others "
            "have no depth; unpack the room again"
        )
    return points


def rendering_points(rendering: Rendering, *, instances: bool, where: str) -> Points:
    """The points that one rendering shows, in the order of its pixels.

    Left out are pixels without depth, those at the border of the image or of what has depth, and those that see their
    surface at a grazing angle: in mid-air between two objects they seem to.

    Args:
        rendering: see there.
        instances: whether to read instances, too; where these alone cannot be read, its points are of none, with a
            logged warning.
        where: names the room in it.

    Raises:
        DataError: an image other than that of instances cannot be read.
    """
    view, images = rendering.view, rendering.images
    assert view.load_depth is not None
    size = (view.camera.width, view.camera.height)
    color = read_color(images.rawlight, size=size, where=str(images.rawlight))
    label = read_ids(images.semantic, size=size, where=str(images.semantic))
    depth = view.load_depth()
    in_camera = unproject(depth, view.camera)
    # Neighbours at one pixel show what hangs in mid-air; farther ones average out that depth has steps of a millimetre.
    sharp = depth_normals(in_camera, depth, step=1, jump=_ANY_JUMP)
    smooth = depth_normals(in_camera, depth)
    facing = np.abs(np.einsum("hwc,hwc->hw", sharp, in_camera))
    keep = facing > _GRAZING * np.linalg.norm(in_camera, axis=2)
    normal = np.where(smooth.any(axis=2, keepdims=True), smooth, sharp)[keep]
    instance = None
    if instances and images.instance is not None:
        try:
            ids = read_ids(images.instance, size=size, where=str(images.instance))[keep]
            instance = np.where(ids == _BACKGROUND, -1, ids).astype(np.int32)
        except DataError as error:
            _LOG.warning("%s: the points of %s are of no instance: %s", where, view.id, error)
            instance = np.full(int(keep.sum()), -1, dtype=np.int32)
    world_from_camera = np.linalg.inv(view.camera_from_world)
    rotation, place = world_from_camera[:3, :3], world_from_camera[:3, 3]
    return Points(
        coord=(in_camera[keep] @ rotation.T + place).astype(np.float32),
        color=color[keep],
        normal=(normal @ rotation.T).astype(np.float32),
        segment=nyu40_to_index(label[keep], STRUCTURED3D25),
        instance=instance,
    )
