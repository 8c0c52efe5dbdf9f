"""ScanNet v2 as released, with what the ScanNet200 benchmark reads from it, of the analytic room.

Facts, and where they stand (S = github.com/ScanNet/ScanNet at 3830fce, P = Pointcept/Pointcept at d74c646, L =
RozDavid/LanguageGroundedSemseg at 3af87e9):

* Files of a scan: S README.md "Data Organization"; `download-scannet.py` names the file types, for `scans_test` only
  `.sens .txt _vh_clean.ply _vh_clean_2.ply` (FILETYPES_TEST; S issues and Open3D-ML issue 450 show such folders), and
  puts `scannetv2-labels.combined.tsv` at the root of the download.
* `_vh_clean_2.ply`: MeshLab wrote it with `-m vc` (S Server/scan_processor.py), so VCGLIB's header, vertex colours with
  alpha, no normals; +z up, but not axis-aligned. `.labels.ply` has a further `label`: the nyu40id, 0 = not annotated
  (S README); scene0270_00, 0270_02 and 0384_00 hold nyuIds (50, 149) there instead (S issues 20 and 86).
* `.segs.json`: `segIndices`, one for each vertex; a segment is named after one of its vertices (S Segmentator, the root
  of a union-find), so the numbers are large and have gaps. `params` are strings (S README).
* `.aggregation.json`: layout as S AnnotationTools/common/Aggregation.h writes it; `id` and `objectId` count from 0. The
  files with `_vh_clean.` belong to the high-resolution mesh: other vertices, other segments. scene0217_00 lists all its
  objects twice, the second time with further ids (S issue 51).
* Labels: a group's `label` is a `raw_category` of the table; the `id` there (not nyu40id, not `category`) is the class,
  if it is one of VALID_CLASS_IDS_200; later groups overwrite earlier ones, a point's instance is its group's `id` (S
  BenchmarkScripts/ScanNet200/{preprocess_scannet200,utils,scannet200_constants}.py, P preprocess_scannet.py).
* Table: columns and rows of P meta_data/scannetv2-labels-old.combined.tsv. P's other copy is edited: row `stick` has
  become a second `object`, the `category` "wardrobe " has lost its space (as L scannet_long.py does when it loads the
  release), lines end in CR CR LF, the last one in nothing.
* `<scan>.txt`: "key = value" lines in alphabetical order. axisAlignment (mesh to axes) and sceneType count as
  annotation: test scans lack both (Open3D-ML issue 450). Some scans have colorToDepthExtrinsics, but in the released
  streams depth is already registered to colour: apply none of it (S issue 92, S Calibrate/src/calibration.h).
* Frames: S SensReader/python/SensorData.py writes `color/<i>.jpg`, `depth/<i>.png` (16 bits, millimetres, 0 = none),
  `pose/<i>.txt` (camera to mesh, "%f", all -inf where tracking was lost: S issue 9) and `intrinsic/*.txt`, from the
  `.sens` of S SensReader/c++/src/sensorData.h, which ends in IMU frames.

Not checked against the release, which needs a signed form: comment lines of the PLY headers, the type `ushort` of
`label`, line ends of `.txt` and of the table, "scannet." and "Aggregator.v2" in v2 aggregations (a v1 file that is
public, LouYJ/Matching scene0000_00.aggregation.json, has neither; ids and text layout are as here).
Left out: `_2d-label.zip` and its like. Images are `shrink` times smaller than 1296x968 and 640x480, all files say so.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from world import NAMES, Array, Eye, Truth, World, pose

Frames = Literal["exported", "sens", "none"]
Objects = Mapping[str, Sequence[str | None]]

TABLE = """\
id|raw_category|category|count|nyu40id|eigen13id|nyuClass|nyu40class|eigen13class|ModelNet40|ModelNet10|ShapeNetCore55|synsetoffset|wnsynsetid|wnsynsetkey|mpcat40|mpcat40index
1|wall|wall|8277|1|12|wall|wall|Wall|||||n04546855|wall.n.01|wall|1
2|chair|chair|4646|5|4|chair|chair|Chair|chair|chair|chair|3001627|n03001627|chair.n.01|chair|3
3|floor|floor|1553|2|5|floor|floor|Floor|||||n03365592|floor.n.01|floor|2
5|door|door|1483|8|12|door|door|Wall|door||||n03221720|door.n.01|door|4
1163|object|object|1313|40|7||otherprop|Objects|||||||objects|39
16|window|window|1209|9|13|window|window|Window|||||n04587648|window.n.01|window|9
56|trash can|trash can|1090|39|6|garbage bin|otherfurniture|Furniture|||trash_bin|2747177|n02747177|ashcan.n.01|objects|39
15|picture|picture|862|11|8|picture|picture|Picture|||||n03931044|picture.n.01|picture|6
41|ceiling|ceiling|806|22|3|ceiling|ceiling|Ceiling|||||n02990373|ceiling.n.01|ceiling|17
10|office chair|office chair|595|5|4|chair|chair|Chair|chair|chair|chair|3001627|n04373704|swivel_chair.n.01|chair|3
18|bookshelf|bookshelf|360|10|6|bookshelf|bookshelf|Furniture|bookshelf||bookshelf|2871439|n02871439|bookshelf.n.01|shelving|31
52|whiteboard|whiteboard|327|30|7|whiteboard|whiteboard|Objects|||||n03211616|display_panel.n.01|board_panel|35
29|kitchen cabinet|kitchen cabinet|310|3|6|cabinet|cabinet|Furniture|||||n02933112|cabinet.n.01|cabinet|7
29|kitchen cabinets|kitchen cabinet|289|3|6|cabinet|cabinet|Furniture|||cabinet|2933112|n02933112|cabinet.n.01|cabinet|7
63|shoes|shoe|272|40|7|shoe|otherprop|Objects|||||n04199027|shoe.n.01|clothes|38
77|laptop|laptop|111|40|7|laptop|otherprop|Objects|laptop||laptop|3642806|n03642806|laptop.n.01|objects|39
5|doors|door|76|8|12|door|door|Wall|door||||n03221720|door.n.01|door|4
1168|ceiling light|ceiling light|59|38|7|light|otherstructure|Objects|||||n03665366|light.n.02|lighting|28
1169|trash bin|trash bin|52|39|6|garbage bin|otherfurniture|Furniture|||trash_bin|2747177|n02747177|ashcan.n.01|objects|39
79|papers|paper|39|26|7|paper|paper|Objects|||||n14974264|paper.n.01|objects|39
2|stack of chairs|chair|35|5|4|chair|chair|Chair|chair|chair|chair|3001627|n03001627|chair.n.01|chair|3
104|stand|stand|23|39|6|stand|otherfurniture|Furniture|table|table|table|4379243|n04301000|stand.n.04|table|5
1177|wardrobe cabinet|wardrobe |18|39|6|wardrobe|otherfurniture|Furniture|wardrobe||||n04550184|wardrobe.n.01|furniture|36
18|bookshelves|bookshelf|17|10|6|bookshelf|bookshelf|Furniture|bookshelf||bookshelf|2871439|n02871439|bookshelf.n.01|shelving|31
1188|poster|poster|13|11|8|picture|picture|Picture|||||n03931044|picture.n.01|picture|6
1191|mattress|mattress|12|4|1|bed|bed|Bed|bed|bed|bed|2818832|n02818832|bed.n.01|bed|11
25|drawer|drawer|11|39|6|drawer|otherfurniture|Furniture|||||n03233905|drawer.n.01|furniture|36
1193|folded table|folded table|10|7|10|table|table|Table|table|table|table|4379243|n04379243|table.n.02|table|5
15|pictures|picture|3|11|8|picture|picture|Picture|||||n03931044|picture.n.01|picture|6
99|wardrobe|wardrobe|1|39|6|wardrobe|otherfurniture|Furniture|wardrobe||||n04550184|wardrobe.n.01|furniture|36
1163|stick|stick|1|40|7|stick|otherprop|Objects|||||||objects|39"""  # noqa: E501
"""Some rows of the label table, most frequent first as in the release; "|" stands for the tab."""

CLASSES = {
    1: "wall", 2: "chair", 3: "floor", 5: "door", 10: "office chair", 15: "picture", 16: "window", 18: "bookshelf",
    29: "kitchen cabinet", 41: "ceiling", 52: "whiteboard", 56: "trash can", 63: "shoe", 77: "laptop", 79: "paper",
    99: "wardrobe", 104: "stand", 1163: "object", 1168: "ceiling light", 1169: "trash bin", 1188: "poster",
    1191: "mattress",
}  # fmt: skip
"""id -> name of VALID_CLASS_IDS_200 / CLASS_LABELS_200; 25, 1177 and 1193 are none of the 200."""

NYU40_COLORS = {
    1: (174, 199, 232), 2: (152, 223, 138), 3: (31, 119, 180), 4: (255, 187, 120), 5: (188, 189, 34),
    7: (255, 152, 150), 8: (214, 39, 40), 9: (197, 176, 213), 10: (148, 103, 189), 11: (196, 156, 148),
    22: (78, 71, 183), 26: (153, 98, 156), 30: (178, 127, 135), 38: (94, 106, 211), 39: (82, 84, 163),
    40: (100, 85, 144),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What sets a scan apart. Every surface is cut into strips, one object each; None: in no segGroup.

    Args:
        room: yaw, roll and translation of the room in the mesh's frame.
        eyes: position, yaw, pitch and roll of every camera.
        objects: raw categories by surface.
        extrinsics: colorToDepthExtrinsics of the `.txt`.
        twice: whether the aggregation lists its objects twice.
    """

    name: str
    split: str
    room: tuple[float, float, tuple[float, float, float]]
    eyes: tuple[tuple[tuple[float, float, float], float, float, float], ...]
    objects: Objects
    extrinsics: str = ""
    twice: bool = False


