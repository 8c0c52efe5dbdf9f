"""Points of a room of S3DIS: `Annotations/<class>_<i>.txt`, one object a file, a line `x y z r g b` a point.

The order of the points is that of the files sorted by name as text (`chair_10` before `chair_2`), as Pointcept has it;
an instance is a file. A few bytes of the official archives lost a bit, and are restored, see `_REPAIRED`.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo
from ditr_cache.errors import DataError, MissingDataError
from ditr_cache.pointcloud.normals import estimate_scan_normals
from ditr_cache.pointcloud.optional import require
from ditr_cache.sample import Points

_LOG = logging.getLogger(__name__)

CLASSES = (
    ClassInfo("ceiling", (0, 255, 0)),
    ClassInfo("floor", (0, 0, 255)),
    ClassInfo("wall", (0, 255, 255)),
    ClassInfo("beam", (255, 255, 0)),
    ClassInfo("column", (255, 0, 255)),
    ClassInfo("window", (100, 100, 255)),
    ClassInfo("door", (200, 200, 100)),
    ClassInfo("table", (170, 120, 200)),
    ClassInfo("chair", (255, 0, 0)),
    ClassInfo("sofa", (200, 100, 100)),
    ClassInfo("bookcase", (10, 200, 100)),
    ClassInfo("board", (200, 200, 200)),
    ClassInfo("clutter", (50, 50, 50)),
)
"""Order and colours as in PointNet's and Pointcept's code."""

COLUMNS = ("x", "y", "z", "r", "g", "b")
POINTS_DOWNLOAD = "Stanford3dDataset_v1.2_Aligned_Version.zip (https://sdss.redivis.com/datasets/9q3m-9w5pa1a2h)"

_INDEX = {info.name: i for i, info in enumerate(CLASSES)}
_CLUTTER = _INDEX["clutter"]  # whatever is none of the other twelve, say `stairs`

# In both archives a handful of bytes have bit 5 cleared, which makes control characters of blanks and digits:
# `185\x00187 182` in Area_5/hallway_6/Annotations/ceiling_1.txt, `103.0\x100000` in Area_5/office_19 of v1.2.
_REPAIRED = bytes(b | 0x20 if b < 0x20 and b not in b"\t\n\r" else b for b in range(256))

_MAX_BYTES = 2**31  # the largest room has some 10 million points, at 60 bytes each
_MAX_EXTENT = 5000.0  # metres
_CHECKED_POINTS = 4096


@dataclass(frozen=True, eq=False)
class Outline:
    """What poses need to know of a room's points.

    Args:
        middle: [3] metres, of the box that bounds the points.
        some: [M, 3] a few thousand of the points, evenly spread over the files.
    """

    middle: NDArray[np.float64]
    some: NDArray[np.float64]


def download_of(path: Path) -> str:
    """The archive that a file of points is from, by the name of the folder of its release."""
    return (
        POINTS_DOWNLOAD.replace("_Aligned_Version", "") if "Stanford3dDataset_v1.2" in path.parts else POINTS_DOWNLOAD
    )


def _damaged(path: Path) -> str:
    return f"the file is damaged or cut off, unpack {download_of(path)} again"


def annotation_files(room: Path) -> list[Path]:
    """The objects of a room, in the order of its points.

    Raises:
        MissingDataError: none is there.
    """
    folder = room / "Annotations"
    files = (
        sorted((p for p in folder.glob("*.txt") if not p.name.startswith(".")), key=lambda p: p.name)
        if folder.is_dir()
        else []
    )
    if not files:
        raise MissingDataError(
            f"{folder / '<class>_<i>.txt'}: no such file, expected one for each object of the room; unpack "
            f"{download_of(folder)} again, completely"
        )
    return files


def read_outline(room: Path) -> Outline:
    """Box and some of the points of a room, three to four times as fast as its points. Raises `DataError`."""
    files = annotation_files(room)
    low, high, some = np.full(3, np.inf), np.full(3, -np.inf), []
    for path in files:
        coord = read_table(path, COLUMNS[:3])
        low, high = np.minimum(low, coord.min(axis=0)), np.maximum(high, coord.max(axis=0))
        some.append(coord[:: max(1, len(coord) * len(files) // _CHECKED_POINTS)])
    return Outline((low + high) / 2, np.concatenate(some))


def read_points(room: Path, points_from_file: NDArray[np.float64], viewpoints: NDArray[np.float64]) -> Points:
    """All points of a room with colour, class, instance and estimated normals.

    Args:
        room: its folder.
        points_from_file: [4, 4] applied to the coordinates.
        viewpoints: [K, 3] places of the scanner, in the frame of the result; the normals look towards the nearest, or
            towards the middle of the room where there is none.

    Raises:
        MissingDataError: no annotation.
        DataError: a file that is damaged, empty or out of range.
    """
    coords, colors, lengths, classes = [], [], [], []
    for path in annotation_files(room):
        table = read_table(path, COLUMNS)
        coords.append(table[:, :3])
        colors.append(_colors(table[:, 3:], path))
        lengths.append(len(table))
        classes.append(_INDEX.get(path.name.removesuffix(".txt").split("_")[0], _CLUTTER))
    coord = np.concatenate(coords)
    if not np.array_equal(points_from_file, np.eye(4)):
        coord = coord @ points_from_file[:3, :3].T + points_from_file[:3, 3]
    size = coord.max(axis=0) - coord.min(axis=0)
    if size.max() > _MAX_EXTENT:
        raise DataError(
            f"{room}: points spread over {np.round(size, 1).tolist()} m, expected a room in metres; {_damaged(room)}"
        )
    return Points(
        coord=coord.astype(np.float32),
        color=np.concatenate(colors),
        normal=estimate_scan_normals(coord, viewpoints),
        segment=np.repeat(np.array(classes, np.int16), lengths),
        instance=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
    )


def read_table(path: Path, columns: Sequence[str]) -> NDArray[np.float64]:
    """[N, len(columns)] some of the `COLUMNS` of a text file of points.

    Raises:
        MissingDataError: no such file.
        DataError: empty, damaged beyond the known repair, or not finite.
    """
    content = _repaired(path)
    if not content.strip():
        raise DataError(f"{path}: no points, expected lines 'x y z r g b'; {_damaged(path)}")
    csv = require("pyarrow.csv", "the text files of S3DIS", "datasets")
    try:
        table = csv.read_csv(
            io.BytesIO(content),
            read_options=csv.ReadOptions(column_names=COLUMNS, use_threads=False),
            parse_options=csv.ParseOptions(delimiter=" ", quote_char=False),
            convert_options=csv.ConvertOptions(
                include_columns=list(columns), column_types=dict.fromkeys(COLUMNS, "float64"), null_values=[]
            ),
        )
        values = np.stack([table[name].to_numpy() for name in columns], axis=1)
    except ValueError:
        values = _read_slowly(content, path)[:, [COLUMNS.index(name) for name in columns]]
    finite: NDArray[np.bool_] = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise DataError(f"{path}: line {int(finite.argmin()) + 1} is not finite; {_damaged(path)}")
    return values


def _read_slowly(content: bytes, path: Path) -> NDArray[np.float64]:
    """[N, 6] the numbers of a file that has several blanks in a row, or really is damaged: the error names the line."""
    try:
        values = np.loadtxt(io.BytesIO(content), dtype=np.float64, ndmin=2, comments=None, encoding="latin-1")
    except ValueError as error:
        reason = str(error).partition("; use `usecols`")[0]  # NumPy's advice to programmers
        raise DataError(f"{path}: cannot be read ({reason}); {_damaged(path)}") from error
    if values.shape[1] != len(COLUMNS):
        raise DataError(f"{path}: expected lines 'x y z r g b', got {values.shape[1]} values in each; {_damaged(path)}")
    return values


def _repaired(path: Path) -> bytes:
    """Content of a file of points, with the bits that the archives lost."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise DataError(f"{path}: {size} bytes, expected at most {_MAX_BYTES} for one object of a room")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingDataError(f"{path}: no such file; unpack {download_of(path)} again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    repaired = content.translate(_REPAIRED)
    if repaired != content:
        _LOG.info("%s: bytes that lost a bit in the official archive are restored", path)
    return repaired


def _colors(values: NDArray[np.float64], path: Path) -> NDArray[np.uint8]:
    """RGB [N, 3], written as `106` or `106.000000`."""
    rounded = np.rint(values)
    bad: NDArray[np.bool_] = np.asarray(((rounded < 0) | (rounded > 255)).any(axis=1))
    if bad.any():
        raise DataError(
            f"{path}: colour {values[bad.argmax()].tolist()} in line {int(bad.argmax()) + 1}, expected 0 to 255; "
            f"{_damaged(path)}"
        )
    return rounded.astype(np.uint8)
