"""`ditr_train`: trains point-cloud networks from caches that `ditr_cache` made.

Data reads left to right: `CachedDataset -> transforms -> voxelize -> collate -> Segmentor -> loss | ConfusionMatrix`.
Importing the package loads neither torch nor a model.
"""
