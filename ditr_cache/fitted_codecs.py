"""Fitting codecs to training rows: principal axes, and codebooks of product quantisation.

Everything here is deterministic: rows and first codewords are taken at even distances, and nothing is drawn.

Outlier tokens (rows of perhaps ten times the others' norm, as ViTs without registers put where nothing is seen) would
fill the covariance and the codebooks with themselves. Each row is therefore drawn in towards the channels' medians, to
at most `_REACH` times the median row's distance, where each channel is measured in its mean deviation, so that an
outlier channel does not hide outlier tokens. With 2 % of such tokens in random directions at C = 384, ordinary rows
keep a mean cosine of 0.914 with `pca64-int8`, as they do without outliers; 0.829 if nothing is drawn in. Rows of real
images, of which this meets 2 %, lose nothing by it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditr_cache.codecs import (
    CODEWORDS,
    FITTED_MAX,
    Codec,
    fitted_size,
    make_codec,
    needs_fit,
    peaks_of,
    refuse_beyond,
    subspace_dim,
)
from ditr_cache.errors import DataError

TRAIN_SPLIT = "train"
"""The split whose rows codecs and probes are fitted to, where nothing else is asked for."""

FIT_ROWS = 1 << 16
"""Training rows that are gathered for a fit: 64 per channel of ViT-L. All of them decide the axes."""

_REACH = 2.0

_WORD_ROWS = 32768  # that the codewords are fitted to: 128 for each
_JUDGED_ROWS = 8192  # that the explained variance is measured on
_BLOCK = 4096

_STEP_POWER = 0.75
"""Axis k is quantised in steps of (sigma_k / sigma_1)^0.75, sigma the axes' standard deviations.

One step for all axes (0) spends the range of int8 on the first axes, steps of sigma_k (1) let the least axis decide the
scale of a row as often as the first. At equal bytes and K = 256, C = 1024, variances falling as 1 / k, the quantisation
error relative to the rows' variance is 3.2e-4 for 0, 5.8e-5 for 0.5, 3.9e-5 for 0.75 and 4.9e-5 for 1.
"""
_LEAST_STEP = 1e-3  # of an axis, relative to the first: coordinates stay within float32 for every row

_ROUNDS = 20
_LEAST_GAIN = 1e-3  # a round of k-means that lowers the error by less is the last


def fit_codec(name: str, rows: NDArray[np.floating]) -> Codec:
    """The codec of that name fitted to training rows [M, C] of any float dtype; M is best 64 C or more.

    Raises:
        UnknownNameError: no such codec.
        DataError: too few rows, or values that are not finite or absurd.
    """
    if rows.ndim != 2 or not rows.shape[1]:
        raise DataError(f"training rows of the codec {name}: expected [M, C], got {list(rows.shape)}")
    dim = rows.shape[1]
    if not needs_fit(name):
        return make_codec(name, dim)
    is_pca, size = fitted_size(name)
    size = min(size, dim)
    least = size + 1 if is_pca else CODEWORDS
    if len(rows) < least:
        raise DataError(
            f"training rows of the codec {name}: expected at least {least}, got {len(rows)}; extract more training "
            "samples, or use the codec int8, which needs none"
        )
    chosen = _evenly(rows, FIT_ROWS)
    refuse_beyond(FITTED_MAX, peaks_of(chosen), name)
    near, centre = _drawn_in(chosen.astype(np.float32))
    variance, axes = _principal_axes(near)
    arrays = {"mean": centre.astype(np.float32), "explained_variance": np.zeros(1, np.float32)}
    if is_pca:
        arrays["basis"] = _stepped(variance, axes, size)
    else:
        arrays["rotation"] = _balanced(variance, axes, size)
        parts = _evenly(near, _WORD_ROWS) @ arrays["rotation"].T
        parts = parts.reshape(len(parts), size, -1).swapaxes(0, 1)
        arrays["codebooks"] = np.stack([_codewords(np.ascontiguousarray(part)) for part in parts])
    arrays["explained_variance"][0] = _explained(make_codec(name, dim, arrays), _evenly(chosen, _JUDGED_ROWS))
    return make_codec(name, dim, arrays)


def _evenly(rows: NDArray[np.floating], most: int) -> NDArray[np.floating]:
    """At most that many of the rows, at even distances."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _drawn_in(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Deviations [M, C] of rows that were drawn in where they lie far out, and the mean [C] they deviate from."""
    few = _evenly(rows, _JUDGED_ROWS).astype(np.float64)
    median = np.median(few, axis=0)
    spread = np.abs(few - median).mean(axis=0)
    spread[spread == 0] = 1  # a channel that is always the same
    far = np.concatenate(
        [np.sqrt(np.square((rows[i : i + _BLOCK] - median) / spread).mean(axis=1)) for i in range(0, len(rows), _BLOCK)]
    )
    reach = _REACH * np.median(far)
    # Where most rows are the same, the distance of the others says nothing.
    keep = np.minimum(1, reach / np.maximum(far, np.finfo(np.float64).tiny)) if reach else np.ones(len(far))
    near = (rows - median.astype(np.float32)) * keep[:, None].astype(np.float32)
    offset = near.mean(axis=0, dtype=np.float64)
    near -= offset.astype(np.float32)
    return near, median.astype(np.float32) + offset


