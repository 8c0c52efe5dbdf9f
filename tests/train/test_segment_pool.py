from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditr_cache.errors import DataError
from ditr_train.models import segment_pool
from ditr_train.models.segment_pool import segment_max, segment_sum

REDUCES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda rows: rows.sum(dim=0),
    "max": lambda rows: rows.amax(dim=0),
}
FUNCTIONS = {"sum": segment_sum, "max": segment_max}
SIZE = 9


@pytest.fixture(params=["torch", "torch_scatter"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(segment_pool, "_torch_scatter", None)
    elif segment_pool._torch_scatter is None:
        pytest.skip("torch_scatter is not installed")
    return str(request.param)


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, SIZE - 1, (60,), generator=generator)
    index[index == 3] = 4  # segments 3 and 8 stay empty
    return torch.randn(60, 5, generator=generator) - 3.0, index


@pytest.mark.parametrize("name", FUNCTIONS)
def test_segments_equal_a_loop_with_gradients(path: str, name: str) -> None:
    src, index = example()
    src.requires_grad_()
    out = FUNCTIONS[name](src, index, SIZE)
    expected = torch.stack(
        [REDUCES[name](src[index == i]) if (index == i).any() else src.new_zeros(5) for i in range(SIZE)]
    )
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert not out[3].any() and not out[8].any()
    weights = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad((out * weights).sum(), src)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), src)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows_and_no_segments(path: str, name: str) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(FUNCTIONS[name](torch.zeros(0, 2), empty, 3), torch.zeros(3, 2))
    assert FUNCTIONS[name](torch.zeros(0, 2), empty, 0).shape == (0, 2)


def test_maximum_is_not_clamped_at_zero() -> None:
    out = segment_max(torch.tensor([[-2.0], [-1.0]]), torch.tensor([0, 0]), 1)
    assert out.item() == -1.0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_index_of_another_length_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="one index"):
        FUNCTIONS[name](torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), 1)


def test_torch_scatter_of_another_torch_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch_scatter":
                raise OSError("undefined symbol")

    monkeypatch.delitem(sys.modules, "torch_scatter", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with caplog.at_level(logging.WARNING):
        assert segment_pool._import_torch_scatter() is None
    assert "undefined symbol" in caplog.text


def test_absent_torch_scatter_is_not_worth_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch_scatter", None)
    assert segment_pool._import_torch_scatter() is None
    assert not caplog.text
