"""The analytic test bed: planes whose colour encodes their position, and a ViT whose tokens can be decoded to it.

Every pixel shows (world position - LOW) / (HIGH - LOW) as RGB. The checkpoint makes a real timm ViT put the mean colour
of each patch, normalised by the model's mean and std, into its token, behind the final norm. So a feature decodes to
a place in the world, and `check` says how many patches that place is away from the point that carries the feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch

from ditr_cache import partition
from ditr_cache.cached import CachedSample, StoredFeatures
from ditr_cache.datasets.base import Partition
from ditr_cache.partition import ExtractSettings, PartitionWorker
from ditr_cache.progress import PartitionSummary
from ditr_cache.sample import Camera, Points, Sample, View
from ditr_cache.schema import CacheMetadata, LinkSettings
from ditr_cache.store import CacheWriter, open_cache
from ditr_cache.vfm import FrozenVFM, VFMRequest
from plain_rows import decode

LOW, HIGH = np.array([-2.5, 0.0, 0.0]), np.array([2.5, 4.5, 3.0])
COLOR = Camera(width=320, height=240, fx=250.0, fy=255.0, cx=155.0, cy=122.0)
DEPTH = Camera(width=80, height=60, fx=62.0, fy=63.5, cx=39.5, cy=30.5)
PATCH, IMAGE_SIZE = 16, (192, 256)
GRID = (12, 16)

SURFACES = (  # (axis of the normal, its value, bounds along x, y, z)
    (1, 4.0, LOW, HIGH),  # wall
    (2, 0.0, LOW, np.array([2.5, 4.0, 3.0])),  # floor
    (1, 2.2, np.array([-0.7, 0, 0.5]), np.array([0.7, 9, 1.9])),  # board
    (1, 2.8, np.array([-0.5, 0, 0.7]), np.array([1.1, 9, 1.7])),  # panel, partly hidden by the board 0.6 m before it
)
HALF_PATCH = 0.5
QUANTISATION = 0.08
"""In patches: 8-bit colours, 16-bit features, and the mean over a slanted patch."""

_NORM_BIAS = 0.1 * (torch.arange(64) % 7)
_ANCHOR = 6


def camera_from_world(position: tuple[float, float, float], yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Pose of a camera that looks along world y for yaw = pitch = 0; world z is up, angles in radians."""
    axes = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], float)  # camera x, y, z in the world
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
    turn = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    pose = np.eye(4)
    pose[:3, :3] = turn @ axes @ np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    pose[:3, 3] = -pose[:3, :3] @ np.array(position)
    return pose


POSES = (
    camera_from_world((-0.6, 0.2, 1.4), yaw=0.15, pitch=0.25, roll=0.05),
    camera_from_world((0.7, 0.1, 1.2), yaw=-0.2, pitch=0.1, roll=-0.08),
    camera_from_world((0.0, 0.5, 1.6), yaw=0.0, pitch=0.45, roll=0.0),
)


def cast(camera: Camera, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Surface index (-1: none), z-depth and world position of every pixel's centre. Not to be changed in place."""
    return _cast(camera, pose.tobytes())


@cache
def _cast(camera: Camera, pose_bytes: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pose = np.frombuffer(pose_bytes).reshape(4, 4)
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones_like(u)], axis=-1)
    origin, rays = -pose[:3, :3].T @ pose[:3, 3], rays @ pose[:3, :3]
    depth, surface = np.full(u.shape, np.inf), np.full(u.shape, -1)
    for i, (axis, value, low, high) in enumerate(SURFACES):
        t = (value - origin[axis]) / rays[..., axis]
        hit = origin + rays * t[..., None]
        others = [a for a in range(3) if a != axis]
        inside = ((hit >= low) & (hit <= high))[..., others].all(axis=-1) & (t > 0) & (t < depth)
        depth[inside], surface[inside] = t[inside], i
    return surface, depth, origin + rays * np.where(np.isfinite(depth), depth, 0)[..., None]


