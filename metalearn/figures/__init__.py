"""Figures of sweeps: a metric against a swept key, from results on disk, with the numbers beside the picture.

`metalearn.figures.series` computes what is drawn (and its CSV), `draw` makes the picture, `command` is the verb.
"""
