"""Recipes: everything about a run, validated before it starts; unknown keys are refused with the nearest known ones."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.data.dataset import CHANNELS
from ditr_train.data.transforms import Transform, build_transform
from ditr_train.models.config import ModelConfig
from ditr_train.optim import OptimizerConfig, ScheduleConfig
from ditr_train.tta import Augmentation, tta_set


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TransformConfig(_Section):
    """One augmentation: its name and arguments, see `ditr_train.data.transforms`."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class DataConfig(_Section):
    """What the network sees of a sample.

    Args:
        grid_size: edge of a voxel in metres.
        feat: input channels, in order: coord, color, normal, strength.
        augment: transforms of training samples before they are voxelized, in order.
        point_max: crop training samples to at most this many voxels; null: never.
        batch_size: samples per optimiser step, over all processes and accumulation steps.
        loop: how often one epoch goes through the split.
        fraction: train on this share of the samples only, at least one; smaller shares are subsets of larger ones.
        fraction_seed: which samples.
        view: which view gives a point its feature where the cache holds all of them (layout `views`): `random` is drawn
            anew for each training sample (evaluation takes the last view), `last`, `nearest`; null: `random` for such
            a cache, nothing for one that holds one feature per point.
        mix_prob: probability of joining two neighbours of a batch (Mix3D).
        workers: data-loading processes per training process; 0 loads in the training process.
    """

    grid_size: float = Field(gt=0)
    feat: tuple[str, ...] = Field(min_length=1)
    augment: tuple[TransformConfig, ...] = ()
    point_max: int | None = Field(default=None, ge=1)
    batch_size: int = Field(ge=1)
    loop: int = Field(default=1, ge=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    fraction_seed: int = Field(default=0, ge=0)
    view: Literal["random", "last", "nearest"] | None = None
    mix_prob: float = Field(default=0.0, ge=0, le=1)
    workers: int = Field(default=1, ge=0)

    def transforms(self) -> tuple[Transform, ...]:
        """The augmentation, built."""
        return tuple(build_transform(t.name, t.args) for t in self.augment)


class LossConfig(_Section):
    """Cross-entropy + `lovasz_weight` x Lovasz-softmax.

    Args:
        lovasz_weight: 0 leaves Lovasz out.
        label_smoothing: of the cross-entropy.
        class_weights: of the cross-entropy, one per class; null: all 1.
    """

    lovasz_weight: float = Field(default=1.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    class_weights: tuple[float, ...] | None = None


class TrainingConfig(_Section):
    """How the run goes.

    Args:
        epochs, steps: the budget; exactly one of them.
        amp: mixed precision on a GPU; a CPU always computes in float32.
        accumulation: micro-batches per optimiser step; `data.batch_size` stays what an optimiser step sees.
        clip_grad: largest gradient norm; null: not clipped.
        ema: decay per step of an exponential moving average of the weights, say 0.999, that is evaluated and used in
            their place; null: none.
        fixed_norms: share of the steps, the last ones, in which batch norms keep their running statistics, as they do
            at test time. Where a batch is one scene, its own statistics are a poor guess at those.
        sync_batchnorm: batch statistics over all GPUs of a distributed run.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        checkpoint_every: epochs between checkpoints; the last epoch always ends with one.
        log_every: optimiser steps per line of metrics.
    """

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    amp: Literal["off", "fp16", "bf16"] = "off"
    accumulation: int = Field(default=1, ge=1)
    clip_grad: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    fixed_norms: float = Field(default=0.0, ge=0, lt=1)
    sync_batchnorm: bool = False
    evaluate_every: int = Field(default=1, ge=1)
    checkpoint_every: int = Field(default=1, ge=1)
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _one_budget(self) -> TrainingConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"expected either epochs or steps, got epochs={self.epochs} and steps={self.steps}")
        return self


class SplitsConfig(_Section):
    """Names of the cache's splits.

    Args:
        train: trained on; several only for distillation, which needs no labels.
        val: evaluated on; null only for distillation, which then is not evaluated.
    """

    train: str | tuple[str, ...] = "train"
    val: str | None = "val"

    @property
    def training(self) -> tuple[str, ...]:
        """The splits that are trained on."""
        return (self.train,) if isinstance(self.train, str) else self.train


class SourceConfig(_Section):
    """One of the caches of a joint distillation.

    Args:
        cache: path of the cache.
        vfm: name or key of its VFM, where `vfm` of the recipe does not say which one.
        splits: of this cache.
        ratio: how many of an epoch's samples come from here, relative to the ratios of the others; given for all
            sources or for none. None: every sample of every source once.
    """

    cache: str
    vfm: str | None = None
    splits: SplitsConfig = SplitsConfig()
    ratio: float | None = Field(default=None, gt=0)


class WandbConfig(_Section):
    """A run of Weights & Biases; needs the extra `wandb`.

    Args:
        project: null takes W&B's own default.
        entity: user or team; null takes the one that is logged in.
        name: of the run; null takes the run folder's.
        group: runs that W&B shows together, say the seeds of one setting.
        tags: of the run.
        mode: `online`, `offline` (sent later by `wandb sync`), or `disabled`.
    """

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline", "disabled"] = "online"


class TrackingConfig(_Section):
    """Where metrics go beside `metrics.jsonl`; changes no weight.

    Args:
        tensorboard: event files in the run folder.
        wandb: null for none.
    """

    tensorboard: bool = True
    wandb: WandbConfig | None = None


class EvaluationConfig(_Section):
    """The official test protocol (`ditr-train eval --protocol full`) of this recipe; changes no weight.

    Args:
        tta: name of a set of `ditr_train.tta`, or a list of augmentations {rotate, scale, flip}.
        pre_grid_size: metres; the outdoor protocols first reduce a scan to one point per voxel of this size, whose
            prediction all its points get (0.025 in the published ones); null: not.
    """

    tta: Annotated[
        Annotated[str, Tag("name")] | Annotated[tuple[Augmentation, ...], Tag("list")],
        Discriminator(lambda value: "name" if isinstance(value, str) else "list"),
    ] = "none"
    pre_grid_size: float | None = Field(default=None, gt=0)


class Recipe(_Section):
    """Everything about a run.

    Args:
        description: one line for `ditr-train recipes`.
        task: `segment`, or `distill`: pretraining that predicts VFM features and needs no labels.
        cache: path of the cache; set when the recipe is run.
        sources: several caches to distill from at once, in place of `cache` and `splits`.
        vfm: name or key of the VFM whose features are injected or distilled; null for a network that is trained on
            the points only.
        init: run folder (or one of its checkpoints) whose backbone the run starts from, say a distillation to
            fine-tune; the head is fresh.
        dataset: the dataset that the cache must be of; null takes any.
        classes: the classes that the cache must have; null takes the cache's.
        seed: of the weights, the order and the augmentation.
    """

    description: str = ""
    task: Literal["segment", "distill"] = "segment"
    cache: str | None = None
    sources: tuple[SourceConfig, ...] = ()
    vfm: str | None = None
    init: str | None = None
    dataset: str | None = None
    classes: tuple[str, ...] | None = None
    seed: int = Field(default=0, ge=0)
    splits: SplitsConfig = SplitsConfig()
    data: DataConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    training: TrainingConfig
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.task == "distill":
            self._check_distillation()
        else:
            self._check_segmentation()
        return self

    def _check_distillation(self) -> None:
        if self.vfm is None and not (self.sources and all(source.vfm for source in self.sources)):
            raise ValueError(
                "task is distill but vfm is null: there is nothing to learn; name a VFM of the cache with --set "
                "vfm=NAME"
            )
        if self.model.injection is not None:
            raise ValueError(
                "task is distill and model.injection is set: a network that is given the features cannot learn to "
                "predict them; set model.injection to null"
            )
        if self.sources and self.cache is not None:
            raise ValueError("cache and sources are both set; name one cache, or several as sources")
        if len({source.ratio is None for source in self.sources}) > 1:
            raise ValueError("sources: a ratio is given for some sources and not for others; give it for all or none")

    def _check_segmentation(self) -> None:
        if self.sources:
            raise ValueError("sources is set but task is segment: several caches are for task distill; set cache")
        if not isinstance(self.splits.train, str) or self.splits.val is None:
            raise ValueError(
                "splits: task segment trains on one split and evaluates on one, got "
                f"train={self.splits.train!r} and val={self.splits.val!r}"
            )
        if self.model.injection is not None and self.vfm is None:
            raise ValueError(
                "model.injection is set but vfm is null: there is nothing to inject; name a VFM of the cache with "
                "--set vfm=NAME, or set model.injection to null"
            )
        if self.model.injection is None and self.vfm is not None:
            raise ValueError(
                f"vfm is {self.vfm!r} but model.injection is null: its features would not be used; set vfm to null, or "
                "model.injection to {}"
            )

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The caches that the run reads; the one of `cache` with the recipe's splits where no `sources` are given.

        Raises:
            UsageError: the recipe names none.
        """
        if self.sources:
            return tuple(s.model_copy(update={"vfm": s.vfm or self.vfm}) for s in self.sources)
        return (SourceConfig(cache=self.require_cache(), vfm=self.vfm, splits=self.splits),)

    def require_cache(self) -> str:
        """The cache's path. Raises `UsageError` where the recipe names none."""
        if self.cache is None:
            raise UsageError("cache: the recipe names none; pass the one to train from with --set cache=PATH")
        return self.cache

    def with_absolute_paths(self) -> Recipe:
        """The same recipe whatever folder it is used from: `cache`, those of `sources` and `init` made absolute."""

        def absolute(path: str | None) -> str | None:
            return None if path is None else os.path.abspath(path)  # noqa: PTH100 - links stay as they are

        sources = tuple(s.model_copy(update={"cache": absolute(s.cache)}) for s in self.sources)
        return self.model_copy(update={"cache": absolute(self.cache), "sources": sources, "init": absolute(self.init)})

    def to_yaml(self) -> str:
        """The recipe with every default written out; `parse_recipe` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values. Raises `UnknownNameError` or `UsageError` naming the key."""
    _refuse_unknown(values, Recipe, "")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n".join(_message(e) for e in error.errors())) from error
    for channel in recipe.data.feat:
        if channel not in CHANNELS:
            raise UnknownNameError.of("input channel in data.feat", channel, CHANNELS)
    try:
        recipe.data.transforms()
    except (UnknownNameError, UsageError) as error:
        raise type(error)(f"data.augment: {error}") from error
    try:
        tta_set(recipe.evaluation.tta)
    except (UnknownNameError, UsageError) as error:
        raise type(error)(f"evaluation.tta: {error}") from error
    return recipe


def differing_keys(first: Recipe, second: Recipe) -> list[str]:
    """Dotted names of the keys whose values differ."""
    a, b = _flatten(first.model_dump(mode="json")), _flatten(second.model_dump(mode="json"))
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        result.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return result


def _refuse_unknown(values: Any, annotation: Any, prefix: str) -> None:
    """Raise `UnknownNameError` for the first key that no field of the annotated type has, however deep."""
    known = _fields(annotation)
    if known is None or not isinstance(values, Mapping):
        return
    for key, value in values.items():
        if key not in known:
            where = f" of {prefix.rstrip('.')!r}" if prefix else ""
            raise UnknownNameError.of(f"recipe key {prefix}{key!s}: key{where}", str(key), known)
        nested = known[key]
        if isinstance(value, list):
            for i, item in enumerate(value):
                _refuse_unknown(item, _item_type(nested), f"{prefix}{key}.{i}.")
        else:
            _refuse_unknown(value, nested, f"{prefix}{key}.")


def _item_type(annotation: Any) -> Any:
    """Type of the items of a tuple (also where it may be something else, too); None for every other type."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((item for a in typing.get_args(annotation) if (item := _item_type(a)) is not None), None)
    return None


def _fields(annotation: Any) -> dict[str, Any] | None:
    """Name -> type of the fields of a section (also where it may be None); None for every other type."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [f for a in typing.get_args(annotation) if (f := _fields(a)) is not None]
        return found[0] if found else None
    if not isinstance(annotation, type):
        return None
    if issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        names = (
            annotation.model_fields
            if issubclass(annotation, BaseModel)
            else [f.name for f in dataclasses.fields(annotation)]
        )
        return {name: hints[name] for name in names}
    return None


def _message(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    got = "" if error["type"] in ("value_error", "missing") else f", got {error['input']!r}"
    return f"{where}: {text[:1].lower()}{text[1:]}{got}" if where else text
