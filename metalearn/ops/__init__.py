"""The few operations that networks are built from: task-batched, pure, and closed under differentiation.

Every operation takes activations with the task axis first and parameters that are either shared (`[*shape]`) or one
per task (`[B, *shape]`). The memory layout is theirs to choose; the logical shape is fixed.
"""

from metalearn.ops.block import max_pool, norm_relu_pool
from metalearn.ops.conv import conv2d
from metalearn.ops.linear import linear
from metalearn.ops.norm import Normalization, Statistics, batch_norm

__all__ = ["Normalization", "Statistics", "batch_norm", "conv2d", "linear", "max_pool", "norm_relu_pool"]
