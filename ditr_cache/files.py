"""Files of the cache, on a file system or in object storage: where they lie, atomic writes, checks. Knows no arrays."""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from ditr_cache.errors import CacheError, CorruptCacheError, MismatchError, MissingDataError, StorageError
from ditr_cache.remote import RemotePath, read_many
from ditr_cache.schema import ArrayInfo, Document, FeatureRecord, GeometryRecord, canonical_digest

D = TypeVar("D", bound=Document)
R = TypeVar("R", GeometryRecord, FeatureRecord)

Location: TypeAlias = Path | RemotePath
"""A file or folder of a cache."""

RESERVED_NAMES = ("vfm", "codec")
"""Documents of a feature store that are no commit records."""

MAX_DOCUMENT_BYTES = 1 << 28
"""Largest JSON document that is read, 256 MiB: a record has some hundred bytes for each view."""

_FETCHED_AT_ONCE = 256
"""Documents fetched side by side from object storage."""


def location(url: str | os.PathLike[str] | RemotePath) -> Location:
    """The folder that a cache URL names: a path, file://, or a URL of object storage.

    Raises:
        UsageError: a protocol that this installation cannot open.
    """
    if isinstance(url, RemotePath):
        return url
    text = os.fspath(url)
    parts = urllib.parse.urlsplit(text)
    if len(parts.scheme) > 1 and parts.scheme != "file":
        return RemotePath.of(text)
    return Path(urllib.parse.unquote(parts.path) if parts.scheme == "file" else text)


def file_name(identifier: str) -> str:
    """A file name for any id: readable, one per id, safe on every file system."""
    name = urllib.parse.quote(identifier, safe=" +=@,").replace(".", "%2E", 1 if identifier.startswith(".") else 0)
    if name in RESERVED_NAMES:
        return f"%{ord(name[0]):x}{name[1:]}"
    if len(name) > 180:
        name = f"{name[:150]}~{hashlib.sha256(identifier.encode()).hexdigest()[:16]}"
    return name


@contextlib.contextmanager
def storage_errors(where: Location, action: str) -> Iterator[None]:
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


def damages(error: OSError) -> bool:
    """Whether an error of the system says that a file is gone or its disk is damaged, and not that all may be well.

    What is damaged may be taken back and made again. Files that may not be opened, too many of them, or a server that
    is away are no reason for that.
    """
    damaged = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EIO)  # or no file
    return error.errno in damaged


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Location, text: str) -> None:
    """Replace a file atomically and durably."""
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
        return
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


_UMASK = os.umask(0)  # to read it is to change it, which must not happen while other threads make files
os.umask(_UMASK)


def umask() -> int:
    """The umask that the process was started with: temporary files are private, what they become is not."""
    return _UMASK


def remove_group(folder: Location) -> None:
    """Remove a group of arrays so that no reader ever sees half of it."""
    if isinstance(folder, RemotePath):
        folder.unlink(missing_ok=True)
        folder.remove_tree()
        return
    with storage_errors(folder, "remove"):
        if exists(folder):
            trash = Path(tempfile.mkdtemp(prefix=temporary_prefix(), suffix=".tmp", dir=folder.parent))
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                folder.rename(trash / "old")
            shutil.rmtree(trash)


def temporary_prefix() -> str:
    """Names who writes a temporary file, so that another run can tell a leftover from work in progress."""
    return f".{socket.gethostname()}+{os.getpid()}.{_started(os.getpid())}+"


def remove_leftovers(root: Location) -> int:
    """Remove temporary files of killed runs from a cache; returns how many there were.

    A leftover is a temporary file of a process of this host that is gone, or one of another host that is older than a
    day. In object storage it is a zip file older than a day that no record names.
    """
    removed = 0
    if isinstance(root, RemotePath):
        return _remove_uncommitted(Paths(root))
    for folder in (root, root / ".claims", root / "geometry", *(root / "features").glob("*")):
        if folder.is_symlink() and folder != root:  # somebody else's: nothing is removed there
            continue
        for path in folder.glob(".*+*+*.tmp"):
            # Not there: its own writer renamed it meanwhile.
            with storage_errors(path, "remove"), contextlib.suppress(FileNotFoundError):
                if in_use(path):
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed += 1
    return removed