def image(camera: Camera, pose: np.ndarray) -> np.ndarray:
    """Picture [H, W, 3] uint8 that encodes positions."""
    surface, _, world = cast(camera, pose)
    color = np.rint(255 * (world - LOW) / (HIGH - LOW)).clip(0, 255)
    return np.where(surface[..., None] >= 0, color, 0).astype(np.uint8)


def depth_map(camera: Camera, pose: np.ndarray) -> np.ndarray:
    """Depth [H, W] float32 metres, 0 where nothing is hit."""
    surface, depth, _ = cast(camera, pose)
    return np.where(surface >= 0, depth, 0).astype(np.float32)


def make_view(name: str, pose: np.ndarray, *, with_depth: bool = True) -> View:
    """A right view of the scene."""
    return View(
        id=name,
        camera=COLOR,
        camera_from_world=pose,
        load_image=lambda: image(COLOR, pose),
        depth_camera=DEPTH if with_depth else None,
        load_depth=(lambda: depth_map(DEPTH, pose)) if with_depth else None,
    )


def make_points(count: int = 12_000) -> Points:
    """Random points on the surfaces; the label is the surface."""
    rng = np.random.default_rng(0)
    segment = rng.choice(len(SURFACES), count, p=[0.35, 0.35, 0.15, 0.15])
    coord = np.empty((count, 3))
    for i, (axis, value, low, high) in enumerate(SURFACES):
        of = segment == i
        coord[of] = rng.uniform(np.maximum(low, LOW), np.minimum(high, HIGH), (of.sum(), 3))
        coord[of, axis] = value
    return Points(coord=coord.astype(np.float32), segment=segment.astype(np.int16))


def right_views(*, with_depth: bool = True) -> tuple[View, ...]:
    return tuple(make_view(str(i), pose, with_depth=with_depth) for i, pose in enumerate(POSES))


# --- a network that can be decoded ----------------------------------------------------------------------------------


def write_checkpoint(path: Path) -> Path:
    """Weights of timm's `test_vit` whose blocks add nothing: token = LayerNorm(+-mean colour, +-1, zeros)."""
    import timm

    model = timm.create_model("test_vit", pretrained=False, num_classes=0)
    state = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    for channel in range(3):
        state["patch_embed.proj.weight"][channel, channel] = 1 / PATCH**2
        state["patch_embed.proj.weight"][channel + 3, channel] = -1 / PATCH**2
    state["patch_embed.proj.bias"][_ANCHOR], state["patch_embed.proj.bias"][_ANCHOR + 1] = 1, -1
    state["cls_token"][..., :8] = torch.tensor([0.9, -0.7, 0.3, -0.9, 0.7, -0.3, 1, -1])
    state["norm.weight"] += 1
    state["norm.bias"] += _NORM_BIAS
    torch.save(state, path)
    return path


def load_vfm(checkpoint: Path, image_size: tuple[int, int] = IMAGE_SIZE) -> FrozenVFM:
    return FrozenVFM(VFMRequest(name="test_vit", checkpoint=str(checkpoint), image_size=image_size, device="cpu"))


def place(feature: np.ndarray) -> np.ndarray:
    """World position [N, 3] that features [N, C] speak of; test_vit's mean and std are 0.5."""
    token = feature.astype(np.float64) - _NORM_BIAS.numpy()[: feature.shape[1]]
    normalised = token[:, :3] / token[:, _ANCHOR, None]
    return LOW + (normalised * 0.5 + 0.5) * (HIGH - LOW)


def feature_of(color: np.ndarray) -> np.ndarray:
    """Feature [..., 8] whose `place` is that of a mean colour [..., 3] in 0..1: what the network makes of a patch."""
    feature = np.zeros((*color.shape[:-1], 8), np.float32)
    feature[..., :3] = (color - 0.5) / 0.5
    feature[..., _ANCHOR] = 1
    return feature + _NORM_BIAS.numpy()[:8]


# --- the whole path -------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What came out: the sample as read from the cache, and the run's summary."""

    sample: CachedSample
    summary: PartitionSummary
    cache: Path


