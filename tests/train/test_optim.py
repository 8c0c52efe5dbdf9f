from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ditr_cache.errors import UsageError
from ditr_train.optim import OptimizerConfig, ParamGroup, ScheduleConfig, build_optimizer, build_scheduler


def make_model() -> nn.Module:
    model = nn.Module()
    model.stem = nn.Linear(2, 3)
    model.block0 = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.head = nn.Linear(3, 2)
    return model


def lr_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[float, float]:
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group["lr"], group["weight_decay"]


def run(optimizer: torch.optim.Optimizer, cfg: ScheduleConfig, steps: int) -> list[list[float]]:
    scheduler = build_scheduler(optimizer, cfg, steps)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_parameter_is_in_one_group_with_its_rate(name: str) -> None:
    model = make_model()
    groups = (ParamGroup(pattern="block", lr_scale=0.1), ParamGroup(pattern="head", lr_scale=2.0))
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1.0, weight_decay=0.05, groups=groups))
    assert lr_of(optimizer, model.stem.weight) == (1.0, 0.05)
    assert lr_of(optimizer, model.block0[1].bias) == (0.1, 0.05)
    assert lr_of(optimizer, model.head.bias) == (2.0, 0.05)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert type(optimizer) is {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]


def test_sgd_is_nesterov_with_momentum() -> None:
    optimizer = build_optimizer(make_model(), OptimizerConfig(name="sgd", lr=0.05, weight_decay=1e-4))
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9


def test_norms_and_biases_may_be_spared_the_decay() -> None:
    model = make_model()
    model.head.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.05, decay_norm_and_bias=False))
    assert lr_of(optimizer, model.stem.weight)[1] == 0.05
    assert lr_of(optimizer, model.stem.bias)[1] == lr_of(optimizer, model.block0[1].weight)[1] == 0.0
    assert not any(p is model.head.weight for g in optimizer.param_groups for p in g["params"])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_onecycle_follows_its_two_cosines(name: str) -> None:
    cfg = OptimizerConfig(name=name, lr=0.1, groups=(ParamGroup(pattern="block", lr_scale=0.1),))
    rates = run(build_optimizer(make_model(), cfg), ScheduleConfig(div_factor=10, final_div_factor=100), 100)
    for step, (lr, block_lr) in enumerate(rates):
        warm = 0.05 * 100 - 1
        if step <= warm:
            expected = 0.01 + (0.1 - 0.01) * (1 - math.cos(math.pi * step / warm)) / 2
        else:
            expected = 1e-4 + (0.1 - 1e-4) * (1 + math.cos(math.pi * (step - warm) / (99 - warm))) / 2
        assert lr == pytest.approx(expected) and block_lr == pytest.approx(0.1 * expected)


