"""Object storage: paths of a cache at s3://, gs://, abfs:// or any URL that fsspec opens. The only importer of fsspec.

Needs no more of a storage than that an object can be written as a whole, read by ranges, listed and removed.

Credentials, endpoints and regions come from where the storage's own tools take them (`AWS_PROFILE`, `AWS_ENDPOINT_URL`,
`GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_CONNECTION_STRING`, ...), further options from fsspec's configuration
(`FSSPEC_S3_...`).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ditr_cache.errors import CacheError, StorageError, UsageError

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
"""Protocol -> package that brings it."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A path in object storage, with what a cache needs of `pathlib.Path`.

    Holds no connection, so that it may be pickled and used after a fork. What the storage refuses is a `StorageError`,
    what is not there a `FileNotFoundError`.

    Args:
        protocol: say `s3`.
        path: bucket and key, say `bucket/caches/scannet`.
    """

    protocol: str
    path: str

    @classmethod
    def of(cls, url: str) -> RemotePath:
        """The path of a URL.

        Raises:
            UsageError: no bucket, or a protocol that fsspec or this installation does not know.
        """
        protocol, _, path = url.partition("://")
        found = cls(protocol, path.rstrip("/"))
        # Clients take *, ?, [ and ] for patterns, some of them even where an object is to be removed.
        if "::" in url or not path.strip("/") or set("*?[]") & set(url):
            raise UsageError(
                f"cache {url!r}: expected PROTOCOL://BUCKET/FOLDER without any of * ? [ ] ::, say "
                "s3://bucket/caches/scannet"
            )
        _filesystem(protocol)
        return found

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path}"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.protocol, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def parent(self) -> RemotePath:
        """The path without its last part."""
        return RemotePath(self.protocol, posixpath.dirname(self.path))

    def relative_to(self, root: RemotePath) -> str:
        """The part of the path below `root`."""
        return posixpath.relpath(self.path, root.path)

    def resolve(self) -> RemotePath:
        """The path itself: object storage has no links."""
        return self

    def exists(self) -> bool:
        """Whether there is an object of that name."""
        with _errors(self, "look for"):
            try:
                return bool(self._fs.info(str(self))["type"] == "file")
            except FileNotFoundError:
                return False

    def size(self) -> int:
        """Bytes of the object."""
        with _errors(self, "look for"):
            return int(self._fs.size(str(self)))

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self.read_range(0, None)  # as a range: for the whole of an object, clients ask for its size first

    def read_range(self, start: int, stop: int | None) -> bytes:
        """Bytes `start`..`stop` - 1 of the object, for None up to its end; fewer where it ends before."""
        with _errors(self, "read"):
            try:
                return bytes(self._fs.cat_file(str(self), start=start, end=stop))
            except FileNotFoundError:
                raise
            except Exception as error:
                # Some storages refuse a range that starts behind the end, each with a type and code of its own.
                if "range" in str(error).lower() and self._fs.size(str(self)) <= start:
                    return b""
                raise

    def write_bytes(self, content: bytes) -> None:
        """Replace the object as a whole: no reader sees a part of it."""
        with _errors(self, "write"):
            self._writing(lambda: self._fs.pipe_file(str(self), content))

    def create(self, content: bytes) -> bool:
        """Write the object where there is none, and say whether there was none.

        Atomic where the storage has conditional writes (S3 and what speaks its protocol); elsewhere two that come at
        the same moment may both be told that they were the first.
        """
        if self.exists():
            return False
        with _errors(self, "write"):
            try:
                self._writing(lambda: self._fs.pipe_file(str(self), content, mode="create"))
            except FileExistsError:
                return False
            except OSError as error:
                if "PreconditionFailed" in str(error) or "ConditionalRequestConflict" in str(error):
                    return False
                raise
        return True

    def upload(self, file: Path) -> None:
        """Replace the object by a local file, in parts where it is large; it appears as a whole."""
        with _errors(self, "write"):
            self._writing(lambda: self._fs.put_file(str(file), str(self)))

    def _writing(self, write: Callable[[], object]) -> None:
        try:
            write()
        except FileNotFoundError:
            if self.protocol in PACKAGES:  # no such bucket, and it is not ours to make one
                raise
            # A storage that has folders, as sftp:// has.
            self._fs.makedirs(str(self.parent), exist_ok=True)
            write()

    def modified(self) -> datetime.datetime:
        """When the object was written, in UTC."""
        with _errors(self, "look for"):
            found: datetime.datetime = self._fs.modified(str(self))
            return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        with _errors(self, "remove"):
            try:
                self._fs.rm_file(str(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def children(self) -> dict[str, int | None]:
        """Names right below this path: of objects with their size in bytes, of folders with None."""
        with _errors(self, "list"):
            try:
                entries: Sequence[dict[str, Any]] = self._fs.ls(str(self), detail=True)
            except FileNotFoundError:
                return {}
        # Some storages list a folder's own marker, an object of no name, among its content.
        found = {_key(e["name"]): e for e in entries}
        found.pop(_key(self._fs._strip_protocol(str(self))), None)
        return {
            posixpath.basename(name): None if e["type"] == "directory" else int(e["size"]) for name, e in found.items()
        }

    def tree(self) -> dict[str, int]:
        """Every object below this path: its path from here, and its size in bytes."""
        with _errors(self, "list"):
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(str(self), detail=True)
            except FileNotFoundError:
                return {}
        start = len(_key(self.path)) + 1
        # A folder's own marker is an object of no name.
        return {_key(n)[start:]: int(e["size"]) for n, e in found.items() if e["type"] == "file" and n[-1] != "/"}

    def remove_tree(self) -> None:
        """Remove every object below this path, where there is any."""
        with _errors(self, "remove"), contextlib.suppress(FileNotFoundError):
            self._fs.rm(str(self), recursive=True)

    @property
    def _fs(self) -> Any:
        return _filesystem(self.protocol)


def read_many(paths: Sequence[RemotePath]) -> dict[RemotePath, bytes]:
    """The content of many objects of one storage, fetched side by side; those that are not there are left out."""
    if not paths:
        return {}
    with _errors(paths[0].parent, "read"):
        count, storage = len(paths), _filesystem(paths[0].protocol)
        found = storage.cat_ranges([str(p) for p in paths], [0] * count, [None] * count, on_error="return")
    result: dict[RemotePath, bytes] = {}
    for path, content in zip(paths, found, strict=True):
        if isinstance(content, FileNotFoundError):
            continue
        result[path] = path.read_bytes() if isinstance(content, Exception) else bytes(content)
    return result


def remove_many(paths: Sequence[RemotePath]) -> None:
    """Remove many objects of one storage, with as few requests as it takes."""
    if not paths:
        return
    with _errors(paths[0].parent, "remove"), contextlib.suppress(FileNotFoundError):
        _filesystem(paths[0].protocol).rm([str(p) for p in paths])


def _key(name: str) -> str:
    return name.partition("://")[2].strip("/") if "://" in name else name.strip("/")


def _filesystem(protocol: str) -> Any:
    """The connection of this process: one for all threads, and another one after a fork."""
    return _connection(protocol, os.getpid())


@cache  # after a fork, the parent's must stay: to be freed, it would wait for a thread that is not here
def _connection(protocol: str, process: int) -> Any:
    import fsspec

    try:
        # A listing that was kept would hide what other processes commit.
        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(protocol)
        remedy = f"pip install {package}" if package else "name a folder, or a URL that fsspec knows"
        raise UsageError(f"no storage for {protocol}:// in this installation ({error}); {remedy}") from error


@contextlib.contextmanager
def _errors(path: RemotePath, action: str) -> Iterator[None]:
    """Turn whatever a storage's client raises into a `StorageError`; what is not there stays `FileNotFoundError`."""
    try:
        yield
    except CacheError:
        raise
    except Exception as error:  # each client has errors of its own: of credentials, of endpoints, of the network
        if isinstance(error, FileNotFoundError) and action != "write":
            raise
        raise StorageError(
            f"cannot {action} {str(path)!r}: {type(error).__name__}: {error}; check the credentials, the bucket and "
            "the endpoint; the same command continues where it stopped"
        ) from error
