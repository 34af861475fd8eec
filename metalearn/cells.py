"""From a command line to cells: which runs it means.

Imports no torch. `metalearn`, `-m`, and whatever else needs the cells of a command, use `expand`.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig

from metalearn.composing import (
    CHOICES,
    Config,
    all_keys,
    base_of,
    composer,
    has,
    members,
    no_such_key,
    preset_of,
    resolved,
    search_path,
    suggestion,
    with_group,
    with_sections,
)
from metalearn.identity import contents_of, data_hash_of, identity, short_hash
from metalearn.ledger import given_checkpoint
from metalearn.schema import (
    GROUPS,
    BadInput,
    fields_of,
    is_study,
    member_of,
    nearest,
    validate,
)
from metalearn.schema.groups import Run

MOST_VALUES = 10_000


class Cell(NamedTuple):
    """One run: its overrides (Hydra syntax), validated configuration, and names (12 hex digits each).

    needs: what its training starts from: cells that are trained first, and checkpoints that keys name.
    problem: why it cannot be run here (its data are not there, a required key has no value); its ids mean nothing then.
    """

    overrides: tuple[str, ...]
    config: Config
    cell_id: str
    train_id: str
    data_hash: str
    needs: tuple["Cell | Given", ...] = ()
    problem: str | None = None


class Given(NamedTuple):
    """A checkpoint that a key names, by its contents."""

    key: str
    path: str
    sha256: str


class Axis(NamedTuple):
    """One key or group of the command line with all values it takes."""

    name: str
    values: tuple[str, ...]


def expand(
    arguments: Sequence[str],
    config_dirs: Sequence[str] = (),
    *,
    to_run: bool = True,
    tolerant: bool = False,
    grid: bool = True,
) -> list[Cell]:
    """All cells that a command line means, in order, without repetition.

    Choice sweeps (`a=1,2`) multiply. An experiment's `grid` (a list of products) multiplies too; the command line
    narrows it to the values that it names, or puts new ones in their place. `size=<name>` puts the values that its
    `sizes` has under this name in the place of its own, before that. In a sweep an axis that some member does
    not have is dropped for that member; an axis that no member has is an error.

    Args:
        arguments: overrides in Hydra's syntax; those of `hydra` itself are passed over.
        config_dirs: further folders with groups, besides those of `hydra.searchpath`.
        to_run: False if the cells are only to be shown: required keys may lack a value, the data need not be there,
            and the ids mean nothing.
        tolerant: keep a cell that cannot be run here, with its `problem`, instead of raising.
        grid: False for the overrides of one cell, whose values are all there: products of the experiment that it does
            not belong to may have these values, too.

    Raises:
        BadInput: for a key, name, value or combination that cannot be.
    """
    given = _axes([a for a in arguments if not is_hydra(a)])
    axes, sizes = [a for a in given if a.name != "size"], [s for a in given if a.name == "size" for s in a.values]
    with composer([*config_dirs, *search_paths(arguments)]):
        products = [{a.name: a.values for a in axes}]
        if grid and any(a.name == "experiment" for a in axes):
            products = [p for e in _experiments(axes) for s in sizes or ("",) for p in _with_grid(e, axes, s)]
        elif sizes:
            raise BadInput(f"size={sizes[0]}: needs experiment=<paper>/<id>, whose file says what its sizes are")
        cells: dict[str, Cell] = {}
        unused = {name for p in products for name in p}
        for product in products:
            for chosen in itertools.product(*product.values()):
                point = dict(zip(product, chosen, strict=True))
                cell, dropped = _cell(point, sweep=_is_sweep(products), to_run=to_run, tolerant=tolerant)
                unused -= set(product) - dropped
                cells.setdefault(cell.cell_id, cell)
        for name in sorted(unused):
            if name not in all_keys():
                raise BadInput(f"{name}: no such key{nearest(name, all_keys())}")
            if any(a.name == name for a in axes):  # a grid's axis goes unused if the command line leaves its member out
                raise BadInput(f"{name}: no member of this sweep has this key")
        return list(cells.values())


def swept(arguments: Sequence[str]) -> list[str]:
    """The arguments that name several values of one key or group."""
    found = [a for a in arguments if not is_hydra(a)]
    return [a for a in found if _parse(a).is_sweep_override()]


def chosen(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """The values that a command line gives to each key or group, as plain data, whether or not there is such a key."""
    axes = _axes([a for a in arguments if not is_hydra(a)])
    return {axis.name: [_parse(f"{axis.name}={v}").value() for v in axis.values] for axis in axes}


def _is_sweep(products: list[dict[str, tuple[str, ...]]]) -> bool:
    return len(products) > 1 or any(len(v) > 1 for p in products for v in p.values())


def is_hydra(argument: str) -> bool:
    """Whether an override is for Hydra itself."""
    return argument.lstrip("+~").startswith(("hydra.", "hydra/"))


def search_paths(arguments: Sequence[str]) -> list[str]:
    """The folders of `hydra.searchpath=[file:///...]`."""
    values = [_parse(a).value() for a in arguments if a.lstrip("+").startswith("hydra.searchpath=")]
    found = [str(v) for value in values if isinstance(value, list) for v in value]
    return [v.removeprefix("file://") for v in found if "://" not in v or v.startswith("file://")]


def _axes(arguments: Sequence[str]) -> list[Axis]:
    axes: dict[str, Axis] = {}
    for override in map(_parse, arguments):
        if override.is_delete():
            raise BadInput(f"{override.input_line}: keys cannot be deleted")
        if override.package is not None:
            raise BadInput(f"{override.input_line}: no group can be put elsewhere (@)")
        axes[override.key_or_group] = Axis(override.key_or_group, _values(override))
    return list(axes.values())


def _parse(argument: str) -> Override:
    name, equals, _ = argument.lstrip("+").partition("=")
    if not (name and equals) and not argument.startswith("~"):
        raise BadInput(f"'{argument}' is not key=value; see metalearn --help")
    try:
        return OverridesParser.create().parse_override(argument)
    except (HydraException, ValueError) as error:
        reasons = [line for line in str(error).splitlines() if "while evaluating" in line]
        hint = reasons[0] if reasons else "text with special characters needs quotes within quotes, as \"key='a=b'\""
        raise BadInput(f"{' '.join(argument.split())}: cannot be read; {hint}") from None


def _values(override: Override) -> tuple[str, ...]:
    if not override.is_sweep_override():
        return (override.get_value_element_as_str(),)
    if override.is_interval_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        raise BadInput(f"{override.input_line}: only lists of choices and ranges can be swept")
    try:
        values = tuple(str(v) for v in itertools.islice(override.sweep_string_iterator(), MOST_VALUES + 1))
    except (HydraException, ValueError) as error:
        raise BadInput(f"{override.input_line}: {error}") from None
    if not 0 < len(values) <= MOST_VALUES:
        raise BadInput(f"{override.input_line}: must have 1 to {MOST_VALUES} values")
    return values


def _experiments(axes: list[Axis]) -> Iterable[str]:
    """The experiments of a command line; an id without its panel's letter (unravel/fig4) means all its panels."""
    known = members("experiment", search_path)
    for name in next(a.values for a in axes if a.name == "experiment"):
        panels = [m for m in known if m[:-1] == name and m[-1].isalpha()]
        yield from panels if panels and name not in known else [name]


