"""The training loop: one run from its recipe to its last checkpoint, resumable at every optimiser step.

Nothing random carries over from step to step: data and dropout are drawn from (seed, step, rank). A run that is
interrupted and resumed therefore ends, on a CPU and with the same number of threads (the order of a sum depends on it),
with the very weights of one that was not.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ditr_cache.errors import CacheError, UsageError
from ditr_cache.store import open_cache
from ditr_train.checkpoint import load_checkpoint, save_checkpoint
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.loader import BatchLoader, TrainBatches, TrainPlan
from ditr_train.data.sample import PointBatch
from ditr_train.distributed import Processes, autocast, processes
from ditr_train.evaluate import Evaluator
from ditr_train.losses import segmentation_loss
from ditr_train.models.segmentor import build_segmentor
from ditr_train.optim import build_optimizer, build_scheduler
from ditr_train.recipe import Recipe
from ditr_train.run_folder import RunFolder, RunInfo
from ditr_train.tracking import Tracker, TrainProgress

_DROPOUT = 3  # stream of random numbers, beside those of the loader


class TrainingInterruptedError(CacheError, RuntimeError):
    """A run that was asked to stop; its state is saved."""

    exit_code = 1


class DivergedError(CacheError, ArithmeticError):
    """A loss that is not finite."""

    exit_code = 1


def train(
    recipe: Recipe, out: str | Path, *, device: str = "auto", resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train by a recipe into the run folder `out`.

    Args:
        recipe: with its cache set.
        out: the run folder.
        device: auto, cpu or cuda.
        resume: go on from the folder's last checkpoint; starts anew where there is none yet.
        quiet: show no progress.

    Returns:
        `run`, `steps`, `resumed_from`, `seconds`, `data_wait` (fraction of the training time spent waiting for data),
        `last` and `best`: results of the final and the best evaluation.

    Raises:
        UsageError: the run folder exists and `resume` is off, or settings that do not fit each other.
        MismatchError: the cache is not the one of the recipe or of the run.
        DivergedError: the loss is not finite.
        TrainingInterruptedError: SIGTERM or SIGINT; the state is saved.
        CacheError: the cache cannot be used.
    """
    with processes(device) as this:
        return Trainer(recipe, Path(out), this, resume=resume, quiet=quiet).fit()


