"""ditr_cache: features of frozen 2D foundation models, projected onto 3D points and cached."""

from ditr_cache.cached import CachedSample, StoredFeatures, StoredSample
from ditr_cache.errors import CacheError
from ditr_cache.store import CacheReader, open_cache

__version__ = "0.1.0"

__all__ = ["CacheError", "CacheReader", "CachedSample", "StoredFeatures", "StoredSample", "open_cache"]
