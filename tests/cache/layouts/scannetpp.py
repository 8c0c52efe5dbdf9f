"""ScanNet++ as it is released: laser scan mesh, annotations, DSLR photos (fisheye and undistorted) and iPhone video.

Facts this writer relies on, and where they are stated:

- Paths of a scene: toolkit (github.com/scannetpp/scannetpp, f3b4712) common/scene_release.py. Splits and metadata:
  README, semantic/configs, iphone/prepare_iphone_data.py (`<root>/splits/<split>.txt`, `<root>/data/<scene>`). Assets
  missing by split (sem_test: segments, annotations, semantic mesh; nvs_test: scans, iPhone depth): download settings.
- dslr/nerfstudio/transforms*.json: common/utils/nerfstudio.py makes them of COLMAP's poses; camera axes OpenGL, *and*
  the world turned, (x, y, z) of the mesh -> (y, x, -z). dslr/undistort.py: same frames, PINHOLE, k = 0, c = size / 2.
- dslr/colmap, iphone/colmap: text models, world to camera, in the mesh's frame (common/render.py); one camera each,
  OPENCV_FISHEYE (k1..k4) and OPENCV (k1 k2 p1 p2), the first pixel's centre at 0.5. The iPhone's images.txt has *empty*
  lines of 2D points, and in seven scenes names such as `video/frame_000020.jpg` (semantic/prep/rasterize.py; others).
- iphone/depth.bin in three encodings, video frames named frame_%06d from 0: iphone/prepare_iphone_data.py.
  pose_intrinsic_imu.json: {frame: timestamp, pose, intrinsic, imu, aligned_pose}; aligned_pose is camera to mesh in
  OpenCV axes, `pose` is in ARKit's own world; exif.json has time stamps as keys: public readers checked on the release
  (EgoRecall, scenezoo, audits of VSI). The video can have one frame more than there are poses (toolkit issue 104).
- Labels: semantic/prep/map_semantic.py and semantic/transforms/mesh.py. A raw label is mapped by `semantic_map_to`
  (empty: as it is; "None": dropped; no row: dropped), then kept if in top100.txt. Groups that are dropped do not count;
  of the others (the first three) the one with the fewest vertices wins a vertex.
- segments.json counts vertices (issue 48; its key really is "sceneId:"); the release of 2023 held an over-segmentation
  (issue 31). segments_anno.json: issue 31 and readers of `obb`. Vertices in the mesh's mask are not evaluated
  (semantic/eval/eval_semantic.py). The top 100: see `TOP100`.

Not checked against a download: property types of the PLY files, names within `imu` and EXIF, the codecs, whether
map_benchmark.csv has more columns (its rows here are made up), what anonymised pixels look like. The undistorted photos
here are exact; the official ones are off by about a tenth of a pixel (undistort.py mixes both pixel conventions).
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import lz4.block
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from world import Array, Eye, Truth, World, distorted, fisheye, pinhole, pose

Masks = list[tuple[int, str, NDArray[np.bool_]]]
"""(objectId, raw label, vertices) of annotated objects, in the order of the file."""

_NAMES = """
wall, ceiling, floor, table, door, ceiling lamp, cabinet, blinds, curtain, chair, storage cabinet, office chair,
bookshelf, whiteboard, window, box, window frame, monitor, shelf, doorframe, pipe, heater, kitchen cabinet, sofa,
windowsill, bed, shower wall, trash can, book, plant, blanket, tv, computer tower, kitchen counter, refrigerator,
jacket, electrical duct, sink, bag, picture, pillow, towel, suitcase, backpack, crate, keyboard, rack, toilet, paper,
printer, poster, painting, microwave, board, shoes, socket, bottle, bucket, cushion, basket, shoe rack, telephone,
file folder, cloth, blind rail, laptop, plant pot, exhaust fan, cup, coat hanger, light switch, speaker, table lamp,
air vent, clothes hanger, kettle, smoke detector, container, power strip, slippers, paper bag, mouse, cutting board,
toilet paper, paper towel, pot, clock, pan, tap, jar, soap dispenser, binder, bowl, tissue box, whiteboard eraser,
toilet brush, spray bottle, headphones, stapler, marker
"""
TOP100 = tuple(name.strip() for name in _NAMES.split(","))
"""As in Pointcept's configs/scannetpp (CLASS_LABELS_PP); the indices that its configs ignore for instances agree."""
_STUFF = (0, 1, 2, 16, 19, 20, 24, 26, 33, 36, 48, 53, 63, 64, 73, 74)  # of the top 100, not in the instance benchmark
_RAW = {  # raw label -> (semantic_map_to, instance_map_to); every class of the top 100 has a row with empty cells, too
    "white board": ("whiteboard", "whiteboard"),
    "cupboard": ("cabinet", "storage cabinet"),
    "office desk": ("table", "table"),
    "sticker": ("", ""),
    "object": ("None", "None"),
}
_CLASSES = sorted({*TOP100, *_RAW})  # of semantic_classes.txt

