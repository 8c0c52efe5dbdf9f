"""A local read-through cache of parts of remote objects, with a size limit.

Set `DITR_LOCAL_CACHE` to a folder on a fast local disk, and `DITR_LOCAL_CACHE_SIZE` to how much it may hold (`200GB`;
by default 50GB). Objects are kept in blocks, so that what is read once is fetched once, and nothing else is. Processes
share the folder. Blocks that were not used for longest go first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ditr_cache.errors import UsageError

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
"""Size of a block: some milliseconds of any connection, so that what surrounds a wanted part costs little."""

FOLDER_VARIABLE, SIZE_VARIABLE = "DITR_LOCAL_CACHE", "DITR_LOCAL_CACHE_SIZE"
DEFAULT_SIZE = "50GB"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_TOUCH_INTERVAL = 60.0
"""Seconds after which the use of a block is noted again."""

_CHECKSUM_BYTES = 4


def local_cache() -> BlockCache | None:
    """The cache that the environment asks for, None where it asks for none. Raises `UsageError` for a bad size."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return _cache_of(folder, os.environ.get(SIZE_VARIABLE, DEFAULT_SIZE)) if folder else None


@cache
def _cache_of(folder: str, size: str) -> BlockCache:
    return BlockCache(Path(folder), parse_bytes(size))


def parse_bytes(text: str) -> int:
    """A number of bytes with or without a decimal unit, say `200GB`. Raises `UsageError`."""
    number = text.strip().upper().rstrip("BKMGT")
    unit = text.strip().upper()[len(number) :] or "B"
    try:
        size = int(float(number) * UNITS[unit if unit.endswith("B") else unit + "B"])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{SIZE_VARIABLE}={text!r}: expected a size, say 200GB")
    return size


class BlockCache:
    """Blocks of remote objects on a local disk.

    Args:
        folder: made where it does not exist.
        limit: bytes it may hold; passed by at most a fiftieth for every process that fills it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._unaccounted = limit  # the first block that is written looks at what is there
        self._broken = False

    def read(self, key: str, size: int, start: int, stop: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Bytes `start`..`stop` - 1 of an object.

        Args:
            key: identity of the object's content, a hexadecimal digest.
            size: of the object in bytes.
            fetch: reads a range of the object itself; called once for every run of missing blocks. It gives less where
                the object was cut, and then so does this.
        """
        numbers = range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        blocks: dict[int, bytes] = {}
        missing: list[int] = []
        for number in numbers:
            content = self._load(key, number)
            if content is None:
                missing.append(number)
            else:
                blocks[number] = content
        while missing:
            count = next((i for i in range(1, len(missing)) if missing[i] != missing[0] + i), len(missing))
            first = missing[0] * BLOCK_BYTES
            last = min(size, (missing[0] + count) * BLOCK_BYTES)
            run = fetch(first, last)
            for i, number in enumerate(missing[:count]):
                blocks[number] = run[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]
                if len(run) == last - first:  # what was cut may be mended
                    self._store(key, number, blocks[number])
            missing = missing[count:]
        whole = bytearray()
        for number in numbers:
            whole += blocks[number]
            if len(blocks[number]) < min(BLOCK_BYTES, size - number * BLOCK_BYTES):
                break  # cut here: what follows would stand in the wrong place
        offset = start - numbers.start * BLOCK_BYTES
        return bytes(whole[offset : offset + stop - start])

    def forget(self, key: str) -> None:
        """Remove the blocks of an object, and of those whose key goes on after it with a `-`."""
        for path in (self.folder / key[:2]).glob(f"{key}-*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _path(self, key: str, number: int) -> Path:
        return self.folder / key[:2] / f"{key}-{number}"

    def _load(self, key: str, number: int) -> bytes | None:
        path = self._path(key, number)
        try:
            stored = path.read_bytes()
            if time.time() - path.stat().st_mtime > _TOUCH_INTERVAL:
                os.utime(path)
        except OSError:  # not there, or taken away meanwhile
            return None
        content = stored[:-_CHECKSUM_BYTES]
        # Blocks are not flushed to the disk: after a crash of the machine one may be anything.
        return content if stored[-_CHECKSUM_BYTES:] == _checksum(content) else None

    def _store(self, key: str, number: int, content: bytes) -> None:
        if self._broken:
            return
        path = self._path(key, number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content + _checksum(content))
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            self._unaccounted += len(content)
            if self._unaccounted > self.limit // 50:
                self._evict()
                self._unaccounted = 0
        except FileNotFoundError:  # somebody empties the folder
            return
        except OSError as error:
            self._broken = True
            log.warning("local cache %s: %s; reading goes on without it", self.folder, error)

    def _evict(self) -> None:
        """Remove the blocks that were not used for longest until the rest fits."""
        found = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in found) - self.limit
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little")
