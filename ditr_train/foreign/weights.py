"""Weights of a public network as ours, and ours as a public network's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ditr_cache.errors import MismatchError
from ditr_train.foreign.networks import STEMS
from ditr_train.foreign.pairs import PublicNetwork

HEADS = ("final.", "seg_head.", "head.", "criteria.")
"""How names begin that belong to a task."""


@dataclass(frozen=True)
class Taken:
    """What a file gives a backbone of ours.

    Args:
        weights: by our names.
        prefix: of the backbone's names in the file.
        lacking: our names of the decoder that the file lacks, all of them or none.
    """

    weights: dict[str, Tensor]
    prefix: str
    lacking: tuple[str, ...]


def take(tensors: Mapping[str, Tensor], network: PublicNetwork, ours: Mapping[str, Tensor], where: str) -> Taken:
    """The weights of a public file for a backbone of ours.

    Args:
        tensors: of the file.
        network: that the file should hold.
        ours: the backbone's state dict, for its shapes.
        where: begin of every message.

    Raises:
        MismatchError: a file of another network, or of other shapes; names the first tensors that do not fit.
    """
    prefix = backbone_prefix(tensors, network, where)
    given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    pairs = network.pairs
    # Some exporters leave out the counters of batch norms, which compute nothing.
    needed = [pair for pair in pairs if not pair.theirs.endswith("num_batches_tracked")]
    missing = [pair for pair in needed if pair.theirs not in given]
    lacking = tuple(pair.ours for pair in needed if pair.ours.startswith(network.decoder))
    if [pair.ours for pair in missing] != list(lacking):
        lacking = ()
        _refuse(where, network, "lacks", (prefix + pair.theirs for pair in missing))
    known = {pair.theirs for pair in pairs}
    beyond = (name for name in given if name not in known and not name.startswith((*HEADS, *network.ignored)))
    _refuse(where, network, "has, beyond those,", (prefix + name for name in beyond))

    weights = {}
    for pair in pairs:
        if pair.theirs not in given:
            continue
        expected = pair.their_shape(ours[pair.ours].shape)
        tensor = _this_layout(given[pair.theirs], expected)
        if tensor.shape != expected:
            raise MismatchError(
                f"{where} does not fit this recipe's network: {prefix + pair.theirs} has shape {list(tensor.shape)} "
                f"there, {list(expected)} was expected; {_remedy(pair.ours == pairs[0].ours, tensor, expected)}"
            )
        weights[pair.ours] = pair.to_ours(tensor)
    return Taken(weights, prefix, lacking)


def give(weights: Mapping[str, Tensor], network: PublicNetwork, *, head: bool) -> dict[str, Tensor]:
    """The state dict of Pointcept's segmentor, from that of a network of ours.

    Args:
        weights: of `PointNetwork`, without injection.
        network: which one.
        head: write the head too.
    """
    state = {f"backbone.{p.theirs}": p.to_theirs(weights[f"backbone.{p.ours}"]) for p in network.pairs}
    if head:
        state.update({p.theirs: p.to_theirs(weights[p.ours]) for p in network.head})
    return state


def backbone_prefix(tensors: Mapping[str, Tensor], network: PublicNetwork, where: str) -> str:
    """What stands before the backbone's names in a file, say `module.backbone.`.

    Raises:
        MismatchError: a file that does not hold this network.
    """
    stem = network.pairs[0].theirs
    found = _prefixes(tensors, stem)
    # Of a self-distillation, Pointcept and Sonata use the student.
    if len(found) > 1:
        found = [prefix for prefix in found if "student" in prefix]
    if len(found) == 1:
        return found[0]
    for other, (name, settings) in STEMS.items():
        if other != stem and _prefixes(tensors, other):
            raise MismatchError(f"{where} holds a {name}, this recipe's network is a {network.name}; set {settings}")
    raise MismatchError(
        f"{where} holds no {network.name}: expected one tensor whose name ends in {stem!r}, got {len(tensors)} tensors "
        f"({_few(tensors)}); use a file of {', '.join(name for name, _ in STEMS.values())}"
    )


def _prefixes(tensors: Iterable[str], stem: str) -> list[str]:
    return [name.removesuffix(stem) for name in tensors if name == stem or name.endswith(f".{stem}")]


def _refuse(where: str, network: PublicNetwork, fault: str, names: Iterable[str]) -> None:
    if found := sorted(names):
        raise MismatchError(
            f"{where} does not hold the {network.name} of this recipe: it {fault} {len(found)} tensors "
            f"({_few(found)}); {_setting(found)}"
        )


def _setting(names: Iterable[str]) -> str:
    if all("rpe_table" in name for name in names):
        return "set model.backbone.rpe to what it was trained with"
    return "make the depths of model.backbone those of the file"


def _remedy(stem: bool, tensor: Tensor, expected: tuple[int, ...]) -> str:
    if stem and tensor.dim() == len(expected) and tensor.shape[:-1] == expected[:-1]:
        return (
            f"it reads points of {tensor.shape[-1]} channels, this recipe gives them {expected[-1]}: set data.feat to "
            "what it was trained with, and model.injection.input to false"
        )
    return "make model.backbone that of the file"


def _this_layout(tensor: Tensor, expected: tuple[int, ...]) -> Tensor:
    """A convolution's weight [out, x, y, z, in]; spconv 2.1 wrote [x, y, z, out, in] for kernels of more than 32."""
    if len(expected) == 5 and tensor.shape == (*expected[1:4], expected[0], expected[4]) != expected:
        return tensor.permute(3, 0, 1, 2, 4).contiguous()
    return tensor


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
