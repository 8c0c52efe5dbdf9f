"""S3DIS (two releases of its points) and the images of 2D-3D-S beside it, as their authors publish them.

Facts and their sources: P = Pointcept `preprocessing/s3dis/preprocess_s3dis.py`, D = VisualComputingInstitute/ditr
`preprocessing/s3dis/prepare_raw_data.py`, V = drprojects/DeepViewAgg `torch_points3d/datasets/segmentation/s3dis.py`,
R = README of alexsax/2D-3D-Semantics, Q = lines of the release quoted in issue threads, T = clean-up code of
torch-pointcloud, M = measured on the release by others.

- `Area_N/<room>/Annotations/<class>_<i>.txt` holds `x y z r g b` per line; classes beside the 13 (`stairs`) count as
  clutter; the users' order is that of the files sorted by name as text (chair_10 before chair_2), an instance is a
  file (P). `<room>.txt` holds the points in another order. `Area_6/copyRoom_1` names it `copy_Room_1.txt` (Q:
  superpoint_graph). `.DS_Store` and `Icon` lie about (T). Area_5/office_36 holds `wall_3 (1).txt`, a duplicate that
  superpoint_transformer and T drop and P keeps.
- `Stanford3dDataset_v1.2`: the area's frame, `%f` in all columns (Q: Area_1/WC_1, Area_5/office_19, Area_6/hallway_2).
  `Stanford3dDataset_v1.2_Aligned_Version`: each room turned about z on its own (I. Armeni, 2D-3D-Semantics #12;
  pointnet #20). Rooms not turned hold `%.3f` and `%d` (Q: conferenceRoom_1, hallway_2, hallway_6), others `%f` with
  odd half millimetres (Q: Area_2/auditorium_1 `0.577500 -12.407500 2.604000 167.000000`), as a quarter turn about the
  middle of a box of millimetres makes them. That split of formats is inferred from these few lines.
- `Area_N_alignmentAngle.txt`: two lines of `##`, then `room degrees`; 0, 90, 180 or 270 (P, D). The turn (P, D):
  aligned = R_z(-angle) (p - c) + c, c = (min + max) / 2 of the room's points; the box keeps its middle, so c can be
  read off either release. That the Aligned release itself turns by this sign, and whether it ships these files (P's
  author: no; T reads them from its zip), is unchecked. The angles below are not the real ones.
- In v1.2, Area_2/hallway_11 and Area_5/hallway_6 are turned by 180 degrees about the middle of their box against the
  poses (V; of the aligned release nobody says). Written so: `turned_against_images`.
- Known damage, bit 5 of one byte cleared (' ' -> \\x00, '0' -> \\x10, '6' -> \\x16; Q). Aligned:
  Area_5/hallway_6/Annotations/ceiling_1.txt:180389 `185\\x00187 182`, Area_3/hallway_2/hallway_2.txt:926337
  `-9.1\\x160`, Area_2/auditorium_1/auditorium_1.txt:741101 `167.\\x1000000`; v1.2:
  Area_5/office_19/Annotations/ceiling_1.txt:323474 `103.0\\x100000`, and room files of Area_1/WC_1, Area_6/hallway_2.
- `area_{1,2,3,4,5a,5b,6}/data/<kind>/camera_<32 hex>_<room>_frame_<m>_domain_<kind>.<png|json>`, single underscores
  (M; R prints double ones); folder `normal` holds `_normals.png`; `pano/` the same with `frame_equirectangular`.
  Rooms of Area 5 lie in 5a, in 5b or in both (2D-3D-Semantics #25, #40); Area_3/hallway_5 has no image (#44).
- Pose JSON: keys of R; `camera_rt_matrix` is 3x4 and maps area to camera, x right, y down, z forward, t = -R C (M, D,
  and the numbers of a real file, which also give R = diag(1,-1,-1) (E(delta) E(original))^T with E = Rz Ry Rx); K and
  field of view differ by frame, the principal point is the middle, 540 of 1080: pixel centres at .5 (M); `room` ends
  in the area's number. The frames of one uuid share one place.
- Depth: 16 bit, z (not distance) in 1/512 m, 65535 where there is none (R), about 1 % of pixels (M).
- 5b to 5: x = y_b - 4.09703582, y = 6.22617759 - x_b, z = z_b (D; P has it for the Y-up meshes; by users, #40).
- `3d/rgb.obj` is Y-up: (x, y, z)_area = (x, -z, y)_obj; a point's normal is that of the nearest face (P).

Not written: `pointcloud.mat`, `semantic.obj`, `global_xyz` (the noXYZ download), `normal`, `semantic`; the pano's
orientation is not claimed to be the release's (it is there to be left alone).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import md5
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from world import NAMES, Array, Eye, Truth, World, panorama, pinhole, pose

CLASSES = tuple("ceiling floor wall beam column window door table chair sofa bookcase board clutter".split())  # noqa: SIM905
RELEASES = {"aligned": "Stanford3dDataset_v1.2_Aligned_Version", "v1.2": "Stanford3dDataset_v1.2"}
IMAGES = "2D-3D-S"
AREA_5_FROM_5B = np.array([[0, 1, 0, -4.09703582], [-1, 0, 0, 6.22617759], [0, 0, 1, 0], [0, 0, 0, 1.0]])
INWARD = np.array([(0, 0, 1), (0, 0, -1), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, -1, 0), (-1, 0, 0)], float)
"""Normals of the surfaces of `world.NAMES`, towards the scanner."""


@dataclass(frozen=True)
class Room:
    """A room: where it is in its area, what its panel is called, and the folders that hold its images."""

    area: int
    name: str
    angle: int
    yaw: float
    shift: tuple[float, float, float]
    panel: str
    folders: tuple[str, ...]

    @property
    def sample_id(self) -> str:
        return f"Area_{self.area}_{self.name}"

    @property
    def turned_in_v1_2(self) -> int:
        return 180 if self.sample_id == "Area_5_hallway_6" else 0

    @property
    def area_from_world(self) -> Array:
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = _turn(np.degrees(self.yaw)), self.shift
        return matrix


ROOMS = (
    Room(1, "conferenceRoom_2", 180, 0.30, (-21.4, 38.7, 0.03), "table_1", ("area_1",)),
    Room(2, "auditorium_1", 90, -0.20, (1.9, -12.6, -0.4), "sofa_1", ("area_2",)),
    Room(3, "hallway_5", 90, 0.10, (19.3, -9.1, 0.0), "beam_1", ()),
    Room(4, "lobby_1", 270, 2.20, (-33.8, 4.2, 0.1), "column_1", ("area_4",)),
    Room(5, "hallway_6", 0, 0.45, (22.3, 6.7, -0.02), "stairs_1", ("area_5a",)),
    Room(5, "office_19", 90, -0.35, (-8.6, 13.9, 0.05), "bookcase_1", ("area_5a", "area_5b")),
    Room(6, "copyRoom_1", 270, 1.15, (-11.2, 27.5, 0.0), "clutter_1", ("area_6",)),
)
STANDS = (
    # Where a scanner stood, and its frames: number in the file name, yaw, pitch, focal length per image width.
    ((0.2, 0.7, 1.4), ((0, 0.15, 0.10, 0.80), (2, -0.75, 0.20, 0.95), (10, 0.85, -0.15, 0.86))),
    ((-1.3, 1.1, 1.5), ((0, -1.35, 0.05, 0.90), (1, -0.35, 0.35, 0.70))),
)


def write(
    root: Path,
    *,
    world: World = World(),  # noqa: B008 - frozen
    release: Literal["aligned", "v1.2"] = "aligned",
    areas: Sequence[int] = (1, 5, 6),
    with_images: bool = True,
    broken_line: bool = False,
    angle_files: bool = True,
    turned_against_images: int | None = None,
    duplicate_wall: Literal["", "kept", "dropped"] = "",
    orphans: bool = False,
    holes: bool = True,
    size: int = 270,
    count: int = 6000,
) -> list[Truth]:
    """Write `root/<release>` and `root/2D-3D-S`; returns the truth of each room, `coord` as in its Annotations.

    Args:
        root: folder of both downloads.
        world: the room to show.
        release: which points: turned room by room, or in the frame of the area.
        areas: of 1 to 6; Area_3 holds one room, without images. Area 5 has two rooms, one seen from 5a and 5b.
        with_images: whether 2D-3D-S is there.
        broken_line: damage the annotation that is damaged in the release (aligned: hallway_6, v1.2: office_19); the
            truth is the number meant.
        angle_files: whether the points come with `Area_N_alignmentAngle.txt`.
        turned_against_images: degrees by which Area_5/hallway_6 is turned against its poses, before it is aligned;
            None: as is known of the release.
        duplicate_wall: add `wall_3 (1).txt`, as in Area_5/office_36, to Area_5/office_19; the truth counts its points
            ("kept", as Pointcept does) or not ("dropped").
        orphans: leave a pose without an image and an image without a pose (DeepViewAgg drops both).
        holes: depth 65535 at random, and before many hidden points; never at a visible one.
        size: of the square images; 1080 in the release.
        count: points of a room, roughly.
    """
    truths, quads = [], {}
    for number, room in enumerate(r for r in ROOMS if r.area in areas):
        against = room.turned_in_v1_2 if release == "v1.2" else 0
        if turned_against_images is not None and room.turned_in_v1_2:
            against = turned_against_images
        turns = (against, -room.angle if release == "aligned" else 0)
        truth = _points(root / RELEASES[release], room, world, turns, duplicate_wall, count, number)
        if broken_line:
            _break(root / RELEASES[release] / f"Area_{room.area}" / room.name, release)
        if with_images:
            truth = replace(truth, eyes=_images(root / IMAGES, room, world, truth.world, size, holes, number))
        for folder in room.folders if with_images else ():
            quads.setdefault(folder, []).extend(_quads(room, world, folder))
        truths.append(truth)
    for folder, faces in quads.items():
        _mesh(root / IMAGES / folder / "3d", faces)
    for area in sorted({truth.split for truth in truths}):
        (root / RELEASES[release] / area / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1" + bytes(56))
        (root / RELEASES[release] / area / "Icon").touch()
        if angle_files:
            rows = [f"{room.name} {room.angle}\n" for room in ROOMS if f"Area_{room.area}" == area]
            head = f"## Global alignment angle per disjoint space in {area} ##\n"
            head += "## Disjoint Space Name Global Alignment Angle ##\n"
            (root / RELEASES[release] / area / f"{area}_alignmentAngle.txt").write_text(head + "".join(rows))
    if orphans and with_images:
        first = sorted((root / IMAGES).glob("area_*/data/rgb/*_frame_10_*.png"))[0]
        stem = first.name.replace("frame_10_domain_rgb.png", "frame_11_domain_")
        first.with_name(f"{stem}rgb.png").write_bytes(first.read_bytes())
        posed = first.parents[1] / "pose" / first.name.replace("_rgb.png", "_pose.json")
        posed.with_name(f"{stem}pose.json".replace("_11_", "_12_")).write_text(posed.read_text())
    return truths


def aligned(truth: Truth) -> Truth:
    """The truth of a room of v1.2 in the room's canonical frame, as the Aligned release and Pointcept have it."""
    return turned(truth, -next(room.angle for room in ROOMS if room.sample_id == truth.sample_id))


