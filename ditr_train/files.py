"""Files that are never seen half-written."""

from __future__ import annotations

import os
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
