"""The public network of each of our backbones."""

from __future__ import annotations

from typing import Any

from ditr_cache.errors import UsageError
from ditr_train.foreign.pairs import PublicNetwork
from ditr_train.foreign.ptv3 import ptv3
from ditr_train.foreign.spunet import spunet
from ditr_train.models.ptv3_config import PTv3Config
from ditr_train.models.sparse_unet_config import SparseUNetConfig

STEMS = {
    "conv_input.0.weight": ("SpUNet-v1m1", "model.backbone.name=sparse_unet"),
    "embedding.stem.conv.weight": (
        "PT-v3m1",
        "model.backbone.name=ptv3 and model.backbone.variant=ptv3, or ptv3-v1.5.1 for what Pointcept released",
    ),
    "embedding.stem.linear.weight": (
        "PT-v3m2 (Sonata)",
        "model.backbone.name=ptv3 and model.backbone.variant=sonata",
    ),
}
"""The weight that reads a network's input -> its name, and the settings of ours."""


def public_network(config: Any) -> PublicNetwork:
    """Pointcept's network for a backbone's configuration. Raises `UsageError` where it has none."""
    if isinstance(config, SparseUNetConfig):
        return spunet(config)
    if isinstance(config, PTv3Config):
        return ptv3(config)
    raise UsageError(
        f"Pointcept has no network that computes what backbone {config.name!r} does; its formats are for sparse_unet "
        "and ptv3"
    )
