"""Pictures of a cached sample: colour, labels, PCA of the features and coverage, from above and from two sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ditr_cache.cached import CachedSample
from ditr_cache.errors import StorageError
from ditr_cache.geometry import point_spacing
from ditr_cache.store import CacheReader

Color = NDArray[np.uint8]

INVISIBLE = (150, 150, 150)
"""Colour of points without a feature."""

BACKGROUND = (255, 255, 255)
PANEL = 420
"""Width and height of one panel in pixels."""

VIEWPOINTS: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("from above (along z)", (0, 1, 2)),
    ("from the side (along y)", (0, 2, 1)),
    ("from the side (along x)", (1, 2, 0)),
)
"""(title, axes shown as right, up and towards the viewer)."""


def pca_colors(feature: NDArray[np.float32], valid: NDArray[np.bool_]) -> Color:
    """RGB [N, 3] uint8 from the first three principal components of features [N, C]; invisible points are grey.

    Rows are scaled to unit length before the fit and the components are clipped at their 1st and 99th percentiles, so
    that outlier tokens (known of ViTs without registers) do not flatten all other colours.
    """
    colors = np.full((len(feature), 3), INVISIBLE, dtype=np.uint8)
    if valid.sum() < 4:
        return colors
    rows = feature[valid].astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    sample = rows[:: max(1, len(rows) // 50_000)]
    center = np.median(sample, axis=0)
    _, vectors = np.linalg.eigh(np.atleast_2d(np.cov((sample - center).T)))
    components = (rows - center) @ vectors[:, ::-1][:, :3]
    low, high = np.percentile(components, [1, 99], axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    colors[valid, : scaled.shape[1]] = (scaled.clip(0, 1) * 255).astype(np.uint8)
    return colors


def coverage_colors(link_count: NDArray[np.int32]) -> Color:
    """RGB [N, 3] uint8: grey where no view sees the point, from dark blue (1 view) to yellow (most views)."""
    top = max(1.0, float(np.percentile(link_count, 99)))
    t = (np.log1p(link_count) / np.log1p(top)).clip(0, 1)[:, None]
    ramp = np.array([40, 40, 120]) * (1 - t) + np.array([250, 220, 60]) * t
    ramp[link_count == 0] = INVISIBLE
    return ramp.astype(np.uint8)


def label_colors(segment: NDArray[np.int16], table: NDArray[np.uint8], ignore_index: int) -> Color:
    """RGB [N, 3] uint8 of class indices; unlabelled points are grey."""
    colors = np.full((len(segment), 3), INVISIBLE, dtype=np.uint8)
    known = (segment != ignore_index) & (segment >= 0) & (segment < len(table))
    colors[known] = table[segment[known]]
    return colors


def render(coord: NDArray[np.float32], colors: Color, *, axes: tuple[int, int, int], size: int = PANEL) -> Image.Image:
    """Orthographic picture of points; `axes` are the ones shown as right, up and towards the viewer.

    The room is cut open: from above, the highest 15 % are left out of a cloud that has a ceiling to look under; from a
    side, the half nearer to the viewer.
    """
    right, up, toward = (coord[:, a].astype(np.float64) for a in axes)
    cut = toward <= (np.percentile(toward, 85) if axes[2] == 2 else np.median(toward))
    low = np.array([np.percentile(right, 0.5), np.percentile(up, 0.5)])
    extent = np.array([np.percentile(right, 99.5), np.percentile(up, 99.5)]) - low
    scale = (size - 20) / max(float(extent.max()), 1e-6)
    # Splat as wide as the points (in Morton order) are apart, so that surfaces look closed.
    radius = int(np.clip(round(0.6 * point_spacing(coord) * scale), 1, 6))
    offset = (size - extent * scale) / 2
    column = ((right - low[0]) * scale + offset[0]).astype(int)
    row = size - 1 - ((up - low[1]) * scale + offset[1]).astype(int)
    order = np.argsort(toward, kind="stable")  # of points on one pixel the nearest is assigned last
    order = order[cut[order]]
    nearest = np.full((size, size), -1, dtype=np.int64)
    height = np.append(toward, -np.inf)  # index -1: nothing there yet
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            x, y = column[order] + dx, row[order] + dy
            inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
            candidate = np.full_like(nearest, -1)
            candidate[y[inside], x[inside]] = order[inside]
            nearest = np.where(height[candidate] > height[nearest], candidate, nearest)
    canvas = np.where(nearest[..., None] >= 0, colors[nearest], np.array(BACKGROUND, dtype=np.uint8))
    return Image.fromarray(canvas)


def layers(cache: CacheReader, sample: CachedSample) -> dict[str, Color]:
    """The colourings of a sample that it has data for: title -> RGB [N, 3] uint8."""
    found: dict[str, Color] = {}
    if sample.color is not None:
        found["RGB"] = sample.color
    table = np.array(cache.metadata.class_colors, dtype=np.uint8).reshape(-1, 3)
    if sample.segment is not None and len(table):
        found["labels"] = label_colors(sample.segment, table, cache.metadata.ignore_index)
    if sample.feature is not None:
        found[f"features (PCA), {sample.valid.mean():.1%} of points"] = pca_colors(sample.feature, sample.valid)
    found[f"views per point, coverage {(sample.link_count > 0).mean():.1%}"] = coverage_colors(sample.link_count)
    return found


def show(cache: CacheReader, sample_id: str, path: Path, vfm: str | None = None) -> None:
    """Write one PNG of a sample: a column per colouring, a row per viewpoint.

    Raises:
        UnknownNameError: no such sample or VFM.
        StorageError: the file cannot be written.
    """
    sample = cache.read(sample_id, vfm)
    columns = layers(cache, sample)
    key = cache.resolve_vfm(vfm).key if cache.vfms else "no features"
    header, legend = 44, 22
    bottom = header + (PANEL + 18) * len(VIEWPOINTS)
    sheet = Image.new("RGB", (PANEL * len(columns), bottom + legend), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 4), f"{cache.metadata.dataset}  {sample_id}  {len(sample.coord)} points  {key}", fill=(0, 0, 0))
    for x, (title, colors) in enumerate(columns.items()):
        draw.text((x * PANEL + 8, 24), title, fill=(0, 0, 0))
        for y, (viewpoint, axes) in enumerate(VIEWPOINTS):
            top = header + y * (PANEL + 18)
            sheet.paste(render(sample.coord, colors, axes=axes), (x * PANEL, top + 18))
            draw.text((x * PANEL + 8, top + 2), viewpoint, fill=(90, 90, 90))
    if sample.segment is not None:
        _draw_legend(draw, cache, sample.segment, top=bottom)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error}") from error


def _draw_legend(draw: ImageDraw.ImageDraw, cache: CacheReader, segment: NDArray[np.int16], *, top: int) -> None:
    """Names of the classes that the sample has, each beside its colour, in one line."""
    left = 8.0
    for index in np.unique(segment):
        if 0 <= index < len(cache.metadata.class_names):
            name = cache.metadata.class_names[index]
            draw.rectangle((left, top + 6, left + 10, top + 16), fill=cache.metadata.class_colors[index])
            draw.text((left + 14, top + 4), name, fill=(0, 0, 0))
            left += 26 + draw.textlength(name)
