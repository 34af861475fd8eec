"""The numbers of a figure: means over seeds at every value of the swept key, their intervals, and what is not there."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from metalearn import results
from metalearn.evaluation.metrics import HIGHER_IS_BETTER, metric_name, qualifiers_of
from metalearn.figures import axes
from metalearn.results import Result
from metalearn.schema import BadInput
from metalearn.schema.groups import BN_MODES
from metalearn.schema.keys import show
from metalearn.selection import Entry, telling
from metalearn.statistics import over_seeds
from metalearn.sweep.standing import STATES

ALPHA_STAR = "alpha_star"
"""The metric that holds the estimated best inner learning rate of a run."""
X = float | str | None


class Place(NamedTuple):
    """Where a result is drawn; x is None for a result without the key, which is a horizontal line."""

    panel: str
    hue: str
    x: X


class Reading(NamedTuple):
    """One value of one run: its mean and 95 % half-width over `tasks` tasks."""

    place: Place
    seed: int
    mean: float
    half: float
    tasks: int


class Point(NamedTuple):
    """What is drawn at one place.

    Attributes:
        place: see above.
        mean: of the seeds' means; NaN if no run finished.
        half: half-width of its 95 % interval, NaN where there is none.
        interval: what the interval is over: `seeds`, `tasks`, or nothing.
        seeds: the mean of each seed.
        tasks: test episodes of a run.
        diverged: how many runs diverged.
        missing: how many were asked for and have no result.
        validation: mean over seeds of what the checkpoint was selected by, if all seeds finished.
        best: whether that is the best of its line.
    """

    place: Place
    mean: float
    half: float
    interval: str
    seeds: dict[int, float]
    tasks: int
    diverged: int
    missing: int
    validation: float | None
    best: bool


class Mark(NamedTuple):
    """A vertical line; of one line's colour if `hue` names it, in one panel if `panel` does."""

    name: str
    value: float
    hue: str | None = None
    panel: str | None = None


class Plot(NamedTuple):
    """All that a figure shows. `notes` are whole sentences; `absent` names the cells without a value by the reason."""

    title: str
    x: str
    hue: tuple[str, ...]
    panel: tuple[str, ...]
    metric: str
    unit: str
    bn: tuple[str, ...]
    split: str
    points: list[Point]
    marks: list[Mark]
    notes: list[str]
    absent: dict[str, list[str]]

    @property
    def panels(self) -> list[str]:
        """Names of the panels, in order."""
        return list(dict.fromkeys(p.place.panel for p in self.points))

    @property
    def hues(self) -> list[str]:
        """Names of the lines, in order."""
        return list(dict.fromkeys(p.place.hue for p in self.points))


class Request(NamedTuple):
    """What a figure is to show; None is for what can be told from the results."""

    x: str | None = None
    hue: Sequence[str] | None = None
    panel: Sequence[str] = ()
    metric: str | None = None
    bn: str | None = None
    marks: Sequence[Mark] = ()
    title: str | None = None


def plot(entries: Sequence[Entry], request: Request) -> Plot:
    """The numbers of a figure of these cells.

    Raises:
        BadInput: if the request is not clear (the message names the candidates), if results of one point differ in
            more than the seed, and if nothing has finished.
    """
    hue = axes.choose_hue(entries, request.x) if request.hue is None else list(request.hue)
    within = [*hue, *request.panel]
    axes.check_keys(entries, within)
    x = request.x or axes.choose_x(entries, within)
    entries = unique(entries)
    found = [e.result for e in entries if e.result is not None]
    done = [r for r in found if not r.diverged]
    metric = request.metric or axes.choose_metric(done)
    if x not in READERS:
        axes.check_keys(entries, [x])
    if x != axes.META_STEP:
        axes.check_metric(done, metric, request.bn)
    if not found:
        states = {s: sum(e.state == s for e in entries) for s in STATES}
        raise BadInput(f"figure: no cell has finished: {', '.join(f'{n} {s}' for s, n in states.items() if n)}")
    return _Maker(entries, found, x, hue, list(request.panel), metric, request).plot()


