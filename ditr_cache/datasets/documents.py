"""Text and JSON files of a release, read whole: bounded in size, and every error names the file and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError, MissingDataError

MAX_BYTES = 2**29
"""Largest file that is read whole: those of the releases have tens of megabytes."""


def read_text(path: Path, remedy: str) -> str:
    """Text of a file; a byte order mark is dropped, bytes that are not UTF-8 are replaced.

    Args:
        path: of the file.
        remedy: what to do where it cannot be used, say which download it comes from; ends the message of every error.

    Raises:
        MissingDataError: no such file.
        DataError: it cannot be read, or is larger than `MAX_BYTES`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise MissingDataError(f"{path}: no such file; {remedy}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES} bytes, which no such file of the release is; {remedy}")
    return content.decode("utf-8-sig", errors="replace")


def read_lines(path: Path, remedy: str) -> list[str]:
    """Lines of a list, stripped, without the empty ones. Raises as `read_text`."""
    return [line.strip() for line in read_text(path, remedy).splitlines() if line.strip()]


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises as `read_text`, and `DataError` where the file holds anything else."""
    text = read_text(path, remedy)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); the file is truncated or damaged; {remedy}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(document).__name__}; {remedy}")
    return document


def whole_numbers(value: Any) -> NDArray[np.int64] | None:
    """A list of whole numbers of a JSON document as an array [N]; None for anything else."""
    if not isinstance(value, list):
        return None
    try:
        array = np.array(value or np.zeros(0, dtype=np.int64))
    except (ValueError, OverflowError):  # lists of different lengths
        return None
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind == "i" else None
