"""People's own captures: folders below a root."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ditr_cache.errors import DataError

LEVELS = 3
"""How deep below the root captures are looked for."""


def find_captures(root: Path, is_capture: Callable[[Path], bool]) -> dict[str, Path]:
    """Id (the path below the root) -> folder, of captures at the root or below; none is looked for inside of one.

    Raises:
        DataError: a folder that cannot be listed.
    """
    return {
        root.resolve().name if folder == root else folder.relative_to(root).as_posix(): folder
        for folder in _captures(root, is_capture, LEVELS)
    }


def _captures(folder: Path, is_capture: Callable[[Path], bool], levels: int) -> Iterator[Path]:
    if is_capture(folder):
        yield folder
    elif levels:
        try:
            children = sorted(folder.iterdir())
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error}); make it readable, or move it elsewhere") from error
        for child in children:
            if child.is_dir() and not child.name.startswith("."):
                yield from _captures(child, is_capture, levels - 1)
