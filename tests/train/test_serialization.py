from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditr_cache.errors import DataError
from ditr_train.models.ptv3_config import CURVES
from ditr_train.models.serialization import cube_depth, curve_codes, invert

REFERENCE = Path(__file__).parents[1] / "data/reference/ptv3_curves.npz"


def z_place(x: int, y: int, z: int) -> int:
    return sum((x >> i & 1) << 3 * i + 2 | (y >> i & 1) << 3 * i + 1 | (z >> i & 1) << 3 * i for i in range(17))


def hilbert_place(x: int, y: int, z: int, depth: int) -> int:
    """Skilling's algorithm, one voxel and one bit at a time."""
    axes = [x, y, z]
    for bit in reversed(range(1, depth)):
        lower = (1 << bit) - 1
        for i in range(3):
            if axes[i] >> bit & 1:
                axes[0] ^= lower
            else:
                exchanged = (axes[0] ^ axes[i]) & lower
                axes[0] ^= exchanged
                axes[i] ^= exchanged
    place = parity = 0
    for bit in reversed(range(depth)):
        for axis in axes:
            parity ^= axis >> bit & 1
            place = place << 1 | parity
    return place


def place(curve: str, x: int, y: int, z: int, depth: int) -> int:
    if curve.endswith("-trans"):
        x, y = y, x
    return hilbert_place(x, y, z, depth) if curve.startswith("hilbert") else z_place(x, y, z)


def codes_of(grid: Tensor, depth: int, batch: Tensor | None = None) -> dict[str, Tensor]:
    batch = torch.zeros(len(grid), dtype=torch.int32) if batch is None else batch
    sites = torch.cat([batch[:, None], grid], dim=1)
    return dict(zip(CURVES, curve_codes(sites, CURVES, torch.full((len(grid),), depth)), strict=True))


def cube(depth: int) -> Tensor:
    return torch.tensor(list(product(range(1 << depth), repeat=3)), dtype=torch.int32)


@given(st.data(), st.integers(1, 16), st.sampled_from(CURVES))
@settings(max_examples=60, deadline=None)
def test_codes_are_those_of_plain_loops(data: st.DataObject, depth: int, curve: str) -> None:
    axis = st.integers(0, (1 << depth) - 1)
    voxels = data.draw(st.lists(st.tuples(axis, axis, axis), min_size=1, max_size=8))
    codes = codes_of(torch.tensor(voxels, dtype=torch.int32), depth)[curve]
    assert codes.tolist() == [place(curve, *voxel, depth) for voxel in voxels]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("curve", CURVES)
def test_a_curve_passes_every_voxel_of_its_cube_once(curve: str, depth: int) -> None:
    codes = codes_of(cube(depth), depth)[curve]
    assert sorted(codes.tolist()) == list(range(8**depth))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("curve", ["hilbert", "hilbert-trans"])
def test_neighbours_on_hilberts_curve_share_a_face(curve: str, depth: int) -> None:
    grid = cube(depth)
    path = grid[codes_of(grid, depth)[curve].argsort()]
    assert path.diff(dim=0).abs().sum(dim=1).eq(1).all()
    assert path[0].tolist() == [0, 0, 0]


def test_a_voxels_code_begins_with_that_of_the_voxel_around_it() -> None:
    grid = cube(4)
    fine, coarse = codes_of(grid, 4), codes_of(grid >> 1, 3)
    for curve in CURVES:
        assert torch.equal(fine[curve] >> 3, coarse[curve])


def test_transposed_curves_exchange_x_and_y() -> None:
    grid = cube(3)
    codes, swapped = codes_of(grid, 3), codes_of(grid[:, [1, 0, 2]], 3)
    for curve in ("z", "hilbert"):
        assert torch.equal(codes[f"{curve}-trans"], swapped[curve])
        assert not torch.equal(codes[f"{curve}-trans"], codes[curve])


def test_the_depth_of_a_hilbert_cube_decides_its_direction() -> None:
    grid = cube(2)
    by_depth = [codes_of(grid, depth)["hilbert"] for depth in range(2, 9)]
    assert not torch.equal(by_depth[0], by_depth[1])
    for depth, codes in enumerate(by_depth[3:], start=3):
        assert torch.equal(codes, by_depth[depth - 3])


def test_every_voxel_has_the_depth_of_its_own_sample() -> None:
    grid = cube(2)
    sites = torch.cat([torch.arange(64, dtype=torch.int32)[:, None] % 3, grid], dim=1)
    codes = curve_codes(sites, ["hilbert"], 2 + sites[:, 0].long())[0]
    assert codes.tolist() == [b << 48 | hilbert_place(x, y, z, 2 + b) for b, x, y, z in sites.tolist()]


def test_samples_follow_one_another() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(0, 1 << 16, (300, 3), generator=generator, dtype=torch.int32)
    batch = torch.randint(0, 32767, (300,), generator=generator, dtype=torch.int32)
    alone, together = codes_of(grid, 16), codes_of(grid, 16, batch)
    for curve in CURVES:
        assert torch.equal(together[curve], alone[curve] | batch.long() << 48)


@pytest.mark.parametrize("site", [(0, 1 << 16, 0, 0), (0, 0, -1, 0), (1 << 15, 0, 0, 0)])
def test_voxels_beyond_the_codes_are_refused(site: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="voxel coordinates must be in"):
        curve_codes(torch.tensor([site]), ["hilbert"], torch.tensor([16]))


def test_depth_of_a_cube_counts_bits() -> None:
    edges = [*range(70), 255, 256, 257, 65535, 65536]
    assert cube_depth(torch.tensor(edges)).tolist() == [edge.bit_length() for edge in edges]


def test_inverse_of_an_order() -> None:
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(order[invert(order)], torch.arange(50))
    assert torch.equal(invert(order)[order], torch.arange(50))


def test_codes_are_the_published_ones() -> None:
    """Codes that Pointcept's `encode` gave for its four orders."""
    with np.load(REFERENCE) as stored:
        for depth in stored["depths"]:
            grid = torch.from_numpy(stored["grid"] >> (16 - depth))
            for curve, codes in codes_of(grid, int(depth)).items():
                np.testing.assert_array_equal(codes, stored[f"{curve}_{depth}"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_on_a_gpu() -> None:
    grid = torch.randint(0, 1 << 16, (1000, 3), dtype=torch.int32)
    sites = torch.cat([torch.ones(1000, 1, dtype=torch.int32), grid], dim=1)
    depth = torch.full((1000,), 16)
    codes = curve_codes(sites.cuda(), CURVES, depth.cuda())
    assert torch.equal(codes.cpu(), curve_codes(sites, CURVES, depth))
