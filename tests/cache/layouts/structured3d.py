"""Structured3D as released (https://structured3d-dataset.org): renderings of rooms with depth; it has no point files.

Facts, and where they come from ("devkit" is github bertjiazheng/Structured3D at a1aa97f, "#n" an issue there,
"Pointcept" is pointcept/datasets/preprocessing/structured3d/preprocess_structured3d.py at d74c646):

- Folders, files, keys of the JSON files: devkit data_organization.md. Every download holds `Structured3D/scene_NNNNN/`:
  `Structured3D_panorama_00..17.zip`, `_perspective_full_00..17.zip`, `_perspective_empty_00..17.zip` (200 scenes each;
  #30: full_08 and full_09 both hold 01800-01999, so 01600-01799 have no perspectives), `_annotation_3d.zip`, and
  `_bbox.zip` with `bbox_3d.json` and every `instance.png`, of perspectives and panoramas (#37, #46, #47; also of rooms
  whose renderings were never released). unzip cannot read the archives of perspectives, 7z can (#22, #46); some of the
  panoramas have wrong checksums (#43, #65), one instance.png another size (#63). Users keep them zipped
  (Pointcept's README), unpacked into one folder, or each in a folder of its own (#43).
- World: millimetres, z up, right-handed, floor at z = 0 (devkit misc/utils.py, visualize_mesh.py).
- camera_pose.txt: `vx vy vz tx ty tz ux uy uz xfov yfov 1`: place, view direction, up, half-angles in radians
  (data_organization.md). Image right = direction x up; fx = (W / 2) / tan(xfov), principal point in the middle (devkit
  parse_camera_info). In the release xfov yfov are always the text `0.698132 0.440992`, at 1280 x 720 (asserted by
  yuxiaoguo/Uni3DScenes, the code that Pointcept's grew from).
- camera_xyz.txt: `x y z` of the level panorama, 1024 x 512. Its middle column looks along +y, with +x to the right:
  devkit misc/panorama.py `xyz_2_coorxy`, Pointcept, and RoomFormer's PointCloudReaderPanorama agree, although
  data_organization.md (and #9, #32) speaks of the negative y-axis, which is where the left border looks.
- depth.png: 16 bit, mm, 0 = no reading; along z for perspectives, along the ray for panoramas (Pointcept, RoomFormer).
  Depth is antialiased: pixels at the border of an object hold a mean of both (#11; `flying`).
- semantic.png: palette image, its indices are NYU40 ids, its palette has ScanNet's colours (#4); 0 = unlabelled.
  OpenCV sees colours, Pillow ids. instance.png: 16 bit, 65535 = background, `full` only (data_organization.md).
- normal.png: 128 (1 + n), in the camera's frame: R along the view, G up, B the third of a left-handed frame (#61).
- Splits: devkit README. Errata: devkit metadata/errata.txt, named `scene_NNNNN` or `scene_NNNNN_room_R`. A sample is
  a room, named likewise, points with the 25 classes of Pointcept's VALID_CLASS_IDS_25, all others ignored. Rooms have
  at most 5 perspectives (#26), or no folder `perspective` at all (devkit visualize_layout.py goes on without).

Not checked, for want of the release: that rgb and albedo are RGBA and normal RGB (Pointcept and others cut to three
channels), digits in the texts (%g here), rounding of depth, centres of pixels (at + 0.5 here; Pointcept and RoomFormer
leave the half out), the frame and signs of panoramas' normals, gaps in the position ids, ids of `outwall`. Simplified:
layout.json without masks, and with the visible corners of the room only; albedo.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import world as bed
from world import Array, Eye, Truth, World

Files = dict[str, dict[str, bytes]]
"""Download -> path below `Structured3D/` -> content."""

Size = tuple[int, int]
Ids = tuple[int, int, int, int, int, int, int, int]

XFOV = 0.698132
BACKGROUND = 65535
WINDOW, UNLABELLED = 9, 0
BOARD, PANEL = bed.NAMES.index("board"), bed.NAMES.index("panel")
HIDDEN: dict[str, tuple[int, ...]] = {"full": (), "simple": (PANEL,), "empty": (BOARD, PANEL)}
"""Configuration -> surfaces that are furniture and not there."""

CLASSES25: dict[int, str] = {
    1: "wall", 2: "floor", 3: "cabinet", 4: "bed", 5: "chair", 6: "sofa", 7: "table", 8: "door", 9: "window",
    11: "picture", 14: "desk", 15: "shelves", 16: "curtain", 17: "dresser", 18: "pillow", 19: "mirror", 22: "ceiling",
    24: "refrigerator", 25: "television", 32: "nightstand", 34: "sink", 35: "lamp", 38: "otherstructure",
    39: "otherfurniture", 40: "otherprop",
}  # fmt: skip
"""NYU40 id -> class of the benchmark."""

PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0), (174, 199, 232), (152, 223, 138), (31, 119, 180), (255, 187, 120), (188, 189, 34), (140, 86, 75),
    (255, 152, 150), (214, 39, 40), (197, 176, 213), (148, 103, 189), (196, 156, 148), (23, 190, 207), (178, 76, 76),
    (247, 182, 210), (66, 188, 102), (219, 219, 141), (140, 57, 197), (202, 185, 52), (51, 176, 203), (200, 54, 131),
    (92, 193, 61), (78, 71, 183), (172, 114, 82), (255, 127, 14), (91, 163, 138), (153, 98, 156), (140, 153, 101),
    (158, 218, 229), (100, 125, 154), (178, 127, 135), (120, 185, 128), (146, 111, 194), (44, 160, 44),
    (112, 128, 144), (96, 207, 209), (227, 119, 194), (213, 92, 176), (94, 106, 211), (82, 84, 163), (100, 85, 144),
)  # fmt: skip
"""ScanNet's colours of the NYU40 ids."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """A room of the release.

    Args:
        nyu40: ids of the surfaces, in the order of `world.NAMES`.
        yaw, shift: the room in the house, radians and metres.
        stand: of the panorama, in the room.
        looks: position id -> (place, yaw, pitch, roll) of the perspectives, in the room.
    """

    scene: str
    room: str
    kind: str
    nyu40: Ids
    yaw: float
    shift: tuple[float, float, float]
    stand: tuple[float, float, float]
    looks: Mapping[str, tuple[tuple[float, float, float], float, float, float]]

    @property
    def name(self) -> str:
        return f"{self.scene}_room_{self.room}"

    @property
    def split(self) -> str:
        number = int(self.scene[-5:])
        return "train" if number < 3000 else "val" if number < 3250 else "test"

    def house_from_room(self, world: World) -> Array:
        """[4, 4], metres; level, and with the floor at 0."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        matrix = np.eye(4)
        matrix[:2, :2] = [[c, -s], [s, c]]
        matrix[:3, 3] = np.array(self.shift) * world.scale
        return matrix

    def ids(self, surface: NDArray[np.int64], places: Array, world: World) -> NDArray[np.uint8]:
        """NYU40 ids of places on surfaces: a strip of the ceiling is unlabelled, a corner of `far` a window."""
        ids = np.array(self.nyu40, dtype=np.uint8)[surface]
        ids[(surface == bed.NAMES.index("ceiling")) & (places[..., 0] > 1.6 * world.scale)] = UNLABELLED
        ids[no_reading(surface, places, world)] = WINDOW
        return ids

    def instances(self, surface: NDArray[np.int64]) -> NDArray[np.int32]:
        """Instance of every surface: those of a house are numbered through."""
        first = 10 * (1 + sum(r.scene == self.scene and r.room < self.room for r in ROOMS))
        return np.array([BACKGROUND] * 6 + [first, first + 1], dtype=np.int32)[surface]


