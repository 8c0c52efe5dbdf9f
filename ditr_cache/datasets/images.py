"""Decoding of colour images and 16-bit depth maps. Every failure is a `DataError` that names the image.

Pillow decodes PNGs without looking at the checksums of their pixels: a flipped bit would become other depth, silently.
So they are compared first, which takes a hundredth of the time of decoding. JPEGs have none.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ditr_cache.errors import DataError, MissingDataError

MILLIMETRES = 1000.0
"""Depth values per metre, where a dataset has no unit of its own."""

MAX_PIXELS = 2**26
"""Largest image that is decoded, 64 Mpx: more is a broken header or an attack, never a frame of a video."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP")
"""Formats of images that are decoded, in Pillow's names, whatever a file's name ends in. Pillow knows forty more: of
some the decoder was last looked at years ago, and EPS is handed to an interpreter of a programming language."""

_NO_DEPTH = 65535  # 7-Scenes and several Kinect drivers mark unknown depth so; 0 everywhere else


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, from its header alone.

    Raises:
        MissingDataError: no such file.
        DataError: not an image.
    """
    with _opened(path, str(path)) as image:
        return image.size


def read_color(source: Path | bytes, *, size: tuple[int, int], where: str) -> NDArray[np.uint8]:
    """[height, width, 3] uint8 RGB of a JPEG or PNG.

    Orientation tags are not applied: intrinsics belong to the pixels as stored.

    Args:
        source: a file, or its content.
        size: (width, height) that the camera promises.
        where: names the image in errors.

    Raises:
        MissingDataError: no such file.
        DataError: truncated, not an image, or of another size.
    """
    with _opened(source, where, intact=True) as image:
        _check_size(image.size, size, where)
        if image.mode.startswith("I") or image.mode == "F":
            raise DataError(f"{where}: expected an 8-bit colour image, got Pillow mode {image.mode!r}")
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # converting would copy


def read_depth(
    source: Path | bytes, *, size: tuple[int, int], where: str, scale: float = MILLIMETRES
) -> NDArray[np.float32]:
    """[height, width] float32 metres of a 16-bit grey PNG, 0 where unknown.

    Args:
        source: a file, or its content.
        size: (width, height) that the camera promises.
        where: names the depth map in errors.
        scale: raw values per metre.

    Raises:
        MissingDataError: no such file.
        DataError: truncated, not a 16-bit image, or of another size.
    """
    with _opened(source, where, intact=True) as image:
        _check_size(image.size, size, where)
        if not image.mode.startswith("I"):
            raise DataError(f"{where}: expected a 16-bit grey depth map, got Pillow mode {image.mode!r}")
        return depth_in_metres(np.asarray(image), scale)


def read_ids(source: Path | bytes, *, size: tuple[int, int], where: str) -> NDArray[np.int32]:
    """[height, width] int32 values of an image of ids: a grey one of 8 or 16 bits, or the indices of a palette.

    Args:
        source: a file, or its content.
        size: (width, height) that the camera promises.
        where: names the image in errors.

    Raises:
        MissingDataError: no such file.
        DataError: truncated, not an image, of colours, or of another size.
    """
    with _opened(source, where, intact=True) as image:
        _check_size(image.size, size, where)
        if image.mode not in ("P", "L") and not image.mode.startswith("I"):
            raise DataError(
                f"{where}: expected an image of ids, grey or with a palette, got Pillow mode {image.mode!r}; it was "
                "saved again by a tool that turned ids into colours: take the released file"
            )
        return np.asarray(image).astype(np.int32)


def depth_in_metres(raw: NDArray[Any], scale: float = MILLIMETRES) -> NDArray[np.float32]:
    """Raw 16-bit depth as float32 metres; 0 and 65535 are unknown and become 0.

    Args:
        raw: [height, width] integers.
        scale: raw values per metre.
    """
    metres = raw.astype(np.float32) / np.float32(scale)
    metres[raw >= _NO_DEPTH] = 0
    return metres


@contextmanager
def _opened(source: Path | bytes, where: str, *, intact: bool = False) -> Iterator[Image.Image]:
    """An image whose header was read; whatever goes wrong inside the block too becomes a `DataError`.

    Args:
        source: a file, or its content.
        where: names the image in errors.
        intact: whether to compare the checksums of a PNG; they are of the whole file, so not for its header alone.
    """
    try:
        stream: IO[bytes] = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except FileNotFoundError as error:
        raise MissingDataError(f"{where}: no such file") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error})") from error
    try:
        with stream:
            if intact:
                _check_sums(stream)
            with Image.open(stream, formats=FORMATS) as image:
                _check_pixels(image.size, where)
                yield image
    except DataError:
        raise
    # Pillow reports broken files through all of these, depending on the decoder and the byte that is wrong.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise DataError(f"{where}: not a readable image ({error}); the file is truncated or damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{where}: {error}") from error


def _check_sums(stream: IO[bytes]) -> None:
    """Raise `SyntaxError` where the checksum of a chunk of a PNG is wrong; leaves the stream at its start."""
    with Image.open(stream, formats=FORMATS) as image:
        if image.format == "PNG":
            image.verify()
    stream.seek(0)


def _check_size(actual: tuple[int, int], expected: tuple[int, int], where: str) -> None:
    if actual != expected:
        raise DataError(
            f"{where}: expected {expected[0]}x{expected[1]} pixels as the sample's other images, got "
            f"{actual[0]}x{actual[1]}"
        )


def _check_pixels(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"{where}: {size[0]}x{size[1]} pixels, expected at most {MAX_PIXELS}")
