"""Implicit MAML (Rajeswaran, Finn, Kakade & Levine, NeurIPS 2019, https://arxiv.org/abs/1909.04630)."""

from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from metalearn.algorithms.maml import Context, support_problem
from metalearn.episode import Episode, Examples, Params, TaskOutput, Theta
from metalearn.functional import Loss, Product, Trajectory, conjugate_gradient, implicit, proximal_descent
from metalearn.learner import MetaLearner
from metalearn.random import TaskKey


class IMAML(MetaLearner):
    """phi_i minimises L(phi; S_i) + lam/2 |phi - theta|^2; theta descends the mean query loss of phi_i.

    The outer gradient is that of the minimiser, g_i = (I + H_i / lam)^-1 grad L(phi_i; Q_i) with H_i the Hessian of the
    support loss at phi_i (Lemma 1), by conjugate gradient (Algorithm 2); the way to phi_i is not differentiated, and
    takes memory that does not grow with its steps. Parameters psi that the inner loop does not move get
    d L(phi_i; Q_i) / d psi minus the derivative of <grad L(phi_i; S_i), g_i> / lam. All of it is the derivative of
    phi_i itself (`functional.implicit`): whatever else depends on phi_i, such as a penalty, is differentiated too.

    Deviations: a task whose system shows itself indefinite keeps the iterate that conjugate gradient has by then
    (`cg_indefinite` in `metrics.jsonl` is the share of such tasks), where the authors' code goes on; and `cg_tolerance`
    is relative to |b|^2 (theirs: absolute), so that a task's gradient is in proportion to its weight in the objective.

    Args:
        alpha: step size of the inner solver, which converges if alpha < 2 / (lambda_max(H) + lam).
        lam: weight lambda > 0 of the proximal term.
        inner_solver: `prox_gd`, gradient steps on the whole inner objective; or `official`, gradient steps on the
            support loss and then one step of the proximal term alone, as in the authors' code.
        test_lam: lambda while adapting in validation and test; None for `lam` (the authors use 0).
        adapted: prefix of the parameters that the inner loop moves; empty for all.
        cg_steps, cg_tolerance: at most so many steps of conjugate gradient, until |r|^2 <= cg_tolerance |b|^2.
        cg_damping, lam_damping: conjugate gradient solves (1 + cg_damping) g + H g / (lam + lam_damping) = b. With 0
            and 0 this is the implicit gradient; the authors' code has 1 and 10.
        learner: arguments of `MetaLearner`.
    """

    def __init__(
        self,
        *,
        alpha: float,
        lam: float,
        inner_solver: Literal["prox_gd", "official"] = "prox_gd",
        test_lam: float | None = None,
        adapted: str = "",
        cg_steps: int = 5,
        cg_tolerance: float = 1e-10,
        cg_damping: float = 0.0,
        lam_damping: float = 0.0,
        **learner: Any,
    ):
        super().__init__(**learner)
        if lam <= 0:
            raise ValueError(f"algorithm.lam = {lam}: must be > 0, or the inner problem has no unique solution")
        self.alpha, self.lam, self.test_lam = alpha, lam, lam if test_lam is None else test_lam
        self.inner_solver, self.adapted = inner_solver, adapted
        self.cg_steps, self.cg_tolerance = cg_steps, cg_tolerance
        self.cg_damping, self.lam_damping = cg_damping, lam_damping

    def adapt(self, theta: Theta, support: Examples, *, steps: int, key: TaskKey | None = None) -> Trajectory:
        """Iterates of the inner solver for `test_lam`, without a graph; training differentiates their limit instead."""
        return list(self._iterates(*self._problem(theta, support), steps, self.test_lam))

    def task_loss(self, theta: Theta, episodes: Episode, key: TaskKey | None = None) -> TaskOutput:
        """The query loss of phi_i, which depends on theta as the solution of the inner problem."""
        loss, start, context = self._problem(theta, episodes.support)
        phi = deque(self._iterates(loss, start, context, self.inner_steps, self.lam), maxlen=1).pop()  # the last one
        reports: dict[str, Tensor] = {}  # filled when the loss is differentiated

        def solve(hessian: Product, b: Params) -> Params:
            """(I + H / lam)^-1 b, damped."""

            def a(v: Params) -> Params:
                hv = hessian(v)
                return {k: (1 + self.cg_damping) * v[k] + hv[k] / (self.lam + self.lam_damping) for k in v}

            g = conjugate_gradient(a, b, self.cg_steps, tolerance=self.cg_tolerance)
            reports.update(cg_steps=g.steps, cg_residual=g.residual, cg_indefinite=g.indefinite.to(g.steps))
            return g.x

        phi = implicit(loss, phi, start, context, self.lam + self.lam_damping, solve)
        return self.query_output(theta, phi, episodes, reports)

    @property
    def exact(self) -> bool:
        """The outer gradient is the slope at the minimiser, which the solver and conjugate gradient only come near."""
        return False

    def moves(self, name: str) -> bool:
        """Whether the inner solver moves this parameter of the network."""
        return name.startswith(self.adapted) and self.net.adapts(name)

    def hint(self) -> str:
        """The inner solver's own reason to diverge."""
        return (
            f"; with algorithm.lam = {self.lam} the inner solver converges only if alpha < 2 / (lambda_max + lam), "
            f"which is at most {2 / self.lam:g}: lower algorithm.alpha"
        )

    def _problem(self, theta: Theta, support: Examples) -> tuple[Loss, Params, Context]:
        return support_problem(self, self.network(theta), support, self.moves)

    def _iterates(self, loss: Loss, start: Params, context: Context, steps: int, lam: float) -> Iterator[Params]:
        official = self.inner_solver == "official"
        return proximal_descent(loss, start, context, self.alpha, lam, steps, pull_back=official)
