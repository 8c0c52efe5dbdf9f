"""What `PointNeXt` needs to know of the places of a batch's points, found before any feature is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ditr_cache.errors import DataError
from ditr_train.data.sample import PointBatch
from ditr_train.models.hierarchy import LinkedHierarchy
from ditr_train.models.neighbors import farthest_points, nearest
from ditr_train.models.pointnext_config import PointNeXtConfig

_INTERPOLATED = 3


@dataclass(frozen=True)
class Neighbourhoods:
    """K points around each of M points; where there are fewer, the nearest is repeated.

    Args:
        index: [M, K] int64 rows of the neighbours.
        offset: [M, K, 3] float32 places of the neighbours relative to the point, in radii: no longer than 1.
    """

    index: Tensor
    offset: Tensor


@dataclass(frozen=True)
class PreparedStage:
    """From resolution l-1 with M_(l-1) points to resolution l with M_l.

    Args:
        kept: [M_l] int64 the rows at l-1 of the points at l.
        down: neighbours at l-1 of the points at l.
        around: neighbours at l of the points at l; None for a stage without blocks.
        up_index: [M_(l-1), 3] int64 the nearest points at l of those at l-1.
        up_weight: [M_(l-1), 3] float32 their weights in the interpolation; they sum to 1.
    """

    kept: Tensor
    down: Neighbourhoods
    around: Neighbourhoods | None
    up_index: Tensor
    up_weight: Tensor


@dataclass(frozen=True)
class PreparedPoints:
    """Points of a batch at every resolution.

    Args:
        coords: [M_l, 3] float32 metres, of resolutions 0..num_stages.
        stages: from each resolution to the next.
        hierarchy: each point belongs to the nearest of its sample at the next resolution.
    """

    coords: list[Tensor]
    stages: list[PreparedStage]
    hierarchy: LinkedHierarchy


def prepare_points(batch: PointBatch, config: PointNeXtConfig) -> PreparedPoints:
    """Samples the points of a batch for every resolution and finds their neighbours.

    Args:
        batch: at least one point.
        config: strides, radii and number of neighbours.

    Raises:
        DataError: coordinates that are not finite.
    """
    if not bool(batch.coord.isfinite().all()):
        raise DataError(
            f"points of {', '.join(batch.names)} have coordinates that are not finite; check the cache with "
            "`ditr-cache verify`"
        )
    coords, stages = [batch.coord], []
    sizes = batch.offset.diff(prepend=batch.offset.new_zeros(1)).tolist()
    for stage, stride in enumerate(config.strides):
        finer, finer_sizes = coords[-1], sizes
        sizes = [min(size, max(1, size // stride)) for size in finer_sizes]
        kept = farthest_points(finer, finer_sizes, sizes)
        coord = finer[kept]
        k, radius, wider = config.num_neighbors, config.radii[stage], config.radii[stage + 1]
        up_index, distance = nearest(coord, sizes, finer, finer_sizes, _INTERPOLATED)
        closeness = 1.0 / (distance + 1e-8)  # zero where there are fewer than three points
        stages.append(
            PreparedStage(
                kept=kept,
                down=_neighbourhoods(finer, finer_sizes, coord, sizes, k, radius),
                around=_neighbourhoods(coord, sizes, coord, sizes, k, wider) if config.stage_blocks[stage] else None,
                up_index=up_index,
                up_weight=closeness / closeness.sum(dim=1, keepdim=True),
            )
        )
        coords.append(coord)
    parents = [stage.up_index[:, 0] for stage in stages]
    return PreparedPoints(coords, stages, LinkedHierarchy(parents, [len(coord) for coord in coords]))


def _neighbourhoods(
    support: Tensor, support_sizes: Sequence[int], points: Tensor, sizes: Sequence[int], k: int, radius: float
) -> Neighbourhoods:
    index, _ = nearest(support, support_sizes, points, sizes, k, radius)
    return Neighbourhoods(index, (support[index] - points[:, None]) / radius)