def turned(truth: Truth, degrees: int) -> Truth:
    """The truth of a room turned about the middle of its box."""
    channels = {**truth.channels, "normal": (truth.channels["normal"] @ _turn(degrees).T).astype(np.float32)}
    return replace(truth, coord=_about_the_middle(truth.coord, degrees), channels=channels)


# --- points ---------------------------------------------------------------------------------------------------------


def _points(
    release: Path, room: Room, world: World, turns: tuple[int, int], duplicate_wall: str, count: int, seed: int
) -> Truth:
    places, surface = world.points(count, seed)
    corners = [(i, corner) for i, (_, quad) in enumerate(world.quads()) for corner in _inset(quad)]
    # The corners make the box of the points that of the mesh, nearly: Pointcept crops the mesh with it.
    places = np.concatenate([places, [corner for _, corner in corners]])
    surface = np.concatenate([surface, [i for i, _ in corners]])
    files = _files(room, surface, places / world.scale)
    if duplicate_wall and room.name == "office_19":
        again = np.flatnonzero(files == "wall_3")
        places, surface = np.concatenate([places, places[again]]), np.concatenate([surface, surface[again]])
        files = np.concatenate([files, np.full(len(again), "wall_3 (1)")])
    order = np.argsort([f"{name}.txt" for name in files], kind="stable")
    places, surface, files = places[order], surface[order], files[order]

    coord = np.round(places @ room.area_from_world[:3, :3].T + room.area_from_world[:3, 3], 3)
    normal = INWARD[surface] @ room.area_from_world[:3, :3].T
    for degrees in turns:
        coord, normal = _about_the_middle(coord, degrees), normal @ _turn(degrees).T
    color = np.rint(world.color(places)).astype(np.uint8)
    plain = release.name == RELEASES["aligned"] and room.angle == 0
    text = "%.3f %.3f %.3f %d %d %d\n" if plain else "%f %f %f %f %f %f\n"
    lines = [text % tuple(row) for row in np.concatenate([coord, color], axis=1)]
    folder = release / f"Area_{room.area}" / room.name
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    names, instance = np.unique([f"{name}.txt" for name in files], return_inverse=True)
    for i, name in enumerate(names):
        (folder / "Annotations" / name).write_text("".join(lines[j] for j in np.flatnonzero(instance == i)))
    whole = "copy_Room_1.txt" if (room.area, room.name) == (6, "copyRoom_1") else f"{room.name}.txt"
    shuffled = np.random.default_rng(seed).permutation(len(lines))
    (folder / whole).write_text("".join(lines[j] for j in shuffled))
    keep = (files != "wall_3 (1)") | (duplicate_wall != "dropped")
    _, instance = np.unique(instance[keep], return_inverse=True)
    kinds = [name.split("_")[0] for name in files[keep]]
    return Truth(
        sample_id=room.sample_id,
        split=f"Area_{room.area}",
        world=places[keep],
        coord=coord[keep],
        label=np.array([kind if kind in CLASSES else "clutter" for kind in kinds]),
        eyes={},
        channels={
            "color": color[keep],
            "normal": normal[keep].astype(np.float32),
            "instance": instance.reshape(-1).astype(np.int32),
        },
    )