SCENES = {"1f3a9c07de": "train", "7450386219": "val", "e90d4f82b1": "test"}
"""Scene -> split as in `Truth`; one of them is all digits, as some real ones are."""
SPLIT_FILES = {"train": "nvs_sem_train", "val": "nvs_sem_val", "test": "sem_test"}
NVS_TEST_SCENE = "b2c4d6e8f0"
"""Of nvs_test.txt: it has photos and no scan."""

DSLR_SIZE, IPHONE_SIZE, DEPTH_SIZE = (300, 200), (288, 216), (256, 192)
_DSLR_LENS, _DSLR_K = (135.3, 135.6, 150.7, 99.6), (-0.029, -0.006, -0.0006, -0.0002)
_STRIDE, _POSED = 10, 21  # COLMAP holds every tenth frame; the video has one frame more than there are poses

_Stand = tuple[tuple[float, float, float], float, float, float]  # position in the room, yaw, pitch, roll
_PHOTOS: dict[str, _Stand] = {
    "DSC02311.JPG": ((-0.04, 1.95, 1.16), 0.05, -0.11, 0.04),
    "DSC02317.JPG": ((0.05, 2.04, 1.31), -1.53, 0.21, -0.03),
    "DSC02324.JPG": ((0.23, 1.08, 1.63), 1.43, 0.3, 0.02),
}
_TEST, _BAD = "DSC02402.JPG", "DSC02319.JPG"
_OTHERS: dict[str, _Stand] = {_TEST: ((1.1, 1.9, 1.7), 2.1, 0.25, -0.05), _BAD: ((0.9, 1.2, 1.5), 0.7, 0.1, 0.0)}
_IPHONE: tuple[_Stand, ...] = (
    ((-0.1, 1.6, 1.2), 0.02, -0.05, 0.05),
    ((-0.4, 2.1, 1.35), -1.5, 0.25, -0.04),
    ((0.6, 0.9, 1.7), 1.2, 0.4, 0.0),
    ((0.9, 1.3, 1.5), 0.75, 0.35, 0.02),  # all frames that COLMAP has not: whoever is off by one frame shows
)
_ROOM = World()