ROOMS: tuple[Room, ...] = (
    Room(
        scene="scene_00000", room="485142", kind="living room", nyu40=(2, 22, 1, 16, 8, 1, 25, 10),
        yaw=0.62, shift=(-6.4, 9.1, 0.0), stand=(-0.1, 2.65, 1.25),
        looks={
            "0": ((0.2, 0.5, 1.45), 0.1, 0.12, 0.0),
            "1": ((-1.9, 2.6, 1.3), -1.9, 0.1, 0.02),
            "3": ((-1.2, 0.9, 1.5), -0.9, 0.35, -0.03),
        },
    ),
    Room(
        scene="scene_00000", room="490854", kind="bedroom", nyu40=(2, 22, 1, 17, 38, 1, 19, 4),
        yaw=-1.37, shift=(4.2, -3.7, 0.0), stand=(-0.1, 2.6, 1.3), looks={},
    ),
    Room(
        scene="scene_03120", room="830662", kind="kitchen", nyu40=(2, 22, 1, 24, 15, 3, 12, 34),
        yaw=2.81, shift=(12.3, 5.6, 0.0), stand=(-0.2, 2.5, 1.25),
        looks={"0": ((0.9, 0.6, 1.4), 0.35, 0.15, 0.02), "2": ((-1.6, 1.2, 1.2), -1.2, 0.05, 0.0)},
    ),
    Room(
        scene="scene_03250", room="1517", kind="undefined", nyu40=(20, 22, 39, 1, 8, 32, 35, 40),
        yaw=-2.05, shift=(-0.8, -14.9, 0.0), stand=(0.0, 2.6, 1.2),
        looks={"0": ((-0.3, 0.4, 1.5), -0.1, 0.1, -0.02), "1": ((-1.7, 2.2, 1.4), -1.6, 0.2, 0.0)},
    ),
)  # fmt: skip
ERRATA = (("scene_03398", "512"), ("scene_03120", "830640"))
"""A room of an invalid scene, and an invalid room of a scene that is valid otherwise."""

