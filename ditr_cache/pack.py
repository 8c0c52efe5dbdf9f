"""A partition as one object: a zip file that stores its arrays' files as they are, and where in it each of them lies.

On a file system a partition is a folder. In object storage every file costs a request, so there it is one zip file (any
zarr reads it): fetched with one request as a whole, or by ranges, because the commit record says where its files lie.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

METADATA_NAME = "zarr.json"


def write_pack(folder: Path, files: Mapping[str, int], lengths: Mapping[str, int], target: Path) -> dict[str, int]:
    """Store the files of a folder in a zip file, uncompressed; returns relative path -> offset of each one's content.

    The small metadata files stand together at the end, so that one request fetches them all. Of arrays of the same
    length, the files of the same rows stand together: those of a sample.

    Args:
        folder: of a group of arrays.
        files: relative path -> size in bytes.
        lengths: name -> length of each array.
        target: the zip file.
    """

    def place(name: str) -> tuple[bool, int, int, str]:
        parts = name.split("/")  # `array/c/3/0`, `array/zarr.json` or `zarr.json`
        number = int(parts[2]) if len(parts) > 2 else 0
        return parts[-1] == METADATA_NAME, lengths.get(parts[0], 0), number, name

    order = sorted(files, key=place)
    offsets = {}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as pack:
        for name in order:
            # A fixed date: the same arrays give the same bytes.
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.file_size = files[name]
            with (folder / name).open("rb") as source, pack.open(entry, "w") as stored:
                shutil.copyfileobj(source, stored, 1 << 20)
            offsets[name] = pack.start_dir - files[name]  # the last entry ends where the directory would start
    return offsets
