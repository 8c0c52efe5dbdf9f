"""Headers of PLY files: the encoding, and the elements with their properties, in any order.

Format: Greg Turk, "The PLY Polygon File Format" (1994).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ditr_cache.errors import DataError

TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
"""Name of a type -> numpy's, without the byte order."""

BYTE_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
"""Encoding -> numpy's sign of its byte order."""

_MAX_LINE = 4096


@dataclass(frozen=True)
class PlyProperty:
    """A property of an element; `count_dtype` is the type of a list's length, None of a scalar."""

    name: str
    dtype: str
    count_dtype: str | None = None


@dataclass(frozen=True)
class PlyElement:
    """An element: so many rows of properties."""

    name: str
    count: int
    properties: list[PlyProperty] = field(default_factory=list)

    def dtype(self, order: str) -> np.dtype[Any]:
        """Of one row of scalars."""
        return np.dtype([(p.name, order + p.dtype) for p in self.properties])


def read_header(file: BinaryIO, path: Path) -> tuple[str, list[PlyElement]]:
    """Encoding and elements; the file is left at the first byte of its body.

    Raises:
        DataError: not a PLY file, truncated, or a line that is not understood.
    """
    if file.readline(16).strip() != b"ply":
        raise DataError(f"{path}: not a PLY file, expected the first line 'ply'")
    encoding = ""
    elements: list[PlyElement] = []
    while True:
        raw = file.readline(_MAX_LINE)
        if not raw.endswith(b"\n"):
            raise DataError(f"{path}: the PLY header ends without 'end_header'; the file is truncated, get it again")
        words = raw.decode("latin-1").split()
        match words:
            case [] | ["comment" | "obj_info", *_]:
                continue
            case ["end_header"]:
                break
            case ["format", "ascii" | "binary_little_endian" | "binary_big_endian" as encoding, "1.0"]:
                continue
            case ["element", name, count] if count.isdecimal():
                elements.append(PlyElement(name, int(count)))
            case ["property", "list", count_type, type_, name] if (
                elements and type_ in TYPES and TYPES.get(count_type, "f")[0] != "f"
            ):
                elements[-1].properties.append(PlyProperty(name, TYPES[type_], TYPES[count_type]))
            case ["property", type_, name] if elements and type_ in TYPES:
                elements[-1].properties.append(PlyProperty(name, TYPES[type_]))
            case _:
                raise DataError(f"{path}: PLY header line not understood: {' '.join(words)!r}")
    if not encoding:
        raise DataError(f"{path}: the PLY header has no line 'format'")
    for element in elements:
        names = [p.name for p in element.properties]
        if len(set(names)) != len(names):
            raise DataError(f"{path}: element {element.name!r} has a property twice: {names}")
    return encoding, elements
