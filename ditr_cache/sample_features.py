"""The features of one sample while its views pass through the VFM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ditr_cache.codecs import Codec, EncodedRows, concatenate_rows
from ditr_cache.lift import TokenTable, every_token, fuse
from ditr_cache.schema import LINK_ARRAYS, GeometryRecord, SampleInfo, VFMSpec
from ditr_cache.timeline import Timeline


class SampleFeatures:
    """The features of one sample of a partition while they are made. Tokens are held from its first view to its last.

    Args:
        info: what the geometry says of the sample.
        point, uv, depth: its links, points counted from the sample's first.
        spec: of the VFM.
        codec: of the rows.
        timeline: gets the time that each stage takes.
    """

    def __init__(
        self,
        info: SampleInfo,
        point: NDArray[np.uint32],
        uv: NDArray[np.uint16],
        depth: NDArray[np.float16],
        spec: VFMSpec,
        codec: Codec,
        timeline: Timeline,
    ) -> None:
        self.info, self._point, self._uv, self._depth, self._spec = info, point, uv, depth, spec
        self._codec, self._timeline = codec, timeline
        self._position = {view.id: i for i, view in enumerate(info.views)}
        self._dropped: list[str] = []
        self._table: TokenTable | None = None

    @classmethod
    def of(
        cls,
        geometry: GeometryRecord,
        position: int,
        links: Mapping[str, NDArray[Any]],
        spec: VFMSpec,
        codec: Codec,
        timeline: Timeline,
    ) -> Self:
        """The sample at that position of a geometry partition, of the arrays `LINK_ARRAYS` of the whole."""
        of, first = geometry.link_slice(position), geometry.point_slice(position).start
        point, uv, depth = (links[name][of] for name in LINK_ARRAYS)
        return cls(geometry.samples[position], point - np.uint32(first), uv, depth, spec, codec, timeline)

    @property
    def linked_views(self) -> list[str]:
        """Ids of the views that have to be embedded."""
        return [view.id for view in self.info.views if view.links]

    def put(self, view: str, tokens: torch.Tensor) -> None:
        """Fill in the tokens [rows, columns, C] of one view."""
        with self._timeline.stage("lift"):
            self._tokens(tokens.device).put(self._position[view], tokens)

    def drop(self, view: str) -> None:
        """Forget the links of a view that could not be embedded."""
        self._dropped.append(view)

    def encoded(self, device: torch.device) -> tuple[EncodedRows, NDArray[np.int32]]:
        """Rows of T tokens as the codec stores them, and index [N] or, in the layout `views`, [L]; frees the tokens."""
        with self._timeline.stage("lift"):
            table = self._tokens(device)
            self._table = None
            for view in self._dropped:
                table.drop(self._position[view])
            if self._spec.layout == "views":
                blocks, index = every_token(table)
            else:
                blocks, index = fuse(table, self._point, self._depth, self.info.points, self._spec.fuse)
        return concatenate_rows([self._encoded(block) for block in self._timeline.each("lift", blocks)]), index

    def _encoded(self, block: NDArray[np.float32]) -> EncodedRows:
        with self._timeline.stage("encode"):
            return self._codec.encode(block)

    def _tokens(self, device: torch.device) -> TokenTable:
        if self._table is None:
            per_view = [view.links for view in self.info.views]
            self._table = TokenTable(self._uv, per_view, self._spec.grid, self._spec.dim, device)
        return self._table
