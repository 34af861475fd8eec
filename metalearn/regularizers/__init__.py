"""What acts on a learner from outside: between the stages of its network, on episodes, gradients or the objective."""

from metalearn.regularizers.base import Regularizer

__all__ = ["Regularizer"]
