"""The library behind the sparse convolutions, chosen here and imported nowhere else.

spconv (of the extras cu120 or cu126; GPU and CPU) where it is installed, else spconv-triton (extra triton; GPU only),
which has spconv's classes and weights. `DITR_SPARSE_BACKEND=spconv` or `=spconv_triton` chooses by name.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.models.index_pairs import IndexPairs, strided_pairs, submanifold_pairs

# torch tells about a function that spconv calls whenever it makes a tensor; a user can do nothing about it.
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: not record.getMessage().startswith("is_fx_tracing will return true")
)

_NAMES = ("spconv", "spconv_triton")
_SPCONV_CPU_VOXELS = 2**31 - 1


def _import_backend() -> tuple[str, Any]:
    asked = os.environ.get("DITR_SPARSE_BACKEND", "")
    if asked and asked not in _NAMES:
        raise UnknownNameError.of("sparse backend in DITR_SPARSE_BACKEND", asked, _NAMES)
    failures = []
    for name in (asked,) if asked else _NAMES:
        try:
            with warnings.catch_warnings():
                # spconv-cu120 2.3.6 decorates with the old names of torch's AMP.
                warnings.simplefilter("ignore", category=FutureWarning)
                warnings.simplefilter("ignore", category=DeprecationWarning)
                return name, importlib.import_module(f"{name}.pytorch")
        except ImportError as error:
            failures.append(f"{name}: {error}")
    raise UsageError(
        f"this backbone needs a library of sparse convolutions, and none can be imported ({'; '.join(failures)}). "
        "Install one with the package: pip install 'ditr[train,cu120]' (Python 3.11) or 'ditr[train,cu126]' (Python "
        "3.11 and newer), which also run without a GPU, or 'ditr[train,triton]' for a GPU. Install one of cu120 and "
        "cu126 only, they share their module names"
    )


BACKEND, spconv = _import_backend()
"""Name of the library, and its module of torch layers."""

ConvAlgo: Any = importlib.import_module(f"{BACKEND}.core").ConvAlgo
ops: Any = importlib.import_module(f"{BACKEND}.pytorch.ops")
RUNS_ON_CPU = BACKEND == "spconv"
CPU_ONLY = RUNS_ON_CPU and bool(importlib.import_module("spconv.cppconstants").CPU_ONLY_BUILD)


def tensorview_from_numpy(array: NDArray[Any]) -> Any:
    """cumm's copy of a numpy array, made through torch.

    cumm before 0.5 reads numpy's C structures, whose layout numpy 2 changed, and takes the whole process down.

    Args:
        array: any shape; an integer or floating dtype. uint32 keeps its type, for which torch has no arithmetic.
    """
    contiguous = np.ascontiguousarray(array)
    to_tensorview = importlib.import_module("spconv.pytorch.cppcore").torch_tensor_to_tv
    if contiguous.dtype == np.uint32:
        uint32 = importlib.import_module("cumm.tensorview").uint32
        return to_tensorview(torch.from_numpy(contiguous.view(np.int32)), dtype=uint32).clone()
    return to_tensorview(torch.from_numpy(contiguous)).clone()


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
        out_shape = ops.get_conv_output_size(spatial_shape, ksize, stride, padding, dilation)
        return strided_pairs(indices, out_shape, ksize, stride, padding, dilation)

    return get_indice_pairs


def _repair_spconv() -> None:
    cumm: Any = importlib.import_module("cumm")
    cumm_version = tuple(int(part) for part in cumm.__version__.split(".")[:2])
    if cumm_version < (0, 5) and int(np.__version__.split(".")[0]) >= 2:
        tensorview: Any = importlib.import_module("cumm.tensorview")
        tensorview.from_numpy = tensorview_from_numpy
    ops.get_indice_pairs = _exact_on_cpu(ops.get_indice_pairs)
    if CPU_ONLY:
        # Its backward asks for a CUDA stream, which a torch without CUDA refuses and the CPU kernels never use.
        ops.get_current_stream = lambda: 0


if BACKEND == "spconv":
    _repair_spconv()
