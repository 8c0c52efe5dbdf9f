"""Weights of the field: networks of Pointcept under their own names, to and from ours.

A network is described by a list of `Pair`s, one per tensor, and by nothing else; both directions read the same list.
"""
