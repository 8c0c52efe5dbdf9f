"""Stored feature rows back to float32, on the device where they are used: the codecs of the cache in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditr_cache.codecs import Codec


@dataclass(frozen=True, kw_only=True)
class RowDecoder:
    """What a table of stored rows means. Equal to `Codec.decode` up to float32 rounding.

    Args:
        arrays: what the codec was fitted to be, float32 by name; empty for codecs that fit nothing.
    """

    arrays: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, codec: Codec) -> RowDecoder:
        """The decoder of a codec."""
        wanted = ("mean", "basis", "rotation", "codebooks")
        arrays = {name: torch.tensor(array) for name, array in codec.arrays.items() if name in wanted}
        return cls(arrays=arrays)

    def map(self, move: Callable[[Tensor], Tensor]) -> RowDecoder:
        """With `move` applied to every tensor."""
        return RowDecoder(arrays={name: move(array) for name, array in self.arrays.items()}) if self.arrays else self

    def dim(self, table: Tensor) -> int:
        """Channels C of the decoded rows of a table [T, W]."""
        return len(self.arrays["mean"]) if self.arrays else table.shape[1]

    def decode(self, stored: Tensor, scale: Tensor | None, buffer: Tensor | None = None) -> Tensor:
        """Decoded rows.

        Args:
            stored: [V, W] rows of the table.
            scale: [V] float32 their factors; None for codecs without.
            buffer: [at least V, C] float32 that the result may overwrite; on a CPU, memory that was used before is
                several times faster to write to than new one.

        Returns:
            [V, C] float32.
        """
        if "codebooks" in self.arrays:
            books = self.arrays["codebooks"]
            subspaces = torch.arange(len(books), device=stored.device)
            words = books[subspaces, stored.long()].flatten(1)
            return self._back(words, self.arrays["rotation"], buffer)
        if stored.dtype == torch.uint8:
            stored = stored.view(torch.float8_e4m3fn).float()
        if self.arrays:
            assert scale is not None
            return self._back(stored * scale[:, None], self.arrays["basis"], buffer)
        values = torch.empty(stored.shape, device=stored.device) if buffer is None else buffer[: len(stored)]
        return values.copy_(stored) if scale is None else torch.mul(stored, scale[:, None], out=values)

    def _back(self, coordinates: Tensor, axes: Tensor, buffer: Tensor | None) -> Tensor:
        out = None if buffer is None else buffer[: len(coordinates)]
        return torch.addmm(self.arrays["mean"], coordinates, axes, out=out)
