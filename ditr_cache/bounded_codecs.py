"""What may stand in the metadata of an array, and decoding that refuses a chunk of another size than it should have.

A cache may come from a stranger. zarr takes the codecs that an array names, and these take the size that a compressed
chunk announces: some kilobytes can stand for any number of gigabytes. Here nothing but the codecs that this package
writes is taken, chunks have a largest size, and they are decoded into a place of just that size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray

from ditr_cache.errors import CorruptCacheError
from ditr_cache.schema import ArrayInfo

MAX_CHUNK_BYTES = 1 << 26
"""Largest chunk in memory, 64 MiB; those that are written have half of one, or are a single row."""

MAX_SHARD_BYTES = 1 << 30
"""Largest shard in memory, 1 GiB; those that are written have a quarter of one."""

BLOSC_HEADER = 16
"""Bytes before the content of a Blosc chunk."""

_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_BYTES = ({"name": "bytes"}, {"name": "bytes", "configuration": {"endian": None}}, _LITTLE)
_CRC = {"name": "crc32c"}
_KEYS = {
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
    "attributes", "dimension_names", "storage_transformers", "consolidated_metadata",
}  # fmt: skip


def check_metadata(document: Mapping[str, Any], info: ArrayInfo, where: str) -> None:
    """Raise `CorruptCacheError` where an array's `zarr.json` is not such as this package writes.

    Args:
        document: what is in the file.
        info: what the commit record says of the array.
        where: names the array in errors.
    """
    kind = {"f": "float", "i": "int", "u": "uint"}[info.dtype[1]] + str(8 * int(info.dtype[2:]))
    expected = {
        "zarr_format": 3, "node_type": "array", "shape": list(info.shape), "data_type": kind, "attributes": {},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, "storage_transformers": [],
    }  # fmt: skip
    found = {"attributes": {}, "storage_transformers": [], **document}
    for key, value in expected.items():
        if found.get(key) != value or isinstance(found[key], bool):
            raise _altered(where, key, value, found.get(key))
    if isinstance(document.get("fill_value"), bool) or document.get("fill_value") != 0 or set(document) - _KEYS:
        raise _altered(where, "fill_value", 0, document.get("fill_value"))
    grid = document.get("chunk_grid")
    shape = grid.get("configuration", {}).get("chunk_shape") if isinstance(grid, Mapping) else None
    _check_codecs(document.get("codecs"), shape, info, MAX_CHUNK_BYTES, where)


def _check_codecs(codecs: Any, shape: Any, info: ArrayInfo, most: int, where: str, *, inner: bool = False) -> None:
    names = [c.get("name") if isinstance(c, Mapping) else None for c in codecs] if isinstance(codecs, list) else []
    if names == ["sharding_indexed"] and not inner:
        _check_shape(shape, info, MAX_SHARD_BYTES, where)
        settings = codecs[0].get("configuration")
        if not isinstance(settings, Mapping) or settings.get("index_codecs") != [_LITTLE, _CRC]:
            raise _altered(where, "codecs", "an index with a checksum", settings)
        _check_codecs(settings.get("codecs"), settings.get("chunk_shape"), info, most, where, inner=True)
        if shape[0] % settings["chunk_shape"][0] or settings.get("index_location", "end") != "end":
            raise _altered(where, "codecs", "whole chunks with an index behind them", settings)
        return
    _check_shape(shape, info, most, where)
    checked = names == ["bytes", "blosc", "crc32c"] or (
        names == ["bytes", "zstd"] and (codecs[1].get("configuration") or {}).get("checksum") is True
    )
    if not checked or codecs[0] not in _BYTES:
        raise _altered(where, "codecs", "bytes and zstd with its checksum, or bytes, blosc and crc32c", names)


def _check_shape(shape: Any, info: ArrayInfo, most: int, where: str) -> None:
    row = prod(info.shape[1:]) * int(info.dtype[2:])
    good = isinstance(shape, list) and len(shape) == len(info.shape) > 0 and all(type(side) is int for side in shape)
    if not good or shape[1:] != list(info.shape[1:]) or not 0 < shape[0] * row <= max(most, row, 1):
        raise _altered(where, "chunk_grid", f"chunks of whole rows, of at most {most} bytes", shape)


def _altered(where: str, key: str, expected: object, got: object) -> CorruptCacheError:
    return CorruptCacheError(
        f"{where}: its zarr.json was altered: {key}: expected {str(expected)[:200]}, got {str(got)[:200]}; run "
        "`ditr-cache verify --repair`, and do not use a cache from a source that you do not know"
    )


# --- chunks ---------------------------------------------------------------------------------------------------------

_zstd, _blosc = Zstd(), Blosc()  # decoding takes all settings from the chunk


def decode_chunk(codec: str, content: bytes, out: NDArray[np.uint8]) -> None:
    """Decode a chunk, once its checksum and size are right.

    Args:
        codec: `zstd`, with its own checksum, or `blosc`, with a CRC-32C behind it.
        content: the chunk as stored.
        out: [bytes of the decoded chunk] where it goes.

    Raises:
        ValueError, RuntimeError: it is damaged, or of another size.
    """
    if codec == "zstd":
        _check_announced(zstd_content_size(content), out)
        _zstd.decode(content, out)
        return
    stored = np.frombuffer(content, np.uint8)
    if google_crc32c.value(stored[:-4]) != int.from_bytes(content[-4:], "little"):
        raise ValueError("the checksum of a chunk differs")
    _check_header(stored, out)
    _blosc.decode(stored[:-4], out)


def may_be_plain(codec: str, size: int, out: NDArray[np.uint8]) -> bool:
    """Whether a chunk of so many bytes as stored may hold its content as it is: a header, the content, a checksum."""
    return codec == "blosc" and size == BLOSC_HEADER + out.nbytes + 4


def plain_sum(head: NDArray[np.uint8], out: NDArray[np.uint8], tail: NDArray[np.uint8]) -> int | None:
    """CRC-32C of the content of a chunk that was read in its three parts, None where `out` is not the content as it is.

    Args:
        head: [16] its header.
        out: its content.
        tail: [4] its checksum.

    Raises:
        ValueError: it is damaged, or of another size.
    """
    found = google_crc32c.value(out)
    # The checksum is of header and content. For one header and size it differs from the content's by the same bits.
    if found ^ _header_bits(head.tobytes(), out.nbytes) != int.from_bytes(tail.tobytes(), "little"):
        raise ValueError("the checksum of a chunk differs")
    _check_header(head, out)
    return found if head[2] & 2 else None


@lru_cache(maxsize=64)
def _header_bits(head: bytes, size: int) -> int:
    zeros = np.zeros(size, np.uint8)
    return google_crc32c.extend(google_crc32c.value(head), zeros) ^ google_crc32c.value(zeros)


def _check_header(stored: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    # Behind version, format, flags and item size: the size of what is in it, of a block, and of itself.
    size, _, own_size = stored[4:BLOSC_HEADER].view("<u4").tolist()
    _check_announced(size, out)
    expected = out.nbytes + BLOSC_HEADER if len(stored) == BLOSC_HEADER else len(stored) - 4
    if own_size != expected:
        raise ValueError(f"a chunk of {expected} bytes says it has {own_size}")


def _check_announced(size: int | None, out: NDArray[np.uint8]) -> None:
    if size != out.nbytes:
        raise ValueError(f"a chunk of {out.nbytes} bytes announces {size}")


def zstd_content_size(frame: bytes) -> int | None:
    """Bytes that a Zstandard frame says it holds, None where it does not say, or is not the only one.

    Format: RFC 8878, section 3.1.1.
    """
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = frame[4]
    single_segment = bool(descriptor & 0x20)
    width = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if not width or len(frame) < start + width:
        return None
    size = int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
    return size if _is_single(frame, start + width, bool(descriptor & 4)) else None


def _is_single(frame: bytes, at: int, checksum: bool) -> bool:
    """Whether the frame, whose blocks begin at `at`, is all there is: what follows would be decoded, too."""
    while at + 3 <= len(frame):
        header = int.from_bytes(frame[at : at + 3], "little")
        # The content of a block of one repeated byte is that byte.
        at += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)
        if header & 1:
            return at + 4 * checksum == len(frame)
    return False