def _principal_axes(near: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variances [C], falling, and axes [C, C], a row each, of deviations [M, C]."""
    dim = near.shape[1]
    covariance = np.zeros((dim, dim))
    for i in range(0, len(near), _BLOCK):
        block = near[i : i + _BLOCK].astype(np.float64)
        covariance += block.T @ block
    variance, columns = np.linalg.eigh(covariance / len(near))
    axes = columns.T[::-1]
    # The sign of an axis is the library's whim; here its largest component is positive.
    sign = np.sign(axes[np.arange(dim), np.abs(axes).argmax(axis=1)])
    return np.maximum(variance[::-1], 0), axes * sign[:, None]


def _stepped(variance: NDArray[np.float64], axes: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """Basis [K, C] of the first K axes, each as long as its step is relative to the first."""
    relative = variance[:size] / variance[0] if variance[0] > 0 else np.ones(size)
    steps = np.maximum(relative ** (_STEP_POWER / 2), _LEAST_STEP)
    return (axes[:size] * steps[:, None]).astype(np.float32)


def _balanced(variance: NDArray[np.float64], axes: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """Rotation [M d, C]: axes are dealt out to M subspaces so that the products of their variances are about equal.

    That is the least error of Gaussian rows (optimised product quantisation, its parametric form). Larger subspaces for
    small variances were tried and gained nothing.
    """
    dim = len(variance)
    each = subspace_dim(dim, size)
    least = max(variance[-1], variance[0] * 1e-12)
    logs = np.log(np.maximum(variance, least) / least) if least > 0 else np.zeros(dim)
    load, filled = np.zeros(size), np.zeros(size, np.int64)
    rotation = np.zeros((size, each, dim), np.float32)
    for axis, log in zip(axes, logs, strict=True):
        chosen = int(np.where(filled < each, load, np.inf).argmin())
        rotation[chosen, filled[chosen]] = axis
        filled[chosen] += 1
        load[chosen] += log
    return rotation.reshape(size * each, dim)


def _codewords(part: NDArray[np.float32]) -> NDArray[np.float32]:
    """Codewords [256, d] of rows [M, d] of one subspace: k-means, of rows spread along the first coordinate."""
    unit = np.float32(np.abs(part).max()) or np.float32(1)  # so that squares are float32
    part = part / unit
    order = np.argsort(part[:, 0], kind="stable")
    words = part[order[((np.arange(CODEWORDS) + 0.5) * len(part) / CODEWORDS).astype(np.int64)]]
    before = np.inf
    for _ in range(_ROUNDS):
        nearest, error = _assign(part, words)
        count = np.bincount(nearest, minlength=CODEWORDS)
        used = count > 0
        sums = np.stack([np.bincount(nearest, weights=column, minlength=CODEWORDS) for column in part.T], axis=1)
        words[used] = sums[used] / count[used, None]
        # A codeword without rows moves to the row that is served worst, the next one to the second worst.
        words[~used] = part[np.argsort(-error, kind="stable")[: int((~used).sum())]]
        total = float(error.sum(dtype=np.float64))
        if before - total <= _LEAST_GAIN * total and used.all():
            break
        before = total
    return words * unit


def _assign(part: NDArray[np.float32], words: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Number [M] of the codeword nearest to each row [M, d], and the squared distance [M]."""
    nearest = np.empty(len(part), np.int64)
    half = np.square(words).sum(axis=1) / np.float32(2)
    turned = np.ascontiguousarray(-words.T)
    for i in range(0, len(part), 512):  # 512 x 256 scores fit into a core's own cache
        nearest[i : i + 512] = (part[i : i + 512] @ turned + half).argmin(axis=1)
    return nearest, np.square(part - words[nearest]).sum(axis=1)


def _explained(codec: Codec, rows: NDArray[np.floating]) -> float:
    """Share of the rows' variance that decoding keeps, in 0..1; 1 for rows that do not vary."""
    encoded = codec.encode(rows)
    exact = rows.astype(np.float64)
    lost = np.square(exact - codec.decode(encoded.table, encoded.scale)).sum()
    whole = np.square(exact - exact.mean(axis=0)).sum()
    return float(np.clip(1 - lost / whole, 0, 1)) if whole > 0 else 1.0
