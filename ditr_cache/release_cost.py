"""What a whole official release costs, before it is downloaded: arithmetic on published rates, not a measurement.

`extract --dry-run` measures on the data and the machine that are there, and is to be preferred wherever it can run.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditr_cache.datasets.base import Dataset

DIM, LAYERS, PREFIX_TOKENS = 1024, 24, 5
"""Of ViT-L with four registers and a CLS token, DITR's default VFM."""

RATED_TOKENS = 37 * 37
"""Tokens of the 518x518 images that the rates below are for."""

LINK_TESTS_PER_SECOND = 1e7
"""Point-view tests a second on one CPU core, with a depth map (150 000 points, measured on a cloud machine's core)."""

_POINT_BYTES = 12 + 3 + 6 + 2 + 4
"""coord, color or strength, normal, segment, source_index as stored, before compression."""

_LINK_BYTES = 4 + 4 + 2
_SCALE_BYTES = 4
_INDEX_BYTES = 4


@dataclass(frozen=True)
class Device:
    """A GPU and the rate at which it runs ViT-L/14 on 518x518 images.

    Args:
        name: for people.
        rate: images a second.
        source: where the rate comes from.
    """

    name: str
    rate: float
    source: str


DEVICES = (
    Device("H200", 490.0, "half of 989 TFLOPS in bf16, an assumption; no measurement"),
    Device("RTX PRO 6000 Max-Q", 163.0, "timm's published benchmark of DINOv2-L/14 at 518x518 with AMP"),
)


@dataclass(frozen=True)
class Cost:
    """Of one release with ViT-L and the codec int8.

    Args:
        gpu_hours: of forward passes alone, by device.
        cpu_hours: of linking, on one core; decoding images comes on top.
        geometry_bytes, feature_bytes: on disk, before compression: an upper bound.
        layout: of the feature store.
    """

    gpu_hours: dict[str, float]
    cpu_hours: float
    geometry_bytes: float
    feature_bytes: float
    layout: str


def flops(tokens: int) -> float:
    """Floating-point operations of one ViT-L forward pass over an image of so many patch tokens."""
    n = tokens + PREFIX_TOKENS
    return LAYERS * (24.0 * n * DIM**2 + 4.0 * n**2 * DIM)


def release_cost(dataset: type[Dataset]) -> Cost | None:
    """Cost of a dataset's whole release with the defaults of its recipe; None where there is no such release."""
    release = dataset.release
    if release is None:
        return None
    rows, columns = dataset.defaults.grid
    tokens = rows * columns
    work = release.images * flops(tokens) / flops(RATED_TOKENS)
    points = release.samples * release.points
    links = points * release.coverage * release.views_per_point
    row = DIM + _SCALE_BYTES
    if dataset.defaults.layout == "views":
        # Of the tokens of an image, no more are stored than points fall on.
        features = min(release.images * tokens, links) * row + links * _INDEX_BYTES
    else:
        features = points * release.coverage * row + points * _INDEX_BYTES
    tests = release.points * release.images  # every point of a sample against every image of it
    return Cost(
        gpu_hours={device.name: work / device.rate / 3600 for device in DEVICES},
        cpu_hours=tests / LINK_TESTS_PER_SECOND / 3600,
        geometry_bytes=points * _POINT_BYTES + links * _LINK_BYTES,
        feature_bytes=features,
        layout=dataset.defaults.layout,
    )