def unique(entries: Iterable[Entry]) -> list[Entry]:
    """The entries without copies of one result."""
    kept: list[Entry] = []
    seen: dict[str, Result] = {}
    for entry in entries:
        r = entry.result
        other = r if r is None else seen.setdefault(entry.cell_id, r)
        if r is not None and other is not None and other.data["metrics"] != r.data["metrics"]:
            raise BadInput(f"{other.folder} and {r.folder} are one cell with different results; choose a folder")
        if other is r:
            kept.append(entry)
    return kept


class _Maker:
    """One figure in the making: from results to readings, points, marks and notes."""

    def __init__(
        self,
        entries: Sequence[Entry],
        found: list[Result],
        x: str,
        hue: list[str],
        panel: list[str],
        metric: str,
        request: Request,
    ):
        self.entries, self.found, self.x, self.hue, self.panel = entries, found, x, hue, panel
        self.metric, self.bn, self.request = metric, request.bn, request
        self.done = [r for r in found if not r.diverged]
        self.over_keys = x not in READERS
        read = READERS.get(x, _at_the_end)
        drawn = [r for r in self.done if read(r, metric, self.bn)] or found
        self.modes = tuple(dict.fromkeys(self.bn or r.data["protocol"]["bn"] for r in drawn))
        self.absent: dict[str, list[str]] = {}
        self.mode_of: dict[str, str] = {}
        """The mode of each line, for its cells without a result."""
        for r in found:
            self.mode_of.setdefault(axes.label(r.config, hue), self.bn or r.data["protocol"]["bn"])

    def plot(self) -> Plot:
        self._check_points()
        readings = [reading for r in self.done for reading in self._read(r)]
        places = dict.fromkeys(r.place for r in readings)
        if self.over_keys:
            places |= dict.fromkeys(self._place(e.config, e.result) for e in self.entries)
        elif self.x == axes.META_STEP:
            places |= dict.fromkeys(self._end(r) for r in self.found if r.diverged)
        if not places:
            raise BadInput(f"figure: no result has {self._what()}")
        points = self._best([self._point(p, readings) for p in sorted(places, key=_order)])
        unit = self._unit()
        self._note_absent({(r.place, r.seed) for r in readings})
        return Plot(
            title=self.request.title or title(self.found),
            x=self.x,
            hue=tuple(self.hue),
            panel=tuple(self.panel),
            metric=self.metric,
            unit=unit,
            bn=self.modes,
            split=self._split,
            points=points,
            marks=[*([] if _has_words(points) else self._alpha_stars()), *self._given_marks(points)],
            notes=self._notes(points),
            absent=self.absent,
        )

    @cached_property
    def _split(self) -> str:
        """What the metric is of: test, or validation or training of the log."""
        if self.x != axes.META_STEP:
            return "test"
        return "validation" if any(f"val_{self.metric}" in r.log() for r in self.done) else "training"

    # ---- places ----------------------------------------------------------------------------------------------------

    def _place(self, config: dict[str, Any], result: Result | None, x: X = None) -> Place:
        panel, hue = axes.label(config, self.panel), axes.label(config, self.hue)
        if len(self.modes) > 1:
            mode = self.mode_of.get(hue) if result is None else self.bn or result.data["protocol"]["bn"]
            hue = f"{hue} (bn={mode})" if hue else f"bn={mode}"
        value: Any = results.value(config, self.x) if self.over_keys else x
        if value is not None:
            value = float(value) if results.is_number(value) else show(value)
        return Place(panel, hue, value)

    def _end(self, result: Result) -> Place:
        return self._place(result.config, result, float(result.data["steps"]))

    def _check_points(self) -> None:
        """One seed has one result at a place, and seeds differ in nothing else."""
        groups: dict[Place, list[Result]] = {}
        for r in self.found:
            groups.setdefault(self._place(r.config, r), []).append(r)
        for place, own in groups.items():
            parts = [f"{self.x}={text(place.x)}"] if self.over_keys else []
            parts += [f"{k}={v}" for k, v in zip(self.hue, axes.label_values(own[0].config, self.hue), strict=True)]
            parts += [f"{k}={v}" for k, v in zip(self.panel, axes.label_values(own[0].config, self.panel), strict=True)]
            where = ", ".join(parts) or "one line"
            axes.refuse_mixed(own, where)
            seeds: dict[int, Result] = {}
            for r in own:
                other = seeds.setdefault(r.data["seed"], r)
                if other is not r:
                    raise BadInput(
                        f"figure: two results of seed {r.data['seed']} at {where}: {other.folder}, {r.folder}"
                    )

    # ---- readings --------------------------------------------------------------------------------------------------

    def _read(self, result: Result) -> list[Reading]:
        read = READERS.get(self.x, _at_the_end)
        found = read(result, self.metric, self.bn)
        return [
            Reading(self._place(result.config, result, x), result.data["seed"], mean, half, n)
            for x, mean, half, n in found
        ]

    def _what(self) -> str:
        mode = "" if self.bn is None else f" with bn={self.bn}"
        if self.x == axes.META_STEP:
            return f"val_{self.metric} or {self.metric} in its metrics.jsonl (curated results have no log)"
        return f"{self.metric}{mode} at adaptation steps" if self.x == axes.STEP else f"{self.metric}{mode}"

    def _unit(self) -> str:
        units = [
            m["unit"] for r in self.done for n, m in r.data["metrics"].items() if n.partition("@")[0] == self.metric
        ]
        return units[0] if units else "1"

    def _point(self, place: Place, readings: list[Reading]) -> Point:
        own = sorted((r for r in readings if r.place == place), key=lambda r: r.seed)
        seeds = {r.seed: r.mean for r in own}
        mean, half, interval = math.nan, math.nan, ""
        if own:
            mean, half, _ = over_seeds(list(seeds.values()))
            interval = "seeds" if len(own) > 1 else ""
        if len(own) == 1 and math.isfinite(own[0].half):
            half, interval = own[0].half, "tasks"
        here = [e for e in self.entries if self._place(e.config, e.result) == place] if self.over_keys else []
        if self.x == axes.META_STEP:
            diverged = sum(r.diverged and self._end(r) == place for r in self.found)
        else:
            diverged = sum(e.state == "diverged" for e in here)
        missing = sum(e.result is None for e in here)
        whole = own and len(own) == len(here)
        validation = self._validation(here) if whole else None
        tasks = own[0].tasks if own else 0
        return Point(place, mean, half, interval, seeds, tasks, diverged, missing, validation, False)

    def _validation(self, here: Sequence[Entry]) -> float | None:
        values = [e.result.data["protocol"]["selection"].get("value") for e in here if e.result is not None]
        return sum(values) / len(values) if values and None not in values else None

    def _best(self, points: list[Point]) -> list[Point]:
        """Mark the point of each line whose validation score is the best of several comparable ones."""
        rules = {r.data["protocol"]["selection"].get("by") for r in self.done}
        words = str(next(iter(rules))).split() if len(rules) == 1 else []
        score = next((w for w in words[1:2] if w in HIGHER_IS_BETTER), None)
        if score is None or _has_words(points):
            return points
        sign = 1 if HIGHER_IS_BETTER[score] else -1
        best: set[Place] = set()
        for line in {(p.place.panel, p.place.hue) for p in points}:
            own = [p for p in points if p.place[:2] == line and p.validation is not None and p.place.x is not None]
            if len(own) > 1:
                best.add(max(own, key=lambda p: sign * (p.validation or 0.0)).place)
        return [p._replace(best=p.place in best) for p in points]

    # ---- marks and notes -------------------------------------------------------------------------------------------

    def _alpha_stars(self) -> list[Mark]:
        found: dict[tuple[str, str], list[float]] = {}
        for r in self.done if self.x == "algorithm.alpha" else []:
            estimate = r.metric(ALPHA_STAR)
            if estimate is not None and estimate["mean"] is not None:
                found.setdefault(self._place(r.config, r)[:2], []).append(estimate["mean"])
        return [Mark("$\\alpha^*$", sum(vs) / len(vs), hue, panel) for (panel, hue), vs in found.items()]

    def _given_marks(self, points: list[Point]) -> list[Mark]:
        if self.request.marks and _has_words(points):
            raise BadInput(f"figure: --mark: {self.x} has values that are no numbers, so nothing can be marked")
        hues = {p.place.hue for p in points}
        return [m._replace(hue=m.name if m.name in hues else None) for m in self.request.marks]

    def _note_absent(self, read: set[tuple[Place, int]]) -> None:
        for e in self.entries:
            if e.state != "done":
                reason = f"{e.state}: {_first_line(e.error)}" if e.error else e.state
                self.absent.setdefault(reason, []).append(e.name)
            elif e.result is not None and not self._is_read(e.result, read):
                named = e.result.metric(self.metric, bn=self.bn) if self.over_keys else None
                infinite = named is not None and named["mean"] is None
                reason = f"{self._what()} is not finite" if infinite else f"no {self._what()}"
                self.absent.setdefault(reason, []).append(e.name)

    def _is_read(self, result: Result, read: set[tuple[Place, int]]) -> bool:
        place, seed = self._place(result.config, result), result.data["seed"]
        return any(s == seed and p[:2] == place[:2] and (p == place or not self.over_keys) for p, s in read)

    def _notes(self, points: list[Point]) -> list[str]:
        notes = [*_interval_notes(points), self._mode_note()]
        if any(p.best for p in points):
            rule = self.done[0].data["protocol"]["selection"]["by"]
            notes.append(f"Star: {self.x} with the best {rule} (where all seeds finished).")
        if any(p.place.x is None for p in points) and any(p.place.x is not None for p in points):
            notes.append(f"Horizontal: runs without {self.x}.")
        if any(p.diverged for p in points):
            notes.append("Crosses: diverged runs, of all at this point; means are over the others.")
        if _has_words(points) and (stars := self._alpha_stars()):
            values = ", ".join(f"{m.value:.3g}" for m in stars)
            notes.append(f"alpha* ({values}) has no place on an axis with words.")
        ids = {r.data["protocol"].get("episodes_id") for r in self.done}
        if self.x != axes.META_STEP and len(ids) > 1:
            notes.append("Test episodes differ between points.")
        along = self._follows()
        return notes + ([f"Also differs along a line: {', '.join(along)}."] if along else [])

    def _mode_note(self) -> str:
        episodes = sorted({p["episodes"] for p in (r.data["protocol"] for r in self.done)})
        mode = MODES.get(self.modes[0], self.modes[0]) if len(self.modes) == 1 else "bn=... as named"
        if self.x == axes.META_STEP:
            return f"Validation during training; {mode}." if self._split == "validation" else "The log of training."
        return f"{' or '.join(map(str, episodes)) or 'No'} test episodes a run; {mode}."

    def _follows(self) -> list[str]:
        """Keys that vary along some line besides x and the seed."""
        found: dict[str, None] = {}
        for line in {self._place(r.config, r)[:2] for r in self.found}:
            own = [r for r in self.found if self._place(r.config, r)[:2] == line]
            found |= dict.fromkeys(telling(own))
        return [k for k in found if k != self.x]


