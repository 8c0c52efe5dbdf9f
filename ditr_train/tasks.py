"""What a run learns: its data, network, loss and score. `Segmentation` learns classes, `Distillation` VFM features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditr_cache.errors import CacheError, MismatchError, UnknownNameError, UsageError
from ditr_cache.store import open_cache
from ditr_train.cosine import CosineEvaluator
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.joint import JointDataset
from ditr_train.data.sample import PointBatch
from ditr_train.distributed import Processes
from ditr_train.evaluate import Evaluator
from ditr_train.losses import distillation_loss, segmentation_loss
from ditr_train.models.build import build_network
from ditr_train.models.distillation import Distiller
from ditr_train.models.segmentor import Segmentor
from ditr_train.recipe import Recipe


class Task(ABC):
    """A recipe's data, opened and checked, and what is made of it. Everything that can be refused is refused here.

    Args:
        recipe: with its caches set.
        this: the process among those of the run.

    Raises:
        CacheError: a cache that cannot be used for this recipe.
    """

    score: ClassVar[str]
    """The result of an evaluation that says which weights are best."""
    labelled: ClassVar[bool]
    """Whether labels are read."""

    def __init__(self, recipe: Recipe, this: Processes) -> None:
        self.recipe, self.this = recipe, this
        self.sources: list[list[CachedDataset]] = []
        """For each source of the recipe the datasets of its training splits."""
        self.validation: list[CachedDataset] = []
        """The validation split of each source that has one."""
        for number, source in enumerate(recipe.all_sources()):
            try:
                cache = open_cache(source.cache)
            except CacheError as error:
                key = f"sources.{number}.cache" if recipe.sources else "cache"
                raise type(error)(f"{key}: {error}; the recipe's is changed with --set {key}=PATH") from error
            if recipe.dataset not in (None, cache.metadata.dataset):
                raise MismatchError(
                    f"the recipe is for dataset {recipe.dataset!r}, but cache {source.cache!r} is of "
                    f"{cache.metadata.dataset!r}; use a recipe of that dataset (`ditr-train recipes`), or take the "
                    "other cache"
                )
            if source.vfm is not None:
                try:
                    cache.resolve_vfm(source.vfm)
                except (UnknownNameError, UsageError) as error:
                    key = f"sources.{number}.vfm" if recipe.sources else "vfm"
                    text = str(error).removesuffix(".")
                    raise type(error)(f"{text}; the recipe's is changed with --set {key}=NAME") from error
            data = source.data(recipe.data)
            common: dict[str, Any] = {
                **data.reading(), "vfm": source.vfm, "labelled": self.labelled,
                "class_names": recipe.classes if self.labelled else None,
            }  # fmt: skip
            splits = source.splits
            try:
                training = [CachedDataset(cache, name, **data.training(), **common) for name in splits.training]
                self.sources.append(training)
                if splits.val is not None:
                    self.validation.append(CachedDataset(cache, splits.val, **common))
            except UnknownNameError as error:
                without = "" if self.labelled else ", or splits.val=null to distil without validation"
                raise UnknownNameError(
                    f"{error}; the recipe's splits are train={splits.train} and val={splits.val}: name others with "
                    f"--set splits.train=NAME, --set splits.val=NAME{without}"
                ) from error
        self.train_set = JointDataset([part for parts in self.sources for part in parts])

    @property
    def first(self) -> CachedDataset:
        """The first dataset; classes and feature width are the same in all."""
        return self.sources[0][0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of training samples of each source."""
        return tuple(sum(map(len, parts)) for parts in self.sources)

    @property
    def ratios(self) -> tuple[float, ...] | None:
        """Sampling ratio of each source; None where every sample is seen once."""
        ratios = [source.ratio for source in self.recipe.all_sources()]
        return None if None in ratios else tuple(r for r in ratios if r is not None)

    def build(self) -> Segmentor | Distiller:
        """The network with fresh weights. Raises `UsageError` where settings do not fit each other."""
        vfm = self.first.vfm
        return build_network(
            self.recipe.task,
            self.recipe.model,
            in_channels=self.first.in_channels,
            num_classes=len(self.first.class_names),
            feature_dim=None if vfm is None else vfm.dim,
        )

    @abstractmethod
    def loss(self, network: nn.Module, batch: PointBatch) -> Tensor:
        """Scalar loss of a batch; `network` is what `build` made, maybe wrapped, to be called under autocast."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        """Results over the validation split, `score` among them; None where there is none. All processes must ask."""


class Segmentation(Task):
    """Classes of points, from labels."""

    score: ClassVar[str] = "mIoU"
    labelled: ClassVar[bool] = True

    def __init__(self, recipe: Recipe, this: Processes) -> None:
        super().__init__(recipe, this)
        self.class_weights = _class_weights(recipe.loss.class_weights, self.first.class_names, this.device)
        self._evaluator = Evaluator(self.validation[0], this, amp=recipe.training.amp, workers=recipe.data.workers)

    def loss(self, network: nn.Module, batch: PointBatch) -> Tensor:
        """See `Task`."""
        assert batch.segment is not None
        return segmentation_loss(
            network(batch).float(),
            batch.segment,
            ignore_index=-1,
            class_weights=self.class_weights,
            lovasz_weight=self.recipe.loss.lovasz_weight,
            label_smoothing=self.recipe.loss.label_smoothing,
        )

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """See `Task`."""
        return self._evaluator(model)


class Distillation(Task):
    """VFM features of points, from one cache or several with one head (D-DITR, arXiv 2503.18944); no labels."""

    score: ClassVar[str] = "cosine"
    labelled: ClassVar[bool] = False

    def __init__(self, recipe: Recipe, this: Processes) -> None:
        super().__init__(recipe, this)
        self._evaluator = None
        if self.validation:
            self._evaluator = CosineEvaluator(
                JointDataset(self.validation), this, amp=recipe.training.amp, workers=recipe.data.workers
            )

    def loss(self, network: nn.Module, batch: PointBatch) -> Tensor:
        """See `Task`."""
        return distillation_loss(network(batch))

    def evaluate(self, model: nn.Module) -> dict[str, Any] | None:
        """See `Task`."""
        return None if self._evaluator is None else self._evaluator(model)


def open_task(recipe: Recipe, this: Processes) -> Task:
    """The task that a recipe names. Raises as `Task`."""
    return {"segment": Segmentation, "distill": Distillation}[recipe.task](recipe, this)


def _class_weights(weights: Sequence[float] | None, classes: Sequence[str], device: torch.device) -> Tensor | None:
    if weights is None:
        return None
    if len(weights) != len(classes):
        raise UsageError(
            f"loss.class_weights: expected one per class of the cache ({len(classes)}), got {len(weights)}"
        )
    return torch.tensor(weights, dtype=torch.float32, device=device)