def _files(room: Room, surface: NDArray[np.int64], places: Array) -> NDArray[np.str_]:
    """Name of the annotation [N] of each point: surfaces, with regions of some painted as other things."""
    names = np.array(["floor_1", "ceiling_1", "wall_1", "wall_2", "wall_3", "wall_4", "board_1", room.panel])
    file = names[surface].astype("<U16")
    x, y, z = places.T
    at = {name: surface == i for i, name in enumerate(NAMES)}
    file[at["left"] & (y < 1.2) & (z < 2.1)] = "door_1"
    file[at["left"] & (y > 2) & (y < 3.5) & (z > 1)] = "window_1"
    file[at["far"] & (x < -1.6)] = "bookcase_2" if room.panel.startswith("bookcase") else "bookcase_1"
    file[at["near"] & (z < 0.9)] = "sofa_2" if room.panel.startswith("sofa") else "sofa_1"
    file[at["near"] & (z > 2.4)] = "beam_2" if room.panel.startswith("beam") else "beam_1"
    file[at["ceiling"] & (np.hypot(x, y - 2.2) < 0.8)] = "clutter_2"
    chairs = at["floor"] & (y > 1.5) & (y < 3.0)  # eleven of them: names sorted as text put 10 and 11 before 2
    file[chairs] = np.char.add("chair_", np.clip((x[chairs] + 2.5) / 5 * 11, 0, 10).astype(int).__add__(1).astype(str))
    return file


