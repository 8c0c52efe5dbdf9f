"""The closed-form probe against numpy's least squares, IoU against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditr_cache import ridge
from ditr_cache.ridge import NormalEquations, class_iou, count_pairs, mean_iou


def fitted(
    x: np.ndarray, y: np.ndarray, classes: int, balance: float = 0.5, strength: float = 1e-3
) -> ridge.LinearProbe:
    sums = NormalEquations(x.shape[1], np.bincount(y, minlength=classes), balance=balance)
    for part in np.array_split(np.arange(len(y)), 3):  # as from three samples
        sums.add(x[part], y[part])
    return sums.solve(strength)


def by_least_squares(
    x: np.ndarray, y: np.ndarray, classes: int, balance: float, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of the same problem, stacked as one over-determined system."""
    x = x.astype(np.float64)
    share = np.bincount(y, minlength=classes) / len(y)
    w = share[y] ** -balance
    mean = (w @ x) / w.sum()
    std = np.sqrt((w @ (x - mean) ** 2) / w.sum())
    z = (x - mean) / std
    target = np.eye(classes)[y]
    # An intercept of its own is not penalised; the coefficients are.
    rows = np.sqrt(w / w.sum())[:, None] * np.c_[z, np.ones(len(z))]
    penalty = np.sqrt(strength) * np.eye(x.shape[1], x.shape[1] + 1)
    right = np.r_[np.sqrt(w / w.sum())[:, None] * target, np.zeros((x.shape[1], classes))]
    solution = np.linalg.lstsq(np.r_[rows, penalty], right, rcond=None)[0]
    weight = solution[:-1] / std[:, None]
    return weight, solution[-1] - mean @ weight


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("strength", [1e-3, 0.3])
def test_the_closed_form_is_least_squares(balance: float, strength: float) -> None:
    rng = np.random.default_rng(0)
    y = rng.choice(4, size=400, p=[0.7, 0.2, 0.07, 0.03])
    # Far from zero, of very different scales.
    x = ((rng.normal(size=(400, 6)) + y[:, None] * 0.3) * [1, 10, 0.01, 5, 1, 100] + [0, 1000, 3, -5, 0, 7]).astype(
        np.float32
    )
    probe = fitted(x, y, 4, balance, strength)
    weight, bias = by_least_squares(x, y, 4, balance, strength)
    np.testing.assert_allclose(probe.weight, weight, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(probe.bias, bias, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(probe.predict(x), (x.astype(np.float64) @ weight + bias).argmax(axis=1))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(100, 5)), rng.integers(0, 3, 100)
    whole = fitted(x, y, 3)
    monkeypatch.setattr(ridge, "_BLOCK", 7)
    parts = fitted(x, y, 3)
    np.testing.assert_allclose(parts.weight, whole.weight, atol=1e-12)
    np.testing.assert_array_equal(parts.predict(x), whole.predict(x))
    assert whole.predict(x[:0]).shape == (0,)


def test_a_class_without_training_points_is_never_predicted() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(300, 4)), rng.choice([1, 3, 4], size=300)
    assert set(fitted(x, y, 6).predict(rng.normal(size=(2000, 4)) * 50)) <= {1, 3, 4}


def test_a_constant_channel_tells_nothing() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(200, 3)).astype(np.float32), rng.integers(0, 2, 200)
    x[:, 1] = 123.456
    probe = fitted(x, y, 2)
    assert np.isfinite(probe.weight).all() and np.abs(probe.weight[1]).max() < 1e-6
    np.testing.assert_allclose(probe.weight[[0, 2]], fitted(x[:, [0, 2]], y, 2).weight, atol=1e-9)


def test_balance_finds_the_rare_class() -> None:
    rng = np.random.default_rng(4)
    y = (rng.random(4000) < 0.02).astype(np.int64)
    x = rng.normal(size=(4000, 1)) + 2.2 * y[:, None]
    found = [(fitted(x, y, 2, balance).predict(x) == 1).sum() for balance in (0.0, 0.5, 1.0)]
    assert found[0] < y.sum() / 2 < found[1] < found[2]


PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40)


@settings(max_examples=60)
@given(PAIRS)
def test_iou_is_what_plain_loops_say(pairs: list[tuple[int, int]]) -> None:
    truths = np.array([t for t, _ in pairs], dtype=np.int64)
    predictions = np.array([p for _, p in pairs], dtype=np.int64)
    expected: list[float | None] = []
    for c in range(5):
        both = sum(t == c and p == c for t, p in pairs)
        either = sum(t == c or p == c for t, p in pairs)
        expected.append(both / either if any(t == c for t, _ in pairs) else None)
    counts = count_pairs(predictions, truths, 5)
    assert class_iou(counts) == pytest.approx(expected)
    present = [iou for iou in expected if iou is not None]
    assert mean_iou(counts) == (pytest.approx(sum(present) / len(present)) if present else None)
