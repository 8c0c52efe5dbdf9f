"""Settings of `PointNeXt`, checked when they are made; importing them loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ditr_cache.errors import UsageError


class _Size(NamedTuple):
    width: int
    blocks: tuple[int, ...]
    abstraction_layers: int = 1
    abstraction_residual: bool = False


_SIZES = {
    "S": _Size(32, (0, 0, 0, 0), abstraction_layers=2, abstraction_residual=True),
    "B": _Size(32, (1, 2, 1, 1)),
    "L": _Size(32, (2, 4, 2, 2)),
    "XL": _Size(64, (3, 6, 3, 3)),
}


@dataclass(frozen=True, kw_only=True)
class PointNeXtConfig:
    """Shape of a `PointNeXt`; the defaults are those published for S3DIS (Qian et al. 2022).

    Args:
        name: which backbone this is.
        size: published size, which gives the four settings after it where they are None. As published for ScanNet, S
            has `abstraction_layers` 3 and `abstraction_residual` false instead.
        width: channels of the points; they double with every set abstraction.
        blocks: inverted residual blocks after each set abstraction, one entry per stage.
        abstraction_layers: layers of each set abstraction.
        abstraction_residual: each set abstraction adds the features of the points that it keeps.
        strides: each set abstraction keeps one of so many points, one entry per stage.
        radius: of the first set abstraction's neighbourhoods, in metres: 0.1 for S3DIS at a grid of 0.04, 0.05 for
            ScanNet at 0.02.
        radius_scaling: factor of the radius from a set abstraction to the blocks after it, and so to the next one.
        num_neighbors: largest number of points in a neighbourhood.
        expansion: factor of the channels inside a block.
        norm_eps: epsilon of every batch norm.
        norm_momentum: momentum of every batch norm.

    Raises:
        UsageError: a setting out of its range.
    """

    name: Literal["pointnext"] = "pointnext"
    size: Literal["S", "B", "L", "XL"] = "S"
    width: int | None = None
    blocks: tuple[int, ...] | None = None
    abstraction_layers: int | None = None
    abstraction_residual: bool | None = None
    strides: tuple[int, ...] = (4, 4, 4, 4)
    radius: float = 0.1
    radius_scaling: float = 2.0
    num_neighbors: int = 32
    expansion: int = 4
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        # YAML and JSON hand over lists.
        object.__setattr__(self, "strides", tuple(self.strides))
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.size not in _SIZES:
            raise UsageError(f"backbone.size must be one of {', '.join(_SIZES)}, got {self.size!r}")
        if not self.strides or min(self.strides) < 2:
            raise UsageError(f"backbone.strides must list at least 2 for each stage, got {list(self.strides)}")
        if len(self.stage_blocks) != len(self.strides):
            raise UsageError(
                f"backbone.blocks must have one entry per entry of backbone.strides ({len(self.strides)}), "
                f"got {len(self.stage_blocks)}"
            )
        if min(self.stage_blocks) < 0:
            raise UsageError(f"backbone.blocks must not be negative, got {list(self.stage_blocks)}")
        for key in ("width", "abstraction_layers", "num_neighbors", "expansion"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UsageError(f"backbone.{key} must be at least 1, got {value}")
        for key in ("radius", "radius_scaling", "norm_eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise UsageError(f"backbone.{key} must be positive and finite, got {getattr(self, key)}")
        if not 0 < self.norm_momentum <= 1:
            raise UsageError(f"backbone.norm_momentum must be in (0, 1], got {self.norm_momentum}")

    @property
    def num_stages(self) -> int:
        """Number of set abstractions, and of feature propagations."""
        return len(self.strides)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels at resolutions 0..num_stages."""
        width: int = self._resolved("width")
        return tuple(width << level for level in range(self.num_stages + 1))

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Blocks after each set abstraction."""
        blocks: tuple[int, ...] = self._resolved("blocks")
        return blocks

    @property
    def layers_of_abstraction(self) -> int:
        """Layers of each set abstraction."""
        layers: int = self._resolved("abstraction_layers")
        return layers

    @property
    def residual_of_abstraction(self) -> bool:
        """Whether set abstractions add the features of the points that they keep."""
        residual: bool = self._resolved("abstraction_residual")
        return residual

    @property
    def radii(self) -> tuple[float, ...]:
        """Radius in metres of each set abstraction; entry l+1 is also that of the blocks after abstraction l."""
        return tuple(self.radius * self.radius_scaling**stage for stage in range(self.num_stages + 1))

    @property
    def encoder_terms(self) -> tuple[int, ...]:
        """Channels of the terms that the encoder takes at resolutions 0..num_stages."""
        return self.channels

    @property
    def decoder_terms(self) -> tuple[int, ...]:
        """Channels of the terms that the decoder takes at resolutions 0..num_stages-1."""
        return self.channels[:-1]

    @property
    def out_channels(self) -> int:
        """Channels of what the network says about each point."""
        return self.channels[0]

    def _resolved(self, key: str) -> Any:
        value = getattr(self, key)
        return getattr(_SIZES[self.size], key) if value is None else value
