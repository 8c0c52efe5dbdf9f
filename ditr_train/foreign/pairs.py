"""`PublicNetwork`: which of our tensors is which of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Colors = Literal["unit", "signed", "either"]
"""Range of colours: 0..1, -1..1, or one of the two."""

_NORM = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What a batch norm counts; no parameters."""


@dataclass(frozen=True)
class Pair:
    """One tensor under both names.

    Args:
        ours: its name in the state dict of our backbone, or of our network for a head.
        theirs: its name in the state dict of their backbone, or of their network for a head.
        pointwise: the weight [out, in] of a linear map here, of a convolution of one voxel there. Its shape there is
            [out, 1, 1, 1, in], but spconv (2.1 to 2.3) reads such a weight as [in, out], row by row: it holds the
            transpose of what its shape says.
    """

    ours: str
    theirs: str
    pointwise: bool = False

    def to_ours(self, tensor: Tensor) -> Tensor:
        """Their tensor as ours."""
        if self.pointwise:
            out, inner = tensor.shape[0], tensor.shape[-1]
            return tensor.reshape(inner, out).T.contiguous()
        return tensor

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """Our tensor as theirs."""
        if self.pointwise:
            out, inner = tensor.shape
            return tensor.T.reshape(out, 1, 1, 1, inner)
        return tensor

    def their_shape(self, ours: Iterable[int]) -> tuple[int, ...]:
        """Shape there of a tensor that has the shape `ours` here."""
        if self.pointwise:
            out, inner = ours
            return (out, 1, 1, 1, inner)
        return tuple(ours)


@dataclass(frozen=True, kw_only=True)
class PublicNetwork:
    """A network of Pointcept that computes what one of our backbones does.

    Args:
        name: under which Pointcept registers it.
        pairs: every tensor of the backbone; the first is the weight that reads the input, its last axis the channels.
        head: weight and bias of the linear map that says classes.
        decoder: how the names of ours begin that an encoder does not have.
        ignored: how the names of theirs begin that a file may hold beyond the pairs: heads, and what only pretraining
            uses.
        settings: of our backbone's configuration, where the other network has no choice.
        arguments: that the other network is built with, but for its input channels and classes.
        ends_in_head: whether the head belongs to its backbone.
        colors: that its weights want; -1..1 before Pointcept v1.6.0.
        outdated: whether Pointcept computes it no longer.
    """

    name: str
    pairs: tuple[Pair, ...]
    head: tuple[Pair, ...]
    decoder: tuple[str, ...]
    ignored: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    ends_in_head: bool = False
    colors: Colors = "unit"
    outdated: bool = False


def weight(ours: str, theirs: str, *, bias: bool = False, pointwise: bool = False) -> Iterator[Pair]:
    """The pairs of a linear map or a convolution."""
    yield Pair(f"{ours}.weight", f"{theirs}.weight", pointwise)
    if bias:
        yield Pair(f"{ours}.bias", f"{theirs}.bias")


def batch_norm(ours: str, theirs: str) -> Iterator[Pair]:
    """The pairs of a batch norm."""
    return _same(ours, theirs, (*_NORM, *STATISTICS))


def layer_norm(ours: str, theirs: str) -> Iterator[Pair]:
    """The pairs of a layer norm."""
    return _same(ours, theirs, _NORM)


def _same(ours: str, theirs: str, names: Iterable[str]) -> Iterator[Pair]:
    return (Pair(f"{ours}.{name}", f"{theirs}.{name}") for name in names)
