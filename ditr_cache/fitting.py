"""Fits a codec to features of training images, before anything is extracted with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ditr_cache.codec_state import codec_spec
from ditr_cache.datasets.base import Dataset
from ditr_cache.errors import DataError, UnknownNameError
from ditr_cache.fitted_codecs import FIT_ROWS, TRAIN_SPLIT, fit_codec
from ditr_cache.link import evenly_spread, select_views
from ditr_cache.schema import LinkSettings, VFMSpec
from ditr_cache.store import CacheWriter
from ditr_cache.vfm import FrozenVFM

log = logging.getLogger(__name__)

FIT_IMAGES = 96
"""Images that a codec is fitted to, evenly spread over the training samples."""


def fitted_spec(
    writer: CacheWriter,
    dataset: Dataset,
    vfm: FrozenVFM,
    spec: VFMSpec,
    *,
    splits: Sequence[str] | None = None,
    images: int = FIT_IMAGES,
) -> VFMSpec:
    """The spec of a store with its codec fitted, and what it was fitted to be stored in the cache.

    Args:
        writer: of the cache.
        dataset: whose images are embedded.
        vfm: embeds them.
        spec: of a codec that has to be fitted, complete but for what it is fitted to be.
        splits: of the training samples; None: `train`, or all where there is no such split.
        images: how many are embedded, evenly spread over the training samples.

    Raises:
        UnknownNameError: no such split.
        DataError: no image of the training samples can be read, or too few for this codec.
    """
    rows = np.concatenate(
        list(_training_rows(dataset, vfm, writer.metadata.links, _training_samples(dataset, splits), images))
    )
    codec = fit_codec(spec.codec, rows)
    spec = codec_spec(spec, codec)
    writer.create_codec(spec, codec)
    log.info("codec %s fitted to %d tokens: explained variance %.4f", spec.codec, len(rows), spec.explained_variance)
    return spec


def _training_samples(dataset: Dataset, splits: Sequence[str] | None) -> list[str]:
    if splits is None:
        splits = (TRAIN_SPLIT,) if TRAIN_SPLIT in dataset.splits else dataset.splits
        if TRAIN_SPLIT not in dataset.splits:
            log.warning(
                "dataset %r has no split %r: the codec is fitted to samples of all splits (%s)",
                dataset.name,
                TRAIN_SPLIT,
                ", ".join(splits),
            )
    for split in splits:
        if split not in dataset.splits:
            raise UnknownNameError.of(f"split of dataset {dataset.name!r}", split, dataset.splits)
    return [sample_id for split in splits for sample_id in dataset.sample_ids(split)]


def _training_rows(
    dataset: Dataset, vfm: FrozenVFM, links: LinkSettings, samples: Sequence[str], count: int
) -> Iterator[NDArray[np.float32]]:
    """Tokens [T, C] of each of some images, evenly spread over the samples and over the views of each."""
    chosen = evenly_spread(samples, count)
    views_of_each = -(-count // max(1, len(chosen)))
    rows, columns = vfm.spec.grid
    per_image = max(1, min(rows * columns, FIT_ROWS // (views_of_each * max(1, len(chosen)))))
    tokens_taken = np.linspace(0, rows * columns - 1, per_image).round().astype(int)
    images, failure = 0, None
    for sample_id in chosen:
        try:
            views = select_views(dataset.read(sample_id), replace(links, max_views=views_of_each))
        except DataError as error:  # the run itself will record it
            failure = error
            continue
        for view in views:
            try:
                tokens = vfm.embed([vfm.prepare(view.load_image())])[0]
            except DataError as error:
                failure = error
                continue
            images += 1
            yield tokens.flatten(0, 1)[tokens_taken.tolist()].cpu().numpy()
    if not images:
        raise failure or DataError(f"dataset {dataset.name!r}: no image of {len(samples)} training samples to fit to")
