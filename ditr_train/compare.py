"""Comparison of runs from what lies in their folders: no cache, no GPU and no network is needed.

A score always says how it was measured. What a run measured in training (`fast`, on the voxels that the network sees)
and every file that `ditr-train eval` wrote (protocol, split, checkpoint, test-time augmentation) are columns of their
own, in every table and file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditr_cache.errors import UsageError
from ditr_cache.schema import canonical_digest
from ditr_train.recipe import Recipe, differing_keys
from ditr_train.run_folder import RunFolder, RunInfo, is_free
from ditr_train.tracking import read_metrics

log = logging.getLogger(__name__)

LAST, BEST = "fast, last", "fast, best"
"""Labels of the newest and of the best evaluation in training."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run folder tells.

    Args:
        path: the run folder.
        name: short, unique among the runs compared.
        recipe, info: as the folder holds them.
        train, val: lines of `metrics.jsonl`, in the order of their steps.
        scores: label of the measurement -> results (`mIoU`, `groups`, `mAcc`, `allAcc`, `IoU`; or `cosine`), fractions.
    """

    path: Path
    name: str
    recipe: Recipe
    info: RunInfo
    train: tuple[Mapping[str, Any], ...]
    val: tuple[Mapping[str, Any], ...]
    scores: Mapping[str, Mapping[str, Any]]

    @property
    def metric(self) -> str:
        """The number that says how good the run is: `cosine` of a distillation, else `mIoU`."""
        return "cosine" if self.recipe.task == "distill" else "mIoU"

    @property
    def method(self) -> str:
        """The recipe in a word: distill, finetune, inject or plain."""
        if self.recipe.task == "distill":
            return "distill"
        injection = self.recipe.model.injection is not None
        return ("inject" if injection else "plain") + (" (fine-tuned)" if self.recipe.init is not None else "")

    @property
    def vfm(self) -> str:
        """Key of the VFM; `-` where none is read."""
        keys = dict.fromkeys(cache.vfm_key for cache in self.info.caches if cache.vfm_key is not None)
        return ", ".join(keys) or "-"

    @property
    def step(self) -> int:
        """The newest optimiser step that was recorded."""
        return max((int(line["step"]) for line in (*self.train[-1:], *self.val[-1:])), default=0)

    @property
    def dataset(self) -> str:
        """The datasets that the run reads."""
        return ", ".join(dict.fromkeys(cache.dataset for cache in self.info.caches))

    @property
    def evaluated(self) -> bool:
        """Whether the run has a split to evaluate on; a distillation may have none."""
        splits = [source.splits for source in self.recipe.sources] or [self.recipe.splits]
        return any(split.val is not None for split in splits)

    @property
    def finished(self) -> bool:
        """Whether the last evaluation, which ends a run, is there; without one, whether the last epoch was logged."""
        training, lines = self.recipe.training, self.val if self.evaluated else self.train
        if not lines:
            return False
        if training.steps is not None:
            return int(lines[-1]["step"]) >= training.steps
        return int(number(lines[-1].get("epoch")) or 0) >= (training.epochs or 0)

    @property
    def state(self) -> str:
        """`done`, or how far an unfinished run came."""
        if self.finished:
            return "done"
        return "unfinished, no evaluation yet" if self.evaluated and not self.val else "unfinished"

    def median(self, name: str) -> float | None:
        """Median over the training lines of a field; None where no line has it (older runs)."""
        values = [value for line in self.train if (value := number(line.get(name))) is not None]
        return statistics.median(values) if values else None

    @property
    def peak_memory(self) -> float | None:
        """Most memory of any training line, in bytes."""
        values = (number(line.get("memory_bytes")) for line in self.train)
        return max((value for value in values if value is not None), default=None)

    def score(self, label: str, name: str) -> float | None:
        """One number of a measurement, `mIoU GROUP` being that of a group of classes; None where it was not made."""
        results = self.scores.get(label, {})
        name, _, group = name.partition(" ")
        return number(results.get("groups", {}).get(group) if group else results.get(name))


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """Runs that are the same but for the seed.

    Args:
        name: what the names of the runs have in common.
        runs: all of them.
    """

    name: str
    runs: tuple[RunSummary, ...]

    @property
    def finished(self) -> tuple[RunSummary, ...]:
        """The runs that count."""
        return tuple(run for run in self.runs if run.finished)

    def mean_std(self, label: str, name: str) -> tuple[float, float | None, int] | None:
        """Mean, sample standard deviation (None for one run) and count of a number over the finished runs."""
        values = [value for run in self.finished if (value := run.score(label, name)) is not None]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side.

    Args:
        runs: in the order given.
        groups: the same runs, grouped by everything but the seed.
        differing: dotted recipe key -> its value in each run; None where a run has no such key.
    """

    runs: tuple[RunSummary, ...]
    groups: tuple[RunGroup, ...]
    differing: Mapping[str, tuple[Any, ...]]

    @property
    def labels(self) -> list[str]:
        """Every measurement that some run has; those in training first."""
        found = {label for run in self.runs for label in run.scores}
        return [label for label in (LAST, BEST) if label in found] + sorted(found - {LAST, BEST})

    @property
    def metrics(self) -> list[str]:
        """What the runs are judged by: `mIoU` and `mIoU GROUP` for every group of classes, `cosine`."""
        results = [found for run in self.runs for found in run.scores.values()]
        groups = dict.fromkeys(f"mIoU {group}" for found in results for group in found.get("groups", {}))
        judged = [m for m in ("mIoU", "cosine") if any(run.metric == m for run in self.runs)]
        return [name for metric in judged for name in (metric, *(groups if metric == "mIoU" else ()))]

    def class_lists(self) -> list[tuple[RunSummary, ...]]:
        """The segmentation runs, together where they have the same dataset and classes in the same order."""
        lists: dict[tuple[str, tuple[str, ...]], list[RunSummary]] = {}
        for run in self.runs:
            if run.metric == "mIoU":
                lists.setdefault((run.dataset, run.info.class_names), []).append(run)
        return [tuple(runs) for runs in lists.values()]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "runs": [
                {
                    "run": str(run.path),
                    "name": run.name,
                    "state": run.state,
                    "method": run.method,
                    "task": run.recipe.task,
                    "vfm": run.vfm,
                    "seed": run.recipe.seed,
                    "step": run.step,
                    "scores": {label: dict(results) for label, results in run.scores.items()},
                    "samples_per_second": run.median("samples_per_second"),
                    "points_per_second": run.median("points_per_second"),
                    "seconds_per_step": run.median("seconds_per_step"),
                    "data_wait": run.median("data_wait"),
                    "memory_bytes": run.peak_memory,
                    "caches": [dataclasses.asdict(cache) for cache in run.info.caches],
                }
                for run in self.runs
            ],
            "groups": [
                {
                    "name": group.name,
                    "runs": [run.name for run in group.runs],
                    "seeds": [run.recipe.seed for run in group.runs],
                    "scores": {
                        label: dict(zip(("mean", "std", "n"), found, strict=True))
                        for label in self.labels
                        if (found := group.mean_std(label, group.runs[0].metric)) is not None
                    },
                }
                for group in self.groups
            ],
            "differing": {
                key: {run.name: value for run, value in zip(self.runs, values, strict=True)}
                for key, values in self.differing.items()
            },
        }


