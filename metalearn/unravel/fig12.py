"""Figure 12: quadratic regression by a network, test error over the rate of test; is a negative one ever best?"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.results import Result
from metalearn.shown import Finding, Shown
from metalearn.unravel.rates import Scored, below, best, beyond, draw, scored

TITLE = "Figure 12: quadratic regression by a network"
TOP = 10
"""The axes of errors end at so many times the error at rate 0."""


def show(results: Sequence[Result]) -> Shown:
    """Both panels, and whether the best rate is positive in each."""
    other = [r for r in results if r.config["algorithm"]["test_alpha"] is not None]
    same = [r for r in results if r.config["algorithm"]["test_alpha"] is None]
    trained = sorted({r.config["algorithm"]["alpha"] for r in other})
    lines = {
        f"trained at {', '.join(f'{a:g}' for a in trained)}": scored(
            other, lambda r: float(r.config["algorithm"]["test_alpha"])
        ),
        "the same rate in training and test": scored(same, lambda r: float(r.config["algorithm"]["alpha"])),
    }
    findings = [_positive(line, title) for title, line in lines.items() if line]
    one = results[0].config
    data = one["dataset"]
    notes = [
        f"not stated in the paper: p = {data['p']}, sigma = {data['sigma']:g}, nu = {data['nu']:g}, width "
        f"{one['backbone']['hidden'][0]}, {one['trainer']['max_steps']} meta-steps",
        "algorithm.alpha is at least 0, so that no network is trained at a negative rate: where both rates are the "
        "same, 0 is the end of the axis, and only whether a step is better than none is tested",
    ]
    notes += [
        f"beyond the axis, {t}: {text}" for t, line in lines.items() if line and (text := beyond(line, _top(line)))
    ]
    return Shown(TITLE, {"fig12": _figure(lines)}, findings, tuple(notes))


def _positive(line: Sequence[Scored], title: str) -> Finding:
    positive, rest = [s for s in line if s.rate > 0], [s for s in line if s.rate <= 0]
    negative = [s for s in rest if s.rate < 0]
    beaten = "0 and of every negative rate" if negative else "0"
    claim = "the best rate is positive" if negative else "a positive rate is better than none"
    claim, criterion = f"Fig. 12: {claim}; {title}", f"least error of positive rates below that of {beaten} (95 %)"
    if not negative:
        criterion += ", weaker than the paper's claim: no negative rate is tested"
    if not positive or all(s.rate for s in rest):
        return Finding(claim, criterion, "0 or positive rates are not among the rates", None)
    texts = [best(positive).text(), *(s.text() for s in rest if s.rate == 0)]
    texts += [f"best of {len(negative)} negative rates: {best(negative).text()}"] if negative else []
    return Finding(claim, criterion, "; ".join(texts), below(best(positive), best(rest)))


def _top(line: Sequence[Scored]) -> float:
    """Where the axis of errors ends; where 0 has no error, so many times the least one."""
    zero = [s for s in line if s.rate == 0 and not s.lost]
    return TOP * (zero[0] if zero else best(line)).mean


def _figure(lines: dict[str, list[Scored]]) -> Figure:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    names = "inner learning rate alpha of test", "inner learning rate alpha of training and test"
    for axis, (title, line), name in zip(figure.subplots(1, 2), lines.items(), names, strict=True):
        if line:
            _panel(axis, line)
        axis.set(xlabel=name, ylabel="test MSE (target units$^2$)", title=title)
    figure.suptitle("Figure 12 of Unraveling MAML: quadratic regression, bars: 95 % over seeds")
    return figure


def _panel(axis: Axes, line: Sequence[Scored]) -> None:
    draw(axis, line, "C0", _top(line))
    axis.axvline(0, color="0.6", linewidth=1, linestyle="--", label="claimed: the best is right of 0")
    axis.legend(fontsize=8)