def write(
    root: Path,
    *,
    world: World = _ROOM,
    dslr: bool = True,
    iphone: bool = True,
    iphone_frames: bool = False,
    undistorted: Literal["resized_undistorted", "undistorted", ""] = "resized_undistorted",
    depth_encoding: Literal["lz4", "zlib", "zlib_whole"] = "lz4",
    video: Literal["rgb.mkv", "rgb.mp4"] = "rgb.mkv",
    iphone_distortion: tuple[float, float, float, float] = (0.067, -0.081, -0.0005, 0.0018),
    oversegmented: bool = False,
    bad_photo: bool = True,
    anonymised: bool = False,
) -> list[Truth]:
    """Write a release of three scenes; return their truth with every camera of every source (see `of_source`).

    Args:
        root: the folder that holds `data/`, `metadata/` and `splits/`.
        world: the room. All scenes show the same one, each in a mesh frame of its own.
        dslr, iphone: whether these assets were downloaded.
        iphone_frames: also `iphone/rgb/*.jpg` and `iphone/depth/*.png`, as the toolkit extracts them.
        undistorted: folders `<this>_images`: as released since April 2025, as the toolkit's run names them, or none.
        depth_encoding: of depth.bin; the last two are found in older and in some new scenes.
        video: rgb.mp4 up to 2024.
        iphone_distortion: k1 k2 p1 p2; the default is of the size of the real ones, small.
        oversegmented: segments of many vertices as in the first release, instead of one segment per vertex.
        bad_photo: one photo is smeared and flagged `is_bad`; it is not among the truth's cameras.
        anonymised: the mesh's mask lists labelled vertices, too, which are "" in the truth.
    """
    photos = _photo_files(world, undistorted, bad_photo) if dslr else ({}, {})
    phone = _phone_files(world, iphone_frames, depth_encoding, video, iphone_distortion) if iphone else ({}, {})
    truths = []
    for index, (scene, split) in enumerate(SCENES.items()):
        folder, to_mesh = root / "data" / scene, _mesh_from_room(index, world.scale)
        truth = _scan(folder / "scans", scene, split, world, to_mesh, oversegmented, anonymised)
        if dslr:
            _dslr(folder / "dslr", photos, truth, to_mesh, undistorted)
        if iphone:
            _iphone(folder / "iphone", phone, to_mesh, iphone_distortion, world, "video/" if split == "val" else "")
        named = {name: eye for name, eye in (photos[1] | phone[1]).items() if not name.endswith(_BAD)}
        truths.append(replace(truth, eyes=named))
    if dslr:
        _dslr(root / "data" / NVS_TEST_SCENE / "dslr", photos, truths[0], _mesh_from_room(0, world.scale), undistorted)
    _metadata(root)
    return truths


def of_source(truth: Truth, *prefixes: str) -> Truth:
    """The truth for a reader that uses these cameras only.

    Args:
        prefixes: `dslr/train/`, `dslr/test/`, `dslr_undistorted/train/`, `dslr_undistorted/test/` (then the photo's
            name), `iphone/` (then `frame_000000`: every frame that has a pose), or longer ones.
    """
    return replace(truth, eyes={name: eye for name, eye in truth.eyes.items() if name.startswith(prefixes)})


# --- scan and labels ------------------------------------------------------------------------------------------------


def _mesh_from_room(index: int, scale: float) -> Array:
    """[4, 4]: meshes are in metres, z up, turned and shifted differently in every scene."""
    angle = (0.7, -2.1, 1.9)[index]
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = np.array([(4.31, -2.72, 0.18), (-1.9, 6.4, -0.27), (7.7, 3.3, 1.42)][index]) * scale
    return matrix


def _mesh(world: World, seed: int) -> tuple[Array, NDArray[np.str_], Array, NDArray[np.int32]]:
    """Shuffled vertices [N, 3] in the room, surface [N] and normal [N, 3] of each, triangles [F, 3] facing the room."""
    rng, count = np.random.default_rng(seed), 0
    places, surfaces, normals, faces = [], [], [], []
    for name, (corner, right, _, up) in world.quads():
        a, b = right - corner, up - corner
        step = (0.06 if name in ("board", "panel") else 0.12) * world.scale
        n, m = (int(np.linalg.norm(side) / step) for side in (a, b))
        s, t = (np.indices((n, m)) + rng.uniform(0.2, 0.8, (2, n, m))) / np.reshape((n, m), (2, 1, 1))
        places.append((corner + s[..., None] * a + t[..., None] * b).reshape(-1, 3))
        normal = np.cross(a, b) / np.linalg.norm(np.cross(a, b))
        inwards = normal @ (np.array([0, 2.25, 1.5]) * world.scale - corner) > 0
        normals.append(np.tile(normal if inwards else -normal, (n * m, 1)))
        i = count + np.arange(n * m).reshape(n, m)
        quads = np.stack([i[:-1, :-1], i[1:, :-1], i[1:, 1:], i[:-1, 1:]], axis=-1).reshape(-1, 4)
        triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
        faces.append(triangles if inwards else triangles[:, ::-1])
        surfaces += [name] * (n * m)
        count += n * m
    order = rng.permutation(count)
    triangles = np.argsort(order).astype(np.int32)[np.concatenate(faces)]
    return np.concatenate(places)[order], np.array(surfaces)[order], np.concatenate(normals)[order], triangles


