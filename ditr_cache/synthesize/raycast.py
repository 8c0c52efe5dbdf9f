"""Exact ray casting of rectangles through pixel centres.

Along the ray (x, y, 1) of a pixel, the inverse depth 1/z at which it meets a plane is an affine function of x and y,
and so are s/z and t/z of the point within a rectangle. So each rectangle is three affine maps over its window of the
image, compared with the largest inverse depth so far: no iteration over rays and no approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditr_cache.sample import Camera
from ditr_cache.synthesize.boxes import Faces

NEAR = 0.02
"""Metres before the camera within which nothing is seen."""


@dataclass(frozen=True, eq=False)
class Hits:
    """What the ray of every pixel meets first.

    Args:
        face: [H, W] int32 index of the face, -1 where the ray meets nothing.
        depth: [H, W] float32 metres along the camera's z axis, 0 where nothing.
        s, t: [H, W] float32 place on the face in metres.
    """

    face: NDArray[np.int32]
    depth: NDArray[np.float32]
    s: NDArray[np.float32]
    t: NDArray[np.float32]


def cast(
    faces: Faces, camera: Camera, world_from_camera: NDArray[np.float64], *, dtype: type[np.floating] = np.float64
) -> Hits:
    """First hits of the rays through all pixel centres.

    Args:
        faces: K rectangles; they are seen from outside only.
        camera: intrinsics and image size.
        world_from_camera: [4, 4] pose.
        dtype: of the arithmetic; float32 is twice as fast and good to about 0.1 mm.
    """
    rotation, eye = world_from_camera[:3, :3], world_from_camera[:3, 3]
    x = (np.arange(camera.width) + 0.5 - camera.cx) / camera.fx
    y = (np.arange(camera.height) + 0.5 - camera.cy) / camera.fy
    to_eye = eye - faces.origin
    height = np.einsum("kd,kd->k", faces.normal, to_eye)  # of the eye above each face's plane
    front = height > 1e-9
    safe = np.where(front, height, 1.0)[:, None]
    # [K, 3] coefficients of x, y, 1: inverse depth, and s/z and t/z.
    inverse = -(faces.normal @ rotation) / safe
    s_map = np.einsum("kd,kd->k", faces.s_axis, to_eye)[:, None] * inverse + faces.s_axis @ rotation
    t_map = np.einsum("kd,kd->k", faces.t_axis, to_eye)[:, None] * inverse + faces.t_axis @ rotation
    windows = _windows(faces, camera, rotation, eye)

    x, y = x.astype(dtype), y.astype(dtype)
    maps = tuple(m.astype(dtype) for m in (inverse, s_map, t_map))
    extent = faces.extent.astype(dtype)
    best, place_s, place_t = (np.zeros((camera.height, camera.width), dtype) for _ in range(3))
    face = np.full(best.shape, -1, dtype=np.int32)
    for k in np.flatnonzero(front):
        window = windows[k]
        rows, cols = window
        if rows.start >= rows.stop or cols.start >= cols.stop:
            continue
        q, s, t = (_affine(m[k], x[cols], y[rows]) for m in maps)
        seen = (q > best[window]) & (q < 1 / NEAR)
        seen &= (s >= 0) & (s <= extent[k, 0] * q) & (t >= 0) & (t <= extent[k, 1] * q)
        for buffer, values in ((best, q), (place_s, s), (place_t, t)):
            np.copyto(buffer[window], values, where=seen)
        np.copyto(face[window], np.int32(k), where=seen)

    depth = np.divide(1, best, out=np.zeros_like(best), where=face >= 0)
    return Hits(face, *(v.astype(np.float32, copy=False) for v in (depth, place_s * depth, place_t * depth)))


class TextureAtlas:
    """All textures with their halved copies in one flat array, so that one gather reads a whole image.

    Args:
        images: [rows, cols, 3] uint8 textures.
        texel: edge of a texel of the full size in metres.
    """

    levels = 4

    def __init__(self, images: Sequence[NDArray[np.uint8]], texel: float) -> None:
        self.texel = texel
        flat: list[NDArray[np.uint8]] = []
        start = 0
        starts, sizes = [], []
        for image in images:
            level = image.astype(np.float32)
            for _ in range(self.levels):
                rows, cols = level.shape[:2]
                starts.append(start)
                sizes.append((rows, cols))
                padded = np.zeros((rows * cols, 4), dtype=np.uint8)
                padded[:, :3] = np.rint(level).reshape(-1, 3)
                flat.append(padded)
                start += rows * cols
                level = halved(level[: rows // 2 * 2, : cols // 2 * 2])
        self._flat = np.concatenate(flat).view(np.uint32).ravel()  # four bytes a texel, so that a gather is one load
        self._start = np.array(starts, dtype=np.int32)
        self._rows, self._cols = np.array(sizes, dtype=np.int32).T

    def sample(
        self, texture: NDArray[np.int64], s: NDArray[np.float32], t: NDArray[np.float32], width: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        """[..., 3] RGB at places.

        Args:
            texture: [...] indices of textures.
            s, t: [...] places in metres, not negative; textures repeat.
            width: [...] metres that one sample covers; picks the level whose texels are about as large.
        """
        level = np.zeros(width.shape, dtype=np.int32)
        for j in range(self.levels - 1):
            level += width > np.float32(self.texel * 2 ** (j + 0.5))
        scale = np.array([1 / (self.texel * 2**j) for j in range(self.levels)], dtype=np.float32)[level]
        key = texture.astype(np.int32) * np.int32(self.levels) + level
        cols = self._cols[key]
        row, col = (t * scale).astype(np.int32) % self._rows[key], (s * scale).astype(np.int32) % cols
        texel = self._flat[self._start[key] + row * cols + col]
        return texel[..., None].view(np.uint8)[..., :3]


def halved(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """[H / 2, W / 2, C] means over 2 x 2 pixels of an image of even size."""
    return (image[0::2, 0::2] + image[1::2, 0::2] + image[0::2, 1::2] + image[1::2, 1::2]) * np.float32(0.25)


def _affine(
    coefficients: NDArray[np.floating], x: NDArray[np.floating], y: NDArray[np.floating]
) -> NDArray[np.floating]:
    return (coefficients[0] * x + coefficients[2])[None, :] + (coefficients[1] * y)[:, None]


def _windows(
    faces: Faces, camera: Camera, rotation: NDArray[np.float64], eye: NDArray[np.float64]
) -> list[tuple[slice, slice]]:
    """Rows and columns outside which a face cannot be seen: the whole image if it reaches behind the camera."""
    corners = faces.origin[:, None, :] + np.stack(
        [
            a * faces.s_axis * faces.extent[:, :1] + b * faces.t_axis * faces.extent[:, 1:]
            for a in (0, 1)
            for b in (0, 1)
        ],
        axis=1,
    )
    local = (corners - eye) @ rotation  # [K, 4, 3]
    z = local[..., 2]
    ahead = z.min(axis=1) > NEAR
    safe = np.maximum(z, NEAR)
    u = camera.fx * local[..., 0] / safe + camera.cx
    v = camera.fy * local[..., 1] / safe + camera.cy
    result = []
    for k in range(len(faces)):
        if ahead[k]:
            left, right = max(0, int(u[k].min()) - 1), min(camera.width, int(u[k].max()) + 2)
            top, bottom = max(0, int(v[k].min()) - 1), min(camera.height, int(v[k].max()) + 2)
        elif z[k].max() <= NEAR:
            left = right = top = bottom = 0
        else:
            left, right, top, bottom = 0, camera.width, 0, camera.height
        result.append((slice(top, max(top, bottom)), slice(left, max(left, right))))
    return result
