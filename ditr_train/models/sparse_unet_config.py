"""Shape of a `SparseUNet`, checked when it is made; importing it loads neither torch nor spconv."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditr_cache.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SparseUNetConfig:
    """Shape of a `SparseUNet`; the defaults are SpUNet-v1m1 of the published baselines.

    Args:
        name: of the backbone, in a recipe.
        stem_channels: channels of the stem, which is also the skip at full resolution.
        stem_kernel_size: edge of the stem's kernel in voxels, odd.
        channels: output channels of the encoder stages from fine to coarse, then of the decoder stages from coarse to
            fine; as many of one as of the other.
        layers: residual blocks of the same stages.
        norm_eps: epsilon of every batch norm.
        norm_momentum: momentum of every batch norm. The published 0.01 wants thousands of steps until the running
            statistics hold; use 0.1 for runs of hundreds.

    Raises:
        UsageError: a setting out of its range.
    """

    name: Literal["sparse_unet"] = "sparse_unet"
    stem_channels: int = 32
    stem_kernel_size: int = 5
    channels: tuple[int, ...] = (32, 64, 128, 256, 256, 128, 96, 96)
    layers: tuple[int, ...] = (2, 3, 4, 6, 2, 2, 2, 2)
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01

    def __post_init__(self) -> None:
        # YAML and JSON hand over lists.
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "layers", tuple(self.layers))
        if len(self.channels) < 2 or len(self.channels) % 2:
            raise UsageError(
                f"backbone.channels must list as many decoder as encoder stages, got {len(self.channels)} entries; "
                "give an even number, for example 32,64,128,256,256,128,96,96"
            )
        if len(self.layers) != len(self.channels):
            raise UsageError(
                f"backbone.layers must have one entry per entry of backbone.channels ({len(self.channels)}), "
                f"got {len(self.layers)}"
            )
        if min(self.channels) < 1 or self.stem_channels < 1:
            raise UsageError(
                f"backbone.channels and backbone.stem_channels must be positive, got {list(self.channels)} and "
                f"{self.stem_channels}"
            )
        if min(self.layers) < 1:
            raise UsageError(f"backbone.layers must be at least 1 each, got {list(self.layers)}")
        if self.stem_kernel_size < 1 or self.stem_kernel_size % 2 == 0:
            raise UsageError(f"backbone.stem_kernel_size must be odd and positive, got {self.stem_kernel_size}")
        if not self.norm_eps > 0 or not 0 < self.norm_momentum <= 1:
            raise UsageError(
                "backbone.norm_eps must be positive and backbone.norm_momentum in (0, 1], got "
                f"{self.norm_eps} and {self.norm_momentum}"
            )

    @property
    def num_stages(self) -> int:
        """Number of encoder stages, and of decoder stages."""
        return len(self.channels) // 2

    @property
    def encoder_terms(self) -> tuple[int, ...]:
        """Channels of the stem and of the encoder stages: entry l belongs to voxels of 2^l grid cells."""
        return (self.stem_channels, *self.channels[: self.num_stages])

    @property
    def decoder_terms(self) -> tuple[int, ...]:
        """Channels of the skips: `encoder_terms` without the bottleneck's."""
        return self.encoder_terms[:-1]

    @property
    def out_channels(self) -> int:
        """Channels of the decoder's last stage."""
        return self.channels[-1]
