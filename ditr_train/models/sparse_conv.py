"""Sparse convolutions that run unchanged on CPU and GPU, by whichever library `sparse_backend` chose.

spconv picks its algorithm when a layer is built, for a GPU, and knows float32 and (on a GPU) float16. Here a layer
chooses when it runs: `ConvAlgo.Native` on the CPU, spconv's own choice on a GPU. Weights have the same layout for
both, so checkpoints move freely. Under fp16 autocast on a GPU the convolutions run in float16; under any other
autocast (bfloat16, or on the CPU) they run in float32, because spconv would fail or silently use float16. On a CPU
spconv finds neighbours with 32-bit voxel numbers, on a GPU with as many bits as the volume needs; where 32 are too few,
`index_pairs` takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditr_cache.errors import DataError, UsageError
from ditr_train.models.sparse_backend import BACKEND, RUNS_ON_CPU, ConvAlgo, spconv

_MAX_EDGE = 2**31 - 1
# The keys have 63 bits; three stay free for the empty voxels that `index_pairs` adds along the axes.
_MAX_VOXELS = 2**60

SparseTensor = spconv.SparseConvTensor
"""Features [N, C] at sites [N, 4] int32 (batch, and three voxel coordinates), unique."""


class _FollowsDevice:
    """Mixin of spconv's convolutions: algorithm and precision follow the input's device and the autocast in force."""

    algo: Any
    weight: Tensor
    bias: Tensor | None
    training: bool
    name: str | None
    _conv_forward: Callable[..., Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gpu_algo = self.algo

    def forward(self, input: Any) -> Any:
        """Sparse tensor -> sparse tensor.

        Raises:
            UsageError: weights that are not float32, or a library that computes on a GPU only.
        """
        device = input.features.device
        if device.type == "cpu" and not RUNS_ON_CPU:
            raise UsageError(
                f"{BACKEND} computes on a GPU only, got points on the CPU; install 'ditr[cu120]' or 'ditr[cu126]', "
                "which run on both, or choose --device cuda"
            )
        if self.weight.dtype != torch.float32:
            raise UsageError(
                f"sparse convolutions keep float32 weights, got {self.weight.dtype}; leave the model in float32 and "
                "run it under torch.autocast"
            )
        self.algo = self.gpu_algo if device.type == "cuda" else ConvAlgo.Native
        dtype = _compute_dtype(device)
        with torch.autocast(device.type, enabled=False):
            # The weight is cast here because spconv's evaluation path, unlike its training path, never casts it.
            return self._conv_forward(
                self.training,
                input.replace_feature(input.features.to(dtype)),
                self.weight.to(dtype),
                None if self.bias is None else self.bias.to(dtype),
                name=self.name,
            )


def _compute_dtype(device: torch.device) -> torch.dtype:
    half = (
        device.type == "cuda"
        and torch.is_autocast_enabled("cuda")
        and torch.get_autocast_dtype("cuda") == torch.float16
    )
    return torch.float16 if half else torch.float32


class SubMConv3d(_FollowsDevice, spconv.SubMConv3d):
    """Submanifold convolution: output sites are the input sites."""


class SparseConv3d(_FollowsDevice, spconv.SparseConv3d):
    """Strided convolution: output sites are those that the kernel reaches from an input site."""


class SparseInverseConv3d(_FollowsDevice, spconv.SparseInverseConv3d):
    """Transposed convolution back onto the input sites of the `SparseConv3d` of the same `indice_key`."""


def sparse_tensor(feat: Tensor, grid_coord: Tensor, batch_index: Tensor, batch_size: int, num_halvings: int) -> Any:
    """Sparse tensor whose sites after l kernel-2 stride-2 convolutions are exactly the unique `grid_coord >> l`.

    Args:
        feat: [N, C] float, N >= 1.
        grid_coord: [N, 3] integer voxel coordinates >= 0, unique within a sample.
        batch_index: [N] integer sample of each point.
        batch_size: number of samples.
        num_halvings: how often the tensor will be down-sampled.

    Raises:
        DataError: coordinates too far apart for voxel numbers of 64 bits.
    """
    # An edge that does not divide evenly would lose the sites of its last, incomplete cell.
    cell = 1 << num_halvings
    shape = [(int(edge) // cell + 1) * cell for edge in grid_coord.amax(dim=0).tolist()]
    if max(shape) > _MAX_EDGE or batch_size * math.prod(shape) > _MAX_VOXELS:
        raise DataError(
            f"a batch may span at most {_MAX_VOXELS} voxels and {_MAX_EDGE} along an axis, got {batch_size} samples "
            f"of {' x '.join(map(str, shape))} voxels; remove stray points, use a larger grid size or crop the samples"
        )
    sites = torch.cat([batch_index[:, None].int(), grid_coord.int()], dim=1).contiguous()
    return SparseTensor(feat, sites, shape, batch_size)
