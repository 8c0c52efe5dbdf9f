"""Writes a small Waymo Open Dataset, Perception v2.0.x: Parquet, one file per component and run segment.

Facts and their sources (WOD: github.com/waymo-research/waymo-open-dataset at 99a4cb3, below `src/waymo_open_dataset`):

* `<split>/<component>/<context_name>.parquet`; component names: TAG_BY_COMPONENT in WOD `v2/__init__.py`.
* Columns and their types: the dataclasses in WOD `v2/perception/*.py`, flattened as `v2/component.py` does; camera
  projections are float lists there, although whole numbers.
* Range images [H, W, 4] = range, intensity, elongation, in-no-label-zone (1 inside, -1 outside: OpenPCDet keeps -1); a
  pixel is a point where range > 0 (`v2/perception/utils/lidar_utils.py`); others hold -1 (tutorial.ipynb), or 0.
* Column c looks to azimuth ((W - c - 0.5) / W * 2 - 1) * pi - atan2(m10, m00), m the sensor's extrinsic. Inclinations
  ascend, row 0 is the highest (`utils/range_image_utils.py`: compute_range_image_polar, compute_inclination). Only TOP
  has `beam_inclination.values`; null elsewhere: uniform, (i + 0.5) / H between min and max.
* `lidar_pose`, TOP only: [H, W, 6] float32 roll, pitch, yaw, x, y, z; R = Rz(yaw) Ry(pitch) Rx(roll); world from
  vehicle at the pixel's own time, for both returns: points go to the world by it, and back by the frame's
  `vehicle_pose`. The other lidars' images are virtual, already in the vehicle's frame (`dataset.proto`, RangeImage).
  The poses of pixels without a return may be zeros (gdlg/simple-waymo-open-dataset-reader PR 6).
* `frame_timestamp_micros` is the first TOP scan's; the frame's pose is roughly that of its middle (`dataset.proto`).
* Transforms are row-major double [16] (`v2/perception/camera_image_test.py`; happyhj, from real files). Camera frame x
  forward, y left, z up: OpenCV's distortion of (-y / x, -z / x); u = 0 is the left edge of pixel 0
  (`wdl_limited/camera/camera_model.cc`). `camera_image.pose` is world from vehicle at `pose_timestamp` (seconds).
* Projections: the first two cameras in the order of their numbers, 0 for none (`v2/perception/lidar.py`); made by the
  camera model's world_to_image (WOD issue 85), which knows nothing of occlusion; rounded down (WOD issue 146).
* A lidar without any return in a frame has no row, in `lidar` and `lidar_camera_projection` alike; one return may be
  null (`v2/perception/compat_v1/lidar.py`: "Skip if both returns are None").
* Labels [H, W, 2] = instance, class; TOP only, some frames only, none in testing; ids: `protos/segmentation.proto`.
  Instance -1 for stuff (happyhj/waymo-perception-studio, from real files). Names: Pointcept `configs/waymo`. Test
  frames: WOD `tutorial/3d_semseg_test_set_frames.txt`, lines `context,timestamp`; it has one of the two here.
* Rows of two components come in different orders (WOD issues 656, 691; tutorial_v2.ipynb has cameras 1, 2, 4, 3). Row
  groups cut through frames (256 rows of 5 lasers), BROTLI (happyhj). First column: a string `index` (lkk688).

Not checked, no release at hand: what `index` says; that projections hold 0 where no point is.

Not as released, on purpose: a global shutter, so that one `Eye` is the truth; a shorter focal length and a stronger
distortion, so that ignoring it shows; small images; two frames a segment; 18 m/s in a closed room; none of the
components that no reader here needs (stats, boxes, key points, camera segmentation).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from world import NAMES, Array, Eye, Truth, World, distorted

STREET = World(scale=5.0)
CAMERAS = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT")
LASERS = ("TOP", "FRONT", "SIDE_LEFT", "SIDE_RIGHT", "REAR")
INTRINSIC = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")
LABELS = {
    "floor": (18, "Road", -1),
    "ceiling": (0, "", -1),
    "left": (14, "Building", -1),
    "right": (15, "Vegetation", -1),
    "near": (22, "Sidewalk", -1),
    "far": (16, "Tree Trunk", -1),
    "board": (8, "Sign", 5),
    "panel": (4, "Other Vehicle", 12),
}
"""Surface -> id of segmentation.proto, its name, instance."""

SEGMENTS = {
    "training": ("10023947602400723454_1120_000_1140_000", (1552440195362591, 1552440195462613), (0,)),
    "validation": ("10203656353524179475_7625_000_7645_000", (1522688014970187,), (0,)),
    "testing": ("2830680430134047327_1720_000_1740_000", (1558034229922468, 1558034230022481), ()),
}
"""Split -> context, time stamps of its frames, which of these have labels."""

LISTED = ("2830680430134047327_1720_000_1740_000_1558034229922468",)
"""Sample ids that are in 3d_semseg_test_set_frames.txt."""

_PERIOD = 0.1  # seconds of a turn of TOP
_MATRIX = pa.list_(pa.float64(), 16)
_SHAPE = pa.list_(pa.int32(), 3)
_AXES = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # ours from Waymo's camera frame


def _rotation(roll: Array, pitch: Array, yaw: Array) -> Array:
    """Rz(yaw) Ry(pitch) Rx(roll), [..., 3, 3]."""
    (cr, sr), (cp, sp), (cy, sy) = ((np.cos(a), np.sin(a)) for a in (roll, pitch, yaw))
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _transform(x: float, y: float, z: float, yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Array:
    matrix = np.eye(4)
    matrix[:3, :3] = _rotation(*(np.array(a) for a in (roll, pitch, yaw)))
    matrix[:3, 3] = x, y, z
    return matrix


def _apply(matrix: Array, points: Array) -> Array:
    return np.einsum("...ij,...j->...i", matrix[..., :3, :3], points) + matrix[..., :3, 3]


# A yaw that is none of the axes', and the altitude and distance of the first real segment: float32 has a millimetre.
_GLOBAL_FROM_ROOM = _transform(860.594, 15568.674, -651.441, yaw=2.13, pitch=0.021, roll=-0.014)


# --- the car --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drive:
    """A car on a curve through the room; time in seconds since the start of its first frame."""

    start: tuple[float, float]
    heading: float
    speed: float = 18.0
    turn: float = 0.35

    def pose(self, time: float) -> Array:
        """world_from_vehicle."""
        yaw = self.heading + self.turn * time
        middle = self.heading + self.turn * time / 2  # the chord of an arc
        x, y = self.start + self.speed * time * np.array([np.cos(middle), np.sin(middle)])
        return _GLOBAL_FROM_ROOM @ _transform(x, y, 0.04, yaw=yaw, pitch=-0.012, roll=0.009)

    def velocity(self, time: float) -> tuple[Array, Array]:
        """(linear in the global frame, angular in the vehicle's)."""
        step = 1e-4
        before, after = self.pose(time - step), self.pose(time + step)
        turn = before[:3, :3].T @ (after[:3, :3] - before[:3, :3]) / (2 * step)
        return (after - before)[:3, 3] / (2 * step), np.array([turn[2, 1], turn[0, 2], turn[1, 0]])


@dataclass(frozen=True)
class _Laser:
    """One lidar: `vehicle_from_laser`, size of its range image, inclinations (values for TOP, min and max for all)."""

    name: int
    extrinsic: Array
    height: int
    width: int
    lowest: float
    highest: float

    @property
    def values(self) -> Array | None:
        """[H] ascending; None where uniform."""
        if self.name != 1:
            return None
        steps = (np.arange(self.height) + 0.5) / self.height * 2 - 1
        middle, half = (self.highest + self.lowest) / 2, (self.highest - self.lowest) / 2
        return middle + half * (0.65 * steps + 0.3 * steps**3)  # denser around the middle, as the real one

    def rays(self) -> tuple[Array, NDArray[np.bool_]]:
        """Unit directions [H, W, 3] in the vehicle's frame, and which of them the sensor sees."""
        values, (m10, m00) = self.values, self.extrinsic[[1, 0], 0]
        if values is None:
            values = self.lowest + (np.arange(self.height) + 0.5) / self.height * (self.highest - self.lowest)
        inclination = values[::-1, None]
        azimuth = ((self.width - np.arange(self.width) - 0.5) / self.width * 2 - 1) * np.pi - np.arctan2(m10, m00)
        flat = np.cos(inclination)
        sines = np.broadcast_to(np.sin(inclination), (self.height, self.width))
        rays = np.stack([np.cos(azimuth) * flat, np.sin(azimuth) * flat, sines], axis=-1)
        seen = np.broadcast_to((np.cos(azimuth) > -0.17) | (self.name == 1), rays.shape[:2])
        return rays @ self.extrinsic[:3, :3].T, seen


def _lasers() -> list[_Laser]:
    side, low, high = (16, 60), -np.pi / 2, np.pi / 6
    return [
        _Laser(1, _transform(1.43, 0.0, 2.184, yaw=2.583, pitch=0.004, roll=-0.006), 32, 256, -0.42, 0.46),
        _Laser(2, _transform(4.07, 0.0, 0.691, yaw=-0.012, pitch=0.02), *side, low, high),
        _Laser(3, _transform(3.245, 1.025, 0.98, yaw=1.583, roll=0.013), *side, low, high),
        _Laser(4, _transform(3.245, -1.025, 0.981, yaw=-1.559, roll=-0.02), *side, low, high),
        _Laser(5, _transform(-1.154, 0.0, 0.465, yaw=3.128, pitch=0.009), *side, low, high),
    ]


@dataclass(frozen=True)
class _Camera:
    """One camera: vehicle_from_camera in Waymo's axes, lens, and when in a turn of the lidar it looks."""

    name: int
    extrinsic: Array
    intrinsic: dict[str, float]
    lens: Eye
    delay: float

    def eye(self, world_from_vehicle: Array) -> Eye:
        """The camera in the room."""
        camera_from_room = _AXES @ np.linalg.inv(world_from_vehicle @ self.extrinsic) @ _GLOBAL_FROM_ROOM
        return replace(self.lens, camera_from_world=camera_from_room)


def _lens(width: int, height: int, intrinsic: Array) -> Eye:
    """The eye at the origin, its rays computed once for all frames."""
    eye = distorted(width, height, *intrinsic[:4], tuple(intrinsic[4:]), np.eye(4))
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = eye.to_ray(u, v)
    return replace(eye, to_ray=lambda a, b: rays if np.array_equal(a, u) and np.array_equal(b, v) else eye.to_ray(a, b))


@lru_cache(maxsize=2)
def _cameras(image_scale: float) -> tuple[_Camera, ...]:
    result = []
    for name, (x, y, degrees) in enumerate(
        ((1.544, -0.023, 0), (1.493, 0.095, 45), (1.492, -0.096, -45), (1.43, 0.116, 90), (1.426, -0.115, -90)), 1
    ):
        # The side cameras' images are the lower 886 rows of the same sensor, so that their centre is high up.
        rows, c_v = (1280, 641.5) if name <= 3 else (886, 247.5)
        pixels = np.array([1500.0 + 5 * name, 1500.0 + 5 * name, 939.5 + 8 * name, c_v]) * image_scale
        intrinsic = np.concatenate([pixels, [-0.2, 0.04, 0.0008, -0.0006, -0.004]])
        extrinsic = _transform(x, y, 2.115, yaw=np.radians(degrees) + 0.006, pitch=0.007, roll=-0.011)
        lens = _lens(round(1920 * image_scale), round(rows * image_scale), intrinsic)
        delay = (0.5 - degrees / 360) * _PERIOD  # as the lidar's beam comes by
        result.append(_Camera(name, extrinsic, dict(zip(INTRINSIC, intrinsic.tolist(), strict=True)), lens, delay))
    return tuple(result)


# --- one frame ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scan:
    """What one lidar made of one frame; the first axis of all but `pose` is the return."""

    image: NDArray[np.float32]  # [2, H, W, 4]
    label: NDArray[np.int32]  # [2, H, W, 2]
    room: Array  # [2, H, W, 3]
    pose: NDArray[np.float32] | None  # [H, W, 6]

    def flat(self, echo: int, values: NDArray[Any]) -> NDArray[Any]:
        """Rows of the points of one return, row by row of the image."""
        return values[echo][self.image[echo, ..., 0] > 0]


def _pixel_poses(drive: _Drive, begin: float, laser: _Laser) -> NDArray[np.float32]:
    """[H, W, 6] of TOP: every column at its own time."""
    times = begin + (np.arange(laser.width) + 0.5) / laser.width * _PERIOD
    m = np.stack([drive.pose(t) for t in times])
    angles = (np.arctan2(m[:, 2, 1], m[:, 2, 2]), -np.arcsin(m[:, 2, 0]), np.arctan2(m[:, 1, 0], m[:, 0, 0]))
    poses = np.concatenate([np.stack(angles, axis=-1), m[:, :3, 3]], axis=-1).astype(np.float32)
    return np.broadcast_to(poses, (laser.height, laser.width, 6)).copy()


def _scan(
    world: World, laser: _Laser, drive: _Drive, begin: float, frame_pose: Array, rng: np.random.Generator, empty: bool
) -> _Scan:
    rays, seen = laser.rays()
    pose, matrix = None, frame_pose
    if laser.name == 1:
        # What float32 holds is where the car truly was.
        pose = _pixel_poses(drive, begin, laser)
        roll, pitch, yaw = np.moveaxis(pose[..., :3].astype(np.float64), -1, 0)
        matrix = np.zeros((*rays.shape[:2], 4, 4))
        matrix[..., :3, :3], matrix[..., :3, 3], matrix[..., 3, 3] = _rotation(roll, pitch, yaw), pose[..., 3:], 1
    room_from_vehicle = np.linalg.inv(_GLOBAL_FROM_ROOM) @ matrix
    origin = np.broadcast_to(_apply(room_from_vehicle, laser.extrinsic[:3, 3]), rays.shape)
    rays = np.einsum("...ij,...j->...i", room_from_vehicle[..., :3, :3], rays)
    surface, length = world.cast(origin, rays)
    behind, further = world.cast(origin + rays * (length + 0.05)[..., None], rays)
    surface, length = np.stack([surface, behind]), np.stack([length, length + 0.05 + further]).astype(np.float32)
    # A part of the beam passes an edge: the second return lies behind what occludes.
    shape = surface.shape[1:]
    valid = np.stack([rng.random(shape) > 0.03, np.isin(surface[0], (6, 7)) & (rng.random(shape) < 0.4)]) & seen
    valid = valid & (length < 75) & (surface >= 0) & (not empty)
    valid[1] &= valid[0]
    image = np.full((*valid.shape, 4), -1, dtype=np.float32)
    image[~valid] = np.where(rng.random((~valid).sum()) < 0.1, 0, -1)[:, None]  # 0 is no range, either
    image[valid, 0] = length[valid]
    image[valid, 1] = rng.gamma(1.2, 0.2, valid.sum()) * np.where(rng.random(valid.sum()) < 0.02, 900, 1)
    image[valid, 2] = rng.gamma(1.0, 0.3, valid.sum())
    image[valid, 3] = np.where(rng.random(valid.sum()) < 0.05, 1, -1)
    table = np.array([(LABELS[name][2], LABELS[name][0]) for name in NAMES], dtype=np.int32)
    label = np.where(rng.random((*valid.shape, 1)) < 0.05, np.array([-1, 0]), table[surface]).astype(np.int32)
    label[~valid] = 0
    if pose is not None:
        pose[~valid.any(axis=0)] = 0
    room = origin + rays * np.where(valid, length, 0)[..., None].astype(np.float64)
    return _Scan(image, label, room, pose)


def _projection(scan: _Scan, eyes: Iterable[Eye]) -> NDArray[np.float32]:
    """[2, H, W, 6]: the first two cameras of each point, by geometry alone."""
    result = np.zeros((*scan.room.shape[:3], 6), dtype=np.float32)
    count = np.where(scan.image[..., 0] > 0, 0, 2)
    for name, eye in enumerate(eyes, 1):
        u, v, seen = (a.reshape(count.shape) for a in eye.project(scan.room.reshape(-1, 3)))
        for slot in (1, 0):  # backwards: what fills the first slot now must not fill the second, too
            here = seen & (count == slot)
            result[here, 3 * slot : 3 * slot + 3] = np.stack([np.full_like(u, name), np.floor(u), np.floor(v)], -1)[
                here
            ]
            count[here] += 1
    return result


def _truth(
    frame_pose: Array, scans: list[_Scan], projections: list[NDArray[np.float32]], labelled: bool, order: str
) -> Truth:
    """Truth without names; the points in the order asked for."""
    turns = [(i, echo) for i in range(len(scans)) for echo in range(2)]
    if order == "return":
        turns.sort(key=lambda turn: turn[1])
    rows = [(scans[i].flat(e, scans[i].image), scans[i].flat(e, scans[i].label)) for i, e in turns]
    image, label = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    world = np.concatenate([scans[i].flat(e, scans[i].room) for i, e in turns])
    top = np.concatenate([np.full(len(row[0]), i == 0) for row, (i, _) in zip(rows, turns, strict=True)])
    names = {number: name for number, name, _ in LABELS.values()}
    official = np.array([names[c] if t else "" for c, t in zip(label[:, 1].tolist(), top.tolist(), strict=True)])
    return Truth(
        sample_id="",
        split="",
        world=world,
        coord=_apply(np.linalg.inv(frame_pose) @ _GLOBAL_FROM_ROOM, world),
        label=official if labelled else None,
        eyes={},
        channels={
            "strength": image[:, 1],
            "elongation": image[:, 2],
            "instance": np.where(top & labelled, label[:, 0], -1).astype(np.int32),
            "projection": np.concatenate([scans[i].flat(e, projections[i]) for i, e in turns]),
        },
    )


# --- files ----------------------------------------------------------------------------------------------------------


_DOUBLE, _FLOATS, _INTS = pa.float64(), pa.list_(pa.float32()), pa.list_(pa.int32())
_KEYS = {
    "segment_context_name": pa.string(),
    "frame_timestamp_micros": pa.int64(),
    "laser_name": pa.int8(),
    "camera_name": pa.int8(),
}


def _images(values: pa.DataType, returns: tuple[int, ...] = (1, 2)) -> dict[str, pa.DataType]:
    return {f"range_image_return{i}.{k}": t for i in returns for k, t in (("values", values), ("shape", _SHAPE))}


def _many(prefix: str, names: Iterable[str], kind: pa.DataType = _DOUBLE) -> dict[str, pa.DataType]:
    return {prefix + name: kind for name in names}


_COMPONENTS: dict[str, tuple[str, str, dict[str, pa.DataType]]] = {
    "vehicle_pose": ("VehiclePoseComponent", "frame", {"world_from_vehicle.transform": _MATRIX}),
    "lidar": ("LiDARComponent", "frame laser", _images(_FLOATS)),
    "lidar_pose": ("LiDARPoseComponent", "frame laser", _images(_FLOATS, (1,))),
    "lidar_camera_projection": ("LiDARCameraProjectionComponent", "frame laser", _images(_FLOATS)),
    "lidar_segmentation": ("LiDARSegmentationLabelComponent", "frame laser", _images(_INTS)),
    "lidar_calibration": (
        "LiDARCalibrationComponent",
        "laser",
        {"extrinsic.transform": _MATRIX}
        | _many("beam_inclination.", ("min", "max"))
        | {"beam_inclination.values": pa.list_(_DOUBLE)},
    ),
    "camera_image": (
        "CameraImageComponent",
        "frame camera",
        {"image": pa.binary(), "pose.transform": _MATRIX}
        | _many("velocity.linear_velocity.", "xyz", pa.float32())
        | _many("velocity.angular_velocity.", "xyz")
        | {"pose_timestamp": _DOUBLE}
        | _many("rolling_shutter_params.", ("shutter", "camera_trigger_time", "camera_readout_done_time")),
    ),
    "camera_calibration": (
        "CameraCalibrationComponent",
        "camera",
        _many("intrinsic.", INTRINSIC)
        | {"extrinsic.transform": _MATRIX}
        | {"width": pa.int32(), "height": pa.int32(), "rolling_shutter_direction": pa.int8()},
    ),
}
"""Folder -> name of the dataclass, its key beside the segment, its own columns."""

_ORDER: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "lidar": lambda key: (key[1], (1, 5, 2, 3, 4).index(key[2])),
    "lidar_pose": lambda key: -key[1],
    "lidar_camera_projection": lambda key: (key[1], -key[2]),
    "lidar_calibration": lambda key: (2, 5, 3, 4, 1).index(key[1]),  # by their names' letters, as v1 prints them
    "camera_image": lambda key: (key[1], (1, 2, 4, 3, 5).index(key[2])),
    "vehicle_pose": lambda key: -key[1],
}
"""The release promises no common order. Components that are not named here stand in the order of their keys."""


