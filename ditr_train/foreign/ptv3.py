"""PT-v3m1 and Sonata's PT-v3m2, which our `PointTransformerV3` computes; resolution L, block I.

| here | there |
|---|---|
| `embedding.{conv,linear,norm}` | `embedding.stem.{conv,linear,norm}` |
| `down.L.{linear,norm}` | `enc.encL.down.{proj,norm.0}` |
| `encoder.L.blockI` | `enc.encL.blockI` |
| `up.L.{skip,coarse}.{linear,norm}` | `dec.decL.up.{proj_skip,proj}.{0,1}` |
| `decoder.L.blockI` | `dec.decL.blockI` |
| `cpe.{conv,linear,norm}` of a block, `cpe.bias` | `cpe.{0,1,2}`, `cpe.0.bias` |
| `norm1`, `norm2` | `norm1.0`, `norm2.0` |
| `attention.{qkv,proj,rpe.table}` | `attn.{qkv,proj,rpe.rpe_table}` |
| `mlp.{fc1,fc2}` | `mlp.0.{fc1,fc2}` |
| `head` | `seg_head` of the network |

No tensor tells by which release of Pointcept it was trained. The weights that it gives away are of v1.5.1: the variant
`ptv3-v1.5.1`, which no release since 2024-03-26 computes, and colours in -1..1 (0..1 since v1.6.0, 2025-03-21).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ditr_train.foreign.pairs import Colors, Pair, PublicNetwork, batch_norm, layer_norm, weight
from ditr_train.models.ptv3_config import PTv3Config

_COLORS: dict[str, Colors] = {"ptv3": "either", "ptv3-v1.5.1": "signed", "sonata": "unit"}


def ptv3(config: PTv3Config) -> PublicNetwork:
    """PT-v3m1 or, for the variant `sonata`, PT-v3m2 of the same shape."""
    sonata = config.variant == "sonata"
    return PublicNetwork(
        name="PT-v3m2" if sonata else "PT-v3m1",
        pairs=tuple(_pairs(config)),
        head=tuple(weight("head", "seg_head", bias=True)),
        decoder=("up.", "decoder."),
        # An encoder alone takes nothing of a file's decoder.
        ignored=("embedding.mask_token",) if config.decoder_depths else ("embedding.mask_token", "dec."),
        # The norms of the variant sonata are layer norms.
        settings={} if sonata else {"norm_eps": 1e-3},
        arguments=_arguments(config),
        colors=_COLORS[config.variant],
        outdated=config.variant == "ptv3-v1.5.1",
    )


def _arguments(config: PTv3Config) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "order": config.orders,
        "stride": (2,) * config.num_stages,
        "mlp_ratio": config.mlp_ratio,
        "drop_path": config.drop_path,
        "shuffle_orders": config.shuffle_orders,
        "enable_rpe": config.rpe,
        "enable_flash": not config.rpe,
        "enc_mode": not config.decoder_depths,
    }
    if config.variant == "sonata":
        # Pointcept's segmentor then lays the features of all resolutions side by side.
        arguments["traceable"] = not config.decoder_depths
    for ours, theirs in (("encoder", "enc"), ("decoder", "dec")):
        depths = getattr(config, f"{ours}_depths")
        arguments[f"{theirs}_depths"] = depths
        arguments[f"{theirs}_channels"] = getattr(config, f"{ours}_channels")
        arguments[f"{theirs}_num_head"] = getattr(config, f"{ours}_heads")
        arguments[f"{theirs}_patch_size"] = (config.patch_size,) * len(depths)
    return arguments


def _pairs(config: PTv3Config) -> Iterator[Pair]:
    sonata = config.variant == "sonata"
    norm = layer_norm if sonata else batch_norm
    if sonata:
        yield from weight("embedding.linear", "embedding.stem.linear", bias=True)
    else:
        yield from weight("embedding.conv", "embedding.stem.conv")
    yield from norm("embedding.norm", "embedding.stem.norm")
    for level, depth in enumerate(config.encoder_depths):
        if level > 0:
            yield from weight(f"down.{level}.linear", f"enc.enc{level}.down.proj", bias=True)
            yield from norm(f"down.{level}.norm", f"enc.enc{level}.down.norm.0")
        for i in range(depth):
            yield from _block(f"encoder.{level}.block{i}", f"enc.enc{level}.block{i}", rpe=config.rpe)
    for level, depth in enumerate(config.decoder_depths):
        for ours, theirs in (("skip", "proj_skip"), ("coarse", "proj")):
            yield from weight(f"up.{level}.{ours}.linear", f"dec.dec{level}.up.{theirs}.0", bias=True)
            yield from norm(f"up.{level}.{ours}.norm", f"dec.dec{level}.up.{theirs}.1")
        for i in range(depth):
            yield from _block(f"decoder.{level}.block{i}", f"dec.dec{level}.block{i}", rpe=config.rpe)


def _block(ours: str, theirs: str, *, rpe: bool) -> Iterator[Pair]:
    yield from weight(f"{ours}.cpe.conv", f"{theirs}.cpe.0")
    yield Pair(f"{ours}.cpe.bias", f"{theirs}.cpe.0.bias")
    yield from weight(f"{ours}.cpe.linear", f"{theirs}.cpe.1", bias=True)
    yield from layer_norm(f"{ours}.cpe.norm", f"{theirs}.cpe.2")
    yield from layer_norm(f"{ours}.norm1", f"{theirs}.norm1.0")
    yield from weight(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", bias=True)
    yield from weight(f"{ours}.attention.proj", f"{theirs}.attn.proj", bias=True)
    if rpe:
        yield Pair(f"{ours}.attention.rpe.table", f"{theirs}.attn.rpe.rpe_table")
    yield from layer_norm(f"{ours}.norm2", f"{theirs}.norm2.0")
    for i in (1, 2):
        yield from weight(f"{ours}.mlp.fc{i}", f"{theirs}.mlp.0.fc{i}", bias=True)
