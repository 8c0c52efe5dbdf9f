"""SpUNet-v1m1, which our `SparseUNet` computes.

| here | there |
|---|---|
| `stem` | `conv_input` |
| `down.S`, `encoder.S.blockI` | `down.S`, `enc.S.blockI` |
| `up.T`, `decoder.T.blockI`, T from coarse to fine | `up.S`, `dec.S.blockI`, S from fine to coarse |
| `conv`, `norm` of a convolution between resolutions | `0`, `1` |
| `norm1`, `norm2`, `shortcut` of a block | `bn1`, `bn2`, `proj` |
| `head` | `final` of the backbone |

Convolutions have the same layout, (out, x, y, z, in), since both give spconv x, y, z of the grid in this order. The
stem there asks for padding 1 with a kernel of 5, which a submanifold convolution does not read.
"""

from __future__ import annotations

from collections.abc import Iterator

from ditr_train.foreign.pairs import Pair, PublicNetwork, batch_norm, weight
from ditr_train.models.sparse_unet_config import SparseUNetConfig


def spunet(config: SparseUNetConfig) -> PublicNetwork:
    """SpUNet-v1m1 of the same shape."""
    return PublicNetwork(
        name="SpUNet-v1m1",
        pairs=tuple(_pairs(config)),
        head=tuple(weight("head", "backbone.final", bias=True, pointwise=True)),
        decoder=("up.", "decoder."),
        ignored=("final.",),
        settings={"stem_kernel_size": 5, "norm_eps": 1e-3},
        arguments={"base_channels": config.stem_channels, "channels": config.channels, "layers": config.layers},
        ends_in_head=True,
        colors="either",
    )


def _pairs(config: SparseUNetConfig) -> Iterator[Pair]:
    stages = config.num_stages
    yield from _conv_norm("stem", "conv_input")
    for s in range(stages):
        yield from _conv_norm(f"down.{s}", f"down.{s}")
        for i in range(config.layers[s]):
            yield from _block(f"encoder.{s}.block{i}", f"enc.{s}.block{i}")
    for t in range(stages):
        s = stages - 1 - t
        yield from _conv_norm(f"up.{t}", f"up.{s}")
        for i in range(config.layers[stages + t]):
            # The first block reads the skip beside the stage's own channels.
            yield from _block(f"decoder.{t}.block{i}", f"dec.{s}.block{i}", shortcut=i == 0)


def _conv_norm(ours: str, theirs: str) -> Iterator[Pair]:
    yield from weight(f"{ours}.conv", f"{theirs}.0")
    yield from batch_norm(f"{ours}.norm", f"{theirs}.1")


def _block(ours: str, theirs: str, *, shortcut: bool = False) -> Iterator[Pair]:
    for i in (1, 2):
        yield from weight(f"{ours}.conv{i}", f"{theirs}.conv{i}")
        yield from batch_norm(f"{ours}.norm{i}", f"{theirs}.bn{i}")
    if shortcut:
        yield from weight(f"{ours}.shortcut.0", f"{theirs}.proj.0", pointwise=True)
        yield from batch_norm(f"{ours}.shortcut.1", f"{theirs}.proj.1")
