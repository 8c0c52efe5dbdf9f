"""Shape of a `PointTransformerV3`, checked when it is made; importing it loads neither torch nor spconv."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditr_cache.errors import UsageError

VARIANTS = ("ptv3", "ptv3-v1.5.1", "sonata")
CURVES = ("z", "z-trans", "hilbert", "hilbert-trans")


@dataclass(frozen=True, kw_only=True)
class PTv3Config:
    """Shape of a `PointTransformerV3`; the defaults are the published base network.

    Lists go from fine to coarse: entry l belongs to voxels of 2^l grid cells.

    Args:
        name: of the backbone, in a recipe.
        variant: "ptv3" is the network as published (Pointcept's PT-v3m1 since 2024-03-26). "ptv3-v1.5.1" is what it
            was before, when the convolution of a block saw the last branch of the block before instead of the sum:
            the PTv3 weights that Pointcept gives away need it. "sonata" is that of Sonata and Concerto (PT-v3m2): a
            linear stem, layer norms instead of batch norms, and a convolution of the decoder's first blocks that sees
            the sum of both ways instead of the skip alone.
        encoder_depths: blocks of the encoder's stages.
        encoder_channels: channels of the same stages.
        encoder_heads: attention heads of the same stages.
        decoder_depths: blocks of the decoder's stages, one stage fewer than the encoder's. All three lists of the
            decoder empty: no decoder; the output is the encoder's features of all resolutions side by side, as in
            linear probes of Sonata.
        decoder_channels: channels of the same stages.
        decoder_heads: attention heads of the same stages.
        patch_size: voxels that attend to one another.
        mlp_ratio: hidden channels of the blocks' MLP by channels.
        drop_path: probability, in training, that a voxel skips the branch of the last block; it rises linearly from 0
            at the first.
        orders: curves along which patches are cut; block i of a stage uses the i-th, cyclically.
        shuffle_orders: in training, every stage has the curves in an order of its own, drawn anew for each batch.
        rpe: relative position bias in the attention; takes memory, use it with a `patch_size` of 128.
        norm_eps: epsilon of every batch norm. Layer norms have 1e-5.
        norm_momentum: momentum of every batch norm. The published 0.01 wants thousands of steps until the running
            statistics hold; use 0.1 for runs of hundreds.

    Raises:
        UsageError: a setting out of its range, or lists that do not fit each other.
    """

    name: Literal["ptv3"] = "ptv3"
    variant: Literal["ptv3", "ptv3-v1.5.1", "sonata"] = "ptv3"
    encoder_depths: tuple[int, ...] = (2, 2, 2, 6, 2)
    encoder_channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    encoder_heads: tuple[int, ...] = (2, 4, 8, 16, 32)
    decoder_depths: tuple[int, ...] = (2, 2, 2, 2)
    decoder_channels: tuple[int, ...] = (64, 64, 128, 256)
    decoder_heads: tuple[int, ...] = (4, 4, 8, 16)
    patch_size: int = 1024
    mlp_ratio: float = 4.0
    drop_path: float = 0.3
    orders: tuple[str, ...] = CURVES
    shuffle_orders: bool = True
    rpe: bool = False
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01

    def __post_init__(self) -> None:
        for branch in ("encoder", "decoder"):
            for what in ("depths", "channels", "heads"):
                # YAML and JSON hand over lists.
                object.__setattr__(self, f"{branch}_{what}", tuple(getattr(self, f"{branch}_{what}")))
        object.__setattr__(self, "orders", tuple(self.orders))
        if self.variant not in VARIANTS:
            raise UsageError(f"backbone.variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        stages = len(self.encoder_depths)
        if stages < 2:
            raise UsageError(
                f"backbone.encoder_depths must list at least two stages, got {list(self.encoder_depths)}; for example "
                "2,2,2,6,2"
            )
        self._check_branch("encoder", stages)
        self._check_branch("decoder", stages - 1 if self.decoder_depths else 0)
        if self.patch_size < 1:
            raise UsageError(f"backbone.patch_size must be positive, got {self.patch_size}")
        if not min(self.encoder_channels + self.decoder_channels) * self.mlp_ratio >= 1:
            raise UsageError(
                f"backbone.mlp_ratio must leave the MLPs of every stage at least one channel, got {self.mlp_ratio}"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise UsageError(f"backbone.drop_path must be in [0, 1), got {self.drop_path}")
        if not self.orders or any(order not in CURVES for order in self.orders):
            raise UsageError(f"backbone.orders must list some of {', '.join(CURVES)}, got {list(self.orders)}")
        if not self.norm_eps > 0 or not 0 < self.norm_momentum <= 1:
            raise UsageError(
                "backbone.norm_eps must be positive and backbone.norm_momentum in (0, 1], got "
                f"{self.norm_eps} and {self.norm_momentum}"
            )

    def _check_branch(self, branch: str, stages: int) -> None:
        depths, channels, heads = (getattr(self, f"{branch}_{what}") for what in ("depths", "channels", "heads"))
        for what, values in (("depths", depths), ("channels", channels), ("heads", heads)):
            if len(values) != stages:
                raise UsageError(
                    f"backbone.{branch}_{what} must have {stages} entries, one per stage of the {branch}, got "
                    f"{list(values)}"
                )
            if any(value < 1 for value in values):
                raise UsageError(f"backbone.{branch}_{what} must be positive, got {list(values)}")
        if any(c % h for c, h in zip(channels, heads, strict=True)):
            raise UsageError(
                f"backbone.{branch}_channels must be multiples of backbone.{branch}_heads, got {list(channels)} and "
                f"{list(heads)}"
            )

    @property
    def num_stages(self) -> int:
        """How often the resolution is halved."""
        return len(self.encoder_depths) - 1

    @property
    def encoder_terms(self) -> tuple[int, ...]:
        """Channels of the encoder's stages, where a term is added before the blocks."""
        return self.encoder_channels

    @property
    def decoder_terms(self) -> tuple[int, ...]:
        """Channels of the decoder's stages, where a term is added before the blocks; none without a decoder."""
        return self.decoder_channels

    @property
    def out_channels(self) -> int:
        """Channels of the decoder's last stage; without a decoder, of all the encoder's stages."""
        return self.decoder_channels[0] if self.decoder_channels else sum(self.encoder_channels)
