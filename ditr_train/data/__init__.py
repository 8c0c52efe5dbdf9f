"""From a cache to batches: `CachedDataset -> transforms -> voxelize -> collate`."""
