"""Tokens + links -> rows: one per visible point (layout `fused`), or every token that a link sees (`views`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ditr_cache.errors import UnknownNameError
from ditr_cache.geometry import patch_index
from ditr_cache.views import LinkedRows

FUSE = ("mean", "last", "nearest")
"""How a point's views are reduced: the mean, the last in time (DITR at validation), or the closest camera."""

_ROWS_PER_STEP = 65536


class TokenTable:
    """Every token of a partition that at least one link sees, and which link sees which.

    Rows are reserved from the links before the VFM runs, so memory is known beforehand: one row per linked token.

    Args:
        uv: [L, 2] uint16 link fractions of all views, one view after the other.
        links_per_view: number of links of each view.
        grid: (rows, columns) of tokens.
        dim: width C of a token.
        device: where the table lives.
    """

    def __init__(
        self,
        uv: NDArray[np.uint16],
        links_per_view: Sequence[int],
        grid: tuple[int, int],
        dim: int,
        device: torch.device,
    ) -> None:
        self.link_row = np.full(len(uv), -1, dtype=np.int32)
        """[L] row of each link; -1 for links of views that were dropped."""
        self.ends = np.cumsum(links_per_view, dtype=np.int64)
        """[V] number of links up to the end of each view."""
        self._tokens: list[NDArray[np.int64]] = []
        self._starts = [0]
        for view in range(len(links_per_view)):
            part = self._links(view)
            tokens, inverse = np.unique(patch_index(uv[part], grid), return_inverse=True)
            self.link_row[part] = self._starts[-1] + inverse
            self._tokens.append(tokens)
            self._starts.append(self._starts[-1] + len(tokens))
        self.rows = torch.zeros((self._starts[-1], dim), dtype=torch.float32, device=device)
        """[T, C] float32."""

    def put(self, view: int, tokens: torch.Tensor) -> None:
        """Fill in the tokens [rows, columns, C] of one view."""
        wanted = torch.from_numpy(self._tokens[view]).to(tokens.device)
        self.rows[self._starts[view] : self._starts[view + 1]] = tokens.flatten(0, 1)[wanted]

    def drop(self, view: int) -> None:
        """Forget the links of a view that could not be embedded."""
        self.link_row[self._links(view)] = -1

    def _links(self, view: int) -> slice:
        return slice(int(self.ends[view - 1]) if view else 0, int(self.ends[view]))


def every_token(table: TokenTable) -> tuple[Iterator[NDArray[np.float32]], NDArray[np.int32]]:
    """Every token that a link sees, once: nothing is reduced.

    Returns:
        rows [T, C] float32 in blocks, in the order of the views and of the tokens in each, and index [L] int32, the row
        of each link, -1 for links of views that were dropped.
    """
    used = np.zeros(len(table.rows), dtype=bool)
    used[table.link_row[table.link_row >= 0]] = True
    # The last entry is what position -1 reads.
    position = np.append(np.cumsum(used) - 1, -1).astype(np.int32)
    return _gathered(table.rows, np.flatnonzero(used)), position[table.link_row]


def fuse(
    table: TokenTable,
    link_point: NDArray[np.uint32],
    link_depth: NDArray[np.float16],
    num_points: int,
    how: str,
) -> tuple[Iterator[NDArray[np.float32]], NDArray[np.int32]]:
    """One row per visible point, or fewer where points share one.

    Rows come in blocks, so that those of a large scene never exist as a whole in float32.

    Args:
        table: filled tokens.
        link_point: [L] point of each link, views one after the other.
        link_depth: [L] metres.
        num_points: N.
        how: one of `FUSE`.

    Returns:
        rows [T, C] float32 in blocks and index [N] int32, the row of each point, -1 where no link is left. Rows stand
        in the order in which the points first use them, so neighbours in space are neighbours in the table.

    Raises:
        UnknownNameError: no such way.
    """
    if how not in FUSE:
        raise UnknownNameError.of("fuse", how, FUSE)
    if how == "mean":
        point, row = link_point, table.link_row
        if (row < 0).any():
            point, row = point[row >= 0], row[row >= 0]
        index = np.full(num_points, -1, dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(np.bincount(point, minlength=num_points))])
        visible = np.flatnonzero(np.diff(starts))
        index[visible] = np.arange(len(visible))
        row = row[np.argsort(point, kind="stable")]
        return _means(table.rows, row, starts[:-1][visible], starts[1:][visible]), index
    links = LinkedRows(row=table.link_row, point=link_point, ends=table.ends, points=num_points)
    index = links.last() if how == "last" else links.nearest(link_depth)
    valid = index >= 0
    used, first, inverse = np.unique(index[valid], return_index=True, return_inverse=True)
    by_first_use = np.argsort(first, kind="stable")
    rank = np.empty(len(used), dtype=np.int32)
    rank[by_first_use] = np.arange(len(used))
    index[valid] = rank[inverse]
    return _gathered(table.rows, used[by_first_use]), index


def _gathered(tokens: torch.Tensor, rows: NDArray[np.integer]) -> Iterator[NDArray[np.float32]]:
    """Rows of the tokens, in blocks; at least one, so that no rows have a width, too."""
    for first in range(0, max(1, len(rows)), _ROWS_PER_STEP):
        yield tokens[torch.from_numpy(rows[first : first + _ROWS_PER_STEP]).to(tokens.device)].cpu().numpy()


def _means(
    tokens: torch.Tensor, row: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> Iterator[NDArray[np.float32]]:
    """Mean over `tokens[row[starts[i]:ends[i]]]` for each i, in blocks; at least one."""
    if not len(starts):
        yield np.zeros((0, tokens.shape[1]), dtype=np.float32)
    for first in range(0, len(starts), _ROWS_PER_STEP):
        last = min(first + _ROWS_PER_STEP, len(starts))
        used = torch.from_numpy(row[starts[first] : ends[last - 1]]).to(tokens.device)
        offsets = torch.from_numpy((starts[first:last] - starts[first]).astype(np.int32)).to(tokens.device)
        yield F.embedding_bag(used, tokens, offsets, mode="mean").cpu().numpy()