class Trainer:
    """One run of `train`; its arguments are those of `train`, and `this` is the process among those of the run."""

    def __init__(
        self, recipe: Recipe, out: Path, this: Processes, *, resume: bool = False, quiet: bool = False
    ) -> None:
        self.recipe, self.this, self.folder = recipe, this, RunFolder(out)
        data, training = recipe.data, recipe.training
        if this.is_main and not resume:
            self.folder.require_new()
        cache = open_cache(recipe.require_cache())
        common: dict[str, Any] = {
            "grid_size": data.grid_size, "feat": data.feat, "vfm": recipe.vfm, "class_names": recipe.classes
        }  # fmt: skip
        self.dataset = CachedDataset(
            cache, recipe.splits.train, transforms=data.transforms(), point_max=data.point_max, **common
        )
        self.evaluator = Evaluator(
            CachedDataset(cache, recipe.splits.val, **common), this, amp=training.amp, workers=data.workers
        )
        self.plan = TrainPlan(
            samples=len(self.dataset),
            batch_size=data.batch_size,
            loop=data.loop,
            seed=recipe.seed,
            accumulation=training.accumulation,
            rank=this.rank,
            world=this.world,
        )
        self.total_steps = training.steps or (training.epochs or 0) * self.plan.steps_per_epoch
        self.class_weights = self._read_class_weights()

        torch.manual_seed(recipe.seed)
        vfm = self.dataset.vfm
        self.model: nn.Module = build_segmentor(
            recipe.model,
            in_channels=self.dataset.in_channels,
            num_classes=len(self.dataset.class_names),
            feature_dim=None if vfm is None else vfm.dim,
        ).to(this.device)
        if training.sync_batchnorm and this.world > 1 and this.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.scheduler = build_scheduler(self.optimizer, recipe.schedule, self.total_steps)
        fp16 = training.amp == "fp16" and this.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(this.device.type, enabled=fp16)
        self.step = 0
        """Optimiser steps done."""
        self.last: dict[str, Any] | None = None
        """Results of the newest evaluation."""
        self.best: dict[str, Any] | None = None
        """Results of the evaluation with the highest mIoU."""
        self._open_folder(resume)
        self.resumed_from = self.step
        self._network: nn.Module = DistributedDataParallel(self.model) if this.world > 1 else self.model
        self._progress = TrainProgress(self.total_steps, self.step, enabled=this.is_main and not quiet)
        self._tracker: Tracker | None = None
        self._signal: str | None = None

    def fit(self) -> dict[str, Any]:
        """Train what is left of the budget. Returns and raises as `train`."""
        begun, total, window = time.perf_counter(), _Times(), _Times()
        loader = BatchLoader(
            TrainBatches(self.dataset, seed=self.recipe.seed, mix_prob=self.recipe.data.mix_prob),
            self.plan.batches(self.step, self.total_steps),
            workers=self.recipe.data.workers,
            pin_memory=self.this.device.type == "cuda",
        )
        self.model.train()
        with contextlib.ExitStack() as stack:
            if self.this.is_main and self.step < self.total_steps:
                self._tracker = stack.enter_context(contextlib.closing(Tracker(self.folder.path, self.step)))
            stack.enter_context(self._progress)
            stack.enter_context(self._signals())
            batches = stack.enter_context(contextlib.closing(iter(loader)))  # type: ignore[type-var]
            while self.step < self.total_steps:
                times = self._train_step(batches)
                self.step += 1
                total.add(times)
                window.add(times)
                self._progress.step(self.step, epoch=self.epoch, loss=times.loss, data_wait=total.data_wait)
                if self.step % self.recipe.training.log_every == 0 or self.step == self.total_steps:
                    self._log(window)
                    window = _Times()
                if self.step % self.plan.steps_per_epoch == 0 or self.step == self.total_steps:
                    self._end_epoch()
                if self.this.any(self._signal is not None):
                    self._interrupt()
        return {
            "run": str(self.folder.path),
            "steps": self.step,
            "resumed_from": self.resumed_from,
            "seconds": time.perf_counter() - begun,
            "data_wait": total.data_wait,
            "last": self.last,
            "best": self.best,
        }

    @property
    def epoch(self) -> int:
        """The epoch of the newest step, counted from 1."""
        return -(-self.step // self.plan.steps_per_epoch)

    def _train_step(self, batches: Iterator[PointBatch]) -> _Times:
        begun, times = time.perf_counter(), _Times(steps=1)
        parts = self.recipe.training.accumulation
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(parts):
            asked = time.perf_counter()
            batch = next(batches)
            times.waited += time.perf_counter() - asked
            last = part == parts - 1
            with contextlib.nullcontext() if last or self.this.world == 1 else self._network.no_sync():  # type: ignore[operator]
                loss = self._loss(batch.to(self.this.device, non_blocking=True), part) / parts
                self.scaler.scale(loss).backward()
            value = loss.item()  # the one place of a step that waits for the device
            if not math.isfinite(value):
                raise DivergedError(
                    f"step {self.step + 1}: the loss is {value} on {', '.join(batch.names)}; the weights of the last "
                    f"checkpoint in {str(self.folder.path)!r} are from before it; lower optimizer.lr, set "
                    "training.clip_grad, or set training.amp to bf16 or off"
                )
            times.loss += value
        self._update()
        times.seconds = time.perf_counter() - begun
        return times

    def _loss(self, batch: PointBatch, part: int) -> Tensor:
        assert batch.segment is not None
        # Dropout is a function of the step, not of what ran before it: nothing to save, nothing to restore.
        key = [self.recipe.seed, _DROPOUT, self.step, part, self.this.rank]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        with autocast(self.this.device, self.recipe.training.amp):
            logits = self._network(batch)
        return segmentation_loss(
            logits.float(),
            batch.segment,
            ignore_index=-1,
            class_weights=self.class_weights,
            lovasz_weight=self.recipe.loss.lovasz_weight,
            label_smoothing=self.recipe.loss.label_smoothing,
        )

    def _update(self) -> None:
        if self.recipe.training.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.training.clip_grad)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:  # else fp16 overflowed and the optimiser skipped the step
            self.scheduler.step()

    def _end_epoch(self) -> None:
        training, done = self.recipe.training, self.step == self.total_steps
        if self.epoch % training.evaluate_every == 0 or done:
            results = {"epoch": self.epoch, "step": self.step, **self.evaluator(self.model)}
            self.last = results
            is_best = self.best is None or (results["mIoU"] or 0.0) > (self.best["mIoU"] or 0.0)
            if is_best:
                self.best = results
            if self._tracker is not None:
                self._progress.evaluated(self.recipe.splits.val, results, epoch=self.epoch)
                self._tracker.write("val", **results)
                if is_best:
                    save_checkpoint(
                        self.folder.best, {"model": self.model.state_dict(), "step": self.step, "results": results}
                    )
        if self.epoch % training.checkpoint_every == 0 or done:
            self._save()

    def _save(self) -> None:
        if not self.this.is_main:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "last": self.last,
            "best": self.best,
        }
        save_checkpoint(self.folder.last, state)

    def _log(self, window: _Times) -> None:
        if self._tracker is not None:
            self._tracker.write(
                "train",
                step=self.step,
                epoch=self.epoch,
                loss=window.loss / window.steps,
                lr=max(float(group["lr"]) for group in self.optimizer.param_groups),
                data_wait=window.data_wait,
                seconds_per_step=window.seconds / window.steps,
            )

    def _open_folder(self, resume: bool) -> None:
        """Start the run folder, or load the state that it holds."""
        vfm = self.dataset.vfm
        if resume and self.folder.started():
            self.folder.check_same(self.recipe, vfm, self.dataset.class_names)
            if self.folder.last.exists():
                state = load_checkpoint(self.folder.last)
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.scheduler.load_state_dict(state["scheduler"])
                self.scaler.load_state_dict(state["scaler"])
                self.step, self.last, self.best = state["step"], state["last"], state["best"]
        elif self.this.is_main:
            info = RunInfo.of(
                cache=self.dataset.cache.paths.root,
                dataset=self.dataset.cache.metadata.dataset,
                class_names=self.dataset.class_names,
                in_channels=self.dataset.in_channels,
                vfm=vfm,
            )
            self.folder.create(self.recipe, info)
        self.this.barrier()

    def _read_class_weights(self) -> Tensor | None:
        weights, classes = self.recipe.loss.class_weights, self.dataset.class_names
        if weights is None:
            return None
        if len(weights) != len(classes):
            raise UsageError(
                f"loss.class_weights: expected one per class of the cache ({len(classes)}), got {len(weights)}"
            )
        return torch.tensor(weights, dtype=torch.float32, device=self.this.device)

    def _interrupt(self) -> None:
        self._save()
        raise TrainingInterruptedError(
            f"interrupted{f' by {self._signal}' if self._signal else ''} after step {self.step} of {self.total_steps}; "
            f"the state is saved in {str(self.folder.last)!r}, continue with --resume"
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a stop after the step; a second one acts as always."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            received = signal.Signals(number)
            self._signal = received.name
            signal.signal(received, previous[received])

        previous: dict[signal.Signals, Any] = {}
        for handled in (signal.SIGINT, signal.SIGTERM):
            previous[handled] = signal.signal(handled, note)
        try:
            yield
        finally:
            for handled, handler in previous.items():
                signal.signal(handled, handler)


@dataclass
class _Times:
    """What some steps took and gave; seconds."""

    steps: int = 0
    loss: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0

    def add(self, other: _Times) -> None:
        self.steps += other.steps
        self.loss += other.loss
        self.waited += other.waited
        self.seconds += other.seconds

    @property
    def data_wait(self) -> float:
        """Fraction of the time spent waiting for data."""
        return self.waited / self.seconds if self.seconds else 0.0
