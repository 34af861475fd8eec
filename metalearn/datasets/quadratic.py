"""Quadratic regression (Zou, Liu & Li, ICLR 2022, Figures 2, 10(a) and 12; after Bernacchia, ICLR 2021)."""

from torch import Tensor

from metalearn.datasets.base import Draw, Split
from metalearn.datasets.formula import Formula
from metalearn.episode import Episode
from metalearn.random import Key


class Quadratic(Formula):
    """Targets y ~ N((x . w + b)^2, sigma^2) of K points x ~ N(0, I_p); inputs `[n, p]`, targets `[n, 1]`, unscaled.

    For each task w ~ N(w0, nu^2 / p I_p) and b ~ N(0, 1). The papers leave the constants of this law open: the defaults
    of sigma, nu and w0 are those of Bernacchia's linear one (Figure 11 there: sigma = nu = 0.2, w0 = 0), p = 1 is ours.
    All tasks are fresh. The noise is on all targets, those of test queries included: no prediction has a mean squared
    error below sigma^2.

    Args:
        p: dimension of the inputs.
        sigma: standard deviation of the noise, in the target's units.
        nu: standard deviation of x . w around x . w0 for |x|^2 = p.
        w0: mean of every entry of w.
        shot, queries: support and query points in training.
        test_shot, test_queries: the same in validation and test; None means as in training.
        seed: of nothing here.
    """

    def __init__(
        self,
        *,
        p: int = 1,
        sigma: float = 0.2,
        nu: float = 0.2,
        w0: float = 0.0,
        shot: int = 10,
        queries: int = 10,
        test_shot: int | None = None,
        test_queries: int | None = 100,
        seed: int = 0,
    ):
        super().__init__(shot=shot, queries=queries, test_shot=test_shot, test_queries=test_queries)
        self.p, self.sigma, self.nu, self.w0, self.seed = p, sigma, nu, w0, seed
        self.input_shape = (p,)

    def draw(self, split: Split, key: Key, step: Tensor, task: Tensor) -> Draw:
        points = self.points(split)
        draw = {
            "w": self.w0 + self.nu / self.p**0.5 * key.sub("w").normal(self.p, step, task),
            "b": key.sub("b").normal(1, step, task),
            "x": key.sub("x").normal(points * self.p, step, task).unflatten(-1, (points, self.p)),
        }
        return draw | ({"noise": self.sigma * key.sub("noise").normal(points, step, task)} if self.sigma else {})

    def fetch(self, split: Split, draw: Draw) -> Episode:
        w, b, x = (draw[name].to(self.device) for name in ("w", "b", "x"))
        y = ((x * w.unsqueeze(-2)).sum(-1) + b).square()
        return self.episode(split, x, y, draw, {"w": w, "b": b[:, 0]})
