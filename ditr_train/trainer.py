"""The training loop: one run from its recipe to its last checkpoint, resumable at every optimiser step.

Nothing random carries over from step to step: data and dropout are drawn from (seed, step, rank). A run that is
interrupted and resumed therefore ends, on a CPU and with the same number of threads (the order of a sum depends on it),
with the very weights of one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ditr_cache.errors import CacheError, UsageError
from ditr_train.checkpoint import load_checkpoint, save_checkpoint
from ditr_train.data.loader import BatchLoader, TrainBatches, TrainPlan, accumulation_steps
from ditr_train.data.sample import PointBatch
from ditr_train.distributed import Processes, autocast, processes
from ditr_train.ema import MovingAverage
from ditr_train.initialise import initialise
from ditr_train.optim import build_optimizer, build_scheduler
from ditr_train.recipe import Recipe
from ditr_train.run_folder import RunFolder, RunInfo
from ditr_train.tasks import open_task
from ditr_train.tracking import Tracker, TrainProgress
from ditr_train.wandb_run import require_wandb

log = logging.getLogger(__name__)

SMALLEST_SCALE = 2.0**-10
"""Factor of the loss under fp16 below which a gradient that is not finite is no overflow."""

_DROPOUT = 3  # stream of random numbers, beside those of the loader


class TrainingInterruptedError(CacheError, RuntimeError):
    """A run that was asked to stop; its state is saved."""

    exit_code = 1


class DivergedError(CacheError, ArithmeticError):
    """A loss or gradient that is not finite."""

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
        `last` and `best`: results of the final and the best evaluation, None where the recipe evaluates nothing.

    Raises:
        UsageError: the run folder exists and `resume` is off, or settings that do not fit each other.
        MismatchError: the cache is not the one of the recipe or of the run.
        DivergedError: the loss or a gradient is not finite; names the samples.
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
        recipe = recipe.with_absolute_paths()
        self.recipe, self.this, self.folder = recipe, this, RunFolder(out)
        data, training = recipe.data, recipe.training
        if this.is_main and not resume:
            self.folder.require_new()
        if recipe.tracking.wandb is not None:
            require_wandb()
        self.task = open_task(recipe, this)
        self.accumulation = training.accumulation
        """Micro-batches per optimiser step."""
        if data.micro_batch is not None:
            self.accumulation = accumulation_steps(
                data.batch_size, this.world, data.micro_batch, pairs=data.mix_prob > 0
            )
        self.plan = TrainPlan(
            sizes=self.task.sizes,
            ratios=self.task.ratios,
            batch_size=data.batch_size,
            loop=data.loop,
            seed=recipe.seed,
            accumulation=self.accumulation,
            rank=this.rank,
            world=this.world,
        )
        _check_mixing(data.mix_prob, data.batch_size, data.batch_size // (self.accumulation * this.world))
        self.total_steps = training.steps or (training.epochs or 0) * self.plan.steps_per_epoch

        torch.manual_seed(recipe.seed)
        self.model: nn.Module = self.task.build().to(this.device)
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
        """Results of the evaluation with the highest score."""
        self.average: MovingAverage | None = None
        self._progress = TrainProgress(self.total_steps, enabled=this.is_main and not quiet)
        self._open_folder(resume)
        self.resumed_from = self.step
        self._network: nn.Module = DistributedDataParallel(self.model) if this.world > 1 else self.model
        self._tracker: Tracker | None = None
        self._signal: str | None = None

    def fit(self) -> dict[str, Any]:
        """Train what is left of the budget. Returns and raises as `train`."""
        begun, total, window = time.perf_counter(), _Times(), _Times()
        loader = BatchLoader(
            TrainBatches(self.task.train_set, seed=self.recipe.seed, mix_prob=self.recipe.data.mix_prob),
            self.plan.batches(self.step, self.total_steps),
            workers=self.recipe.data.workers,
            pin_memory=self.this.device.type == "cuda",
        )
        with contextlib.ExitStack() as stack:
            if self.this.is_main and self.step < self.total_steps:
                tracker = Tracker(
                    self.folder.path, self.step, self.recipe.tracking, self.recipe.model_dump(mode="json")
                )
                self._tracker = stack.enter_context(contextlib.closing(tracker))
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
        self._choose_statistics()
        parts = self.accumulation
        names: list[str] = []
        fault = ""
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(parts):
            asked = time.perf_counter()
            batch = next(batches)
            times.waited += time.perf_counter() - asked
            names += batch.names
            times.points += len(batch.coord)
            last = part == parts - 1
            with contextlib.nullcontext() if last or self.this.world == 1 else self._network.no_sync():  # type: ignore[operator]
                loss = self._loss(batch.to(self.this.device, non_blocking=True), part) / parts
                self.scaler.scale(loss).backward()
            value = loss.item()
            if not (fault or math.isfinite(value)):
                fault = f"the loss is {value} on {', '.join(batch.names)}"
            times.loss += value
        if self.this.any(bool(fault)):  # together: a process that stopped alone would leave the others waiting
            raise self._diverged(fault or "the loss of another process is not finite")
        self._update(names)
        times.seconds = time.perf_counter() - begun
        return times

    def _choose_statistics(self) -> None:
        """Train on the statistics of the batch, or towards the end of the run on the running ones."""
        self.model.train()
        if self.step >= round((1 - self.recipe.training.fixed_norms) * self.total_steps):
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _loss(self, batch: PointBatch, part: int) -> Tensor:
        # Dropout is a function of the step, not of what ran before it: nothing to save, nothing to restore.
        # Counted over all processes, so that their number changes nothing.
        key = [self.recipe.seed, _DROPOUT, self.step, part * self.this.world + self.this.rank]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        with autocast(self.this.device, self.recipe.training.amp):
            return self.task.loss(self._network, batch)

    def _update(self, names: Sequence[str]) -> None:
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.training.clip_grad
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        before = self.scaler.get_scale()
        # Under fp16 an overflow is part of the game: the scaler leaves the step out and scales less, but not for ever.
        if (before < SMALLEST_SCALE or not self.scaler.is_enabled()) and not math.isfinite(norm.item()):
            raise self._diverged(f"the gradient's norm is {norm.item()} on {', '.join(names)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:  # else fp16 overflowed and the optimiser skipped the step
            self.scheduler.step()
            if self.average is not None:
                self.average.update(self.model)

    def _diverged(self, fault: str) -> DivergedError:
        return DivergedError(
            f"step {self.step + 1}: {fault}; the weights of the last checkpoint in "
            f"{str(self.folder.path)!r} are from before it; look at these samples, lower optimizer.lr, set "
            "training.clip_grad, or set training.amp to bf16 or off"
        )

    def _end_epoch(self) -> None:
        training, done = self.recipe.training, self.step == self.total_steps
        if self.epoch % training.evaluate_every == 0 or done:
            self._evaluate()
        if self.epoch % training.checkpoint_every == 0 or done:
            self._save()

    def _evaluate(self) -> None:
        used = self.model if self.average is None else self.average.model
        self.this.same_buffers(used)  # what is scored is what is saved
        results = self.task.evaluate(used)
        if results is None:
            return
        self.last = {"epoch": self.epoch, "step": self.step, **results}
        score = self.task.score
        is_best = self.best is None or (self.last[score] or 0.0) > (self.best[score] or 0.0)
        if is_best:
            self.best = self.last
        if self._tracker is not None:
            self._progress.evaluated(self.last)
            self._tracker.write("val", **self.last)
            if is_best:
                save_checkpoint(self.folder.best, {"model": used.state_dict(), "step": self.step, "results": self.best})

    def _save(self) -> None:
        if not self.this.is_main:
            return
        average = self.average
        state = {
            "model": self.model.state_dict(),
            "ema": None if average is None else {"model": average.model.state_dict(), "updates": average.updates},
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
                samples_per_second=self.recipe.data.batch_size * window.steps / window.seconds,
                points_per_second=window.points * self.this.world / window.seconds,
                memory_bytes=_peak_memory(self.this.device),
            )

    def _open_folder(self, resume: bool) -> None:
        """Start the run folder with its first weights, or load the state that it holds."""
        resumed = resume and self.folder.started()
        state = load_checkpoint(self.folder.last) if resumed and self.folder.last.exists() else None
        if resumed:
            self.folder.check_same(self.recipe, self.task.sources)
        started_from = None
        if state is not None:
            self.model.load_state_dict(state["model"])
        elif self.recipe.init is not None:
            started_from = initialise(self.model, self.recipe.init, self.recipe)
            self._progress.say(str(started_from))
        if self.recipe.training.ema is not None:
            self.average = MovingAverage(self.model, self.recipe.training.ema)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.last, self.best = state["step"], state["last"], state["best"]
            if self.average is not None:
                self.average.model.load_state_dict(state["ema"]["model"])
                self.average.updates = state["ema"]["updates"]
        if self.this.is_main and not resumed:
            init = None if started_from is None else dataclasses.asdict(started_from)
            self.folder.create(self.recipe, RunInfo.of(self.task.sources, device=self.this.device, init=init))
        self._progress.begin(self.step)
        self.this.barrier()

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
    points: int = 0
    loss: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0

    def add(self, other: _Times) -> None:
        self.steps += other.steps
        self.points += other.points
        self.loss += other.loss
        self.waited += other.waited
        self.seconds += other.seconds

    @property
    def data_wait(self) -> float:
        """Fraction of the time spent waiting for data."""
        return self.waited / self.seconds if self.seconds else 0.0


def _peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: on its GPU, or without one resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check_mixing(mix_prob: float, batch_size: int, micro_batch: int) -> None:
    """Tell where micro-batches leave samples without a neighbour to mix with; refuse where none has one."""
    if mix_prob == 0 or micro_batch % 2 == 0 or micro_batch == batch_size:
        return
    remedy = "choose data.micro_batch or the number of processes so that it is even"
    if micro_batch == 1:
        raise UsageError(
            f"data.mix_prob: {mix_prob:g} of the pairs are to be mixed, but a micro-batch is a single sample; "
            f"{remedy}, or set data.mix_prob=0"
        )
    log.warning("of every %d samples one has no neighbour to be mixed with; %s", micro_batch, remedy)
