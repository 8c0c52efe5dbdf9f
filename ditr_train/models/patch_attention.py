"""Attention inside patches: pieces of equal length of a sequence of voxels, cut from every sample on its own.

A sample longer than a patch is cut into patches of exactly that length; the last one is filled up with the voxels that
precede it, which it sees and whose second result is dropped. A shorter sample is one patch of its own length. Patches
of one length are computed together by torch's `scaled_dot_product_attention`, so that no row ever attends to padding
or to another sample, and nothing quadratic in the patch length is stored (except with a relative position bias).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PatchRows:
    """Where sequences of M voxels go when they are laid out in patches of L rows altogether.

    Args:
        groups: (length, number) of the patches that follow one another, longest first.
        fill: [L] int64 position in the sequence of each row.
        keep: [M] int64 row that holds the result for each position of the sequence.
    """

    groups: tuple[tuple[int, int], ...]
    fill: Tensor
    keep: Tensor

    def along(self, order: Tensor, inverse: Tensor) -> Patches:
        """The patches of one sequence of voxels.

        Args:
            order: [M] int64, the voxel at each position.
            inverse: [M] int64, the position of each voxel.
        """
        return Patches(self.groups, order[self.fill], self.keep[inverse])


@dataclass(frozen=True)
class Patches:
    """M voxels laid out in patches of L rows altogether.

    Args:
        groups: as in `PatchRows`.
        rows: [L] int64, the voxel of each row.
        results: [M] int64, the row that holds the result of each voxel.
    """

    groups: tuple[tuple[int, int], ...]
    rows: Tensor
    results: Tensor


def patch_rows(counts: Sequence[int], patch_size: int, device: torch.device) -> PatchRows:
    """Cuts sequences into patches.

    Args:
        counts: voxels of each sample, in the order in which the sequence holds them; 0 is allowed.
        patch_size: length K of a patch.
        device: of the result.
    """
    lengths = [min(count, patch_size) for count in counts]
    numbers = [-(-count // patch_size) for count in counts]
    laid_out = sorted(range(len(counts)), key=lambda sample: -lengths[sample])
    sizes = [lengths[sample] * numbers[sample] for sample in laid_out]
    firsts = dict(zip(laid_out, accumulate(sizes, initial=0), strict=False))
    starts = list(accumulate(counts, initial=0))

    total = torch.arange(sum(counts), device=device)
    keep = total + _repeat([firsts[s] - starts[s] for s in range(len(counts))], counts, device)
    position = torch.arange(sum(sizes), device=device) - _repeat([firsts[s] for s in laid_out], sizes, device)
    borrowed = position >= _repeat([counts[s] for s in laid_out], sizes, device)
    fill = position - patch_size * borrowed + _repeat([starts[s] for s in laid_out], sizes, device)

    patches = Counter[int]()
    for length, number in zip(lengths, numbers, strict=True):
        patches[length] += number
    return PatchRows(tuple(sorted(((k, n) for k, n in patches.items() if n), reverse=True)), fill, keep)


def _repeat(values: Sequence[int], repeats: Sequence[int], device: torch.device) -> Tensor:
    """[sum(repeats)] int64: each value as often as told."""
    table = torch.tensor([list(values), list(repeats)]).to(device, non_blocking=True)
    return torch.repeat_interleave(table[0], table[1], output_size=sum(repeats))


class PatchAttention(nn.Module):
    """Multi-head self-attention inside patches.

    Args:
        channels: C.
        heads: H, which divides C.
        rpe_patch_size: patch length K that sizes the table of a relative position bias; None for no bias. The bias
            takes memory of H * K numbers for each row.
    """

    def __init__(self, channels: int, heads: int, rpe_patch_size: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.rpe = None if rpe_patch_size is None else RelativePositionBias(rpe_patch_size, heads)

    def forward(self, feat: Tensor, patches: Patches, grid_coord: Tensor) -> Tensor:
        """Attention of every voxel to those of its patch.

        Args:
            feat: [M, C].
            patches: of the same voxels.
            grid_coord: [M, 3] int, of the voxels in cells of their resolution; read by the bias alone.

        Returns:
            [M, C].
        """
        # index_select, because the gradient of plain indexing sorts the index on a GPU.
        qkv = self.qkv(feat).index_select(0, patches.rows).unflatten(1, (3, self.heads, -1))
        coord = None if self.rpe is None else grid_coord.index_select(0, patches.rows)
        results, first = [], 0
        for length, number in patches.groups:
            part = slice(first, first + length * number)
            first = part.stop
            q, k, v = qkv[part].unflatten(0, (number, length)).permute(2, 0, 3, 1, 4)
            if self.rpe is None or coord is None:
                result = F.scaled_dot_product_attention(q, k, v)
            else:
                bias = self.rpe(coord[part].unflatten(0, (number, length)))
                # Scores in float32, as published.
                q, k, v = q.to(bias.dtype), k.to(bias.dtype), v.to(bias.dtype)
                with torch.autocast(feat.device.type, enabled=False):
                    result = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            results.append(result.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.proj(torch.cat(results).index_select(0, patches.results))


class RelativePositionBias(nn.Module):
    """What a pair of voxels adds to the attention score for the distances between them: a learned sum over the axes.

    Args:
        patch_size: patch length K; distances beyond 2 (4 K)^(1/3) cells count as that far.
        heads: H.
    """

    def __init__(self, patch_size: int, heads: int) -> None:
        super().__init__()
        self.reach = int((4 * patch_size) ** (1 / 3) * 2)
        # The distances -reach..reach along x, then y, then z.
        self.table = nn.Parameter(torch.empty(3 * (2 * self.reach + 1), heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, coord: Tensor) -> Tensor:
        """[P, K, 3] int cells -> [P, H, K, K] float32 bias of the row's (first) attention to the column."""
        distance = (coord[:, :, None] - coord[:, None]).clamp(-self.reach, self.reach) + self.reach
        # An embedding, because the gradient of plain indexing is slow where few rows are read many times.
        bias = [F.embedding(at, axis) for at, axis in zip(distance.unbind(dim=-1), self.table.chunk(3), strict=True)]
        return sum(bias[1:], bias[0]).permute(0, 3, 1, 2)
