"""Figures and claims of "Unraveling MAML via the Adaptation Learning Rate" (Zou, Liu & Li, ICLR 2022).

A module for each experiment `unravel/<id>`, named in its file (`shows:`); see `metalearn.shown`.
"""
