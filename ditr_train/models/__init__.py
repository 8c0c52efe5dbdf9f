"""Networks: `SparseUNet` on sparse convolutions, the injection of VFM features, and the `Segmentor` that joins them.

`config` needs neither torch nor spconv, so that recipes can be listed and checked without them.
"""
