"""A group of arrays: written atomically, and opened for reading once its record is there.

On a file system a group is a folder, in object storage one zip file.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.arrays import ArrayGroup, array_infos, array_sums, fill_group
from ditr_cache.files import (
    Location,
    Paths,
    content_digest,
    remove_group,
    storage_errors,
    sync,
    temporary_prefix,
    umask,
)
from ditr_cache.group_files import group_files
from ditr_cache.pack import write_pack
from ditr_cache.remote import RemotePath
from ditr_cache.schema import FeatureRecord, GeometryRecord


def open_group(
    paths: Paths, folder: Location, record: GeometryRecord | FeatureRecord, *, whole: bool = False
) -> ArrayGroup:
    """Reader of a committed group of arrays; `whole`: all of it will be read, as it lies there now, from no memory."""
    where = paths.group(folder, record)
    if isinstance(where, Path) and not record.offsets:
        return ArrayGroup(str(where), record.arrays, sums=record.checksums)
    # Of a scene most is wanted at once; of a partition of many scans, one scan.
    samples = record.samples if isinstance(record, GeometryRecord) else record.valid_points
    files = group_files(where, record, whole=whole or len(samples) == 1, fresh=whole)
    return ArrayGroup(str(where), record.arrays, files, record.checksums)


def write_group(
    paths: Paths, folder: Location, partition: str, arrays: Mapping[str, NDArray[np.generic]]
) -> dict[str, dict[str, Any]]:
    """Write a group of arrays, atomically and durably; returns what its record says of its content and files."""
    infos, sums = array_infos(arrays), array_sums(arrays)
    if isinstance(folder, RemotePath):
        with tempfile.TemporaryDirectory(prefix="ditr-upload-") as temporary:
            scratch = Path(temporary) / "group"
            with storage_errors(scratch, "write"):
                fill_group(scratch, arrays, to_pack=True)
                files = {p.relative_to(scratch).as_posix(): p.stat().st_size for p in _files(scratch)}
                offsets = write_pack(scratch, files, {k: len(a) for k, a in arrays.items()}, Path(temporary) / "pack")
            target = paths.arrays(folder, partition, content=content_digest(infos, files))
            assert isinstance(target, RemotePath)
            target.upload(Path(temporary) / "pack")
        return {"arrays": infos, "files": files, "offsets": offsets, "checksums": sums}
    files = write_arrays(paths.arrays(folder, partition), arrays)
    return {"arrays": infos, "files": files, "offsets": {}, "checksums": sums}


def write_arrays(folder: Location, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, int]:
    """Write a group of arrays as `folder` on a file system, atomically and durably; returns its files and sizes."""
    assert isinstance(folder, Path)
    with storage_errors(folder, "write"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(), suffix=".tmp", dir=folder.parent))
        try:
            fill_group(temporary, arrays)
            paths = _files(temporary)
            files = {p.relative_to(temporary).as_posix(): p.stat().st_size for p in paths}
            for path in [*paths, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
                sync(path)
            temporary.chmod(0o777 & ~umask())
            _replace_folder(folder, temporary)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return files


def _replace_folder(folder: Path, by: Path) -> None:
    while True:
        remove_group(folder)
        try:
            by.rename(folder)
        except OSError as error:  # another process put its own there in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())