def compare(paths: Sequence[str | Path]) -> Comparison:
    """Compare runs.

    Args:
        paths: run folders, or folders of run folders (say of a sweep), which stand for all runs in them.

    Raises:
        UsageError: no path at all.
        MissingDataError: neither a run folder nor a folder of some.
        DataError: a recipe or `run.json` that is damaged.
    """
    if not paths:
        raise UsageError("compare: name at least one run folder")
    runs = [read_run(folder) for folder in dict.fromkeys(f for path in paths for f in _run_folders(Path(path)))]
    names = _short_names([run.path for run in runs])
    runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    return Comparison(runs=tuple(runs), groups=_groups(runs), differing=_differing(runs))


def read_run(path: Path) -> RunSummary:
    """What one run folder tells; lines and files that are damaged are left out. Raises as `compare`."""
    folder = RunFolder(path)
    recipe, info = folder.open()
    lines = read_metrics(folder.metrics)
    train = tuple(line for line in lines if line.get("kind") == "train")
    val = tuple(line for line in lines if line.get("kind") == "val")
    run = RunSummary(path=path, name=path.name, recipe=recipe, info=info, train=train, val=val, scores={})
    scores: dict[str, Mapping[str, Any]] = {}
    if val:
        scored = [line for line in val if number(line.get(run.metric)) is not None] or val
        scores = {LAST: val[-1], BEST: max(scored, key=lambda line: number(line.get(run.metric)) or 0.0)}
    return replace(run, scores={**scores, **_evaluations(path / "eval")})


