"""Networks: the backbones, the injection of VFM features into them, and what a task makes of their features.

`config` needs neither torch nor spconv, so that recipes can be listed and checked without them.
"""
