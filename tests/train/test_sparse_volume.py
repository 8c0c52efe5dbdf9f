"""Volumes of more voxels than 32 bits can number: sites far apart, and samples of a batch, stay strangers."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditr_cache.errors import DataError
from ditr_train.models import sparse_backend
from ditr_train.models.backbone import NoTerms
from ditr_train.models.index_pairs import strided_pairs, submanifold_pairs
from ditr_train.models.sparse_conv import SparseConv3d, SparseInverseConv3d, SubMConv3d, sparse_tensor
from ditr_train.models.sparse_unet import SparseUNet
from ditr_train.models.sparse_unet_config import SparseUNetConfig
from unets import unet_rows

SMALL = SparseUNetConfig(stem_channels=4, channels=(4, 6, 8, 8, 8, 6, 6, 5), layers=(1, 2, 1, 1, 1, 1, 1, 2))
CELL = 1 << SMALL.num_stages
NEAR = [(0, 0, 0), (3 * CELL, 0, 0), (0, 2 * CELL, 2 * CELL)]
# Corners whose voxel numbers differ by a multiple of 2^32; the third makes the last edges the powers of two it takes.
FAR = {
    "x": [(0, 0, 0), (1 << 12, 0, 0), (0, (1 << 10) - CELL, (1 << 10) - CELL)],
    "y": [(0, 0, 0), (0, 1 << 16, 0), (0, 0, (1 << 16) - CELL)],
    "2^48": [(0, 0, 0), (1 << 16, 0, 0), (0, (1 << 16) - CELL, (1 << 16) - CELL)],
}


def clusters(corners: list[tuple[int, int, int]], *, samples: bool = False) -> tuple[Tensor, Tensor]:
    """Equal random clusters of CELL voxels an edge at these corners, as samples of their own or of one."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randint(0, CELL, (120, 3), generator=generator)
    own = torch.cat([own, torch.tensor([[0, 0, 0], [CELL - 1] * 3])]).unique(dim=0)
    grid = torch.cat([own + torch.tensor(corner) for corner in corners])
    batch = torch.arange(len(corners)).repeat_interleave(len(own)) * samples
    order = torch.randperm(len(grid), generator=generator)
    return batch[order], grid[order]


def results(net: SparseUNet, batch: Tensor, grid: Tensor) -> list[Tensor]:
    """Output rows, and the gradients of the input and of every parameter."""
    feat = torch.randn(len(grid), 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    rows = unet_rows(net, sparse_tensor(feat, grid, batch, int(batch.max()) + 1, SMALL.num_stages))
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    return [rows.detach(), *torch.autograd.grad((rows * weights).sum(), [feat, *net.parameters()])]


def network(train: bool) -> SparseUNet:
    torch.manual_seed(0)
    net = SparseUNet(SMALL, 3)
    for parameter in net.parameters():  # the published initialisation is too small to tell neighbours by
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return net.train(train)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("corners", FAR.values(), ids=FAR)
def test_clusters_far_apart_give_what_the_same_clusters_give_nearby(
    corners: list[tuple[int, int, int]], train: bool
) -> None:
    far, near = results(network(train), *clusters(corners)), results(network(train), *clusters(NEAR))
    assert all(map(torch.equal, far, near))


@pytest.mark.parametrize("train", [True, False])
def test_samples_of_huge_volumes_stay_apart(train: bool) -> None:
    stray = ((1 << 11) - CELL, (1 << 11) - CELL, (1 << 10) - CELL)  # each sample spans 2^32 voxels
    batch, grid = clusters([(0, 0, 0), (0, 0, 0), stray], samples=True)
    expected = results(network(train), *clusters([(0, 0, 0)] * 3, samples=True))
    assert all(map(torch.equal, results(network(train), batch, grid), expected))


def test_a_cluster_gives_what_it_gives_alone() -> None:
    net = network(False)
    batch, grid = clusters(FAR["y"])
    feat = torch.randn(len(grid), 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rows = unet_rows(net, sparse_tensor(feat, grid, batch, 1, SMALL.num_stages))
        for corner in torch.tensor(FAR["y"]):
            own = ((grid >= corner) & (grid < corner + CELL)).all(dim=1)
            alone = unet_rows(net, sparse_tensor(feat[own], grid[own] - corner, batch[own], 1, SMALL.num_stages))
            torch.testing.assert_close(rows[own], alone, atol=1e-5, rtol=1e-5)


SITES = st.lists(st.tuples(st.integers(0, 2), *[st.integers(0, 6)] * 3), min_size=1, max_size=60, unique=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sites=SITES, edges=st.tuples(*[st.integers(7, 9)] * 3))
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "subm"),
    [
        (1, 1, 0, 1, True),
        (3, 1, 0, 1, True),
        (5, 1, 0, 1, True),
        (3, 1, 0, 2, True),
        (2, 2, 0, 1, False),
        (3, 2, 1, 1, False),
        (2, 1, 0, 3, False),
    ],
)
def test_pairs_are_those_of_spconv_on_small_volumes(
    sites: list[tuple[int, ...]],
    edges: tuple[int, ...],
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    subm: bool,
) -> None:
    indices, shape = torch.tensor(sites, dtype=torch.int32), list(edges)
    options = [[value] * 3 for value in (kernel, stride, padding, dilation)]
    theirs = sparse_backend.ops.get_indice_pairs(
        indices, 3, shape, sparse_backend.ConvAlgo.Native, *options, [0] * 3, subm, False
    )
    if subm:
        ours = submanifold_pairs(indices, shape, [kernel] * 3, [dilation] * 3)
    else:
        ours = strided_pairs(indices, sparse_backend.ops.get_conv_output_size(shape, *options), *options)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b)


