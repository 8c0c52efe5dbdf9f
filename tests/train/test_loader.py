from __future__ import annotations

import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache.errors import CorruptCacheError, DataError, StorageError, UsageError
from ditr_cache.store import open_cache
from ditr_train.data.dataset import CachedDataset, VoxelSample
from ditr_train.data.loader import BatchLoader, EvalBatches, TrainBatches, TrainPlan, accumulation_steps, collate, mix
from ditr_train.data.sample import PointBatch
from ditr_train.data.transforms import build_transform
from ditr_train.data.voxelize import voxelize


@pytest.fixture
def data(tiny_cache: Path) -> CachedDataset:
    augment = [build_transform("RandomJitter", {}), build_transform("RandomDropout", {"p": 0.5})]
    return CachedDataset(
        open_cache(tiny_cache), "train", grid_size=0.1, feat=("color",), vfm="fake", transforms=augment
    )


def same(a: PointBatch, b: PointBatch) -> bool:
    assert a.features is not None and b.features is not None
    pairs = [
        (a.coord, b.coord), (a.grid_coord, b.grid_coord), (a.feat, b.feat), (a.offset, b.offset),
        (a.segment, b.segment), (a.features.table, b.features.table), (a.features.scale, b.features.scale),
        (a.features.index, b.features.index),
    ]  # fmt: skip
    return a.names == b.names and all(torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]


def test_an_epoch_goes_through_all_samples() -> None:
    plan = TrainPlan(sizes=(6,), batch_size=3, loop=2, seed=1)
    assert plan.steps_per_epoch == 4
    items = [b.items for b in plan.batches(0, 4)]
    assert sorted(i for _, i in itertools.chain(*items)) == sorted([*range(6)] * 2)
    assert [p for p, _ in itertools.chain(*items)] == list(range(12))
    assert items != [b.items for b in plan.batches(4, 8)]  # another epoch, another order
    assert all(b.epoch == 1 for b in plan.batches(4, 8))


def test_a_plan_resumes_anywhere() -> None:
    plan = TrainPlan(sizes=(7,), batch_size=2, accumulation=2, seed=3)
    whole = list(plan.batches(0, 9))
    for stop in range(9):
        assert list(plan.batches(stop, 9)) == whole[stop * 2 :]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (4, 1), (2, 2)])
def test_a_step_sees_the_same_samples_however_it_is_shared(world: int, accumulation: int) -> None:
    alone = TrainPlan(sizes=(20,), batch_size=8, seed=2)
    expected = [sorted(b.items) for b in alone.batches(0, 4)]
    shared: list[list[tuple[int, int]]] = [[] for _ in range(4)]
    for rank in range(world):
        plan = TrainPlan(sizes=(20,), batch_size=8, seed=2, world=world, rank=rank, accumulation=accumulation)
        for i, batch in enumerate(plan.batches(0, 4)):
            shared[i // accumulation] += batch.items
    assert [sorted(s) for s in shared] == expected


@given(share=st.integers(1, 40), world=st.integers(1, 9), micro_batch=st.integers(1, 50))
def test_accumulation_keeps_the_global_batch(share: int, world: int, micro_batch: int) -> None:
    steps = accumulation_steps(share * world, world, micro_batch)
    fitting = [k for k in range(1, share + 1) if share % k == 0 and share / k <= micro_batch]
    assert steps == fitting[0]
    plan = TrainPlan(sizes=(share * world,), batch_size=share * world, world=world, accumulation=steps)
    assert all(len(batch.items) <= micro_batch for batch in plan.batches(0, 1))


def test_micro_batches_of_pairs_where_that_can_be() -> None:
    assert [accumulation_steps(12, 1, cap, pairs=True) for cap in (12, 6, 5, 3, 1)] == [1, 2, 3, 6, 12]
    assert [accumulation_steps(12, 1, cap) for cap in (12, 6, 5, 3, 1)] == [1, 2, 3, 4, 12]
    assert accumulation_steps(12, 4, 3, pairs=True) == 1  # three samples for each process, whatever one does


def test_plans_that_cannot_be() -> None:
    for batch_size in (2, 7):
        with pytest.raises(UsageError, match=rf"data\.batch_size: {batch_size} samples .* 3 processes"):
            accumulation_steps(batch_size, 3, 1)
    with pytest.raises(UsageError, match=r"data\.batch_size: 6 .*multiple of 4"):
        TrainPlan(sizes=(20,), batch_size=6, world=2, accumulation=2)
    with pytest.raises(UsageError, match=r"fewer than one batch of 4.*data\.loop"):
        TrainPlan(sizes=(3,), batch_size=4)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    ratios=st.data(),
    loop=st.integers(1, 3),
    epoch=st.integers(0, 5),
)
def test_sources_are_sampled_by_their_ratios(sizes: list[int], ratios: st.DataObject, loop: int, epoch: int) -> None:
    shares = ratios.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=len(sizes), max_size=len(sizes)))
    try:
        plan = TrainPlan(sizes=tuple(sizes), ratios=tuple(shares), batch_size=1, loop=loop, seed=4)
    except UsageError as error:
        assert "so small" in str(error)
        return
    total = sum(sizes)
    assert sum(plan.counts) == total and plan.steps_per_epoch == total * loop
    for count, share in zip(plan.counts, shares, strict=True):
        assert abs(count - share / sum(shares) * total) <= 1
    order = plan.order(epoch)
    assert len(order) == total * loop
    for one_pass in order.reshape(loop, total):
        first = 0
        for size, count in zip(sizes, plan.counts, strict=True):
            times = np.bincount(one_pass[(one_pass >= first) & (one_pass < first + size)] - first, minlength=size)
            assert times.sum() == count and times.max() - times.min() <= 1  # none again before all others
            first += size


