"""Settings of the networks, checked when they are made; importing them loads neither torch nor spconv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, SkipValidation, Tag

from ditr_cache.errors import UsageError
from ditr_train.models.pointnext_config import PointNeXtConfig
from ditr_train.models.ptv3_config import PTv3Config
from ditr_train.models.sparse_unet_config import SparseUNetConfig


@dataclass(frozen=True, kw_only=True)
class InjectionConfig:
    """Where VFM features enter the network and how they get there; the defaults inject into the decoder as DITR does.

    Every place has a projection of its own, so that a resolution may be named for the decoder and for the encoder.

    Args:
        decoder: resolutions at which the decoder gets a term where it reads the encoder: "all", or a list of some of
            0..num_stages-1. Resolution 0 has the points, or voxels, themselves; each further one is the next coarser
            of the backbone, voxels twice as large or the points of the next set abstraction.
        encoder: resolutions at which the encoder gets a term: 0 at the output of the stem; l >= 1 at the output of the
            step that leads there, before the blocks of stage l. The coarsest, num_stages, is the bottleneck.
        input: the features of each point are projected to `input_channels` and appended to the network input.
        input_channels: channels of that projection; unused without `input`.
        pool: what one site of a coarse resolution takes from the features of its points. "mean" and "max" (per
            channel) leave out points without a feature. "zero_max" is the maximum as published: such points are rows
            of zeros, so that a site with any of them gets no negative value, and a site with none but them holds a
            row of zeros that passes the projection and its batch norm like every other.
        feature_drop: probability, in training, that a point is treated as if it had no feature.
        missing_embedding: sites without any feature get a learned VFM feature instead of no contribution.
        visibility_flag: every projection reads one more channel, the share of a site's finest voxels that have a
            feature. Sites without any then pass the projection with a share of 0, not left out.

    Raises:
        UsageError: a setting out of its range, no place at all, or settings that contradict each other.
    """

    # Checked below: pydantic would answer for each member of the union.
    decoder: SkipValidation[Literal["all"] | tuple[int, ...]] = "all"
    encoder: tuple[int, ...] = ()
    input: bool = False
    input_channels: int = 32
    pool: Literal["mean", "max", "zero_max"] = "mean"
    feature_drop: float = 0.0
    missing_embedding: bool = False
    visibility_flag: bool = False

    def __post_init__(self) -> None:
        if self.decoder != "all":
            object.__setattr__(self, "decoder", _resolutions("decoder", self.decoder, "'all' or "))
        object.__setattr__(self, "encoder", _resolutions("encoder", self.encoder))
        if not (self.decoder or self.encoder or self.input):
            raise UsageError(
                "injection names no place: decoder and encoder are empty and input is false; name one, or set "
                "injection to null"
            )
        if self.input_channels < 1:
            raise UsageError(f"injection.input_channels must be positive, got {self.input_channels}")
        if self.pool not in ("mean", "max", "zero_max"):
            raise UsageError(f"injection.pool must be 'mean', 'max' or 'zero_max', got {self.pool!r}")
        if not 0.0 <= self.feature_drop < 1.0:
            raise UsageError(f"injection.feature_drop must be in [0, 1), got {self.feature_drop}")
        if self.pool == "zero_max" and self.missing_embedding:
            raise UsageError(
                "injection.pool 'zero_max' and injection.missing_embedding contradict each other: the one makes a "
                "site without features a row of zeros, the other a learned row; use one of them"
            )

    def decoder_resolutions(self, num_stages: int) -> tuple[int, ...]:
        """Resolutions of the decoder that get a term, of a backbone with `num_stages` decoder stages."""
        return tuple(range(num_stages)) if self.decoder == "all" else self.decoder

    @property
    def appended_channels(self) -> int:
        """Channels that are appended to the network input."""
        return self.input_channels if self.input else 0


def _resolutions(place: str, values: Any, otherwise: str = "") -> tuple[int, ...]:
    # Not isinstance: `true` would pass for 1.
    if not isinstance(values, list | tuple) or any(type(v) is not int or v < 0 for v in values):
        raise UsageError(f"injection.{place} must be {otherwise}a list of resolutions, say [0, 1], got {values!r}")
    if len(set(values)) < len(values):
        raise UsageError(f"injection.{place} must name each resolution once, got {list(values)}")
    return tuple(sorted(values))


DEFAULT_BACKBONE = "sparse_unet"


def backbone_name(value: Any) -> str:
    """Which backbone settings are for: plain values with a `name`, or a config."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return DEFAULT_BACKBONE if name is None else str(name)


BackboneConfig = Annotated[
    Annotated[SparseUNetConfig, Tag("sparse_unet")]
    | Annotated[PTv3Config, Tag("ptv3")]
    | Annotated[PointNeXtConfig, Tag("pointnext")],
    Discriminator(backbone_name),
]
"""Settings of a backbone, whichever; `name` says of which one."""

BACKBONES: dict[str, type] = {"sparse_unet": SparseUNetConfig, "ptv3": PTv3Config, "pointnext": PointNeXtConfig}
"""Name of every backbone -> its settings."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network: its backbone and, with VFM features, their injection.

    Args:
        backbone: which one, and its shape.
        injection: None for a network that reads points only.

    Raises:
        UsageError: injection at a resolution that the backbone does not have.
    """

    backbone: BackboneConfig = field(default_factory=SparseUNetConfig)
    injection: InjectionConfig | None = None

    def __post_init__(self) -> None:
        if self.injection is None:
            return
        stages = len(self.backbone.decoder_terms)
        elsewhere = self.injection.encoder or self.injection.input
        if not stages and not (elsewhere and self.injection.decoder in ("all", ())):
            raise UsageError(
                "injection.decoder: this backbone has no decoder; name resolutions of its encoder with "
                f"injection.encoder (0 to {self.backbone.num_stages}), or set injection.input"
            )
        for place, resolutions, coarsest in (
            ("decoder", self.injection.decoder_resolutions(stages), stages - 1),
            ("encoder", self.injection.encoder, self.backbone.num_stages),
        ):
            if any(resolution > coarsest for resolution in resolutions):
                raise UsageError(
                    f"injection.{place} must name resolutions of the backbone, whose {place} has 0 to {coarsest}, got "
                    f"{list(resolutions)}"
                )
