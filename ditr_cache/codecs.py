"""Codecs: how rows of features are stored, and read back.

A row has C channels; a table has one row of W = `codec.width` columns for each, and, where `codec.scaled`, one float32
scale. What a row costs, and the bound that property tests hold each codec to, for a row x and its decoded row y:

- `float16`, 2 C bytes: |y - x| <= 2^-11 |x| + 2^-25 per channel; values beyond +-65504 are refused.
- `int8`, C + 4 bytes: |y - x| <= s / 2 per channel with the row's scale s = max|x| / 127.
- `fp8`, C + 4 bytes: |y - x| <= max(2^-4 |x|, 2^-10 s) per channel with the row's scale s = max|x| / 448.
- `pca<K>-int8`, min(K, C) + 4 bytes: |y - p| <= s / 2 sqrt(sum_k |b_k|^2) per row, where p is the projection of x.
- `pq<M>`, min(M, C) bytes: y is made of the codewords nearest to x, one per subspace.

These hold up to float32 rounding: 2^-16 of the row's peak for `int8` and `fp8`, 2^-16 (|x| + |m|) for `pca`. Rows whose
peak is below 2e-36 (the peak of their coordinates, for `pca`) may be stored as zeros.

`pca<K>-int8` (`pca256-int8` is the one to try first) subtracts the mean m of the training rows, projects onto their
first K principal axes and stores the coordinates z as int8 with a scale per row: y = (codes * s) @ basis + m. The rows
b_k of the basis are orthogonal; |b_k| is the step of axis k relative to the first, so that z_k = (x - m) b_k / |b_k|^2,
s = max|z| / 127 and |decoded z_k - z_k| <= s / 2. The row p = z @ basis + m is the point of the span nearest to x;
y - p lies in the span and x - p is perpendicular to it, so |y - x|^2 = |x - p|^2 + |y - p|^2.

`pq<M>` (`pq64`) rotates x - m and cuts it into M subspaces of d = ceil(C / M) coordinates; of each, the number of the
nearest of 256 codewords is stored: y = codewords @ rotation + m. Nearest means |v - c|^2 <= |v - b|^2 +
2^-16 (|x - m| + |m| + max|codeword|)^2 for the part v of x, the codeword c taken, and any other b.

Under an outlier channel (one that is 50 to 100 times the others in every row, as in ViTs without registers) `int8`
spends its range on it and rounds the others coarsely; `fp8` keeps 4 significant bits down to 2^-14 of the peak, and
the fitted codecs give the channel an axis or a subspace of its own. `tests/cache/test_codec_outliers.py` has figures.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import CorruptCacheError, DataError, UnknownNameError, UsageError

CODECS = ("float16", "int8", "fp8", "pca256-int8", "pq64")
"""Names of the documented codecs; any number may stand in the last two."""

FLOAT16_MAX = 65504.0

FITTED_MAX = 1e32
"""Largest magnitude that a fitted codec takes: sums of its products are still float32."""

CODEWORDS = 256
"""Codewords of a subspace: their numbers are bytes."""

_FP8_MAX = 448.0
_FITTED = re.compile(r"pca([1-9][0-9]{0,4})-int8|pq([1-9][0-9]{0,4})")
_BLOCK = 2048  # rows that a fitted codec has in work at once
_FAR = np.float32(1e6)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRows:
    """Rows as stored.

    Args:
        table: [T, W] of the codec's width and dtype.
        scale: [T] float32, the factor of each row; None for codecs without.
    """

    table: NDArray[np.generic]
    scale: NDArray[np.float32] | None


class Codec(ABC):
    """How rows [T, C] are stored and read back.

    Args:
        name: say `float16` or `pca256-int8`.
        dim: width C of the rows.
    """

    dtype: ClassVar[np.dtype[Any]]
    """Of the table."""
    scaled: ClassVar[bool] = False
    """Whether each row has a scale."""

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim

    @property
    def width(self) -> int:
        """Columns W of the table."""
        return self.dim

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was fitted, to be stored beside the rows; empty for codecs that fit nothing."""
        return {}

    @property
    def explained_variance(self) -> float | None:
        """Share in 0..1 of the training rows' variance that decoding keeps; None for codecs that fit nothing."""
        return None

    def encode(self, rows: NDArray[np.floating]) -> EncodedRows:
        """Rows [T, C] of any float dtype as they are stored.

        Raises:
            DataError: another width, values that are not finite, or beyond what the codec can hold.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise DataError(
                f"features: rows of shape {rows.shape}, but the codec {self.name} was made for [T, {self.dim}]"
            )
        return self._encode(rows, peaks_of(rows))

    @abstractmethod
    def decode(self, table: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Rows [T, C] float32 of what `encode` stored: table [T, W] and scale [T] float32 or None."""

    @abstractmethod
    def _encode(self, rows: NDArray[np.floating], peak: NDArray[np.float32]) -> EncodedRows:
        """As `encode`, of finite rows with their largest magnitudes [T]."""


