"""Parquet files of one Waymo segment: rows are found by their keys, and large cells decoded once per row group.

A component's file holds the rows of ~199 frames in no promised order, in row groups that cut through frames: 256 rows,
so ~51 frames of five lidars, half a gigabyte once decoded. A row group is decoded cell by cell when one of its rows is
asked for first, and the rows of the dataset's frames are kept, compressed again, until two other row groups of the file
were needed. So a pass through a segment decodes each file once, in bounded memory, whatever the order of its rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError, MissingDataError
from ditr_cache.pointcloud.optional import require

DOWNLOAD = "gs://waymo_open_dataset_v_2_0_1/{split}/{component} (Waymo Perception v2, waymo.com/open)"

MAX_ROWS = 100_000
"""Most rows of a file; released ones have up to 999."""

MAX_CELLS = 2**32
"""Most bytes of one column in one row group, decoded; released ones have up to 0.3e9."""

KEPT_GROUPS = 2
_BATCH = 4  # rows that are decoded at a time
_CODEC = "zstd"
_OLD_ARROW = "Expected all lists to be of size"
"""What pyarrow before 26 says of a null in a column of lists of a fixed size: github.com/apache/arrow issue 35692."""

Key = tuple[int, ...]


@dataclass(frozen=True)
class Component:
    """One kind of file.

    Args:
        prefix: of its columns.
        keys: columns that name a row, beside the segment.
        content: what it is, for people.
        large: columns whose cells are decoded one by one; all others are small.
    """

    prefix: str
    keys: tuple[str, ...]
    content: str
    large: tuple[str, ...] = ()


def _range_images(*returns: int) -> tuple[str, ...]:
    return tuple(f"range_image_return{i}.{part}" for i in returns for part in ("values", "shape"))


_FRAME, _LASER, _CAMERA = "frame_timestamp_micros", "laser_name", "camera_name"

COMPONENTS: dict[str, Component] = {
    "vehicle_pose": Component("VehiclePoseComponent", (_FRAME,), "pose of the vehicle in every frame"),
    "lidar": Component("LiDARComponent", (_FRAME, _LASER), "range images of five lidars", _range_images(1, 2)),
    "lidar_pose": Component("LiDARPoseComponent", (_FRAME, _LASER), "pose of every pixel of TOP", _range_images(1)),
    "lidar_calibration": Component("LiDARCalibrationComponent", (_LASER,), "mounting and beams of the lidars"),
    "camera_image": Component("CameraImageComponent", (_FRAME, _CAMERA), "images of five cameras, poses", ("image",)),
    "camera_calibration": Component("CameraCalibrationComponent", (_CAMERA,), "mounting and lenses of the cameras"),
    "lidar_camera_projection": Component(
        "LiDARCameraProjectionComponent", (_FRAME, _LASER), "where points fall in images", _range_images(1, 2)
    ),
    "lidar_segmentation": Component(
        "LiDARSegmentationLabelComponent", (_FRAME, _LASER), "labels of points of TOP", _range_images(1, 2)
    ),
}
"""Folder -> component, of those that are read."""


def component_path(root: Path, split: str, component: str, context: str) -> Path:
    """File of one component of one segment."""
    return root / split / component / f"{context}.parquet"


def download_of(split: str, component: str) -> str:
    """The official download that a component comes from."""
    return DOWNLOAD.format(split=split, component=component)


def read_keys(path: Path) -> list[Key]:
    """Key of every row of a component's file; nothing else is read.

    Raises:
        MissingDataError: no such file.
        DataError: not such a Parquet file, or one of another segment.
    """
    component, context = COMPONENTS[path.parent.name], path.stem
    with _opened(path) as file:
        if file.metadata.num_rows > MAX_ROWS:
            raise DataError(f"{path}: {file.metadata.num_rows} rows, expected at most {MAX_ROWS} of one segment")
        names = ["key.segment_context_name", *(f"key.{name}" for name in component.keys)]
        columns = _columns(file, path, names)
    found = set(columns[names[0]]) - {context}
    if found:
        raise DataError(
            f"{path}: holds rows of segment {str(min(found, key=str))[:80]!r}, expected {context!r} as the file's name "
            "says; give the file its own name back, or download it again"
        )
    keys = list(zip(*(columns[name] for name in names[1:]), strict=True))
    if any(not isinstance(part, int) for key in keys for part in key):
        raise DataError(f"{path}: keys {component.keys} are not whole numbers in all rows; download the file again")
    return keys


class Table:
    """One component of one segment. Its cells may be asked for by several threads.

    Args:
        path: of the file.
        frames: time stamps of the frames whose large cells will be asked for.
    """

    def __init__(self, path: Path, frames: Collection[int]) -> None:
        self.path = path
        self.component = COMPONENTS[path.parent.name]
        self._frames = frames
        self._keys = read_keys(path)
        self._rows: dict[Key, list[int]] = {}
        for row, key in enumerate(self._keys):
            self._rows.setdefault(key, []).append(row)
        self._lock = Lock()
        self._groups: OrderedDict[int, dict[int, dict[str, _Cell]]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def row(self, *key: int) -> int:
        """Number of the row of a key. Raises `DataError` where there is none, or more than one."""
        rows = self._rows.get(key, [])
        if len(rows) != 1:
            said = ", ".join(f"{name} {part}" for name, part in zip(self.component.keys, key, strict=True))
            raise DataError(
                f"{self.path}: {len(rows) or 'no'} rows with {said}, expected one; the file is incomplete or altered, "
                "download it again"
            )
        return rows[0]

    def value(self, column: str, *key: int) -> Any:
        """Cell of a small column: a number, or a list of numbers; None where it is null."""
        return self._small(column)[self.row(*key)]

    def numbers(self, column: str, *key: int, count: int) -> NDArray[np.float64]:
        """[count] numbers of a small column's cell. Raises `DataError` where it holds anything else."""
        value = self.value(column, *key)
        try:
            numbers = np.array(value, dtype=np.float64).reshape(-1)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.path}: {column} of {key}: expected {count} numbers ({error})") from error
        if len(numbers) != count or value is None:
            got = "null" if value is None else f"{len(numbers)}"
            raise DataError(f"{self.path}: {column} of {key}: expected {count} numbers, got {got}")
        return numbers

    def image(self, echo: int, *key: int, channels: int) -> NDArray[Any] | None:
        """Range image [H, W, channels] of return `echo`; None where it is null.

        Raises:
            DataError: no such row, or its values do not have the shape that it says.
        """
        name = f"range_image_return{echo}"
        cells = self._cells(self.row(*key))
        values, shape = cells[f"{name}.values"].array(), cells[f"{name}.shape"].array()
        if values is None or shape is None:
            return None
        size = shape.tolist()
        if len(size) != 3 or min(size) < 1 or size[2] != channels or size[0] * size[1] * size[2] != len(values):
            raise DataError(
                f"{self.path}: {name} of {key}: {len(values)} values of shape {size}, expected [height, width, "
                f"{channels}]; the file is damaged, download it again"
            )
        return values.reshape(size)

    def binary(self, column: str, *key: int) -> bytes:
        """Bytes of a large column's cell, empty where it is null."""
        return self._cells(self.row(*key))[column].data

    @cached_property
    def _small_columns(self) -> dict[str, list[Any]]:
        large = {f"[{self.component.prefix}].{name}" for name in self.component.large}
        prefix = f"[{self.component.prefix}]."
        with _opened(self.path) as file:
            names = [n for n in file.schema_arrow.names if n.startswith(prefix) and n not in large]
            return {n.removeprefix(prefix): cells for n, cells in _columns(file, self.path, names).items()}

    def _small(self, column: str) -> list[Any]:
        if column not in self._small_columns:
            raise _no_column(self.path, f"[{self.component.prefix}].{column}")
        return self._small_columns[column]

    def _cells(self, row: int) -> Mapping[str, _Cell]:
        """Large cells of a row."""
        with self._lock:
            group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            if group not in self._groups:
                while len(self._groups) >= KEPT_GROUPS:
                    self._groups.popitem(last=False)
                self._groups[group] = self._decoded(group)
            self._groups.move_to_end(group)
            return self._groups[group][row]

    @cached_property
    def _first_rows(self) -> list[int]:
        """Number of the first row of every row group."""
        with _opened(self.path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    def _decoded(self, group: int) -> dict[int, dict[str, _Cell]]:
        """Row -> its large cells, of the wanted rows of a row group."""
        names = [f"[{self.component.prefix}].{name}" for name in self.component.large]
        row, found = self._first_rows[group], {}
        with _opened(self.path) as file:
            _check_columns(file, self.path, names, [group])
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=names, use_threads=False):
                for position in range(batch.num_rows):
                    if self._keys[row][0] in self._frames:
                        found[row] = {
                            name: _Cell.of(batch.column(full)[position])
                            for name, full in zip(self.component.large, names, strict=True)
                        }
                    row += 1
        return found