_EXTRINSICS = (
    "0.999263 -0.010031 0.037048 -0.038549 0.009933 0.999947 0.002817 -0.004287 "
    "-0.037074 -0.002447 0.999310 -0.020574 -0.000000 0.000000 -0.000000 1.000000"
)
SCANS = (
    Scan(
        name="scene0270_00", split="train", room=(0.65, 0.02, (3.4, 2.1, -0.07)),
        eyes=(
            ((0.1, 0.35, 1.55), 0.05, 0.28, 0.04), ((-1.9, 0.8, 1.6), -0.95, 0.22, -0.05),
            ((1.3, 0.9, 1.5), 0.85, 0.3, 0.03), ((-0.2, 3.0, 1.2), 2.8, 0.05, 0.0),
        ),
        objects={
            "floor": ["floor", "folded table"], "ceiling": ["ceiling", "ceiling light"],
            "left": ["wall", "doors", "wall"], "right": ["wall", "pictures"], "near": ["wall", "stand", "papers"],
            "far": ["wall", "office chair", "wardrobe cabinet", "trashcan"],
            "board": ["whiteboard", "stick"], "panel": ["kitchen cabinets", None],
        },
    ),
    Scan(
        name="scene0217_00", split="val", room=(-2.2, -0.03, (2.9, 5.2, 0.04)),
        eyes=(
            ((-0.5, 0.4, 1.6), -0.1, 0.25, -0.03), ((-1.6, 1.9, 1.4), -1.45, 0.3, 0.02),
            ((0.4, 1.0, 1.7), 0.7, 0.32, 0.0),
        ),
        objects={
            "floor": ["floor", "stack of chairs"], "ceiling": ["ceiling", None],
            "left": ["wall", "bookshelves"], "right": ["wall", "window"], "near": ["wall", "trash bin", "trash can"],
            "far": ["wall", "object", "mattress"],
            "board": ["poster", "laptop", "shoes"], "panel": ["drawer", "wardrobe", None],
        },
        extrinsics=_EXTRINSICS, twice=True,
    ),
    Scan(
        name="scene0707_00", split="test", room=(1.4, 0.01, (5.6, 1.3, -0.02)),
        eyes=(
            ((0.3, 0.3, 1.5), 0.12, 0.26, 0.05), ((-1.7, 1.2, 1.5), -1.15, 0.25, 0.0),
            ((1.0, 1.4, 1.6), 1.1, 0.35, -0.04),
        ),
        objects={name: [None] for name in NAMES}, extrinsics=_EXTRINSICS,
    ),
)  # fmt: skip


