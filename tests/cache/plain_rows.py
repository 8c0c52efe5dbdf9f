"""Rows of the codecs that fit nothing, encoded and decoded in one call."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.codecs import EncodedRows, make_codec


def encode(rows: NDArray[np.floating], codec: str) -> EncodedRows:
    return make_codec(codec, rows.shape[1]).encode(rows)


def decode(table: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Of `float16` or `int8`."""
    return table.astype(np.float32) * (np.float32(1) if scale is None else scale[:, None])
