"""Writer of `posed` captures: posed images by nerfstudio, Instant-NGP or COLMAP, and a point cloud beside them.

Facts and their sources; nerfstudio at 50e0e3c, COLMAP at 5d968cf, Instant-NGP at abe236e, all read in the sources:

- nerfstudio `docs/quickstart/data_conventions.md`: `transform_matrix` is camera-to-world with OpenGL axes; depth is 16
  or 32 bit, millimetres, 0 unknown, resized to the image; intrinsics stand at the top or in every frame. `cameras.py`:
  the centre of pixel 0 is at 0.5; equirectangular with fl_x = w/2 and fl_y = h has -z in the middle.
- `nerfstudio_dataparser.py`: `distortion_params` in the file or in frames are k1 to k4, p1, p2, and win over `k1` etc.
- `process_data/colmap_utils.py`: `applied_transform` takes the original world to the saved one; poses and the points of
  `ply_file_path` both are saved ones, `colmap/sparse/0` beside stays original. With several COLMAP cameras all
  intrinsics, `camera_model` too, move into the frames. `nerfstudio_dataparser.py` agrees, and uses `*_filenames`.
- Instant-NGP `nerf_loader.cu`, `colmap2nerf.py`: `camera_angle_x` is the full angle, in radians; `is_fisheye` instead
  of `camera_model`; w and h are floats; names may lack the suffix; `scale` and `offset` are settings, poses come before
  them; `depth_path` with `integer_depth_scale` metres per unit, of any size (`nerfcapture2nerf.py`: 10 / 65535).
- COLMAP `doc/format.rst`, `reconstruction_io_{binary,text}.cc`, `sensor/models.h`: quaternion w, x, y, z of
  camera-from-world, pixel centres at 0.5, model ids and parameters; an image without keypoints has an empty line in
  text, names stand raw at the end of their line; `rigs` and `frames` hold nothing that `images` lacks. Dense:
  `sparse` without `0`, `fused.ply`, depth maps `width&height&1&` + float32 along z. `depths/NAME.png` in millimetres is
  nerfstudio's `colmap_dataparser.py`.

Our own choices, for no standard exists: `labels.npy|txt` and `point_cloud.*` lie in the capture, `classes.txt` (a class
per line in order of label, then its colour) or `classes.json` at the root, `train.txt|val.txt|test.txt` with ids of
captures at the root. Labels that no class has are ignored. A cloud that `ply_file_path` names is in the saved world,
any other in the original one. Depth of panoramas is along the ray (nerfstudio says nothing).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from layouts.clouds import CLASS_OF, Cloud, label_ids, write_classes, write_label_file
from world import NAMES, Array, Eye, Truth, World, distorted, fisheye, panorama, pose

COLMAP_MODELS: dict[
    str, tuple[int, tuple[float, ...]]
] = {  # id of the model, distortion in the order of its parameters
    "SIMPLE_PINHOLE": (0, ()),
    "PINHOLE": (1, ()),
    "SIMPLE_RADIAL": (2, (-0.1,)),
    "RADIAL": (3, (-0.22, 0.06)),
    "OPENCV": (4, (-0.25, 0.07, 0.002, -0.003)),
    "OPENCV_FISHEYE": (5, (0.15, -0.03, 0.004, -0.0004)),
    "FULL_OPENCV": (6, (0.05, -0.02, 0.001, -0.002, 0.005, 0.15, 0.02, 0.003)),
    "SIMPLE_RADIAL_FISHEYE": (8, (0.12,)),
    "RADIAL_FISHEYE": (9, (0.15, -0.03)),
    "SIMPLE_FISHEYE": (14, ()),
    "FISHEYE": (15, ()),
    "EQUIRECTANGULAR": (17, ()),
}
NERFSTUDIO_MODELS = (
    "SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE", "EQUIRECTANGULAR",
)  # fmt: skip
APPLIED_TRANSFORM = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""What `ns-process-data` applies to COLMAP's world."""

