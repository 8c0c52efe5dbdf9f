"""What a `PointTransformerV3` needs to know about the places of a batch's points, before they carry features.

The depth of a sample's curves follows from its own extent, where the published code takes the largest of the batch:
so a sample's result does not depend on what it is batched with, and equals the published one for a batch of one.
The published networks differ in the depth they give an extent, see `DEPTHS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditr_cache.errors import DataError
from ditr_train.models.grid_hierarchy import MAX_COORDINATE, GridHierarchy, morton_keys
from ditr_train.models.patch_attention import Patches, patch_rows
from ditr_train.models.serialization import cube_depth, curve_codes, invert
from ditr_train.models.sparse_conv import SparseTensor, sparse_tensor

# Variant -> depth [B] of the curves of samples whose highest coordinate at resolution 0 is [B], at a resolution.
DEPTHS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ptv3": lambda highest, level: cube_depth(highest + 1) - level,
    "ptv3-v1.5.1": lambda highest, level: cube_depth(highest) - level,
    "sonata": lambda highest, level: cube_depth((highest >> level) + 1),
}


@dataclass(frozen=True)
class Resolution:
    """The M_l voxels of one resolution.

    Args:
        voxels: sparse tensor without channels; it keeps the neighbours that the first convolution finds.
        patches: of each curve that the blocks of this resolution use, in their order.
        parent: [M_l] int64 the enclosing voxel of the next resolution; None for the coarsest.
    """

    voxels: SparseTensor
    patches: tuple[Patches, ...]
    parent: Tensor | None

    @property
    def sites(self) -> Tensor:
        """[M_l, 4] int32 (batch, and three coordinates in cells of this resolution)."""
        return self.voxels.indices


@dataclass(frozen=True)
class PreparedPatches:
    """The voxels of a batch at all resolutions.

    Args:
        resolutions: from fine to coarse; the voxels of resolution 0 are the batch's points.
        hierarchy: of the same voxels.
    """

    resolutions: tuple[Resolution, ...]
    hierarchy: GridHierarchy


@torch.no_grad()
def prepare_patches(
    sites: Tensor,
    batch_size: int,
    *,
    curves: Sequence[Sequence[str]],
    patch_size: int,
    variant: str,
) -> PreparedPatches:
    """Finds voxels, curves and patches.

    Args:
        sites: [N, 4] int32 (batch, and three coordinates), one unique voxel per point, N >= 1.
        batch_size: number of samples.
        curves: the curves wanted, for each resolution.
        patch_size: voxels of a patch.
        variant: of `DEPTHS`.

    Raises:
        DataError: coordinates that the curves or the convolutions cannot hold.
    """
    highest = sites.new_zeros(batch_size).scatter_reduce(0, sites[:, 0].long(), sites[:, 1:].amax(dim=1), "amax")
    if (top := int(highest.max())) >= MAX_COORDINATE:  # here for a GPU, too, where the keys would mix up voxels
        raise DataError(
            f"voxel coordinates must be below {MAX_COORDINATE}, got {top}; use a larger grid size or crop the samples"
        )
    levels, parents = _nest(sites, len(curves))
    depths = [DEPTHS[variant](highest, level) for level in range(len(levels))]
    depth = torch.cat([of_sample[level[:, 0]] for of_sample, level in zip(depths, levels, strict=True)])
    wanted = sorted({curve for of_level in curves for curve in of_level})
    # All resolutions at once: for a GPU the number of operations counts, not their size.
    codes = curve_codes(torch.cat(levels), wanted, depth).split([len(level) for level in levels], dim=1)
    counts = torch.stack([torch.bincount(level[:, 0], minlength=batch_size) for level in levels]).tolist()

    resolutions = []
    for level, sites_of_level in enumerate(levels):
        rows = patch_rows(counts[level], patch_size, sites.device)
        patches = []
        for curve in curves[level]:
            order = codes[level][wanted.index(curve)].argsort()
            patches.append(rows.along(order, invert(order)))
        voxels = sparse_tensor(
            torch.empty(len(sites_of_level), 0, device=sites.device),
            sites_of_level[:, 1:],
            sites_of_level[:, 0],
            batch_size,
            num_halvings=0,
        )
        resolutions.append(Resolution(voxels, tuple(patches), parents[level]))
    return PreparedPatches(tuple(resolutions), GridHierarchy(sites))


def _nest(sites: Tensor, num_levels: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """Sites of each resolution, the coarser ones sorted by their Morton keys, and each site's parent in the next."""
    keys, order = morton_keys(sites).sort()
    levels, parents = [sites], []
    finer = sites[order]
    for _ in range(1, num_levels):
        keys, parent, counts = torch.unique_consecutive(keys >> 3, return_inverse=True, return_counts=True)
        finer = finer[counts.cumsum(0) - counts]
        finer = torch.cat([finer[:, :1], finer[:, 1:] >> 1], dim=1)
        levels.append(finer)
        parents.append(parent)
    parents[0] = parents[0][invert(order)]
    return levels, [*parents, None]
