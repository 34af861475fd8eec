"""Model-agnostic meta-learning (MAML) and its first-order and head-only forms.

Finn, Abbeel & Levine, ICML 2017, https://arxiv.org/abs/1703.03400 (Algorithm 2, inner loop).
FOMAML is `first_order=True`; ANIL (Raghu et al., ICLR 2020) is `adapted="head"`. The variants on minibatches are those
of Nichol, Achiam & Schulman 2018, https://arxiv.org/abs/1803.02999 (section 6.2 and their code).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from metalearn.algorithms.estimated_rate import EstimatedRate
from metalearn.algorithms.pools import minibatches, pooled, take
from metalearn.algorithms.running_rate import RunningRate
from metalearn.episode import Episode, Examples, MetaBatch, Params, TaskOutput, Theta
from metalearn.evaluation.metrics import TaskMean
from metalearn.functional import Loss, Trajectory, gradient_descent, per_task
from metalearn.learner import MetaLearner
from metalearn.meta_gradient import bad_tasks, mean_over_ranks
from metalearn.ops import Normalization
from metalearn.random import TaskKey
from metalearn.schema import BadInput
from metalearn.theory.alpha_star import head_rate

if TYPE_CHECKING:
    from metalearn.data import Episodes

Context = tuple[Params, Tensor, Tensor]


class MAML(MetaLearner):
    """phi_i = theta - alpha grad L(theta; S_i), `inner_steps` times; theta descends the mean query loss of phi_i.

    Args:
        alpha: inner learning rate, for the loss that `inner_loss_reduction` defines; or `auto`: estimated once, before
            training, from the tangent features of training tasks (`metalearn.alpha`); or `online`: before every update
            it is estimated from the features that enter the moving layers, for all tasks of the meta-batch, and the
            moving average of these estimates is the rate, in training and in evaluation (derived for a linear head
            and the mean squared error: Zou, Liu & Li, ICLR 2022, Figure 3).
        test_alpha: the rate in test alone, of any sign; None for that of training, which validation always has, so
            that the checkpoint that is tested does not depend on it.
        alpha_cov: what "the covariance of the features" means (`alpha=online`), see `theory.alpha_star.head_rate`.
        alpha_momentum: weight of the past in the moving average (`alpha=online`).
        inner_steps, test_steps: inner gradient steps in training, and in validation and test.
        first_order: treat inner gradients as constants (FOMAML).
        adapted: prefix of the parameters that the inner loop moves; empty for all.
        inner_clip: bound on each entry of an inner gradient (a bounded entry is a constant); None for none.
        variant: the examples of a training task's `inner_steps` = k gradients. `query`: k inner ones on the support
            set, and the outer one on the query set. `last_minibatch`: k minibatches of both sets, of which the last
            gives the outer gradient and may share examples with the others. `tail`: k - 1 minibatches of the support
            set, and the query set, reserved, as the last. Validation and test always adapt to whole support sets.
        minibatch: size of minibatches (`last_minibatch`, `tail`); None for whole sets.
        learner: arguments of `MetaLearner`.

    Raises:
        BadInput: for a variant on minibatches of an algorithm whose adaptation is more than gradient steps.
    """

    def __init__(
        self,
        *,
        alpha: float | Literal["auto", "online"],
        test_alpha: float | None = None,
        alpha_cov: Literal["gram_mean", "feature_mean", "diag"] = "gram_mean",
        alpha_momentum: float = 0.9,
        first_order: bool = False,
        adapted: str = "",
        inner_clip: float | None = None,
        variant: Literal["query", "last_minibatch", "tail"] = "query",
        minibatch: int | None = None,
        **learner: Any,
    ):
        super().__init__(**learner)
        self.first_order, self.adapted, self.inner_clip = first_order, adapted, inner_clip
        self.running_rate = RunningRate(momentum=alpha_momentum) if alpha == "online" else None
        self._observed: tuple[Tensor, MetaBatch] | None = None
        self.estimated_rate = EstimatedRate() if alpha == "auto" else None
        self.rate_in_force = None if isinstance(alpha, str) else alpha
        self.test_alpha, self.alpha_cov = test_alpha, alpha_cov
        self.variant, self.minibatch = variant, minibatch
        if variant != "query" and type(self).origin is not MAML.origin:
            raise BadInput(f"algorithm.variant={variant}: {type(self).__name__} adapts by more than gradient steps")

    def adapt(self, theta: Theta, support: Examples, *, steps: int, key: TaskKey | None = None) -> Trajectory:
        """phi_i: `steps` times phi <- phi - alpha grad L(phi; S_i), from `origin`."""
        return self.descend(self.origin(theta, support, key), support, steps, self.inner_rate(theta, key))

    def origin(self, theta: Theta, support: Examples, key: TaskKey | None) -> Params:
        """Where adaptation starts: all that a pass through the network depends on, shared or each task's own."""
        return self.network(theta)

    @property
    def alpha(self) -> float | Tensor:
        """The inner learning rate in force: a number (NaN until `settle` has estimated it), or the running estimate."""
        if self.rate_in_force is not None:
            return self.rate_in_force
        if self.estimated_rate is not None:
            return self.estimated_rate.value
        assert self.running_rate is not None
        return self.running_rate.value

    def inner_rate(self, theta: Theta, key: TaskKey | None) -> float | Tensor | Params:
        """What inner gradients are multiplied by; a number, a tensor for every leaf, or one for each moving leaf."""
        return self.alpha

    def use_rate(self, alpha: float | None) -> None:
        """Take another inner learning rate from now on; None for the one that `alpha` of the constructor means."""
        self.rate_in_force = alpha

    def settle(self, data: Episodes) -> dict[str, float]:
        """Estimate alpha, if it is `auto`.

        Raises:
            BadInput: if there is no estimate, because features are zero or not finite.
        """
        if self.estimated_rate is None:
            return {}
        from metalearn.alpha import estimate

        try:
            found = estimate.star(self, estimate.tasks_of(self, data, estimate.TASKS))
        except ValueError as error:
            raise BadInput(f"algorithm.alpha=auto: {error}; set a number") from None
        self.estimated_rate.found = found.numbers()
        return {"alpha": found.estimate.value, "alpha_low": found.interval.low, "alpha_high": found.interval.high}

    def multipliers(self, theta: Theta, key: TaskKey | None) -> Params | None:
        """What each moving leaf's step is besides alpha, leaves that broadcast against it; None where it is 1."""
        return None

    def observe(self, batch: MetaBatch) -> None:
        """Estimate the rate from the support sets of all ranks' tasks, and average it into the one in force."""
        if self.running_rate is None:
            return
        episodes, theta = self.regularizer.episodes(batch.episodes, batch.key), self.constants()
        start = self.network(theta)

        def estimates(chunk: slice) -> Tensor:
            _, features = fixed_features(self, start, episodes.select(chunk).support, self.moves)
            return head_rate(features.flatten(2).double(), self.alpha_cov)

        found = torch.cat(self.in_chunks(estimates, episodes))
        self._observed = found, batch
        self.running_rate.absorb(mean_over_ranks(found))

    def hint(self) -> str:
        """Names the tasks without an estimate, which leave none to the others."""
        if self._observed is None or not (tasks := bad_tasks(*self._observed)):
            return super().hint()
        return (
            f"; the estimate for algorithm.alpha is not finite for task {', '.join(map(str, tasks[:5]))}: what enters "
            "its head is zero for all support examples, cancels or is not finite"
        )

    def forget(self) -> None:
        """Go back to the rate before `observe`."""
        if self.running_rate is not None:
            self.running_rate.revert()

    def test_step(self, batch: MetaBatch, batch_idx: int) -> Any:
        """Lightning's hook: scores of frozen test episodes, with the rate of test."""
        with self._in_test():
            return super().test_step(batch, batch_idx)

    @contextmanager
    def _in_test(self) -> Iterator[None]:
        """`test_alpha`, if there is one, in place of the rate of training."""
        kept = self.rate_in_force
        self.rate_in_force = kept if self.test_alpha is None else self.test_alpha
        try:
            yield
        finally:
            self.rate_in_force = kept

    def reports(self) -> dict[str, float]:
        """Adds the rate, where it is estimated."""
        return super().reports() | ({"alpha": float(self.alpha)} if self.running_rate else {})

    def traces(self) -> dict[str, Tensor]:
        """The running estimate of the rate, which each meta-step changes."""
        return {} if self.running_rate is None else {"alpha": self.running_rate.value}

    def findings(self) -> dict[str, dict[str, Any]]:
        """The estimated rate as `alpha_star`: that before training, or the running one of the tested checkpoint."""
        if self.estimated_rate is not None and self.estimated_rate.found:
            return {"alpha_star": self.estimated_rate.metric()}
        if self.running_rate is None:
            return {}
        return {"alpha_star": TaskMean([float(self.running_rate.value)]).compute("1")}

    @property
    def descents(self) -> int:
        """Inner steps that lead to the outer gradient; its minibatch is one of the `inner_steps` (`variant`)."""
        return self.inner_steps - (self.variant != "query")

    @property
    def exact(self) -> bool:
        """First-order gradients are not the slope of the outer objective."""
        return not self.first_order or self.descents == 0

    def task_loss(self, theta: Theta, episodes: Episode, key: TaskKey | None = None) -> TaskOutput:
        """The query loss of the adapted parameters; or the last minibatch's, one step on each of the others away."""
        if self.variant == "query":
            return super().task_loss(theta, episodes, key)
        *inner, last = self._minibatches(episodes, key)
        start, rate, norm = self.network(theta), self.inner_rate(theta, key), Normalization(record=True)
        phi = per_task({k: p for k, p in start.items() if self.moves(k)}, episodes.tasks, self.shapes)
        for batch in inner:
            phi = self.descend(start | phi, batch, 1, rate)[-1]
        prediction = self.predict(theta, phi, last.x, support=episodes.support, bn="batch", record=norm)
        on_query = prediction if last is episodes.query else None
        return TaskOutput(self.loss(prediction, last.y), on_query, phi, {}, norm.seen, {})

    def _minibatches(self, episodes: Episode, key: TaskKey | None) -> list[Examples]:
        """The `inner_steps` sets of examples of a training task, in the order of their gradients."""
        tail = [episodes.query] if self.variant == "tail" else []
        pool, count = episodes.support if tail else pooled(episodes), self.inner_steps - len(tail)
        if self.minibatch is None:
            return [pool] * count + tail
        if key is None:
            raise ValueError(f"algorithm.variant={self.variant} draws minibatches: task_loss needs the tasks' key")
        rows = minibatches(key.sub("minibatch"), pool.y.shape[1], self.minibatch, count)
        return [take(pool, part) for part in rows.unbind(1)] + tail

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

    Args:
        learner: whose network and inner loss.
        start: all that a pass through the network depends on, leaves `[*shape]` or, each task's own, `[B, *shape]`.
        support: the tasks' support sets.
        moves: whether the inner loop moves the parameter of this name.

    Returns:
        The loss, which maps (moving, context) to `[B]`; the moving parameters, leaves `[B, *shape]`; and the context:
        the other parameters, the features and the targets.
    """
    predict, moving, context = support_predictions(learner, start, support, moves)

    def support_loss(phi: Params, context: Context) -> Tensor:
        return learner.inner_loss(predict(phi, context), context[2])

    return support_loss, moving, context


def support_predictions(
    learner: MetaLearner, start: Params, support: Examples, moves: Callable[[str], bool]
) -> tuple[Callable[[Params, Context], Tensor], Params, Context]:
    """What `support_problem` is the loss of: (moving, context) to predictions `[B, n, outputs]`, and where it starts.

    Features that no moving parameter influences are computed once (ANIL: one pass of the body).
    """
    moving = {k: p for k, p in start.items() if moves(k)}
    frozen = {k: p for k, p in start.items() if k not in moving}
    site, features = fixed_features(learner, start, support, moves)

    def predict(phi: Params, context: Context) -> Tensor:
        frozen, h, _ = context
        return learner.run_net(frozen | phi, h, when="inner", start=site)

    return predict, per_task(moving, len(support.x), learner.shapes), (frozen, features, support.y)


def fixed_features(
    learner: MetaLearner, start: Params, support: Examples, moves: Callable[[str], bool]
) -> tuple[str, Tensor]:
    """The last site that no moving parameter influences, and the support sets there, `[B, n, *shape]`.

    The arguments are those of `support_problem`.
    """
    site = learner.net.first_site([k for k in start if moves(k)])
    return site, learner.run_net(start, support.x, when="inner", stop=site)
