"""A linear probe on cached features alone: what a VFM's features tell of the classes, before any network is trained.

Multinomial logistic regression on standardised inputs, fitted by L-BFGS on points drawn evenly from the training
split, and scored on every labelled point of the validation split. What is fitted on has a feature and a label, for
every input alike, so that the inputs compare. Beside the features stand two that need none: the most frequent class,
and what the points alone tell (colour, height, normal, strength). In memory are the drawn points (`POOL_BYTES` at
most) and one sample.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ditr_cache.cached import CachedSample
from ditr_cache.errors import DataError, UnknownNameError, UsageError
from ditr_cache.schema import VFMSpec
from ditr_cache.store import CacheReader, open_cache
from ditr_train.data.dataset import CachedDataset
from ditr_train.metrics import ConfusionMatrix

POOL_BYTES = 1 << 29
"""Most memory of the drawn points; fewer are drawn per sample where it would not hold them."""

CHUNK_POINTS = 1 << 16
"""Points that are classified at once."""

CHANNELS = ("feature", "color", "coord", "height", "normal", "strength")
"""What an input can be made of. `coord` is from the middle of the sample's ground plan and its lowest point, `height`
the last of it; the others are as stored."""

MAJORITY = "most frequent class"

_PICK, _DRAW = 0, 1  # streams of random numbers


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of a probe.

    Args:
        train_split, val_split: names of the cache's splits.
        train_samples: samples drawn from the training split, at most.
        points_per_sample: training points drawn from each of them, at most.
        inputs: channels joined by `+`, say `feature` or `color+height`; empty: `feature`, and all of the others that
            the cache has but `coord`.
        iterations: of L-BFGS, at most.
        l2: weight of half the squared weights, beside the mean cross-entropy.
        seed: of the drawn points.

    Raises:
        UsageError, UnknownNameError: a setting that cannot be used.
    """

    train_split: str = "train"
    val_split: str = "val"
    train_samples: int = 500
    points_per_sample: int = 4000
    inputs: tuple[str, ...] = ()
    iterations: int = 100
    l2: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_samples", "points_per_sample", "iterations"):
            if getattr(self, name) < 1:
                raise UsageError(f"probe: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.l2 < float("inf"):
            raise UsageError(f"probe: l2 must be >= 0, got {self.l2}")
        for text in self.inputs:
            parts = text.split("+")
            for part in parts:
                if part not in CHANNELS:
                    raise UnknownNameError.of("input of the probe", part, CHANNELS, "Join several by +.")
            if len(set(parts)) < len(parts) or self.inputs.count(text) > 1:
                raise UsageError(f"probe: input {text!r} is named twice, or names a channel twice")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool:
    """Drawn training points: standardised `x` [n, D], labels `y` [n], and what standardised them."""

    x: Tensor
    y: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Linear:
    """A fitted probe on some columns: raw inputs [N, d] @ `weight` [d, K] + `bias` [K] are logits."""

    columns: Tensor
    weight: Tensor
    bias: Tensor
    iterations: int
    loss: float


def probe(cache: str | CacheReader, vfm: str | None = None, config: ProbeConfig | None = None) -> dict[str, Any]:
    """Judge the features of a cache by linear probes.

    Args:
        cache: path, or an open cache.
        vfm: name or key; None: the only one of the cache.
        config: None: the defaults.

    Returns:
        `cache`, `vfm` (its key), `train_points`, `train_samples`, `val_points` (labelled), `coverage` (fraction of
        them with a feature), `majority` (name of the most frequent class), `missing` (classes of the validation
        split without a drawn training point: no probe can find them), `seconds`, and `probes`, the most frequent
        class first: `input`, `dim`, `iterations`, `loss`, `seconds` of the fit, `seen` (results on points with a
        feature) and `all` (on all points; those without a feature are given the most frequent class where the input
        needs one), both as of `ConfusionMatrix.results`.

    Raises:
        UnknownNameError: no such split or VFM.
        MissingDataError: no labels, no features, or a channel is missing.
        DataError: no drawn point, or a single class.
    """
    begun, config = time.perf_counter(), config or ProbeConfig()
    reader = open_cache(cache) if isinstance(cache, str) else cache
    spec = reader.resolve_vfm(vfm)
    inputs = [tuple(text.split("+")) for text in config.inputs] or _default_inputs(reader, config)
    used = [name for name in CHANNELS if any(name in parts for parts in inputs)]
    stored = [name for name in used if name not in ("feature", "height")]
    train, val = (
        CachedDataset(reader, split, grid_size=1.0, feat=stored or ["coord"], vfm=spec.key)
        for split in (config.train_split, config.val_split)
    )
    pool = _draw(reader, train, spec, used, config)
    names, groups = reader.metadata.class_names, reader.metadata.class_groups
    counts = torch.bincount(pool.y, minlength=len(names))
    if int((counts > 0).sum()) < 2:
        raise DataError(
            f"cache {str(reader.paths.root)!r}, split {config.train_split!r}: all drawn points are of class "
            f"{names[int(counts.argmax())]!r}; a probe needs two; raise --points-per-sample or take another split"
        )
    layout = _columns(used, spec)
    fitted: list[tuple[str, _Linear, float]] = []
    for parts in inputs:
        started = time.perf_counter()
        columns = torch.cat([layout[name] for name in parts])
        fitted.append(("+".join(parts), _fit(pool, columns, len(names), config), time.perf_counter() - started))
    train_points = len(pool.y)
    del pool
    majority = int(counts.argmax())
    scores, points, seen = _evaluate(reader, val, spec, used, [linear for _, linear, _ in fitted], majority)
    probes = [{"input": MAJORITY, "dim": 0, "iterations": 0, "loss": None, "seconds": 0.0}]
    probes += [
        {"input": name, "dim": len(f.columns), "iterations": f.iterations, "loss": f.loss, "seconds": seconds}
        for name, f, seconds in fitted
    ]
    truths = scores[0][1].counts.sum(dim=1)
    return {
        "cache": str(reader.paths.root),
        "vfm": spec.key,
        "train_split": config.train_split,
        "val_split": config.val_split,
        "seed": config.seed,
        "train_points": train_points,
        "train_samples": min(len(train), config.train_samples),
        "val_points": points,
        "coverage": seen / points,
        "majority": names[majority],
        "missing": [
            n for n, drawn, true in zip(names, counts.tolist(), truths.tolist(), strict=True) if true and not drawn
        ],
        "probes": [
            {**about, "seen": on_seen.results(names, groups), "all": on_all.results(names, groups)}
            for about, (on_seen, on_all) in zip(probes, scores, strict=True)
        ],
        "seconds": time.perf_counter() - begun,
    }


def _default_inputs(reader: CacheReader, config: ProbeConfig) -> list[tuple[str, ...]]:
    chosen = {i for split in (config.train_split, config.val_split) for i in reader.split_ids(split)}
    records = [r for r in reader.geometry.values() if any(s.id in chosen for s in r.samples)]
    present = [n for n in ("color", "normal", "strength") if all(n in record.arrays for record in records)]
    return [("height", *present), ("feature",)]


def _columns(used: Sequence[str], spec: VFMSpec) -> dict[str, Tensor]:
    """Which columns of `_inputs` belong to each channel."""
    widths = {"feature": spec.dim, "height": 1, "strength": 1}
    ends = np.cumsum([0, *(widths.get(name, 3) for name in used)]).tolist()
    return {name: torch.arange(ends[i], ends[i + 1]) for i, name in enumerate(used)}


def _inputs(sample: CachedSample, used: Sequence[str], chosen: NDArray[np.generic] | slice) -> NDArray[np.float32]:
    """[n, D] float32 channels of chosen points of a sample."""
    parts: list[NDArray[Any]] = []
    for name in used:
        if name in ("coord", "height"):
            low, high = sample.coord.min(axis=0), sample.coord.max(axis=0)
            local = sample.coord[chosen] - np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
            parts.append(local if name == "coord" else local[:, 2:])
        else:
            values = getattr(sample, name)[chosen]
            parts.append(values[:, None] if values.ndim == 1 else values)
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")


def _draw(
    reader: CacheReader, dataset: CachedDataset, spec: VFMSpec, used: Sequence[str], config: ProbeConfig
) -> _Pool:
    """One pass over the training split."""
    width = sum(map(len, _columns(used, spec).values()))
    most = max(1, POOL_BYTES // (4 * width))
    ids, count = dataset.ids, min(config.train_samples, most)
    if len(ids) > count:
        picked = np.random.default_rng([config.seed, _PICK]).permutation(len(ids))[:count]
        ids = [ids[i] for i in sorted(picked.tolist())]
    each = min(config.points_per_sample, most // len(ids))
    x, y = np.empty((len(ids) * each, width), dtype=np.float32), np.empty(len(ids) * each, dtype=np.int64)
    filled = 0
    for i, sample_id in enumerate(ids):
        sample = reader.read(sample_id, spec.key)
        labels = _labels(sample, reader)
        candidates = np.flatnonzero(sample.valid & (labels >= 0))
        rng = np.random.default_rng([config.seed, _DRAW, i])
        chosen = np.sort(rng.choice(candidates, size=min(each, len(candidates)), replace=False))
        x[filled : filled + len(chosen)] = _inputs(sample, used, chosen)
        y[filled : filled + len(chosen)] = labels[chosen]
        filled += len(chosen)
    if not filled:
        raise DataError(
            f"cache {str(reader.paths.root)!r}, split {config.train_split!r}: no point has both a label and a feature "
            f"of {spec.key!r}; take a labelled split, or look at the coverage with `ditr-cache info`"
        )
    points = torch.from_numpy(x[:filled])
    std, mean = torch.std_mean(points, dim=0, correction=0)
    std = torch.where(std > 1e-6 * (mean.abs() + 1e-12), std, torch.ones_like(std))  # a constant tells nothing
    points -= mean
    points /= std
    return _Pool(x=points, y=torch.from_numpy(y[:filled]), mean=mean, std=std)


def _labels(sample: CachedSample, reader: CacheReader) -> NDArray[np.int64]:
    """[N] int64 labels, -1 where ignored. Raises `DataError` for labels beyond the classes."""
    assert sample.segment is not None
    labels = np.where(sample.segment == reader.metadata.ignore_index, -1, sample.segment.astype(np.int64))
    low, high = int(labels.min(initial=-1)), int(labels.max(initial=-1))
    if low < -1 or high >= len(reader.metadata.class_names):
        raise DataError(
            f"sample {sample.id!r}: labels must be in [0, {len(reader.metadata.class_names)}) or "
            f"{reader.metadata.ignore_index}, got {low} to {high}; extract the dataset again"
        )
    return labels


def _fit(pool: _Pool, columns: Tensor, classes: int, config: ProbeConfig) -> _Linear:
    """Logistic regression on some columns; what standardised them is folded into the result."""
    first, last = int(columns[0]), int(columns[-1])
    together = len(columns) == last - first + 1 and bool((columns.diff() == 1).all())
    x = pool.x[:, first : last + 1] if together else pool.x[:, columns]
    weight = torch.zeros(len(columns), classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=config.iterations,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-7,
    )
    loss = torch.zeros(())

    def closure() -> Tensor:
        nonlocal loss
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, pool.y) + config.l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        raw = weight / pool.std[columns][:, None]
        state = optimizer.state[weight]
        return _Linear(
            columns=columns,
            weight=raw,
            bias=bias - pool.mean[columns] @ raw,
            iterations=int(state["n_iter"]),
            loss=float(loss),
        )


def _evaluate(
    reader: CacheReader,
    dataset: CachedDataset,
    spec: VFMSpec,
    used: Sequence[str],
    fitted: Sequence[_Linear],
    majority: int,
) -> tuple[list[tuple[ConfusionMatrix, ConfusionMatrix]], int, int]:
    """Counts (on points with a feature, on all points) of the most frequent class and of every probe; numbers of
    labelled points and of those with a feature."""
    classes = len(reader.metadata.class_names)
    scores = [(ConfusionMatrix(classes), ConfusionMatrix(classes)) for _ in range(len(fitted) + 1)]
    width = spec.dim if "feature" in used else 0  # the features' columns are the first
    points = seen = 0
    for sample_id in dataset.ids:
        sample = reader.read(sample_id, spec.key)
        labels = _labels(sample, reader)
        labelled = np.flatnonzero(labels >= 0)
        points += len(labelled)
        for begin in range(0, len(labelled), CHUNK_POINTS):
            chosen = labelled[begin : begin + CHUNK_POINTS]
            valid = torch.from_numpy(sample.valid[chosen])
            target = torch.from_numpy(labels[chosen])
            seen += int(valid.sum())
            x = torch.from_numpy(_inputs(sample, used, chosen))
            constant = torch.full_like(target, majority)
            predictions = [constant]
            for linear in fitted:
                prediction = (x[:, linear.columns] @ linear.weight + linear.bias).argmax(dim=1)
                needs_feature = bool((linear.columns < width).any())
                predictions.append(torch.where(valid, prediction, constant) if needs_feature else prediction)
            for prediction, (on_seen, on_all) in zip(predictions, scores, strict=True):
                on_seen.update(prediction[valid], target[valid])
                on_all.update(prediction, target)
    if not points:
        raise DataError(
            f"cache {str(reader.paths.root)!r}, split {dataset.split!r}: not one point has a label; take another "
            "--val-split"
        )
    return scores, points, seen
