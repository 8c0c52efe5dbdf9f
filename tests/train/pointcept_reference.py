"""Networks of Pointcept as a rule gives them weights, and what they said: `tests/data/reference/pointcept.*`.

The files hold what code of others computed, never the code: made with Pointcept d74c646, its v1.5.1 and Sonata's own
repository on a CPU (spconv-cu120 2.3.6, `ConvAlgo.Native`, float32, evaluation mode, orders not shuffled, exact
attention in place of flash-attn). `pointcept.json` has the name and shape of every tensor of each network,
`pointcept.npz` the points of two samples and the output for them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditr_train.data.sample import PointBatch

DATA = Path(__file__).parents[1] / "data" / "reference"


def tensor_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of that name: uniform numbers that depend on name and shape alone, in a range fit for its kind."""
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.tensor(7)
    # Raw numbers, which numpy promises to keep, unlike those of its distributions.
    raw = np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])).random_raw(int(np.prod(shape)))
    uniform = (raw >> np.uint64(11)).astype(np.float64).reshape(shape) / 2**53
    if kind == "running_var" or (kind == "weight" and len(shape) == 1):
        values = 0.5 + uniform
    elif len(shape) == 1:
        values = 0.4 * (uniform - 0.5)
    else:
        values = (2 * uniform - 1) * (3 * shape[0] / uniform.size) ** 0.5
    return torch.from_numpy(values.astype(np.float32))


def networks() -> dict[str, dict[str, Any]]:
    """Of each network `backbone` (our configuration) and `tensors` (their name -> shape)."""
    values: dict[str, dict[str, Any]] = json.loads((DATA / "pointcept.json").read_text())
    return values


def state_dict(network: str, prefix: str = "") -> dict[str, Tensor]:
    """The weights of one of the `networks`, under their names."""
    tensors = networks()[network]["tensors"]
    return {prefix + name: tensor_of(name, tuple(shape)) for name, shape in tensors.items()}


def batch() -> PointBatch:
    """The points of the two samples."""
    with np.load(DATA / "pointcept.npz") as arrays:
        grid_coord, feat, offset = (torch.from_numpy(arrays[name]) for name in ("grid_coord", "feat", "offset"))
    return PointBatch(
        coord=0.02 * grid_coord, grid_coord=grid_coord.int(), feat=feat, offset=offset, segment=None, features=None,
        names=("a", "b"),
    )  # fmt: skip


def output(network: str) -> Tensor:
    """[N, C] float32: what the network said of the points; SpUNet-v1m1 class scores, the others features."""
    with np.load(DATA / "pointcept.npz") as arrays:
        return torch.from_numpy(arrays[network])