def write(
    root: Path,
    *,
    world: World = World(),  # noqa: B008 - frozen
    frames: Frames = "exported",
    table: Literal["release", "pointcept"] = "release",
    shrink: int = 4,
    holes: bool = False,
) -> list[Truth]:
    """Write a train, a val and a test scan below `root`; coordinates of the truth are those of `_vh_clean_2.ply`.

    Args:
        root: the folder that `download-scannet.py -o` made.
        world: the room.
        frames: "exported" by SensorData.py (every tenth frame), the `.sens` as downloaded (every frame; between two
            views the first is repeated), or "none": annotations and meshes only.
        table: the label table as released, or the edited copy that comes with Pointcept, which lacks "stick".
        shrink: images are 1296x968 (depth 640x480) divided by this; a divisor of 4, real sizes for 1.
        holes: whether depth is missing (0) in a border and at scattered pixels, as the registration leaves it.
    """
    root.mkdir(parents=True, exist_ok=True)
    rows = _write_table(root / "scannetv2-labels.combined.tsv", table)
    return [_write_scan(root, scan, rows, world, frames, shrink, holes) for scan in SCANS]


def _write_table(path: Path, kind: str) -> dict[str, dict[str, str]]:
    """Rows by raw category; the first of a name counts."""
    text, end, last = TABLE, "\n", "\n"
    if kind == "pointcept":
        text = text.replace("1163|stick|stick|", "1163|object|stick|").replace("|wardrobe |", "|wardrobe|")
        end, last = "\r\r\n", ""
    path.write_bytes((text.replace("|", "\t").replace("\n", end) + last).encode())
    columns, *lines = (line.split("|") for line in text.split("\n"))
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        rows.setdefault(line[1], dict(zip(columns, line, strict=True)))
    return rows