_STANDS = (  # position, yaw, pitch, roll
    ((-0.9, 0.5, 1.5), 0.12, 0.22, 0.05),
    ((0.9, 0.45, 1.3), -0.3, 0.1, -0.06),
    ((0.0, 0.9, 1.8), 0.03, 0.5, 0.0),
    ((-1.6, 0.8, 1.2), -0.85, 0.12, 0.08),
)
_PANORAMA_STANDS = (  # few and near the board: else some sees behind it
    ((0.1, 1.9, 1.35), 0.4, 0.06, 0.03),
    ((-0.3, 1.7, 1.2), -2.0, -0.08, 0.05),
)


@dataclass(frozen=True)
class _Lens:
    """Intrinsics of one image size; `k` in the order of COLMAP's parameters of the model."""

    model: str
    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    k: tuple[float, ...]

    def eye(self, camera_from_room: Array) -> Eye:
        if self.model == "EQUIRECTANGULAR":
            return panorama(self.width, self.height, camera_from_room)
        numbers = (self.width, self.height, self.fx, self.fy, self.cx, self.cy)
        if "FISHEYE" in self.model:
            return fisheye(*numbers, (*self.k, *(0.0,) * (4 - len(self.k))), camera_from_room)
        return distorted(*numbers, self.k, camera_from_room)

    def halved(self) -> _Lens:
        sizes = {name: getattr(self, name) / 2 for name in ("fx", "fy", "cx", "cy")}
        return replace(self, width=self.width // 2, height=self.height // 2, **sizes)

    def colmap(self) -> tuple[float, ...]:
        """Parameters in COLMAP's order."""
        if self.model == "EQUIRECTANGULAR":
            return (self.width, self.height)
        focal = (self.fx,) if self.model in _SINGLE_FOCAL else (self.fx, self.fy)
        return (*focal, self.cx, self.cy, *self.k)

    def named(self) -> dict[str, Any]:
        """Intrinsics by nerfstudio's keys; those of models without distortion are left out, as people do."""
        names = ("k1", "k2", "k3", "k4") if "FISHEYE" in self.model else ("k1", "k2", "p1", "p2")
        keys = {"w": self.width, "h": self.height, "fl_x": self.fx, "fl_y": self.fy, "cx": self.cx, "cy": self.cy}
        return keys | dict(zip(names, self.k, strict=False))


_SINGLE_FOCAL = {name for name in COLMAP_MODELS if name.startswith(("SIMPLE_", "RADIAL"))}


def _lens(model: str, which: int) -> _Lens:
    """One of two cameras, which differ in size and focal length."""
    k = COLMAP_MODELS[model][1]
    width, height = ((320, 240), (256, 192))[which]
    if model == "EQUIRECTANGULAR":
        width, height = ((480, 240), (384, 192))[which]
        return _Lens(model, width, height, width / 2, float(height), width / 2, height / 2, k)
    fx = width * (0.48 if "FISHEYE" in model else 0.66 if k else 0.78) * (1.0, 0.93)[which]
    fy = fx if model in _SINGLE_FOCAL else 1.025 * fx
    return _Lens(model, width, height, fx, fy, 0.485 * width, 0.51 * height, k)


def write(
    root: Path,
    *,
    world: World = World(),  # noqa: B008
    kind: str = "nerfstudio",
    model: str = "OPENCV",
    binary: bool = True,
    points: str = "ply",
    depth: bool = False,
    labels: bool = True,
    applied_transform: bool = False,
    per_frame_intrinsics: bool = False,
    distortion_list: bool = False,
    listed: bool | None = None,
    rig: bool = True,
    dense: bool = False,
    label_name: str | None = None,
    label_file: str | None = None,
    classes: str = "txt",
    names: Sequence[str] = ("hall", "site b/Büro 2.1 (east)"),
    split_lists: bool = True,
    origin: tuple[float, float, float] = (312.4, -148.9, 27.3),
    count: int = 8_000,
) -> list[Truth]:
    """Write captures below `root`.

    Args:
        root: folder that holds the captures.
        world: the room.
        kind: 'nerfstudio', 'ngp' (Blender's keys without distortion, `colmap2nerf.py`'s with it) or 'colmap'.
        model: of all cameras, a key of `COLMAP_MODELS`; nerfstudio and ngp know `NERFSTUDIO_MODELS` (ngp no panoramas).
        binary: COLMAP's `.bin` files, binary PLY, binary PCD; else text.
        points: 'ply', 'las', 'laz' (needs laspy with lazrs), 'pcd', 'pcd-compressed'.
        depth: write depth maps; those of every second capture are half as large as the images.
        labels: write labels and `classes.*`.
        applied_transform: nerfstudio's, with COLMAP's model in the original world beside.
        per_frame_intrinsics: two cameras, whose intrinsics stand in the frames. COLMAP always has two.
        distortion_list: nerfstudio's `distortion_params` instead of single keys.
        listed: `ply_file_path` names the cloud, which then is in the saved world. Default: for PLY and PCD.
        rig: newer COLMAP's `rigs` and `frames`.
        dense: COLMAP's dense workspace, `fused.ply` and depth maps of its own; only without distortion.
        label_name: of PLY's property (default 'label'; a float if it starts with 'scalar_'), of LAS's extra bytes
            (default: the classification).
        label_file: 'npy' or 'txt': labels in a file instead of a property.
        classes: 'txt' or 'json'.
        names: of the captures, which go to train, val, test in turn; "" is the root itself.
        split_lists: write `train.txt`, ... at the root; without, all captures are train.
        origin: of the room in the captures' world; far away, coordinates are doubles.
        count: number of points.
    """
    if model not in (COLMAP_MODELS if kind == "colmap" else NERFSTUDIO_MODELS[: 6 if kind == "ngp" else 7]):
        raise ValueError(f"{kind} has no model {model}")
    if dense and (kind != "colmap" or "PINHOLE" not in model or points != "ply"):
        raise ValueError("a dense workspace is COLMAP's, without distortion, and has a PLY")
    splits = ["train", "val", "test"] if split_lists else ["train"]
    ids = label_ids(classes, points, label_name, label_file)
    truths = []
    for i, name in enumerate(names):
        capture = root / name
        capture.mkdir(parents=True, exist_ok=True)
        shots = _Shots(capture, world, model, i, _data_from_room(i, origin), kind, per_frame_intrinsics)
        shots.write_images(unregistered=not dense)
        saved_from_data = APPLIED_TRANSFORM if applied_transform and kind == "nerfstudio" else np.eye(4)
        named = (points in ("ply", "pcd", "pcd-compressed") if listed is None else listed) and kind != "colmap"
        places, surface = world.points(count, seed=i)
        file_from_room = (saved_from_data if named else np.eye(4)) @ shots.data_from_room
        cloud = Cloud(places, surface, world, file_from_room, ids, labels and label_file is None, label_name)
        stem = "fused" if dense else "sparse_pc" if applied_transform and named else "point_cloud"
        coord, channels, file_name = cloud.write(capture, stem, points, binary)
        label = np.array([CLASS_OF[NAMES[s]] for s in surface])
        if labels and label_file is not None:
            write_label_file(capture, label_file, [ids[of] for of in label])
        if kind == "colmap":
            sparse = capture / ("sparse" if dense else "sparse/0")
            _write_colmap(sparse, shots, places, binary=binary, rig=rig)
            if depth or dense:
                _write_colmap_depth(capture, shots, dense=dense, depth=depth, count=count)
        else:
            path = file_name if named else None
            settings = {"depth": depth, "applied": applied_transform, "distortion_list": distortion_list}
            _write_transforms(capture, shots, saved_from_data, path, **settings)
            if applied_transform and kind == "nerfstudio":
                _write_colmap(capture / "colmap/sparse/0", shots, places, binary=binary, rig=rig)
        truth = Truth(
            sample_id=name or root.name, split=splits[i % len(splits)], world=places, coord=coord,
            label=label if labels else None, eyes=shots.eyes, channels=channels,
        )  # fmt: skip
        truths.append(truth)
    if labels:
        write_classes(root, classes, ids)
    if split_lists:
        for split in splits:
            lines = [truth.sample_id + "\n" for truth in truths if truth.split == split]
            if lines:
                (root / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return truths


def _data_from_room(i: int, origin: tuple[float, float, float]) -> Array:
    """The capture's world: turned about all axes, far from the room's origin."""
    matrix = np.eye(4)
    matrix[:3, :3] = pose((0, 0, 0), yaw=1.1 + 0.9 * i, pitch=-0.4 + 0.5 * i, roll=0.3)[:3, :3]
    matrix[:3, 3] = np.array(origin) + np.array([41.0, -23.0, 3.5]) * i
    return matrix


# --- images ---------------------------------------------------------------------------------------------------------


class _Shots:
    """The images of a capture: names, lenses, true cameras, poses in the capture's world."""

    def __init__(
        self, capture: Path, world: World, model: str, i: int, data_from_room: Array, kind: str, per_frame: bool
    ) -> None:
        self.capture, self.world, self.kind, self.index, self.data_from_room = capture, world, kind, i, data_from_room
        self.per_frame = per_frame or kind == "colmap"
        stands = _PANORAMA_STANDS if model == "EQUIRECTANGULAR" else _STANDS
        count = len(stands)
        self.lenses = [_lens(model, n % 2 if self.per_frame else i % 2) for n in range(count)]
        if kind == "ngp" and "PINHOLE" in model:  # camera_angle_x says no more than this
            centre = [(lens.width / 2, lens.height / 2) for lens in self.lenses]
            self.lenses = [replace(a, fy=a.fx, cx=x, cy=y) for a, (x, y) in zip(self.lenses, centre, strict=True)]
        if kind == "colmap":
            folders, suffixes = ("cam left", "cam-right/ö"), ("jpg", "JPG")
            self.names = [f"{folders[n % 2]}/IMG {n + 1:04d}.{suffixes[n % 2]}" for n in range(count)]
        else:
            self.names = [f"frame_{n + 1:05d}.png" for n in range(count)]
        self.from_room = [pose(tuple(world.scale * np.array(at)), *angles) for at, *angles in stands]
        pairs = zip(self.names, self.lenses, self.from_room, strict=True)
        self.eyes: Mapping[str, Eye] = {name: _remembering(lens.eye(matrix)) for name, lens, matrix in pairs}
        self.from_data = [matrix @ np.linalg.inv(data_from_room) for matrix in self.from_room]

    def write_images(self, *, unregistered: bool) -> None:
        """`images/`, and what lies beside: a smaller copy of nerfstudio's, a photo that COLMAP could not register."""
        for name, eye in self.eyes.items():
            image = Image.fromarray(self.world.image(eye))
            _save(image, self.capture / "images" / name)
            if self.kind == "nerfstudio":
                _save(image.reduce(2), self.capture / "images_2" / name)
        if self.kind == "colmap" and unregistered:
            _save(Image.new("RGB", (320, 240), (90, 90, 90)), self.capture / "images/cam left/IMG 0099.jpg")

    def depth(self, n: int, *, full_size: bool = False) -> Array:
        """Depth map of image `n` in metres; of every second capture half as large."""
        half = self.index % 2 == 1 and not full_size
        eye = self.lenses[n].halved().eye(self.from_room[n]) if half else self.eyes[self.names[n]]
        return self.world.depth(eye, along_ray=self.lenses[n].model == "EQUIRECTANGULAR")


def _remembering(eye: Eye) -> Eye:
    """The same eye, which finds the rays of its pixels once: that takes most of a test's time."""
    known: dict[bytes, Array] = {}

    def to_ray(u: Array, v: Array) -> Array:
        key = u.tobytes() + v.tobytes()
        if key not in known:
            known[key] = eye.to_ray(u, v)
        return known[key]

    return replace(eye, to_ray=to_ray)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".jpg":
        image.save(path, quality=98, subsampling=0)
    else:
        image.save(path)


def _save_depth(depth: Array, unit: float, path: Path) -> None:
    _save(Image.fromarray(np.rint(depth / unit).astype(np.uint16)), path)


# --- nerfstudio and Instant-NGP -------------------------------------------------------------------------------------


def _write_transforms(
    capture: Path,
    shots: _Shots,
    saved_from_data: Array,
    cloud: str | None,
    *,
    depth: bool,
    applied: bool,
    distortion_list: bool,
) -> None:
    ngp, dots = shots.kind == "ngp", "./" if shots.index % 2 else ""
    unit = 10 * shots.world.scale / 65535 if ngp else 1e-3
    frames = []
    for n, name in enumerate(shots.names):
        saved_from_camera = saved_from_data @ np.linalg.inv(shots.from_data[n])
        saved_from_camera[:, 1:3] *= -1  # OpenGL: y up, z back
        plain = ngp and not shots.lenses[n].k  # Blender's names have no suffix
        frame: dict[str, Any] = {"file_path": f"{dots}images/{Path(name).stem if plain else name}"}
        frame["transform_matrix"] = saved_from_camera.tolist()
        frame |= {"sharpness": 41.7 + n} if ngp else {"colmap_im_id": n + 1}
        if depth:
            frame["depth_path" if ngp else "depth_file_path"] = f"{dots}depth/{name}"
            _save_depth(shots.depth(n), unit, capture / "depth" / name)
        frame |= _intrinsics(shots.lenses[n], ngp=ngp, listed=distortion_list) if shots.per_frame else {}
        frames.append(frame)
    meta: dict[str, Any] = {}
    if not shots.per_frame:
        meta |= _intrinsics(shots.lenses[0], ngp=ngp, listed=distortion_list)
    if ngp:
        meta |= {"aabb_scale": 16, "scale": 0.33, "offset": [0.5, 0.5, 0.5]}
        meta |= {"enable_depth_loading": True, "integer_depth_scale": unit} if depth else {}
    elif shots.index % 2:  # splits of images, not of captures
        paths = [frame["file_path"] for frame in frames]
        meta |= {"train_filenames": paths[:-1], "val_filenames": paths[-1:], "test_filenames": paths[-1:]}
    meta["frames"] = [frames[n] for n in (2, 0, 3, 1) if n < len(frames)]  # COLMAP's order is that of its ids
    if applied and not ngp:
        meta["applied_transform"] = saved_from_data[:3].tolist()
    if cloud is not None:
        meta["ply_file_path"] = cloud
    (capture / "transforms.json").write_text(json.dumps(meta, indent=4), encoding="utf-8")


def _intrinsics(lens: _Lens, *, ngp: bool, listed: bool) -> dict[str, Any]:
    if not ngp:
        keys = lens.named() | {"camera_model": lens.model}
        if listed:
            keys["distortion_params"] = [keys.pop(name, 0.0) for name in ("k1", "k2", "k3", "k4", "p1", "p2")]
        return keys
    angle = 2 * math.atan(lens.width / 2 / lens.fx)
    if not lens.k:
        return {"camera_angle_x": angle}
    keys = {"camera_angle_x": angle, "camera_angle_y": 2 * math.atan(lens.height / 2 / lens.fy)}
    keys |= dict.fromkeys(("k1", "k2", "k3", "k4", "p1", "p2"), 0) | lens.named()
    return keys | {"is_fisheye": "FISHEYE" in lens.model, "w": float(lens.width), "h": float(lens.height)}


# --- COLMAP ---------------------------------------------------------------------------------------------------------

_CAMERA_IDS, _IMAGE_IDS = (3, 7), (4, 9, 1, 6)  # neither ordered nor contiguous


def _write_colmap(folder: Path, shots: _Shots, places: Array, *, binary: bool, rig: bool) -> None:
    """A sparse model in the capture's own world."""
    folder.mkdir(parents=True, exist_ok=True)
    lenses = dict(zip(_CAMERA_IDS, shots.lenses[: 2 if shots.per_frame else 1], strict=False))
    camera_of = [_CAMERA_IDS[n % 2 if shots.per_frame else 0] for n in range(len(shots.names))]
    tracks, keypoints = _observations(shots, places)
    cameras = [(i, lens.model, lens.width, lens.height, lens.colmap()) for i, lens in lenses.items()]
    images = []
    for n in np.argsort(_IMAGE_IDS[: len(shots.names)]):
        matrix, seen = shots.from_data[n], keypoints[n]
        pose_of = (*_quaternion(matrix[:3, :3], sign=1 - 2 * (n % 2)), *matrix[:3, 3].tolist())
        images.append((_IMAGE_IDS[n], pose_of, camera_of[n], shots.names[n], seen))
    points = []
    for number, track in tracks.items():
        xyz = shots.data_from_room[:3, :3] @ places[number] + shots.data_from_room[:3, 3]
        rgb = np.rint(shots.world.color(places[number])).astype(int).tolist()
        points.append((5 + 3 * number, xyz.tolist(), rgb, 0.4 + number % 7 / 10, track))
    (_write_binary_model if binary else _write_text_model)(folder, cameras, images, points, rig)
    if folder.name == "0":
        (folder / "project.ini").write_text("log_to_stderr=false\nlog_level=2\n", encoding="ascii")


def _observations(shots: _Shots, places: Array) -> tuple[dict[int, list[tuple[int, int]]], list[list[Any]]]:
    """Tracks (image id, keypoint) of some points; keypoints (x, y, point's id or -1) of images, the fourth has none."""
    rng = np.random.default_rng(7)
    some = rng.choice(len(places), 250, replace=False)
    tracks: dict[int, list[tuple[int, int]]] = {int(number): [] for number in some}
    keypoints: list[list[Any]] = [[] for _ in shots.names]
    for n, eye in enumerate(list(shots.eyes.values())[:3]):
        u, v, inside = eye.project(places[some])
        visible = inside & (shots.world.cast(eye.origin, places[some] - eye.origin)[1] > 1 - 1e-6)
        for number, x, y in zip(some[visible].tolist(), u[visible].tolist(), v[visible].tolist(), strict=True):
            tracks[number].append((_IMAGE_IDS[n], len(keypoints[n])))
            keypoints[n].append((x, y, 5 + 3 * number))
            if number % 5 == 0:
                keypoints[n].append((x / 2, y / 2, -1))
    for number in [number for number, track in tracks.items() if len(track) < 2]:
        for image, place in tracks.pop(number):
            seen = keypoints[_IMAGE_IDS.index(image)]
            seen[place] = (*seen[place][:2], -1)
    return tracks, keypoints


def _quaternion(rotation: Array, *, sign: int) -> tuple[float, ...]:
    """Hamilton's (w, x, y, z), of either sign; both are the same rotation."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    upper = [[a + e + i, h - f, c - g, d - b], [0, a - e - i, b + d, c + g], [0, 0, e - a - i, f + h]]
    matrix = np.array([*upper, [0, 0, 0, i - a - e]])
    wxyz = np.linalg.eigh(matrix + np.triu(matrix, 1).T)[1][:, -1]
    return tuple((sign * wxyz * (1 if wxyz[0] >= 0 else -1)).tolist())


def _write_binary_model(folder: Path, cameras: list[Any], images: list[Any], points: list[Any], rig: bool) -> None:
    out = struct.pack("<Q", len(cameras))
    for number, model, width, height, params in cameras:
        out += struct.pack(f"<IiQQ{len(params)}d", number, COLMAP_MODELS[model][0], width, height, *params)
    (folder / "cameras.bin").write_bytes(out)
    out = struct.pack("<Q", len(images))
    for number, pose_of, camera, name, keypoints in images:
        out += struct.pack("<I7dI", number, *pose_of, camera) + name.encode() + b"\0"
        out += struct.pack("<Q", len(keypoints)) + b"".join(struct.pack("<ddq", *keypoint) for keypoint in keypoints)
    (folder / "images.bin").write_bytes(out)
    out = struct.pack("<Q", len(points))
    for number, xyz, rgb, error, track in points:
        out += struct.pack("<Q3d3BdQ", number, *xyz, *rgb, error, len(track))
        out += b"".join(struct.pack("<II", *element) for element in track)
    (folder / "points3D.bin").write_bytes(out)
    if rig:  # one rig per camera, one frame per image; 0 is the type of cameras
        out = struct.pack("<Q", len(cameras)) + b"".join(struct.pack("<IIiI", c[0], 1, 0, c[0]) for c in cameras)
        (folder / "rigs.bin").write_bytes(out)
        frames = [struct.pack("<II7dIiIQ", i[0], i[2], *i[1], 1, 0, i[2], i[0]) for i in images]
        (folder / "frames.bin").write_bytes(struct.pack("<Q", len(images)) + b"".join(frames))


def _write_text_model(folder: Path, cameras: list[Any], images: list[Any], points: list[Any], rig: bool) -> None:
    def save(name: str, head: str, lines: Sequence[str]) -> None:
        (folder / f"{name}.txt").write_text("".join(line + "\n" for line in [_HEADS[name] + head, *lines]), "utf-8")

    def flat(*values: Any) -> str:
        return " ".join(f"{v:.17g}" if isinstance(v, float) else str(v) for v in values)

    def joined(tuples: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        return tuple(value for values in tuples for value in values)

    rows = [flat(*camera[:4], *map(float, camera[4])) for camera in cameras]
    save("cameras", f"{len(cameras)}", rows)
    rows = []
    for number, pose_of, camera, name, keypoints in images:
        rows += [flat(number, *pose_of, camera, name), flat(*joined(keypoints))]
    mean = sum(len(image[4]) for image in images) / len(images)
    save("images", f"{len(images)}, mean observations per image: {mean}", rows)
    rows = [flat(number, *xyz, *rgb, error, *joined(track)) for number, xyz, rgb, error, track in points]
    mean = sum(len(point[4]) for point in points) / len(points)
    save("points3D", f"{len(points)}, mean track length: {mean}", rows)
    if rig:
        save("rigs", f"{len(cameras)}", [f"{c[0]} 1 CAMERA {c[0]}" for c in cameras])
        save("frames", f"{len(images)}", [flat(i[0], i[2], *i[1], 1, "CAMERA", i[2], i[0]) for i in images])


_HEADS = {
    "cameras": """# Camera list with one line of data per camera:
#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]
# Number of cameras: """,
    "images": """# Image list with two lines of data per image:
#   IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME
#   POINTS2D[] as (X, Y, POINT3D_ID)
# Number of images: """,
    "points3D": """# 3D point list with one line of data per point:
#   POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)
# Number of points: """,
    "rigs": """# Rig calib list with one line of data per calib:
#   RIG_ID, NUM_SENSORS, REF_SENSOR_TYPE, REF_SENSOR_ID, SENSORS[] as (SENSOR_TYPE, SENSOR_ID, HAS_POSE, [...])
# Number of rigs: """,
    "frames": """# Frame list with one line of data per frame:
#   FRAME_ID, RIG_ID, RIG_FROM_WORLD[QW, QX, QY, QZ, TX, TY, TZ], NUM_DATA_IDS, DATA_IDS[] as (...)
# Number of frames: """,
}


def _write_colmap_depth(capture: Path, shots: _Shots, *, dense: bool, depth: bool, count: int) -> None:
    if not dense:
        for n, name in enumerate(shots.names):
            _save_depth(shots.depth(n), 1e-3, (capture / "depths" / name).with_suffix(".png"))
        return
    for n, name in enumerate(shots.names if depth else []):
        path = capture / "stereo/depth_maps" / f"{name}.geometric.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = shots.depth(n, full_size=True).astype("<f4")
        path.write_bytes(f"{values.shape[1]}&{values.shape[0]}&1&".encode() + values.tobytes())
    (capture / "stereo").mkdir(exist_ok=True)
    (capture / "stereo/fusion.cfg").write_text("".join(name + "\n" for name in shots.names), encoding="utf-8")
    seen_by_first = np.tile(np.array([1, 0], "<u4"), count)  # of every point: number of images, their indices
    (capture / "fused.ply.vis").write_bytes(struct.pack("<Q", count) + seen_by_first.tobytes())
