"""The weights a run starts from: the backbone of another run (fine-tuning after distillation)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ditr_cache.errors import MismatchError, MissingDataError
from ditr_train.checkpoint import load_checkpoint, used_weights
from ditr_train.recipe import Recipe
from ditr_train.run_folder import RunFolder

log = logging.getLogger(__name__)

HEAD = "head."
"""Prefix of the parameters that belong to a task, and are never taken over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initialised:
    """What a run started from.

    Args:
        checkpoint: absolute path.
        task, vfm: of the run that made it; `vfm` is the key of its VFM, None without.
        step: that it was made at.
        tensors, parameters: how many were loaded; tensors include running statistics.
        fresh: names of the parameters that were left as they were.
    """

    checkpoint: str
    task: str
    vfm: str | None
    step: int
    tensors: int
    parameters: int
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        teacher = "" if self.vfm is None else f" of {self.vfm}"
        return (
            f"initialised from {self.checkpoint} (task {self.task}{teacher}, step {self.step}): {self.tensors} "
            f"tensors, {self.parameters / 1e6:.2f} M parameters loaded; {', '.join(self.fresh)} left fresh"
        )


def initialise(model: nn.Module, init: str, recipe: Recipe) -> Initialised:
    """Load the weights of another run into `model`, all but its head; everything else has to fit exactly.

    Args:
        model: with fresh weights.
        init: a run folder, of which the last checkpoint is taken (as published), or one of its checkpoints.
        recipe: of `model`.

    Raises:
        MissingDataError: no such run or checkpoint.
        DataError: a damaged checkpoint.
        MismatchError: a network of another backbone, input or injection.
    """
    path = Path(init)
    folder = RunFolder(path.parent if path.suffix == ".pt" else path)
    checkpoint = path if path.suffix == ".pt" else folder.last
    if not folder.started():
        raise MissingDataError(
            f"init: {init!r} is not a run folder; pass the run to start from, say a finished distillation, with "
            "--set init=RUN_DIR"
        )
    other, info = folder.open()
    if not checkpoint.exists():
        raise MissingDataError(
            f"init: run folder {str(folder.path)!r} has no {checkpoint.name} yet; let it train to its first checkpoint"
        )
    where = f"init: checkpoint {str(checkpoint)!r}"
    ours, theirs = dataclasses.asdict(recipe.model.backbone), dataclasses.asdict(other.model.backbone)
    for name, value in ours.items():
        if value != theirs.get(name):
            raise MismatchError(
                f"{where} is of another backbone: model.backbone.{name} is {_shown(theirs.get(name))} there and "
                f"{_shown(value)} in this recipe; make them equal"
            )
    if recipe.data.feat != other.data.feat:
        raise MismatchError(
            f"{where} reads other input channels: data.feat is {_shown(other.data.feat)} there and "
            f"{_shown(recipe.data.feat)} in this recipe; make them equal"
        )
    state = load_checkpoint(checkpoint)
    given = {name: value for name, value in used_weights(state).items() if not name.startswith(HEAD)}
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(HEAD)}
    for names, fault in ((wanted.keys() - given.keys(), "lacks"), (given.keys() - wanted.keys(), "has, beyond it,")):
        if names:
            first = sorted(names)[0]
            raise MismatchError(
                f"{where} does not fit this recipe's network: it {fault} {len(names)} tensors ({first}, ...); only "
                "the head may differ: make model.injection the same in both"
            )
    for name, value in wanted.items():
        if value.shape != given[name].shape:
            raise MismatchError(
                f"{where} does not fit this recipe's network: {name} has shape {list(given[name].shape)} there and "
                f"{list(value.shape)} here; give both runs the same inputs and model"
            )
    if recipe.data.grid_size != other.data.grid_size:
        log.warning(
            "init: %s was trained on voxels of %g m, this run has %g m", checkpoint, other.data.grid_size,
            recipe.data.grid_size,
        )  # fmt: skip
    model.load_state_dict(given, strict=False)
    loaded = [p for name, p in model.named_parameters() if not name.startswith(HEAD)]
    return Initialised(
        checkpoint=str(checkpoint.resolve()),
        task=other.task,
        vfm=next((cache.vfm_key for cache in info.caches), None),
        step=int(state["step"]),
        tensors=len(given),
        parameters=sum(p.numel() for p in loaded),
        fresh=tuple(name for name, _ in model.named_parameters() if name.startswith(HEAD)),
    )


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
