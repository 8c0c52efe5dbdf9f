"""Let torchvision, which timm needs, be imported beside a CPU build of torch.

PyPI's torchvision is a CUDA build: on CPU torch its extension does not load, and its import fails where it describes
operators that were never declared. Declaring two of them is enough for everything timm uses (transforms, datasets,
FrozenBatchNorm2d); the operators themselves stay unusable.
"""

from __future__ import annotations

import sys

import torch


def declare_missing_operators() -> None:
    """Call before the first import of torchvision or timm. Does nothing on CUDA builds of torch."""
    if torch.version.cuda is not None or "torchvision" in sys.modules:
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
