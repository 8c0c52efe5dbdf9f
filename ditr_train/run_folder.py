"""The run folder: the resolved recipe, what the run was made from, checkpoints and metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ditr_cache
from ditr_cache.errors import DataError, MismatchError, MissingDataError, StorageError, UsageError
from ditr_cache.schema import VFMSpec, canonical_digest
from ditr_train.data.dataset import CachedDataset
from ditr_train.files import replace_text
from ditr_train.recipe import Recipe, differing_keys
from ditr_train.recipe_files import read_recipe

FREE_KEYS = (
    "cache", "sources.cache", "description", "published", "data.workers", "evaluation", "tracking",
    "training.checkpoint_every", "training.log_every",
)  # fmt: skip
"""Recipe keys and sections that may differ between a run and its continuation: none of them changes a weight."""


def is_free(key: str) -> bool:
    """Whether a dotted recipe key (`sources.0.cache`) is one of `FREE_KEYS`, or lies below one of them."""
    key = re.sub(r"\.\d+(?=\.)", "", key)
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """One cache that a run reads.

    Args:
        path: absolute.
        dataset: of the cache.
        vfm_key: of the features that are read; None where none are.
        samples: number of training samples.
        identity: digest over the geometry and features of the samples that are trained on; it changes with every
            change of their content.
    """

    path: str
    dataset: str
    vfm_key: str | None
    samples: int
    identity: str

    @classmethod
    def of(cls, parts: Sequence[CachedDataset]) -> CacheInfo:
        """The description of the datasets of one cache."""
        cache, vfm = parts[0].cache, parts[0].vfm
        used = {sample for part in parts for sample in part.ids}
        digests = []
        for partition, record in sorted(cache.geometry.items()):
            if not used.isdisjoint(sample.id for sample in record.samples):
                features = None if vfm is None else cache.feature_record(vfm, partition)
                rows = {} if features is None else {name: info.sha256 for name, info in features.arrays.items()}
                digests.append([partition, record.digest, rows])
        return cls(
            path=str(cache.paths.root.resolve()),
            dataset=cache.metadata.dataset,
            vfm_key=None if vfm is None else vfm.key,
            samples=sum(map(len, parts)),
            identity=canonical_digest([digests, sorted(used)]),
        )


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """`run.json`: what a run was made from, and what its network needs to be used without a cache.

    Args:
        caches: that the run reads.
        class_names: in the order of the network's outputs.
        class_colors: RGB in 0..255, one per class.
        in_channels: width of the network input.
        vfm: every field of the `VFMSpec` of the first cache; None where no features are read.
        init: what the weights started from, see `ditr_train.initialise`; None: fresh.
        versions: of ditr, python and the libraries that decide the numbers.
        device: where the run started, in words.
        command: the process's own, to be run again.
        git_commit: of the working folder, where it is a git repository; with `+` where files differ from it.
    """

    caches: tuple[CacheInfo, ...]
    class_names: tuple[str, ...]
    class_colors: tuple[tuple[int, int, int], ...]
    in_channels: int
    vfm: dict[str, Any] | None
    init: dict[str, Any] | None
    versions: dict[str, str]
    device: str
    command: str
    git_commit: str | None

    @classmethod
    def of(
        cls,
        sources: Sequence[Sequence[CachedDataset]],
        *,
        device: torch.device,
        init: Mapping[str, Any] | None = None,
    ) -> RunInfo:
        """The description of a run that starts now, from its training datasets, source by source."""
        first = sources[0][0]
        return cls(
            caches=tuple(CacheInfo.of(parts) for parts in sources),
            class_names=first.class_names,
            class_colors=first.cache.metadata.class_colors,
            in_channels=first.in_channels,
            vfm=None if first.vfm is None else _plain(first.vfm),
            init=None if init is None else dict(init),
            versions={"ditr": ditr_cache.__version__, "python": platform.python_version(), **_library_versions()},
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
            command=shlex.join(sys.orig_argv),
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
                    f"{trained!r}, got {now.get(name)!r}; use the cache {self.caches[0].path!r} or one of the same VFM "
                    "settings"
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
        """Weights of the evaluation with the highest mIoU, or cosine of a distillation."""
        return self.path / "best.pt"

    def weights(self, which: str) -> Path:
        """The checkpoint `best` or `last`. Raises `MissingDataError` where there is none yet."""
        path = {"best": self.best, "last": self.last}[which]
        if not path.exists():
            other = ", or use --checkpoint last" if self.last.exists() else ""
            raise MissingDataError(
                f"run folder {str(self.path)!r} has no {path.name} yet; let it train to its first evaluation "
                f"(`ditr-train run ... --resume`){other}"
            )
        return path

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
            replace_text(self.recipe, recipe.to_yaml())
            replace_text(self.info, json.dumps(dataclasses.asdict(info), indent=1) + "\n")
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
            info = RunInfo(
                **{
                    **values,
                    "caches": tuple(CacheInfo(**cache) for cache in values["caches"]),
                    "class_names": tuple(values["class_names"]),
                    "class_colors": tuple(tuple(color) for color in values["class_colors"]),
                }
            )
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise DataError(
                f"{str(self.info)!r} is damaged, or was written by an older version ({error}); train again"
            ) from error
        return read_recipe(self.recipe), info

    def check_same(self, recipe: Recipe, sources: Sequence[Sequence[CachedDataset]]) -> None:
        """Raise `MismatchError` where a run cannot be continued with this recipe and data; names what differs."""
        stored, info = self.open()
        changed = [k for k in differing_keys(stored, recipe) if not is_free(k)]
        if changed:
            raise MismatchError(
                f"run folder {str(self.path)!r} was started with another recipe: {', '.join(changed)} differ; resume "
                "with the same settings, or start another run with another --out"
            )
        first = sources[0][0]
        if info.class_names != first.class_names:
            raise MismatchError(f"run folder {str(self.path)!r}: the cache's classes are not those of the run")
        info.check_vfm(first.vfm)
        for then, now in zip(info.caches, map(CacheInfo.of, sources), strict=True):
            if then.identity != now.identity:
                raise MismatchError(
                    f"run folder {str(self.path)!r}: the training samples of cache {now.path!r} are not those that the "
                    f"run began with ({then.samples} then, {now.samples} now): samples were added, removed or made "
                    "anew; bring that cache back, or start another run with another --out"
                )


def _plain(spec: VFMSpec) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(spec)))
    return plain


def _library_versions() -> dict[str, str]:
    names = ("torch", "numpy", "zarr", "spconv-cu120", "spconv-cu126", "spconv-triton", "torch-scatter")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git_commit() -> str | None:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}+" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None
