"""`metalearn alpha`: options, printing, files. Imports no torch until the command line is known good."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metalearn import cells
from metalearn.cells import Cell
from metalearn.identity import short_hash
from metalearn.ledger import write_atomically, write_json
from metalearn.options import Parser, config_dirs, whole
from metalearn.schema import BadInput, fields_of, is_study, member_of

DESCRIPTION = """What a run's inner learning rate should be, from its own training tasks before any training.

  metalearn alpha [group=member] [key=value] ...     for example dataset=sinusoid algorithm=anil

Prints and draws, at the run's initial parameters (with --start at a trained network's) and for its own inner loss,
network, seed and adapted parameters:

- alpha* = E tr(A B) / E tr(A B A) of neural tangent features, A and B the Gauss-Newton curvatures of support and query
  loss (Zou, Liu & Li, ICLR 2022, Corollary 2; for the mean squared error exactly that), and with B = A (eq. 3.3);
  this is what algorithm.alpha=auto takes
- for the mean squared error H.14, H.15 and H.18 of the samples of all drawn tasks together
- the heuristic range of H.18 (mean squared error), whose n is the N K support outputs of all training
- 2 / lambda_max of the support loss, from which on gradient steps on its quadratic model diverge
- the query loss after one step of the algorithm's own, over alphas, on the same tasks
- values to sweep, as a command

Intervals are 95 % over tasks (bootstrap). alpha.json, alpha.png and alpha.svg go to <output_dir>/alpha/<cell id>
(<cell id>-<mark> with the options below)."""
STABILITY_TASKS = 8
POINTS, SPAN = 11, 32.0
"""Alphas of the curve, and how far from alpha* it goes."""


def parser() -> Parser:
    """The verb's options."""
    p = Parser("alpha", DESCRIPTION)
    p.take_cells()
    p.add_argument("--tasks", type=whole(2), metavar="N", help="training tasks; default 32, as for alpha=auto")
    p.add_argument(
        "--probes", type=whole(0), metavar="P", help="random vectors a task for the traces; 0: exact; default by size"
    )
    p.add_argument("--alphas", type=_alphas, metavar="A,A,...", help="of the curve; default 11 around alpha*")
    p.add_argument(
        "--start", type=Path, metavar="PATH", help="a finished run's folder, or a checkpoint: ask at its parameters"
    )
    p.add_argument("--output", type=Path, metavar="FOLDER", help="for the files, instead of the above")
    return p


def _alphas(text: str) -> list[float]:
    try:
        values = sorted({float(v) for v in text.split(",")})
    except ValueError:
        values = []
    if len(values) < 2 or not all(0 < v < math.inf for v in values):
        raise argparse.ArgumentTypeError(f"{text}: must be at least two numbers > 0, as 0.01,0.1,1")
    return values


