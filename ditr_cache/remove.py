"""Remove one VFM's features from a cache: what `ditr-cache rm` does. Geometry is never touched."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditr_cache.claims import Claims, features_claim, new_run
from ditr_cache.errors import CorruptCacheError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.files import (
    RESERVED_NAMES,
    Location,
    Paths,
    file_name,
    in_use,
    location,
    read_document,
    read_documents,
    remove_group,
    storage_errors,
    sync,
    tree,
)
from ditr_cache.remote import RemotePath, remove_many
from ditr_cache.schema import CacheMetadata, VFMSpec


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A feature store that is to be removed, or was.

    Args:
        cache: path or URL.
        key: of the VFM; the name of the folder, where its description is damaged or was removed already.
        partitions: committed in it.
        files, bytes: that lie in its folder.
    """

    cache: str
    key: str
    partitions: int
    files: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The object that `rm --json` prints."""
        return asdict(self)


def plan_removal(url: str | os.PathLike[str], vfm: str) -> Removal:
    """What `remove_features` would remove.

    Args:
        url: the cache.
        vfm: key, or a name that only one VFM of the cache has.

    Raises:
        MissingDataError: no cache there.
        UnknownNameError: no such VFM.
        UsageError: several VFMs of that name, or another run is writing features of it.
    """
    paths = Paths(location(url))
    try:
        read_document(paths.metadata, CacheMetadata)
    except MissingDataError as error:
        raise MissingDataError(f"{str(paths.root)!r} is not a cache: it has no cache.json") from error
    key, folder = _resolve(paths, vfm)
    _refuse_while_written(paths, folder, key)
    files = tree(folder)
    return Removal(
        cache=str(paths.root),
        key=key,
        partitions=len(paths.records(folder)),
        files=len(files),
        bytes=sum(files.values()),
    )


def remove_features(url: str | os.PathLike[str], vfm: str) -> Removal:
    """Remove the features of one VFM; returns what there was.

    Records go first, so that no reader takes the rest for a partition, then arrays, then the descriptions, so that the
    same call goes on where an earlier one was stopped.

    Raises:
        MissingDataError, UnknownNameError, UsageError: as `plan_removal`.
        StorageError: something cannot be removed.
    """
    removal = plan_removal(url, vfm)
    paths = Paths(location(url))
    _, folder = _resolve(paths, vfm)
    if isinstance(folder, RemotePath):
        _remove_remote(paths, folder)
    else:
        _remove_local(paths, folder)
    return removal


def _remove_remote(paths: Paths, folder: RemotePath) -> None:
    documents = [folder / f"{name}.json" for name in RESERVED_NAMES]
    records = {path for path in paths.records(folder) if isinstance(path, RemotePath)}
    remove_many(sorted(records))
    there = [folder / name for name in folder.tree()]
    remove_many([path for path in there if path not in documents])
    for document in documents:
        _unlink(document)


def _remove_local(paths: Paths, folder: Path) -> None:
    documents = [folder / f"{name}.json" for name in RESERVED_NAMES]
    with storage_errors(folder, "remove"):
        for record in paths.records(folder):
            _unlink(record)
        sync(folder)
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                remove_group(path)
            elif path not in documents:
                _unlink(path)
        sync(folder)
        for document in documents:
            _unlink(document)
        # Where it is not empty, another run has begun to write there again.
        with contextlib.suppress(OSError):
            folder.rmdir()
        sync(folder.parent)


def _unlink(path: Location) -> None:
    path.unlink(missing_ok=True)


def _resolve(paths: Paths, vfm: str) -> tuple[str, Location]:
    """Key and folder of a VFM, also of one whose description cannot be read any more."""
    folders = {store.name: store for store in paths.stores}
    keys = {name: name for name in folders}  # folder -> key, as far as it is known
    names: dict[str, list[str]] = {}  # name of a VFM -> folders
    for path, spec in read_documents([store / "vfm.json" for store in folders.values()], VFMSpec):
        if not isinstance(spec, CorruptCacheError) and file_name(spec.key) == path.parent.name:
            keys[path.parent.name] = spec.key
            names.setdefault(spec.name, []).append(path.parent.name)
    described = {folder for folders_of_name in names.values() for folder in folders_of_name}
    for name in keys.keys() - described:
        folder = folders[name]
        if isinstance(folder, RemotePath) and not folder.children():  # some storages list what is gone
            del keys[name]
    found = [folder for folder, key in keys.items() if vfm in (key, folder)] or names.get(vfm, [])
    if len(found) > 1:
        raise UsageError(
            f"cache {str(paths.root)!r} has several VFMs named {vfm!r}, name one by its key: "
            + ", ".join(sorted(keys[folder] for folder in found))
        )
    if not found:
        raise UnknownNameError.of(f"VFM of cache {str(paths.root)!r}", vfm, {*keys.values(), *names})
    return keys[found[0]], folders[found[0]]


def _refuse_while_written(paths: Paths, folder: Location, key: str) -> None:
    """UsageError where claims or temporary files tell of a run that makes features there."""
    if isinstance(folder, Path):
        for path in folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if in_use(path):
                    host, process, *_ = [*path.name[1:].split("+"), "?"]
                    pid = process.partition(".")[0]
                    raise UsageError(
                        f"features of {key!r} are being written by process {pid} on {host}; stop it first, and remove "
                        "them then"
                    )
    claimed = Claims(paths, new_run()).owners(features_claim(key, ""))
    if claimed:
        raise UsageError(
            f"features of {key!r} are being made by another run; stop it first, and remove them then. Where no such "
            f"run is left (a host died), remove {str(paths.root / '.claims' / claimed[0])!r}"
        )
