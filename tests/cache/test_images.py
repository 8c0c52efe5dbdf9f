"""Decoding of images: what is damaged is an error, never other pixels."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditr_cache.datasets.images import image_size, read_color, read_depth, read_ids
from ditr_cache.errors import DataError

SIZE = (64, 48)
READ = {"color": read_color, "depth": read_depth, "ids": read_ids}


def png(kind: str) -> bytes:
    """Of even surfaces, as depth maps are, but for some noise."""
    pixels = np.full((48, 64, 3) if kind == "color" else (48, 64), 90, np.uint8 if kind == "color" else np.uint16)
    pixels[::7] += np.random.default_rng(0).integers(0, 3, pixels[::7].shape, dtype=pixels.dtype)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", READ)
def test_a_flipped_bit_of_a_png_is_an_error(kind: str, tmp_path: Path) -> None:
    """Wherever it is, though Pillow by itself decodes some of these, to other pixels."""
    sound, silent = png(kind), 0
    pixels = np.asarray(Image.open(io.BytesIO(sound)))
    assert READ[kind](sound, size=SIZE, where="x.png").shape[:2] == pixels.shape[:2]
    for place in range(41, len(sound) - 16):  # of the pixels
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        with contextlib.suppress(OSError, SyntaxError), Image.open(io.BytesIO(damaged)) as image:
            silent += not np.array_equal(np.asarray(image), pixels)
        (tmp_path / "x.png").write_bytes(damaged)
        for source in (bytes(damaged), tmp_path / "x.png"):
            with pytest.raises(DataError, match=r"x\.png: not a readable image .*truncated or damaged"):
                READ[kind](source, size=SIZE, where="x.png")
    assert silent > 10


def test_the_size_is_read_of_the_header_alone(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png("depth")[:200])
    assert image_size(tmp_path / "x.png") == SIZE


def test_a_jpeg_has_no_checksums() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(file, "JPEG")
    assert (read_color(file.getvalue(), size=SIZE, where="x.jpg") == 90).all()
