"""Datasets: each reads its official layout and yields `Sample`s."""

from ditr_cache.datasets.base import (
    DATASETS,
    ClassInfo,
    Dataset,
    Defaults,
    Need,
    Option,
    Partition,
    dataset_class,
    open_dataset,
    parse_options,
)

__all__ = [
    "DATASETS",
    "ClassInfo",
    "Dataset",
    "Defaults",
    "Need",
    "Option",
    "Partition",
    "dataset_class",
    "open_dataset",
    "parse_options",
]
