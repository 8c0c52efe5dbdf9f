"""Frames of a posed capture, whatever file describes them, and how they become views."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.frames import same_aspect
from ditr_cache.datasets.images import image_size, read_color
from ditr_cache.datasets.posed.depth import depth_map_size, read_depth_map
from ditr_cache.errors import DataError, MissingDataError
from ditr_cache.sample import Camera, View

BLOCK = 1000.0
"""Metres: worlds are moved by whole multiples."""

FAR = 4096.0
"""Metres from the origin from where on float32 no longer tells half millimetres apart, so that a world is moved."""

_MAX_PATH = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class PosedFrame:
    """One posed image of a capture.

    Args:
        id: path of the image, as the capture's file has it.
        image: the file.
        camera: of the image; the file may be the same picture in another size.
        camera_from_world: [4, 4] float64.
        depth: the depth map, if the capture has some.
        depth_unit: metres per unit of the depth map.
    """

    id: str
    image: Path
    camera: Camera
    camera_from_world: NDArray[np.float64]
    depth: Path | None = None
    depth_unit: float = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Description:
    """What the file of a capture says.

    Args:
        source: that file, or the folder of the model.
        frames: in the file's order.
        broken: (view id, error) of frames that cannot be used.
        cloud: the point cloud that the file names; it is in the world of the poses.
        poses_from_original: [4, 4] the world of the poses from the one in which all other clouds are.
    """

    source: Path
    frames: tuple[PosedFrame, ...]
    broken: tuple[tuple[str, DataError], ...] = ()
    cloud: Path | None = None
    poses_from_original: NDArray[np.float64] | None = None


def path_inside(text: object, folder: Path, root: Path, where: str) -> Path:
    """The file that `text` of a capture's file names, relative to `folder`.

    Raises:
        DataError: not a path, or one that leads out of `root`.
    """
    if not isinstance(text, str) or not 0 < len(text) <= _MAX_PATH or "\0" in text or not _is_unicode(text):
        raise DataError(f"{where}: expected the path of a file, got {str(text)[:100]!r}")
    path = Path(os.path.abspath(folder / text))  # noqa: PTH100 (`resolve` would follow links, which may lead anywhere)
    if not path.is_relative_to(os.path.abspath(root)):  # noqa: PTH100
        raise DataError(
            f"{where}: {text!r} leads out of {str(root)!r}; write the path relative to {folder.name!r}, or pass a "
            "folder above both with --root"
        )
    return path


def in_time_order(frames: Iterable[PosedFrame]) -> list[PosedFrame]:
    """Frames by name, numbers by value: COLMAP writes them by id, nerfstudio as COLMAP had them."""

    def key(frame: PosedFrame) -> list[str | int]:
        # Text and numbers take turns, so that like is compared with like.
        return [int(word) if i % 2 else word for i, word in enumerate(re.split(r"([0-9]+)", frame.id))]

    return sorted(frames, key=key)


def world_offset(frames: Iterable[PosedFrame]) -> NDArray[np.float64] | None:
    """[3] whole kilometres to subtract from a world whose first camera is `FAR` from its origin (map projections).

    None where no frame has a pose.
    """
    for frame in frames:
        if np.isfinite(frame.camera_from_world).all():
            return offset_of(np.linalg.inv(frame.camera_from_world)[:3, 3])
    return None


def offset_of(place: NDArray[np.floating]) -> NDArray[np.float64]:
    """[3] whole kilometres, in each axis in which `place` [3] is `FAR` from the origin."""
    place = place.astype(np.float64)
    return np.where(np.abs(place) >= FAR, np.round(place / BLOCK) * BLOCK, 0.0)


def moved(frame: PosedFrame, offset: NDArray[np.float64]) -> PosedFrame:
    """The frame in a world from which `offset` [3] was subtracted."""
    pose = frame.camera_from_world.copy()
    pose[:3, 3] += pose[:3, :3] @ offset
    return replace(frame, camera_from_world=pose)


def view_of(frame: PosedFrame, source: Path) -> View:
    """The view of a frame. The sizes of its image and depth map are read from their headers.

    Raises:
        MissingDataError: no image or no depth map.
        DataError: neither of them is the camera's picture, or one is no picture at all.
    """
    if not frame.image.is_file():
        raise MissingDataError(f"{frame.image}: no such file, but {source} lists it; copy the images beside it")
    camera = _of_size(frame.camera, image_size(frame.image), str(frame.image), source)
    depth_camera, load_depth = None, None
    if frame.depth is not None:
        if not frame.depth.is_file():
            raise MissingDataError(
                f"{frame.depth}: no such depth map; copy it, or leave all depth maps out with --option depth=none"
            )
        size = depth_map_size(frame.depth)
        depth_camera = _of_size(camera, size, str(frame.depth), source)
        load_depth = partial(read_depth_map, frame.depth, size=size, unit=frame.depth_unit)
    return View(
        id=frame.id,
        camera=camera,
        camera_from_world=frame.camera_from_world,
        load_image=partial(read_color, frame.image, size=(camera.width, camera.height), where=str(frame.image)),
        depth_camera=depth_camera,
        load_depth=load_depth,
    )


def _of_size(camera: Camera, size: tuple[int, int], where: str, source: Path) -> Camera:
    """The camera of the same picture in another size."""
    if not same_aspect(size, (camera.width, camera.height)):
        raise DataError(
            f"{where}: {size[0]}x{size[1]} pixels, expected {camera.width}x{camera.height} as {source} says, or the "
            "same picture larger or smaller; cropped or turned images need intrinsics of their own"
        )
    return camera if size == (camera.width, camera.height) else camera.resized(width=size[0], height=size[1])


def _is_unicode(text: str) -> bool:
    """Whether text can be a file's name at all: JSON may hold halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
