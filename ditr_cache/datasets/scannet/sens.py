"""ScanNet's `.sens` files (version 4): random access to the frames of a file of several gigabytes.

Layout, little-endian: uint32 version, uint64 length + sensor name, four 4x4 float32 matrices (intrinsic and extrinsic
of colour, then of depth), int32 colour and depth compression, uint32 colour width and height, depth width and height,
float32 depth shift, uint64 number of frames; then per frame a 4x4 float32 camera-to-world pose, uint64 colour and depth
time stamps, uint64 colour and depth sizes in bytes, and the two blobs; then inertial measurements, which are not read.

The format is that of `SensReader` in https://github.com/ScanNet/ScanNet.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.images import MAX_PIXELS, depth_in_metres, read_color
from ditr_cache.errors import DataError, MissingDataError

_VERSION = 4
_MAX_NAME = 4096
_START = struct.Struct("<IQ")
_HEADER = struct.Struct("<64f2i4IfQ")
_FRAME = struct.Struct("<16f4Q")
_COLOR_COMPRESSION = {0: "raw", 1: "png", 2: "jpeg"}
_DEPTH_COMPRESSION = {0: "raw_ushort", 1: "zlib_ushort", 2: "occi_ushort"}


@dataclass(frozen=True, kw_only=True, eq=False)
class SensFile:
    """Header and frame index of a `.sens` file of F frames. Holds no pixels and no open file.

    Args:
        path: of the file.
        sensor_name: as the scanner wrote it.
        intrinsic_color, intrinsic_depth: [4, 4] float64 in pixels.
        extrinsic_color, extrinsic_depth: [4, 4] float64; the identity in ScanNet, whose depth is registered to colour.
        color_compression: `jpeg` or `png`.
        depth_compression: `zlib_ushort` or `raw_ushort`.
        color_size, depth_size: (width, height).
        depth_shift: raw depth values per metre.
        world_from_camera: [F, 4, 4] float32; not finite where tracking was lost.
        color_span, depth_span: [F, 2] int64 offset and length in bytes of each blob.
    """

    path: Path
    sensor_name: str
    intrinsic_color: NDArray[np.float64]
    extrinsic_color: NDArray[np.float64]
    intrinsic_depth: NDArray[np.float64]
    extrinsic_depth: NDArray[np.float64]
    color_compression: str
    depth_compression: str
    color_size: tuple[int, int]
    depth_size: tuple[int, int]
    depth_shift: float
    world_from_camera: NDArray[np.float32]
    color_span: NDArray[np.int64]
    depth_span: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.world_from_camera)

    def read_color(self, frame: int) -> NDArray[np.uint8]:
        """[height, width, 3] uint8 RGB of a frame.

        Raises:
            DataError: the frame has no image or a damaged one.
        """
        where = f"{self.path} frame {frame} colour"
        return read_color(self._blob(self.color_span[frame], where), size=self.color_size, where=where)

    def read_depth(self, frame: int) -> NDArray[np.float32]:
        """[height, width] float32 metres of a frame, 0 where unknown.

        Raises:
            DataError: the frame has no depth map or a damaged one.
        """
        where = f"{self.path} frame {frame} depth"
        data = self._blob(self.depth_span[frame], where)
        width, height = self.depth_size
        expected = 2 * width * height
        if self.depth_compression == "zlib_ushort":
            stream = zlib.decompressobj()
            try:
                # One byte more than expected is enough to notice a map of another size, and bounds the memory.
                data = stream.decompress(data, expected + 1)
            except zlib.error as error:
                raise DataError(f"{where}: not a zlib stream ({error}); the file is damaged") from error
            if not stream.eof and len(data) <= expected:
                raise DataError(f"{where}: the zlib stream ends after {len(data)} of {expected} bytes; it is damaged")
        if len(data) != expected:
            raise DataError(
                f"{where}: expected {expected} bytes of a {width}x{height} map of 16 bits, got "
                f"{'more' if len(data) > expected else len(data)}"
            )
        return depth_in_metres(np.frombuffer(data, dtype="<u2").reshape(height, width), self.depth_shift)

    def _blob(self, span: NDArray[np.int64], where: str) -> bytes:
        offset, length = int(span[0]), int(span[1])
        if not length:
            raise DataError(f"{where}: the frame has none")
        with _descriptor(self.path) as file:
            return _read(file, offset, length, where)


def open_sens(path: str | Path) -> SensFile:
    """Read the header and index the frames by seeking: 96 bytes per frame, whatever the file's size.

    Raises:
        MissingDataError: no such file.
        DataError: another version or compression, or a file that ends before its last frame does.
    """
    path = Path(path)
    with _descriptor(path) as file:
        size = os.fstat(file).st_size
        version, name_length = _START.unpack(_read(file, 0, _START.size, f"{path} header"))
        if version != _VERSION or name_length > _MAX_NAME:
            raise DataError(f"{path}: not a .sens file of version {_VERSION}, got version {version}")
        name = _read(file, _START.size, name_length, f"{path} header").decode("utf-8", errors="replace")
        offset = _START.size + name_length
        values = _HEADER.unpack(_read(file, offset, _HEADER.size, f"{path} header"))
        offset += _HEADER.size
        matrices = np.array(values[:64], dtype=np.float64).reshape(4, 4, 4)
        color_code, depth_code, color_width, color_height, depth_width, depth_height, depth_shift, count = values[64:]
        color = _COLOR_COMPRESSION.get(color_code, f"code {color_code}")
        depth = _DEPTH_COMPRESSION.get(depth_code, f"code {depth_code}")
        _check_header(path, color, depth, (depth_width, depth_height), depth_shift)
        if offset + count * _FRAME.size > size:
            raise DataError(
                f"{path}: {count} frames need at least {offset + count * _FRAME.size} bytes, got {size}; the file is "
                "truncated, download it again"
            )

        poses = np.empty((count, 16), dtype=np.float32)
        spans = np.empty((count, 4), dtype=np.int64)
        for frame in range(count):
            fields = _FRAME.unpack(_read(file, offset, _FRAME.size, f"{path} frame {frame} of {count}"))
            poses[frame] = fields[:16]
            color_bytes, depth_bytes = fields[18:]
            offset += _FRAME.size
            if offset + color_bytes + depth_bytes > size:
                raise DataError(
                    f"{path}: frame {frame} of {count} needs {offset + color_bytes + depth_bytes} bytes of file, got "
                    f"{size}; the file is truncated, download it again"
                )
            spans[frame] = (offset, color_bytes, offset + color_bytes, depth_bytes)
            offset += color_bytes + depth_bytes

    return SensFile(
        path=path,
        sensor_name=name,
        intrinsic_color=matrices[0],
        extrinsic_color=matrices[1],
        intrinsic_depth=matrices[2],
        extrinsic_depth=matrices[3],
        color_compression=color,
        depth_compression=depth,
        color_size=(color_width, color_height),
        depth_size=(depth_width, depth_height),
        depth_shift=depth_shift,
        world_from_camera=poses.reshape(-1, 4, 4),
        color_span=spans[:, :2],
        depth_span=spans[:, 2:],
    )


def _check_header(path: Path, color: str, depth: str, depth_size: tuple[int, int], depth_shift: float) -> None:
    if color not in ("jpeg", "png") or depth not in ("zlib_ushort", "raw_ushort"):
        raise DataError(
            f"{path}: expected colour as jpeg or png and depth as zlib_ushort or raw_ushort, got {color} and {depth}; "
            "export the frames with ScanNet's SensReader into the folders color, depth, pose and intrinsic"
        )
    if not (np.isfinite(depth_shift) and depth_shift > 0):
        raise DataError(f"{path}: expected a positive depth shift (raw values per metre), got {depth_shift}")
    if not 0 < depth_size[0] * depth_size[1] <= MAX_PIXELS:
        raise DataError(f"{path}: depth maps of {depth_size[0]}x{depth_size[1]} pixels, expected 1 to {MAX_PIXELS}")


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise MissingDataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    try:
        yield file
    finally:
        os.close(file)


def _read(file: int, offset: int, length: int, where: str) -> bytes:
    try:
        data = os.pread(file, length, offset)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error})") from error
    if len(data) != length:
        raise DataError(f"{where}: expected {length} bytes, got {len(data)}; the file is truncated, download it again")
    return data
