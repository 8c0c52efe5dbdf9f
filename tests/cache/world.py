"""A closed analytic room for any camera and any lidar, and the judge of what an extraction made of it.

Every pixel shows its place in the room as RGB, and the network of `analytic_scene` turns the mean colour of a patch
into a token that decodes to that place. The writers in `layouts/` photograph this room in each dataset's official
layout; `judge` then says how many patches a cached feature is away from the point that carries it. Nothing here uses
the package's geometry: cameras project by formulas of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from analytic_scene import HIGH, LOW, place
from ditr_cache.cached import CachedSample

Array = NDArray[np.float64]

HALF_PATCH = 0.5
TOLERANCE = 0.15
"""In patches, beyond half of one: 8-bit colours, JPEG, 16-bit features, the mean over a slanted patch."""

NAMES = ("floor", "ceiling", "left", "right", "near", "far", "board", "panel")
"""Surfaces by index. `board` hides a part of `far`, `panel` a part of `right`."""

_SURFACES: tuple[tuple[int, float, tuple[float, float, float], tuple[float, float, float]], ...] = (
    (2, 0.0, (-2.5, 0, 0), (2.5, 4.5, 3)),  # axis of the normal, its value, bounds along x, y, z
    (2, 3.0, (-2.5, 0, 0), (2.5, 4.5, 3)),
    (0, -2.5, (-2.5, 0, 0), (2.5, 4.5, 3)),
    (0, 2.5, (-2.5, 0, 0), (2.5, 4.5, 3)),
    (1, 0.0, (-2.5, 0, 0), (2.5, 4.5, 3)),
    (1, 4.5, (-2.5, 0, 0), (2.5, 4.5, 3)),
    (1, 3.1, (-0.8, 0, 0.6), (0.6, 9, 1.9)),
    (0, 1.7, (0, 1.4, 0.5), (9, 2.9, 1.7)),
)


# --- cameras --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Eye:
    """The camera that truly took an image.

    Args:
        width, height: of the image in pixels; u in [0, width), the centre of pixel 0 is at 0.5.
        camera_from_world: [4, 4], of the room's coordinates; camera x right, y down, z forward.
        to_pixel: points [..., 3] of the camera's frame -> (u, v, whether the lens sees that direction).
        to_ray: (u, v) -> directions [..., 3] in the camera's frame, of any length.
    """

    width: int
    height: int
    camera_from_world: Array
    to_pixel: Callable[[Array], tuple[Array, Array, NDArray[np.bool_]]]
    to_ray: Callable[[Array, Array], Array]

    @property
    def origin(self) -> Array:
        """[3] where the camera stands in the room."""
        return np.linalg.inv(self.camera_from_world)[:3, 3]

    def project(self, world: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        """(u, v, seen by the lens and inside the image) of points [N, 3] of the room; nothing is known of occlusion."""
        in_camera = world @ self.camera_from_world[:3, :3].T + self.camera_from_world[:3, 3]
        u, v, seen = self.to_pixel(in_camera)
        return u, v, seen & (u >= 0) & (u < self.width) & (v >= 0) & (v < self.height)

    def rays(self) -> tuple[Array, Array]:
        """Origin [3] and directions [H, W, 3] in the room of every pixel's centre; unit along z where z counts."""
        u, v = np.meshgrid(np.arange(self.width) + 0.5, np.arange(self.height) + 0.5)
        return self.origin, self.to_ray(u, v) @ self.camera_from_world[:3, :3]


