"""Recipes: everything about a run, validated before it starts; unknown keys are refused with the nearest known ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.data.dataset import CHANNELS
from ditr_train.models.config import BACKBONES, ModelConfig
from ditr_train.optim import OptimizerConfig, ScheduleConfig
from ditr_train.recipe_keys import refuse_unknown
from ditr_train.recipe_sections import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    PublishedConfig,
    Section,
    SourceConfig,
    SplitsConfig,
    TrackingConfig,
    TrainingConfig,
)  # fmt: skip
from ditr_train.tta import tta_set


class Recipe(Section):
    """Everything about a run.

    Args:
        description: one line for `ditr-train recipes`.
        published: the score that the recipe was published with; null where it was not published.
        task: `segment`, or `distill`: pretraining that predicts VFM features and needs no labels.
        cache: path of the cache; set when the recipe is run.
        sources: several caches to distill from at once, in place of `cache` and `splits`.
        vfm: name or key of the VFM whose features are injected or distilled; null for a network that is trained on
            the points only.
        init: run folder (or one of its checkpoints) whose backbone the run starts from, say a distillation to
            fine-tune, or a file of public weights (see `init_format`); the head is fresh.
        init_format: what `init` is: `run`, or `pointcept`: a state dict with the names of Pointcept's SpUNet-v1m1 or
            PT-v3m1, or of Sonata's PT-v3m2, with or without a decoder. It does not say which inputs it was trained
            with: set `data.feat` and `data.grid_size` to its configuration's. Colours are given in 0..1, as Pointcept
            does since v1.6.0; weights from before want -1..1: end `data.augment` with, and set `data.at_test` to,
            ChromaticNormalize of mean and std 0.5. The released PT-v3m1 weights also want the variant `ptv3-v1.5.1`.
        dataset: the dataset that the cache must be of; null takes any.
        classes: the classes that the cache must have; null takes the cache's.
        seed: of the weights, the order and the augmentation.
    """

    description: str = ""
    published: PublishedConfig | None = None
    task: Literal["segment", "distill"] = "segment"
    cache: str | None = None
    sources: tuple[SourceConfig, ...] = ()
    vfm: str | None = None
    init: str | None = None
    init_format: Literal["run", "pointcept"] = "run"
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
        if self.data.micro_batch is not None and self.training.accumulation > 1:
            raise ValueError(
                f"data.micro_batch is {self.data.micro_batch} and training.accumulation is "
                f"{self.training.accumulation}: the one follows from the other; set one of them alone"
            )
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
            raise ValueError(
                "cache and sources are both set, and this recipe reads several caches: set those of its sources (--set "
                "sources.0.cache=PATH and so on), or --set sources=[] to read the one of cache"
            )
        if len({source.ratio is None for source in self.sources}) > 1:
            raise ValueError("sources: a ratio is given for some sources and not for others; give it for all or none")

    def _check_segmentation(self) -> None:
        if self.sources:
            raise ValueError("sources is set but task is segment: several caches are for task distill; set cache")
        if self.splits.val is None:
            raise ValueError("splits.val is null, but task segment is evaluated; name one with --set splits.val=NAME")
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
            return path if path is None or "://" in path else os.path.abspath(path)  # noqa: PTH100 - links stay as they are

        sources = tuple(s.model_copy(update={"cache": absolute(s.cache)}) for s in self.sources)
        return self.model_copy(update={"cache": absolute(self.cache), "sources": sources, "init": absolute(self.init)})

    def to_yaml(self) -> str:
        """The recipe with every default written out; `parse_recipe` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values. Raises `UnknownNameError` or `UsageError` naming the key."""
    refuse_unknown(values, Recipe, "")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n".join(_message(e) for e in error.errors())) from error
    for channel in recipe.data.feat:
        if channel not in CHANNELS:
            raise UnknownNameError.of("input channel in data.feat", channel, CHANNELS)
    parts = {"data": recipe.data, **{f"sources.{i}": s.data(recipe.data) for i, s in enumerate(recipe.sources)}}
    for where, data in parts.items():
        for key, build in (("augment", data.transforms), ("at_test", data.reading)):
            try:
                build()
            except (UnknownNameError, UsageError) as error:
                raise type(error)(f"{where}.{key}: {error}") from error
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


def _message(error: Mapping[str, Any]) -> str:
    # pydantic names the member of a union after the key that holds it.
    loc = [str(part) for part in error["loc"]]
    where = ".".join(
        part for part, above in zip(loc, ["", *loc], strict=False) if above != "backbone" or part not in BACKBONES
    )
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    got = "" if error["type"] in ("value_error", "missing") else f", got {error['input']!r}"
    return f"{where}: {text[:1].lower()}{text[1:]}{got}" if where else text
