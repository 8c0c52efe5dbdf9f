"""The moving average of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ditr_train.checkpoint import load_checkpoint
from ditr_train.ema import MovingAverage
from ditr_train.trained import load_run
from ditr_train.trainer import train
from runs import PLAIN, recipe


def test_it_follows_as_a_plain_loop_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = MovingAverage(model, 0.8)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for update in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 3))
        average.update(model)
        keep = min(0.8, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = keep * expected[name] + (1 - keep) * value
            else:
                expected[name] = value.clone()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())
    assert int(average.model[1].num_batches_tracked) == 7  # type: ignore[index]


def test_the_average_is_what_is_evaluated_kept_and_used(tiny_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(recipe(tiny_cache, **PLAIN, training__ema=0.99), run, device="cpu", quiet=True)
    state, best = load_checkpoint(run / "last.pt"), load_checkpoint(run / "best.pt")
    average = state["ema"]["model"]
    assert state["ema"]["updates"] == done["steps"]
    assert any(not torch.equal(average[name], value) for name, value in state["model"].items())
    used = load_run(run, device="cpu", checkpoint="last").model.state_dict()
    assert all(torch.equal(used[name], value) for name, value in average.items())
    if done["best"]["step"] == done["steps"]:
        assert all(torch.equal(best["model"][name], value) for name, value in average.items())


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decays_that_average_nothing_are_refused(tiny_cache: Path, decay: float) -> None:
    from ditr_cache.errors import UsageError

    with pytest.raises(UsageError, match=r"training\.ema"):
        recipe(tiny_cache, training__ema=decay)
