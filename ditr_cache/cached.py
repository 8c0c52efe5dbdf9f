"""What a reader returns: one sample of a cache, as stored (for trainers) or decoded (for everyone)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.codecs import Codec, EncodedRows
from ditr_cache.errors import MismatchError, UnknownNameError
from ditr_cache.schema import VFMSpec

VIEW_CHOICES = ("last", "nearest", "random")
"""Which view gives a point its feature, where the cache holds all of them (layout `views`)."""


def check_view(spec: VFMSpec, view: str | None) -> None:
    """Raise `UnknownNameError` or `MismatchError` where features of a VFM leave no such choice of view."""
    if view is None:
        return
    if view not in VIEW_CHOICES:
        raise UnknownNameError.of("choice of view", view, VIEW_CHOICES)
    if spec.layout != "views":
        raise MismatchError(
            f"view {view!r} was asked for, but {spec.key!r} holds one feature per point ({spec.layout}, {spec.fuse}): "
            "extract with --layout views to choose among a point's views, or leave the choice out"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredFeatures:
    """Feature rows of one sample as stored. They are read from the cache when they are taken, not before.

    Args:
        index: [N] int32, the row of each point, -1 where it has no feature.
        rows: number of rows T.
        take: reads the rows at ascending positions; only the chunks that hold some of them are read.
        spec: the VFM.
        codec: decodes rows.
    """

    index: NDArray[np.int32]
    rows: int
    take: Callable[[NDArray[np.integer]], EncodedRows]
    spec: VFMSpec
    codec: Codec

    @cached_property
    def encoded(self) -> EncodedRows:
        """All rows as stored."""
        return self.take(np.arange(self.rows))

    @property
    def table(self) -> NDArray[np.generic]:
        """[T, W] of the codec's type."""
        return self.encoded.table

    @property
    def scale(self) -> NDArray[np.float32] | None:
        """[T] float32 factor of each row; None where the codec has none."""
        return self.encoded.scale

    def decoded(self) -> NDArray[np.float32]:
        """All rows [T, C] float32."""
        return self.codec.decode(self.encoded.table, self.encoded.scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredSample:
    """One sample of N points in Morton order.

    Args:
        id, split: as the dataset names them.
        coord: [N, 3] float32 metres.
        color: [N, 3] uint8 RGB.
        normal: [N, 3] float32, unit length or zero.
        strength: [N] float32.
        segment: [N] int16, `ignore_index` where unlabelled.
        instance: [N] int32, -1 where none.
        source_index: [N] int64, each point's position in the dataset's own order.
        features: rows of one VFM; None where none was asked for.
    """

    id: str
    split: str
    coord: NDArray[np.float32]
    color: NDArray[np.uint8] | None
    normal: NDArray[np.float32] | None
    strength: NDArray[np.float32] | None
    segment: NDArray[np.int16] | None
    instance: NDArray[np.int32] | None
    source_index: NDArray[np.int64]
    features: StoredFeatures | None


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedSample(Mapping[str, Any]):
    """One sample, decoded. Also a mapping, so that `dict(sample)` feeds a trainer that wants a data dict.

    Args as in `StoredSample`, and:
        feature: [N, C] float32, zero where not `valid`; None where the cache holds no VFM.
        valid: [N] bool, whether the point has a feature.
        link_count: [N] int32, the number of views that see the point.
    """

    id: str
    split: str
    coord: NDArray[np.float32]
    color: NDArray[np.uint8] | None
    normal: NDArray[np.float32] | None
    strength: NDArray[np.float32] | None
    segment: NDArray[np.int16] | None
    instance: NDArray[np.int32] | None
    source_index: NDArray[np.int64]
    link_count: NDArray[np.int32]
    feature: NDArray[np.float32] | None
    valid: NDArray[np.bool_]

    def __getitem__(self, name: str) -> Any:
        if name not in {f.name for f in fields(self)}:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(f.name for f in fields(self))

    def __len__(self) -> int:
        return len(fields(self))
