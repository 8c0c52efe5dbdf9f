"""Optimizers and learning-rate schedules of the published recipes; settings are checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from ditr_cache.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters whose name contains `pattern` learn at `lr_scale` times the learning rate."""

    pattern: str
    lr_scale: float

    def __post_init__(self) -> None:
        if not self.pattern:
            raise UsageError("optimizer.groups: a pattern must not be empty, it would match every parameter")
        if not self.lr_scale >= 0:
            raise UsageError(f"optimizer.groups: lr_scale of {self.pattern!r} must be >= 0, got {self.lr_scale}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer, and with what.

    Args:
        name: "adamw" or "sgd".
        lr: peak learning rate.
        weight_decay: of all parameters, as in the published recipes; see `decay_norm_and_bias`.
        momentum: of SGD.
        nesterov: of SGD.
        betas: of AdamW.
        decay_norm_and_bias: False spares norms, biases and single vectors the weight decay.
        groups: parameters with a learning rate of their own; the first pattern that a name contains wins.

    Raises:
        UsageError: a setting out of its range.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 6e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    decay_norm_and_bias: bool = True
    groups: tuple[ParamGroup, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "groups", tuple(self.groups))
        if self.name not in ("adamw", "sgd"):
            raise UsageError(f"optimizer.name must be 'adamw' or 'sgd', got {self.name!r}")
        if not self.lr > 0:
            raise UsageError(f"optimizer.lr must be positive, got {self.lr}")
        if not self.weight_decay >= 0:
            raise UsageError(f"optimizer.weight_decay must be >= 0, got {self.weight_decay}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"optimizer.momentum must be in [0, 1), got {self.momentum}")
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise UsageError("optimizer.nesterov needs a positive optimizer.momentum; set nesterov to false")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optimizer.betas must be two numbers in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over the steps of a run.

    Args:
        name: "onecycle" (cosine warm-up to the peak, cosine down), "poly", "cosine" (from the peak down) or
            "multistep".
        pct_start: OneCycle, fraction of the steps that warm up.
        div_factor: OneCycle, the first learning rate is the peak over this.
        final_div_factor: OneCycle, the last learning rate is the first one over this.
        cycle_momentum: OneCycle, momentum (AdamW: beta1) moves between 0.95 and 0.85 against the learning rate. The
            published runs do so, since it is torch's default.
        power: poly, exponent of (1 - step / steps).
        end_factor: cosine, the last learning rate over the peak.
        milestones: multistep, shares of the steps after which the learning rate is multiplied by `gamma`, ascending.
        gamma: multistep.

    Raises:
        UsageError: a setting out of its range.
    """

    name: Literal["onecycle", "poly", "cosine", "multistep"] = "onecycle"
    pct_start: float = 0.05
    div_factor: float = 10.0
    final_div_factor: float = 1000.0
    cycle_momentum: bool = True
    power: float = 0.9
    end_factor: float = 1e-3
    milestones: tuple[float, ...] = (0.7, 0.9)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.name not in ("onecycle", "poly", "cosine", "multistep"):
            raise UsageError(f"schedule.name must be 'onecycle', 'poly', 'cosine' or 'multistep', got {self.name!r}")
        if not 0 <= self.end_factor <= 1 or not 0 < self.gamma <= 1:
            raise UsageError(
                "schedule.end_factor must be in [0, 1] and schedule.gamma in (0, 1], got "
                f"{self.end_factor} and {self.gamma}"
            )
        if sorted(set(self.milestones)) != list(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise UsageError(f"schedule.milestones must ascend within (0, 1), got {list(self.milestones)}")
        if not 0 < self.pct_start < 1:
            raise UsageError(f"schedule.pct_start must be between 0 and 1, got {self.pct_start}")
        if not self.div_factor >= 1 or not self.final_div_factor >= 1:
            raise UsageError(
                "schedule.div_factor and schedule.final_div_factor must be at least 1, got "
                f"{self.div_factor} and {self.final_div_factor}"
            )
        if not self.power > 0:
            raise UsageError(f"schedule.power must be positive, got {self.power}")


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """Optimizer over the parameters of `model` that want a gradient.

    Raises:
        UsageError: nothing to train, or a group pattern that no parameter's name contains.
    """
    optimizer_groups: dict[tuple[float, float], dict[str, Any]] = {}
    unmatched = {group.pattern for group in cfg.groups}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = next((group for group in cfg.groups if group.pattern in name), None)
        if group is not None:
            unmatched.discard(group.pattern)
        lr = cfg.lr * (1.0 if group is None else group.lr_scale)
        decay = cfg.weight_decay if cfg.decay_norm_and_bias or parameter.ndim > 1 else 0.0
        entry = optimizer_groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
        entry["params"].append(parameter)
    if not optimizer_groups:
        raise UsageError("the model has no parameter to train; unfreeze some")
    if unmatched:
        raise UsageError(
            f"optimizer.groups: no parameter's name contains {', '.join(map(repr, sorted(unmatched)))} that another "
            "pattern before it does not take; remove the group or mend its pattern"
        )
    groups = list(optimizer_groups.values())
    # Fused: one pass over each parameter, on a GPU and on a CPU.
    if cfg.name == "sgd":
        momentum = {"momentum": cfg.momentum, "nesterov": cfg.nesterov}
        return torch.optim.SGD(groups, lr=cfg.lr, fused=True, **momentum)  # type: ignore[arg-type]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


def build_scheduler(optimizer: torch.optim.Optimizer, cfg: ScheduleConfig, total_steps: int) -> LRScheduler:
    """Schedule from the optimizer's learning rates as peaks; to be stepped once after each of `total_steps` steps.

    Raises:
        UsageError: fewer than one step.
    """
    if total_steps < 1:
        raise UsageError(
            f"a schedule needs at least one step, got {total_steps}; raise the number of epochs or samples"
        )
    if cfg.name == "poly":
        return LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / total_steps) ** cfg.power)
    if cfg.name == "cosine":
        return LambdaLR(
            optimizer,
            lambda step: cfg.end_factor + (1 - cfg.end_factor) * (1 + math.cos(math.pi * step / total_steps)) / 2,
        )
    if cfg.name == "multistep":
        return LambdaLR(optimizer, lambda step: cfg.gamma ** sum(step >= m * total_steps for m in cfg.milestones))
    # torch divides by zero where the warm-up is exactly one step.
    pct_start = cfg.pct_start if abs(cfg.pct_start * total_steps - 1.0) > 1e-6 else cfg.pct_start * 1.001
    has_momentum = all(group.get("momentum", 1) or "betas" in group for group in optimizer.param_groups)
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=pct_start,
        anneal_strategy="cos",
        cycle_momentum=cfg.cycle_momentum and has_momentum,
        div_factor=cfg.div_factor,
        final_div_factor=cfg.final_div_factor,
    )
