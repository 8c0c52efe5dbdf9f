"""SemanticKITTI in its official layout: KITTI odometry's velodyne, color and calib downloads, SemanticKITTI's labels.

Facts, each with where it stands:

- `[KITTI]` devkit_odometry.zip, `readme.txt`: `velodyne/NNNNNN.bin` is float32 x, y, z (metres, velodyne frame) and
  reflectance, one point after the other, no header, the count from the file's size. The ego motion within a scan is
  compensated to the moment at which the cameras trigger, so a scan and the image of the same number belong together and
  need no poses. `calib.txt`: P0 to P3 are 3 x 4 projections of the rectified cameras, `Tr` maps velodyne points into
  the left grey camera (0), and x = Pi Tr X: the fourth column of P2, K times metres, moves camera 0 to camera 2; its
  third row is not zero, either. `times.txt`: seconds, a line per frame. `poses/NN.txt`, only 00 to 10: row-major 3 x 4,
  from camera 0 of frame i to camera 0 of frame 0.
- `[API]` github.com/PRBonn/semantic-kitti-api, README.md: `image_2` (left colour), `image_3` (right colour), `labels`,
  and in every sequence a `poses.txt` of their own SLAM, in the same convention. `auxiliary/laserscan.py` and
  semantic-kitti.org/dataset.html: `labels/NNNNNN.label` is one uint32 per point in the order of the scan, lower 16 bits
  raw id, upper 16 bits instance; instances keep their number through a sequence, and are unique only together with the
  raw id (issue 95). Sequences 11 to 21 have no `labels`.
- `[YAML]` same repository, `config/semantic-kitti.yaml`: ids, `learning_map` (moving classes join the static ones, 1,
  52 and 99 join 0, lane-marking joins road, bus and on-rails join other-vehicle), `learning_ignore`, and the splits.
- `[CALIB]` the values and the `%.12e` layout of real `calib.txt` files, as quoted in public repositories; their sizes
  in bytes (1171 for 00, 1172 for 07 and 08) come out exactly: LF, a space after the colon, no blank line at the end.
  04 to 12 share one calibration, 00 to 02 and 13 to 21 another (github.com/raulmur/ORB_SLAM2 issue 164), 03 its own.
  The calib.txt in data_odometry_color.zip has P0 to P3 only; data_odometry_calib.zip replaces it by one with `Tr`
  (github.com/utiasSTARS/pykitti issue 5, github.com/valeoai/xmuda issue 2). Images: 1241 x 376 in 00 to 02 and 13 to
  21, 1242 x 375 in 03, 1226 x 370 in 04 to 12.
- Velodyne HDL-64E: 32 lasers from +2 to -8.33 degrees, 32 from -8.83 to -24.33. Remission is a multiple of 0.01 in
  [0, 0.99], and beams without a return are left out: the count differs from scan to scan (semantic-kitti-api issues
  41 and 129). Points are stored laser by laser, each turning from forward to the left.

Not checked against a release: where P has the centre of the first pixel (0 by the 0-based boxes of KITTI's object
readme; 1 by KITTI's MATLAB code, whose rounding common depth map tools repeat with a minus 1; 0.5 is written here, the
mean of the two and half a pixel of 1241 from either), `Tr` of 13 to 21 (that of 00 to 02 is taken), the order of points
(from memory), the number format of `poses.txt` and `times.txt`, and whether the labels' zip has the latter as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from world import Array, Eye, Truth, World

Rig = Literal["wide", "official"]

TRAIN = ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10")
VALIDATION = ("08",)
TEST = ("11", "12", "13", "14", "15", "16", "17", "18", "19", "20", "21")

BENCHMARK_NAME: dict[int, str] = {
    0: "", 1: "", 10: "car", 11: "bicycle", 13: "other-vehicle", 15: "motorcycle", 16: "other-vehicle", 18: "truck",
    20: "other-vehicle", 30: "person", 31: "bicyclist", 32: "motorcyclist", 40: "road", 44: "parking", 48: "sidewalk",
    49: "other-ground", 50: "building", 51: "fence", 52: "", 60: "road", 70: "vegetation", 71: "trunk", 72: "terrain",
    80: "pole", 81: "traffic-sign", 99: "", 252: "car", 253: "bicyclist", 254: "person", 255: "motorcyclist",
    256: "other-vehicle", 257: "other-vehicle", 258: "truck", 259: "other-vehicle",
}  # fmt: skip
"""Raw id -> class of the single-scan benchmark, "" where it ignores the id: `learning_map` of `[YAML]`."""

THINGS = frozenset({10, 11, 13, 15, 16, 18, 20, 30, 31, 32, *range(252, 260)})
"""Vehicles and humans: the raw ids that come with instances (semantic-kitti-api issue 14)."""

RAW_IDS: tuple[tuple[int, ...], ...] = (
    (40, 44, 48, 49, 60, 72),  # floor
    (0, 70),  # ceiling, above the lasers
    (50, 51, 52, 70, 1),  # left
    (99, 80, 50, 81, 71),  # right
    (10, 252, 50, 18, 258, 0, 16),  # near
    (15, 255, 11, 32, 253, 31, 70),  # far
    (30, 254, 13, 257, 256),  # board
    (20, 259, 81, 10),  # panel
)
"""Raw ids that each surface of the room shows, cell by cell; all ids of `[YAML]` are there."""

# Rectified cameras of each recording day, from real calib.txt files: size, then fx = fy, cx, cy, the fourth columns of
# P1, P2 and P3, and Tr.
_DAYS: dict[str, tuple[tuple[int, int], tuple[float, float, float], tuple[tuple[float, float, float], ...], str]] = {
    "2011_10_03": (
        (1241, 376),
        (718.8560, 607.1928, 185.2157),
        ((-386.1448, 0.0, 0.0), (45.38225, -0.1130887, 0.003779761), (-337.2877, 2.369057, 0.004915215)),
        "4.276802385584e-04 -9.999672484946e-01 -8.084491683471e-03 -1.198459927713e-02 "
        "-7.210626507497e-03 8.081198471645e-03 -9.999413164504e-01 -5.403984729748e-02 "
        "9.999738645903e-01 4.859485810390e-04 -7.206933692422e-03 -2.921968648686e-01",
    ),
    "2011_09_26": (
        (1242, 375),
        (721.5377, 609.5593, 172.8540),
        ((-387.5744, 0.0, 0.0), (44.85728, 0.2163791, 0.002745884), (-339.5242, 2.199936, 0.002729905)),
        "2.347736981471e-04 -9.999441545438e-01 -1.056347781105e-02 -2.796816941295e-03 "
        "1.044940741659e-02 1.056535364138e-02 -9.998895741176e-01 -7.510879138296e-02 "
        "9.999453885620e-01 1.243653783865e-04 1.045130299567e-02 -2.721327964059e-01",
    ),
    "2011_09_30": (
        (1226, 370),
        (707.0912, 601.8873, 183.1104),
        ((-379.8145, 0.0, 0.0), (46.88783, 0.1178601, 0.006203223), (-333.4597, 1.930130, 0.003318498)),
        "-1.857739385241e-03 -9.999659513510e-01 -8.039975204516e-03 -4.784029760483e-03 "
        "-6.481465826011e-03 8.051860151134e-03 -9.999466081774e-01 -7.337429464231e-02 "
        "9.999773098287e-01 -1.805528627661e-03 -6.496203536139e-03 -3.339968064433e-01",
    ),
}

# The wide rig, in metres at a room scale of 6: where camera 0 stands in the velodyne frame, and the shift from camera 0
# to cameras 2 and 3.
_WIDE_CAMERA_0 = np.array([0.66, 3.96, -1.48])
_WIDE_SHIFTS = {"P2": np.array([1.6, -0.45, 0.35]), "P3": np.array([-1.1, 0.4, 0.3])}
_WIDE_TURN = (-0.039, 0.014)
"""Yaw and pitch, in radians, that the wide rig's camera is turned by against the official one."""