def _write_scan(
    root: Path, scan: Scan, rows: dict[str, dict[str, str]], world: World, frames: Frames, shrink: int, holes: bool
) -> Truth:
    folder = root / ("scans_test" if scan.split == "test" else "scans") / scan.name
    folder.mkdir(parents=True, exist_ok=True)
    mesh_from_room = _mesh_from_room(scan, world)
    lenses = COLOR.shrunk(shrink), DEPTH.shrunk(shrink)
    poses = [pose(tuple(world.scale * c for c in place), *angles) for place, *angles in scan.eyes]
    if frames != "none":
        _write_frames(folder, mesh_from_room, poses, lenses, world, frames, holes)
    _write_info(folder, scan, lenses, mesh_from_room)
    fine = _Mesh.of(world, scan.objects, spacing=0.085, seed=7)
    _write_ply(folder / f"{scan.name}_vh_clean.ply", fine.moved(mesh_from_room), fine.color(world), fine.faces)
    mesh = _Mesh.of(world, scan.objects, spacing=0.11, seed=3)
    coord, color = mesh.moved(mesh_from_room), mesh.color(world)
    _write_ply(folder / f"{scan.name}_vh_clean_2.ply", coord, color, mesh.faces)
    normal = mesh.normal @ mesh_from_room[:3, :3].T
    channels: dict[str, NDArray[Any]] = {"color": color, "normal": normal.astype(np.float32)}
    label = None
    if scan.split != "test":
        groups = _write_annotation(folder, scan, mesh, "_vh_clean_2.0.010000.segs.json", ".aggregation.json")
        _write_annotation(folder, scan, fine, "_vh_clean.segs.json", "_vh_clean.aggregation.json")
        raw = np.array([name or "" for name in mesh.names])[mesh.object]
        ids = np.array([int(rows[name]["id"]) if name in rows else 0 for name in raw])
        label = np.array([CLASSES.get(i, "") for i in ids.tolist()])
        channels["instance"] = np.array([groups.get(i, -1) for i in mesh.object.tolist()], np.int32)
        nyu40 = np.array([int(rows[name]["nyu40id"]) if name in rows else 0 for name in raw], np.uint16)
        if scan.name == "scene0270_00":
            nyu40[raw == "stand"] = 50  # its nyuId
        shown = np.array([NYU40_COLORS.get(i, (0, 0, 0)) for i in nyu40.tolist()], np.uint8)
        _write_ply(folder / f"{scan.name}_vh_clean_2.labels.ply", coord, shown, mesh.faces, nyu40)
    return Truth(
        sample_id=scan.name,
        split=scan.split,
        world=mesh.place,
        coord=coord.astype(float),
        label=label,
        eyes={str(10 * i): lenses[0].eye(p) for i, p in enumerate(poses)} if frames != "none" else {},
        channels=channels,
    )


