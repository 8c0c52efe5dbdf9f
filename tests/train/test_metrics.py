from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditr_cache.errors import DataError, UsageError
from ditr_train.metrics import ConfusionMatrix

NAMES = ["wall", "floor", "chair", "picture"]
K = len(NAMES)
point = st.tuples(st.integers(0, K - 1), st.integers(-1, K - 1))


def by_loop(points: list[tuple[int, int]]) -> dict[str, float | None]:
    labelled = [(p, t) for p, t in points if t != -1]
    iou, accuracy = [], []
    for c in range(K):
        truth = [i for i, (_, t) in enumerate(labelled) if t == c]
        if not truth:
            continue
        predicted = {i for i, (p, _) in enumerate(labelled) if p == c}
        hits = predicted & set(truth)
        iou.append(len(hits) / len(predicted | set(truth)))
        accuracy.append(len(hits) / len(truth))
    if not iou:
        return {"mIoU": None, "mAcc": None, "allAcc": None}
    return {
        "mIoU": sum(iou) / len(iou),
        "mAcc": sum(accuracy) / len(accuracy),
        "allAcc": sum(p == t for p, t in labelled) / len(labelled),
    }


@settings(max_examples=80, deadline=None, derandomize=True)
@given(points=st.lists(point, max_size=40), cut=st.integers(0, 40), as_torch=st.booleans())
def test_equals_a_loop_over_points_in_any_portions(points: list[tuple[int, int]], cut: int, as_torch: bool) -> None:
    matrix, other = ConfusionMatrix(K), ConfusionMatrix(K)
    for part, into in ((points[:cut], matrix), (points[cut:], other)):
        pred, target = np.array(part, dtype=np.int64).reshape(-1, 2).T
        into.update(*((torch.tensor(pred), torch.tensor(target)) if as_torch else (pred, target)))
    matrix.merge(other)
    assert int(matrix.counts.sum()) == sum(t != -1 for _, t in points)
    results = matrix.results(NAMES)
    for name, expected in by_loop(points).items():
        assert results[name] == pytest.approx(expected) if expected is not None else results[name] is None


def groups_by_loop(points: list[tuple[int, int]], groups: list[str]) -> dict[str, float | None]:
    """Mean IoU of every group over its classes that occur; None for a group of which none does."""
    found: dict[str, float | None] = {}
    for group in groups:
        ious = []
        for c in range(K):
            truth = {i for i, (_, t) in enumerate(points) if t == c}
            predicted = {i for i, (p, t) in enumerate(points) if p == c and t != -1}
            if groups[c] == group and truth:
                ious.append(len(truth & predicted) / len(truth | predicted))
        if group:
            found[group] = sum(ious) / len(ious) if ious else None
    return found


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    points=st.lists(point, max_size=30),
    groups=st.lists(st.sampled_from(["head", "common", "tail", ""]), min_size=K, max_size=K),
)
def test_groups_equal_a_loop_over_points(points: list[tuple[int, int]], groups: list[str]) -> None:
    matrix = ConfusionMatrix(K)
    matrix.update(*np.array(points, dtype=np.int64).reshape(-1, 2).T)
    found = matrix.results(NAMES, groups).get("groups", {})
    expected = groups_by_loop(points, groups)
    assert list(found) == list(expected)
    for group, value in expected.items():
        assert found[group] == (None if value is None else pytest.approx(value))


def test_absent_classes_are_no_zeros_in_their_group() -> None:
    matrix = ConfusionMatrix(K)
    matrix.update(np.array([0, 2, 1, 2]), np.array([0, 0, 1, 1]))  # chair is predicted and occurs nowhere
    results = matrix.results(NAMES, ["head", "tail", "head", "common"])
    assert results["groups"] == {"head": 0.5, "tail": 0.5, "common": None} and results["mIoU"] == 0.5
    assert "groups" not in matrix.results(NAMES)
    with pytest.raises(DataError, match="4 groups of classes needed, got 2"):
        matrix.results(NAMES, ["head", "tail"])


def test_absent_classes_are_excluded_and_their_predictions_still_cost() -> None:
    matrix = ConfusionMatrix(K)
    # chair occurs nowhere but is predicted once where floor is; picture occurs and is predicted nowhere.
    matrix.update(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]))
    results = matrix.results(NAMES)
    assert results["IoU"] == {"wall": 1.0, "floor": 0.5, "chair": None, "picture": None}
    assert results["Acc"] == {"wall": 1.0, "floor": 0.5, "chair": None, "picture": None}
    assert (results["mIoU"], results["mAcc"], results["allAcc"]) == (0.75, 0.75, 0.75)


def test_a_class_that_is_never_hit_counts_as_zero() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([0, 0]), np.array([0, 1]))
    results = matrix.results(["a", "b"])
    assert results["IoU"] == {"a": 0.5, "b": 0.0} and math.isclose(results["mIoU"], 0.25)


def test_another_ignore_index_and_predictions_at_ignored_points() -> None:
    matrix = ConfusionMatrix(2, ignore_index=255)
    matrix.update(np.array([0, 99], dtype=np.int16), np.array([0, 255], dtype=np.uint8))
    assert matrix.counts.tolist() == [[1, 0], [0, 0]]


def test_reduction_over_processes(tmp_path: Path) -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    before = matrix.counts.clone()
    matrix.all_reduce()  # not distributed: nothing to do
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        matrix.all_reduce()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(matrix.counts, before)


def test_bad_input_is_refused() -> None:
    matrix = ConfusionMatrix(2)
    with pytest.raises(DataError, match=r"two arrays"):
        matrix.update(np.zeros(2, int), np.zeros(3, int))
    with pytest.raises(DataError, match=r"labels must be in \[0, 2\)"):
        matrix.update(np.zeros(2, int), np.array([0, 2]))
    with pytest.raises(DataError, match="predictions"):
        matrix.update(np.array([0, -1]), np.zeros(2, int))
    with pytest.raises(DataError, match="merge"):
        matrix.merge(ConfusionMatrix(3))
    with pytest.raises(DataError, match="class names"):
        matrix.results(["a"])
    with pytest.raises(DataError, match="class names"):
        matrix.results(["a", "a"])
    with pytest.raises(UsageError, match="at least one"):
        ConfusionMatrix(0)