def write(
    root: Path,
    *,
    world: World = World(6.0),  # noqa: B008 - frozen
    sequences: Sequence[str] = ("03", "08", "13"),
    scans: int = 2,
    azimuths: int = 300,
    image_scale: float = 0.4,
    rig: Rig = "wide",
    folder: str = "dataset",
    without_images: Collection[str] = (),
    without_tr: Collection[str] = (),
) -> list[Truth]:
    """Write a release below `root` and tell what every scan of it truly shows, in the order of `sequences`.

    Args:
        root: folder that the downloads were unpacked in.
        world: the room; its scale between 4 and 8.
        sequences: any of 00 to 21; the defaults are of train, validation and test, and of the three image sizes.
        scans: per sequence.
        azimuths: directions of each of the 64 lasers.
        image_scale: size of the images, and P0 to P3 with them, against the release; 1 for the release's own.
        rig: `official` has the release's calibration, where forgetting the fourth column of P2 moves points by far less
            than a patch, and lidar and camera see the same places. In the `wide` one cameras stand metres apart and
            away from the lidar, so that a forgotten shift shows, and the lidar sees places hidden from the camera.
        folder: what the zips unpack to.
        without_images: sequences whose images were not downloaded.
        without_tr: sequences with the calib.txt of data_odometry_color.zip.
    """
    truths = []
    for sequence in sequences:
        day = _day(sequence)
        size = _size(day, image_scale)
        matrices = _calibration(day, size, rig, world)
        path = root / folder / "sequences" / sequence
        for name in ("velodyne", *(() if sequence in TEST else ("labels",))):
            (path / name).mkdir(parents=True)
        kept = {k: m for k, m in matrices.items() if k != "Tr" or sequence not in without_tr}
        (path / "calib.txt").write_bytes("".join(f"{k}: {_numbers(m)}\n" for k, m in kept.items()).encode())
        poses = [_lidar_from_room(sequence, scan, world) for scan in range(scans)]
        _write_drive(root / folder, sequence, poses, _square(matrices["Tr"]))
        for scan, lidar_from_room in enumerate(poses):
            eyes = {}
            if sequence not in without_images:
                for name, camera in (("image_2", "P2"), ("image_3", "P3")):
                    eyes[name] = _eye(matrices[camera], matrices["Tr"], size, lidar_from_room)
                    (path / name).mkdir(exist_ok=True)
                    picture = Image.fromarray(world.image(eyes[name]))
                    picture.save(path / name / f"{scan:06d}.png", compress_level=1)
            seen = {"image_2": eyes["image_2"]} if eyes else {}
            truths.append(_write_scan(path, scan, world, lidar_from_room, azimuths, seen))
    return truths


