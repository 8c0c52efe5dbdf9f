from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditr_train.models.patch_attention import PatchAttention, patch_rows
from ditr_train.models.serialization import invert

K = 8
COUNTS = [[1], [K - 1], [K], [K + 1], [3 * K + 5], [4 * K], [1, K + 1, K - 1, 3 * K + 5, K, 1, 2 * K], [3, 3, 0, 5, 3]]
CPU = torch.device("cpu")


def patches_of_a_sample(count: int) -> list[tuple[list[int], list[int]]]:
    """For each patch the positions that attend to one another, and those of them that keep the result."""
    if count <= K:
        return [(list(range(count)), list(range(count)))] if count else []
    patches = [(list(range(first, first + K)), list(range(first, first + K))) for first in range(0, count - K + 1, K)]
    left = count % K
    if left:
        own = list(range(count - left, count))
        patches.append((own + list(range(count - K, count - left)), own))
    return patches


def plain_attention(module: PatchAttention, feat: Tensor, counts: list[int], order: Tensor, grid: Tensor) -> Tensor:
    """One query at a time."""
    channels = feat.shape[1]
    width = channels // module.heads
    out = torch.zeros_like(feat)
    first = 0
    for count in counts:
        for members, own in patches_of_a_sample(count):
            voxels = order[torch.tensor(members) + first]
            q, k, v = module.qkv(feat[voxels]).split(channels, dim=1)
            for row, position in enumerate(members):
                if position not in own:
                    continue
                heads = []
                for h in range(module.heads):
                    part = slice(h * width, (h + 1) * width)
                    scores = k[:, part] @ q[row, part] / math.sqrt(width)
                    if module.rpe is not None:
                        scores = scores + torch.stack([bias(module, grid[voxels[row]], grid[j], h) for j in voxels])
                    heads.append(scores.softmax(dim=0) @ v[:, part])
                out = out.index_put((voxels[row],), module.proj(torch.cat(heads)))
        first += count
    return out


def bias(module: PatchAttention, query: Tensor, key: Tensor, head: int) -> Tensor:
    reach = int(2 * (4 * K) ** (1 / 3))
    table = module.rpe.table.view(3, 2 * reach + 1, module.heads)
    return sum(table[axis, max(-reach, min(reach, int(query[axis] - key[axis]))) + reach, head] for axis in range(3))  # type: ignore[return-value]


def scene(counts: list[int], *, rpe: bool = False) -> tuple[PatchAttention, Tensor, Tensor, Tensor]:
    torch.manual_seed(len(counts) + sum(counts))
    module = PatchAttention(6, 2, K if rpe else None).double()
    if module.rpe is not None:
        torch.nn.init.normal_(module.rpe.table)
    total = sum(counts)
    starts = [sum(counts[:s]) for s in range(len(counts))]
    order = torch.cat([start + torch.randperm(count) for start, count in zip(starts, counts, strict=True)])
    feat = torch.randn(total, 6, dtype=torch.float64, requires_grad=True)
    return module, feat, order, torch.randint(0, 20, (total, 3), dtype=torch.int32)


@pytest.mark.parametrize("rpe", [False, True], ids=["plain", "rpe"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_attention_and_its_gradient_are_those_of_separate_patches(counts: list[int], rpe: bool) -> None:
    module, feat, order, grid = scene(counts, rpe=rpe)
    patches = patch_rows(counts, K, CPU).along(order, invert(order))
    out = module(feat, patches, grid)
    expected = plain_attention(module, feat, counts, order, grid)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)

    weights = torch.randn_like(out)
    inputs = [feat, *module.parameters()]
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    for grad, wanted in zip(grads, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-11)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_rows_of_patches(counts: list[int], patch_size: int) -> None:
    rows = patch_rows(counts, patch_size, CPU)
    total = sum(counts)
    assert torch.equal(rows.fill[rows.keep], torch.arange(total))
    sample = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert sum(length * number for length, number in rows.groups) == len(rows.fill)
    first = 0
    for length, number in rows.groups:
        for patch in rows.fill[first : first + length * number].view(number, length):
            owners = sample[patch].unique().tolist()
            assert len(owners) == 1, "a patch holds voxels of one sample"
            assert len(patch.unique()) == length, "and each of them once"
            assert length == min(counts[owners[0]], patch_size)
        first += length * number
    assert len(rows.fill) <= sum(-(-c // patch_size) * min(c, patch_size) for c in counts)


def test_the_last_patch_borrows_what_stands_at_its_place_in_the_patch_before() -> None:
    rows = patch_rows([2 * K + 3], K, CPU)
    last = rows.fill[2 * K :].tolist()
    assert last == [2 * K, 2 * K + 1, 2 * K + 2, *range(K + 3, 2 * K)]


def test_samples_do_not_touch_one_another() -> None:
    counts = [2 * K + 1, 3, K]
    module, feat, order, grid = scene(counts)
    patches = patch_rows(counts, K, CPU).along(order, invert(order))
    module(feat, patches, grid)[2 * K + 1 : 2 * K + 4].sum().backward()
    assert feat.grad is not None
    touched = feat.grad.abs().sum(dim=1) > 0
    assert touched.nonzero().squeeze(1).tolist() == [2 * K + 1, 2 * K + 2, 2 * K + 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rpe", [False, True], ids=["plain", "rpe"])
def test_attention_on_a_gpu_under_autocast(rpe: bool) -> None:
    counts = [1, K + 1, K - 1, 3 * K + 5, K]
    module, feat, order, grid = scene(counts, rpe=rpe)
    expected = module(feat, patch_rows(counts, K, CPU).along(order, invert(order)), grid)
    module = module.float().cuda()
    order = order.cuda()
    patches = patch_rows(counts, K, order.device).along(order, invert(order))
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 3e-2)):
        with torch.autocast("cuda", dtype):
            out = module(feat.float().cuda(), patches, grid.cuda())
        assert out.dtype == dtype
        torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
