"""S3DIS with the images of 2D-3D-S."""
