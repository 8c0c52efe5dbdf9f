"""A trained network with what it needs to be used: from its run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ditr_cache.errors import CacheError, DataError, UsageError
from ditr_cache.store import location, open_cache
from ditr_train.checkpoint import load_checkpoint, used_weights
from ditr_train.data.dataset import CachedDataset
from ditr_train.distributed import choose_device
from ditr_train.models.build import build_segmentor
from ditr_train.models.segmentor import Segmentor
from ditr_train.recipe import Recipe
from ditr_train.run_folder import CacheInfo, RunFolder, RunInfo


@dataclass(frozen=True)
class TrainedRun:
    """A trained network with what it needs to be used.

    Args:
        path: the run folder.
        recipe: of the run, with the cache that it is used on.
        info: what it was made from.
        model: in evaluation mode, on `device`.
        device: where it computes.
        step: of the checkpoint.
    """

    path: Path
    recipe: Recipe
    info: RunInfo
    model: Segmentor
    device: torch.device
    step: int

    def dataset(
        self, split: str, *, labelled: bool = True, fraction: float = 1.0, fraction_seed: int = 0
    ) -> CachedDataset:
        """A split of the cache in use, as the network expects it; arguments as of `CachedDataset`.

        Raises:
            MismatchError: the cache's classes or features are not those of the run.
            CacheError: as `CachedDataset`.
        """
        dataset = CachedDataset(
            open_cache(self.recipe.require_cache()),
            split,
            **self.recipe.data.reading(),
            vfm=self.recipe.vfm,
            class_names=self.info.class_names,
            labelled=labelled,
            fraction=fraction,
            fraction_seed=fraction_seed,
        )
        self.info.check_vfm(dataset.vfm)
        return dataset

    def on_own_cache(self) -> bool:
        """Whether the cache in use is the one of the training, by its content, wherever it lies now."""
        own = self.info.caches[0]
        if str(location(self.recipe.require_cache()).resolve()) == own.path:
            return True
        try:
            parts = [
                self.dataset(split, fraction=self.recipe.data.fraction, fraction_seed=self.recipe.data.fraction_seed)
                for split in self.recipe.splits.training
            ]
        except CacheError:  # it lacks what the training needed: another one
            return False
        return CacheInfo.of(parts).identity == own.identity


def load_run(
    run_dir: str | Path, *, device: str = "auto", checkpoint: str = "best", cache: str | None = None
) -> TrainedRun:
    """The network of a run folder that gives class scores.

    Args:
        run_dir: made by `ditr-train run`.
        device: auto, cpu or cuda.
        checkpoint: `best` (highest mIoU on the validation split) or `last`.
        cache: use this cache instead of the one trained from, say after it was moved.

    Raises:
        UsageError: a distillation, which predicts VFM features and no classes.
        MissingDataError: not a run folder, or no such checkpoint in it yet.
        DataError: a checkpoint that is damaged or of another network.
        DeviceError: CUDA asked for and absent.
    """
    chosen, folder = choose_device(device), RunFolder(Path(run_dir))
    recipe, info = folder.open()
    if recipe.task == "distill":
        raise UsageError(
            f"run {str(folder.path)!r} is a distillation: it predicts VFM features, not classes; fine-tune it first "
            f"(`ditr-train run <dataset>/finetune --set init={folder.path}`)"
        )
    path = folder.weights(checkpoint)
    state = load_checkpoint(path)
    model = build_segmentor(
        recipe.model,
        in_channels=info.in_channels,
        num_classes=len(info.class_names),
        feature_dim=None if info.vfm is None else info.vfm["dim"],
    )
    try:
        model.load_state_dict(used_weights(state))
    except RuntimeError as error:
        raise DataError(
            f"checkpoint {str(path)!r} does not fit the network of {folder.recipe.name}: "
            f"{str(error).splitlines()[-1].strip()}; one of the two was replaced"
        ) from error
    if cache is not None:
        recipe = recipe.model_copy(update={"cache": cache})
    return TrainedRun(folder.path, recipe, info, model.to(chosen).eval(), chosen, int(state["step"]))
