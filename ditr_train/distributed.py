"""The processes of one run, as `torchrun` starts them; a single process needs nothing of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ditr_cache.errors import DeviceError, UsageError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Args:
        rank: 0 writes checkpoints, metrics and the progress display.
        world: number of processes.
        device: the device of this process.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process; all processes must ask."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def sum(self, value: float) -> float:
        """Sum of `value` over the processes; all of them must ask."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def same_buffers(self, model: nn.Module) -> None:
        """Give the buffers of `model`, such as the running statistics of its norms, the main process's values.

        Each process updates them from batches of its own; all of them must ask.
        """
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Device for `auto`, `cpu` or `cuda` (optionally with an index).

    Raises:
        DeviceError: CUDA was asked for and is absent.
        UsageError: another name.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError(f"device: expected auto, cpu or cuda, got {name!r}")
    available = torch.cuda.is_available()
    if kind == "cpu" or (kind == "auto" and not available):
        return torch.device("cpu")
    position = int(index) if index else local_rank
    if not available:
        raise DeviceError(
            "device: cuda was asked for, but PyTorch sees no CUDA device; install a CUDA build of torch and a driver, "
            "or use --device cpu"
        )
    if position >= torch.cuda.device_count():
        raise DeviceError(
            f"device: cuda:{position} was asked for, but there are {torch.cuda.device_count()} CUDA devices; start "
            "fewer processes or name another"
        )
    return torch.device("cuda", position)


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the run that `torchrun` describes in the environment (nccl on GPUs, gloo on CPUs), and leave it at the end.

    A process group that the caller has made is used and left as it is; a program that trains several times has to make
    one, as torch cannot reliably join the same rendezvous again.

    Raises:
        DeviceError: CUDA was asked for and is absent.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world, chosen)
    finally:
        if not joined:
            dist.destroy_process_group()


AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""`training.amp` -> dtype of autocast."""


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Mixed precision as the recipe says, on a GPU only: a CPU always computes in float32."""
    enabled = amp != "off" and device.type == "cuda"
    return torch.autocast(device.type, dtype=AMP_DTYPES.get(amp), enabled=enabled)
