"""The files of a group that lie in object storage, or packed in one file: read with as few requests as that takes."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ditr_cache.arrays import GAP_BYTES, GroupFiles
from ditr_cache.block_cache import BlockCache, local_cache
from ditr_cache.errors import CorruptCacheError
from ditr_cache.files import Location, content_digest
from ditr_cache.pack import METADATA_NAME
from ditr_cache.remote import RemotePath
from ditr_cache.schema import FeatureRecord, GeometryRecord

WHOLE_BYTES = 1 << 26
"""Objects up to this size, 64 MiB, are fetched as a whole where all of one is likely to be wanted."""

TOGETHER_BYTES = 1 << 24
"""Files up to this size in all, 16 MiB, are fetched whole, rather than some rows of each with a request of its own."""

REMEMBERED_BYTES = 1 << 16
"""Parts up to this size, the metadata and indices of arrays, are remembered."""

RECENT_BYTES = 1 << 28
"""What a process remembers at most, 256 MiB: whole objects while their sample is read, and many small parts."""

Fetch = Callable[[int, int], bytes]
"""Reads bytes `start`..`stop` - 1 of an object; fewer where it was cut."""


class Recent:
    """What was fetched last, up to a number of bytes in all. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._parts: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, start: int, stop: int, fetch: Fetch) -> bytes:
        """Bytes `start`..`stop` - 1 of the object `key`."""
        part = (key, start, stop)
        with self._lock:
            if part in self._parts:
                self._parts.move_to_end(part)
                return self._parts[part]
        content = fetch(start, stop)
        with self._lock:
            if part not in self._parts:
                self._parts[part] = content
                self._bytes += len(content)
            while self._bytes > self._limit:
                self._bytes -= len(self._parts.popitem(last=False)[1])
        return content

    def forget(self, key: str) -> None:
        """Fetch this object again when it is asked for."""
        with self._lock:
            for part in [part for part in self._parts if part[0] == key]:
                self._bytes -= len(self._parts.pop(part))


_recent = Recent(RECENT_BYTES)


def group_files(
    where: Location, record: GeometryRecord | FeatureRecord, *, whole: bool, fresh: bool = False
) -> GroupFiles:
    """The files of a group that are no folder on this machine.

    Args:
        where: the object that holds them all, or a remote folder of them.
        record: what was committed.
        whole: fetch a small object at once, instead of the parts that are asked for.
        fresh: take nothing from memory or the local cache.
    """
    files, offsets = record.files, record.offsets
    identity = content_digest(record.arrays, files)
    recent = Recent(RECENT_BYTES) if fresh else _recent
    cache = local_cache() if isinstance(where, RemotePath) and not fresh else None
    if not offsets:
        parts = {
            name: Part(_Object(where / name, f"{identity}-{i}", size, recent, cache), 0, size)
            for i, (name, size) in enumerate(files.items())
        }
        return StoredFiles(parts)
    size = max(offsets[name] + files[name] for name in files)
    kept_from = 0
    if not whole or size > WHOLE_BYTES or isinstance(where, Path):
        # The metadata of all arrays stands together.
        metadata = [offset for name, offset in offsets.items() if name.rpartition("/")[2] == METADATA_NAME]
        kept_from = min(metadata, default=size)
    pack = _Object(where, identity, size, recent, cache, kept_from)
    return StoredFiles({name: Part(pack, offsets[name], size) for name, size in files.items()})


class _Object:
    """One object, of which small parts, and all from `kept_from` on, are remembered.

    Args:
        where: it lies.
        identity: of its content, a hexadecimal digest: the name of a pack and the keys of both memories are made of it.
        size: in bytes.
        recent: memory of this process.
        cache: memory of this machine.
        kept_from: None keeps small parts alone.
    """

    def __init__(
        self,
        where: Location,
        identity: str,
        size: int,
        recent: Recent,
        cache: BlockCache | None,
        kept_from: int | None = None,
    ) -> None:
        self.where = where
        self._identity, self._size, self._recent, self._cache = identity, size, recent, cache
        self._kept_from = size if kept_from is None else kept_from
        self._key = f"{where} {identity}"
        self._announced: list[tuple[int, int, bytes]] = []

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start`..`stop` - 1."""
        for first, last, content in self._announced:
            if first <= start and stop <= last:
                return content[start - first : stop - first]
        if start >= self._kept_from:
            end = self._recent.get(self._key, self._kept_from, self._size, self._fetch)
            return end[start - self._kept_from : stop - self._kept_from]
        if stop - start > REMEMBERED_BYTES:
            return self._fetch(start, stop)
        return self._recent.get(self._key, start, stop, self._fetch)

    @contextlib.contextmanager
    def announced(self, start: int, stop: int) -> Iterator[None]:
        """While parts of a range are read one after the other, fetch it with one request."""
        there = any(first <= start and stop <= last for first, last, _ in self._announced)
        if there or start >= self._kept_from:
            yield
            return
        part = (start, stop, self._fetch(start, stop))
        self._announced.append(part)
        try:
            yield
        finally:
            self._announced.remove(part)

    def forget(self) -> None:
        """Fetch everything again when it is asked for."""
        self._recent.forget(self._key)
        if self._cache is not None:
            self._cache.forget(self._identity)

    def _fetch(self, start: int, stop: int) -> bytes:
        try:
            if isinstance(self.where, Path):
                return _read_local(self.where, start, stop)
            if self._cache is not None:
                return self._cache.read(self._identity, self._size, start, stop, self.where.read_range)
            return self.where.read_range(start, stop)
        except FileNotFoundError as error:
            raise CorruptCacheError(
                f"{self.where}: committed but missing; run `ditr-cache verify --repair`, or, where it was extracted "
                "again meanwhile, this command again"
            ) from error


class Part:
    """Where in an object a file lies."""

    def __init__(self, source: _Object, offset: int, size: int) -> None:
        self.source, self.offset, self.size = source, offset, size


class StoredFiles:
    """The files of a group as parts of objects; see `GroupFiles`."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none of that name."""
        part = self._parts.get(name)
        return None if part is None else part.size

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start`..`stop` - 1 of a file. Raises `CorruptCacheError` where it ends before."""
        part = self._parts[name]
        content = part.source.read(part.offset + start, part.offset + stop)
        if len(content) != stop - start:
            raise CorruptCacheError(
                f"{part.source.where}: expected {stop - start} bytes of {name} at {part.offset + start}, got "
                f"{len(content)}: the object was cut; run `ditr-cache verify --repair`"
            )
        return content

    def announced(self, name: str, start: int, stop: int) -> contextlib.AbstractContextManager[None]:
        """While parts of a range are read one after the other, fetch it with one request."""
        part = self._parts[name]
        return part.source.announced(part.offset + start, part.offset + stop)

    def announced_files(self, names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        """While these files are read, fetch them with one request where they lie side by side."""
        parts = [self._parts[name] for name in names if name in self._parts]  # files of zeros are not written
        if len({part.source for part in parts}) != 1:
            return contextlib.nullcontext()
        start, stop = min(part.offset for part in parts), max(part.offset + part.size for part in parts)
        if stop - start > min(TOGETHER_BYTES, GAP_BYTES + sum(part.size for part in parts)):
            return contextlib.nullcontext()
        return parts[0].source.announced(start, stop)

    def forget(self) -> None:
        """Fetch everything again when it is asked for."""
        for part in self._parts.values():
            part.source.forget()


def _read_local(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)
