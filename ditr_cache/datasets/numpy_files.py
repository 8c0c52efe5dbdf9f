"""Arrays in NumPy's `.npy` files, without anything that could run what a file says."""

from __future__ import annotations

import tokenize
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError


def map_array(path: Path, remedy: str) -> NDArray[Any]:
    """The array of a file, mapped into memory: its header is checked against the file's size, and objects are refused.

    Args:
        path: of the file.
        remedy: what to do where it cannot be used; ends the message of the error.

    Raises:
        DataError: no such file, damaged, or of Python's objects.
    """
    try:
        with np.errstate(over="raise"):  # of a shape whose size no integer holds
            return np.lib.format.open_memmap(path, mode="r")
    # A header is a literal of Python's, and its parser reports through all of these what is none.
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, ArithmeticError, tokenize.TokenError) as error:
        raise DataError(f"{path}: not a readable array of NumPy ({error}); {remedy}") from error
