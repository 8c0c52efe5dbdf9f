"""Sum and maximum over segments of rows; the only importer of torch_scatter.

The sum uses torch_scatter where it is installed and torch otherwise, with the same results. The maximum is torch's
own everywhere: torch_scatter's takes several times as long on a CPU.
"""

from __future__ import annotations

import logging
import warnings
from types import ModuleType

import torch
from torch import Tensor

from ditr_cache.errors import DataError

logger = logging.getLogger(__name__)


def _import_torch_scatter() -> ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_scatter
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("torch_scatter was built for another torch than %s (%s): not used", torch.__version__, error)
        return None
    return torch_scatter


_torch_scatter = _import_torch_scatter()


def segment_sum(src: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum of the rows of each segment, zero for an empty one.

    Args:
        src: [N, C] float.
        index: [N] int64 segment of each row, in [0, size), in any order.
        size: number of segments S.

    Returns:
        [S, C] of `src`'s dtype.

    Raises:
        DataError: `src` or `index` of another shape.
    """
    _check(src, index)
    if _torch_scatter is not None:
        return _torch_scatter.scatter(src, index, dim=0, dim_size=size, reduce="sum")
    return src.new_zeros(size, src.shape[1]).index_add(0, index, src)


def segment_max(src: Tensor, index: Tensor, size: int) -> Tensor:
    """Maximum per channel of the rows of each segment, zero for an empty one; arguments and errors of `segment_sum`.

    Rows that share a maximum share its gradient in equal parts.
    """
    _check(src, index)
    out = src.new_zeros(size, src.shape[1])
    return out.scatter_reduce(0, index[:, None].expand_as(src), src, reduce="amax", include_self=False)


def _check(src: Tensor, index: Tensor) -> None:
    if src.ndim != 2 or index.shape != src.shape[:1]:
        raise DataError(
            f"segments need rows [N, C] and one index [N] for each, got {list(src.shape)} and {list(index.shape)}"
        )
