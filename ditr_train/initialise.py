"""The weights a run starts from: the backbone of another run (fine-tuning after distillation), or public ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ditr_cache.errors import MismatchError, MissingDataError
from ditr_train.checkpoint import load_checkpoint, used_weights
from ditr_train.data.transforms import Transform
from ditr_train.foreign.files import read_public_file
from ditr_train.foreign.networks import public_network
from ditr_train.foreign.pairs import PublicNetwork
from ditr_train.foreign.weights import backbone_prefix, take
from ditr_train.recipe import Recipe
from ditr_train.run_folder import RunFolder

log = logging.getLogger(__name__)

HEAD = "head."
"""Prefix of the parameters that belong to a task, and are never taken over."""

BACKBONE = "backbone."
"""Prefix of the parameters that public weights are for."""

TRAINING_ONLY = ("drop_path", "shuffle_orders", "norm_momentum")
"""Settings of a backbone that say how it trains; fine-tuning may have its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initialised:
    """What a run started from.

    Args:
        checkpoint: absolute path.
        format: `run` or the format of a public file.
        task, vfm: of the run that made it; `vfm` is the key of its VFM, None without. None of a public file.
        step: that it was made at; None of a public file.
        network: name of a public network; None of a run.
        sha256: of a public file; None of a run.
        tensors, parameters: how many were loaded; tensors include running statistics.
        fresh: names of the parameters that were left as they were.
    """

    checkpoint: str
    format: str = "run"
    task: str | None = None
    vfm: str | None = None
    step: int | None = None
    network: str | None = None
    sha256: str | None = None
    tensors: int
    parameters: int
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        teacher = "" if self.vfm is None else f" of {self.vfm}"
        source = f"task {self.task}{teacher}, step {self.step}" if self.network is None else f"{self.network}"
        return (
            f"initialised from {self.checkpoint} ({source}): {self.tensors} tensors, {self.parameters / 1e6:.2f} M "
            f"parameters loaded; {_summary(self.fresh)} left fresh"
        )


def initialise(model: nn.Module, init: str, recipe: Recipe) -> Initialised:
    """Load the weights that a recipe starts from into `model`, all but its head; everything else has to fit exactly.

    Of a public file only the backbone is taken, so that injection stays fresh, too, and the decoder where the file is
    of an encoder alone.

    Args:
        model: with fresh weights.
        init: a run folder, of which the last checkpoint is taken (as published), or one of its checkpoints; a file
            where `recipe.init_format` is a public one.
        recipe: of `model`.

    Raises:
        MissingDataError: no such run, checkpoint or file.
        DataError: a damaged checkpoint or file.
        UsageError: a backbone that no public network computes, or a file of the other format.
        MismatchError: a network of another backbone, input or injection.
    """
    if recipe.init_format == "run":
        return _from_run(model, init, recipe)
    return _from_public_file(model, init, recipe)


def _from_run(model: nn.Module, init: str, recipe: Recipe) -> Initialised:
    path = Path(init)
    folder = RunFolder(path.parent if path.suffix == ".pt" else path)
    checkpoint = path if path.suffix == ".pt" else folder.last
    if not folder.started():
        raise MissingDataError(
            f"init: {init!r} is not a run folder; pass the run to start from, say a finished distillation, with "
            "--set init=RUN_DIR, or a file of public weights with --set init=FILE --set init_format=pointcept"
        )
    other, info = folder.open()
    if not checkpoint.exists():
        raise MissingDataError(
            f"init: run folder {str(folder.path)!r} has no {checkpoint.name} yet; let it train to its first checkpoint"
        )
    where = f"init: checkpoint {str(checkpoint)!r}"
    ours, theirs = dataclasses.asdict(recipe.model.backbone), dataclasses.asdict(other.model.backbone)
    for name, value in ours.items():
        if name not in TRAINING_ONLY and value != theirs.get(name):
            raise MismatchError(
                f"{where} is of another backbone: model.backbone.{name} is {_shown(theirs.get(name))} there and "
                f"{_shown(value)} in this recipe; make them equal"
            )
    _check_input(where, recipe, other)
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