def _objects(p: Array, surface: NDArray[np.str_]) -> Masks:
    """Annotated objects of vertices [N, 3] of a room of scale 1."""
    x, y, z = p.T
    on = {name: surface == name for name in np.unique(surface)}
    poster = on["board"] & (abs(x + 0.4) < 0.25) & (z > 1.3)
    return [
        (3, "socket", on["left"] & (abs(y - 1.5) < 0.4) & (abs(z - 0.7) < 0.4)),  # smaller than the wall, before it
        (1, "wall", on["left"] | on["near"]),
        (2, "wall", on["right"]),
        (5, "floor", on["floor"] & ~((x < -1.5) & (y > 3.5))),
        (6, "ceiling", on["ceiling"] & (y < 4.0)),
        (8, "wall", on["far"]),
        (9, "white board", on["board"]),
        (11, "poster", poster),  # smaller than the board, after it
        (12, "paper", poster & (z > 1.6)),  # the third label of its vertices
        (14, "cupboard", on["panel"]),
        (15, "sticker", on["right"] & (abs(y - 1) < 0.4) & (abs(z - 2.3) < 0.4)),  # not in the top 100: the wall stays
        (16, "object", on["floor"] & (x < -1.5) & (y > 3.5)),  # mapped to None
        (18, "REMOVE", on["ceiling"] & (y > 4.2)),  # without a row in the table
    ]


def _target(raw: str) -> str:
    """Benchmark class of a raw label, "" for none."""
    semantic = _RAW.get(raw, ("",))[0] or raw
    return semantic if semantic in TOP100 else ""


def _scan(
    folder: Path, scene: str, split: str, world: World, to_mesh: Array, oversegmented: bool, anonymised: bool
) -> Truth:
    """Write `scans/`; the truth is still without cameras."""
    places, surface, normal, faces = _mesh(world, seed=tuple(SCENES).index(scene))
    coord = (places @ to_mesh[:3, :3].T + to_mesh[:3, 3]).astype(np.float32)
    color = np.rint(world.color(places)).astype(np.uint8)
    vertex = dict(zip(("x", "y", "z", "red", "green", "blue"), (*coord.T, *color.T), strict=True))
    _put(folder / "mesh_aligned_0.05.ply", _ply(vertex, faces))
    _put(folder / "scanner_poses.json", [to_mesh.tolist()])

    objects = _objects(places / world.scale, surface)
    label, instance = np.full(len(places), "", dtype="U32"), np.full(len(places), -1, dtype=np.int32)
    class_id, annotated = np.full(len(places), -100, dtype=np.int32), np.zeros(len(places), dtype=bool)
    for object_id, raw, of in sorted(objects, key=lambda o: -int(o[2].sum())):  # smaller ones override larger ones
        annotated |= of
        if raw in _CLASSES:
            class_id[of] = _CLASSES.index(raw)  # of the full list of classes, not of the top 100
        if _target(raw):
            label[of], instance[of] = _target(raw), object_id
    masked = np.flatnonzero(~annotated)[:25]
    if anonymised:
        masked = np.concatenate([masked, np.flatnonzero(surface == "floor")[:40]])
        label[masked] = ""
    _put(folder / "mesh_aligned_0.05_mask.txt", "\n".join(map(str, masked)))
    if split != "test":
        _put(folder / "mesh_aligned_0.05_semantic.ply", _ply(vertex | {"label": class_id}, faces))
        _annotations(folder, scene, coord, objects, oversegmented)
    channels: dict[str, NDArray[Any]] = {"color": color, "normal": (normal @ to_mesh[:3, :3].T).astype(np.float32)}
    return Truth(
        sample_id=scene, split=split, world=places, coord=coord.astype(np.float64), eyes={},
        label=None if split == "test" else label,
        channels=channels if split == "test" else channels | {"instance": instance},
    )  # fmt: skip


