"""Where a dataset lies that is not in the folder that was passed as its root."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def root_below(root: Path, is_root: Callable[[Path], bool]) -> Path | None:
    """The first folder in `root`, by name, that is a root; None where there is none."""
    try:
        folders = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError:
        return None
    return next((path for path in folders if _holds(path, is_root)), None)


def other_root(root: Path, is_root: Callable[[Path], bool], expected: str) -> str:
    """Remedy for a folder that is no root: the one nearby that is, or else what is `expected`.

    Folders inside a dataset are recognised up to two levels below its root.
    """
    here = root.resolve()
    if _holds(here.parent, is_root):
        return f"pass its parent {str(here.parent)!r} with --root"
    below = root_below(root, is_root) or next((p for p in here.parents[1:2] if _holds(p, is_root)), None)
    return f"pass {str(below)!r} with --root" if below is not None else f"expected {expected}"


def _holds(folder: Path, is_root: Callable[[Path], bool]) -> bool:
    try:
        return folder.is_dir() and is_root(folder)
    except OSError:
        return False