# --- the rig --------------------------------------------------------------------------------------------------------


def _day(sequence: str) -> str:
    """Recording day whose calibration a sequence has; 13 to 21, undisclosed, have the cameras of 00 to 02."""
    if sequence == "03":
        return "2011_09_26"
    return "2011_09_30" if "04" <= sequence <= "12" else "2011_10_03"


def _size(day: str, image_scale: float) -> tuple[int, int]:
    """Width and height of the images."""
    width, height = _DAYS[day][0]
    return round(width * image_scale), round(height * image_scale)


def _calibration(day: str, size: tuple[int, int], rig: Rig, world: World) -> dict[str, Array]:
    """P0 to P3 and Tr [3, 4], as they read in calib.txt: with the precision of its digits."""
    (width, height), (f, cx, cy), columns, tr_text = _DAYS[day]
    intrinsics = np.array([[f, 0, cx], [0, f, cy], [0, 0, 1]])
    tr = np.array(tr_text.split(), dtype=float).reshape(3, 4)
    projections = {"P0": np.column_stack([intrinsics, np.zeros(3)])}
    for name, column in zip(("P1", "P2", "P3"), columns, strict=True):
        projections[name] = np.column_stack([intrinsics, np.array(column)])
    if rig == "wide":
        metres = world.scale / 6
        tr[:, :3] = _turn(*_WIDE_TURN) @ tr[:, :3]
        tr[:, 3] = -tr[:, :3] @ (_WIDE_CAMERA_0 * metres)
        for name, shift in _WIDE_SHIFTS.items():
            projections[name][:, 3] = intrinsics @ (shift * metres)
    resize = np.diag([size[0] / width, size[1] / height, 1])
    result = {name: resize @ matrix for name, matrix in projections.items()} | {"Tr": tr}
    return {name: np.array(_numbers(matrix).split(), dtype=float).reshape(3, 4) for name, matrix in result.items()}