def _annotations(folder: Path, scene: str, coord: NDArray[np.float32], objects: Masks, oversegmented: bool) -> None:
    segment = np.arange(len(coord))
    header: dict[str, Any] = {"sceneId:": scene}
    if oversegmented:  # about twenty vertices of the same objects share a segment
        kind = np.unique(np.stack([of for *_, of in objects]), axis=1, return_inverse=True)[1].reshape(-1)
        order = np.lexsort((*coord.T, kind))
        rank = np.arange(len(order)) - np.searchsorted(kind[order], kind[order])
        segment[order] = 7 + 3 * np.unique(kind[order] * 100_000 + rank // 20, return_inverse=True)[1].reshape(-1)
        header = {"params": {"kThresh": 0.01, "segMinVerts": 20}, "sceneId": scene}
    _put(folder / "segments.json", header | {"segIndices": segment.tolist()})
    groups: list[dict[str, Any]] = []
    for index, (object_id, raw, of) in enumerate(objects):
        low, high = coord[of].min(axis=0), coord[of].max(axis=0)
        obb = {"centroid": (low + high) / 2, "axesLengths": high - low, "normalizedAxes": np.eye(3).ravel()}
        group = {"id": object_id, "objectId": object_id, "index": index, "label": raw}
        group |= {"segments": np.unique(segment[of]).tolist(), "obb": {key: v.tolist() for key, v in obb.items()}}
        groups.append(group)
    annotation = {"sceneId": f"scannetpp.{scene}", "appId": "stk.v1", "annId": "2466", "segGroups": groups}
    _put(folder / "segments_anno.json", annotation)


def _metadata(root: Path) -> None:
    instance = [name for i, name in enumerate(TOP100) if i not in _STUFF]
    rows = [f"{name},{5000 - 40 * i},,{'' if name in instance else 'None'}" for i, name in enumerate(TOP100)]
    rows += [f"{name},{9 + i},{a},{b}" for i, (name, (a, b)) in enumerate(_RAW.items())]
    lists = {  # none ends with a line feed: the toolkit joins lines
        "metadata/semantic_benchmark/top100.txt": TOP100,
        "metadata/semantic_benchmark/top100_instance.txt": instance,
        "metadata/semantic_benchmark/map_benchmark.csv": ["class,count,semantic_map_to,instance_map_to", *rows],
        "metadata/semantic_classes.txt": _CLASSES,
        "metadata/instance_classes.txt": sorted({*instance, *_RAW}),
        "splits/nvs_test.txt": [NVS_TEST_SCENE],
        "splits/nvs_test_small.txt": [NVS_TEST_SCENE],
        "splits/nvs_test_iphone.txt": [],
        **{f"splits/{SPLIT_FILES[split]}.txt": [scene] for scene, split in SCENES.items()},
    }
    for name, lines in lists.items():
        _put(root / name, "\n".join(lines))
    _put(root / "metadata" / "scene_types.json", dict.fromkeys((*SCENES, NVS_TEST_SCENE), "office"))


# --- DSLR -----------------------------------------------------------------------------------------------------------

_Shots = tuple[dict[str, bytes], dict[str, Eye]]
"""Files by path within `dslr/` or `iphone/`, the same in every scene, and the cameras by the names of `of_source`."""


def _photo_files(world: World, undistorted: str, bad_photo: bool) -> _Shots:
    (w, h), files, eyes = DSLR_SIZE, {}, {}
    stands = _PHOTOS | {name: where for name, where in _OTHERS.items() if name != _BAD or bad_photo}
    masks = {"resized_undistorted": "resized_undistorted_masks", "undistorted": "undistorted_anon_masks"}
    for name, where in stands.items():
        eye = fisheye(w, h, *_DSLR_LENS, _DSLR_K, _stand(where, world))
        sources = [("dslr", "resized_images", "resized_anon_masks", eye)]
        if undistorted:
            sources += [("dslr_undistorted", f"{undistorted}_images", masks[undistorted], _undistort(eye))]
        for source, images, mask_folder, seen_by in sources:
            picture, mask = world.image(seen_by), np.full((h, w), 255, dtype=np.uint8)
            if name == _BAD:
                picture = np.mean([np.roll(picture, i, axis=1) for i in range(0, 60, 4)], axis=0).astype(np.uint8)
                mask[60:100, 90:150] = 0
            files[f"{images}/{name}"] = _encoded(picture, "JPEG", quality=98, subsampling=0)
            files[f"{mask_folder}/{name.replace('.JPG', '.png')}"] = _encoded(mask, "PNG")
            eyes[f"{source}/{'test' if name == _TEST else 'train'}/{name}"] = seen_by
    return files, eyes


def _undistorted_lens(eye: Eye) -> tuple[float, float, float, float]:
    """Undistorted photos show nothing that the fisheye did not see: the longest focal length of the edges' middles."""
    (w, h), (fx, fy, cx, cy) = DSLR_SIZE, _DSLR_LENS
    edge = eye.to_ray(np.array([0, w, cx, cx]), np.array([cy, cy, 0, h]))
    tangent = np.abs(edge[:, :2] / edge[:, 2:])
    focal = max(w / 2 / tangent[:2, 0].min(), h / 2 / tangent[2:, 1].min())
    return focal, focal * fy / fx, w / 2, h / 2


def _undistort(eye: Eye) -> Eye:
    fx, fy, cx, cy = _undistorted_lens(eye)

    def to_ray(u: Array, v: Array) -> Array:  # `pinhole` would seek it by Newton's method
        return np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], axis=-1)

    return replace(pinhole(*DSLR_SIZE, fx, fy, cx, cy, eye.camera_from_world), to_ray=to_ray)