def number(value: Any) -> float | None:
    """A finite number as float, None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def evaluation_label(results: Mapping[str, Any]) -> str:
    """How results of `ditr-train eval` were measured, say `full val, best, TTA scannet`.

    Two that were measured differently have different labels: augmentations without a name are told by their digest.
    """
    parts = [f"{results['protocol']} {results['split']}", str(results["checkpoint"])]
    tta = results.get("tta") or "none"
    if tta != "none":
        parts.append(f"TTA {tta if isinstance(tta, str) else canonical_digest(tta)[:6]}")
    if results.get("pre_grid_size") is not None:
        parts.append(f"pre-grid {results['pre_grid_size']}")
    if results.get("other_cache") is not None:
        parts.append(f"other cache {results['other_cache']}")
    return ", ".join(parts)


def _evaluations(folder: Path) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results = json.loads(path.read_text())
            # `eval` scores of the fast protocol are no measurement of the training and get another label.
            found[evaluation_label(results)] = results
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s: left out, it is not a result of ditr-train eval (%s)", path, error)
    return found


def _run_folders(path: Path) -> list[Path]:
    if RunFolder(path).started() or not path.is_dir():
        return [path]
    return sorted(child for child in path.iterdir() if RunFolder(child).started()) or [path]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as make them differ."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts), default=1)):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _same_but_seed(first: RunSummary, second: RunSummary) -> bool:
    keys = [k for k in differing_keys(first.recipe, second.recipe) if k != "seed" and not is_free(k)]
    read = [[(cache.identity, cache.vfm_key) for cache in run.info.caches] for run in (first, second)]
    return not keys and read[0] == read[1] and first.info.class_names == second.info.class_names


def _groups(runs: Iterable[RunSummary]) -> tuple[RunGroup, ...]:
    groups: list[list[RunSummary]] = []
    for run in runs:
        for group in groups:
            if _same_but_seed(group[0], run):
                group.append(run)
                break
        else:
            groups.append([run])
    names = [_without_seed(group) for group in groups]
    unique = [
        name if names.count(name) == 1 else ", ".join(run.name for run in group)
        for name, group in zip(names, groups, strict=True)
    ]
    return tuple(RunGroup(name=name, runs=tuple(group)) for name, group in zip(unique, groups, strict=True))


def _without_seed(runs: Sequence[RunSummary]) -> str:
    """What the names have in common beside a seed at their end; all of them where there is nothing."""
    if len(runs) == 1:
        return runs[0].name
    common = {re.sub(r"[-_=/]*(seed)?[-_=/]*\d+$", "", run.name) for run in runs}
    return common.pop() if len(common) == 1 and all(common) else ", ".join(run.name for run in runs)


def _differing(runs: Sequence[RunSummary]) -> dict[str, tuple[Any, ...]]:
    keys = sorted({key for run in runs[1:] for key in differing_keys(runs[0].recipe, run.recipe)})
    keys = [key for key in keys if key != "description" and not key.startswith("published")]
    dumps = [run.recipe.model_dump(mode="json") for run in runs]
    return {key: tuple(_value(dump, key) for dump in dumps) for key in keys}


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(values, list):
            values = {str(number): value for number, value in enumerate(values)}
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values