def _mesh_from_room(scan: Scan, world: World) -> Array:
    """[4, 4]: upright up to a degree or two, turned about z, a few metres off."""
    yaw, tilt, shift = scan.room
    c, s, ct, st = np.cos(yaw), np.sin(yaw), np.cos(tilt), np.sin(tilt)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, ct, -st], [0, st, ct]])
    matrix[:3, 3] = np.array(shift) * world.scale
    return matrix


# --- the mesh -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Mesh:
    """Triangles over the room, vertices in no order: places, unit normals, the object and the segment of each vertex.

    Args:
        names: raw category of every object.
        segment: named after one of the segment's vertices.
    """

    place: Array
    normal: Array
    faces: NDArray[np.int32]
    object: NDArray[np.int64]
    segment: NDArray[np.int64]
    names: list[str | None]

    @staticmethod
    def of(world: World, objects: Objects, *, spacing: float, seed: int) -> _Mesh:
        """About `spacing` metres between vertices, a third of that on the small surfaces."""
        rng = np.random.default_rng(seed)
        names: list[str | None] = []
        parts: list[tuple[NDArray[Any], ...]] = []
        count = 0
        for surface, quad in world.quads():
            step = (spacing / 3 if surface in ("board", "panel") else spacing) * world.scale
            place, normal, faces, a, patch = _grid(quad, step, np.array([0, 1.5, 1.5]) * world.scale, rng)
            strips = objects[surface]
            of = np.minimum((a * len(strips)).astype(int), len(strips) - 1) + len(names)
            parts.append((place, np.tile(normal, (len(place), 1)), faces + count, of, np.stack([of, patch], axis=1)))
            names.extend(strips)
            count += len(place)
        place, normal, faces, of, cell = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = rng.permutation(count)
        _, first, inverse = np.unique(cell[order], axis=0, return_index=True, return_inverse=True)
        return _Mesh(
            place=place[order],
            normal=normal[order],
            faces=rng.permutation(np.argsort(order)[faces]).astype(np.int32),
            object=of[order],
            segment=first[inverse.ravel()],
            names=names,
        )

    def moved(self, matrix: Array) -> NDArray[np.float32]:
        return (self.place @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32)

    def color(self, world: World) -> NDArray[np.uint8]:
        return np.rint(world.color(self.place)).astype(np.uint8)


def _grid(quad: Array, step: float, front: Array, rng: np.random.Generator) -> tuple[NDArray[Any], ...]:
    """Shaken grid of triangles over a surface: places, normal towards `front`, faces, 0..1 along the first side, patch.

    It ends half a step before the surface's own edges: a vertex in a corner of the room would lie on two surfaces.
    """
    sides = quad[1] - quad[0], quad[3] - quad[0]
    m, n = (round(float(np.linalg.norm(side)) / step) for side in sides)
    i, j = (x.ravel() for x in np.meshgrid(np.arange(m), np.arange(n), indexing="ij"))
    a, b = ((k + 0.5 + rng.uniform(-0.2, 0.2, m * n)) / count for k, count in ((i, m), (j, n)))
    normal = np.cross(*sides) / np.linalg.norm(np.cross(*sides))
    k = (np.arange(m - 1)[:, None] * n + np.arange(n - 1)).ravel()
    faces = np.concatenate([np.stack([k, k + n, k + n + 1], axis=1), np.stack([k, k + n + 1, k + 1], axis=1)])
    if normal @ (front - quad[0]) < 0:
        normal, faces = -normal, faces[:, ::-1]
    return quad[0] + a[:, None] * sides[0] + b[:, None] * sides[1], normal, faces, a, i // 5 * 1000 + j // 5


