"""Lists and tables that come with the package, in the folder of their dataset."""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Mapping


def shipped_text(dataset: str, name: str) -> str:
    """Text of a file in the folder of a dataset."""
    return (importlib.resources.files("ditr_cache.datasets") / dataset / name).read_text(encoding="utf-8")


def shipped_lines(dataset: str, name: str) -> list[str]:
    """Lines of a list, without comments and empty ones."""
    lines = (line.strip() for line in shipped_text(dataset, name).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def shipped_rows(dataset: str, name: str) -> list[dict[str, str]]:
    """Rows of a table, by the names of its columns, which are separated by tabs."""
    return list(csv.DictReader(shipped_text(dataset, name).splitlines(), delimiter="\t"))


def row_color(row: Mapping[str, str]) -> tuple[int, int, int]:
    """The colour in the columns r, g and b."""
    return int(row["r"]), int(row["g"]), int(row["b"])
