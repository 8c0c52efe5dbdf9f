"""The run folder: the resolved recipe, what the run was made from, checkpoints and metrics."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ditr_cache
from ditr_cache.errors import DataError, MismatchError, MissingDataError, StorageError, UsageError
from ditr_cache.schema import VFMSpec
from ditr_train.recipe import Recipe, differing_keys, read_recipe

FREE_KEYS = ("cache", "description", "data.workers", "training.checkpoint_every", "training.log_every")
"""Recipe keys that may differ between a run and its continuation: none of them changes a weight."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """`run.json`: what a run was made from.

    Args:
        cache: absolute path of the cache.
        dataset: of the cache.
        class_names: in the order of the network's outputs.
        in_channels: width of the network input.
        vfm: every field of the `VFMSpec`; None where no features are injected.
        versions: of ditr, python, torch and numpy.
        git_commit: of the working folder, where it is a git repository.
    """

    cache: str
    dataset: str
    class_names: tuple[str, ...]
    in_channels: int
    vfm: dict[str, Any] | None
    versions: dict[str, str]
    git_commit: str | None

    @classmethod
    def of(
        cls, *, cache: Path, dataset: str, class_names: tuple[str, ...], in_channels: int, vfm: VFMSpec | None
    ) -> RunInfo:
        """The description of a run that starts now."""
        return cls(
            cache=str(cache.resolve()),
            dataset=dataset,
            class_names=class_names,
            in_channels=in_channels,
            vfm=None if vfm is None else _plain(vfm),
            versions={
                "ditr": ditr_cache.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            git_commit=_git_commit(),
        )

    def check_vfm(self, vfm: VFMSpec | None) -> None:
        """Raise `MismatchError`, naming the part that differs, where `vfm` is not what the run was trained with."""
        now = None if vfm is None else _plain(vfm)
        if (self.vfm is None) != (now is None):
            raise MismatchError(
                f"the run was trained {'without' if self.vfm is None else 'with'} features of a VFM; use its own recipe"
            )
        if self.vfm is None or now is None:
            return
        for name, trained in self.vfm.items():
            if name != "name" and now.get(name) != trained:
                raise MismatchError(
                    f"the cache's features are not those the run was trained with: {name} differs, expected "
                    f"{trained!r}, got {now.get(name)!r}; use the cache {self.cache!r} or one of the same VFM settings"
                )


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in a run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def info(self) -> Path:
        """What the run was made from."""
        return self.path / "run.json"

    @property
    def last(self) -> Path:
        """The newest checkpoint, with everything that `--resume` needs."""
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        """Weights of the evaluation with the highest mIoU."""
        return self.path / "best.pt"

    @property
    def metrics(self) -> Path:
        """Metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def create(self, recipe: Recipe, info: RunInfo) -> None:
        """Start a run folder.

        Raises:
            UsageError: there is a run (or anything else) already.
            StorageError: it cannot be written.
        """
        self.require_new()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _replace(self.recipe, recipe.to_yaml())
            _replace(self.info, json.dumps(dataclasses.asdict(info), indent=1) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write run folder {str(self.path)!r}: {error.strerror or error}; choose another --out"
            ) from error

    def require_new(self) -> None:
        """Raise `UsageError` where something lies at the path already."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UsageError(
                f"run folder {str(self.path)!r} exists already; continue it with --resume, or choose another --out"
            )

    def started(self) -> bool:
        """Whether a run was started here."""
        return self.info.is_file()

    def open(self) -> tuple[Recipe, RunInfo]:
        """The recipe and description of the run.

        Raises:
            MissingDataError: not a run folder.
            DataError: its files are damaged.
        """
        if not self.started():
            raise MissingDataError(
                f"{str(self.path)!r} is not a run folder: it has no {self.info.name}; name one that ditr-train run made"
            )
        try:
            values = json.loads(self.info.read_text())
            info = RunInfo(**{**values, "class_names": tuple(values["class_names"])})
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise DataError(f"{str(self.info)!r} is damaged ({error}); train again") from error
        return read_recipe(self.recipe), info

    def check_same(self, recipe: Recipe, vfm: VFMSpec | None, class_names: tuple[str, ...]) -> None:
        """Raise `MismatchError` where a run cannot be continued with this recipe and cache; names what differs."""
        stored, info = self.open()
        changed = [k for k in differing_keys(stored, recipe) if k not in FREE_KEYS]
        if changed:
            raise MismatchError(
                f"run folder {str(self.path)!r} was started with another recipe: {', '.join(changed)} differ; resume "
                "with the same settings, or start another run with another --out"
            )
        if info.class_names != class_names:
            raise MismatchError(f"run folder {str(self.path)!r}: the cache's classes are not those of the run")
        info.check_vfm(vfm)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _plain(spec: VFMSpec) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(spec)))
    return plain


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
