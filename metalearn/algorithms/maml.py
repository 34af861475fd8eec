"""Model-agnostic meta-learning (MAML) and its first-order and head-only forms.

Finn, Abbeel & Levine, ICML 2017, https://arxiv.org/abs/1703.03400 (Algorithm 2, inner loop).
FOMAML is `first_order=True`; ANIL (Raghu et al., ICLR 2020) is `adapted="head"`.
"""

from typing import Any

from torch import Tensor

from metalearn.episode import Examples, Params, Theta
from metalearn.functional import Trajectory, gradient_descent, per_task
from metalearn.learner import MetaLearner
from metalearn.random import TaskKey


class MAML(MetaLearner):
    """phi_i = theta - alpha grad L(theta; S_i), `inner_steps` times; theta descends the mean query loss of phi_i.

    Args:
        alpha: inner learning rate, for the loss that `inner_loss_reduction` defines.
        inner_steps, test_steps: inner gradient steps in training, and in validation and test.
        first_order: treat inner gradients as constants (FOMAML).
        adapted: prefix of the parameters that the inner loop moves; empty for all.
        learner: arguments of `MetaLearner`.
    """

    def __init__(self, *, alpha: float, first_order: bool = False, adapted: str = "", **learner: Any):
        super().__init__(**learner)
        self.alpha, self.first_order, self.adapted = alpha, first_order, adapted

    def adapt(self, theta: Theta, support: Examples, *, steps: int, key: TaskKey | None = None) -> Trajectory:
        """phi_i: `steps` times phi <- phi - alpha grad L(phi; S_i), from phi = theta.

        Features that no moving parameter influences are computed once (ANIL: one pass of the body).
        """
        net = self.network(theta)
        moving = {k: p for k, p in net.items() if k.startswith(self.adapted) and self.net.adapts(k)}
        frozen = {k: p for k, p in net.items() if k not in moving}
        site = self.net.first_site(list(moving))
        features = self.run_net(net, support.x, when="inner", stop=site)

        def support_loss(phi: Params, context: tuple[Params, Tensor, Tensor]) -> Tensor:
            frozen, h, y = context
            return self.inner_loss(self.run_net(frozen | phi, h, when="inner", start=site), y)

        start = per_task(moving, len(support.x), self.shapes)
        context, options = (
            (frozen, features, support.y),
            {"first_order": self.first_order, "remember": not self.recompute},
        )
        return gradient_descent(support_loss, start, context, self.alpha, steps, **options)