def _dslr(folder: Path, shots: _Shots, truth: Truth, to_mesh: Array, undistorted: str) -> None:
    files, eyes = shots
    for name, content in files.items():
        _put(folder / name, content)
    fisheyes = {name.split("/")[2]: eye for name, eye in eyes.items() if name.startswith("dslr/")}
    poses = {name: eye.camera_from_world @ np.linalg.inv(to_mesh) for name, eye in fisheyes.items()}
    _colmap(folder / "colmap", "OPENCV_FISHEYE", DSLR_SIZE, (*_DSLR_LENS, *_DSLR_K), poses, (fisheyes, truth))
    train = sorted(poses.keys() - {_TEST})
    _put(folder / "train_test_lists.json", {"train": train, "test": [_TEST], "has_masks": _BAD in poses})
    extra = {name: {"mask_path": name.replace(".JPG", ".png"), "is_bad": name == _BAD} for name in poses}
    frames = {name: _nerfstudio(name, matrix) | extra[name] for name, matrix in poses.items()}
    tail = {"frames": [frames[name] for name in train], "test_frames": [frames[_TEST]], "has_mask": _BAD in poses}
    lens = (*_DSLR_LENS, *DSLR_SIZE, *_DSLR_K, "OPENCV_FISHEYE")
    keys = ("fl_x", "fl_y", "cx", "cy", "w", "h", "k1", "k2", "k3", "k4", "camera_model")
    _put(folder / "nerfstudio" / "transforms.json", dict(zip(keys, lens, strict=True)) | tail)
    if undistorted:
        lens = (*_undistorted_lens(fisheyes[_TEST]), *DSLR_SIZE, *(0.0,) * 4, "PINHOLE")
        _put(folder / "nerfstudio" / "transforms_undistorted.json", dict(zip(keys, lens, strict=True)) | tail)


def _stand(where: _Stand, world: World) -> Array:
    (x, y, z), *angles = where
    return pose((x * world.scale, y * world.scale, z * world.scale), *angles)


def _nerfstudio(name: str, camera_from_mesh: Array) -> dict[str, Any]:
    """A frame of transforms.json: OpenGL's camera axes to a world with x and y swapped and z downwards."""
    matrix = np.linalg.inv(camera_from_mesh) @ np.diag([1.0, -1, -1, 1])
    turned = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]]) @ matrix
    return {"file_path": name, "transform_matrix": turned.tolist()}