def _write_ply(
    path: Path,
    coord: NDArray[np.float32],
    color: NDArray[np.uint8],
    faces: NDArray[np.int32],
    label: NDArray[np.uint16] | None = None,
) -> None:
    """Binary PLY; `alpha` is 255, `label` only where given."""
    alpha = np.full(len(coord), 255, np.uint8)
    values = dict(zip(("x", "y", "z", "red", "green", "blue", "alpha"), (*coord.T, *color.T, alpha), strict=True))
    if label is not None:
        values["label"] = label
    columns = [(name, value.dtype.newbyteorder("<").str) for name, value in values.items()]
    vertices = np.zeros(len(coord), columns)
    for name, value in values.items():
        vertices[name] = value
    triangles = np.zeros(len(faces), [("count", "u1"), ("index", "<i4", 3)])
    triangles["count"], triangles["index"] = 3, faces
    kinds = {"<f4": "float", "|u1": "uchar", "<u2": "ushort"}
    header = ["ply", "format binary_little_endian 1.0", "comment VCGLIB generated", f"element vertex {len(coord)}"]
    header += [f"property {kinds[kind]} {name}" for name, kind in columns]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header\n"]
    path.write_bytes("\n".join(header).encode() + vertices.tobytes() + triangles.tobytes())


def _write_annotation(folder: Path, scan: Scan, mesh: _Mesh, segments: str, aggregation: str) -> dict[int, int]:
    """Segments and groups of one mesh; the `id` of the last group of every annotated object."""
    params = {"kThresh": "0.0001", "segMinVerts": "20", "minPoints": "750", "maxPoints": "30000",
              "thinThresh": "0.05", "flatThresh": "0.001", "minLength": "0.02", "maxLength": "1"}  # fmt: skip
    content = {"params": params, "sceneId": scan.name, "segIndices": mesh.segment.tolist()}
    (folder / f"{scan.name}{segments}").write_text(json.dumps(content, separators=(",", ":")))
    rng, groups, last = np.random.default_rng(11), [], {}
    for _ in range(1 + scan.twice):
        for index, name in enumerate(mesh.names):
            if name is None:
                continue
            last[index] = len(groups)
            members = rng.permutation(np.unique(mesh.segment[mesh.object == index])).tolist()
            groups.append(
                f'\t{{\n\t"id": {len(groups)},\n\t"objectId": {len(groups)},\n'
                f'\t"segments": [{",".join(map(str, members))}],\n\t"label": {json.dumps(name)}\n\t}}'
            )
    (folder / f"{scan.name}{aggregation}").write_text(
        f'{{\n"sceneId": "scannet.{scan.name}",\n"appId": "Aggregator.v2",\n"segGroups": [\n'
        + ",\n".join(groups)
        + f'\n],\n"segmentsFile": "scannet.{scan.name}{segments}"}}\n'
    )
    return last


