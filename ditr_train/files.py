"""Files that are never seen half-written, and files that are not what they seem."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path`, of this process, to write to before `path` is replaced."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def replace_text(path: Path, text: str) -> None:
    """Make `text` the content of `path` in one step. Raises `OSError`."""
    temporary = temporary_name(path)
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_compressed(path: Path) -> None:
    """Raise `ValueError` for an archive of compressed entries: torch writes none, but reads them, at any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its entries are compressed, which torch never does")
