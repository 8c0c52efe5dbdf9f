"""Procedural image textures in which the class is the pattern, never the colour.

A pattern is a scalar field over the surface. Its values are replaced by their ranks, and one tone curve and a pair of
colours, drawn from the same distributions for every class, turn the ranks into RGB. So the colours that single points
of a surface have follow one distribution, whatever the class; only their arrangement within a few centimetres
differs, which an image shows and a point cloud of 5 cm spacing does not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Field = NDArray[np.float32]


class Canvas:
    """A texture to be: its random stream, its size in texels, and the position of each texel.

    Args:
        rng: the only source of randomness of a pattern.
        width, height: in metres.
        texel: edge of a texel in metres.
    """

    def __init__(self, rng: np.random.Generator, width: float, height: float, texel: float) -> None:
        self.rng = rng
        self.texel = texel
        self.rows = max(8, round(height / texel))
        self.cols = max(8, round(width / texel))
        self.x: Field = ((np.arange(self.cols, dtype=np.float32) + 0.5) * np.float32(texel))[None, :]
        self.y: Field = ((np.arange(self.rows, dtype=np.float32) + 0.5) * np.float32(texel))[:, None]

    def noise(self, sigma_x: float, sigma_y: float) -> Field:
        """[rows, cols] smooth noise of unit variance that wraps around; the sigmas are its blur in metres."""
        white = self.rng.standard_normal((self.rows, self.cols), dtype=np.float32)
        fx = np.fft.rfftfreq(self.cols, self.texel)[None, :] * sigma_x
        fy = np.fft.fftfreq(self.rows, self.texel)[:, None] * sigma_y
        kernel = np.exp(-2 * np.pi**2 * (fx**2 + fy**2))
        kernel[0, 0] = 0
        smooth = np.fft.irfft2(np.fft.rfft2(white) * kernel, s=white.shape)
        return (smooth / max(float(smooth.std()), 1e-12)).astype(np.float32)

    def uniform(self, low: float, high: float) -> float:
        """One random number in [low, high)."""
        return float(self.rng.uniform(low, high))


def plaster(c: Canvas) -> Field:
    """Wall: isotropic grain."""
    sigma = c.uniform(0.007, 0.010)
    return c.noise(sigma, sigma) + np.float32(0.25) * c.noise(0.003, 0.003)


def parquet(c: Canvas) -> Field:
    """Floor: narrow staggered planks with dark gaps and grain along them."""
    width, length = c.uniform(0.046, 0.055), c.uniform(0.20, 0.28)
    row = np.floor(c.y / width)
    along = (c.x + row * length * 0.38) % length
    across = c.y % width
    gap = np.minimum(np.minimum(across, width - across), np.minimum(along, length - along))
    return np.minimum(gap, 0.016) / np.float32(0.016) + np.float32(0.2) * c.noise(0.04, 0.003)


def grain(c: Canvas) -> Field:
    """Door: vertical wood grain that flows around knots."""
    phase = (c.x + np.float32(0.010) * c.noise(0.03, 0.12)) / c.uniform(0.032, 0.042)
    for _ in range(c.rng.poisson(2.5 * c.rows * c.cols * c.texel**2)):
        kx, ky = c.uniform(0, c.cols * c.texel), c.uniform(0, c.rows * c.texel)
        knot = np.exp(-(((c.x - kx) / 0.045) ** 2) - ((c.y - ky) / 0.11) ** 2)
        phase = phase + c.uniform(1.5, 2.5) * knot
    return np.sin(2 * np.pi * phase) + np.float32(0.4) * c.noise(0.003, 0.04)


def muntins(c: Canvas) -> Field:
    """Window: a grid of bars before panes with a slanting reflection."""
    px, py = c.uniform(0.045, 0.052), c.uniform(0.048, 0.056)
    u, v = (c.x + c.uniform(0, 0.1)) % px, (c.y + c.uniform(0, 0.1)) % py
    bar = np.minimum(np.minimum(u, px - u), np.minimum(v, py - v))
    return np.minimum(bar, 0.013) / np.float32(0.013) + np.float32(0.4) * (u / px - v / py) * (bar > 0.008)


def swirls(c: Canvas) -> Field:
    """Picture: brush strokes that swirl around eyes."""
    phase = c.uniform(1.3, 1.7) * c.noise(0.06, 0.06)
    return np.sin(2 * np.pi * phase) + np.float32(0.3) * c.noise(0.006, 0.006)


def handwriting(c: Canvas) -> Field:
    """Whiteboard: lines of thick cursive writing."""
    image = Image.new("L", (c.cols, c.rows), 0)
    draw = ImageDraw.Draw(image)
    line, pen = c.uniform(0.048, 0.056), max(1, round(0.008 / c.texel))
    baseline = c.uniform(0.03, 0.06)
    while baseline < c.rows * c.texel:
        x = c.uniform(-0.05, 0.05)
        while x < c.cols * c.texel:
            letters = int(c.rng.integers(3, 8))
            t = np.linspace(0, letters, 10 * letters)
            tall = np.interp(t, np.arange(letters + 1), c.rng.uniform(0.4, 1, letters + 1)) * line * 0.4
            px = x + 0.026 * t + 0.011 * np.sin(2 * np.pi * t + c.uniform(0, 6))
            py = baseline + tall * np.sin(2 * np.pi * t + c.uniform(0, 6))
            draw.line([(a / c.texel, b / c.texel) for a, b in zip(px, py, strict=True)], fill=255, width=pen)
            x += 0.026 * letters + c.uniform(0.025, 0.045)
        baseline += line
    near = [np.asarray(image.filter(ImageFilter.GaussianBlur(s / c.texel)), dtype=np.float32) for s in (0.003, 0.008)]
    return -(near[0] + near[1]) / 255 + np.float32(0.02) * c.noise(0.004, 0.004)


def slats(c: Canvas) -> Field:
    """Cabinet: horizontal slats, broken at its vertical seams."""
    period, column = c.uniform(0.042, 0.055), c.uniform(0.30, 0.45)
    shift = c.rng.uniform(0, 1, 64)[(np.floor((c.x + c.uniform(0, 0.3)) / column)).astype(int) % 64]
    phase = (c.y / np.float32(period) + shift.astype(np.float32)) % 1
    return phase + np.float32(0.12) * c.noise(0.05, 0.004)


def folds(c: Canvas) -> Field:
    """Curtain: smooth vertical folds that swing from side to side."""
    swing = np.sin(2 * np.pi * (c.y / c.uniform(0.20, 0.30) + c.uniform(0, 1)) + 0.8 * c.noise(0.15, 0.15))
    phase = (c.x + np.float32(0.016) * swing) / c.uniform(0.044, 0.054)
    return np.sin(2 * np.pi * phase) + np.float32(0.05) * c.noise(0.01, 0.01)


def medallions(c: Canvas) -> Field:
    """Floor mat: squares with rings around their middle, each square with a phase of its own."""
    cell = c.uniform(0.16, 0.20)
    column, row = np.floor(c.x / cell), np.floor(c.y / cell)
    radius = np.hypot(c.x - (column + 0.5) * cell, c.y - (row + 0.5) * cell)
    phase = c.rng.uniform(0, 1, (64, 64)).astype(np.float32)[row.astype(int) % 64, column.astype(int) % 64]
    return np.sin(2 * np.pi * (radius / c.uniform(0.042, 0.052) + phase)) + np.float32(0.15) * c.noise(0.006, 0.006)


def fabric(c: Canvas) -> Field:
    """Chair and sofa: a slanting twill."""
    return np.sin(2 * np.pi * (c.x + c.y) / c.uniform(0.022, 0.03)) + np.float32(0.7) * c.noise(0.008, 0.008)


def board(c: Canvas) -> Field:
    """Table and bookshelf: soft streaks along x."""
    return c.noise(0.05, 0.005) + np.float32(0.4) * c.noise(0.02, 0.003)


_BINS = 2048  # in which the ranks of a field are counted

Pattern = Callable[[Canvas], Field]


class Palette:
    """Two colours and a tone curve between them, drawn from one distribution for all classes."""

    def __init__(self, rng: np.random.Generator) -> None:
        centre = rng.uniform(85, 170) + _chroma(rng, 45)
        swing = rng.choice((-1.0, 1.0)) * rng.uniform(32, 52) + _chroma(rng, 14)
        self.ends = np.stack([centre - swing, centre + swing])  # [2, 3]
        self.middle = rng.uniform(0.3, 0.55)
        self.softness = rng.uniform(0.04, 0.14)

    def paint(self, field: Field) -> NDArray[np.uint8]:
        """[rows, cols, 3] RGB of a field, through the ranks of its values."""
        low, high = float(field.min()), float(field.max())
        bins = ((field - low) * (_BINS / max(high - low, 1e-12))).astype(np.int32).clip(0, _BINS - 1)
        count = np.bincount(bins.ravel(), minlength=_BINS)
        rank = (np.cumsum(count) - count / 2) / field.size
        tone = 1 / (1 + np.exp((self.middle - rank) / self.softness))
        rgb = self.ends[0] + tone[:, None] * (self.ends[1] - self.ends[0])
        return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)[bins]


def bake(
    rng: np.random.Generator,
    pattern: Pattern,
    width: float,
    height: float,
    texel: float,
    *,
    rim: float = 0.0,
) -> NDArray[np.uint8]:
    """[rows, cols, 3] texture of a surface.

    Args:
        rng: random stream.
        pattern: which pattern.
        width, height: in metres.
        texel: edge of a texel in metres.
        rim: width of a plain border in metres, 0 for none.
    """
    canvas = Canvas(rng, width, height, texel)
    image = Palette(rng).paint(np.broadcast_to(pattern(canvas), (canvas.rows, canvas.cols)))
    edge = round(rim / texel)
    if edge:
        plain = Palette(rng).ends[0].clip(0, 255).round().astype(np.uint8)
        image[:edge] = image[-edge:] = plain
        image[:, :edge] = image[:, -edge:] = plain
    return image


def _chroma(rng: np.random.Generator, radius: float) -> NDArray[np.float64]:
    """Random RGB offset without luminance."""
    offset = rng.normal(0, 1, 3)
    offset -= offset @ (0.299, 0.587, 0.114)
    return offset * rng.uniform(0, radius) / np.abs(offset).max()