NOT_DOWNLOADED = ("scene_00201", "22735")
"""`_annotation_3d.zip` and `_bbox.zip` span all scenes, so they unpack beside renderings nobody downloaded."""

NEVER_RELEASED = ("scene_01600", "2371")
"""A room whose perspectives are in no archive, though their instances are in `_bbox.zip`."""


def write(
    root: Path,
    *,
    world: World | None = None,
    size: Size = (320, 180),
    panorama_size: Size = (384, 192),
    packing: Literal["merged", "apart", "zip"] = "merged",
    leave_out: Collection[str] = (),
    errata: bool = True,
    flying: bool = False,
    never_released: bool = False,
    points: int = 8_000,
    seed: int = 0,
) -> list[Truth]:
    """Write four rooms of three houses (train, val, test), and return what is true of them.

    There is no point file, so that the rows of a `Truth` are places that depth maps show or might; `truth_at` gives
    the truth of any others. Coordinates are metres of the house's own frame. Channels: `color`, `normal` (either
    sign), `instance` (-1: none), `certain` (no other class within 5 mm), `room_from_dataset` [4, 4], and by surface
    `nyu40_of_surface`, `label_of_surface`.

    Args:
        root: gets `Structured3D/` (merged), `Structured3D_panorama_00/Structured3D/` and so on (apart), or ZIP files.
        world: the room, the same one everywhere.
        size, panorama_size: width and height of images; the release has 1280 x 720 and 1024 x 512.
        packing: how the downloads lie on the disk.
        leave_out: downloads that are not there: panorama, perspective_full, perspective_empty, annotation_3d, bbox.
        errata: add rooms that the errata call invalid, and a house of which there are annotations only.
        flying: antialias depth, as the release does: the borders of objects then lie in mid-air.
        never_released: add `NEVER_RELEASED`, otherwise like the first room; it has no truth of its own.
        points: number of places per room, before those without a reading are dropped.
        seed: of the places.
    """
    world = world or World()
    files: Files = {}
    truths = []
    for i, room in enumerate(ROOMS):
        eyes = _eyes(room, world, size, panorama_size, 1)
        fine = _eyes(room, world, size, panorama_size, 2) if flying else eyes
        for name, eye in eyes.items():
            _add_view(files, room, world, name, eye, fine[name].rays()[1] if flying else None)
        # A panorama alone sees few places clearly: its patches span many degrees.
        places, surface = world.points(points * (1 if room.looks else 3), seed + i)
        keep = ~no_reading(surface, places, world)
        truths.append(_truth(room, world, eyes, places[keep], surface[keep]))
    for scene in dict.fromkeys(room.scene for room in ROOMS):
        _add_annotations(files, scene, [room for room in ROOMS if room.scene == scene], world)
    if errata:
        for scene, room_id in ERRATA:
            _repeat(files, ROOMS[-1], scene, room_id)
        _repeat(files, ROOMS[0], *NOT_DOWNLOADED, only=("annotation_3d", "bbox"))
    if never_released:
        _repeat(files, ROOMS[0], *NEVER_RELEASED, only=("annotation_3d", "bbox", "panorama"))
    _store(root, {name: content for name, content in files.items() if name not in leave_out}, packing)
    return truths


