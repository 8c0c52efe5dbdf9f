"""Writer of the point clouds of `posed` captures, in PLY, LAS, LAZ and PCD, and of their labels and classes.

Facts and their sources:

- PCL `pcd_file_format.rst` and `pcd_io.cpp`: `_` pads; rgb is packed into a float; CloudCompare issues 1731 and 2043:
  PLY scalars are floats, named `scalar_*`. LAS 1.2 and its extra bytes: from memory, checked with laspy. LZF and the
  fields behind one another of compressed PCD: from memory, checked with pypcd4.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from world import NAMES, Array, World

CLASSES = {"wall": (174, 199, 232), "floor": (152, 223, 138), "office board": (255, 187, 120), "panel": (197, 176, 213)}
CLASS_OF = dict(zip(NAMES, ("floor", "", "wall", "wall", "wall", "wall", "office board", "panel"), strict=True))
_JSON_IDS = {"floor": 2, "wall": 6, "office board": 20, "panel": 21}  # LAS: 2 ground, 6 building
_NORMALS = np.array([[0, 0, 1], [0, 0, -1], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, -1, 0], [-1, 0, 0.0]])


class Cloud:
    """The points of a capture with what formats can hold of them."""

    def __init__(
        self, places: Array, surface: NDArray[np.int64], world: World, file_from_room: Array, ids: Mapping[str, int],
        labelled: bool, label_name: str | None,
    ) -> None:  # fmt: skip
        self.coord = places @ file_from_room[:3, :3].T + file_from_room[:3, 3]
        self.normal = (_NORMALS[surface] @ file_from_room[:3, :3].T).astype("f4")
        self.color = np.rint(world.color(places)).astype(np.uint8)
        self.strength = (1000 + 97 * np.arange(len(places)) % 50_000).astype("u2")
        self.label = np.array([ids[CLASS_OF[NAMES[s]]] for s in surface]) if labelled else None
        self.instance = np.where(surface == 6, 1, np.where(surface == 7, 2, -1)).astype("i4")
        self.label_name = label_name

    def write(
        self, folder: Path, stem: str, points: str, binary: bool
    ) -> tuple[Array, dict[str, NDArray[np.generic]], str]:
        """Coordinates and channels as written, and the name of the file."""
        name = f"{stem}.{points.split('-')[0]}"
        if points == "ply":
            return *self._write_ply(folder / name, binary), name
        if points.startswith("pcd"):
            return *self._write_pcd(folder / name, "binary_compressed" if "-" in points else "", binary), name
        found = self._write_las(folder / f"{stem}.las")
        if points == "laz":
            import laspy  # the compression is not for writing by hand

            laspy.read(folder / f"{stem}.las").write(folder / name)
            (folder / f"{stem}.las").unlink()
        return *found, name

    def _xyz(self) -> dict[str, NDArray[Any]]:
        kind = "<f4" if np.abs(self.coord).max() < 4096 else "<f8"
        return {axis: self.coord[:, i].astype(kind) for i, axis in enumerate("xyz")}

    def _write_ply(self, path: Path, binary: bool) -> tuple[Array, dict[str, NDArray[np.generic]]]:
        table = self._xyz()
        table |= {name: self.normal[:, i] for i, name in enumerate(("nx", "ny", "nz"))} if binary else {}
        table |= {name: self.color[:, i] for i, name in enumerate(("red", "green", "blue"))}
        channels: dict[str, NDArray[np.generic]] = {"color": self.color} | ({"normal": self.normal} if binary else {})
        if self.label is not None:
            label = self.label_name or "label"
            table[label] = self.label.astype("<f4" if label.startswith("scalar_") else "u1")
            table["instance"] = channels["instance"] = self.instance
        words = {"f4": "float", "f8": "double", "u1": "uchar" if binary else "uint8", "i4": "int"}
        form = "binary_little_endian" if binary else "ascii"
        head = f"ply\nformat {form} 1.0\ncomment a scan\nelement vertex {len(self.coord)}\n"
        head += "".join(f"property {words[a.dtype.str[1:]]} {name}\n" for name, a in table.items())
        head += "element face 0\nproperty list uchar int vertex_indices\n" if binary else ""
        path.write_bytes(head.encode() + b"end_header\n" + (_rows(table).tobytes() if binary else _text(table)))
        return _as_written(table, binary), channels

    def _write_pcd(self, path: Path, form: str, binary: bool) -> tuple[Array, dict[str, NDArray[np.generic]]]:
        form = form or ("binary" if binary else "ascii")
        rgb = (self.color.astype("<u4") << np.array([16, 8, 0], "<u4")).sum(axis=1, dtype="<u4")
        table = self._xyz()
        table |= {"_": np.zeros((len(rgb), 4), "u1")} if form == "binary" else {}  # PCL's structures are padded
        table["rgb"] = rgb if form == "ascii" else rgb.view("<f4")
        table["intensity"] = self.strength.astype("<f4")
        table |= {f"normal_{axis}": self.normal[:, i] for i, axis in enumerate("xyz")}
        if self.label is not None:
            table["label"] = self.label.astype("<u4")
        arrays = table.values()
        lines: dict[str, Sequence[Any]] = {
            "VERSION": ["0.7"],
            "FIELDS": [*table],
            "SIZE": [a.itemsize for a in arrays],
            "TYPE": [a.dtype.kind.upper() for a in arrays],
            "COUNT": [a[0].size for a in arrays],
            "WIDTH": [len(rgb)],
            "HEIGHT": [1],
            "VIEWPOINT": [0, 0, 0, 1, 0, 0, 0],
            "POINTS": [len(rgb)],
            "DATA": [form],
        }
        head = "# .PCD v0.7 - Point Cloud Data file format\n"
        head += "".join(f"{key} {' '.join(map(str, values))}\n" for key, values in lines.items())
        if form == "binary_compressed":  # one field behind the other
            body = b"".join(a.tobytes() for a in arrays)
            packed = _lzf(body)
            data = struct.pack("<II", len(packed), len(body)) + packed
        else:
            data = _rows(table).tobytes() if form == "binary" else _text(table)
        path.write_bytes(head.encode() + data)
        strength = self.strength.astype(np.float32)
        channels = {"color": self.color, "normal": self.normal, "strength": strength}
        return _as_written(table, form != "ascii"), channels

    def _write_las(self, path: Path) -> tuple[Array, dict[str, NDArray[np.generic]]]:
        """LAS 1.2, point format 2."""
        scale, shift, count = 0.001, np.floor(self.coord.min(axis=0)), len(self.coord)
        steps = np.rint((self.coord - shift) / scale).astype("<i4")
        coord = steps * scale + shift
        fields = [("xyz", "<i4", 3), ("intensity", "<u2"), ("returns", "u1"), ("classification", "u1"), ("angle", "i1")]
        fields += [("user", "u1"), ("source", "<u2"), ("rgb", "<u2", 3)]
        extra = self.label_name is not None and self.label is not None
        rows = np.zeros(count, [*fields, ("label", "u1")] if extra else fields)
        rows["xyz"], rows["intensity"], rows["returns"] = steps, self.strength, 0b001_001  # the first return of one
        rows["rgb"] = self.color.astype("<u2") * 257  # the whole range of 16 bits
        if extra:
            rows["label"] = self.label
        elif self.label is not None:
            rows["classification"] = self.label
        rows["classification"] |= np.where(np.arange(count) % 7 == 0, 0b0100_0000, 0).astype("u1")  # flag: key point
        vlr = b""
        if extra:
            name = str(self.label_name).encode()
            described = struct.pack("<2xBB32s4x120x32s", 1, 0, name, b"semantic class")  # data type 1: unsigned char
            vlr = struct.pack("<H16sHH32s", 0, b"LASF_Spec", 4, len(described), b"Extra Bytes Record") + described
        bounds = np.stack([coord.max(axis=0), coord.min(axis=0)], axis=1).ravel()
        head = struct.pack("<4sHHIHH8sBB", b"LASF", 0, 0, 0, 0, 0, b"", 1, 2)
        head += struct.pack("<32s32sHHHII", b"OTHER", b"a scanner", 64, 2024, 227, 227 + len(vlr), 1 if extra else 0)
        head += struct.pack("<BHI5I", 2, rows.itemsize, count, count, 0, 0, 0, 0)
        head += struct.pack("<12d", scale, scale, scale, *shift, *bounds)
        path.write_bytes(head + vlr + rows.tobytes())
        return coord, {"color": self.color, "strength": self.strength.astype(np.float32)}


def _rows(table: Mapping[str, NDArray[Any]]) -> NDArray[np.void]:
    rows = np.empty(len(table["x"]), [(name, a.dtype, a.shape[1:]) for name, a in table.items()])
    for name, array in table.items():
        rows[name] = array
    return rows


def _text(table: Mapping[str, NDArray[Any]]) -> bytes:
    formats = ["{:8f}" if a.dtype.kind == "f" else "{}" for a in table.values()]
    line = " ".join(formats) + "\n"
    return "".join(line.format(*row) for row in zip(*(a.tolist() for a in table.values()), strict=True)).encode()


def _as_written(table: Mapping[str, NDArray[Any]], exact: bool) -> Array:
    coord = np.stack([table[axis] for axis in "xyz"], axis=1)
    if not exact:
        coord = np.array([float(f"{value:f}") for value in coord.ravel().tolist()], coord.dtype).reshape(-1, 3)
    return coord.astype(np.float64)


def _lzf(data: bytes) -> bytes:
    """Valid LZF that repeats nothing: runs of up to 32 bytes behind their length less one."""
    runs = (data[i : i + 32] for i in range(0, len(data), 32))
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


# --- labels ---------------------------------------------------------------------------------------------------------


def label_ids(classes: str, points: str, label_name: str | None, label_file: str | None) -> dict[str, int]:
    """Label of every class; "" is the label of points that no class has."""
    if label_file is not None:
        ignored = -1
    elif points in ("las", "laz") and label_name is None:
        ignored = 1 if classes == "json" else 31  # 1: unclassified; the classification has five bits
    else:
        ignored = 255
    return (_JSON_IDS if classes == "json" else {name: i for i, name in enumerate(CLASSES)}) | {"": ignored}


def write_label_file(capture: Path, kind: str, labels: list[int]) -> None:
    if kind == "npy":
        np.save(capture / "labels.npy", np.array(labels, "<i4"))
    else:
        (capture / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="ascii")


def write_classes(root: Path, kind: str, ids: Mapping[str, int]) -> None:
    if kind == "json":
        entries = [{"id": ids[name], "name": name, "color": list(color)} for name, color in CLASSES.items()]
        (root / "classes.json").write_text(json.dumps(entries, indent=2), encoding="utf-8")
    else:
        lines = [f"{name} {r} {g} {b}\n" for name, (r, g, b) in CLASSES.items()]
        (root / "classes.txt").write_text("".join(lines), encoding="utf-8")