# --- the frames -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lens:
    """A pinhole."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float

    def shrunk(self, by: int) -> _Lens:
        return _Lens(self.width // by, self.height // by, self.fx / by, self.fy / by, self.cx / by, self.cy / by)

    @property
    def matrix(self) -> Array:
        return np.array([[self.fx, 0, self.cx, 0], [0, self.fy, self.cy, 0], [0, 0, 1, 0], [0, 0, 0, 1]])

    def eye(self, camera_from_world: Array) -> Eye:
        # Not `world.pinhole`, which inverts every ray by iteration: most of the time of a test.
        def to_pixel(p: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
            seen = p[..., 2] > 1e-6
            z = np.where(seen, p[..., 2], 1.0)
            return self.fx * p[..., 0] / z + self.cx, self.fy * p[..., 1] / z + self.cy, seen

        def to_ray(u: Array, v: Array) -> Array:
            return np.stack([(u - self.cx) / self.fx, (v - self.cy) / self.fy, np.ones_like(u)], axis=-1)

        size = {"width": self.width, "height": self.height}
        return Eye(**size, camera_from_world=camera_from_world, to_pixel=to_pixel, to_ray=to_ray)


COLOR = _Lens(1296, 968, 1170.187988, 1170.187988, 647.75, 483.75)
DEPTH = _Lens(640, 480, 577.870605, 577.870605, 319.5, 239.5)
Lenses = tuple[_Lens, _Lens]


def _write_info(folder: Path, scan: Scan, lenses: Lenses, mesh_from_room: Array) -> None:
    yaw = scan.room[0]
    turn = np.eye(4)  # about z only, and to an origin of its own
    turn[:2, :2] = [[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]]
    turn[:3, 3] = -turn[:3, :3] @ mesh_from_room[:3, 3] + (0.12, -1.9, 0.03)
    lines = {"numColorFrames": str(10 * len(scan.eyes) + 1), "numDepthFrames": str(10 * len(scan.eyes))}  # as real ones
    lines |= {"numIMUmeasurements": "4", "colorToDepthExtrinsics": scan.extrinsics}
    if scan.split != "test":
        lines |= {"axisAlignment": " ".join(f"{v:f}" for v in turn.ravel()) + " ", "sceneType": "Misc."}
    for kind, lens in zip(("color", "depth"), lenses, strict=True):
        lines |= {f"{kind}Height": str(lens.height), f"{kind}Width": str(lens.width)}
        values = {"fx": lens.fx, "fy": lens.fy, "mx": lens.cx, "my": lens.cy}
        lines |= {f"{key}_{kind}": f"{value:f}" for key, value in values.items()}
    text = "".join(f"{key} = {value}\n" for key, value in sorted(lines.items()) if value)
    (folder / f"{scan.name}.txt").write_text(text)


def _write_frames(
    folder: Path, mesh_from_room: Array, poses: list[Array], lenses: Lenses, world: World, frames: Frames, holes: bool
) -> None:
    """Every tenth frame is a view of its own; tracking is lost at the end (pose -inf, images still there)."""
    lost = np.full((4, 4), -np.inf)
    color, depth = lenses
    views = [(mesh_from_room @ np.linalg.inv(p), p) for p in poses] + [(lost, poses[0])]
    shots = [(m, _jpeg(world.image(color.eye(p))), _raw_depth(world, depth.eye(p), holes)) for m, p in views]
    if frames == "sens":
        _write_sens(folder / f"{folder.name}.sens", shots, lenses)
        return
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(exist_ok=True)
    for i, (matrix, jpeg, raw) in enumerate(shots):
        (folder / "color" / f"{10 * i}.jpg").write_bytes(jpeg)
        Image.fromarray(raw).save(folder / "depth" / f"{10 * i}.png")
        np.savetxt(folder / "pose" / f"{10 * i}.txt", matrix, fmt="%f")
    for name, lens in (("color", color), ("depth", depth)):
        np.savetxt(folder / "intrinsic" / f"intrinsic_{name}.txt", lens.matrix, fmt="%f")
        np.savetxt(folder / "intrinsic" / f"extrinsic_{name}.txt", np.eye(4), fmt="%f")


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=98, subsampling=0)
    return out.getvalue()


def _raw_depth(world: World, eye: Eye, holes: bool) -> NDArray[np.uint16]:
    raw = np.rint(1000 * world.depth(eye)).astype(np.uint16)
    if holes:
        raw[np.random.default_rng(5).random(raw.shape) < 0.03] = 0
        raw[:, : raw.shape[1] // 40] = 0
        raw[-raw.shape[0] // 40 :] = 0
    return raw


def _write_sens(path: Path, shots: list[tuple[Array, bytes, NDArray[np.uint16]]], lenses: Lenses) -> None:
    """Version 4: jpeg colour (2), zlib depth (1), shift 1000, frames, IMU frames; all little-endian."""
    name = b"StructureSensor"
    out = struct.pack("<IQ", 4, len(name)) + name
    out += b"".join(np.asarray(m, "<f4").tobytes() for lens in lenses for m in (lens.matrix, np.eye(4)))
    out += struct.pack("<ii", 2, 1) + struct.pack("<4I", *(n for lens in lenses for n in (lens.width, lens.height)))
    number = 10 * len(shots) - 9
    out += struct.pack("<fQ", 1000, number)
    packed = [
        (np.asarray(m, "<f4").tobytes(), jpeg, zlib.compress(raw.astype("<u2").tobytes())) for m, jpeg, raw in shots
    ]
    for i in range(number):
        matrix, jpeg, blob = packed[i // 10]
        out += matrix + struct.pack("<4Q", 33_333 * i, 33_333 * i, len(jpeg), len(blob)) + jpeg + blob
    out += struct.pack("<Q", 4) + b"".join(struct.pack("<15dQ", *([0.1] * 15), 20_000 * i) for i in range(4))
    path.write_bytes(out)
