"""Figure 11 of "Unraveling MAML": which adaptation rate is best in Bernacchia's linear regression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from metalearn.random import Key
from metalearn.studies.base import Measured, State, Study, estimate, exact, over
from metalearn.theory import alpha_star
from metalearn.theory import bernacchia as theory

RESAMPLES = 1000
CHUNK = 20
"""Runs at once."""


class Bernacchia(Study):
    """Test loss over the rate alpha_t of training; exact but for the training tasks, which are each run's own.

    Three rates alpha_r of tests, named `test`: `same` (alpha_r = alpha_t), `fixed`, and `best` (the one of least loss
    for the meta-parameters that alpha_t has led to). Losses have the factor 1/2: rates are twice those of eq. 3.3.

    Args:
        tasks: m of training.
        support: n_t.
        query: n_v.
        test_support: n_r.
        width: p.
        noise: sigma.
        spread: nu.
        low: least alpha_t.
        high: largest alpha_t.
        points: rates from low to high.
        fixed_rate: alpha_r of `fixed`.
        runs: draws of the training tasks.
    """

    title = "Bernacchia's regression over the adaptation rate"

    def __init__(
        self,
        *,
        tasks: int,
        support: int,
        query: int,
        test_support: int,
        width: int,
        noise: float,
        spread: float,
        low: float,
        high: float,
        points: int,
        fixed_rate: float,
        runs: int,
    ):
        self.setting = theory.Setting(tasks, support, query, test_support, width, noise, spread)
        self.rates = torch.linspace(low, high, points, dtype=torch.float64)
        self.fixed_rate, self.runs = fixed_rate, runs

    def measure(self, key: Key, starts: Sequence[State]) -> Iterator[Measured]:
        """Yields where each curve is least (bootstrap over runs) and by how much, the curves, and the estimates.

        `excess`: loss at rate 0 over the least; `estimate`: twice Corollary 2 of each run's training tasks, `alpha`: of
        many; `heuristic`: both ends of H.18's range for the range of each run's features, doubled.
        """
        distances, estimates, ranges = self._runs(Generator().manual_seed(key.sub("tasks").integer()))
        curves = self._curves(distances)
        least = {test: _least(self.rates, curve, key.sub(test)) for test, curve in curves.items()}
        yield estimate("best_rate", *least["same"], self.runs, "rate", of="runs")
        for test, curve in curves.items():
            yield estimate("best_rate", *least[test], self.runs, "rate", of="runs", test=test)
            best, zero = int(curve.mean(1).argmin()), int(self.rates.abs().argmin())
            yield over("least_loss", curve[best].tolist(), "target units squared", of="runs", test=test)
            yield over("excess", (curve[zero] - curve[best]).tolist(), "target units squared", of="runs", test=test)
            for rate, values in zip(self.rates.tolist(), curve.tolist(), strict=True):
                yield over("loss", values, "target units squared", of="runs", rate=rate, test=test)
        yield over("estimate", estimates, "rate", of="runs")
        yield exact("alpha", self.setting.estimate(), "rate")
        for end, values in zip(("low", "high"), zip(*ranges, strict=True), strict=True):
            yield over("heuristic", values, "rate", of="runs", end=end)

    def _runs(self, generator: Generator) -> tuple[Tensor, list[float], list[alpha_star.Interval]]:
        """R `[A, runs]`, and for each run both estimates."""
        distances, estimates, ranges = [], [], []
        for own in torch.arange(self.runs).split(CHUNK):
            drawn = theory.draw(self.setting, len(own), generator)
            distances.append(theory.distance(theory.minimiser(drawn, self.rates), self.setting))
            for x, z in zip(drawn.support.x, drawn.query.x, strict=True):
                estimates.append(2 * alpha_star.split(x, z).value)
                ranges.append(self._heuristic(x))
        return torch.cat(distances, -1), estimates, ranges

    def _heuristic(self, x: Tensor) -> alpha_star.Interval:
        s = self.setting
        found = alpha_star.heuristic_range(s.tasks, s.support, s.width, low=float(x.min()), high=float(x.max()))
        return alpha_star.Interval(2 * found.low, 2 * found.high)

    def _curves(self, distances: Tensor) -> dict[str, Tensor]:
        """Test losses, `[A, runs]` each."""
        tests = {
            "same": self.rates[:, None],
            "fixed": torch.tensor(self.fixed_rate, dtype=torch.float64),
            "best": theory.best_test_rate(distances, self.setting),
        }
        return {test: theory.loss_at(distances, self.setting, rate) for test, rate in tests.items()}


def _least(rates: Tensor, curve: Tensor, key: Key) -> tuple[float, float]:
    """The rate at which the mean of curves `[A, runs]` is least, with its standard error over runs."""
    which = key.integers(curve.shape[1], torch.arange(RESAMPLES), size=curve.shape[1])
    counts = torch.zeros(RESAMPLES, curve.shape[1], dtype=torch.float64)
    counts.scatter_add_(1, which, torch.ones_like(which, dtype=torch.float64))
    return float(lowest(rates, curve.mean(1))), float(lowest(rates, curve @ counts.mT / curve.shape[1]).std())


def lowest(rates: Tensor, curves: Tensor) -> Tensor:
    """Where curves `[A, ...]` over evenly spaced rates are least, `[...]`: by the parabola through three points."""
    at = curves.argmin(0, keepdim=True).clamp(1, len(rates) - 2)
    before, least, after = (curves.gather(0, at + step)[0] for step in (-1, 0, 1))
    shift = (before - after) / (2 * (before - 2 * least + after))
    return rates[at[0]] + shift.clamp(-1, 1) * (rates[1] - rates[0])