# ---- what one result says ------------------------------------------------------------------------------------------

Values = list[tuple[X, float, float, int]]


def _at_the_end(result: Result, metric: str, bn: str | None) -> Values:
    found = result.metric(metric, bn=bn)
    return [] if found is None or found["mean"] is None else [(None, *_numbers(found))]


def _at_steps(result: Result, metric: str, bn: str | None) -> Values:
    """The metric at every adaptation step that the result has."""
    protocol, out = result.data["protocol"], []
    mode = None if bn == protocol["bn"] else bn
    for name, found in result.data["metrics"].items():
        q = qualifiers_of(name)
        step = q.pop("step", None)
        if name.partition("@")[0] == metric and metric_name(metric, **q) == metric_name(metric, bn=mode):
            if found["mean"] is not None:
                out.append((float(protocol["test_steps"] if step is None else step), *_numbers(found)))
    return sorted(out) if len(out) > 1 else []


def _in_log(result: Result, metric: str, bn: str | None) -> Values:
    """The training log's column `val_<metric>`, or the one of that name."""
    log = result.log()
    column = next((c for c in (f"val_{metric}", metric) if c in log), None)
    if column is None:
        return []
    rows = log[["step", column]].dropna()
    return [(float(s), float(v), math.nan, 0) for s, v in zip(rows["step"], rows[column], strict=True)]


