"""Classes of a user's own labels: `classes.txt` or `classes.json`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo, distinct_color
from ditr_cache.datasets.documents import read_text
from ditr_cache.errors import DataError
from ditr_cache.schema import IGNORE_INDEX

FILES = ("classes.txt", "classes.json")

_REMEDY = "one class a line, 'name' or 'name red green blue', or a JSON list of {id, name, color}"
_LINE = re.compile(r"(?P<name>.*?\S)(?:[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3}))?")
_MAX_CLASSES = 10_000


@dataclass(frozen=True)
class ClassTable:
    """Classes in the order of their index, and the label that stands for each in files.

    Args:
        infos: the classes.
        labels: of the files, as many.
    """

    infos: tuple[ClassInfo, ...] = ()
    labels: tuple[int, ...] = ()

    def index(self, labels: NDArray[Any], where: str) -> NDArray[np.int16]:
        """[N] int16 class indices of labels [N] of any type; `IGNORE_INDEX` where no class has the label, and for NaN.

        Raises:
            DataError: labels that are not whole numbers.
        """
        whole = whole_labels(labels, where)
        order = np.argsort(self.labels)
        known = np.array(self.labels, dtype=np.int64)[order]
        position = np.searchsorted(known, whole).clip(max=len(known) - 1)
        return np.where(known[position] == whole, order[position], IGNORE_INDEX).astype(np.int16)


def whole_labels(values: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Labels [N] as int64, -1 for NaN: CloudCompare keeps labels as floats.

    Raises:
        DataError: others than whole numbers.
    """
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    numbers = np.where(np.isnan(values), -1, values)
    wrong = ~((np.abs(numbers) < 2**53) & (numbers == np.floor(numbers)))
    if wrong.any():
        raise DataError(f"{where}: expected whole numbers as labels, got {numbers[wrong][0]} at point {wrong.argmax()}")
    return numbers.astype(np.int64)


def find_classes(folders: Sequence[Path]) -> ClassTable:
    """Classes of the first of the folders that has a file of them; no classes where none has.

    Raises:
        DataError: a file that is not understood, or two that differ.
    """
    files = [folder / name for folder in folders for name in FILES if (folder / name).is_file()]
    if not files:
        return ClassTable()
    table = read_classes(files[0])
    for path in files[1:]:
        if read_classes(path) != table:
            raise DataError(
                f"{path}: other classes than {files[0]}; a dataset has one list of classes: put one file at its root"
            )
    return table


def read_classes(path: Path) -> ClassTable:
    """Classes of one file.

    Raises:
        DataError: not understood, a name or label that stands there twice, or no class at all.
    """
    text = read_text(path, _REMEDY)
    rows = list(_json_rows(text, path) if path.suffix == ".json" else _text_rows(text, path))
    labels, names = [row[0] for row in rows], [row[1] for row in rows]
    for what, values in (("label", labels), ("name", names)):
        for value, count in Counter(values).items():
            if count > 1:
                raise DataError(f"{path}: the {what} {value!r} stands there {count} times; {_REMEDY}")
    if not 0 < len(rows) <= _MAX_CLASSES:
        raise DataError(f"{path}: {len(rows)} classes, expected 1 to {_MAX_CLASSES}; {_REMEDY}")
    infos = tuple(ClassInfo(name, color or distinct_color(i)) for i, (_, name, color) in enumerate(rows))
    return ClassTable(infos, tuple(labels))


_Row = tuple[int, str, tuple[int, int, int] | None]


def _text_rows(text: str, path: Path) -> Iterator[_Row]:
    lines = text.rstrip().splitlines()
    for number, line in enumerate(lines[: _MAX_CLASSES + 1]):
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise DataError(f"{path} line {number + 1}: empty, but its place is the label {number}; {_REMEDY}")
        color = [int(word) for word in match.groups()[1:] if word is not None]
        yield number, match["name"], _checked_color(color, f"{path} line {number + 1}") if color else None


def _json_rows(text: str, path: Path) -> Iterator[_Row]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); {_REMEDY}") from error
    if isinstance(entries, dict):  # {"0": "wall", ...}
        entries = [{"id": key, "name": name} for key, name in entries.items()]
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of classes, got {type(entries).__name__}; {_REMEDY}")
    for number, entry in enumerate(entries[: _MAX_CLASSES + 1]):
        where = f"{path} class {number}"
        entry = {"name": entry} if isinstance(entry, str) else entry
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: expected a name, got {str(entry)[:100]}; {_REMEDY}")
        label = entry.get("id", number)
        if isinstance(label, bool) or not re.fullmatch(r"-?\d{1,15}", str(label)):
            raise DataError(f"{where}: expected a whole number as id, got {str(label)[:100]!r}; {_REMEDY}")
        color = entry.get("color")
        yield int(label), name.strip(), None if color is None else _checked_color(color, where)


def _checked_color(color: Any, where: str) -> tuple[int, int, int]:
    if (
        not isinstance(color, list)
        or len(color) != 3
        or not all(type(c) is int and 0 <= c <= 255 for c in color)  # a bool is an int, too
    ):
        raise DataError(f"{where}: expected three numbers 0..255 as colour, got {str(color)[:100]}; {_REMEDY}")
    return color[0], color[1], color[2]
