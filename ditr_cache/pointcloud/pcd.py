"""PCD 0.7 (and 0.5, 0.6) of the Point Cloud Library: ascii, binary and binary_compressed.

Binary and ASCII files are read in chunks. The format compresses all points as one block, column after column, so a
compressed file is held decompressed while it is read: 4 bytes per value. The libraries for PCD hold every file whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError
from ditr_cache.pointcloud.cloud import Chunk, Columns, PointCloud
from ditr_cache.pointcloud.optional import require

_KINDS = {"F": "f", "I": "i", "U": "u"}
_PACKED = ("rgb", "rgba")
_RGB = ("red", "green", "blue")
_MAX_HEADER_LINE = 65536

_MOST_PER_BYTE = 100
"""LZF's longest repetition gives 264 bytes for 3: a block that should become larger than this is none of its own."""


class PcdCloud(PointCloud):
    """The points of a PCD file. The acquisition pose (VIEWPOINT) is not applied, as viewers do.

    Raises:
        DataError: not a PCD file, no x, y and z, or cut short (an ASCII file tells at its end).
        UsageError: a compressed file, and no library for LZF.
    """

    FORMAT = "PCD"

    def __init__(self, path: Path, *, labels: bool = False) -> None:
        with path.open("rb") as file:
            header = _read_header(file, path)
            self._start = file.tell()
        self._data = header["DATA"][0]
        self._row = _row_dtype(header, path)
        self._widths = {n: self._row[n].itemsize // self._row[n].base.itemsize for n in self._row.names or ()}
        types = {n: self._row[n] for n in self._row.names or () if not self._row[n].shape}
        self._packed = next((n for n in types if n.lower() in _PACKED and types[n].itemsize == 4), None)
        if self._packed is not None:
            types |= dict.fromkeys(_RGB, np.dtype(np.uint8))
        self._columns = Columns(types, path, labels=labels)
        super().__init__(path, _number_of_points(header, path), tuple(self._columns.of), self._columns.coord_dtype)
        rest = path.stat().st_size - self._start
        if self._data == "binary" and rest < self.count * self._row.itemsize:
            raise self.cut_short(rest // self._row.itemsize)
        if self._data == "binary_compressed":
            require("lzf", "compressed PCD files")
            self._check_compressed(rest)

    def _chunks(self, size: int) -> Iterator[Chunk]:
        """See `PointCloud`."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            columns = self._decompressed(file) if self._data == "binary_compressed" else None
            for first, rows in self.spans(size):
                if columns is not None:
                    table: Any = {name: values[first : first + rows] for name, values in columns.items()}
                elif self._data == "binary":
                    table = self.binary_rows(file, self._row, first, rows)
                else:
                    table = self._typed(self.text_rows(file, sum(self._widths.values()), first, rows))
                yield self._columns.chunk(self._unpacked(table))

    def _unpacked(self, table: Any) -> Any:
        """The table, with the bytes of a packed colour (0x00RRGGBB, of whatever type) as columns."""
        if self._packed is None:
            return table
        names = set(self._columns.used)
        packed = np.ascontiguousarray(table[self._packed]).view(np.uint32)
        result = {name: table[name] for name in self._row.names or () if name in names}
        return result | {n: (packed >> shift & 255).astype(np.uint8) for n, shift in zip(_RGB, (16, 8, 0), strict=True)}

    def _typed(self, values: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        """The columns [N, P] of an ASCII body in the types of the header; fields of several values are left out."""
        table, column = {}, 0
        for name, width in self._widths.items():
            if not self._row[name].shape:
                with np.errstate(over="ignore", invalid="ignore"):
                    table[name] = values[:, column].astype(self._row[name])
            column += width
        return table

    def _check_compressed(self, rest: int) -> None:
        with self.path.open("rb") as file:
            file.seek(self._start)
            sizes = np.fromfile(file, "<u4", 2)
        if len(sizes) < 2 or rest - 8 < sizes[0]:
            raise self.cut_short(0)
        if sizes[1] != self.count * self._row.itemsize:
            raise DataError(
                f"{self.path}: the compressed block holds {sizes[1]} bytes, expected {self.count} points of "
                f"{self._row.itemsize} bytes"
            )
        if sizes[1] > _MOST_PER_BYTE * int(sizes[0]):
            raise DataError(
                f"{self.path}: a compressed block of {sizes[0]} bytes announces {sizes[1]}, which LZF cannot hold; it "
                "is damaged, get the file again"
            )

    def _decompressed(self, file: BinaryIO) -> dict[str, NDArray[Any]]:
        lzf = require("lzf", "compressed PCD files")
        compressed, plain = (int(n) for n in np.fromfile(file, "<u4", 2))
        try:
            block = lzf.decompress(file.read(compressed), plain)
        except ValueError as error:
            raise DataError(f"{self.path}: the compressed block is damaged ({error}); get the file again") from error
        if block is None or len(block) != plain:
            raise DataError(f"{self.path}: the compressed block is damaged; get the file again")
        columns, offset = {}, 0
        for name in self._row.names or ():
            dtype = self._row[name]
            columns[name] = np.frombuffer(block, dtype.base, self.count * self._widths[name], offset)
            offset += dtype.itemsize * self.count
        return columns


def _read_header(file: BinaryIO, path: Path) -> dict[str, list[str]]:
    """Key -> values of the header's lines."""
    header: dict[str, list[str]] = {}
    while "DATA" not in header:
        raw = file.readline(_MAX_HEADER_LINE)
        if not raw.endswith(b"\n"):
            raise DataError(f"{path}: not a PCD file, or cut within its header: expected a line 'DATA'")
        words = raw.decode("latin-1").split()
        if not words or words[0].startswith("#"):
            continue
        key = words[0].upper().replace("COLUMNS", "FIELDS")
        if key not in ("VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA"):
            raise DataError(f"{path}: not a PCD file: header line {' '.join(words)[:60]!r} is not understood")
        header[key] = words[1:]
    if header["DATA"] not in (["ascii"], ["binary"], ["binary_compressed"]):
        raise DataError(f"{path}: expected DATA ascii, binary or binary_compressed, got {' '.join(header['DATA'])!r}")
    return header


def _row_dtype(header: dict[str, list[str]], path: Path) -> np.dtype[Any]:
    fields = header.get("FIELDS", [])
    sizes, types = header.get("SIZE", ["4"] * len(fields)), header.get("TYPE", ["F"] * len(fields))
    counts = header.get("COUNT", ["1"] * len(fields))
    if not fields or not len(fields) == len(sizes) == len(types) == len(counts):
        raise DataError(
            f"{path}: expected as many entries of SIZE, TYPE and COUNT as FIELDS, got {len(sizes)}, {len(types)}, "
            f"{len(counts)} and {len(fields)}"
        )
    row: list[Any] = []
    try:
        for i, (name, size, kind, count) in enumerate(zip(fields, sizes, types, counts, strict=True)):
            # Several fields may be padding of the same name.
            unique = name if fields.index(name) == i else f"{name}#{i}"
            entries = int(count)
            row.append((unique, f"<{_KINDS[kind]}{int(size)}") + (((entries,),) if entries != 1 else ()))
        return np.dtype(row)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: SIZE, TYPE or COUNT of the PCD header is not understood ({error})") from error


def _number_of_points(header: dict[str, list[str]], path: Path) -> int:
    try:
        if "POINTS" in header:
            return int(header["POINTS"][0])
        return int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"{path}: the PCD header does not say how many POINTS there are") from error