def _numbers(found: dict[str, Any]) -> tuple[float, float, int]:
    return found["mean"], math.nan if found["ci95"] is None else found["ci95"], found["n"]


READERS: dict[str, Callable[[Result, str, str | None], Values]] = {axes.STEP: _at_steps, axes.META_STEP: _in_log}
"""How to read a result for what is no key."""


MODES = {"none": "no batch norm", "batch": "bn=batch (transductive)"} | {
    mode: f"bn={mode}" for mode in BN_MODES if mode != "batch"
}
GROUPS_IN_TITLE = ("algorithm", "dataset")

# ---- text ----------------------------------------------------------------------------------------------------------


def title(found: Sequence[Result]) -> str:
    """Algorithm, data set and setting, as far as the results agree on them."""
    algorithms, sets = (list(dict.fromkeys(str(results.value(r.config, g)) for r in found)) for g in GROUPS_IN_TITLE)
    settings = {(p["way"], p["shot"]) for p in (r.data["protocol"] for r in found)}
    text = (f"{algorithms[0]} on " if len(algorithms) == 1 else "") + ", ".join(sets)
    if len(settings) == 1:
        way, shot = next(iter(settings))
        text += f", {way}-way {shot}-shot" if way else f", {shot} shots" if shot else ""
    return text