def test_without_ratios_every_sample_of_every_source_is_seen_once() -> None:
    joint, one = (TrainPlan(sizes=sizes, batch_size=2, seed=9) for sizes in ((3, 4), (7,)))
    assert sorted(joint.order(0)) == list(range(7)) and (joint.order(2) == one.order(2)).all()


@pytest.mark.parametrize("mix_prob", [0.0, 0.5])
def test_batches_do_not_depend_on_workers_or_the_start(data: CachedDataset, mix_prob: float) -> None:
    plan = TrainPlan(sizes=(len(data),), batch_size=2, seed=5)
    source = TrainBatches(data, seed=5, mix_prob=mix_prob)
    whole = list(BatchLoader(source, plan.batches(0, 4)))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    late = list(BatchLoader(source, plan.batches(1, 4), workers=2))
    assert torch.equal(before, torch.get_rng_state())
    assert len(late) == 3 and all(same(a, b) for a, b in zip(whole[1:], late, strict=True))
    assert not same(whole[0], whole[2])  # the next epoch augments anew


def test_collate_keeps_what_belongs_together(data: CachedDataset) -> None:
    samples = [data.train_sample(i, np.random.default_rng(i)) for i in range(3)]
    batch = collate(samples)
    assert batch.features is not None and batch.features.scale is not None
    assert batch.features.table.dtype == torch.int8 and batch.features.index.dtype == torch.int64
    assert batch.offset.tolist() == np.cumsum([len(s.coord) for s in samples]).tolist()
    assert batch.batch_index().tolist() == [i for i, s in enumerate(samples) for _ in s.coord]
    assert batch.grid_coord.dtype == torch.int32 and batch.segment is not None and batch.segment.dtype == torch.int64
    start = 0
    for s in samples:
        part = batch.features.index[start : start + len(s.coord)].numpy()
        assert s.row is not None and s.table is not None
        assert ((part < 0) == (s.row < 0)).all()
        seen = s.row >= 0
        assert np.array_equal(batch.features.table.numpy()[part[seen]], s.table[s.row[seen]])
        start += len(s.coord)
    moved = batch.to("cpu")
    assert moved.features is not None and moved.names == batch.names and moved.inverse is None


def test_evaluation_batches_carry_the_way_back(data: CachedDataset) -> None:
    samples = [data.eval_sample(i) for i in range(2)]
    batch = collate(samples)
    assert batch.inverse is not None and batch.full_offset is not None and batch.full_segment is not None
    assert batch.full_offset.tolist() == np.cumsum([len(s.full_segment) for s in samples]).tolist()  # type: ignore[arg-type]
    second = batch.inverse[int(batch.full_offset[0]) :]
    assert int(second.min()) == int(batch.offset[0]) and int(second.max()) == int(batch.offset[1]) - 1
    batches = list(BatchLoader(EvalBatches(data), range(len(data)), workers=1))
    assert [b.names[0] for b in batches] == data.ids and all(len(b.offset) == 1 for b in batches)


def voxels(name: str, grid: list[list[int]], rows: list[int]) -> VoxelSample:
    coord = np.array(grid, dtype=np.int32)
    return VoxelSample(
        name=name,
        coord=coord.astype(np.float32),
        grid_coord=coord,
        feat=np.full((len(grid), 1), ord(name), dtype=np.float32),
        segment=np.full(len(grid), ord(name), dtype=np.int64),
        table=np.full((max(rows) + 1, 2), ord(name), dtype=np.float16),
        row=np.array(rows),
    )


def test_mix_puts_middles_on_each_other_and_keeps_voxels_unique() -> None:
    a = voxels("a", [[0, 0, 0], [4, 0, 0], [2, 2, 3]], [0, 1, -1])
    b = voxels("b", [[0, 0, 0], [2, 0, 0], [1, 2, 1]], [0, -1, 1])
    mixed = mix(a, b)
    assert mixed.name == "a+b"
    # b moves by (1, 0, 0): its points come to (1, 0, 0), (3, 0, 0), (2, 2, 1); nothing coincides.
    assert sorted(map(tuple, mixed.grid_coord.tolist())) == [
        (0, 0, 0), (1, 0, 0), (2, 2, 1), (2, 2, 3), (3, 0, 0), (4, 0, 0),
    ]  # fmt: skip
    assert mixed.segment is not None and mixed.row is not None and mixed.table is not None
    seen = mixed.row >= 0
    assert (mixed.table[mixed.row[seen], 0] == mixed.segment[seen]).all() and seen.sum() == 4
    same_place = mix(a, a)
    assert len(same_place.coord) == 3 and same_place.row is not None and same_place.row.tolist() == [0, 1, -1]


