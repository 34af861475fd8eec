"""Networks: staged, pure in their parameters, task-batched."""

from metalearn.backbones.base import Backbone, Stage
from metalearn.backbones.conv4 import Conv4
from metalearn.backbones.mlp import MLP

__all__ = ["MLP", "Backbone", "Conv4", "Stage"]
