"""Waymo Perception v2."""