def run(
    root: Path,
    vfm: FrozenVFM,
    views: tuple[View, ...],
    *,
    links: LinkSettings | None = None,
    layout: str = "fused",
    fuse: str = "last",
    codec: str = "float16",
    points: Callable[[], Points] = make_points,
) -> Result:
    """Read -> link -> embed -> fuse -> encode -> write -> commit -> read back, by the package's own code."""
    sample = Sample(id="scene", split="train", views=views, load_points=points)

    class Scenes:
        name, root = "analytic", Path()

        def read(self, sample_id: str) -> Sample:
            assert sample_id == "scene"
            return sample

    metadata = CacheMetadata(
        dataset="analytic",
        class_names=("wall", "floor", "board", "panel"),
        class_colors=((0, 0, 0),) * 4,
        links=links or LinkSettings(),
    )
    CacheWriter.create(root, metadata)
    settings = ExtractSettings(
        dataset="analytic",
        root="",
        cache=str(root),
        vfm=VFMRequest(name="test_vit"),
        layout=layout,
        fuse=fuse if layout == "fused" else None,
        codec=codec,
    )
    opened = partition.open_dataset
    partition.open_dataset = lambda name, where, options: Scenes()  # the registry holds only datasets of the package
    try:
        summary = PartitionWorker(settings, vfm)(Partition("scene", ("scene",)))
    finally:
        partition.open_dataset = opened
    return Result(sample=open_cache(root).read("scene"), summary=summary, cache=root)


def with_features(sample: CachedSample, stored: StoredFeatures) -> CachedSample:
    """The same sample with the features that a choice of views gives."""
    valid = stored.index >= 0
    feature = np.zeros((len(valid), stored.table.shape[1]), np.float32)
    feature[valid] = decode(stored.table, stored.scale)[stored.index[valid]]
    return replace(sample, feature=feature, valid=valid)


# --- the checker ----------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What is wrong with a result; `errors` in patches, of the points whose patches show one surface only."""

    errors: np.ndarray
    ghosts: int
    missing: int
    wrong_labels: int
    hidden: int
    visible: int

    @property
    def right(self) -> bool:
        """Whether every feature lies within half a patch of its point, on every point that is seen, on no other."""
        return bool(
            len(self.errors) > 300
            and self.errors.max() <= HALF_PATCH + QUANTISATION
            and not self.ghosts
            and not self.missing
            and not self.wrong_labels
        )


def check(sample: CachedSample, *, fuse: str = "last", margin: int = 6) -> Report:
    """Compare a sample as read with what the scene says; `margin` is the width in pixels of edges left out."""
    coord = sample.coord.astype(np.float64)
    surface = np.full(len(coord), -1, dtype=np.int64)
    for i, (axis, value, low, high) in enumerate(SURFACES):
        inside = ((coord >= np.maximum(low, LOW) - 1e-6) & (coord <= np.minimum(high, HIGH) + 1e-6)).all(axis=1)
        surface[np.isclose(coord[:, axis], value) & inside] = i
    looks = [_look(coord.tobytes(), surface.tobytes(), i, margin) for i in range(len(POSES))]
    visible, hidden, pure = (np.stack([getattr(x, k) for x in looks]) for k in ("visible", "hidden", "pure"))
    clear = (visible | hidden).all(axis=0)
    somewhere, nowhere = clear & visible.any(axis=0), hidden.all(axis=0)
    decoded = place(sample.feature[sample.valid]) if sample.feature is not None else np.zeros((0, 3))
    error = np.full((len(looks), len(coord)), np.inf)
    for i, look in enumerate(looks):
        error[i, sample.valid] = look.error(coord[sample.valid], surface[sample.valid], decoded)
    last = len(looks) - 1 - visible[::-1].argmax(axis=0)
    if fuse == "last":
        judged, error = pure[last, np.arange(len(coord))], error[last, np.arange(len(coord))]
    else:  # the mean of places, each within half a patch of its view: measured where patches are widest
        judged, error = (pure | ~visible).all(axis=0), np.where(visible, error, np.inf).min(axis=0)
    return Report(
        errors=error[somewhere & sample.valid & judged],
        ghosts=int((nowhere & sample.valid).sum()),
        missing=int((somewhere & ~sample.valid).sum()),
        wrong_labels=int((sample.segment != surface).sum()),
        hidden=int(nowhere.sum()),
        visible=int(somewhere.sum()),
    )