def _write_table(path: Path, folder: str, rows: dict[tuple[Any, ...], Sequence[Any]], row_group_size: int) -> None:
    """One component of one segment: key -> values of its own columns."""
    component, key, columns = _COMPONENTS[folder]
    keys = {f"key.{k}": t for k, t in _KEYS.items() if k.split("_")[0] in f"segment {key}"}
    own = {f"[{component}].{name}": kind for name, kind in columns.items()}
    schema = pa.schema(list(({"index": pa.string()} | keys | own).items()))
    ordered = sorted(rows, key=_ORDER.get(folder, lambda key: key))
    cells = zip(*((";".join(map(str, key)), *key, *rows[key]) for key in ordered), strict=True)
    arrays = [pa.array(list(c), type=field.type) for c, field in zip(cells, schema, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Arrow 10 wrote the release: elements of lists are called "item".
    options = {"compression": "brotli", "use_compliant_nested_type": False, "row_group_size": row_group_size}
    pq.write_table(pa.table(arrays, schema=schema), path, **options)


def _flat(images: Iterable[NDArray[Any] | None]) -> list[Any]:
    return [cell for im in images for cell in ((None, None) if im is None else (im.reshape(-1), list(im.shape)))]


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=98, subsampling=0)
    return buffer.getvalue()


def write(
    root: Path,
    *,
    world: World = STREET,
    splits: Sequence[str] = ("training", "validation", "testing"),
    image_scale: float = 0.15,
    order: Literal["laser", "return"] = "laser",
    empty_laser: int | None = None,
    missing_laser: int | None = None,
    null_second: int | None = None,
    row_group_size: int = 4,
    seed: int = 0,
) -> list[Truth]:
    """A release below `root`, and the truth of every frame in it: by split, then by time.

    Coordinates are metres in the vehicle's frame at the frame's pose (x forward, y left, z up). Ids are
    `<context>_<timestamp>`. `label` is None for frames without labels: a later one in training, all of testing.

    Args:
        root: gets the folders of the splits.
        world: of a scale of 4 or more, so that the car has room.
        splits: which to write.
        image_scale: of 1920 x 1280 and 1920 x 886; 1 is the real size (half a minute a frame).
        order: of the points in the truth: for each laser in the order of their numbers return 1, then return 2; or
            return 1 of all lasers, then return 2 of all, as Pointcept's preprocess_waymo.py has it.
        empty_laser: number of a lidar whose range images hold no return.
        missing_laser: number of a lidar that had no return, either, and so has no row; not TOP.
        null_second: number of a lidar whose second return is null, which the component's schema permits.
        row_group_size: rows per row group; 4 cuts through frames as the release's 256 do.
        seed: of everything random.
    """
    if world.scale < 4:
        raise ValueError("the car needs a world of scale 4 or more")
    drives = {
        "training": _Drive((-0.1 * world.scale, 0.75 * world.scale), 1.52),
        "validation": _Drive((0.1 * world.scale, 0.95 * world.scale), 1.45),
        "testing": _Drive((-0.15 * world.scale, 0.7 * world.scale), 1.6),
    }
    truths = []
    for split in splits:
        context, stamps, labelled = SEGMENTS[split]
        drive = drives[split]
        tables: dict[str, dict[tuple[Any, ...], Sequence[Any]]] = {name: {} for name in _COMPONENTS}
        rng = np.random.default_rng([seed, list(SEGMENTS).index(split)])
        lasers, cameras = _lasers(), _cameras(image_scale)
        for laser in lasers:
            cells = (laser.extrinsic.ravel(), laser.lowest, laser.highest, laser.values)
            tables["lidar_calibration"][context, laser.name] = cells
        for camera in cameras:
            size = camera.lens.width, camera.lens.height
            cells = (*camera.intrinsic.values(), camera.extrinsic.ravel(), *size, 5)
            tables["camera_calibration"][context, camera.name] = cells
        for number, stamp in enumerate(stamps):
            key, begin = (context, stamp), (stamp - stamps[0]) * 1e-6
            frame_pose = drive.pose(begin + 0.47 * _PERIOD)
            tables["vehicle_pose"][key] = [frame_pose.ravel()]
            eyes = {}
            for camera in cameras:
                pose, time = drive.pose(begin + camera.delay), stamp * 1e-6 + camera.delay
                eyes[CAMERAS[camera.name - 1]] = eye = camera.eye(pose)
                linear, angular = drive.velocity(begin + camera.delay)
                cells = (_jpeg(world.image(eye)), pose.ravel(), *linear, *angular, time, 0.0, time, time)
                tables["camera_image"][*key, camera.name] = cells
            scans, projections = [], []
            for laser in lasers:
                scan = _scan(world, laser, drive, begin, frame_pose, rng, laser.name in (empty_laser, missing_laser))
                if laser.name == null_second:
                    scan.image[1] = -1
                projections.append(_projection(scan, eyes.values()))
                scans.append(scan)
                if laser.name == missing_laser:
                    continue
                keep = slice(0, 1) if laser.name == null_second else slice(None)
                for name, images in (("lidar", scan.image), ("lidar_camera_projection", projections[-1])):
                    pair = [*images[keep], None][:2]
                    tables[name][*key, laser.name] = _flat(pair)
                if scan.pose is not None:
                    tables["lidar_pose"][*key, laser.name] = _flat([scan.pose])
                    if number in labelled:
                        tables["lidar_segmentation"][*key, laser.name] = _flat(scan.label)
            truth = _truth(frame_pose, scans, projections, number in labelled, order)
            truths.append(replace(truth, sample_id=f"{context}_{stamp}", split=split, eyes=eyes))
        for folder, rows in tables.items():
            if rows:  # testing has no folder of labels
                _write_table(Path(root) / split / folder / f"{context}.parquet", folder, rows, row_group_size)
    return truths
