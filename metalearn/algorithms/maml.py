"""Model-agnostic meta-learning (MAML) and its first-order and head-only forms.

Finn, Abbeel & Levine, ICML 2017, https://arxiv.org/abs/1703.03400 (Algorithm 2, inner loop).
FOMAML is `first_order=True`; ANIL (Raghu et al., ICLR 2020) is `adapted="head"`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metalearn.episode import Examples, Params, Theta
from metalearn.functional import Loss, Trajectory, gradient_descent, per_task
from metalearn.learner import MetaLearner
from metalearn.random import TaskKey

Context = tuple[Params, Tensor, Tensor]


class MAML(MetaLearner):
    """phi_i = theta - alpha grad L(theta; S_i), `inner_steps` times; theta descends the mean query loss of phi_i.

    Args:
        alpha: inner learning rate, for the loss that `inner_loss_reduction` defines.
        inner_steps, test_steps: inner gradient steps in training, and in validation and test.
        first_order: treat inner gradients as constants (FOMAML).
        adapted: prefix of the parameters that the inner loop moves; empty for all.
        inner_clip: bound on each entry of an inner gradient (a bounded entry is a constant); None for none.
        learner: arguments of `MetaLearner`.
    """

    def __init__(
        self,
        *,
        alpha: float,
        first_order: bool = False,
        adapted: str = "",
        inner_clip: float | None = None,
        **learner: Any,
    ):
        super().__init__(**learner)
        self.alpha, self.first_order, self.adapted, self.inner_clip = alpha, first_order, adapted, inner_clip

    def adapt(self, theta: Theta, support: Examples, *, steps: int, key: TaskKey | None = None) -> Trajectory:
        """phi_i: `steps` times phi <- phi - alpha grad L(phi; S_i), from phi = theta."""
        return self.descend(self.network(theta), support, steps, self.inner_rate(theta, key))

    def inner_rate(self, theta: Theta, key: TaskKey | None) -> float | Tensor | Params:
        """What inner gradients are multiplied by; a number, a tensor for every leaf, or one for each moving leaf."""
        return self.alpha

    @property
    def exact(self) -> bool:
        """First-order gradients are not the slope of the outer objective."""
        return not self.first_order or self.inner_steps == 0

    def moves(self, name: str) -> bool:
        """Whether the inner loop moves this parameter of the network."""
        return name.startswith(self.adapted) and self.net.adapts(name)

    def descend(self, start: Params, support: Examples, steps: int, rate: float | Tensor | Params) -> Trajectory:
        """`steps` times phi <- phi - rate grad L(phi; S_i) from any start, for `adapt` of this and of other algorithms.

        Args:
            start: all that a pass through the network depends on, leaves `[*shape]` or, each task's own, `[B, *shape]`.
            support: the tasks' support sets.
            steps: number of gradient steps.
            rate: alpha; a number, a tensor that broadcasts against every leaf, or one for each moving leaf.

        Returns:
            The moving parameters after 0, 1, ..., `steps` steps, together with every leaf of `start` that has a task
            axis.
        """
        loss, moving, context = support_problem(self, start, support, self.moves)
        options: dict[str, Any] = {"first_order": self.first_order, "remember": not self.recompute}
        trajectory = gradient_descent(loss, moving, context, rate, steps, clip=self.inner_clip, **options)
        frozen = context[0]
        own = {k: p for k, p in frozen.items() if k in self.shapes and p.dim() > len(self.shapes[k])}
        return [own | phi for phi in trajectory] if own else trajectory


def support_problem(
    learner: MetaLearner, start: Params, support: Examples, moves: Callable[[str], bool]
) -> tuple[Loss, Params, Context]:
    """The inner loss as a function of the parameters that move, where they start, and what else it depends on.

    Features that no moving parameter influences are computed once (ANIL: one pass of the body).

    Args:
        learner: whose network and inner loss.
        start: all that a pass through the network depends on, leaves `[*shape]` or, each task's own, `[B, *shape]`.
        support: the tasks' support sets.
        moves: whether the inner loop moves the parameter of this name.

    Returns:
        The loss, which maps (moving, context) to `[B]`; the moving parameters, leaves `[B, *shape]`; and the context:
        the other parameters, the features and the targets.
    """
    moving = {k: p for k, p in start.items() if moves(k)}
    frozen = {k: p for k, p in start.items() if k not in moving}
    site = learner.net.first_site(list(moving))
    features = learner.run_net(start, support.x, when="inner", stop=site)

    def support_loss(phi: Params, context: Context) -> Tensor:
        frozen, h, y = context
        return learner.inner_loss(learner.run_net(frozen | phi, h, when="inner", start=site), y)

    return support_loss, per_task(moving, len(support.x), learner.shapes), (frozen, features, support.y)