@dataclass
class _Look:
    visible: np.ndarray  # [N] bool: certainly seen
    hidden: np.ndarray  # [N] bool: certainly not seen
    pure: np.ndarray  # [N] bool: the patch that the point falls on shows one surface
    pose: np.ndarray

    def error(self, coord: np.ndarray, surface: np.ndarray, decoded: np.ndarray) -> np.ndarray:
        """Distance in patches between points and decoded places: across the image, and off the surface."""
        (u, v, z), (du, dv, _) = _project(coord, self.pose), _project(decoded, self.pose)
        patch_u, patch_v = COLOR.width / GRID[1], COLOR.height / GRID[0]
        axis = np.array([s[0] for s in SURFACES])[surface]
        off = np.abs(np.take_along_axis(coord - decoded, axis[:, None], axis=1)[:, 0]) / (patch_u * z / COLOR.fx)
        return np.max([np.abs(u - du) / patch_u, np.abs(v - dv) / patch_v, off], axis=0)


def _project(coord: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, z = (coord @ pose[:3, :3].T + pose[:3, 3]).T
    z = np.where(np.abs(z) < 1e-9, 1e-9, z)
    return COLOR.fx * x / z + COLOR.cx, COLOR.fy * y / z + COLOR.cy, z


@lru_cache(maxsize=12)
def _look(coord_bytes: bytes, surface_bytes: bytes, view: int, margin: int) -> _Look:
    """How view number `view` sees the points; the same points are judged many times."""
    coord, surface = np.frombuffer(coord_bytes).reshape(-1, 3), np.frombuffer(surface_bytes, dtype=np.int64)
    pose = POSES[view]
    shown, _, _ = cast(COLOR, pose)
    u, v, z = _project(coord, pose)
    # Points near the image's edge are not judged: the depth camera's field of view ends a little elsewhere.
    inside = (u >= margin) & (u < COLOR.width - margin) & (v >= margin) & (v < COLOR.height - margin) & (z > 0)
    near = (u > -margin) & (u < COLOR.width + margin) & (v > -margin) & (v < COLOR.height + margin) & (z > 0)
    same, other = inside.copy(), near.copy()
    steps = np.unique(np.linspace(-margin, margin, 9).round())
    for dv in steps:
        for du in steps:
            at = shown[
                np.clip(np.floor(v + dv), 0, COLOR.height - 1).astype(int),
                np.clip(np.floor(u + du), 0, COLOR.width - 1).astype(int),
            ]
            same &= at == surface
            other &= (at != surface) & (at >= 0)
    patch_h, patch_w = COLOR.height // GRID[0], COLOR.width // GRID[1]
    patches = shown.reshape(GRID[0], patch_h, GRID[1], patch_w).swapaxes(1, 2).reshape(*GRID, -1)
    # Resizing blends a pixel or two beyond the patch: its neighbours must show the same surface, too.
    low, high = patches.min(axis=-1), patches.max(axis=-1)
    single = np.pad(low, 1, mode="edge"), np.pad(high, 1, mode="edge")
    windows = [(slice(1 + a, 1 + a + GRID[0]), slice(1 + b, 1 + b + GRID[1])) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    pure = np.min([single[0][w] for w in windows], axis=0) == np.max([single[1][w] for w in windows], axis=0)
    row = np.clip(np.floor(v / patch_h), 0, GRID[0] - 1).astype(int)
    column = np.clip(np.floor(u / patch_w), 0, GRID[1] - 1).astype(int)
    return _Look(visible=same, hidden=other | ~near, pure=pure[row, column], pose=pose)


def with_image(view: View, camera: Camera, load: Callable[[], np.ndarray]) -> View:
    """The same view with another image and the camera that is claimed for it."""
    return replace(view, camera=camera, load_image=load)
