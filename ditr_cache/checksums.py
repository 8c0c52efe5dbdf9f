"""Checksums of an array's blocks of rows, as they were before they were encoded. A reader compares what it read.

The checksums of the codecs find a damaged chunk, but not one that is whole and of another array, another partition or
another run, nor one that went away since its group was opened, which zarr takes for zeros. The SHA-256 of a whole array
would find all of these, but only for who reads all of it.
"""

from __future__ import annotations

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import CorruptCacheError

_DIGITS = 8


def block_sums(array: NDArray[np.generic], rows: int) -> str:
    """CRC-32C of every `rows` rows of an array, in C order: 8 hexadecimal digits each, one after the other."""
    return "".join(_sum(array[start : start + rows]) for start in range(0, len(array), rows))


def is_sum(found: int, number: int, sums: str) -> bool:
    """Whether that is the CRC-32C of the block of that number, of `sums` as `block_sums` gives them."""
    return sums[number * _DIGITS : (number + 1) * _DIGITS] == f"{found:08x}"


def check_blocks(part: NDArray[np.generic], first: int, rows: int, sums: str, where: str) -> None:
    """Compare whole blocks that were read with what their record says.

    Args:
        part: the rows of some blocks.
        first: number of the first of these blocks.
        rows: of a block.
        sums: of all blocks, as `block_sums` gives them.
        where: names the array in errors.

    Raises:
        CorruptCacheError: they are not what was committed.
    """
    got = block_sums(part, rows)
    expected = sums[first * _DIGITS : first * _DIGITS + len(got)]
    if got != expected:
        at = next(i for i in range(0, len(got), _DIGITS) if got[i : i + _DIGITS] != expected[i : i + _DIGITS])
        want, have = (text[at : at + _DIGITS] or "none" for text in (expected, got))
        row = (first + at // _DIGITS) * rows
        raise CorruptCacheError(
            f"{where}: rows {row} to {row + rows - 1} are whole, but not what was committed: expected CRC-32C {want}, "
            f"got {have}; was a file exchanged, or the partition extracted again meanwhile? open the cache again, and "
            "where that does not help run `ditr-cache verify --repair`"
        )


def _sum(block: NDArray[np.generic]) -> str:
    if not block.size:
        return "00000000"
    view = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    view.flags.writeable = False  # the library takes nothing that could change under it
    return f"{google_crc32c.value(view):08x}"