def _break(folder: Path, release: str) -> None:
    """Damage one line of ceiling_1.txt as the release has it; nothing in rooms that are sound."""
    path = folder / "Annotations" / "ceiling_1.txt"
    lines = path.read_bytes().split(b"\n")
    if (release, folder.name) == ("aligned", "hallway_6"):
        at = lines[40].rindex(b" ", 0, lines[40].rindex(b" "))  # before green
        lines[40] = lines[40][:at] + b"\x00" + lines[40][at + 1 :]
    elif (release, folder.name) == ("v1.2", "office_19"):
        lines[40] = lines[40][:-5] + b"\x10" + lines[40][-4:]  # 103.000000 -> 103.0\x100000
    path.write_bytes(b"\n".join(lines))


def _turn(degrees: float) -> Array:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.round([[c, -s, 0], [s, c, 0], [0, 0, 1]], 15)


def _about_the_middle(coord: Array, degrees: int) -> Array:
    center = (coord.min(axis=0) + coord.max(axis=0)) / 2
    return np.round((coord - center) @ _turn(degrees).T + center, 6)


def _inset(quad: Array) -> Array:
    return quad + 0.005 * (quad.mean(axis=0) - quad)


# --- images ---------------------------------------------------------------------------------------------------------


def _images(root: Path, room: Room, world: World, places: Array, size: int, holes: bool, seed: int) -> dict[str, Eye]:
    eyes: dict[str, Eye] = {}
    rng = np.random.default_rng([seed, 7])
    for stand, (position, frames) in enumerate(STANDS if room.folders else ()):
        folder = room.folders[stand % len(room.folders)]  # a room of two folders has one stand in each
        uuid = md5(f"{room.sample_id} {stand}".encode()).hexdigest()
        place = (position[0] * world.scale, position[1] * world.scale, position[2] * world.scale)
        area_from_frame = room.area_from_world
        if folder == "area_5b":
            area_from_frame = np.linalg.inv(AREA_5_FROM_5B) @ area_from_frame
        world_from_area = np.linalg.inv(area_from_frame)
        for frame, yaw, pitch, focal in frames:
            matrix, f = pose(place, yaw, pitch, 0.02 * frame), float(np.float32(focal * size))
            eye = _eye(size, f, matrix)
            stem = f"camera_{uuid}_{room.name}_frame_{frame}_domain"
            raw = np.rint(world.depth(eye) * 512).clip(0, 65534).astype(np.uint16)
            if holes:
                raw[_hole(eye, world, places, rng)] = 65535
            data = root / folder / "data"
            _save(data / "rgb" / f"{stem}_rgb.png", world.image(eye))
            _save(data / "depth" / f"{stem}_depth.png", raw)
            _json(data / "pose" / f"{stem}_pose.json", _pose(matrix @ world_from_area, f, size, room, uuid, frame))
            eyes[f"{folder}/{stem}"] = eye
        whole, stem = (
            panorama(2 * size // 3, size // 3, pose(place)),
            f"camera_{uuid}_{room.name}_frame_equirectangular",
        )
        around = np.rint(world.depth(whole, along_ray=True) * 512).astype(np.uint16)
        _save(root / folder / "pano" / "rgb" / f"{stem}_domain_rgb.png", world.image(whole))
        _save(root / folder / "pano" / "depth" / f"{stem}_domain_depth.png", around)
        posed = _pose(pose(place) @ world_from_area, size / 2, size, room, uuid, "equirectangular")
        _json(root / folder / "pano" / "pose" / f"{stem}_domain_pose.json", posed)
    return eyes


def _eye(size: int, focal: float, camera_from_world: Array) -> Eye:
    """A pinhole camera, its rays in closed form: `pinhole` iterates for them, as for any lens."""

    def to_ray(u: Array, v: Array) -> Array:
        return np.stack([(u - size / 2) / focal, (v - size / 2) / focal, np.ones_like(u)], axis=-1)

    return replace(pinhole(size, size, focal, focal, size / 2, size / 2, camera_from_world), to_ray=to_ray)


def _pose(
    camera_from_area: Array, focal: float, size: int, room: Room, uuid: str, frame: int | str
) -> dict[str, object]:
    rotation = camera_from_area[:3, :3]
    final = (np.diag([1.0, -1.0, -1.0]) @ rotation).T  # Blender's camera: x right, y up, looks along -z
    original = np.array([1.588, -0.0036, 2.76])
    rest = final @ _from_euler(original).T
    return {
        "camera_k_matrix": [[focal, 0.0, size / 2], [0.0, focal, size / 2], [0.0, 0.0, 1.0]],
        "field_of_view_rads": 2 * float(np.arctan(size / 2 / focal)),
        "camera_original_rotation": _single(original),
        "rotation_from_original_to_point": _single(_euler(rest)),
        "point_uuid": uuid,
        "camera_location": [round(float(x), 6) for x in -rotation.T @ camera_from_area[:3, 3]],
        "frame_num": frame,
        "camera_rt_matrix": [_single(row) for row in camera_from_area[:3]],
        "final_camera_rotation": _single(_euler(final)),
        "camera_uuid": uuid,
        "room": f"{room.name}_{room.area}",
    }


def _single(values: Array) -> list[float]:
    return [float(np.float32(value)) for value in values]


def _from_euler(angles: Array) -> Array:
    """Rotation of Blender's XYZ Euler angles: about x first."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    x, y = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]), np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ y @ x


def _euler(rotation: Array) -> Array:
    x, z = np.arctan2(rotation[2, 1], rotation[2, 2]), np.arctan2(rotation[1, 0], rotation[0, 0])
    return np.array([x, -np.arcsin(np.clip(rotation[2, 0], -1, 1)), z])


def _hole(eye: Eye, world: World, places: Array, rng: np.random.Generator) -> NDArray[np.bool_]:
    """[H, W] pixels without depth: some, and many that hidden points fall into; none within 2 of a visible point."""
    u, v, seen = eye.project(places)
    _, distance = world.cast(eye.origin, places - eye.origin)
    hole = rng.random((eye.height, eye.width)) < 0.01
    behind = seen & (distance < 0.9) & (rng.random(len(places)) < 0.5)
    hole[v[behind].astype(int), u[behind].astype(int)] = True
    front = seen & (distance > 0.98)
    keep = np.zeros((eye.height + 4, eye.width + 4), dtype=bool)
    for row in range(5):
        for column in range(5):
            keep[v[front].astype(int) + row, u[front].astype(int) + column] = True
    return hole & ~keep[2:-2, 2:-2]


def _save(path: Path, image: NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


def _json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# --- mesh -----------------------------------------------------------------------------------------------------------


def _quads(room: Room, world: World, folder: str) -> Iterator[Array]:
    """Corners [4, 3] in the frame of the folder, counterclockwise as the scanner sees them."""
    matrix = room.area_from_world
    if folder == "area_5b":
        matrix = np.linalg.inv(AREA_5_FROM_5B) @ matrix
    for normal, (_, quad) in zip(INWARD, world.quads(), strict=True):
        winding = quad if np.cross(quad[1] - quad[0], quad[2] - quad[0]) @ normal > 0 else quad[::-1]
        yield winding @ matrix[:3, :3].T + matrix[:3, 3]


def _mesh(folder: Path, quads: list[Array]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    x, y, z = np.concatenate(quads).T
    lines = ["mtllib rgb.mtl"]
    lines += ["v {:.6f} {:.6f} {:.6f}".format(*vertex) for vertex in np.stack([x, z, -y], axis=1)]
    lines += ["vt 0.0000 0.0000", "vt 1.0000 0.0000", "vt 1.0000 1.0000", "vt 0.0000 1.0000", "usemtl scan_0", "s off"]
    for first in range(1, 4 * len(quads) + 1, 4):
        lines += [f"f {first}/1 {first + 1}/2 {first + 2}/3", f"f {first}/1 {first + 2}/3 {first + 3}/4"]
    (folder / "rgb.obj").write_text("\n".join(lines) + "\n")
    texture = f"{md5(folder.parent.name.encode()).hexdigest()}.jpg"
    (folder / "rgb.mtl").write_text(f"newmtl scan_0\nKd 1.000000 1.000000 1.000000\nmap_Kd rgb_textures/{texture}\n")
    (folder / "rgb_textures").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (128, 128, 128)).save(folder / "rgb_textures" / texture)