def truth_at(truth: Truth, coord: Array, world: World) -> Truth:
    """The truth of other points, at `coord` [N, 3] metres in the house: labels by the surface that each lies on.

    Points off every surface have the label "" and channel `certain` false, and so have those close to two classes.
    """
    room = next(room for room in ROOMS if room.name == truth.sample_id)
    matrix = truth.channels["room_from_dataset"].astype(np.float64)
    places = coord.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
    return _truth(room, world, truth.eyes, places, world.surface_of(places))


# --- truth ----------------------------------------------------------------------------------------------------------


def _eyes(room: Room, world: World, size: Size, panorama_size: Size, finer: int) -> dict[str, Eye]:
    """True cameras by path below the room's folder, in images `finer` times larger."""
    width, height = size[0] * finer, size[1] * finer
    fx, fy = width / 2 / np.tan(XFOV), height / 2 / np.tan(_yfov(size))

    def to_ray(u: Array, v: Array) -> Array:  # `bed.pinhole` would solve for distortions, which takes a second
        return np.stack([(u - width / 2) / fx, (v - height / 2) / fy, np.ones_like(u)], axis=-1)

    eyes = {}
    for position, (place, yaw, pitch, roll) in room.looks.items():
        stand = bed.pose((place[0] * world.scale, place[1] * world.scale, place[2] * world.scale), yaw, pitch, roll)
        eye = bed.pinhole(width, height, fx, fy, width / 2, height / 2, stand)
        eyes[f"perspective/full/{position}"] = replace(eye, to_ray=to_ray)
    # Level in the house, the middle column along its +y: not along the room's.
    camera_from_house = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    stand = camera_from_house @ room.house_from_room(world)
    stand[:3, 3] = -stand[:3, :3] @ (np.array(room.stand) * world.scale)
    eyes["panorama/full"] = bed.panorama(panorama_size[0] * finer, panorama_size[1] * finer, stand)
    return eyes


def _yfov(size: Size) -> float:
    return round(float(np.arctan(np.tan(np.radians(40)) * size[1] / size[0])), 6)  # 0.440992 at 16:9


def no_reading(surface: NDArray[np.int64], places: Array, world: World) -> NDArray[np.bool_]:
    """Where depth is 0: beyond the window in a corner of `far`."""
    p = places / world.scale
    return (surface == bed.NAMES.index("far")) & (p[..., 0] > 1.5) & (p[..., 2] > 2.3)


def _truth(room: Room, world: World, eyes: Mapping[str, Eye], places: Array, surface: NDArray[np.int64]) -> Truth:
    house_from_room, on, p = room.house_from_room(world), surface >= 0, places / world.scale
    instance = room.instances(surface)
    near = np.zeros(len(p), dtype=int)
    for _, corners in World().quads():
        near += ((p > corners.min(axis=0) - 0.005) & (p < corners.max(axis=0) + 0.005)).all(axis=1)
    ids = room.ids(surface, places, world)
    shifts = 0.005 * world.scale * np.array([(1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1)])
    alike = np.all([room.ids(surface, places + shift, world) == ids for shift in shifts], axis=0)
    channels = {
        "color": np.rint(world.color(places)).astype(np.uint8),
        "normal": (_axes()[surface] @ house_from_room[:3, :3].T).astype(np.float32),
        "instance": np.where(on & (instance != BACKGROUND), instance, -1).astype(np.int32),
        "certain": on & (near == 1) & alike,
        "room_from_dataset": np.linalg.inv(house_from_room),
        "nyu40_of_surface": np.array(room.nyu40, dtype=np.int32),
        "label_of_surface": _labels(np.array(room.nyu40)),
    }
    coord = places @ house_from_room[:3, :3].T + house_from_room[:3, 3]
    label = np.where(on, _labels(ids), "")
    return Truth(
        sample_id=room.name,
        split=room.split,
        world=places,
        coord=coord,
        label=label,
        eyes=dict(eyes),
        channels=channels,
    )