def test_network_is_the_same_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results(network(True), *clusters(NEAR, samples=True))
    monkeypatch.setattr(sparse_backend, "_SPCONV_CPU_VOXELS", 0)
    monkeypatch.setattr(sparse_backend, "submanifold_pairs", search := Mock(wraps=submanifold_pairs))
    assert all(map(torch.equal, results(network(True), *clusters(NEAR, samples=True)), expected))
    assert search.call_count == SMALL.num_stages + 2  # one search for each resolution and one for the stem


WIDE = st.one_of(st.integers(0, 9), st.integers((1 << 18) - 9, 1 << 18))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sites=st.lists(st.tuples(st.integers(0, 1), WIDE, WIDE, WIDE), min_size=2, max_size=40, unique=True))
def test_convolutions_of_sites_anywhere_equal_sums_over_neighbours(sites: list[tuple[int, ...]]) -> None:
    indices = torch.tensor([*sites, (1, 1 << 19, 1 << 19, 1 << 19)])
    batch, grid = indices[:, 0], indices[:, 1:]
    feat = torch.randn(len(grid), 2, generator=torch.Generator().manual_seed(0))
    voxels = sparse_tensor(feat, grid, batch, 2, 1)
    same = batch[:, None] == batch
    with torch.no_grad():
        for kernel in (3, 5):
            conv = SubMConv3d(2, 3, kernel, bias=False)
            step = grid - grid[:, None]  # from the output, the first index, to the input
            close = (same & (step.abs() <= kernel // 2).all(dim=2)).nonzero()
            weight = conv.weight[:, *(step[tuple(close.T)] + kernel // 2).T].permute(1, 0, 2)  # [pairs, 3, 2]
            sums = torch.einsum("poi,pi->po", weight, feat[close[:, 1]])
            expected = torch.zeros(len(grid), 3).index_add(0, close[:, 0], sums)
            torch.testing.assert_close(conv(voxels).features, expected, atol=1e-5, rtol=1e-5)
        down = SparseConv3d(2, 3, 2, stride=2, bias=False, indice_key="down")
        coarse = down(voxels)
        cells, place = torch.cat([batch[:, None], grid >> 1], dim=1).unique(dim=0, return_inverse=True)
        sums = torch.einsum("opi,pi->po", down.weight[:, *(grid & 1).T], feat)
        expected = torch.zeros(len(cells), 3).index_add(0, place, sums)
        found, order = coarse.indices.long().unique(dim=0, return_inverse=True)
        assert torch.equal(found, cells) and len(coarse.indices) == len(cells)
        torch.testing.assert_close(coarse.features, expected[order], atol=1e-5, rtol=1e-5)
        up = SparseInverseConv3d(3, 2, 2, bias=False, indice_key="down")
        fine = up(coarse)
        assert torch.equal(fine.indices, voxels.indices)
        back = torch.einsum("opi,pi->po", up.weight[:, *(grid & 1).T], expected[place])
        torch.testing.assert_close(fine.features, back, atol=1e-5, rtol=1e-5)


def test_sites_of_every_resolution_keep_their_coordinates() -> None:
    corners = FAR["2^48"]
    batch, grid = clusters(corners)
    voxels = sparse_tensor(torch.ones(len(grid), 3), grid, batch, 1, SMALL.num_stages)
    found: dict[int, Tensor] = {}
    terms = NoTerms()
    terms.encoder = lambda level, sites: found.update({level: sites.long()})  # type: ignore[method-assign]
    unet_rows(network(False), voxels, terms)
    for level in range(SMALL.num_stages + 1):
        expected = torch.cat([batch[:, None], grid >> level], dim=1).unique(dim=0)
        assert torch.equal(found[level].unique(dim=0), expected) and len(found[level]) == len(expected)


def test_the_largest_volumes_work_and_larger_ones_are_refused() -> None:
    torch.manual_seed(0)
    conv = SubMConv3d(1, 1, 3, bias=False)
    ends = torch.tensor([[0, 0, 0], [(1 << 20) - 1] * 3])
    for batch_size, refused in ((1, False), (2, True)):
        batch = torch.full((2,), batch_size - 1)
        if refused:
            with pytest.raises(DataError, match=r"1152921504606846976 voxels.*got 2 samples of 1048576 x 1048576"):
                sparse_tensor(torch.ones(2, 1), ends, batch, batch_size, 0)
        else:  # both ends stand alone
            rows = conv(sparse_tensor(torch.ones(2, 1), ends, batch, batch_size, 0)).features
            torch.testing.assert_close(rows, conv.weight[:, 1, 1, 1].expand(2, 1))
    with pytest.raises(DataError, match=r"2147483647 along an axis.*1 x 1 x 2147483649"):
        sparse_tensor(torch.ones(2, 1), torch.tensor([[0, 0, 0], [0, 0, 1 << 31]]), torch.zeros(2).long(), 1, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("corners", FAR.values(), ids=FAR)
def test_gpu_keeps_clusters_apart(corners: list[tuple[int, int, int]]) -> None:
    net = network(False)
    batch, grid = clusters(corners)
    feat = torch.randn(len(grid), 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = unet_rows(net, sparse_tensor(feat, grid, batch, 1, SMALL.num_stages))
        rows = unet_rows(net.cuda(), sparse_tensor(feat.cuda(), grid.cuda(), batch.cuda(), 1, SMALL.num_stages))
    torch.testing.assert_close(rows.cpu(), expected, atol=1e-3, rtol=1e-3)
