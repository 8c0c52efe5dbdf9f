"""Which sites of the coarser resolutions hold a point that is seen, so that VFM features can be pooled to them.

`Hierarchy` is what a backbone offers; `OccupiedSites` what it answers for the points that have a feature in one batch.
`LinkedHierarchy` is for backbones that know the enclosing site of every site; `grid_hierarchy` has the one of voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ditr_cache.errors import DataError


@dataclass(frozen=True)
class OccupiedSites:
    """Sites that hold at least one seen point: V_l of them at resolution l = 0, 1, ...

    Args:
        points: [V_0] the seen points, such that those of one site of resolution 1 follow one another.
        parents: for each resolution but the last [V_l], the places of the enclosing occupied sites in the next.
        sizes: V_l of each resolution.
        shares: for each resolution [V_l, 1] float32 in (0, 1], the part of a site's points that is seen; None where
            it was not asked for.
        find: (resolution, all its sites [M_l, ...] in the backbone's order) -> [V_l] which of them are the occupied.
    """

    points: Tensor
    parents: list[Tensor]
    sizes: list[int]
    shares: list[Tensor] | None
    find: Callable[[int, Tensor], Tensor]

    def places(self, level: int, sites: Tensor) -> Tensor:
        """[V_l] the places of the occupied sites among all `sites` [M_l, ...] of their resolution."""
        return self.points if level == 0 else self.find(level, sites)


class Hierarchy(Protocol):
    """Nested sites of one batch."""

    @property
    def num_points(self) -> int:
        """N, sites of resolution 0."""

    def occupied(self, seen: Tensor, num_levels: int, *, shares: bool = False) -> OccupiedSites:
        """The sites that hold seen points.

        Args:
            seen: [N] bool, of the points of resolution 0.
            num_levels: resolutions wanted, at least 1.
            shares: also find which part of each site's points is seen.

        Raises:
            DataError: points that the hierarchy cannot hold.
        """


class LinkedHierarchy:
    """Sites whose enclosing sites are listed.

    Args:
        parents: for each resolution but the coarsest [M_l] int64, the enclosing site of each site in the next.
        sizes: M_l of every resolution.

    Raises:
        DataError: lists that do not fit the sizes.
    """

    def __init__(self, parents: Sequence[Tensor], sizes: Sequence[int]) -> None:
        if [len(parent) for parent in parents] != list(sizes[:-1]):
            raise DataError(
                f"nested sites need one parent per site: {list(sizes)} sites, {[len(p) for p in parents]} parents"
            )
        self.parents, self.sizes = list(parents), list(sizes)

    @property
    def num_points(self) -> int:
        """See `Hierarchy`."""
        return self.sizes[0]

    @torch.no_grad()
    def occupied(self, seen: Tensor, num_levels: int, *, shares: bool = False) -> OccupiedSites:
        """See `Hierarchy`."""
        points = seen.nonzero().squeeze(1)
        if num_levels > 1:
            points = points[self.parents[0][points].argsort(stable=True)]
        found, parents = [points], []
        for parent in self.parents[: num_levels - 1]:
            coarser, place = torch.unique(parent[found[-1]], return_inverse=True)
            found.append(coarser)
            parents.append(place)
        return OccupiedSites(
            points=points,
            parents=parents,
            sizes=[len(sites) for sites in found],
            shares=self._shares(seen, found) if shares else None,
            find=lambda level, sites: found[level],
        )

    def _shares(self, seen: Tensor, found: Sequence[Tensor]) -> list[Tensor]:
        visible, everything = seen.float(), torch.ones(len(seen), device=seen.device)
        shares = [(visible / everything)[found[0], None]]
        for parent, size, sites in zip(self.parents, self.sizes[1:], found[1:], strict=False):
            visible, everything = (
                count.new_zeros(size).index_add_(0, parent, count) for count in (visible, everything)
            )
            shares.append((visible / everything)[sites, None])
        return shares
