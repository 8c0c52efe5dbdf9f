"""The parts of a recipe, each checked when it is made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from ditr_cache.errors import UsageError
from ditr_train.data.transforms import POINTWISE, Transform, build_transform
from ditr_train.tta import Augmentation


class Section(BaseModel):
    """A part of a recipe; refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TransformConfig(Section):
    """One augmentation: its name and arguments, see `ditr_train.data.transforms`."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class DataConfig(Section):
    """What the network sees of a sample.

    Args:
        grid_size: edge of a voxel in metres.
        feat: input channels, in order: coord, color, normal, strength, height (metres above the lowest point).
        center: move the middle of a sample's x and y extent and its lowest point to 0 first, and x and y once more
            after the crop; false leaves coordinates in the dataset's frame, for lidar the sensor's.
        augment: transforms of training samples before they are voxelized, in order.
        at_test: what evaluated samples get in place of `augment`: transforms that draw nothing and treat each point by
            itself (PointClip, PointClipDistance, ChromaticNormalize).
        crop_rate: crop training samples to this share of their voxels; null: not.
        point_max: then crop training samples to at most this many voxels; null: never.
        batch_size: samples per optimiser step, over all processes and accumulation steps.
        micro_batch: most samples that a process takes at once; accumulation follows, so that the global batch stays
            what it is on any number of GPUs. Null: as many as `training.accumulation` makes it.
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
    center: bool = True
    augment: tuple[TransformConfig, ...] = ()
    at_test: tuple[TransformConfig, ...] = ()
    crop_rate: float | None = Field(default=None, gt=0, le=1)
    point_max: int | None = Field(default=None, ge=1)
    batch_size: int = Field(ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    loop: int = Field(default=1, ge=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    fraction_seed: int = Field(default=0, ge=0)
    view: Literal["random", "last", "nearest"] | None = None
    mix_prob: float = Field(default=0.0, ge=0, le=1)
    workers: int = Field(default=1, ge=0, le=256)  # each is a process: a recipe may come from a stranger

    def transforms(self) -> tuple[Transform, ...]:
        """The augmentation, built."""
        return tuple(build_transform(t.name, t.args) for t in self.augment)

    def training(self) -> dict[str, Any]:
        """Arguments of `CachedDataset` for training samples, beside `reading`."""
        return {
            "transforms": self.transforms(), "crop_rate": self.crop_rate, "point_max": self.point_max,
            "fraction": self.fraction, "fraction_seed": self.fraction_seed,
        }  # fmt: skip

    def reading(self) -> dict[str, Any]:
        """Arguments of `CachedDataset` that training and evaluation share.

        Raises:
            UnknownNameError, UsageError: a transform at test time that cannot be built or is not pointwise.
        """
        at_test = tuple(build_transform(t.name, t.args) for t in self.at_test)
        for transform in at_test:
            if not isinstance(transform, POINTWISE):
                raise UsageError(
                    f"{type(transform).__name__} is not for test time: it draws, or looks at several points; use one "
                    f"of {', '.join(cls.__name__ for cls in POINTWISE)}"
                )
        return {
            "grid_size": self.grid_size, "feat": self.feat, "centred": self.center, "at_test": at_test,
            "view": self.view,
        }  # fmt: skip


class LossConfig(Section):
    """Cross-entropy + `lovasz_weight` x Lovasz-softmax.

    Args:
        lovasz_weight: 0 leaves Lovasz out.
        label_smoothing: of the cross-entropy.
        class_weights: of the cross-entropy, one per class; null: all 1.
    """

    lovasz_weight: float = Field(default=1.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    class_weights: tuple[float, ...] | None = None


class TrainingConfig(Section):
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


class SplitsConfig(Section):
    """Names of the cache's splits.

    Args:
        train: trained on; one or several (say five areas of S3DIS).
        val: evaluated on; null only for distillation, which then is not evaluated.
    """

    train: str | tuple[str, ...] = "train"
    val: str | None = "val"

    @property
    def training(self) -> tuple[str, ...]:
        """The splits that are trained on."""
        return (self.train,) if isinstance(self.train, str) else self.train


class SourceConfig(Section):
    """One of the caches of a joint distillation.

    Args:
        cache: path of the cache.
        vfm: name or key of its VFM, where `vfm` of the recipe does not say which one.
        splits: of this cache.
        ratio: how many of an epoch's samples come from here, relative to the ratios of the others; given for all
            sources or for none. None: every sample of every source once.
        augment, at_test: of this cache's samples, in place of those of `data`; null takes those.
    """

    cache: str
    vfm: str | None = None
    splits: SplitsConfig = SplitsConfig()
    ratio: float | None = Field(default=None, gt=0)
    augment: tuple[TransformConfig, ...] | None = None
    at_test: tuple[TransformConfig, ...] | None = None

    def data(self, data: DataConfig) -> DataConfig:
        """The recipe's settings of the data with those of this source."""
        own = {"augment": self.augment, "at_test": self.at_test}
        return data.model_copy(update={key: value for key, value in own.items() if value is not None})


class WandbConfig(Section):
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


class TrackingConfig(Section):
    """Where metrics go beside `metrics.jsonl`; changes no weight.

    Args:
        tensorboard: event files in the run folder.
        wandb: null for none.
    """

    tensorboard: bool = True
    wandb: WandbConfig | None = None


class EvaluationConfig(Section):
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


class PublishedConfig(Section):
    """What a recipe was published to reach, to compare one's own runs with; changes nothing about a run.

    Args:
        miou: percent; null where no number was published.
        split: that it was measured on.
        source: of the number.
        note: what one has to know of the number, or why there is none.
    """

    miou: float | None = Field(default=None, gt=0, lt=100)
    split: str = "val"
    source: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _accounted_for(self) -> PublishedConfig:
        if (self.source if self.miou is not None else self.note) is None:
            raise ValueError("expected a source of the number, or, without a number, a note that says why")
        return self