@dataclass(frozen=True)
class _Cell:
    """A large cell, its numbers compressed.

    Args:
        data: bytes of a binary cell, or compressed numbers.
        dtype: of the numbers; None: no numbers.
        size: bytes of the numbers.
    """

    data: bytes
    dtype: np.dtype[Any] | None = None
    size: int = 0

    @classmethod
    def of(cls, scalar: Any) -> _Cell:
        """Cell of an Arrow scalar."""
        if not scalar.is_valid:
            return cls(b"")
        if not hasattr(scalar, "values"):
            return cls(bytes(scalar.as_py()))
        numbers = np.ascontiguousarray(scalar.values.to_numpy(zero_copy_only=False))
        arrow = require("pyarrow", "Waymo's Parquet files", "datasets")
        return cls(arrow.compress(numbers.tobytes(), codec=_CODEC, asbytes=True), numbers.dtype, numbers.nbytes)

    def array(self) -> NDArray[Any] | None:
        """Numbers [N]; None where the cell is null."""
        if self.dtype is None:
            return None
        arrow = require("pyarrow", "Waymo's Parquet files", "datasets")
        raw = arrow.decompress(self.data, self.size, codec=_CODEC, asbytes=True)
        return np.frombuffer(raw, dtype=self.dtype)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open Parquet file; whatever is wrong with it becomes an error that names it."""
    arrow = require("pyarrow", "Waymo's Parquet files", "datasets")
    parquet = require("pyarrow.parquet", "Waymo's Parquet files", "datasets")
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except DataError:
        raise
    except FileNotFoundError as error:
        download = download_of(path.parent.parent.name, path.parent.name)
        raise MissingDataError(f"{path}: no such file; it comes with {download}") from error
    except (arrow.ArrowException, OSError, ValueError) as error:
        if _OLD_ARROW in str(error):
            raise DataError(
                f"{path}: this file needs pyarrow 26 or newer, {arrow.__version__} cannot read null lists of a fixed "
                "size: pip install -U pyarrow"
            ) from error
        raise DataError(
            f"{path}: not a readable Parquet file ({str(error)[:200]}); the download is incomplete or damaged, get "
            "this file again"
        ) from error


def _columns(file: Any, path: Path, names: list[str]) -> dict[str, list[Any]]:
    """Small columns as Python values, by name."""
    _check_columns(file, path, names, range(file.metadata.num_row_groups))
    table = file.read(columns=names, use_threads=False)
    return {name: table.column(name).to_pylist() for name in names}


def _check_columns(file: Any, path: Path, names: Collection[str], groups: Collection[int]) -> None:
    """Raise `DataError` where a column is missing, or promises more bytes than one could mean."""
    for name in names:
        if name not in file.schema_arrow.names:
            raise _no_column(path, name)
    for group in groups:
        found = file.metadata.row_group(group)
        for chunk in (found.column(i) for i in range(found.num_columns)):
            if chunk.path_in_schema.startswith(tuple(names)) and chunk.total_uncompressed_size > MAX_CELLS:
                raise DataError(
                    f"{path}: column {chunk.path_in_schema} of row group {group} decodes to "
                    f"{chunk.total_uncompressed_size / 1e9:.1f} GB, expected at most {MAX_CELLS / 1e9:.1f}; download "
                    "the file again"
                )


def _no_column(path: Path, name: str) -> DataError:
    return DataError(
        f"{path}: no column {name!r}; expected a component of Waymo's Perception v2.0.x, of which this is none"
    )
