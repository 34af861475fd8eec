"""Figure 12: quadratic regression by a network, test error over the rate of test; is a negative one ever best?"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Shown
from metalearn.unravel.rates import Scored, below, best, draw, scored

TITLE = "Figure 12: quadratic regression by a network"


def show(results: Sequence[Result]) -> Shown:
    """Both panels, and whether the best rate is positive in each."""
    other = [r for r in results if r.config["algorithm"]["test_alpha"] is not None]
    same = [r for r in results if r.config["algorithm"]["test_alpha"] is None]
    left = scored(other, lambda r: float(r.config["algorithm"]["test_alpha"]))
    right = scored(same, lambda r: float(r.config["algorithm"]["alpha"]))
    trained = sorted({r.config["algorithm"]["alpha"] for r in other})
    titles = [f"trained at {', '.join(f'{a:g}' for a in trained)}", "the same rate in training and test"]
    findings = [_positive(line, title) for line, title in zip((left, right), titles, strict=True) if line]
    one = results[0].config
    data = one["dataset"]
    notes = (
        f"not stated in the paper: p = {data['p']}, sigma = {data['sigma']:g}, nu = {data['nu']:g}, width "
        f"{one['backbone']['hidden'][0]}, {one['trainer']['max_steps']} meta-steps",
        "no rate of training is negative: right, 0 is the end of the axis; crosses: some seed has no finite score",
    )
    return Shown(TITLE, {"fig12": _figure(left, right, titles)}, findings, notes)


def _positive(line: Sequence[Scored], title: str) -> Finding:
    claim, criterion = f"Fig. 12: the best rate is positive; {title}", "least error at a positive rate, below that at 0"
    zero = next((s for s in line if s.rate == 0), None)
    if zero is None:
        return Finding(claim, criterion, "0 is not among the rates", None)
    least = best(line)
    measured = f"{least.text()}; {zero.text()}"
    return Finding(claim, criterion, measured, below(least, zero) if least.rate > 0 else False)


def _figure(left: Sequence[Scored], right: Sequence[Scored], titles: Sequence[str]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, line, title, name in zip(
        figure.subplots(1, 2), (left, right), titles, ("rate of test", "rate of training and test"), strict=True
    ):
        draw(axis, line, "mean over seeds", "C0")
        axis.axvline(0, color="0.6", linewidth=1, linestyle="--", label="claimed: the best is right of 0")
        axis.set(xlabel=name, ylabel="test MSE (target units$^2$)", yscale="log", title=title)
        axis.legend(fontsize=8)
    figure.suptitle("Figure 12 of Unraveling MAML: quadratic regression, bars: 95 % over seeds")
    return figure