def _labels(ids: NDArray[Any]) -> NDArray[np.str_]:
    """Names of NYU40 ids, "" for those that the benchmark ignores."""
    return np.array([CLASSES25.get(i, "") for i in range(len(PALETTE))])[ids]


def _axes() -> Array:
    """[8, 3] normals of the surfaces, in the room."""
    return np.array([np.ptp(corners, axis=0) == 0 for _, corners in World().quads()], dtype=np.float64)


# --- views ----------------------------------------------------------------------------------------------------------


def _add_view(files: Files, room: Room, world: World, name: str, eye: Eye, fine: Array | None) -> None:
    """All images of one panorama or perspective, in all configurations that the release has, and its texts."""
    folder, level = f"{room.scene}/2D_rendering/{room.room}", name.startswith("panorama")
    matrix, rays = room.house_from_room(world), eye.rays()[1]
    place = 1000 * (matrix[:3, :3] @ eye.origin + matrix[:3, 3])
    for configuration, hidden in HIDDEN.items():
        if configuration == "simple" and not level:
            continue
        download = "panorama" if level else f"perspective_{configuration}"
        below = f"{folder}/{name.replace('full', configuration)}"
        images = _images(room, world, eye, rays, fine, hidden, level)
        if configuration == "full":
            files.setdefault("bbox", {})[f"{below}/instance.png"] = images["instance.png"]
        del images["instance.png"]
        if not level:
            _, down, forward = (matrix[:3, :3] @ eye.camera_from_world[:3, :3].T).T
            numbers = (*place, *forward, *-down, XFOV, _yfov((eye.width, eye.height)), 1)
            images["camera_pose.txt"] = _text(numbers)
            images["layout.json"] = json.dumps(_perspective_layout(room, world, eye)).encode()
        files.setdefault(download, {}).update({f"{below}/{file}": data for file, data in images.items()})
    if level:
        files["panorama"][f"{folder}/panorama/camera_xyz.txt"] = _text(place)
        files["panorama"][f"{folder}/panorama/layout.txt"] = _panorama_layout(world, eye)


def _text(numbers: Collection[float]) -> bytes:
    return (" ".join(f"{number:g}" for number in numbers) + "\n").encode()