def test_onecycle_moves_momentum_against_the_rate() -> None:
    optimizer = build_optimizer(make_model(), OptimizerConfig(name="sgd", lr=0.1))
    build_scheduler(optimizer, ScheduleConfig(), 100)
    assert optimizer.param_groups[0]["momentum"] == 0.95
    optimizer = build_optimizer(make_model(), OptimizerConfig(name="sgd", lr=0.1))
    build_scheduler(optimizer, ScheduleConfig(cycle_momentum=False), 100)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    optimizer = build_optimizer(make_model(), OptimizerConfig(name="sgd", momentum=0.0, nesterov=False))
    build_scheduler(optimizer, ScheduleConfig(), 100)
    assert optimizer.param_groups[0]["momentum"] == 0.0


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 40, 100])
@pytest.mark.parametrize("pct_start", [0.05, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["onecycle", "poly"])
def test_any_number_of_steps(name: str, pct_start: float, steps: int) -> None:
    optimizer = build_optimizer(make_model(), OptimizerConfig(lr=0.1))
    rates = run(optimizer, ScheduleConfig(name=name, pct_start=pct_start), steps)  # type: ignore[arg-type]
    assert all(0 < lr <= 0.1 + 1e-9 for (lr,) in rates)


def test_cosine_ends_at_its_share_of_the_peak() -> None:
    """PointNeXt on S3DIS: 0.01 to 1e-5."""
    config = ScheduleConfig(name="cosine", end_factor=1e-3)
    rates = run(build_optimizer(make_model(), OptimizerConfig(lr=0.01)), config, 100)
    expected = [1e-5 + (0.01 - 1e-5) * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]
    assert [lr for (lr,) in rates] == pytest.approx(expected)
    assert rates[0] == [0.01] and rates[-1][0] < 1.3e-5


def test_multistep_falls_at_its_milestones() -> None:
    config = ScheduleConfig(name="multistep", milestones=(0.7, 0.9), gamma=0.1)
    rates = run(build_optimizer(make_model(), OptimizerConfig(lr=1.0)), config, 20)
    assert [lr for (lr,) in rates] == pytest.approx([1.0] * 14 + [0.1] * 4 + [0.01] * 2)


def test_poly() -> None:
    rates = run(build_optimizer(make_model(), OptimizerConfig(lr=0.1)), ScheduleConfig(name="poly", power=0.9), 10)
    assert [lr for (lr,) in rates] == pytest.approx([0.1 * (1 - step / 10) ** 0.9 for step in range(10)])


@pytest.mark.parametrize("name", ["onecycle", "poly"])
def test_state_is_restored_without_pickle(name: str, tmp_path: Path) -> None:
    cfg = ScheduleConfig(name=name)  # type: ignore[arg-type]
    whole = run(build_optimizer(make_model(), OptimizerConfig(lr=0.1)), cfg, 12)
    optimizer = build_optimizer(make_model(), OptimizerConfig(lr=0.1))
    scheduler = build_scheduler(optimizer, cfg, 12)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    torch.save({"o": optimizer.state_dict(), "s": scheduler.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer = build_optimizer(make_model(), OptimizerConfig(lr=0.1))
    scheduler = build_scheduler(optimizer, cfg, 12)
    optimizer.load_state_dict(state["o"])
    scheduler.load_state_dict(state["s"])
    rates = []
    for _ in range(7):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates == whole[5:]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (OptimizerConfig, {"name": "adam"}, "adamw.*sgd"),
        (OptimizerConfig, {"lr": 0.0}, "optimizer.lr"),
        (OptimizerConfig, {"lr": float("nan")}, "optimizer.lr"),
        (OptimizerConfig, {"weight_decay": -1.0}, "weight_decay"),
        (OptimizerConfig, {"momentum": 1.0}, "momentum"),
        (OptimizerConfig, {"name": "sgd", "momentum": 0.0}, "nesterov"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, "betas"),
        (ParamGroup, {"pattern": "", "lr_scale": 1.0}, "pattern"),
        (ParamGroup, {"pattern": "block", "lr_scale": -1.0}, "lr_scale"),
        (ScheduleConfig, {"name": "linear"}, "onecycle.*poly.*cosine.*multistep"),
        (ScheduleConfig, {"end_factor": 1.5}, "end_factor"),
        (ScheduleConfig, {"gamma": 0.0}, "gamma"),
        (ScheduleConfig, {"milestones": (0.9, 0.7)}, "milestones"),
        (ScheduleConfig, {"milestones": (0.5, 1.0)}, "milestones"),
        (ScheduleConfig, {"pct_start": 0.0}, "pct_start"),
        (ScheduleConfig, {"pct_start": 1.0}, "pct_start"),
        (ScheduleConfig, {"div_factor": 0.5}, "div_factor"),
        (ScheduleConfig, {"power": 0.0}, "power"),
    ],
)
def test_bad_settings_are_refused(kind: type, settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind(**settings)


def test_what_cannot_be_built_is_refused() -> None:
    model = make_model()
    with pytest.raises(UsageError, match="'blok'"):
        build_optimizer(model, OptimizerConfig(groups=(ParamGroup(pattern="blok", lr_scale=0.1),)))
    with pytest.raises(UsageError, match="at least one step"):
        build_scheduler(build_optimizer(model, OptimizerConfig()), ScheduleConfig(), 0)
    with pytest.raises(UsageError, match="no parameter to train"):
        build_optimizer(model.requires_grad_(False), OptimizerConfig())
