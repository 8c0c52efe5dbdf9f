"""Neighbours of sparse sites found with 64-bit keys, in the form in which spconv's convolutions take them.

An index pair (input row, output row) of kernel position k says that the weights of k carry that input to that output.
spconv's own search on a CPU counts voxels with 32 bits, so that in a large volume sites far apart, or of two samples,
become neighbours; this one is exact up to 2^63 voxels. On small volumes both return the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

IndexPairs = tuple[Tensor, Tensor, Tensor]
"""Output sites [M, 4] int32; pairs [2, K, N] int32 of the K kernel positions, z fastest, each filled up with -1; how
many there are of each [K] int32."""


def submanifold_pairs(
    sites: Tensor, shape: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]
) -> IndexPairs:
    """Index pairs of a convolution whose output sites are its input sites.

    Args:
        sites: [N, 4] int32 (batch, and three coordinates in [0, shape)), unique.
        shape: edges of the volume in voxels.
        kernel_size: odd edges of the kernel.
        dilation: voxels from one kernel position to the next.

    Returns:
        As spconv does, counts only of the positions before the centre; those behind it mirror them.
    """
    positions = math.prod(kernel_size)
    pairs, counts = _no_pairs(sites, positions)
    pairs[:, positions // 2] = torch.arange(len(sites))
    reach = [(k // 2) * d for k, d in zip(kernel_size, dilation, strict=True)]
    # Empty voxels behind every row, so that a step over the border leads to a key that no site has.
    strides = _strides([edge + r for edge, r in zip(shape, reach, strict=True)])
    # Searched in the order of the keys, a search finds what it reads in the processor's cache.
    keys, order = _keys(sites, strides).sort()
    for k, corner in enumerate(itertools.islice(_positions(kernel_size, dilation), positions // 2)):
        wanted = keys - sum((c - r) * stride for c, r, stride in zip(corner, reach, strides[1:], strict=True))
        place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        found = keys[place] == wanted
        output = torch.full_like(order, -1)
        output[order[found]] = order[place[found]]
        rows = (output >= 0).nonzero().squeeze(1)
        counts[k] = len(rows)
        pairs[0, k, : len(rows)] = pairs[1, -1 - k, : len(rows)] = rows.int()
        pairs[1, k, : len(rows)] = pairs[0, -1 - k, : len(rows)] = output[rows].int()
    return sites, pairs, counts


def strided_pairs(
    sites: Tensor,
    out_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> IndexPairs:
    """Index pairs of a convolution whose output sites are those that the kernel reaches from an input site.

    Args:
        sites: [N, 4] int32 (batch, and three coordinates), unique.
        out_shape: edges of the output's volume in voxels.
        kernel_size: edges of the kernel.
        stride: input voxels from one output voxel to the next.
        padding: empty voxels in front of the input.
        dilation: voxels from one kernel position to the next.

    Returns:
        Output sites in the order in which they are met, one kernel position after the other.
    """
    pairs, counts = _no_pairs(sites, math.prod(kernel_size))
    steps, edges = torch.tensor(stride), torch.tensor(out_shape)
    rows, outputs = [], []
    for k, corner in enumerate(_positions(kernel_size, dilation)):
        first = sites[:, 1:].long() + torch.tensor(padding) - torch.tensor(corner)
        output = first.div(steps, rounding_mode="floor")
        reached = ((first == output * steps) & (output >= 0) & (output < edges)).all(dim=1)
        rows.append(reached.nonzero().squeeze(1))
        outputs.append(torch.cat([sites[reached, :1].long(), output[reached]], dim=1))
        counts[k] = len(rows[-1])
    output = torch.cat(outputs)
    found, place = _keys(output, _strides(out_shape)).unique(return_inverse=True)
    number = torch.arange(len(output))
    first_met = number.new_full((len(found),), len(output)).scatter_reduce(0, place, number, "amin").sort()
    rank = torch.empty_like(found).index_put((first_met.indices,), number[: len(found)])[place]
    for k, (inputs, ranks) in enumerate(zip(rows, rank.split(counts.tolist()), strict=True)):
        pairs[0, k, : len(inputs)] = inputs.int()
        pairs[1, k, : len(inputs)] = ranks.int()
    return output[first_met.values].int(), pairs, counts


def _no_pairs(sites: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    return sites.new_full((2, positions, len(sites)), -1), sites.new_zeros(positions)


def _positions(kernel_size: Sequence[int], dilation: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Places of the kernel's weights in voxels from its first corner, in spconv's order."""
    return itertools.product(*(range(0, k * d, d) for k, d in zip(kernel_size, dilation, strict=True)))


def _strides(shape: Sequence[int]) -> list[int]:
    """Steps of the keys from one sample, and from one voxel along each axis, to the next."""
    return [math.prod(shape[axis:]) for axis in range(len(shape) + 1)]


def _keys(sites: Tensor, strides: Sequence[int]) -> Tensor:
    return (sites.long() * torch.tensor(strides)).sum(dim=1)