def _with_grid(experiment: str, axes: list[Axis], size: str = "") -> list[dict[str, tuple[str, ...]]]:
    """The products of an experiment's grid in one of its sizes, narrowed to the command line's values.

    A value that some product lists is taken in those products alone, so that `algorithm=maml` does not run MAML with
    what another product sets for Reptile. Values that no product lists, or none together, take the place of all.
    """
    given = {a.name: a.values for a in axes} | {"experiment": (experiment,)}
    grid = preset_of(experiment, "grid") or [{}]
    if not isinstance(grid, list):
        raise BadInput(f"experiment={experiment}: its grid must be a list of products")
    blocks = [_product(block | _size(experiment, size)) for block in grid]
    listed = {k: {v for block in blocks for v in block.get(k, ())} for k in given}
    narrowed = [
        block
        | {k: tuple(v for v in vs if k not in block or v in block[k] or v not in listed[k]) for k, vs in given.items()}
        for block in blocks
    ]
    return [p for p in narrowed if all(p[k] for k in given)] or [block | given for block in blocks]


def _product(block: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {k: tuple(_literal(v) for v in (vs if isinstance(vs, list) else [vs])) for k, vs in block.items()}


def _size(experiment: str, name: str) -> dict[str, Any]:
    """The keys that one of an experiment's sizes sets, by name; none for its own size, which has no name."""
    sizes = (preset_of(experiment, "sizes") or {}) | {"": {}}
    if name not in sizes:
        others = [s for s in sizes if s]
        there = f"must be one of {', '.join(others)}{nearest(name, others)}" if others else f"{experiment} has one size"
        raise BadInput(f"size={name}: {there}")
    found: dict[str, Any] = sizes[name]
    return found


def _literal(value: Any) -> str:
    """A yaml value in Hydra's override syntax."""
    if isinstance(value, list):
        return "[" + ",".join(_literal(v) for v in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./-]+", value, re.ASCII):
        return QuotedString(text=value, quote=Quote.single).with_quotes()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cell(chosen: dict[str, str], *, sweep: bool, to_run: bool, tolerant: bool) -> tuple[Cell, set[str]]:
    """The cell of one point of a product, and the axes that it does not have."""
    groups = tuple(f"{k}={v}" for k, v in chosen.items() if k in CHOICES)
    for name in chosen:
        if "/" in name or (name not in CHOICES and "." not in name and name not in fields_of(Run)):
            raise BadInput(f"{name}: no such key or group{suggestion(name)}")
    base, groups, _ = base_of(groups)
    values = {k: v for k, v in chosen.items() if k not in CHOICES}
    dropped = {k for k in values if not has(base, k)}
    for name in dropped:
        if not sweep or name.split(".")[0] not in GROUPS:
            raise BadInput(no_such_key(base, name))
    assignments = [f"{k}={v}" for k, v in values.items() if k not in dropped]
    overrides, config = (*groups, *assignments), with_sections(resolved(base, assignments))
    config = with_group(config, chosen.get("experiment"))
    try:
        return _named(overrides, validate(config, complete=to_run), to_run), dropped
    except BadInput as error:
        if not tolerant:
            raise
        cell = _named(overrides, validate(config, complete=False), to_run=False)
        return cell._replace(problem=str(error)), dropped


def from_composed(config: DictConfig, config_dirs: Sequence[str] = (), experiment: str | None = None) -> Cell:
    """The cell of a configuration that Hydra composed (as in a launcher's job).

    Args:
        config: see above.
        config_dirs: Hydra's folders of further groups.
        experiment: the experiment that Hydra composed, if any.
    """
    with composer(config_dirs):
        return _named((), validate(with_group(with_sections(resolved(config, ())), experiment)))


def _named(overrides: Sequence[str], config: Config, to_run: bool = True) -> Cell:
    data_hash, contents = (data_hash_of(config), contents_of(config)) if to_run else ("", {})
    needs = _needs(config) if to_run else ()
    if needs:
        contents["needs"] = " ".join(need.sha256 if isinstance(need, Given) else need.train_id for need in needs)
    train, test = identity(config, data_hash, contents)
    return Cell(tuple(overrides), config, short_hash([train, test]), short_hash([train]), data_hash, needs)


def _needs(config: Config) -> tuple[Cell | Given, ...]:
    """What the algorithm says that this run's training starts from, or the study of what it looks at."""
    if is_study(config):
        own = {k: _literal(v) for k, v in (("output_dir", config["output_dir"]), ("logger", config["logger"]["name"]))}
        wanted = member_of("study", config["study"]).needs(config["study"])
        lines = [{a.name: a.values[0] for a in _axes(line)} | own for line in wanted]
        return tuple(_cell(line, sweep=False, to_run=True, tolerant=False)[0] for line in lines)
    found: list[Cell | Given] = []
    for need in member_of("algorithm", config["algorithm"]).needs(config):
        if isinstance(need, dict):
            found.append(_named((), validate(need)))
            continue
        key, path = need
        try:
            found.append(Given(key, path, given_checkpoint(path).sha256))
        except ValueError as error:
            raise BadInput(f"{key}={path}: {error}") from None
    return tuple(found)
