"""From the links of a sample to one row, or the mean of the rows, of each point (layout `views`): pure arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkedRows:
    """Which row of a table of tokens each link sees. Links stand view after view, views in time order.

    Args:
        row: [L] integer row of each link; -1 where its view has no features.
        point: [L] integer point of each link; no point occurs twice in one view.
        ends: [V] integer number of links up to the end of each view.
        points: number of points N.
    """

    row: NDArray[np.integer]
    point: NDArray[np.integer]
    ends: NDArray[np.integer]
    points: int

    def last(self) -> NDArray[np.int32]:
        """[N] row of each point in the last view that sees it (DITR at validation), -1 where none does."""
        return self._overwrite(range(len(self.ends)))

    def random(self, rng: np.random.Generator) -> NDArray[np.int32]:
        """[N] row of each point in one of the views that see it, -1 where none does.

        DITR's training: views come in random order and later ones overwrite earlier ones. Every view of a point is
        equally likely, and neighbours mostly agree on theirs.
        """
        return self._overwrite(rng.permutation(len(self.ends)))

    def nearest(self, depth: NDArray[np.floating]) -> NDArray[np.int32]:
        """[N] row of each point in the closest view, of equally close ones the last; -1 where no view sees it.

        Args:
            depth: [L] metres along the z of each link's camera.
        """
        chosen = np.full(self.points, -1, dtype=np.int32)
        least = np.full(self.points, np.inf, dtype=depth.dtype)
        for view in range(len(self.ends)):
            point, row, of_links = self._links(view)
            z = depth[of_links]
            closer = z <= least[point]
            least[point[closer]] = z[closer]
            chosen[point[closer]] = row[closer]
        return chosen

    def mean(self, tokens: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Mean over all views of each point.

        Args:
            tokens: [T, C] decoded rows.

        Returns:
            [N, C] float32, zero where no view sees the point, and [N] bool whether one does.
        """
        total = np.zeros((self.points, tokens.shape[1]), dtype=np.float32)
        count = np.zeros(self.points, dtype=np.float32)
        for view in range(len(self.ends)):
            point, row, _ = self._links(view)
            total[point] += tokens[row]
            count[point] += 1
        total /= np.maximum(count, 1)[:, None]
        return total, count > 0

    def _overwrite(self, views: Iterable[int]) -> NDArray[np.int32]:
        chosen = np.full(self.points, -1, dtype=np.int32)
        for view in views:
            point, row, _ = self._links(view)
            chosen[point] = row
        return chosen

    def _links(self, view: int) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.int64]]:
        """Points, rows and positions of the links of one view that have a row."""
        start = int(self.ends[view - 1]) if view else 0
        kept = start + np.flatnonzero(self.row[start : int(self.ends[view])] >= 0)
        return self.point[kept], self.row[kept], kept