def _colmap(
    folder: Path,
    model: str,
    size: tuple[int, int],
    parameters: Sequence[float],
    poses: Mapping[str, Array],
    observed: tuple[Mapping[str, Eye], Truth] | None = None,
) -> None:
    """Text model; the DSLR's has 2D points, the iPhone's has an empty line in their place."""
    cameras = "# Camera list with one line of data per camera:\n#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n"
    numbers = " ".join(repr(float(x)) for x in parameters)
    _put(folder / "cameras.txt", f"{cameras}# Number of cameras: 1\n1 {model} {size[0]} {size[1]} {numbers}\n")
    lines, points, number = [], [], 0
    for image_id, (name, matrix) in enumerate(poses.items(), start=1 if observed else 0):
        pixels: list[str] = []
        if observed:
            u, v, inside = observed[0][name].project(observed[1].world)
            for index in np.flatnonzero(inside)[:12]:
                number += 1
                place = " ".join(str(float(x)) for x in observed[1].coord[index])
                points.append(f"{number} {place} 128 127 126 0.5 {image_id} {len(pixels)}\n")
                pixels += [f"{u[index]:.6f} {v[index]:.6f} {number}", "12.5 40.25 -1"]
        numbers = " ".join(repr(float(x)) for x in (*_quaternion(matrix[:3, :3]), *matrix[:3, 3]))
        lines.append(f"{image_id} {numbers} 1 {name}\n{' '.join(pixels)}\n")
    images = (
        "# Image list with two lines of data per image:\n#   IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n"
        f"#   POINTS2D[] as (X, Y, POINT3D_ID)\n# Number of images: {len(lines)}, mean observations per image: "
    )
    _put(folder / "images.txt", f"{images}{len(points) / len(lines)}\n{''.join(lines)}")
    head = "# 3D point list with one line of data per point:\n#   POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]\n"
    _put(folder / "points3D.txt", f"{head}# Number of points: {len(points)}, mean track length: 1.0\n{''.join(points)}")


def _quaternion(r: Array) -> Array:
    """(w, x, y, z) of a rotation: the main eigenvector of Bar-Itzhack's symmetric matrix (lower triangle)."""
    k = np.zeros((4, 4))
    k[0, 0], k[1, 1], k[2, 2], k[3, 3] = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) @ np.diag(r)
    k[1:, 0] = r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]
    k[2, 1], k[3, 1], k[3, 2] = r[0, 1] + r[1, 0], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1]
    return np.linalg.eigh(k)[1][:, -1]


# --- iPhone ---------------------------------------------------------------------------------------------------------


