"""`GridHierarchy`: nested voxels, found from the voxels of resolution 0 alone.

Morton keys are sorted once: the key of a coarser voxel is the finer one's without its last three bits, so that the
children of a voxel stay neighbours at every resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditr_cache.errors import DataError
from ditr_train.models.hierarchy import OccupiedSites

_AXIS_BITS = 16
MAX_COORDINATE = 1 << _AXIS_BITS
"""One more than the largest coordinate of a voxel that its key can hold."""
_MAX_SAMPLES = 1 << (63 - 3 * _AXIS_BITS)
# Steps that move the bits of a 16-bit number three places apart: bytes, then nibbles, pairs and single bits.
_SPREAD = ((16, 0xFF0000FF), (8, 0xF00F00F00F), (4, 0xC30C30C30C3), (2, 0x249249249249))


class GridHierarchy:
    """Sites that are voxels: those of resolution l are the unique `grid_coord >> l`.

    Args:
        sites: [N, 4] integer (batch, and three coordinates), one unique voxel of resolution 0 per point.
    """

    def __init__(self, sites: Tensor) -> None:
        self.sites = sites

    @property
    def num_points(self) -> int:
        """See `Hierarchy`."""
        return len(self.sites)

    @torch.no_grad()
    def occupied(self, seen: Tensor, num_levels: int, *, shares: bool = False) -> OccupiedSites:
        """See `Hierarchy`. Raises `DataError` for coordinates too large for the voxel keys."""
        points = seen.nonzero().squeeze(1)
        finest, order = morton_keys(self.sites[points]).sort()
        keys, parents = [finest], []
        for _ in range(1, num_levels):
            coarser, parent = torch.unique_consecutive(keys[-1] >> 3, return_inverse=True)
            keys.append(coarser)
            parents.append(parent)
        found = None
        if shares:
            everything = morton_keys(self.sites).sort().values
            found = [_inside(finest, k, level) / _inside(everything, k, level) for level, k in enumerate(keys)]

        def find(level: int, sites: Tensor) -> Tensor:
            site_keys, order = morton_keys(sites, level).sort()
            return order[torch.searchsorted(site_keys, keys[level])]

        return OccupiedSites(points[order], parents, [len(k) for k in keys], found, find)


def _inside(finest: Tensor, keys: Tensor, level: int) -> Tensor:
    """[V, 1] how many of the sorted keys of resolution 0 lie in each voxel of resolution `level`."""
    first = keys << (3 * level)
    last = first | ((1 << (3 * level)) - 1)
    return (torch.searchsorted(finest, last, right=True) - torch.searchsorted(finest, first))[:, None]


def morton_keys(sites: Tensor, level: int = 0) -> Tensor:
    """Sort keys of voxels: samples one after the other, and within one along the Z curve.

    Args:
        sites: [M, 4] integer (batch, and three coordinates in [0, 2^16)).
        level: resolution of the sites.

    Returns:
        [M] int64, unique for unique sites of one level; `key >> 3` is the key of the enclosing site of the next level.

    Raises:
        DataError: coordinates or batches beyond the keys' range (seen on the CPU only).
    """
    if sites.device.type == "cpu" and len(sites):
        high = sites.amax(dim=0).tolist()
        if int(sites.amin()) < 0 or high[0] >= _MAX_SAMPLES or max(high[1:]) >= MAX_COORDINATE:
            raise DataError(
                f"voxel coordinates must be in [0, {MAX_COORDINATE}) and batches in [0, {_MAX_SAMPLES}), got up to "
                f"{high}; use a larger grid size or crop the samples"
            )
    axes = sites[:, 1:].long()
    for shift, mask in _SPREAD:
        axes = (axes | (axes << shift)) & mask
    batch = sites[:, 0].long() << (3 * (_AXIS_BITS - level))
    return batch | axes[:, 0] | (axes[:, 1] << 1) | (axes[:, 2] << 2)
