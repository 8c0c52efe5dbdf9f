"""Which reader a file belongs to."""

from __future__ import annotations

from pathlib import Path

from ditr_cache.errors import CacheError, DataError, MissingDataError, UsageError
from ditr_cache.pointcloud.cloud import PointCloud
from ditr_cache.pointcloud.kitti import KittiCloud
from ditr_cache.pointcloud.las import LasCloud
from ditr_cache.pointcloud.pcd import PcdCloud
from ditr_cache.pointcloud.ply import PlyCloud

READERS: dict[str, type[PlyCloud | LasCloud | PcdCloud | KittiCloud]] = {
    ".ply": PlyCloud,
    ".las": LasCloud,
    ".laz": LasCloud,
    ".pcd": PcdCloud,
    ".bin": KittiCloud,
}
"""Extension -> reader."""


def open_cloud(path: Path, *, labels: bool = False) -> PointCloud:
    """The point file at `path`, by its extension. Reads the header only.

    Args:
        path: of the file.
        labels: whether to read labels, too, where the file has some (see `LABEL_NAMES`).

    Raises:
        UsageError: an extension that no reader takes, or a library that is not installed.
        MissingDataError: no such file.
        DataError: a file that cannot be used.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{path}: expected a file that ends in {', '.join(READERS)}, got {path.suffix or 'no extension'!r}"
        )
    if not path.exists():
        raise MissingDataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: is a folder; name the files in it")
    try:
        return reader(path, labels=labels)
    except CacheError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