def in_frame(name: str, coord: np.ndarray) -> VoxelSample:
    """A sample that is not centred, of points in voxels of 1 m."""
    found = voxelize(coord, 1.0)
    sample = voxels(name, found.grid_coord.tolist(), list(range(len(found.pick))))
    return replace(sample, coord=coord[found.pick].astype(np.float32), origin=found.origin)


@given(seed=st.integers(0, 10_000), far=st.sampled_from([0, 3, 500]))
def test_mix_of_lidar_puts_sensor_on_sensor(seed: int, far: int) -> None:
    rng = np.random.default_rng(seed)
    a = in_frame("a", rng.uniform(-4, 3, (30, 3)))
    b = in_frame("b", rng.uniform(-2, 6, (40, 3)) + np.array([far, -far, 0]))
    mixed = mix(a, b)
    assert mixed.origin is not None and mixed.grid_coord.dtype == np.int32 and (mixed.grid_coord.min(axis=0) == 0).all()
    # Coordinates are as they were, and the voxels are theirs.
    np.testing.assert_array_equal(mixed.grid_coord + mixed.origin, np.floor(mixed.coord))
    of = {name: {tuple(c) for c in np.floor(s.coord).tolist()} for name, s in (("a", a), ("b", b))}
    assert len(mixed.coord) == len(of["a"] | of["b"])
    assert mixed.row is not None and mixed.table is not None and mixed.segment is not None
    assert (mixed.table[mixed.row, 0] == mixed.segment).all() and (mixed.feat[:, 0] == mixed.segment).all()
    for coord, segment in zip(mixed.coord, mixed.segment, strict=True):
        source = a if segment == ord("a") else b
        assert (source.coord == coord).all(axis=1).any()
        # Of two voxels that coincide the first sample's stays.
        assert segment == ord("a") or tuple(np.floor(coord).tolist()) not in of["a"]


def test_mix_refuses_samples_far_from_each_other() -> None:
    at = np.zeros((1, 3))
    for far in (2**16, 2.0**40):
        with pytest.raises(DataError, match=rf"'a' and 'b' reach over {int(far) + 1} voxels .* data\.mix_prob"):
            mix(in_frame("a", at), in_frame("b", at - [0, far, 0]))
    assert mix(in_frame("a", at), in_frame("b", at - [0, 2**16 - 1, 0])).grid_coord.max() == 2**16 - 1


def test_mixed_training_samples_of_lidar_keep_their_frame(tiny_cache: Path) -> None:
    augment = [build_transform("RandomJitter", {})]
    data = CachedDataset(
        open_cache(tiny_cache), "train", grid_size=0.1, feat=("coord",), vfm="fake", transforms=augment, centred=False,
        crop_rate=0.7, point_max=300,
    )  # fmt: skip
    batch = TrainBatches(data, seed=5, mix_prob=1.0)[next(TrainPlan(sizes=(4,), batch_size=4, seed=5).batches(0, 1))]
    assert len(batch.offset) == 2
    first = int(batch.offset[0])
    for part in (slice(0, first), slice(first, None)):
        coord, grid = batch.coord[part], batch.grid_coord[part]
        cell = np.floor(coord.numpy().astype(np.float64) / 0.1)
        np.testing.assert_array_equal(grid.numpy(), cell - cell.min(axis=0))
        assert coord.min() > 4  # conftest's rooms stand 5 m and more from the origin
    assert torch.equal(batch.feat, batch.coord)


def test_mixed_batches_are_smaller(data: CachedDataset) -> None:
    plan = TrainPlan(sizes=(4,), batch_size=4, seed=5)
    batch = TrainBatches(data, seed=5, mix_prob=1.0)[next(plan.batches(0, 1))]
    assert len(batch.offset) == 2 and all("+" in name for name in batch.names)
    keys = torch.cat([batch.batch_index()[:, None].int(), batch.grid_coord], dim=1)
    assert len(torch.unique(keys, dim=0)) == len(keys) and int(batch.grid_coord.min()) == 0


class Broken:
    def __init__(self, how: str) -> None:
        self.how = how

    def __getitem__(self, index: int) -> PointBatch:
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise CorruptCacheError("room01/coord: damaged")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_data_arrive_as_they_are(workers: int) -> None:
    with pytest.raises(CorruptCacheError) as caught:
        next(iter(BatchLoader(Broken("corrupt"), [0], workers=workers)))  # type: ignore[arg-type]
    assert str(caught.value) == "room01/coord: damaged"


def test_a_killed_worker_is_an_error_with_a_remedy() -> None:
    with pytest.raises(StorageError, match=r"data\.workers"):
        next(iter(BatchLoader(Broken("killed"), [0], workers=1)))  # type: ignore[arg-type]
