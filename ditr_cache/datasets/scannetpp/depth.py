"""`iphone/depth.bin` of ScanNet++: depth maps of 256x192 pixels, one for every frame of the video, in three encodings.

```
blocks    uint32 length (little-endian), then so many bytes: LZ4 of uint16 millimetres, or raw deflate of float32 metres
stream    one raw deflate stream of float32 metres of all frames, one after the other (some older scenes)
```

Facts: `iphone/prepare_iphone_data.py` of https://github.com/scannetpp/scannetpp. Of blocks, only those that are asked
for are read. A stream is inflated from its start, so its frames are best asked for in ascending order.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.images import depth_in_metres
from ditr_cache.errors import DataError, MissingDataError
from ditr_cache.pointcloud.optional import require

DEPTH_SIZE = (256, 192)
"""(width, height) of the depth maps."""

_PIXELS = DEPTH_SIZE[0] * DEPTH_SIZE[1]
_METRES, _MILLIMETRES = 4 * _PIXELS, 2 * _PIXELS  # bytes of one map
_LARGEST_BLOCK = _METRES + 2**16  # incompressible, with what a compressor adds
_CHUNK = 2**20
_AGAIN = "the file is truncated or damaged, download it again with ScanNet++'s script (iphone_depth_path)"
_opening = threading.Lock()


def read_depth_frame(path: Path, number: int, *, where: str) -> NDArray[np.float32]:
    """[192, 256] float32 metres along z of frame `number`, 0 where unknown.

    Args:
        path: of `depth.bin`.
        number: of the frame, from 0, as in the video.
        where: names the depth map in errors.

    Raises:
        MissingDataError: no such file.
        DataError: not such a file, truncated before this frame, or damaged at it.
        UsageError: the library for LZ4 is needed and not installed.
    """
    try:
        stat = path.stat()
        with _opening:
            depths = _opened(path, stat.st_mtime_ns, stat.st_size)
        metres = depths.read(number)
    except FileNotFoundError as error:
        raise MissingDataError(f"{where}: no such file {path}") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read ({error})") from error
    metres[~np.isfinite(metres)] = 0
    return metres


@lru_cache(maxsize=2)
def _opened(path: Path, changed: int, size: int) -> _Blocks | _Stream:
    """The maps of a file, by the encoding that fits it."""
    with path.open("rb") as file:
        blocks = _Blocks(path, _block_offsets(file, size))
        file.seek(0)
        head = file.read(_CHUNK)
    if blocks.end == size and blocks.count:
        return blocks
    with suppress(DataError):
        blocks.read(0)
        return blocks  # up to where it was cut off
    with suppress(zlib.error):
        if zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, 1):
            return _Stream(path)
    raise DataError(f"{path}: not a file of depth maps as ScanNet++ has them; {_AGAIN}")


def _block_offsets(file: IO[bytes], size: int) -> NDArray[np.int64]:
    """Where each block starts, and where the last complete one ends."""
    offsets = [0]
    while (start := offsets[-1]) + 4 < size:
        file.seek(start)
        end = start + 4 + int.from_bytes(file.read(4), "little")
        if not start + 4 < end <= min(size, start + 4 + _LARGEST_BLOCK):
            break
        offsets.append(end)
    return np.array(offsets, dtype=np.int64)


class _Blocks:
    """Maps that are compressed one by one."""

    def __init__(self, path: Path, offsets: NDArray[np.int64]) -> None:
        self._path, self._offsets = path, offsets
        self.count, self.end = len(offsets) - 1, int(offsets[-1])

    def read(self, number: int) -> NDArray[np.float32]:
        """One map in metres. Raises `DataError`."""
        if not 0 <= number < self.count:
            raise _too_short(self._path, self.count)
        with self._path.open("rb") as file:
            file.seek(self._offsets[number] + 4)
            block = file.read(self._offsets[number + 1] - self._offsets[number] - 4)
        lz4 = require("lz4.block", "depth maps of ScanNet++'s iPhone", "datasets")
        try:
            raw = lz4.decompress(block, uncompressed_size=_MILLIMETRES)
            if len(raw) == _MILLIMETRES:
                return depth_in_metres(np.frombuffer(raw, dtype="<u2").reshape(DEPTH_SIZE[::-1]))
        except lz4.LZ4BlockError:
            pass
        try:
            raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(block, _METRES + 1)
        except zlib.error as error:
            raise DataError(f"{self._path}: neither LZ4 nor deflate ({error}); {_AGAIN}") from error
        return _in_metres(raw, self._path)


class _Stream:
    """Maps in one stream, inflated as far as was asked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._next = 0

    def read(self, number: int) -> NDArray[np.float32]:
        """One map in metres. Raises `DataError`."""
        with self._lock, self._readable():
            if self._file is None or number < self._next:
                self._restart()
            while self._next < number:
                self._inflate(self._next)
                self._next += 1
            raw = self._inflate(number)
            self._next += 1
        return _in_metres(raw, self._path)

    def _restart(self) -> None:
        self._close()
        self._file = self._path.open("rb")
        self._finalizer = weakref.finalize(self, self._file.close)
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._next = 0

    def _close(self) -> None:
        if self._file is not None:
            self._finalizer()
        self._file = None

    def _inflate(self, number: int) -> bytes:
        """The bytes of the next map, which is that of `number`."""
        assert self._file is not None
        parts, missing = [], _METRES
        while missing:
            packed = self._inflater.unconsumed_tail or self._file.read(_CHUNK)
            part = self._inflater.decompress(packed, missing)
            if not part and (not packed or self._inflater.eof):
                raise _too_short(self._path, number)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (zlib.error, DataError, OSError) as error:
            self._close()
            if isinstance(error, zlib.error):
                raise DataError(f"{self._path}: cannot be inflated ({error}); {_AGAIN}") from error
            raise


def _in_metres(raw: bytes, path: Path) -> NDArray[np.float32]:
    if len(raw) != _METRES:
        raise DataError(
            f"{path}: expected {DEPTH_SIZE[0]}x{DEPTH_SIZE[1]} values of 4 bytes, got {len(raw)} bytes; {_AGAIN}"
        )
    return np.frombuffer(raw, dtype="<f4").reshape(DEPTH_SIZE[::-1]).astype(np.float32)


def _too_short(path: Path, frames: int) -> DataError:
    return DataError(f"{path} holds {frames} depth maps, from 0; {_AGAIN}")