def _remove_uncommitted(paths: Paths) -> int:
    removed = 0
    for folder in (paths.geometry, *paths.stores):
        packs: dict[str, list[Location]] = {}
        for path in entries(folder, ".zarr.zip"):
            packs.setdefault(path.name.rsplit(".", 3)[0], []).append(path)
        records = {path.stem for path in paths.records(folder)}
        cls: type[GeometryRecord | FeatureRecord] = GeometryRecord if folder == paths.geometry else FeatureRecord
        for stem, found in packs.items():
            if stem in records and len(found) == 1:
                continue  # its own, as it is nearly everywhere
            committed = None
            with contextlib.suppress(MissingDataError, CorruptCacheError):
                committed = paths.group(folder, read_document(folder / f"{stem}.json", cls))
            for path in found:
                if path != committed and isinstance(path, RemotePath) and _is_old(path, by=folder):
                    path.unlink(missing_ok=True)
                    removed += 1
    return removed


def _is_old(path: RemotePath, *, by: Location) -> bool:
    """Whether an object was there a day ago: a younger one may be about to be committed. The store's clock counts."""
    assert isinstance(by, RemotePath)
    probe = by / f"{temporary_prefix()}{uuid.uuid4().hex}.tmp"
    probe.write_bytes(b"\0")
    try:
        return probe.modified() - path.modified() > datetime.timedelta(days=1)
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def in_use(temporary: Path) -> bool:
    """Whether a temporary file may be work in progress: see `remove_leftovers`. FileNotFoundError where it is gone."""
    host, process, *_ = [*temporary.name[1:].split("+"), "", ""]
    pid, _, started = process.partition(".")
    if host == socket.gethostname() and pid.isdigit():  # no clock is asked: it may have been set meanwhile
        return is_alive(int(pid)) and started in ("", _started(int(pid)))
    return _now(temporary.parent) - temporary.stat().st_mtime < 86400


def _started(pid: int) -> str:
    """When a process of this host was started, in ticks since boot: numbers of processes are used again. Or nothing."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _now(folder: Path) -> float:
    """The time by the clock that dates the files of a folder, which of a shared file system is the server's."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def tree(folder: Location) -> dict[str, int]:
    """Every file below a folder, temporary ones too: its path from there, and its size in bytes. Follows no links."""
    if isinstance(folder, RemotePath):
        return folder.tree()
    found = {}
    for path in folder.rglob("*"):
        with storage_errors(path, "look at"), contextlib.suppress(FileNotFoundError):  # gone since it was listed
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                found[path.relative_to(folder).as_posix()] = status.st_size
    return found


def entries(folder: Location, suffix: str) -> list[Location]:
    """What lies right in a folder under a name of that suffix, by name; temporary files are not listed."""
    if isinstance(folder, RemotePath):
        return [folder / name for name in sorted(folder.children()) if name.endswith(suffix) and name[0] != "."]
    with storage_errors(folder, "list"):
        return [path for path in sorted(folder.glob(f"*{suffix}")) if not path.name.startswith(".")]


def exists(path: Location) -> bool:
    """Whether there is a file or folder. Raises `StorageError` where that cannot be told."""
    with storage_errors(path, "look at"):
        return path.exists()


@dataclass(frozen=True)
class Paths:
    """Where things lie below a cache's root."""

    root: Location

    @property
    def metadata(self) -> Location:
        """`cache.json`."""
        return self.root / "cache.json"

    @property
    def geometry(self) -> Location:
        """Folder of the geometry partitions."""
        return self.root / "geometry"

    @property
    def stores(self) -> list[Location]:
        """Folders of all VFMs."""
        return entries(self.root / "features", "")

    def features(self, key: str) -> Location:
        """Folder of one VFM's feature partitions."""
        return self.root / "features" / file_name(key)

    def arrays(self, folder: Location, partition: str, *, content: str = "") -> Location:
        """The zarr group of a partition in `folder`: a folder, or with the digest of its content one zip file.

        The zip file is named after its content, so that another one never replaces it under a reader.
        """
        return folder / f"{file_name(partition)}{f'.{content[:16]}.zarr.zip' if content else '.zarr'}"

    def group(self, folder: Location, record: GeometryRecord | FeatureRecord) -> Location:
        """The zarr group that a record names."""
        content = content_digest(record.arrays, record.files) if record.offsets else ""
        return self.arrays(folder, record.partition, content=content)

    def record(self, folder: Location, partition: str) -> Location:
        """The commit record of a partition in `folder`."""
        return folder / f"{file_name(partition)}.json"

    def records(self, folder: Location) -> list[Location]:
        """All commit records in `folder`, by name."""
        return [path for path in entries(folder, ".json") if path.stem not in RESERVED_NAMES]


