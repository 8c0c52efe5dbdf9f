"""What travels through the data pipeline: `PointSample` (numpy, one sample), then `PointBatch` (torch, B samples)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditr_train.data.row_decoder import RowDecoder


@dataclass(kw_only=True)
class PointSample:
    """The points of one sample on the host, before and during augmentation.

    Args:
        name: id of the sample in the cache.
        coord: [N, 3] float32 metres.
        color: [N, 3] float32 RGB in 0..255.
        normal: [N, 3] float32, unit length or zero.
        strength: [N] float32 lidar intensity.
        segment: [N] int64 class indices, -1 where unlabelled.
        instance: [N] int64 ids of objects, -1 where none; only where an augmentation needs it.
        row: [N] int64 row of the sample's feature table that belongs to the point, -1 where it has no feature. Moves
            with its point through every transform, so that a feature never reaches another point.
    """

    name: str
    coord: NDArray[np.float32]
    color: NDArray[np.float32] | None = None
    normal: NDArray[np.float32] | None = None
    strength: NDArray[np.float32] | None = None
    segment: NDArray[np.int64] | None = None
    instance: NDArray[np.int64] | None = None
    row: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.coord)

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_]) -> PointSample:
        """The points at `index` (positions or a mask), with everything that belongs to them."""
        arrays = {f.name: value[index] for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)}
        return replace(self, **arrays)  # type: ignore[arg-type]

    def channels(self, names: Sequence[str]) -> NDArray[np.float32]:
        """[N, C_in] float32 network input: these arrays side by side, colour in 0..1.

        Args:
            names: at least one; `height`, metres above the lowest of these points, or arrays that the sample has
                (coord, color, normal, strength).
        """
        arrays: list[NDArray[np.float32]] = []
        for name in names:
            if name == "height":
                arrays.append(self.coord[:, 2:] - self.coord[:, 2].min())
                continue
            values = getattr(self, name)
            arrays.append(values / np.float32(255) if name == "color" else values.reshape(len(self), -1))
        return np.concatenate(arrays, axis=1, dtype=np.float32)


@dataclass(kw_only=True)
class FeatureRows:
    """Rows of a VFM as the cache stores them, and which point uses which.

    Args:
        table: [T, W] as stored, say int8.
        scale: [T] float32 factors of the rows; None for codecs without.
        index: [N] int64, row of each point of the batch, -1 where a point has no feature.
        decoder: makes float32 of rows, on the device.
    """

    table: Tensor
    scale: Tensor | None
    index: Tensor
    decoder: RowDecoder = field(default_factory=RowDecoder)

    @property
    def dim(self) -> int:
        """Channels C of a decoded row."""
        return self.decoder.dim(self.table)

    def decode(self, rows: Tensor, buffer: Tensor | None = None) -> Tensor:
        """Rows [V, C] float32 of the table at `rows`, [V] int64; they may overwrite `buffer`, see `RowDecoder`."""
        scale = None if self.scale is None else self.scale.index_select(0, rows)
        return self.decoder.decode(self.table.index_select(0, rows), scale, buffer)

    def map(self, move: Callable[[Tensor], Tensor]) -> FeatureRows:
        """With `move` applied to every tensor."""
        scale = None if self.scale is None else move(self.scale)
        return FeatureRows(table=move(self.table), scale=scale, index=move(self.index), decoder=self.decoder.map(move))


@dataclass(kw_only=True)
class PointBatch:
    """Voxelized points of B samples, concatenated.

    Args:
        coord: [N, 3] float32 metres, augmented.
        grid_coord: [N, 3] int32 voxel coordinates, >= 0 and unique within a sample.
        feat: [N, C_in] float32 network input.
        offset: [B] int64 cumulative point counts.
        segment: [N] int64, -1 where ignored.
        features: VFM rows of the points; None where the recipe uses no VFM.
        names: the sample of each entry of `offset`, for messages (`a+b` where Mix3D joined two).
        inverse: [M] int64, evaluation only: full-resolution point -> row of this batch.
        full_segment: [M] int64, evaluation only.
        full_offset: [B] int64 cumulative full-resolution counts, evaluation only.
    """

    coord: Tensor
    grid_coord: Tensor
    feat: Tensor
    offset: Tensor
    segment: Tensor | None
    features: FeatureRows | None
    names: tuple[str, ...]
    inverse: Tensor | None = None
    full_segment: Tensor | None = None
    full_offset: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PointBatch:
        """The batch on `device`; feature rows keep their stored dtype."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PointBatch:
        """The batch in page-locked host memory; `DataLoader` calls it."""
        return self._map(Tensor.pin_memory)

    def batch_index(self) -> Tensor:
        """[N] int64: the sample of each point."""
        counts = torch.diff(self.offset, prepend=self.offset.new_zeros(1))
        samples = torch.arange(len(counts), device=self.offset.device)
        return torch.repeat_interleave(samples, counts, output_size=len(self.coord))

    def _map(self, move: Callable[[Tensor], Tensor]) -> PointBatch:
        moved = {f.name: move(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        if self.features is not None:
            moved["features"] = self.features.map(move)  # type: ignore[assignment]
        return replace(self, **moved)  # type: ignore[arg-type]
