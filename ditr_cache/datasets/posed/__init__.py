"""Captures described by nerfstudio, Instant-NGP or COLMAP, with a point cloud."""
