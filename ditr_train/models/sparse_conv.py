"""Sparse convolutions that run unchanged on CPU and GPU; the only importer of spconv.

spconv picks its algorithm when a layer is built, for a GPU, and knows float32 and (on a GPU) float16. Here a layer
chooses when it runs: `ConvAlgo.Native` on the CPU, spconv's own choice on a GPU. Weights have the same layout for
both, so checkpoints move freely. Under fp16 autocast on a GPU the convolutions run in float16; under any other
autocast (bfloat16, or on the CPU) they run in float32, because spconv would fail or silently use float16. On a CPU
spconv finds neighbours with 32-bit voxel numbers, on a GPU with as many bits as the volume needs; where 32 are too few,
`index_pairs` takes its place.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditr_cache.errors import DataError, UsageError
from ditr_train.models.index_pairs import IndexPairs, strided_pairs, submanifold_pairs

# torch tells about a function that spconv calls whenever it makes a tensor; a user can do nothing about it.
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: not record.getMessage().startswith("is_fx_tracing will return true")
)

try:
    with warnings.catch_warnings():
        # spconv-cu120 2.3.6 decorates with the old names of torch's AMP.
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        import spconv.pytorch as spconv
        from cumm import tensorview
        from spconv.core import ConvAlgo
        from spconv.cppconstants import CPU_ONLY_BUILD
        from spconv.pytorch import ops as spconv_ops
        from spconv.pytorch.cppcore import torch_tensor_to_tv
except ImportError as error:
    raise UsageError(
        f"SparseUNet needs spconv, which cannot be imported ({error}). Install it with the package: "
        "pip install 'ditr[train,cu120]' (Python 3.11) or 'ditr[train,cu126]' (Python 3.11 and newer); both also run "
        "without a GPU. Install one of them only, they share their module names"
    ) from error

_SPCONV_CPU_VOXELS = 2**31 - 1
_MAX_EDGE = 2**31 - 1
# The keys have 63 bits; three stay free for the empty voxels that `index_pairs` adds along the axes.
_MAX_VOXELS = 2**60

SparseTensor = spconv.SparseConvTensor
"""Features [N, C] at sites [N, 4] int32 (batch, and three voxel coordinates), unique."""


def tensorview_from_numpy(array: NDArray[Any]) -> Any:
    """cumm's copy of a numpy array, made through torch.

    cumm before 0.5 reads numpy's C structures, whose layout numpy 2 changed, and takes the whole process down.

    Args:
        array: any shape; an integer or floating dtype. uint32 keeps its type, for which torch has no arithmetic.
    """
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype == np.uint32:
        return torch_tensor_to_tv(torch.from_numpy(contiguous.view(np.int32)), dtype=tensorview.uint32).clone()
    return torch_tensor_to_tv(torch.from_numpy(contiguous)).clone()


def _exact_on_cpu(search: Callable[..., IndexPairs]) -> Callable[..., IndexPairs]:
    """spconv's `get_indice_pairs` that keeps sites of large volumes apart on a CPU too."""

    @functools.wraps(search)
    def get_indice_pairs(
        indices: Tensor,
        batch_size: int,
        spatial_shape: Sequence[int],
        algo: Any,
        ksize: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        out_padding: Sequence[int],
        subm: bool = False,
        transpose: bool = False,
        num_out_act_bound: int = -1,
    ) -> IndexPairs:
        if indices.is_cuda or transpose or batch_size * math.prod(spatial_shape) <= _SPCONV_CPU_VOXELS:
            return search(
                indices, batch_size, spatial_shape, algo, ksize, stride, padding, dilation, out_padding, subm,
                transpose, num_out_act_bound,
            )  # fmt: skip
        if subm:
            return submanifold_pairs(indices, spatial_shape, ksize, dilation)
        out_shape = spconv_ops.get_conv_output_size(spatial_shape, ksize, stride, padding, dilation)
        return strided_pairs(indices, out_shape, ksize, stride, padding, dilation)

    return get_indice_pairs


def _repair_spconv() -> None:
    import cumm

    cumm_version = tuple(int(part) for part in cumm.__version__.split(".")[:2])
    if cumm_version < (0, 5) and int(np.__version__.split(".")[0]) >= 2:
        tensorview.from_numpy = tensorview_from_numpy
    spconv_ops.get_indice_pairs = _exact_on_cpu(spconv_ops.get_indice_pairs)
    if CPU_ONLY_BUILD:
        # Its backward asks for a CUDA stream, which a torch without CUDA refuses and the CPU kernels never use.
        spconv_ops.get_current_stream = lambda: 0


_repair_spconv()


class _FollowsDevice:
    """Mixin of spconv's convolutions: algorithm and precision follow the input's device and the autocast in force."""

    algo: Any
    weight: Tensor
    bias: Tensor | None
    training: bool
    name: str | None
    _sparse_unique_name: str
    _conv_forward: Callable[..., Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gpu_algo = self.algo

    def forward(self, input: Any) -> Any:
        """Sparse tensor -> sparse tensor.

        Raises:
            UsageError: weights that are not float32.
        """
        if self.weight.dtype != torch.float32:
            raise UsageError(
                f"sparse convolutions keep float32 weights, got {self.weight.dtype}; leave the model in float32 and "
                "run it under torch.autocast"
            )
        device = input.features.device
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
                sparse_unique_name=self._sparse_unique_name,
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