def main(arguments: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    options = parser().parse_intermixed_args(arguments)
    for swept in cells.swept(options.overrides):
        raise BadInput(f"alpha: {swept}: names several runs; name one")
    found = cells.expand(options.overrides, config_dirs(options))
    if len(found) != 1:
        raise BadInput(f"alpha: this names {len(found)} runs; name one")
    (cell,) = found
    refuse(cell)
    from metalearn.alpha import picture, study

    numbers = {"tasks": options.tasks, "probes": options.probes, "alphas": options.alphas}
    report = study.study(cell, **numbers, start=options.start)
    more = [f"--config-dir={d}" for d in config_dirs(options)] + [o for o in options.overrides if cells.is_hydra(o)]
    report["sweep_command"] = command(cell, report["sweep"], more)
    drawn = {kind: picture.encoded(report, kind) for kind in ("png", "svg")}  # all before the first file
    folder = options.output or Path(cell.config["output_dir"]) / "alpha" / place(cell, numbers, options.start)
    write_json(folder / "alpha.json", report)
    for kind, content in drawn.items():
        write_atomically(folder / f"alpha.{kind}", content)
    print(text(report) + f"\n{folder / 'alpha.json'}, alpha.png, alpha.svg")
    return 0


def place(cell: Cell, numbers: Mapping[str, Any], start: Path | None) -> str:
    """The folder's name: the cell's id, and a mark of the options where they are not the default ones."""
    asked = {k: v for k, v in numbers.items() if v is not None} | ({"start": str(start)} if start else {})
    return cell.cell_id + (f"-{short_hash(asked)[:6]}" if asked else "")


def refuse(cell: Cell) -> None:
    """Say why the run has no alpha that could be estimated, if so.

    Raises:
        BadInput: naming the study, the algorithm, or the key.
    """
    if is_study(cell.config):
        raise BadInput(f"alpha: study={cell.config['study']['name']}: trains nothing, so it has no inner learning rate")
    section = cell.config["algorithm"]
    schema = member_of("algorithm", section)
    if "auto" not in schema.alpha_words:
        raise BadInput(
            f"alpha: algorithm={section['name']}: trains without plain gradient steps of size algorithm.alpha; the "
            "estimate is for maml and what is made of its inner loop (anil, meta_sgd, tnet, tsa_maml, ...)"
        )
    given = {k: fields_of(schema)[k].default for k in ("alpha_cov", "alpha_momentum") if k in section}
    for problem in schema.problems(section | {"alpha": "auto"} | given, cell.config):
        raise BadInput(problem)


def command(cell: Cell, values: Sequence[float], more: Sequence[str] = ()) -> str:
    """A sweep over these values with the other keys of the cell, and more arguments, as a shell takes it."""
    others = [o for o in cell.overrides if not o.startswith("algorithm.alpha=")]
    return shlex.join(["metalearn", "-m", *more, *others, "algorithm.alpha=" + ",".join(f"{v:g}" for v in values)])


def text(report: dict[str, Any]) -> str:
    """The report for the terminal."""
    about, star, same = report["about"], report["alpha_star"], report["alpha_star_same_set"]
    how = "exact" if not star["probes"] else f"{star['probes']} probes a task"
    rows = [
        ("alpha*", number(star["value"]), _between(star), f"curvature on query sets (Corollary 2), {how}"),
        ("  same set", number(same["value"]), _between(same), "curvature on support sets (eq. 3.3)"),
        *_stacked(report["stacked"]),
        _heuristic(report["heuristic"]),
        _stability(report["stability"]),
        _best(report["curve"]),
    ]
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, [*widths, 0], strict=True)).rstrip() for r in rows]
    where = "before training" if about["start"] is None else f"at the parameters of {about['start']}"
    title = (
        f"\n{about['algorithm']} on {about['dataset']} with {about['backbone']}, seed {about['seed']}: {star['tasks']} "
        f"training tasks {where}, {about['moving']:,} parameters move"
    )
    said = [*_on_the_best(report), *_on_stability(report)]
    return "\n".join([title, *lines, "", *_curve(report["curve"]), "", *said, report["sweep_command"]])


STACKED = {
    "kernel": ("H.14", "all {samples} support samples together"),
    "deviation": ("H.15", "1 / (2 N K sigma^2), printed as H.14 made simple; does not follow from it"),
    "heuristic": ("H.18", "1 / (2 min(N K, d) sigma^2), sigma the deviation of the features"),
}


def _stacked(found: dict[str, Any] | None) -> list[tuple[str, str, str, str]]:
    if found is None:
        return []
    return [
        (f"  {name}", number(found[key]["value"]), _between(found[key]), words.format(samples=found["samples"]))
        for key, (name, words) in STACKED.items()
    ]


def _heuristic(found: dict[str, Any] | None) -> tuple[str, str, str, str]:
    if found is None:
        return "heuristic range", "-", "", "H.18 is for the mean squared error"
    scaled = f"{number(found['scaled_low'])} .. {number(found['scaled_high'])}"
    return (
        "heuristic range", "", f"{number(found['low'])} .. {number(found['high'])}",
        f"H.18 for features in [0, 1], n = N K = {found['observations']:,} in training; for these, in "
        f"[{found['least']:.2g}, {found['largest']:.2g}]: {scaled}",
    )  # fmt: skip


