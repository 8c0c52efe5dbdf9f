"""Trained networks as files of other code bases."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

import ditr_cache
from ditr_cache.errors import DataError, MismatchError, StorageError, UsageError
from ditr_train.checkpoint import load_checkpoint, used_weights
from ditr_train.files import temporary_name
from ditr_train.foreign.files import MARK
from ditr_train.foreign.networks import public_network
from ditr_train.foreign.pairs import STATISTICS, PublicNetwork
from ditr_train.foreign.weights import give
from ditr_train.recipe import Recipe
from ditr_train.run_folder import RunFolder

FORMATS = ("pointcept",)
"""What a network can be converted to."""


def convert(run_dir: str | Path, out: str | Path, *, to: str = "pointcept", checkpoint: str = "best") -> dict[str, Any]:
    """Write the network of a run as a file that another code base loads.

    For `pointcept` that is what its `weight=` takes: `state_dict`, with the names of its segmentor, and `epoch`. Of use
    to us alone is the version of this package beside them. The head of a distillation, which says VFM features, is
    left out.

    Args:
        run_dir: made by `ditr-train run`.
        out: the file, which must not exist.
        to: one of `FORMATS`.
        checkpoint: `best` (highest score on the validation split) or `last`.

    Returns:
        `file`, `step`, `tensors`, `parameters`, `head` (whether it was written), `feat` (input channels), `colors`
        (their range in words, None without), `grid_size`, `classes`, and `model`: the configuration of Pointcept's
        network.

    Raises:
        UsageError: a network with injection, or one that has no (or no longer a) counterpart there; a file that exists.
        MissingDataError: not a run folder, or no such checkpoint in it yet.
        MismatchError: a setting of the network that the other code base has no choice of.
        DataError: a checkpoint that is damaged or of another network.
        StorageError: no space, no permission, an I/O error.
    """
    folder, out = RunFolder(Path(run_dir)), Path(out)
    if to not in FORMATS:
        raise UsageError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    recipe, info = folder.open()
    network = _counterpart(recipe, folder)
    if out.exists():
        raise UsageError(f"{str(out)!r} exists already; choose another file, or remove it first")
    path = folder.weights(checkpoint)
    state = load_checkpoint(path)
    head = recipe.task == "segment"
    try:
        weights = give(used_weights(state), network, head=head)
    except KeyError as error:
        raise DataError(
            f"checkpoint {str(path)!r} does not fit the network of {folder.recipe.name}: it lacks {error}; one of the "
            "two was replaced"
        ) from error
    scored = state.get("results") or state.get("last") or {}
    _write(out, {"epoch": int(scored.get("epoch", 0)), "state_dict": weights, MARK: ditr_cache.__version__})
    stem = weights[f"backbone.{network.pairs[0].theirs}"]
    return {
        "file": str(out),
        "step": int(state["step"]),
        "tensors": len(weights),
        "parameters": sum(t.numel() for n, t in weights.items() if not n.endswith(STATISTICS)),
        "head": head,
        "feat": list(recipe.data.feat),
        "colors": _colors(recipe),
        "grid_size": recipe.data.grid_size,
        "classes": list(info.class_names) if head else [],
        "model": _model(network, stem.shape[-1], len(info.class_names) if head else 0, recipe.model.backbone),
    }


def _counterpart(recipe: Recipe, folder: RunFolder) -> PublicNetwork:
    if recipe.model.injection is not None:
        raise UsageError(
            f"run {str(folder.path)!r} injects VFM features: Pointcept's networks have no counterpart, and without "
            "them this one says nothing of use; convert a run that reads points only (plain, distill, finetune)"
        )
    network = public_network(recipe.model.backbone)
    if network.outdated:
        raise UsageError(
            f"run {str(folder.path)!r}: Pointcept no longer computes this variant of {network.name}; train with "
            "model.backbone.variant=ptv3 to convert a run"
        )
    for name, value in network.settings.items():
        if (own := getattr(recipe.model.backbone, name)) != value:
            raise MismatchError(
                f"run {str(folder.path)!r}: model.backbone.{name} is {own}, {network.name} always has {value} and "
                "would compute something else from these weights; train with that value to convert a run"
            )
    return network


def _colors(recipe: Recipe) -> str | None:
    if "color" not in recipe.data.feat:
        return None
    normalized = any(transform.name == "ChromaticNormalize" for transform in recipe.data.at_test)
    return "as ChromaticNormalize leaves them" if normalized else "0 to 1"


def _model(network: PublicNetwork, in_channels: int, num_classes: int, backbone: Any) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": network.name, "in_channels": in_channels, **network.arguments}
    if network.ends_in_head:
        return {"type": "DefaultSegmentor", "backbone": {**inner, "num_classes": num_classes}}
    return {
        "type": "DefaultSegmentorV2",
        "num_classes": num_classes,
        "backbone_out_channels": backbone.out_channels,
        "backbone": inner,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk and a missing folder as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(f"cannot write {str(path)!r}: {reason}; free space, or choose another place") from error