def _check_input(where: str, recipe: Recipe, other: Recipe) -> None:
    """Raise `MismatchError` where the network of another recipe reads something else of a sample; warn where it reads
    the same of other points, as from one dataset to another."""
    if recipe.data.feat != other.data.feat:
        raise MismatchError(
            f"{where} reads other input channels: data.feat is {_shown(other.data.feat)} there and "
            f"{_shown(recipe.data.feat)} in this recipe; make them equal"
        )
    if recipe.data.center != other.data.center:
        raise MismatchError(
            f"{where} reads points in another frame: data.center is {str(other.data.center).lower()} there and "
            f"{str(recipe.data.center).lower()} in this recipe; make them equal"
        )
    theirs = _at_test(other)
    for ours in _at_test(recipe):
        if ours not in theirs:
            shown = " or ".join(map(_shown, theirs))
            log.warning("%s was trained with data.at_test %s, this run has %s", where, shown, _shown(ours))


def _at_test(recipe: Recipe) -> list[tuple[Transform, ...]]:
    """`data.at_test` of a recipe, built; of one with several sources, that of each."""
    parts = [source.data(recipe.data) for source in recipe.sources] or [recipe.data]
    return [part.reading()["at_test"] for part in parts]


def _from_public_file(model: nn.Module, init: str, recipe: Recipe) -> Initialised:
    config = recipe.model.backbone
    network = public_network(config)
    where = f"init: file {init!r}"
    file = read_public_file(Path(init))
    backbone_prefix(file.tensors, network, where)  # first of all: is it that network?
    for name, value in network.settings.items():
        if getattr(config, name) != value:
            raise MismatchError(
                f"{where}: weights of {network.name} are for model.backbone.{name}={value}, this recipe has "
                f"{getattr(config, name)}; set it to that"
            )
    if file.ours and network.outdated:
        raise MismatchError(
            f"{where} was written by ditr-train convert, for what Pointcept computes today; set "
            "model.backbone.variant=ptv3"
        )
    backbone = {n.removeprefix(BACKBONE): v for n, v in model.state_dict().items() if n.startswith(BACKBONE)}
    taken = take(file.tensors, network, backbone, where)
    if not file.ours:  # whose colours are those of the run that was converted
        _check_colors(network, init, recipe)
    given = {BACKBONE + name: value for name, value in taken.weights.items()}
    model.load_state_dict(given, strict=False)
    parameters = dict(model.named_parameters())
    return Initialised(
        checkpoint=str(file.path.resolve()),
        format=recipe.init_format,
        network=network.name,
        sha256=file.sha256,
        tensors=len(given),
        parameters=sum(p.numel() for name, p in parameters.items() if name in given),
        fresh=tuple(name for name in parameters if name not in given),
    )


def _check_colors(network: PublicNetwork, init: str, recipe: Recipe) -> None:
    """Warn where weights may want another range of colours than the recipe gives them."""
    normalized = any(transform.name == "ChromaticNormalize" for transform in recipe.data.at_test)
    if "color" not in recipe.data.feat or normalized or network.colors == "unit":
        return
    log.warning(
        "init: weights of %s want colours in -1 to 1%s, this run gives them 0 to 1. To change that, end data.augment "
        "with and set data.at_test to ChromaticNormalize of mean and std 0.5 (%s)",
        network.name,
        " if they are from before Pointcept v1.6.0" if network.colors == "either" else "",
        init,
    )


def _summary(names: Iterable[str]) -> str:
    """Names of parameters, those of a part that has many as the part's: `backbone.up.* (48)`."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(".".join(name.split(".")[: 2 if name.startswith(BACKBONE) else 1]), []).append(name)
    shown = [", ".join(some) if len(some) <= 2 else f"{part}.* ({len(some)})" for part, some in parts.items()]
    return ", ".join(shown)


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