def _images(
    room: Room, world: World, eye: Eye, rays: Array, fine: Array | None, hidden: tuple[int, ...], along_ray: bool
) -> dict[str, bytes]:
    """File name -> PNG."""
    surface, places, depth = _shoot(world, eye, rays, hidden, along_ray)
    color = np.rint(world.color(places)).astype(np.uint8)
    if fine is not None:
        depth = _shoot(world, eye, fine, hidden, along_ray)[2]
        depth = depth.reshape(eye.height, 2, eye.width, 2).mean(axis=(1, 3))
    millimetres = np.where(no_reading(surface, places, world), 0, np.rint(1000 * depth)).astype(np.uint16)
    semantic = Image.frombytes("P", (eye.width, eye.height), room.ids(surface, places, world).tobytes())
    semantic.putpalette(bytes(np.array(PALETTE, dtype=np.uint8)))
    facing = _axes()[surface]
    facing *= -np.sign((facing * (places - eye.origin)).sum(axis=-1, keepdims=True))
    right, down, forward = np.moveaxis(facing @ eye.camera_from_world[:3, :3].T, -1, 0)
    # Along the view, up, left. The documented direction of a panorama is -y: behind its middle column.
    normal = np.stack([-forward, -down, right] if along_ray else [forward, -down, -right], axis=-1)
    images = {
        "rgb_rawlight.png": _rgba(color),
        "albedo.png": _rgba(255 - color // 2),
        "depth.png": _png(millimetres),
        "normal.png": _png((128 * (1 + normal)).clip(0, 255).astype(np.uint8)),
        "semantic.png": _png(semantic),
        "instance.png": _png(room.instances(surface).astype(np.uint16)),
    }
    if along_ray:
        images["rgb_coldlight.png"] = _rgba((color * (0.7, 0.8, 1.0)).astype(np.uint8))
        images["rgb_warmlight.png"] = _rgba((color * (1.0, 0.8, 0.6)).astype(np.uint8))
    return images


def _shoot(
    world: World, eye: Eye, rays: Array, hidden: tuple[int, ...], along_ray: bool
) -> tuple[NDArray[np.int64], Array, Array]:
    """Surface, place in the room and depth at the end of every ray, as if the surfaces `hidden` were not there."""
    origin = eye.origin
    surface, distance = world.cast(origin, rays)
    while (through := np.isin(surface, hidden)).any():
        start = distance[through] + 1e-6 * world.scale
        surface[through], more = world.cast(origin + rays[through] * start[:, None], rays[through])
        distance[through] = start + more
    hit = rays * distance[..., None]
    depth = np.linalg.norm(hit, axis=-1) if along_ray else hit @ eye.camera_from_world[2, :3]
    return surface, origin + hit, depth


def _rgba(color: NDArray[np.uint8]) -> bytes:
    return _png(np.concatenate([color, np.full_like(color[..., :1], 255)], axis=-1))


def _png(image: Image.Image | NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# --- annotations ----------------------------------------------------------------------------------------------------


def _shell(room: Room, world: World) -> tuple[Array, list[tuple[int, int]], list[dict[str, Any]], list[list[int]]]:
    """Junctions [8, 3] in mm of the house, lines between them, planes, and for each plane whether lines are on it."""
    matrix, quads = room.house_from_room(world), [corners for _, corners in world.quads()]
    box = np.concatenate(quads[:2])
    corners = 1000 * (box @ matrix[:3, :3].T + matrix[:3, 3])
    lines = [(a, b) for b in range(8) for a in range(b) if (box[a] != box[b]).sum() == 1]
    planes, incidence = [], []
    for i, axis in enumerate(_axes()[:6]):
        height = quads[i][0] @ axis
        inward = matrix[:3, :3] @ axis * np.sign(box.mean(axis=0) @ axis - height)
        # normal . x + offset = 0, as devkit visualize_3d.py solves it
        offset = -float(inward @ corners[np.argmin(np.abs(box @ axis - height))])
        kind = bed.NAMES[i] if i < 2 else "wall"
        planes.append({"ID": i, "type": kind, "normal": inward.tolist(), "offset": offset})
        incidence.append([int(all(box[j] @ axis == height for j in line)) for line in lines])
    return corners, lines, planes, incidence


def _add_annotations(files: Files, scene: str, rooms: list[Room], world: World) -> None:
    """`annotation_3d.json` and `bbox_3d.json` of a house."""
    known: dict[str, list[Any]] = {key: [] for key in ("junctions", "lines", "planes", "semantics", "cuboids")}
    plane_line, line_junction = (np.zeros((n * len(rooms), m * len(rooms)), dtype=int) for n, m in ((6, 12), (12, 8)))
    for i, room in enumerate(rooms):
        corners, lines, planes, incidence = _shell(room, world)
        known["junctions"] += [{"ID": 8 * i + k, "coordinate": corner.tolist()} for k, corner in enumerate(corners)]
        for k, (a, b) in enumerate(lines):
            direction = (corners[b] - corners[a]) / np.linalg.norm(corners[b] - corners[a])
            line = {"ID": 12 * i + k, "point": corners[a].tolist(), "direction": direction.tolist()}
            known["lines"].append(line)
            line_junction[12 * i + k, [8 * i + a, 8 * i + b]] = 1
        known["planes"] += [plane | {"ID": 6 * i + plane["ID"]} for plane in planes]
        plane_line[6 * i : 6 * i + 6, 12 * i : 12 * i + 12] = incidence
        ids = list(range(6 * i, 6 * i + 6))
        known["semantics"].append({"ID": int(room.room), "type": room.kind, "planeID": ids})
        known["cuboids"].append({"ID": i, "planeID": ids})
    walls = [plane["ID"] for plane in known["planes"] if plane["type"] == "wall"]
    known["semantics"].append({"ID": 0, "type": "outwall", "planeID": walls})
    matrices = {"planeLineMatrix": plane_line.tolist(), "lineJunctionMatrix": line_junction.tolist()}
    annotation = json.dumps(known | matrices | {"manhattan": known["cuboids"]})
    files.setdefault("annotation_3d", {})[f"{scene}/annotation_3d.json"] = annotation.encode()
    boxes = json.dumps([box for room in rooms for box in _boxes(room, world)])
    files.setdefault("bbox", {})[f"{scene}/bbox_3d.json"] = boxes.encode()


def _boxes(room: Room, world: World) -> list[dict[str, Any]]:
    """Boxes of the furniture: rows of `basis` are axes, `coeffs` half sizes, all in mm of the house."""
    matrix, boxes = room.house_from_room(world), []
    for i, (_, corners) in list(enumerate(world.quads()))[6:]:
        centroid = 1000 * (matrix[:3, :3] @ corners.mean(axis=0) + matrix[:3, 3])
        coeffs = 500 * np.ptp(corners, axis=0) + 1
        box = {"ID": int(room.instances(np.array(i))), "basis": matrix[:3, :3].T.tolist()}
        boxes.append(box | {"coeffs": coeffs.tolist(), "centroid": centroid.tolist()})
    return boxes


def _panorama_layout(world: World, eye: Eye) -> bytes:
    """Ceiling and floor pixel of every corner of the room, from left to right."""
    (_, floor), (_, ceiling) = list(world.quads())[:2]
    u, v, _ = eye.project(np.concatenate([ceiling, floor]))
    order = np.argsort(u[:4])
    return "".join(f"{u[i]:.0f} {v[i]:.0f}\n{u[i]:.0f} {v[i + 4]:.0f}\n" for i in order).encode()


def _perspective_layout(room: Room, world: World, eye: Eye) -> dict[str, Any]:
    """Corners of the room in the image, and the planes of its shell in the camera's frame, in mm."""
    camera_from_house = eye.camera_from_world @ np.linalg.inv(room.house_from_room(world))
    u, v, seen = eye.project(np.concatenate([corners for _, corners in world.quads()][:2]))
    planes = []
    for plane in _shell(room, world)[2]:
        normal = camera_from_house[:3, :3] @ plane["normal"]
        offset = plane["offset"] - 1000 * float(normal @ camera_from_house[:3, 3])
        planes.append(plane | {"visible_mask": [], "amodal_mask": [], "normal": normal.tolist(), "offset": offset})
    pixels = {i: [round(u[i]), round(v[i])] for i in np.flatnonzero(seen).tolist()}
    junctions = [{"ID": i, "coordinate": pixel, "isvisible": True} for i, pixel in pixels.items()]
    return {"junctions": junctions, "planes": planes}


# --- downloads ------------------------------------------------------------------------------------------------------


def _repeat(files: Files, room: Room, scene: str, room_id: str, only: Collection[str] = ()) -> None:
    """Another room with the very files of `room`; a house of its own gets the annotations, too."""
    new_house = all(scene != known.scene for known in ROOMS)
    old, new = f"{room.scene}/2D_rendering/{room.room}/", f"{scene}/2D_rendering/{room_id}/"
    for download, content in files.items():
        if only and download not in only:
            continue
        for path in list(content):
            if path.startswith(old):
                content[path.replace(old, new)] = content[path]
            elif new_house and path.startswith(f"{room.scene}/") and path.endswith("_3d.json"):
                content[path.replace(room.scene, scene)] = content[path]


def _store(root: Path, files: Files, packing: str) -> None:
    """Every download's files, at `Structured3D/` of the folder that it is unpacked into, or in ZIP files."""
    for download, content in files.items():
        for path, data in content.items():
            number = "" if download in ("annotation_3d", "bbox") else f"_{int(path[6:11]) // 200:02d}"
            archive = f"Structured3D_{download}{number}"
            if packing == "zip":
                root.mkdir(parents=True, exist_ok=True)
                with zipfile.ZipFile(root / f"{archive}.zip", "a") as file:
                    file.writestr(f"Structured3D/{path}", data)
                continue
            target = root / (archive if packing == "apart" else "") / "Structured3D" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