def _stability(found: dict[str, Any]) -> tuple[str, str, str, str]:
    least = "none" if found["least"] is None else number(found["least"])
    return (
        "2 / lambda_max", "-" if found["median"] is None else number(found["median"]), f"least {least}",
        f"median of {found['tasks']} tasks; power iteration, residual {found['residual']:.0%} or less",
    )  # fmt: skip


def _best(found: dict[str, Any]) -> tuple[str, str, str, str]:
    grid = f"of the {len(found['alphas'])} alphas below"
    if found["best"] is None:
        return "one step, best", "none", "", f"{grid}: no step lowers the query loss, {found['start']:.4g} without"
    at = found["alphas"].index(found["best"])
    return (
        "one step, best", number(found["best"]), _between(found),
        f"{grid}: query loss {found['losses'][at]:.4g} after a step, {found['start']:.4g} without",
    )  # fmt: skip


def _curve(found: dict[str, Any]) -> list[str]:
    """The one-step curve as a table."""
    rows = [("alpha", "query loss after one step", "change (+- 95 % over tasks)"), ("0", f"{found['start']:.4g}", "")]
    for alpha, loss, half in zip(found["alphas"], found["losses"], found["halves"], strict=True):
        if loss is None:
            rows.append((number(alpha), "not finite", ""))
            continue
        width = "not finite" if half is None else number(half)
        best = "  best" if alpha == found["best"] else ""
        rows.append((number(alpha), f"{loss:.4g}", f"{loss - found['start']:+.3g} +- {width}{best}"))
    widths = [max(len(r[i]) for r in rows) for i in range(2)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[2]]).rstrip() for r in rows]


def _on_the_best(report: dict[str, Any]) -> list[str]:
    """What the curve says besides alpha*, in words."""
    star, curve = report["alpha_star"]["value"], report["curve"]
    best, alphas = curve["best"], curve["alphas"]
    if best is None:
        lower = "; --alphas goes lower" if alphas[0] > star else ""
        return [f"No alpha of the table lowers the query loss: the sweep is around alpha* alone{lower}."]
    lines, ratio = [], best / star
    if not 1 / 4 <= ratio <= 4:
        times = f"{ratio:.1f} times" if ratio > 1 else f"{1 / ratio:.1f} times less than"
        lines.append(
            f"The best single step is {times} alpha*, which takes errors to be alike in all directions; the sweep has "
            "both."
        )
    if best in (alphas[0], alphas[-1]):
        lines.append("The curve's best alpha is at its end: --alphas goes further.")
    return lines


def _on_stability(report: dict[str, Any]) -> list[str]:
    """What it means that the sweep goes beyond 2 / lambda_max, if it does.

    There a step takes the error in the sharpest direction of the quadratic model times 1 - alpha lambda_max < -1.
    """
    bound, sweep, about = report["stability"]["median"], report["sweep"], report["about"]
    if bound is None or max(sweep) <= bound:
        return []
    beyond = sum(alpha > bound for alpha in sweep)
    what = (
        f"{beyond} of the sweep's {len(sweep)} values are beyond 2 / lambda_max: at {max(sweep):g} a step multiplies "
        f"the quadratic model's error in its sharpest direction by {2 * max(sweep) / bound - 1:.2g}."
    )
    inner, test = about["inner_steps"], about["test_steps"]
    if max(inner, test) <= 1:
        return [f"{what} The run takes single steps, for which the table says what helps."]
    return [f"{what} The run takes {inner} in training and {test} in test: several may diverge where one helps."]


def _between(found: dict[str, Any]) -> str:
    return f"{number(found['low'])} .. {number(found['high'])}"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"
