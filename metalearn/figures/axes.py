"""What the axes of a figure are: the key that was swept, in the field's words, and the metric with its unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from metalearn import results
from metalearn.evaluation.metrics import UNITS
from metalearn.results import Result
from metalearn.schema import BadInput, nearest
from metalearn.schema.keys import few, show
from metalearn.selection import Entry, telling

STEP, META_STEP = "step", "meta_step"
"""What `--x` may name besides keys: the adaptation step, and the meta-step of a training log."""
TITLES = {
    STEP: "adaptation steps",
    META_STEP: "meta-steps (outer updates)",
    "algorithm.alpha": "inner learning rate $\\alpha$",
    "algorithm.inner_steps": "inner steps in training",
    "algorithm.test_steps": "adaptation steps in test",
    "algorithm.m": "number of initialisations $m$",
    "regularizer.lam": "weight of the regularizer $\\lambda$",
    "optimizer.lr": "outer learning rate",
    "dataset.way": "classes of a task (way)",
    "dataset.shot": "examples per class (shot)",
    "trainer.max_steps": "meta-steps of training",
    "trainer.meta_batch_size": "tasks of a meta-step",
}
METRICS = {"accuracy": "accuracy", "mse": "MSE", "r2": "squared correlation $r^2$"}
UNIT_SIGNS = {"fraction": "%", "target units squared": "target units$^2$", "1": ""}
SCALES = {"fraction": 100.0}
"""A fraction is drawn in percent."""


def x_title(key: str) -> str:
    """An axis label for a key."""
    return TITLES.get(key, key)


def y_title(metric: str, unit: str, split: str) -> str:
    """An axis label for a metric, with its unit and the tasks it is of."""
    sign = UNIT_SIGNS.get(unit, unit)
    name = METRICS.get(metric, metric.replace("_", " "))
    return f"{split} {name}" + (f" ({sign})" if sign else "")


def swept(entries: Sequence[Entry], within: Iterable[str] = ("algorithm",)) -> list[str]:
    """Numeric keys that vary besides the seed, for equal values of the keys `within`.

    A key with a word among its numbers (`algorithm.alpha=0.1,online`) is one, too. Keys that the cells' overrides set
    come alone, if any of them varies: others only follow these.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(label_values(entry.config, within), []).append(results.flat(entry.config))
    found: dict[str, None] = {}
    for configs in groups.values():
        for key in dict.fromkeys(k for c in configs for k in c):
            values = {c[key] for c in configs if isinstance(c.get(key), int | float | str)}
            if len(values) > 1 and any(map(results.is_number, values)) and key != "seed" and not results.idle(key):
                found[key] = None
    named = {o.partition("=")[0] for e in entries for o in e.overrides}
    return [k for k in found if k in named] or list(found)


def label_values(config: dict[str, Any], keys: Iterable[str]) -> tuple[str, ...]:
    """The values of keys as they are written on the command line."""
    return tuple(show(results.value(config, k)) for k in keys)


def label(config: dict[str, Any], keys: Sequence[str]) -> str:
    """The values of keys in a few words: names as they are, numbers of several keys with their keys' last words."""
    values = label_values(config, keys)
    if len(keys) < 2:
        return "".join(values)
    parts = [v if "." not in k else f"{k.rpartition('.')[2]}={v}" for k, v in zip(keys, values, strict=True)]
    return ", ".join(p for p, v in zip(parts, values, strict=True) if v != "null") or "null"


def choose_hue(entries: Sequence[Entry], x: str | None) -> list[str]:
    """The algorithm, if there are several and it is not what they are drawn over."""
    several = len({label_values(e.config, ["algorithm"]) for e in entries}) > 1
    return ["algorithm"] if several and x != "algorithm" else []


def choose_x(entries: Sequence[Entry], within: Sequence[str]) -> str:
    """The only key that is swept.

    Raises:
        BadInput: naming the candidates if there are several, or saying that there is none.
    """
    keys = swept(entries, within)
    if len(keys) == 1:
        return keys[0]
    if keys:
        raise BadInput(
            f"figure: {len(keys)} keys vary: {', '.join(keys)}; name one as --x, and the others as --hue or --panel, "
            "or choose a value as key=value"
        )
    raise BadInput(
        f"figure: no numeric key varies besides the seed; name what to draw over as --x ({STEP} for adaptation steps, "
        f"{META_STEP} for the validation log)"
    )


def check_keys(entries: Sequence[Entry], keys: Iterable[str]) -> None:
    """Refuse a key that nothing has.

    Raises:
        BadInput: naming the nearest one.
    """
    for key in keys:
        if all(results.value(e.config, key) is None for e in entries):
            known = dict.fromkeys(k for e in entries for k in (*results.flat(e.config), *e.config))
            raise BadInput(f"figure: {key}: nothing that was selected has this key{nearest(key, known)}")


def choose_metric(found: Sequence[Result]) -> str:
    """The score that all finished results have.

    Raises:
        BadInput: if they have none in common.
    """
    if not found:
        return next(iter(UNITS))
    common = [m for m in UNITS if all(r.metric(m) for r in found)]
    if not common:
        raise BadInput(
            f"figure: the results have no score in common; choose them by key=value, or name {_names(found)}"
        )
    return common[0]


def check_metric(found: Sequence[Result], metric: str, bn: str | None) -> None:
    """Refuse a metric that no finished result has.

    Raises:
        BadInput: naming those there are.
    """
    if found and not any(r.metric(metric, bn=bn) for r in found):
        wanted = metric if bn is None else f"{metric} with bn={bn}"
        raise BadInput(f"figure: {wanted}: no result has it; there are {_names(found)}")


def _names(found: Sequence[Result]) -> str:
    return few(sorted({n for r in found for n in r.data["metrics"] if "step=" not in n and "group=" not in n}))


def refuse_mixed(entries: Sequence[Result], where: str) -> None:
    """Refuse results of one point that differ in more than the seed.

    Raises:
        BadInput: naming the keys.
    """
    keys = telling(entries)
    if keys:
        raise BadInput(
            f"figure: {len(entries)} results at {where} differ in {', '.join(keys)}; name it as --hue or --panel, or "
            "choose a value as key=value"
        )