def peaks_of(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Largest magnitude [T] of each row [T, C].

    Raises:
        DataError: values that are not finite as float32.
    """
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        peak = np.abs(rows).max(axis=1, initial=0.0).astype(np.float32) if len(rows) else np.zeros(0, np.float32)
    if not np.isfinite(peak).all():
        raise DataError(f"features: {int((~np.isfinite(peak)).sum())} of {len(rows)} rows hold NaN or infinity")
    return peak


def refuse_beyond(limit: float, peak: NDArray[np.float32], name: str) -> None:
    """DataError where a row's peak [T] is more than the codec can hold."""
    if len(peak) and peak.max() > limit:
        largest, most = (f"{v:.0f}" if v < 1e9 else f"{v:.3g}" for v in (float(peak.max()), limit))
        raise DataError(f"features: a value of {largest} does not fit into {name} (at most {most}); use the codec int8")


class Float16Codec(Codec):
    """Halves: 2 C bytes per row."""

    dtype = np.dtype(np.float16)

    def _encode(self, rows: NDArray[np.floating], peak: NDArray[np.float32]) -> EncodedRows:
        refuse_beyond(FLOAT16_MAX, peak, self.name)
        return EncodedRows(table=rows.astype(np.float16), scale=None)

    def decode(self, table: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Rows [T, C] float32."""
        return table.astype(np.float32)


class Int8Codec(Codec):
    """Integers of -127..127 times the row's scale: C + 4 bytes per row."""

    dtype = np.dtype(np.int8)
    scaled = True

    def _encode(self, rows: NDArray[np.floating], peak: NDArray[np.float32]) -> EncodedRows:
        scale, inverse = _scales(peak, 127)
        codes = np.rint(rows.astype(np.float32) * inverse[:, None])
        return EncodedRows(table=np.clip(codes, -127, 127).astype(np.int8), scale=scale)

    def decode(self, table: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Rows [T, C] float32."""
        return _times_scale(table.astype(np.float32), scale, self.name)


class Fp8Codec(Codec):
    """Floats of 4 exponent and 3 fraction bits (e4m3fn, as bytes) times the row's scale: C + 4 bytes per row.

    Encoding needs a torch that has this type; decoding needs numpy alone.
    """

    dtype = np.dtype(np.uint8)
    scaled = True

    def _encode(self, rows: NDArray[np.floating], peak: NDArray[np.float32]) -> EncodedRows:
        try:
            import torch

            kind = torch.float8_e4m3fn
        except (ImportError, AttributeError) as error:
            raise UsageError(
                "the codec fp8 encodes through torch.float8_e4m3fn, which is absent here: install torch 2.4 or later "
                "(pip install 'ditr[vfm]'), or use the codec int8, which takes as many bytes"
            ) from error
        scale, inverse = _scales(peak, _FP8_MAX)
        scaled = (
            rows.astype(np.float32) * inverse[:, None]
        )  # at most 448 up to rounding: far from 464, which would be NaN
        return EncodedRows(table=torch.from_numpy(scaled).to(kind).view(torch.uint8).numpy(), scale=scale)

    def decode(self, table: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Rows [T, C] float32."""
        return _times_scale(FP8_VALUES[table], scale, self.name)


def _fp8_values() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    value = np.where(exponent > 0, np.ldexp(1 + fraction / 8, exponent - 7), np.ldexp(fraction / 8, -6))
    value[code & 127 == 127] = np.nan  # the one pattern that is no number; e4m3fn has no infinity
    return np.where(code < 128, value, -value).astype(np.float32)


FP8_VALUES = _fp8_values()
"""[256] float32, what each byte means."""


class _FittedCodec(Codec):
    """A codec that was fitted to training rows."""

    def __init__(self, name: str, dim: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(name, dim)
        self._arrays = _checked(name, arrays, self._shapes())
        self._mean = self._arrays["mean"]
        if not 0 <= self._arrays["explained_variance"].item() <= 1:
            raise CorruptCacheError(f"arrays of the codec {name}: explained_variance is not in 0..1")

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was fitted: float32 arrays by name."""
        return dict(self._arrays)

    @property
    def explained_variance(self) -> float | None:
        """Share in 0..1 of the training rows' variance that decoding keeps.

        Of all rows: outlier tokens, which are not what the codec is fitted to, have most of the variance where there
        are any, and lower the share even where ordinary rows are kept well.
        """
        return float(self._arrays["explained_variance"].item())

    def _encode(self, rows: NDArray[np.floating], peak: NDArray[np.float32]) -> EncodedRows:
        refuse_beyond(FITTED_MAX, peak, self.name)
        blocks = (rows[i : i + _BLOCK] for i in range(0, max(len(rows), 1), _BLOCK))
        return concatenate_rows([self._encode_centred(block.astype(np.float32) - self._mean) for block in blocks])

    def decode(self, table: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Rows [T, C] float32."""
        rows = np.empty((len(table), self.dim), np.float32)
        for i in range(0, len(table), _BLOCK):
            of = slice(i, i + _BLOCK)
            rows[of] = self._decode_centred(table[of], None if scale is None else scale[of])
        rows += self._mean
        return rows

    @abstractmethod
    def _encode_centred(self, rows: NDArray[np.float32]) -> EncodedRows:
        """Of rows [B, C] less the mean."""

    @abstractmethod
    def _decode_centred(self, table: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Rows [B, C] less the mean."""


class PcaInt8Codec(_FittedCodec):
    """Coordinates on the first K principal axes as int8: min(K, C) + 4 bytes per row.

    Arrays: mean [C], basis [min(K, C), C] of orthogonal rows whose norms are the axes' steps, explained_variance [1];
    all float32.
    """

    dtype = np.dtype(np.int8)
    scaled = True

    def __init__(self, name: str, dim: int, arrays: Mapping[str, NDArray[Any]], axes: int) -> None:
        self._axes = min(axes, dim)
        super().__init__(name, dim, arrays)
        self._basis = self._arrays["basis"]
        square = np.square(self._basis, dtype=np.float64).sum(axis=1, keepdims=True)
        if not (square > 1e-12).all():
            raise CorruptCacheError(f"arrays of the codec {name}: a row of the basis is zero")
        self._project = np.ascontiguousarray((self._basis / square).T, dtype=np.float32)
        self._int8 = Int8Codec("int8", self._axes)

    @property
    def width(self) -> int:
        """Columns W of the table."""
        return self._axes

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"mean": (self.dim,), "basis": (self._axes, self.dim), "explained_variance": (1,)}

    def _encode_centred(self, rows: NDArray[np.float32]) -> EncodedRows:
        return self._int8.encode(rows @ self._project)

    def _decode_centred(self, table: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
        return self._int8.decode(table, scale) @ self._basis


class ProductCodec(_FittedCodec):
    """Product quantisation: the numbers of the nearest codewords of M subspaces, min(M, C) bytes per row.

    Arrays: mean [C], rotation [M d, C] (orthonormal rows, and zero rows that fill up subspaces), codebooks [M, 256, d],
    explained_variance [1]; all float32, d = ceil(C / M).
    """

    # No scale per row: at 64 bytes in all, 60 subspaces of rows of unit length and a scale of 4 bytes kept less of
    # ordinary rows (mean cosine 0.969 against 0.973 at C = 384) than 64 subspaces without.
    dtype = np.dtype(np.uint8)

    def __init__(self, name: str, dim: int, arrays: Mapping[str, NDArray[Any]], subspaces: int) -> None:
        self._subspaces = min(subspaces, dim)
        super().__init__(name, dim, arrays)
        self._codebooks = self._arrays["codebooks"]
        self._rotate = np.ascontiguousarray(self._arrays["rotation"].T)
        # Distances are compared in units of the largest coordinate of a codeword: their squares are then float32.
        self._unit = float(np.abs(self._codebooks).max()) or 1.0
        words = self._codebooks / np.float32(self._unit)
        self._words = np.ascontiguousarray(-words.transpose(0, 2, 1))
        self._half_squares = np.square(words).sum(axis=2) / np.float32(2)

    @property
    def width(self) -> int:
        """Columns W of the table."""
        return self._subspaces

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        m, d = self._subspaces, subspace_dim(self.dim, self._subspaces)
        return {
            "mean": (self.dim,),
            "rotation": (m * d, self.dim),
            "codebooks": (m, CODEWORDS, d),
            "explained_variance": (1,),
        }

    def _encode_centred(self, rows: NDArray[np.float32]) -> EncodedRows:
        rotated = rows @ self._rotate
        # Far from all codewords the direction decides alone. Such rows are brought near, where float32 holds the sums.
        peak = np.abs(rotated).max(axis=1, initial=0.0, keepdims=True)
        rotated *= 1 / np.maximum(np.float32(self._unit), peak / _FAR)
        parts = rotated.reshape(len(rows), self._subspaces, self._codebooks.shape[2])
        codes = np.empty((len(rows), self._subspaces), np.uint8)
        scores = np.empty((min(512, len(rows)), CODEWORDS), np.float32)  # small enough for a core's own cache
        for i in range(0, len(rows), 512):
            for m in range(self._subspaces):
                part = parts[i : i + 512, m]
                score = np.matmul(part, self._words[m], out=scores[: len(part)])
                score += self._half_squares[m]  # half of |v - c|^2 - |v|^2
                codes[i : i + 512, m] = score.argmin(axis=1)
        return EncodedRows(table=codes, scale=None)

    def _decode_centred(self, table: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
        words = self._codebooks[np.arange(self._subspaces), table]
        return words.reshape(len(table), self._rotate.shape[1]) @ self._arrays["rotation"]


_PLAIN: dict[str, type[Codec]] = {"float16": Float16Codec, "int8": Int8Codec, "fp8": Fp8Codec}


def subspace_dim(dim: int, subspaces: int) -> int:
    """Coordinates d of each of that many subspaces of rows of that width; the last ones may be padding."""
    return -(-dim // subspaces)


def check_codec(name: str) -> None:
    """UnknownNameError for a name that is no codec."""
    if name not in _PLAIN and not _FITTED.fullmatch(name):
        raise UnknownNameError.of("codec", name, CODECS)


def needs_fit(name: str) -> bool:
    """Whether the codec of that name has to be fitted to training rows before it encodes; UnknownNameError as above."""
    check_codec(name)
    return name not in _PLAIN


def fitted_size(name: str) -> tuple[bool, int]:
    """Of the name of a codec that is fitted: whether it is `pca` (else `pq`), and its axes or subspaces."""
    found = _FITTED.fullmatch(name)
    if found is None:
        raise UnknownNameError.of("fitted codec", name, CODECS)
    axes, subspaces = found.groups()
    return (True, int(axes)) if axes else (False, int(subspaces))


def make_codec(name: str, dim: int, arrays: Mapping[str, NDArray[Any]] | None = None) -> Codec:
    """The codec of that name for rows of width `dim`, of the arrays that it stored where it was fitted.

    Raises:
        UnknownNameError: no such codec.
        CorruptCacheError: arrays that are missing, of another shape or dtype, or not finite.
    """
    stored = arrays or {}
    if not needs_fit(name):
        _checked(name, stored, {})
        return _PLAIN[name](name, dim)
    is_pca, size = fitted_size(name)
    return PcaInt8Codec(name, dim, stored, size) if is_pca else ProductCodec(name, dim, stored, size)


def concatenate_rows(parts: Sequence[EncodedRows]) -> EncodedRows:
    """Rows of several parts of one codec, at least one, one after the other."""
    if len(parts) == 1:
        return parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    return EncodedRows(
        table=np.concatenate([part.table for part in parts]), scale=np.concatenate(scales) if scales else None
    )


def _scales(peak: NDArray[np.float32], largest: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and its inverse of rows [T] with these peaks, so that the peak is stored as `largest`."""
    # The largest scale is such that `largest` times it is still a float32.
    most = np.nextafter(np.finfo(np.float32).max / np.float32(largest), np.float32(0))
    scale = np.minimum(peak / np.float32(largest), most)
    with np.errstate(over="ignore"):
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    # A subnormal scale has an infinite inverse: such a row is zero for every purpose.
    scale, inverse = np.where(np.isfinite(inverse), (scale, inverse), np.float32(0))
    return scale, inverse


def _times_scale(rows: NDArray[np.float32], scale: NDArray[np.float32] | None, name: str) -> NDArray[np.float32]:
    if scale is None:
        raise CorruptCacheError(f"rows of the codec {name} without their scales")
    rows *= scale[:, None]
    return rows


def _checked(
    name: str, arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float32]]:
    """The arrays, where they are the float32 ones of these shapes."""
    if set(arrays) != set(shapes):
        raise CorruptCacheError(
            f"arrays of the codec {name}: expected {sorted(shapes) or 'none'}, got {sorted(arrays) or 'none'}"
        )
    for key, shape in shapes.items():
        array = arrays[key]
        if array.shape != shape or array.dtype != np.float32:
            raise CorruptCacheError(
                f"arrays of the codec {name}: {key} is {array.dtype} {list(array.shape)}, "
                f"expected float32 {list(shape)}"
            )
        if not (np.abs(array) <= FITTED_MAX).all():
            raise CorruptCacheError(f"arrays of the codec {name}: {key} holds NaN, infinity or absurd values")
    return {key: np.ascontiguousarray(arrays[key]) for key in shapes}
