"""Rows of one stored array, read chunk by chunk and decoded straight into place.

zarr writes the arrays of a cache, and any zarr reads them. A trainer reads them through this file instead, because
zarr's own way costs milliseconds per array and several copies of what is read; and because it makes room for a chunk
by the size that the chunk announces, where here a chunk that does not fill exactly its place is refused. Nothing runs
in other threads, so a process may be forked at any time, and no file stays open.

zarrs, a codec pipeline in Rust that zarr can be told to use, is not used where it is installed, either. A loader's
process that is forked after a first read waits for ever for its threads; a chunk of 17 bytes ends the process; and it
makes room for what a chunk announces, too. It is no quicker (pipelines/bench_reading.py measures it).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ditr_cache.bounded_codecs import BLOSC_HEADER, check_metadata, decode_chunk, may_be_plain, plain_sum
from ditr_cache.checksums import check_blocks, is_sum
from ditr_cache.schema import ArrayInfo

_ABSENT = np.iinfo(np.uint64).max
"""Offset and size of a chunk of zeros, which is not stored, in the index of a shard."""


class StoredFile(Protocol):
    """One file of a group, while it is read."""

    size: int
    """In bytes."""
    gap: int
    """So many bytes between wanted ones are better announced along."""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start`..`stop` - 1. Raises an error where there are fewer."""

    def read_into(self, start: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        """Bytes from `start` on, into several places, one after the other. Raises an error where there are fewer."""

    def announced(self, start: int, stop: int) -> AbstractContextManager[None]:
        """Parts of this range are read next, one after the other."""


class OpensFiles(Protocol):
    """The files of a group."""

    def opened(self, name: str) -> AbstractContextManager[StoredFile | None]:
        """A file, None where there is none of that name."""


class LocalFile:
    """A file on this machine; see `StoredFile`."""

    gap = 0

    def __init__(self, descriptor: int, size: int) -> None:
        self.size, self._descriptor = size, descriptor

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start`..`stop` - 1. Raises `EOFError` where there are fewer."""
        content = os.pread(self._descriptor, stop - start, start)
        if len(content) != stop - start:
            raise EOFError(f"expected {stop - start} bytes at {start}, got {len(content)}")
        return content

    def read_into(self, start: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        """Bytes from `start` on, into several places. Raises `EOFError` where there are fewer."""
        got = os.preadv(self._descriptor, [part.data for part in parts], start)
        wanted = sum(part.nbytes for part in parts)
        if got != wanted:
            raise EOFError(f"expected {wanted} bytes at {start}, got {got}")

    def announced(self, start: int, stop: int) -> AbstractContextManager[None]:
        """Nothing to do: the system's own reading ahead is quicker than being asked for a whole range."""
        return nullcontext()


class FolderFiles:
    """The files of a group that is a folder on this machine; see `OpensFiles`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def opened(self, name: str) -> Iterator[LocalFile | None]:
        """A file, None where there is none. Raises `OSError` where it is a pipe, a device or a folder."""
        try:
            # Opening a pipe would wait for who writes into it.
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            yield None
            return
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{name} is not a regular file")
            yield LocalFile(descriptor, status.st_size)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class _Piece:
    """Rows wanted of one chunk: `wanted` of the chunk's rows are rows `start`..`stop` - 1 of the result."""

    chunk: int
    wanted: slice | NDArray[np.integer]
    start: int
    stop: int


class StoredArray:
    """Reads rows of an array.

    Args:
        name: of the array in its group.
        document: what its `zarr.json` holds.
        info: what the commit record says of it.
        files: of the group.
        where: names the array in errors.
        sums: what the record says of its chunks, see `checksums`; None: nothing.

    Raises:
        CorruptCacheError: the metadata is not such as this package writes.
    """

    def __init__(
        self,
        name: str,
        document: Mapping[str, Any],
        info: ArrayInfo,
        files: OpensFiles,
        where: str,
        sums: str | None = None,
    ) -> None:
        check_metadata(document, info, where)
        self._name, self._files, self._where, self._sums = name, files, where, sums
        self.shape, self.dtype = info.shape, np.dtype(info.dtype)
        rows, codecs = document["chunk_grid"]["configuration"]["chunk_shape"][0], document["codecs"]
        self._chunks_of_file, self._sharded = 1, codecs[0]["name"] == "sharding_indexed"
        if self._sharded:
            settings = codecs[0]["configuration"]
            self._chunks_of_file, codecs = rows // settings["chunk_shape"][0], settings["codecs"]
            rows = settings["chunk_shape"][0]
        self.chunk_rows: int = rows
        """Rows of a chunk: what is decoded at once."""
        self._codec: str = codecs[1]["name"]
        self._row_bytes = prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start`..`stop` - 1. Raises one of several errors where what is stored is damaged."""
        rows = self.chunk_rows
        pieces = []
        for chunk in range(start // rows, -(-stop // rows)):
            first, last = max(start, chunk * rows), min(stop, (chunk + 1) * rows)
            pieces.append(_Piece(chunk, slice(first - chunk * rows, last - chunk * rows), first - start, last - start))
        return self._filled(max(0, stop - start), pieces)

    def take(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Rows at strictly ascending positions, from the chunks that hold some of them. Raises as `read`."""
        if not len(rows):
            return self._filled(0, [])
        if not 0 <= rows[0] <= rows[-1] < self.shape[0]:
            raise IndexError(f"rows {rows[0]} to {rows[-1]} of {self.shape[0]}")
        pieces = []
        first, size, start = int(rows[0]) // self.chunk_rows, self.chunk_rows, 0
        last = int(rows[-1]) // size
        for chunk, stop in enumerate(np.searchsorted(rows, np.arange(first + 1, last + 2) * size).tolist(), first):
            if stop == start:
                continue
            wanted: Any = rows[start:stop] - chunk * size
            if wanted[-1] - wanted[0] + 1 == len(wanted):
                wanted = slice(int(wanted[0]), int(wanted[-1]) + 1)
            pieces.append(_Piece(chunk, wanted, start, stop))
            start = stop
        return self._filled(len(rows), pieces)

    def files(self, start: int, stop: int) -> list[str]:
        """Names of the files that rows `start`..`stop` - 1 lie in."""
        rows = self.chunk_rows * self._chunks_of_file
        return [self._file(number) for number in range(start // rows, -(-stop // rows))]

    def _file(self, number: int) -> str:
        return "/".join((self._name, "c", str(number), *("0",) * (len(self.shape) - 1)))

    def _filled(self, count: int, pieces: Sequence[_Piece]) -> NDArray[Any]:
        out = np.empty((count, *self.shape[1:]), dtype=self.dtype)
        if not out.size:
            return out
        target = out.reshape(count, -1).view(np.uint8)
        chunk = np.empty((self.chunk_rows, self._row_bytes), dtype=np.uint8)
        for file, found in groupby(pieces, key=lambda piece: piece.chunk // self._chunks_of_file):
            of_file = list(found)
            with self._files.opened(self._file(file)) as f:
                for piece, stored in self._stored(f, of_file):
                    place = target[piece.start : piece.stop]
                    whole = len(place) == self.chunk_rows
                    self._decode(piece.chunk, f, stored, place if whole else chunk)
                    if not whole:
                        place[...] = chunk[piece.wanted]
        return out

    def _decode(
        self, number: int, file: StoredFile | None, stored: tuple[int, int] | None, rows: NDArray[np.uint8]
    ) -> None:
        """Read a chunk, which lies from one byte of a file to before another, into `rows` [R, bytes of a row]."""
        out, found = rows.reshape(-1), None
        if file is None or stored is None:
            out[...] = 0
        else:
            if may_be_plain(self._codec, stored[1] - stored[0], out):
                # Read without a copy in between.
                head, tail = np.empty(BLOSC_HEADER, np.uint8), np.empty(4, np.uint8)
                file.read_into(stored[0], (head, out, tail))
                found = plain_sum(head, out, tail)
            if found is None:
                decode_chunk(self._codec, file.read(*stored), out)
        if self._sums is None or (found is not None and is_sum(found, number, self._sums)):
            return
        # What pads the last chunk is no part of the array.
        rows = rows[: self.shape[0] - number * self.chunk_rows]
        check_blocks(rows, number, self.chunk_rows, self._sums, self._where)

    def _stored(
        self, file: StoredFile | None, pieces: Sequence[_Piece]
    ) -> Iterator[tuple[_Piece, tuple[int, int] | None]]:
        """First byte, and byte after the last, of the chunk of each piece of one file; None for zeros."""
        if file is None:
            yield from ((piece, None) for piece in pieces)
            return
        if not self._sharded:
            with file.announced(0, file.size):
                yield from ((piece, (0, file.size)) for piece in pieces)
            return
        with ExitStack() as whole:
            if len(pieces) == self._chunks_of_file:
                whole.enter_context(file.announced(0, file.size))
            index = self._index(file)
            for run in self._runs(pieces, file.gap):
                places = [index[piece.chunk % self._chunks_of_file] for piece in run]
                stored = [place for place in places if place is not None]
                if not stored:
                    yield from ((piece, None) for piece in run)
                    continue
                with file.announced(min(start for start, _ in stored), max(stop for _, stop in stored)):
                    yield from zip(run, places, strict=True)

    def _runs(self, pieces: Sequence[_Piece], gap: int) -> Iterator[Sequence[_Piece]]:
        """Pieces that are better read together than one by one."""
        most = 1 + gap // (self.chunk_rows * self._row_bytes)
        start = 0
        for i in range(1, len(pieces) + 1):
            if i == len(pieces) or pieces[i].chunk - pieces[i - 1].chunk > most:
                yield pieces[start:i]
                start = i

    def _index(self, file: StoredFile) -> list[tuple[int, int] | None]:
        """First byte, and byte after the last, of each chunk of a shard; None for chunks of zeros."""
        length = 16 * self._chunks_of_file + 4
        if file.size < length:
            raise EOFError(f"a shard of {file.size} bytes with an index of {length}")
        content = file.read(file.size - length, file.size)
        if google_crc32c.value(content[:-4]) != int.from_bytes(content[-4:], "little"):
            raise ValueError("the checksum of a shard's index differs")
        places: list[tuple[int, int] | None] = []
        for start, size in np.frombuffer(content[:-4], "<u8").reshape(-1, 2).tolist():
            if start == size == _ABSENT:
                places.append(None)
            elif start + size > file.size:
                raise ValueError(f"a chunk of {size} bytes at {start} in a shard of {file.size}")
            else:
                places.append((start, start + size))
        return places