def pose(position: tuple[float, float, float], yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Array:
    """`camera_from_world` of a camera at `position` that looks along world y for yaw = pitch = 0.

    Angles in radians; a positive yaw looks to the left (towards -x), a positive pitch looks down; world z is up.
    """
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
    level = np.array([[cy, sy, 0], [0, 0, -1], [-sy, cy, 0]])  # rows: camera x, y, z in the world
    tilt = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    turn = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ tilt @ level
    matrix[:3, 3] = -matrix[:3, :3] @ np.array(position)
    return matrix


def pinhole(width: int, height: int, fx: float, fy: float, cx: float, cy: float, camera_from_world: Array) -> Eye:
    """A camera without distortion."""
    return distorted(width, height, fx, fy, cx, cy, (), camera_from_world)


def distorted(
    width: int, height: int, fx: float, fy: float, cx: float, cy: float, k: tuple[float, ...], camera_from_world: Array
) -> Eye:
    """OpenCV's radial-tangential model, `k` = k1, k2, p1, p2[, k3[, k4, k5, k6]]."""
    k1, k2, p1, p2, k3, k4, k5, k6 = (*k, *(0.0,) * (8 - len(k)))

    def bend(x: Array, y: Array) -> tuple[Array, Array]:
        r2 = x * x + y * y
        radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
        return (
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        )

    # The field of the lens: rays farther out than the image's corners never belong to it (the polynomial folds back).
    corners = np.array([(u - cx, v - cy) for u in (0, width) for v in (0, height)]) / (fx, fy)
    limit = (
        1.25 * float(np.linalg.norm(_unbend(bend, corners[:, 0], corners[:, 1]), axis=0).max()) if any(k) else np.inf
    )

    def to_pixel(p: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        z = np.where(p[..., 2] > 1e-6, p[..., 2], 1.0)
        x, y = p[..., 0] / z, p[..., 1] / z
        seen = (p[..., 2] > 1e-6) & (np.hypot(x, y) <= limit)
        x, y = bend(np.where(seen, x, 0), np.where(seen, y, 0))
        return fx * x + cx, fy * y + cy, seen

    def to_ray(u: Array, v: Array) -> Array:
        x, y = (u - cx) / fx, (v - cy) / fy
        if any(k):
            x, y = _unbend(bend, x, y)
        return np.stack([x, y, np.ones_like(x)], axis=-1)

    return Eye(width=width, height=height, camera_from_world=camera_from_world, to_pixel=to_pixel, to_ray=to_ray)


def _unbend(bend: Callable[[Array, Array], tuple[Array, Array]], xd: Array, yd: Array) -> tuple[Array, Array]:
    """Where `bend` arrives at (xd, yd): Newton's method with numerical derivatives."""
    x, y, h = xd.copy(), yd.copy(), 1e-6
    for _ in range(30):
        fx, fy = bend(x, y)
        (ax, ay), (bx, by) = bend(x + h, y), bend(x, y + h)
        a, b, c, d = (ax - fx) / h, (bx - fx) / h, (ay - fy) / h, (by - fy) / h
        ex, ey, det = xd - fx, yd - fy, a * d - b * c
        x, y = x + (d * ex - b * ey) / det, y + (a * ey - c * ex) / det
    return x, y


def fisheye(
    width: int, height: int, fx: float, fy: float, cx: float, cy: float, k: tuple[float, ...], camera_from_world: Array
) -> Eye:
    """OpenCV's fisheye model (Kannala-Brandt): theta_d = theta (1 + k1 theta^2 + k2 theta^4 + k3 theta^6 + k4 ...)."""
    k1, k2, k3, k4 = k

    def stretch(theta: Array) -> Array:
        t2 = theta * theta
        return theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4))))

    table = np.linspace(0, np.pi * 0.95, 20_000)
    rising = np.append(True, np.diff(stretch(table)) > 0)
    table = table[: int(np.argmin(rising)) or len(table)]

    def to_pixel(p: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        across = np.hypot(p[..., 0], p[..., 1])
        theta = np.arctan2(across, p[..., 2])
        factor = np.divide(stretch(theta), across, out=np.ones_like(theta), where=across > 1e-12)
        return fx * p[..., 0] * factor + cx, fy * p[..., 1] * factor + cy, theta <= table[-1]

    def to_ray(u: Array, v: Array) -> Array:
        x, y = (u - cx) / fx, (v - cy) / fy
        bent = np.hypot(x, y)
        theta = np.interp(bent, stretch(table), table)
        factor = np.divide(np.sin(theta), bent, out=np.ones_like(bent), where=bent > 1e-12)
        return np.stack([x * factor, y * factor, np.cos(theta)], axis=-1)

    return Eye(width=width, height=height, camera_from_world=camera_from_world, to_pixel=to_pixel, to_ray=to_ray)


def panorama(width: int, height: int, camera_from_world: Array) -> Eye:
    """Equirectangular: the middle column looks along z, to the right of it along x; the top row looks up (-y)."""

    def to_pixel(p: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        length = np.linalg.norm(p, axis=-1)
        longitude = np.arctan2(p[..., 0], p[..., 2])
        latitude = np.arcsin(np.clip(-p[..., 1] / np.maximum(length, 1e-12), -1, 1))
        u = (longitude / (2 * np.pi) + 0.5) * width
        return np.where(u >= width, u - width, u), (0.5 - latitude / np.pi) * height, length > 1e-9

    def to_ray(u: Array, v: Array) -> Array:
        longitude, latitude = (u / width - 0.5) * 2 * np.pi, (0.5 - v / height) * np.pi
        return np.stack(
            [np.cos(latitude) * np.sin(longitude), -np.sin(latitude), np.cos(latitude) * np.cos(longitude)], axis=-1
        )

    return Eye(width=width, height=height, camera_from_world=camera_from_world, to_pixel=to_pixel, to_ray=to_ray)


# --- the room -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The room, `scale` times 5 x 4.5 x 3 metres large: a street scene wants distances that a car covers."""

    scale: float = 1.0

    def cast(self, origin: Array, rays: Array) -> tuple[NDArray[np.int64], Array]:
        """Surface index [...] (-1: none) and distance [...], in lengths of the ray, of the first hit of rays [..., 3].

        Args:
            origin: [3], or as many as rays.
            rays: of any length.
        """
        origin = origin / self.scale
        distance, surface = np.full(rays.shape[:-1], np.inf), np.full(rays.shape[:-1], -1)
        for i, (axis, value, low, high) in enumerate(_SURFACES):
            with np.errstate(divide="ignore", invalid="ignore"):
                t = (value - origin[..., axis]) / rays[..., axis]
            usable = np.isfinite(t) & (t > 1e-9) & (t < distance)
            hit = origin + rays * np.where(usable, t, 0)[..., None]
            for a in (a for a in range(3) if a != axis):
                usable &= (hit[..., a] >= low[a] - 1e-9) & (hit[..., a] <= high[a] + 1e-9)
            distance[usable], surface[usable] = t[usable], i
        return surface, distance * self.scale

    def image(self, eye: Eye) -> NDArray[np.uint8]:
        """Picture [H, W, 3] uint8 RGB: the place of every pixel, black where there is none."""
        origin, rays = eye.rays()
        surface, distance = self.cast(origin, rays)
        world = origin + rays * np.where(surface >= 0, distance, 0)[..., None]
        color = np.rint(self.color(world))
        return np.where(surface[..., None] >= 0, color, 0).astype(np.uint8)

    def color(self, world: Array) -> Array:
        """RGB [..., 3] in 0..255 of places in the room."""
        return (255 * (world / self.scale - LOW) / (HIGH - LOW)).clip(0, 255)

    def depth(self, eye: Eye, *, along_ray: bool = False) -> Array:
        """Depth map [H, W] in metres: along the camera's z, or along the ray; 0 where nothing is hit."""
        origin, rays = eye.rays()
        surface, distance = self.cast(origin, rays)
        hit = rays * np.where(surface >= 0, distance, 0)[..., None]
        if along_ray:
            return np.linalg.norm(hit, axis=-1)
        return (hit @ eye.camera_from_world[:3, :3].T)[..., 2]

    def surfaces(self, eye: Eye) -> NDArray[np.int64]:
        """Surface index [H, W] of every pixel, -1 for none."""
        return self.cast(*eye.rays())[0]

    def points(self, count: int = 8_000, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
        """Random points [N, 3] on the surfaces, and the surface [N] of each: more on the small ones."""
        rng = np.random.default_rng(seed)
        surface = rng.choice(len(_SURFACES), count, p=[0.15, 0.1, 0.12, 0.12, 0.12, 0.15, 0.12, 0.12])
        world = np.empty((count, 3))
        for i, (axis, value, low, high) in enumerate(_SURFACES):
            of = surface == i
            world[of] = rng.uniform(np.maximum(low, LOW), np.minimum(high, HIGH), (int(of.sum()), 3))
            world[of, axis] = value
        return world * self.scale, surface

    def quads(self) -> Iterator[tuple[str, Array]]:
        """(name, corners [4, 3]) of every surface, for layouts that hold meshes."""
        for name, (axis, value, low, high) in zip(NAMES, _SURFACES, strict=True):
            a, b = (x for x in range(3) if x != axis)
            bounds = np.stack([np.maximum(low, LOW), np.minimum(high, HIGH)])
            corners = np.empty((4, 3))
            corners[:, axis] = value
            corners[:, a], corners[:, b] = bounds[[0, 1, 1, 0], a], bounds[[0, 0, 1, 1], b]
            yield name, corners * self.scale

    def surface_of(self, world: Array) -> NDArray[np.int64]:
        """Surface [N] that each of the points [N, 3] lies on, -1 for none; the last where two meet."""
        found, p = np.full(len(world), -1), world / self.scale
        for i, (axis, value, low, high) in enumerate(_SURFACES):
            on = np.abs(p[:, axis] - value) < 1e-3
            found[on & ((p >= np.array(low) - 1e-3) & (p <= np.array(high) + 1e-3)).all(axis=1)] = i
        return found


# --- the truth, and the judge ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """What a writer knows of a sample that it wrote. Rows are in the order of the dataset's own point file.

    Args:
        sample_id: as users know it (the scene's or scan's official name).
        split: official split that holds it.
        world: [N, 3] places in the room.
        coord: [N, 3] metres, in the frame that the dataset's point file is in.
        label: [N] official class names of the benchmark, "" where the benchmark ignores the point; None: no labels.
        eyes: the true cameras, by any name.
        channels: further arrays by name (`color`, `normal`, `strength`, `instance`), [N, ...] as written.
    """

    sample_id: str
    split: str
    world: Array
    coord: Array
    label: NDArray[np.str_] | None
    eyes: Mapping[str, Eye]
    channels: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What is wrong with a cached sample.

    Args:
        errors: [M] in patches, of the visible points whose patch shows one surface only, to every camera that may see
            them.
        missing: points that some camera clearly sees, without a feature.
        ghosts: points that clearly no camera sees, with a feature.
        hidden: number of points that clearly no camera sees.
        wrong_labels: points whose label is not the true one.
        moved: largest distance in metres between a stored coordinate and the true one.
    """

    errors: Array
    missing: int
    ghosts: int
    hidden: int
    wrong_labels: int
    moved: float

    def right(self, *, occlusion: bool = True, at_least: int = 300) -> bool:
        """Whether every feature lies within half a patch of its point, and all else is as it should be.

        Args:
            occlusion: whether hidden points have to be without a feature.
            at_least: number of points that must have been judged.
        """
        return bool(
            len(self.errors) >= at_least
            and self.errors.max() <= HALF_PATCH + TOLERANCE
            and not self.missing
            and not (occlusion and self.ghosts)
            and not self.wrong_labels
            and self.moved < 2e-3
        )


def judge(
    sample: CachedSample, truth: Truth, world: World, grid: tuple[int, int], class_names: tuple[str, ...]
) -> Report:
    """Compare a cached sample, extracted by the position network with --fuse last or nearest, with the truth.

    Args:
        sample: as read from the cache.
        truth: of the same sample.
        world: the room it shows.
        grid: (rows, columns) of tokens of every image.
        class_names: of the cache.
    """
    order = sample.source_index.astype(np.int64)
    assert sorted(order) == list(range(len(truth.world))), "source_index has to be a permutation of the file's points"
    places = truth.world[order]
    surface = world.surface_of(places)
    looks = [_look(eye, world, places, surface, grid) for eye in truth.eyes.values()]
    clear, unseen = (np.array([look[i] for look in looks], dtype=bool).reshape(-1, len(places)) for i in (0, 1))
    hidden = unseen.all(axis=0)
    valid = sample.valid if sample.valid is not None else np.zeros(len(places), dtype=bool)
    error = np.full((len(looks), len(places)), np.inf)
    if valid.any():
        decoded = place(sample.feature[valid]) * world.scale
        for i, eye in enumerate(truth.eyes.values()):
            error[i, valid] = _patches(eye, grid, places[valid], decoded, surface[valid], world)
    seen = clear.any(axis=0)
    # Another eye's patch may mix surfaces, and the feature may be that eye's.
    judged = seen & valid & (clear | unseen).all(axis=0)
    wrong = 0
    if truth.label is not None:
        names = np.array([*class_names, ""])
        wrong = int((names[sample.segment] != truth.label[order]).sum())
    return Report(
        errors=np.where(clear, error, np.inf).min(axis=0, initial=np.inf)[judged],
        missing=int((seen & ~valid).sum()),
        ghosts=int((hidden & valid).sum()),
        hidden=int(hidden.sum()),
        wrong_labels=wrong,
        moved=float(np.abs(sample.coord - truth.coord[order]).max()),
    )


def _look(
    eye: Eye, world: World, places: Array, surface: NDArray[np.int64], grid: tuple[int, int]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[N] bool: clearly seen, in a patch that shows the point's surface only; and [N] bool: clearly not seen."""
    in_camera = places @ eye.camera_from_world[:3, :3].T + eye.camera_from_world[:3, 3]
    u, v, seen = eye.to_pixel(in_camera)
    inside = seen & (u >= 1) & (u < eye.width - 1) & (v >= 1) & (v < eye.height - 1)  # a depth map may end earlier
    margin = 0.02 * eye.width
    far_out = (u < -margin) | (u > eye.width + margin) | (v < -margin) | (v > eye.height + margin) | ~seen
    _, distance = world.cast(eye.origin, places - eye.origin)
    length = np.linalg.norm(places - eye.origin, axis=1)
    shown = world.surfaces(eye)
    low, high = np.full(grid, len(NAMES)), np.full(grid, -1)
    rows = (np.arange(eye.height) + 0.5) * grid[0] / eye.height
    columns = (np.arange(eye.width) + 0.5) * grid[1] / eye.width
    patches = (rows.astype(int)[:, None], columns.astype(int)[None, :])
    np.minimum.at(low, patches, shown)
    np.maximum.at(high, patches, shown)
    # Resizing blends a pixel or two beyond the patch: its neighbours must show the same surface, too.
    windows = [(slice(1 + a, 1 + a + grid[0]), slice(1 + b, 1 + b + grid[1])) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    low, high = np.pad(low, 1, mode="edge"), np.pad(high, 1, mode="edge")
    low, high = np.min([low[w] for w in windows], axis=0), np.max([high[w] for w in windows], axis=0)
    row = np.clip(np.floor(v * grid[0] / eye.height), 0, grid[0] - 1).astype(int)
    column = np.clip(np.floor(u * grid[1] / eye.width), 0, grid[1] - 1).astype(int)
    single, front = low[row, column] == high[row, column], low[row, column]
    clear = inside & (distance > 1 - 1e-4) & single & (front == surface)
    behind = (1 - distance) * length > 0.5 * world.scale
    return clear, far_out | (behind & single & (front != surface) & (front >= 0))


def _patches(
    eye: Eye, grid: tuple[int, int], places: Array, decoded: Array, surface: NDArray[np.int64], world: World
) -> Array:
    """[N] distance in patches between points and decoded places: across the image, and off the points' surface."""
    (u, v, seen), (du, dv, decoded_seen) = eye.project(places), eye.project(decoded)
    across = np.abs(u - du)
    across = np.minimum(across, np.abs(eye.width - across))  # a panorama closes; no other error is ever that large
    error = np.maximum(across * grid[1] / eye.width, np.abs(v - dv) * grid[0] / eye.height)
    axes = np.array([s[0] for s in _SURFACES])[surface]
    off = np.abs(np.take_along_axis(places - decoded, axes[:, None], axis=1)[:, 0])
    error = np.maximum(error, off / (0.1 * world.scale))  # no feature mixes surfaces here: a decimetre is far off
    # The eye's own image of the decoded place may lie a pixel beyond the border: only `seen` decides.
    return np.where(seen & (decoded_seen | (error < 1)), error, np.inf)