def _interval_notes(points: Sequence[Point]) -> list[str]:
    seeds = sorted({len(p.seeds) for p in points if p.interval == "seeds"})
    tasks = " or ".join(map(str, sorted({p.tasks for p in points if p.interval == "tasks"})))
    if not seeds:
        one = "One seed; bands and bars: 95 % interval over tasks" if tasks else "One seed, no interval"
        return [f"{one} (n = {tasks} tasks)." if tasks else f"{one}."] if any(p.seeds for p in points) else []
    n = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    notes = [f"Means over seeds; bands and bars: 95 % interval over seeds (Student's t, n = {n} seeds)."]
    return notes + ([f"Where there is one seed: 95 % interval over tasks (n = {tasks} tasks)."] if tasks else [])


def _has_words(points: Sequence[Point]) -> bool:
    """Whether x has no scale, because some of its values are no numbers."""
    return any(isinstance(p.place.x, str) for p in points)


def _order(place: Place) -> tuple[Any, ...]:
    """By panel and hue (numbers by size), then x: none, numbers, words."""
    return (*map(natural, place[:2]), results.by_size(place.x))


def natural(text: str) -> tuple[int, float, str]:
    """A key that sorts numbers by size, before words."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def text(x: X) -> str:
    """A value of x as it is written on the command line."""
    return "null" if x is None else x if isinstance(x, str) else f"{x:.10g}"


def _first_line(error: str) -> str:
    return error.strip().partition("\n")[0]


def absences(drawn: Plot, most: int | None = None) -> list[str]:
    """One line for each reason why cells have no value, naming all or `most` of them."""
    lines = []
    for reason, names in drawn.absent.items():
        more = f" and {len(names) - most} more" if most is not None and len(names) > most else ""
        lines.append(f"Without a value, {reason}: {', '.join(names[:most])}{more}")
    return lines


ABOUT = ("panel", "line", "x", "metric", "unit", "bn")
NUMBERS = ("mean", "half_width_95", "interval_over", "seeds", "tasks", "seed_means")
REST = ("diverged", "missing", "validation", "best_on_validation")


def csv_text(drawn: Plot) -> str:
    """The numbers of a figure, one row a point, in the metric's unit as `result.json` has it (a fraction, say)."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow([drawn.x if c == "x" else c for c in (*ABOUT, *NUMBERS, *REST)])
    for p in drawn.points:
        numbers = [_cell(p.mean), _cell(p.half), p.interval, len(p.seeds), p.tasks or ""]
        means = " ".join(f"{seed}:{value!r}" for seed, value in p.seeds.items())
        rest = [means, p.diverged, p.missing, "" if p.validation is None else repr(p.validation), int(p.best)]
        about = [p.place.panel, p.place.hue, "" if p.place.x is None else text(p.place.x)]
        rows.writerow([*about, drawn.metric, drawn.unit, "|".join(drawn.bn), *numbers, *rest])
    return file.getvalue()


def _cell(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""
