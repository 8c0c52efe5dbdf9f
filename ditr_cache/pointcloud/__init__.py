"""Files of points: PLY, LAS/LAZ, PCD and KITTI, read chunk by chunk; normals of bare points."""
