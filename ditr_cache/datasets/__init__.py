"""Datasets: each reads its official layout and yields `Sample`s."""

from ditr_cache.datasets.base import DATASETS, ClassInfo, Dataset, Partition, open_dataset

__all__ = ["DATASETS", "ClassInfo", "Dataset", "Partition", "open_dataset"]
