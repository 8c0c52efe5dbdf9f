"""Codecs of feature rows: pure functions from rows to what is stored and back.

Bounds (held by property tests), for a row x and its decoded row y:

- `float16`: |y - x| <= 2^-11 |x| + 2^-25 per channel; values beyond +-65504 are refused.
- `int8`: |y - x| <= s / 2 (+ float32 rounding) per channel with the row's scale s = max|x| / 127; a row whose
  max|x| is below 4e-37 becomes zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError, UnknownNameError

CODECS = ("float16", "int8")
"""Names of all codecs."""

FLOAT16_MAX = 65504.0

_SCALE_MAX = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
"""Largest scale of an int8 row: 127 times it is still a float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRows:
    """Rows as stored.

    Args:
        table: [T, C] float16 or int8.
        scale: [T] float32, the factor of each int8 row; None for float16.
    """

    table: NDArray[np.generic]
    scale: NDArray[np.float32] | None


def encode(rows: NDArray[np.floating], codec: str) -> EncodedRows:
    """Rows [T, C] of any float dtype in the form that `codec` stores.

    Raises:
        UnknownNameError: no such codec.
        DataError: values that are not finite, or beyond what the codec can hold.
    """
    if codec not in CODECS:
        raise UnknownNameError.of("codec", codec, CODECS)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        peak = np.abs(rows).max(axis=1, initial=0.0).astype(np.float32) if len(rows) else np.zeros(0, np.float32)
    if not np.isfinite(peak).all():
        raise DataError(f"features: {int((~np.isfinite(peak)).sum())} of {len(rows)} rows hold NaN or infinity")
    if codec == "float16":
        if len(peak) and peak.max() > FLOAT16_MAX:
            raise DataError(
                f"features: a value of {float(peak.max()):.0f} does not fit into float16 (at most {FLOAT16_MAX:.0f}); "
                "use the codec int8"
            )
        return EncodedRows(table=rows.astype(np.float16), scale=None)
    scale = np.minimum(peak / np.float32(127), _SCALE_MAX)
    with np.errstate(over="ignore"):
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    # A subnormal scale has an infinite inverse: such a row is zero for every purpose.
    scale, inverse = np.where(np.isfinite(inverse), (scale, inverse), np.float32(0))
    codes = np.rint(rows.astype(np.float32) * inverse[:, None])
    return EncodedRows(table=np.clip(codes, -127, 127).astype(np.int8), scale=scale)


def concatenate_rows(parts: Sequence[EncodedRows]) -> EncodedRows:
    """Rows of several parts of one codec, at least one, one after the other."""
    if len(parts) == 1:
        return parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    return EncodedRows(
        table=np.concatenate([part.table for part in parts]), scale=np.concatenate(scales) if scales else None
    )


def decode(table: NDArray[np.generic], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Rows [T, C] float32 of what `encode` stored."""
    rows = table.astype(np.float32)
    if scale is not None:
        rows *= scale[:, None]
    return rows
