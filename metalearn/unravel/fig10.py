"""Figure 10: test error of trained networks over alpha, and the heuristic range of alpha (H.18 to H.25)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.figure import Figure

from metalearn.results import Config, Result
from metalearn.shown import Finding, Shown
from metalearn.unravel.rates import Scored, best, draw, scored

PANELS = {"quadratic": ("a", "quadratic regression"), "sinusoid": ("b", "sine curves")}


def show(results: Sequence[Result]) -> Shown:
    """The error over alpha with the range, and whether the best alpha lies inside."""
    config = results[0].config
    line = scored(results, lambda r: float(r.config["algorithm"]["alpha"]))
    d, n = parameters(config), observations(config)
    low, high = 2 / min(n, d), n / min(n, d)
    least, inside = best(line), [s.rate for s in line if low <= s.rate <= high]
    panel, data = PANELS[config["dataset"]["name"]]
    measured = (
        f"{least.text()}; range {low:.3g} to {high:.3g} (d = {d}, n = N K = {n}), in which {len(inside)} of the "
        f"{len(line)} rates lie"
    )
    finding = Finding(
        f"Fig. 10({panel}): the best alpha lies inside the heuristic range",
        "least test error inside 2 / min(N K, d) to n / min(N K, d)",
        measured,
        low <= least.rate <= high,
    )
    notes = (
        f"N = {config['trainer']['meta_batch_size']} tasks of each of {config['trainer']['max_steps']} meta-steps, K = "
        f"{config['dataset']['shot']}; the paper does not say which n it takes, and its range holds for features in "
        "[0, 1], which tangent features are not",
    )
    title = f"Figure 10({panel}): the heuristic range, {data}"
    return Shown(title, {f"fig10{panel}": _figure(line, low, high, panel)}, [finding], notes)


def parameters(config: Config) -> int:
    """Of a fully connected network with one output."""
    widths = [config["dataset"].get("p", 1), *config["backbone"]["hidden"], 1]
    return sum((a + 1) * b for a, b in pairwise(widths))


def observations(config: Config) -> int:
    """Support points of all training tasks, N K."""
    trainer = config["trainer"]
    return int(trainer["max_steps"] * trainer["meta_batch_size"] * config["dataset"]["shot"])


def _figure(line: Sequence[Scored], low: float, high: float, panel: str) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    draw(axis, line, "mean over seeds", "C0")
    ends = line[0].rate / 1.3, line[-1].rate * 1.3
    axis.axvspan(max(low, ends[0]), min(high, ends[1]), color="C2", alpha=0.15, label=f"range: {low:.2g} to {high:.2g}")
    axis.set(xscale="log", yscale="log", xlim=ends, xlabel="alpha", ylabel="test MSE (target units$^2$)")
    axis.set_title(f"Figure 10({panel}) of Unraveling MAML, bars: 95 % over seeds", fontsize=10)
    axis.legend(fontsize=8)
    return figure
