"""What every reader of point files gives: the number of points, the channels, and the points chunk by chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError

NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "coord": (("x", "y", "z"),),
    "color": (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")),
    "normal": (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")),
    "strength": (("intensity",), ("strength",), ("reflectance",), ("scalar_intensity",)),
}
"""Channel -> the names under which files have its columns, the usual ones first; upper and lower case are one."""

LABEL_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "segment": tuple(
        (prefix + name,)
        for name in ("label", "class", "segment", "semantic", "classification")  # the last: every LAS file has it
        for prefix in ("", "scalar_")
    ),
    "instance": (("instance",), ("instance_id",), ("scalar_instance",), ("scalar_instance_id",)),
}
"""The same of labels, which are read only where they are asked for; `scalar_` is CloudCompare's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Some consecutive points of a file, as the file has them.

    Args:
        coord: [N, 3] float32 or float64 metres.
        color: [N, 3] RGB of the file's type and range, see `color_factor`.
        normal: [N, 3] float32.
        strength: [N] float32.
        segment, instance: [N] labels of the file's type and meaning.
    """

    coord: NDArray[np.floating]
    color: NDArray[Any] | None = None
    normal: NDArray[np.float32] | None = None
    strength: NDArray[np.float32] | None = None
    segment: NDArray[Any] | None = None
    instance: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.coord)


class PointCloud(ABC):
    """A file of points. Opening one reads its header only, and finds what is wrong with it as far as possible.

    Args:
        path: of the file.
        count: number of points, at least one.
        channels: which of coord, color, normal and strength the file has; where labels are asked for, of segment and
            instance, too.
        coord_dtype: float32 where the file's coordinates are exact in it, else float64.

    Raises:
        DataError: no points.
    """

    FORMAT: ClassVar[str]
    """Name of the format, for messages."""

    def __init__(self, path: Path, count: int, channels: Sequence[str], coord_dtype: type[np.floating]) -> None:
        self.path, self.count, self.channels = path, count, tuple(channels)
        self.coord_dtype: np.dtype[np.floating] = np.dtype(coord_dtype)
        if count == 0:
            raise DataError(f"{path}: the {self.FORMAT} file has no points, expected at least one")

    def chunks(self, size: int) -> Iterator[Chunk]:
        """All points in the file's order, at most `size` at once.

        Raises:
            DataError: the content is not what the header announces, or cannot be read.
        """
        try:
            yield from self._chunks(size)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read to its end: {error.strerror or error}") from error

    @abstractmethod
    def _chunks(self, size: int) -> Iterator[Chunk]:
        """As `chunks`; an `OSError` may pass."""

    def spans(self, size: int) -> Iterator[tuple[int, int]]:
        """First point and number of points of each chunk of at most `size` points."""
        for first in range(0, self.count, size):
            yield first, min(size, self.count - first)

    def binary_rows(self, file: BinaryIO, dtype: np.dtype[Any], first: int, rows: int) -> NDArray[Any]:
        """[rows] the next rows of a binary file, of which `first` were read. Raises `DataError` where it ends."""
        table = np.fromfile(file, dtype, rows)
        if len(table) < rows:
            raise self.cut_short(first + len(table))
        return table.astype(dtype.newbyteorder("="), copy=False)

    def text_rows(self, file: BinaryIO, columns: int, first: int, rows: int) -> NDArray[np.float64]:
        """[rows, columns] numbers in the next lines of a text file, of which `first` were read.

        Raises:
            DataError: fewer lines, another number of columns, or something that is not a number.
        """
        lines = list(islice(filter(bytes.strip, file), rows))
        if len(lines) < rows:
            raise self.cut_short(first + len(lines))
        try:
            values = np.loadtxt(lines, dtype=np.float64, ndmin=2, comments=None, encoding="latin-1")
        except ValueError as error:
            raise DataError(
                f"{self.path}: points {first}..{first + rows - 1} cannot be read ({error}); it is damaged, get it again"
            ) from error
        if values.shape[1] != columns:
            raise DataError(f"{self.path}: expected {columns} values per point, got {values.shape[1]} from {first} on")
        return values

    def cut_short(self, got: int) -> DataError:
        """The error of a file that ends after `got` points."""
        return DataError(
            f"{self.path}: the {self.FORMAT} header announces {self.count} points, the file ends after {got}; it is "
            "truncated, get it again"
        )


class Columns:
    """Which columns of a file make which channel.

    Args:
        types: name -> numpy type of the columns.
        path: of the file, for messages.
        labels: whether to read the columns of `LABEL_NAMES`.

    Raises:
        DataError: no x, y and z.
    """

    def __init__(self, types: Mapping[str, np.dtype[Any]], path: Path, *, labels: bool = False) -> None:
        lower = {name.lower(): name for name in reversed(list(types))}
        self.of: dict[str, tuple[str, ...]] = {}
        """Channel -> its columns."""
        for channel, choices in (NAMES | (LABEL_NAMES if labels else {})).items():
            for names in choices:
                if all(name in lower for name in names):
                    self.of[channel] = tuple(lower[name] for name in names)
                    break
        if "coord" not in self.of:
            raise DataError(f"{path}: expected columns x, y and z, got {', '.join(types) or 'none'}")
        # Integers and doubles need not fit float32.
        exact = all(types[name] in (np.float32, np.float16, np.int16, np.int8) for name in self.of["coord"])
        self.coord_dtype: type[np.floating] = np.float32 if exact else np.float64

    @property
    def used(self) -> tuple[str, ...]:
        """All columns that make a channel."""
        return tuple(name for names in self.of.values() for name in names)

    def chunk(self, table: Any) -> Chunk:
        """The points of a table: a structured array or a mapping of column name -> [N]."""

        def stacked(channel: str, dtype: Any = None) -> NDArray[Any] | None:
            if channel not in self.of:
                return None
            columns = [np.asarray(table[name]) for name in self.of[channel]]
            return np.stack(columns, axis=1, dtype=dtype, casting="unsafe")

        def single(channel: str, dtype: Any = None) -> NDArray[Any] | None:
            column = stacked(channel, dtype)
            return None if column is None else column[:, 0]

        coord = stacked("coord", self.coord_dtype)
        assert coord is not None
        return Chunk(
            coord=coord,
            color=stacked("color"),
            normal=stacked("normal", np.float32),
            strength=single("strength", np.float32),
            segment=single("segment"),
            instance=single("instance"),
        )


def color_factor(dtype: np.dtype[Any], maximum: float) -> float:
    """What brings colours of a file to 0..255.

    Files say the type of their colours, not the range: wide integers hold 16-bit colours as the LAS format wants, or
    8-bit ones as many programs write them; floats hold 0..1 or 0..255. The largest value of the whole file tells.

    Args:
        dtype: of the colours.
        maximum: the largest value of any channel.
    """
    if dtype.kind == "f":
        return 255.0 if maximum <= 1 else 1.0
    return 1.0 if dtype.itemsize == 1 or maximum <= 255 else 255 / 65535
