"""Several datasets as one, for joint distillation: ScanNet with Structured3D; nuScenes with KITTI and Waymo."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditr_cache.errors import MismatchError
from ditr_train.data.dataset import CachedDataset, VoxelSample

_WORDS = {"codec": "codec", "codec_digest": "training data that the codec was fitted to"}
_SAME_TEACHER = ("dim", "weights_sha256", "tap", "norm", "codec", "codec_digest")


class JointDataset:
    """The samples of several datasets, counted through all of them. Picklable, as they are.

    Args:
        parts: at least one; the VFM of all of them has to be the same. The image size, and with it the grid of
            tokens, may differ: every dataset has images of its own.

    Raises:
        MismatchError: features of different VFMs, or in different codecs.
    """

    def __init__(self, parts: Sequence[CachedDataset]) -> None:
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        first = parts[0]
        for other in parts[1:]:
            if first.vfm is None or other.vfm is None:
                continue
            for name in _SAME_TEACHER:
                a, b = getattr(first.vfm, name), getattr(other.vfm, name)
                if a != b:
                    raise MismatchError(
                        f"caches {str(first.cache.paths.root)!r} and {str(other.cache.paths.root)!r}: one head cannot "
                        f"learn from both, the {_WORDS.get(name, f'{name} of the VFM')} differs: {a!r} "
                        f"({first.vfm.key}) and {b!r} ({other.vfm.key}); extract both with the same --vfm and --codec"
                    )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def train_sample(self, index: int, rng: np.random.Generator) -> VoxelSample:
        """As `CachedDataset.train_sample`."""
        part, position = self._locate(index)
        return part.train_sample(position, rng)

    def eval_sample(self, index: int) -> VoxelSample:
        """As `CachedDataset.eval_sample`."""
        part, position = self._locate(index)
        return part.eval_sample(position)

    def _locate(self, index: int) -> tuple[CachedDataset, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[number]
        return part, index - int(self._ends[number]) + len(part)
