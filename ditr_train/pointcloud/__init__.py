"""Point clouds of any size through a network: tiles of bounded size, and the files that a prediction writes.

Data reads left to right: `open_cloud -> survey -> plan_tiles -> Spill -> (network) -> OutputFiles`. Nothing here grows
with the number of points of a cloud. The readers are those of `ditr_cache.pointcloud`.
"""
