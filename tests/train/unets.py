"""A `SparseUNet` on sparse tensors that a test made itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditr_train.models.backbone import NoTerms, Terms
from ditr_train.models.grid_hierarchy import GridHierarchy
from ditr_train.models.sparse_unet import PreparedVoxels, SparseUNet


def unet_rows(net: SparseUNet, voxels: Any, terms: Terms | None = None) -> Tensor:
    """[N, out_channels] of a sparse tensor's voxels."""
    prepared = PreparedVoxels(voxels, GridHierarchy(voxels.indices))
    return net(prepared, voxels.features, NoTerms() if terms is None else terms)
