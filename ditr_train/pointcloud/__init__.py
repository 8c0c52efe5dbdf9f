"""Point clouds in files: readers that stream, tiles of bounded size, and the files that a prediction writes.

Data reads left to right: `open_cloud -> survey -> plan_tiles -> Spill -> (network) -> OutputFiles`. Nothing here grows
with the number of points of a cloud.
"""
