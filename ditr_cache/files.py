"""Files of the cache: where they lie, atomic and durable writes, temporary names, checks. Knows no arrays."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ditr_cache.errors import CacheError, CorruptCacheError, MissingDataError, StorageError, UsageError
from ditr_cache.schema import Document

D = TypeVar("D", bound=Document)


def local_path(url: str | os.PathLike[str]) -> Path:
    """The folder that a cache URL names: a path or file://."""
    text = os.fspath(url)
    parts = urllib.parse.urlsplit(text)
    if len(parts.scheme) > 1 and parts.scheme != "file":
        raise UsageError(f"cache {text!r}: this version stores caches on a file system, got scheme {parts.scheme!r}")
    return Path(urllib.parse.unquote(parts.path) if parts.scheme == "file" else text)


def file_name(identifier: str) -> str:
    """A file name for any id: readable, one per id, safe on every file system."""
    name = urllib.parse.quote(identifier, safe=" +=@,").replace(".", "%2E", 1 if identifier.startswith(".") else 0)
    if name == "vfm":  # vfm.json is the feature store's own document
        return "%76fm"
    if len(name) > 180:
        name = f"{name[:150]}~{hashlib.sha256(identifier.encode()).hexdigest()[:16]}"
    return name


@contextlib.contextmanager
def storage_errors(where: Path, action: str) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StorageError` that says what could not be done, and the remedy."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = {
            errno.ENOSPC: "free space or choose another --out; the same command then continues where it stopped",
            errno.EDQUOT: "raise the quota or choose another --out; the same command then continues",
            errno.EACCES: "make it writable or choose another --out",
            errno.EROFS: "choose another --out on a writable file system",
        }.get(error.errno or 0, "the same command continues where it stopped once this is mended")
        raise StorageError(f"cannot {action} {str(where)!r}: {reason}; {remedy}") from error


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically and durably."""
    with storage_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=temporary_prefix(), suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o666 & ~umask())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync(path.parent)


def umask() -> int:
    """The process's umask: temporary files are private, what they become is not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no reader ever sees half of it."""
    with storage_errors(folder, "remove"):
        if folder.exists():
            trash = Path(tempfile.mkdtemp(prefix=temporary_prefix(), suffix=".tmp", dir=folder.parent))
            folder.rename(trash / "old")
            shutil.rmtree(trash)


def temporary_prefix() -> str:
    """Names who writes a temporary file, so that another run can tell a leftover from work in progress."""
    return f".{socket.gethostname()}+{os.getpid()}+"


def remove_leftovers(root: Path) -> int:
    """Remove temporary files of killed runs from a cache; returns how many there were.

    A leftover is a temporary file of a process of this host that is gone, or one older than a day.
    """
    removed = 0
    for folder in (root, root / "geometry", *(root / "features").glob("*")):
        for path in folder.glob(".*.tmp"):
            host, pid, *_ = [*path.name[1:].split("+"), "", ""]
            # Not there: its own writer renamed it meanwhile.
            with storage_errors(path, "remove"), contextlib.suppress(FileNotFoundError):
                dead = host == socket.gethostname() and pid.isdigit() and not _alive(int(pid))
                if not dead and time.time() - path.stat().st_mtime < 86400:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed += 1
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass(frozen=True)
class Paths:
    """Where things lie below a cache's root."""

    root: Path

    @property
    def metadata(self) -> Path:
        """`cache.json`."""
        return self.root / "cache.json"

    @property
    def geometry(self) -> Path:
        """Folder of the geometry partitions."""
        return self.root / "geometry"

    def features(self, key: str) -> Path:
        """Folder of one VFM's feature partitions."""
        return self.root / "features" / file_name(key)

    def arrays(self, folder: Path, partition: str) -> Path:
        """The zarr group of a partition in `folder`."""
        return folder / f"{file_name(partition)}.zarr"

    def record(self, folder: Path, partition: str) -> Path:
        """The commit record of a partition in `folder`."""
        return folder / f"{file_name(partition)}.json"


def read_document(path: Path, cls: type[D]) -> D:
    """A JSON document of the cache. Raises `MissingDataError`, `CorruptCacheError` or `FormatVersionError`."""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingDataError(f"{str(path)!r} does not exist") from error
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    return cls.from_json(text, str(path))


def check_files(folder: Path, files: Mapping[str, int]) -> None:
    """Raise `CorruptCacheError` where a file that a record names is missing or of another size."""
    for name, size in files.items():
        path = folder / name
        try:
            got = path.stat().st_size
        except OSError as error:
            raise CorruptCacheError(f"{path}: committed but missing; run `ditr-cache verify --repair`") from error
        if got != size:
            raise CorruptCacheError(
                f"{path}: expected {size} bytes as committed, got {got}; run `ditr-cache verify --repair`"
            )