def groups_of(record: Location) -> list[Location]:
    """Every zarr group that lies beside a record and bears the name of its partition, committed or not."""
    named = re.compile(re.escape(record.stem) + r"\.(zarr|[0-9a-f]{16}\.zarr\.zip)")
    return [path for path in entries(record.parent, "") if named.fullmatch(path.name)]


def content_digest(arrays: Mapping[str, ArrayInfo], files: Mapping[str, int]) -> str:
    """SHA-256 (hex) over what the arrays of a group hold, and how long its files are."""
    return canonical_digest([sorted((name, info.sha256) for name, info in arrays.items()), dict(files)])


def read_document(path: Location, cls: type[D]) -> D:
    """A JSON document of the cache. Raises `MissingDataError`, `CorruptCacheError` or `FormatVersionError`."""
    try:
        if not isinstance(path, RemotePath) and regular_size(path) > MAX_DOCUMENT_BYTES:
            raise CorruptCacheError(f"{str(path)!r}: larger than {MAX_DOCUMENT_BYTES} bytes, which no {cls.kind} is")
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingDataError(f"{str(path)!r} does not exist") from error
    except CacheError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    return cls.from_json(text, str(path))


def read_record(path: Location, cls: type[R]) -> R:
    """The commit record of a partition. Raises as `read_document`, and `MismatchError` for that of another one."""
    record = read_document(path, cls)
    check_name(path, record)
    return record


def check_name(path: Location, record: GeometryRecord | FeatureRecord) -> None:
    """Raise `MismatchError` where a record lies under the name of another partition."""
    if file_name(record.partition) != path.stem:
        raise MismatchError(
            f"{path}: this is the record of partition {record.partition!r}, it was renamed or copied; run `ditr-cache "
            "verify --repair`"
        )


def read_documents(paths: Sequence[Location], cls: type[D]) -> Iterator[tuple[Location, D | CorruptCacheError]]:
    """Many documents, and for those that are damaged the error; those that are not there any more are left out.

    Raises:
        FormatVersionError: one was written by a newer version.
        StorageError: one cannot be read.
    """
    for first in range(0, len(paths), _FETCHED_AT_ONCE):
        some = paths[first : first + _FETCHED_AT_ONCE]
        fetched = read_many([path for path in some if isinstance(path, RemotePath)])
        for path in some:
            try:
                if not isinstance(path, RemotePath):
                    yield path, read_document(path, cls)
                elif path in fetched:
                    yield path, cls.from_json(fetched[path], str(path))
            except CorruptCacheError as error:
                yield path, error
            except MissingDataError:
                continue


def check_files(group: Location, files: Mapping[str, int], offsets: Mapping[str, int]) -> None:
    """Raise `CorruptCacheError` where files that a record names are missing or of another size.

    Args:
        group: a folder of the files, or the zip file that holds them all.
        files: relative path -> size.
        offsets: where each lies in the zip file; empty for a folder.
    """
    if not offsets:
        for name, size in files.items():
            _check_file(group / name, size, exact=True)
    elif files:
        _check_file(group, max(offsets[name] + size for name, size in files.items()), exact=False)


def regular_size(path: Path) -> int:
    """Bytes of a file, through links.

    Raises:
        OSError: there is none, or it is a pipe, a device or a folder, of which a reader would never see the end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status.st_size


def _check_file(path: Location, size: int, *, exact: bool) -> None:
    try:
        got = path.size() if isinstance(path, RemotePath) else regular_size(path)
    except StorageError:
        raise
    except OSError as error:
        if not damages(error):
            raise StorageError(f"cannot look at {str(path)!r}: {error.strerror or error}") from error
        raise CorruptCacheError(f"{path}: committed but missing; run `ditr-cache verify --repair`") from error
    if got < size or (exact and got != size):
        raise CorruptCacheError(
            f"{path}: expected {size} bytes as committed, got {got}; run `ditr-cache verify --repair`"
        )