def _turn(yaw: float, pitch: float) -> Array:
    """Rotation of a camera's frame: to the left, then downwards."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    return np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])


def _numbers(matrix: Array) -> str:
    """The text of a matrix in calib.txt, row by row."""
    return " ".join(f"{value + 0.0:.12e}" for value in matrix.ravel())  # + 0.0: no -0


def _square(matrix: Array) -> Array:
    """[4, 4] of [3, 4]."""
    return np.vstack([matrix, [0, 0, 0, 1]])


def _eye(projection: Array, tr: Array, size: tuple[int, int], lidar_from_room: Array) -> Eye:
    """The camera of x = P Tr X: its intrinsics, and the shift from camera 0 that the fourth column of P hides."""
    intrinsics = projection[:, :3]
    shift = np.eye(4)
    shift[:3, 3] = np.linalg.solve(intrinsics, projection[:, 3])
    camera_from_room = shift @ _square(tr) @ lidar_from_room

    def to_pixel(points: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        before = points[..., 2] > 1e-6
        x, y, z = np.moveaxis(points @ intrinsics.T, -1, 0)
        z = np.where(before, z, 1.0)
        return x / z, y / z, before

    def to_ray(u: Array, v: Array) -> Array:
        return np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(intrinsics).T

    return Eye(width=size[0], height=size[1], camera_from_world=camera_from_room, to_pixel=to_pixel, to_ray=to_ray)


# --- the drive ------------------------------------------------------------------------------------------------------


def _lidar_from_room(sequence: str, scan: int, world: World) -> Array:
    """Pose of the velodyne (x forward, y left, z up): the car sways through the room on a bumpy road, and back."""
    number = int(sequence)
    forward, side = 1.6 * np.sin(0.5 * scan), 0.4 * np.sin(0.31 * scan + number)
    yaw = -0.05 + 0.05 * np.sin(1.7 * number) + 0.04 * np.sin(0.4 * scan)
    pitch, roll = 0.02 * np.cos(0.9 * scan + number), 0.025 * np.sin(0.7 * scan + 2 * number)
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
    level = np.array([[-sy, -cy, 0], [cy, -sy, 0], [0, 0, 1]])  # columns: forward, left, up; along the room's y for 0
    nod = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    lean = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    room_from_lidar = np.eye(4)
    room_from_lidar[:3, :3] = level @ nod @ lean
    start = np.array([1.59, 0.44, 0.81]) * world.scale
    room_from_lidar[:3, 3] = start + (level @ [forward, side, 0]) * world.scale / 6
    return np.linalg.inv(room_from_lidar)


def _write_drive(dataset: Path, sequence: str, lidar_from_room: Sequence[Array], tr: Array) -> None:
    """times.txt, SemanticKITTI's poses.txt, and KITTI's own poses of the training sequences."""
    camera_from_room = [tr @ pose for pose in lidar_from_room]
    rows = [(camera_from_room[0] @ np.linalg.inv(pose))[:3].ravel() for pose in camera_from_room]
    folder = dataset / "sequences" / sequence
    (folder / "times.txt").write_bytes("".join(f"{0.1036 * k:.6e}\n" for k in range(len(rows))).encode())
    (folder / "poses.txt").write_bytes(_table(rows, "g"))
    if sequence not in TEST:
        (dataset / "poses").mkdir(exist_ok=True)
        (dataset / "poses" / f"{sequence}.txt").write_bytes(_table(rows, ".6e"))


def _table(rows: Sequence[Array], number: str) -> bytes:
    """One line per row."""
    return "".join(" ".join(format(value, number) for value in row) + "\n" for row in rows).encode()


# --- a scan ---------------------------------------------------------------------------------------------------------


def _write_scan(
    path: Path, scan: int, world: World, lidar_from_room: Array, azimuths: int, eyes: dict[str, Eye]
) -> Truth:
    """Points and, where the sequence has them, labels."""
    sequence = path.name
    rng = np.random.default_rng([int(sequence), scan])
    room_from_lidar = np.linalg.inv(lidar_from_room)
    rays = np.concatenate(list(_beams(azimuths))) @ room_from_lidar[:3, :3].T
    surface, distance = world.cast(room_from_lidar[:3, 3], rays)
    returned = (surface >= 0) & (rng.random(len(rays)) > 0.04)
    surface = surface[returned]
    places = room_from_lidar[:3, 3] + rays[returned] * distance[returned, None]
    points = np.empty((len(places), 4), dtype="<f4")
    points[:, :3] = places @ lidar_from_room[:3, :3].T + lidar_from_room[:3, 3]
    points[:, 3] = np.round(0.99 * rng.random(len(points)) ** 2, 2)
    (path / "velodyne" / f"{scan:06d}.bin").write_bytes(points.tobytes())
    channels: dict[str, NDArray[np.generic]] = {"strength": points[:, 3].astype(np.float32)}
    names = None
    if sequence not in TEST:
        raw, instance = _labels(places / world.scale, surface)
        names = np.array([BENCHMARK_NAME[i] for i in raw.tolist()])
        (path / "labels" / f"{scan:06d}.label").write_bytes((raw | instance << 16).astype("<u4").tobytes())
        channels["instance"] = instance.astype(np.int32)
    split = "train" if sequence in TRAIN else "val" if sequence in VALIDATION else "test"
    return Truth(
        sample_id=f"{sequence}/{scan:06d}",
        split=split,
        world=places,
        coord=points[:, :3].astype(np.float64),
        label=names,
        eyes=eyes,
        channels=channels,
    )


def _beams(azimuths: int) -> Iterator[Array]:
    """Directions [azimuths, 3] of every laser, from the uppermost to the lowest, from forward to the left and on."""
    around = np.linspace(0, 2 * np.pi, azimuths, endpoint=False)
    for elevation in np.radians([*np.linspace(2, -8.33, 32), *np.linspace(-8.83, -24.33, 32)]):
        across = np.cos(elevation)
        yield np.stack([across * np.cos(around), across * np.sin(around), np.full(azimuths, np.sin(elevation))], axis=1)


def _labels(places: Array, surface: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Raw id and instance [N] of places in units of the room's scale: cells of half a unit have one of each."""
    cell = np.floor(places * 2 + 0.25).astype(np.int64)
    mixed = (cell * (1, 11, 13)).sum(axis=1)
    raw = np.array([RAW_IDS[s][m % len(RAW_IDS[s])] for s, m in zip(surface.tolist(), mixed.tolist(), strict=True)])
    instance = 1 + (cell * (11, 37, 5)).sum(axis=1) % 300
    instance[raw == 20] += 40_000  # the upper half is unsigned: an id that an int32 would turn negative
    return raw, np.where(np.isin(raw, tuple(THINGS)), instance, 0)
