"""Networks: staged, pure in their parameters, task-batched."""

from metalearn.backbones.base import Backbone, Kernel, Stage
from metalearn.backbones.conv4 import Conv4
from metalearn.backbones.mlp import MLP
from metalearn.backbones.module import Module

__all__ = ["MLP", "Backbone", "Conv4", "Kernel", "Module", "Stage"]