def _lens(shot: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Of one of the four pictures: the focal length follows the autofocus, although COLMAP knows one camera only."""
    ratio, focus = size[0] / 1920, 1 + 0.003 * shot
    return 1435.54 * focus * ratio, 1436.06 * focus * ratio, 963.39 * ratio, 722.32 * ratio


def _phone_files(
    world: World, extract: bool, encoding: str, video: str, k: tuple[float, float, float, float]
) -> _Shots:
    eyes, pictures, depths = [], [], []
    for shot, where in enumerate(_IPHONE):
        eyes.append(distorted(*IPHONE_SIZE, *_lens(shot, IPHONE_SIZE), k, _stand(where, world)))
        pictures.append(world.image(eyes[-1]))
        depth_eye = distorted(*DEPTH_SIZE, *_lens(shot, DEPTH_SIZE), k, _stand(where, world))
        depths.append(world.depth(depth_eye).astype(np.float32))
    shots = [3 if frame % _STRIDE else frame // _STRIDE for frame in range(_POSED + 1)]
    files = {
        video: _video(video, [pictures[shot] for shot in shots], "libx264", "yuv420p"),
        "rgb_mask.mkv": _video("mkv", [np.full(IPHONE_SIZE[::-1], 255, dtype=np.uint8)] * len(shots), "ffv1", "gray"),
        "depth.bin": _depth_bin([depths[shot] for shot in shots], encoding),
    }
    if extract:
        jpegs = [_encoded(picture, "JPEG", quality=98, subsampling=0) for picture in pictures]
        pngs = [_encoded((depth * 1000).astype(np.uint16), "PNG") for depth in depths]
        files |= {f"rgb/frame_{frame:06}.jpg": jpegs[shot] for frame, shot in enumerate(shots)}
        files |= {f"depth/frame_{frame:06}.png": pngs[shot] for frame, shot in enumerate(shots)}
    return files, {f"iphone/frame_{frame:06}": eyes[shots[frame]] for frame in range(_POSED)}


def _iphone(
    folder: Path, shots: _Shots, to_mesh: Array, k: tuple[float, float, float, float], world: World, prefix: str
) -> None:
    """Write `iphone/`; `prefix` is of the names in COLMAP's files."""
    files, eyes = shots
    for name, content in files.items():
        _put(folder / name, content)
    arkit_from_mesh = np.array([[0.6, 0.8, 0, -31.0], [0, 0, 1, 1.2], [0.8, -0.6, 0, 57.0], [0, 0, 0, 1]])  # y is up
    poses = {name.split("/")[1]: eye.camera_from_world @ np.linalg.inv(to_mesh) for name, eye in eyes.items()}
    records, exif = {}, {}
    for frame, (name, matrix) in enumerate(poses.items()):
        fx, fy, cx, cy = _lens(3 if frame % _STRIDE else frame // _STRIDE, IPHONE_SIZE)
        stamp, aligned = round(81_302.4471 + frame / 60, 6), np.linalg.inv(matrix)
        imu = {key: [0.01 * frame, -0.02, 0.03] for key in ("rotation_rate", "acceleration", "gravity", "attitude")}
        intrinsic = [[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]
        records[name] = {"timestamp": stamp, "intrinsic": intrinsic, "pose": (arkit_from_mesh @ aligned).tolist()}
        records[name] |= {"imu": imu, "aligned_pose": aligned.tolist()}
        exif[str(stamp)] = {"PixelXDimension": IPHONE_SIZE[0], "PixelYDimension": IPHONE_SIZE[1]}
    _put(folder / "pose_intrinsic_imu.json", records)
    _put(folder / "exif.json", exif)

    registered, lens = {f"{name}.jpg": poses[name] for name in list(poses)[::_STRIDE]}, (*_lens(1, IPHONE_SIZE), *k)
    _colmap(folder / "colmap", "OPENCV", IPHONE_SIZE, lens, {prefix + name: m for name, m in registered.items()})
    keys = ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2", "w", "h", "camera_model")
    head = dict(zip(keys, (*lens, *IPHONE_SIZE, "OPENCV"), strict=True))
    # Its test frames are photos of the DSLR, to be rendered with the iPhone's camera.
    photo = _stand(_OTHERS[_TEST], world) @ np.linalg.inv(to_mesh)
    tail = {"frames": [_nerfstudio(*item) for item in registered.items()], "test_frames": [_nerfstudio(_TEST, photo)]}
    _put(folder / "nerfstudio" / "transforms.json", head | tail)


def _depth_bin(depths: Sequence[NDArray[np.float32]], encoding: str) -> bytes:
    def deflated(data: bytes) -> bytes:
        packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
        return packer.compress(data) + packer.flush()

    if encoding == "zlib_whole":  # one stream of float32 metres
        return deflated(b"".join(depth.tobytes() for depth in depths))
    if encoding == "zlib":  # a block of float32 metres for each frame
        blocks = [deflated(depth.tobytes()) for depth in depths]
    else:  # a block of uint16 millimetres for each frame
        blocks = [lz4.block.compress((depth * 1000).astype(np.uint16).tobytes(), store_size=False) for depth in depths]
    return b"".join(len(block).to_bytes(4, "little") + block for block in blocks)


def _video(name: str, pictures: Sequence[NDArray[np.uint8]], codec: str, pixels: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4" if name.endswith("mp4") else "matroska") as container:
        options = {"crf": "3", "preset": "veryfast", "g": "12"} if codec == "libx264" else {}
        stream: Any = container.add_stream(codec, rate=60, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.time_base = pixels, Fraction(1, 60)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.ndim == 3 else "gray")
            frame.pts, frame.time_base = number, Fraction(1, 60)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


# --- files ----------------------------------------------------------------------------------------------------------


def _ply(vertex: Mapping[str, NDArray[Any]], faces: NDArray[np.int32]) -> bytes:
    names = {"f": "float", "u": "uchar", "i": "int"}
    rows = np.zeros(len(vertex["x"]), dtype=[(name, column.dtype.newbyteorder("<")) for name, column in vertex.items()])
    for name, column in vertex.items():
        rows[name] = column
    triangles = np.zeros(len(faces), dtype=[("count", "u1"), ("index", "<i4", 3)])
    triangles["count"], triangles["index"] = 3, faces
    properties = "".join(f"property {names[column.dtype.kind]} {name}\n" for name, column in vertex.items())
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{properties}"
    header += f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    return header.encode("ascii") + rows.tobytes() + triangles.tobytes()


def _encoded(picture: NDArray[Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def _put(path: Path, content: object) -> None:
    """Bytes and text as they are, all else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode("utf-8")
    path.write_bytes(content)
