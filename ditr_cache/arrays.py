"""Groups of arrays on disk. Nothing but this file imports zarr.

A group is written as a folder of zarr v3 arrays, sharded, with checksums of the codecs in every chunk. It is read from
there, or from the one object that a partition is in object storage (see `pack`), by `chunks`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from ditr_cache.checksums import block_sums
from ditr_cache.chunks import FolderFiles, OpensFiles, StoredArray
from ditr_cache.errors import CacheError, CorruptCacheError, StorageError, UsageError
from ditr_cache.files import damages
from ditr_cache.schema import ArrayInfo

CHUNK_BYTES = 1 << 19
"""Target size of a chunk before compression: small enough for crops, large enough for the disk."""

SHARD_BYTES = 1 << 28
"""Largest shard before compression: one file per array for nearly every partition."""

PACKED_SHARD_ROWS = 1 << 18
"""Rows of a shard in an object: those of a sample are then in one or two of every array, which lie side by side."""

GAP_BYTES = 1 << 22
"""Elsewhere, so much between wanted rows is fetched along rather than asked around."""

MAX_METADATA_BYTES = 1 << 20
"""Largest `zarr.json` that is read; those that are written have a kilobyte."""


def array_digest(array: NDArray[np.generic]) -> str:
    """SHA-256 (hex) of an array's shape, dtype and content in C order."""
    digest = hashlib.sha256(f"{array.dtype.str}{list(array.shape)}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def array_infos(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, ArrayInfo]:
    """What a commit record says of arrays."""
    return {k: ArrayInfo(shape=a.shape, dtype=a.dtype.str, sha256=array_digest(a)) for k, a in arrays.items()}


def array_sums(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, str]:
    """The checksums of arrays that a commit record holds, see `checksums`: one for each chunk."""
    return {name: block_sums(array, _chunk_rows(array)) for name, array in arrays.items()}


def fill_group(folder: Path, arrays: Mapping[str, NDArray[np.generic]], *, to_pack: bool = False) -> None:
    """Write a group of arrays into an empty folder; `to_pack`: which will be packed into one object."""
    group = zarr.open_group(store=str(folder), mode="w", zarr_format=3)
    for name, array in arrays.items():
        _write_array(group, name, array, PACKED_SHARD_ROWS if to_pack else len(array))


def _chunk_rows(array: NDArray[np.generic]) -> int:
    """Rows of a chunk, and of a block that has a checksum."""
    row_bytes = max(1, array[:1].nbytes)
    return max(1, min(len(array), 1 << max(0, (CHUNK_BYTES // row_bytes).bit_length() - 1)))


def _write_array(group: zarr.Group, name: str, array: NDArray[np.generic], most_rows: int) -> None:
    row_bytes, rows = max(1, array[:1].nbytes), _chunk_rows(array)
    chunks = (rows, *array.shape[1:])
    shard_rows = rows * max(1, min(-(-min(len(array), most_rows) // rows), SHARD_BYTES // max(1, rows * row_bytes)))
    # A single chunk needs no shard around it, and is read in fewer steps.
    shards = (shard_rows, *array.shape[1:]) if shard_rows > rows else None
    stored = group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunks,
        shards=shards,
        compressors=_compressors(name, array),
        fill_value=0,
    )
    if array.size:
        stored[...] = array


def _compressors(name: str, array: NDArray[np.generic]) -> list[Any]:
    """How the chunks of an array are made small; each kind has a checksum."""
    if name == "table":
        # Rows of features shrink where some repeat. What is left is nearly noise: zstd's Huffman codes save another 5
        # to 8 % of int8, but reading then takes 4 times as long, and longer than to read twice the bytes as they are.
        return [BloscCodec(cname="lz4", clevel=9, shuffle="noshuffle"), Crc32cCodec()]
    if array.ndim == 1 and array.dtype.kind in "iu":
        # Indices and links shrink many times under bitshuffle.
        return [BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()]
    return [ZstdCodec(level=1, checksum=True)]


class GroupFiles(Protocol):
    """The files of a group that is no folder on this machine."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none of that name."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start`..`stop` - 1 of a file."""

    def announced(self, name: str, start: int, stop: int) -> AbstractContextManager[None]:
        """While parts of a range are read one after the other, fetch it with one request."""

    def announced_files(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """While these files are read, fetch them with one request where they lie side by side."""

    def forget(self) -> None:
        """Fetch everything again when it is asked for."""


class ArrayGroup:
    """Reads the arrays of one group. Parsed metadata is kept; no file stays open for it.

    Args:
        where: names the group in errors; the folder itself where `files` is None.
        infos: its arrays, as its record says.
        files: what it is read from; None: the folder `where`.
        sums: checksums of its arrays as its record says; arrays without are not compared.
    """

    def __init__(
        self,
        where: str,
        infos: Mapping[str, ArrayInfo],
        files: GroupFiles | None = None,
        sums: Mapping[str, str] | None = None,
    ) -> None:
        self.where, self.infos = where, infos
        self._files, self._sums = files, sums or {}
        self._opens: OpensFiles = FolderFiles(Path(where)) if files is None else _ElsewhereFiles(files)
        self._open = lru_cache(maxsize=len(infos))(self._opened)

    def read(self, name: str, rows: slice = slice(None)) -> NDArray[Any]:
        """Rows of one array. Raises `CorruptCacheError` where it cannot be decoded or is not as recorded."""
        with self._guarded(name):
            stored = self._open(name)
            return stored.read(*rows.indices(stored.shape[0])[:2])

    def read_rows(self, name: str, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Rows at strictly ascending positions; only the chunks that hold some of them are read. Raises as `read`.

        Raises:
            UsageError: the positions do not ascend.
        """
        if len(rows) > 1 and not (rows[1:] > rows[:-1]).all():
            raise UsageError(f"{self.where}/{name}: expected the positions of rows to ascend strictly")
        with self._guarded(name):
            return self._open(name).take(rows)

    def announced(self, names: Sequence[str], rows: slice) -> AbstractContextManager[None]:
        """While the same rows of several arrays are read, fetch them at once where they lie side by side."""
        if self._files is None:
            return nullcontext()
        return self._files.announced_files([file for name in names for file in self._files_of(name, rows)])

    def _files_of(self, name: str, rows: slice) -> Sequence[str]:
        with self._guarded(name):
            stored = self._open(name)
            return stored.files(*rows.indices(stored.shape[0])[:2])

    def check(self) -> None:
        """Raise `CorruptCacheError` where the group's own `zarr.json` is damaged, which only other readers need."""
        with self._guarded("zarr.json"):
            document = self._document("zarr.json")
            whole = document["node_type"] == "group" and document["zarr_format"] == 3
        if not whole:
            raise CorruptCacheError(f"{self.where}/zarr.json: was altered; run `ditr-cache verify --repair`")

    def _document(self, name: str) -> Any:
        with self._opens.opened(name) as file:
            if file is None or file.size > MAX_METADATA_BYTES:
                raise ValueError(f"expected a zarr.json of at most {MAX_METADATA_BYTES} bytes, found none such")
            return json.loads(file.read(0, file.size))

    def _opened(self, name: str) -> StoredArray:
        document = self._document(f"{name}/zarr.json")
        where, sums = f"{self.where}/{name}", self._sums.get(name)
        return StoredArray(name, document, self.infos[name], self._opens, where, sums)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """What cannot be read or decoded is an error of the package."""
        try:
            yield
        except CorruptCacheError:
            self._forget()
            raise
        except CacheError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # codecs raise many types for damaged bytes; all mean the same here
            if isinstance(error, OSError) and not damages(error):
                raise StorageError(f"cannot read {self.where}/{name}: {error.strerror or error}") from error
            self._forget()
            raise CorruptCacheError(
                f"{self.where}/{name}: cannot be decoded ({type(error).__name__}: {error}); run `ditr-cache verify "
                "--repair`"
            ) from error

    def _forget(self) -> None:
        """What was fetched was damaged: once it is repaired, it must be fetched again."""
        if self._files is not None:
            self._files.forget()


class _ElsewhereFile:
    """A file of `GroupFiles`; see `StoredFile`."""

    def __init__(self, files: GroupFiles, name: str, size: int) -> None:
        self.size, self._files, self._name = size, files, name
        self.gap = GAP_BYTES

    def read(self, start: int, stop: int) -> bytes:
        return self._files.read(self._name, start, stop)

    def read_into(self, start: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        stop = start + sum(part.nbytes for part in parts)
        content = np.frombuffer(self.read(start, stop), np.uint8)
        for part in parts:
            part[...] = content[: part.nbytes]
            content = content[part.nbytes :]

    def announced(self, start: int, stop: int) -> AbstractContextManager[None]:
        return self._files.announced(self._name, start, stop)


class _ElsewhereFiles:
    """Opens `GroupFiles`; see `OpensFiles`."""

    def __init__(self, files: GroupFiles) -> None:
        self._files = files

    @contextmanager
    def opened(self, name: str) -> Iterator[_ElsewhereFile | None]:
        size = self._files.size(name)
        yield None if size is None else _ElsewhereFile(self._files, name, size)
