"""From a command line to cells: which runs it means, and the names under which their results are kept.

Imports no torch. `metalearn`, `-m`, and whatever else needs the cells of a command, use `expand`.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from metalearn.ledger import given_checkpoint
from metalearn.paths import conf_dir
from metalearn.schema import (
    GROUPS,
    MEMBERS,
    BadInput,
    Key,
    fields_of,
    groups_of,
    is_study,
    member_of,
    nearest,
    register,
    sections,
    validate,
)
from metalearn.schema.groups import Run
from metalearn.schema.registry import SINGLE

Config = dict[str, Any]
OPTIONAL = ("study", "experiment", "dataset_algorithm")
CHOICES = tuple(dict.fromkeys((*GROUPS, *OPTIONAL)))
OF_EXPERIMENT = ("grid", "sizes", "shows")
"""What an experiment's file says besides groups and keys."""
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
    with _composer([*config_dirs, *search_paths(arguments)]):
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
    known = members("experiment", _search_path)
    for name in next(a.values for a in axes if a.name == "experiment"):
        panels = [m for m in known if m[:-1] == name and m[-1].isalpha()]
        yield from panels if panels and name not in known else [name]


def preset(experiment: str, key: str, config_dirs: Sequence[str] = ()) -> Any:
    """What an experiment's file says under one of `OF_EXPERIMENT`; None if it says nothing there."""
    with _composer(config_dirs):
        return _preset(experiment, key)


def _preset(experiment: str, key: str) -> Any:
    found = _base((f"experiment={experiment}",)).config.get(key)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def _with_grid(experiment: str, axes: list[Axis], size: str = "") -> list[dict[str, tuple[str, ...]]]:
    """The products of an experiment's grid in one of its sizes, narrowed to the command line's values.

    A value that some product lists is taken in those products alone, so that `algorithm=maml` does not run MAML with
    what another product sets for Reptile. Values that no product lists, or none together, take the place of all.
    """
    given = {a.name: a.values for a in axes} | {"experiment": (experiment,)}
    grid = _preset(experiment, "grid") or [{}]
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
    sizes = (_preset(experiment, "sizes") or {}) | {"": {}}
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


# ---- composing ---------------------------------------------------------------------------------------------------


class _composer:
    """Hydra's compose for the duration of a block, restoring whatever was initialised before."""

    def __init__(self, config_dirs: Sequence[str]):
        self.dirs = [str(Path(d).resolve()) for d in config_dirs]

    def __enter__(self) -> None:
        register()
        self.before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        initialize_config_dir(conf_dir(), version_base="1.3")
        _search_path.clear()
        _search_path.extend(self.dirs)
        _base.cache_clear()
        _dataset.cache_clear()

    def __exit__(self, *_: object) -> None:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = self.before


_search_path: list[str] = []


class Base(NamedTuple):
    """A configuration before any key is set, the complete choice of members, and what all groups have without it."""

    config: DictConfig
    choices: tuple[str, ...]
    chosen: dict[str, str | None]


@lru_cache(maxsize=512)
def _base(choices: tuple[str, ...]) -> Base:
    """The configuration of a choice of members.

    A paper's departures for a pair of data set and algorithm (`dataset_algorithm/<dataset>_<algorithm>`) are chosen
    here, because Hydra does not let an interpolated group override others.
    """
    for choice in choices:
        group, name = choice.split("=", 1)
        known = members(group, _search_path)
        if name not in known and not (name == "null" and group in OPTIONAL):
            raise BadInput(f"{group}={name}: no such {group}{nearest(name, known)}")
    given = any(c.startswith("dataset_algorithm=") for c in choices)
    choices = tuple(c for c in choices if not c.endswith("=null"))
    experiment = tuple(c for c in choices if c.startswith("experiment="))
    config = None
    if choices == experiment:
        config = _compose(choices)
        chosen = dict(config.hydra.runtime.choices)
    else:  # composing takes long: what this choice leaves open is the same for all of an experiment's cells
        chosen = _base(experiment).chosen | {k: v for k, v in (c.split("=", 1) for c in choices)}
    special = f"{chosen['dataset']}_{chosen['algorithm']}"
    given = given or chosen["study"] is not None or chosen["dataset_algorithm"] is not None
    if not given and special in members("dataset_algorithm", _search_path):
        choices, config = (*choices, f"dataset_algorithm={special}"), None
    config = _compose(choices) if config is None else config
    OmegaConf.set_readonly(config, False)
    with open_dict(config):
        del config["hydra"]
        for group in set(GROUPS) - set(groups_of(config)):
            if any(c.startswith(f"{group}=") for c in choices):
                raise BadInput(f"{group}: no such group for study={config.study.name}, which trains nothing")
            config.pop(group, None)
    return Base(config, choices, chosen)


def hydra_config(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> DictConfig:
    """Hydra's own section with these overrides of it.

    Raises:
        BadInput: if they cannot be.
    """
    with _composer(config_dirs):
        return _compose(tuple(overrides)).hydra


def _compose(choices: tuple[str, ...]) -> DictConfig:
    places = ",".join(QuotedString(text=f"file://{d}", quote=Quote.single).with_quotes() for d in _search_path)
    extra = [f"hydra.searchpath=[{places}]"] if places else []
    try:
        return compose("config", overrides=[*choices, *extra], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = str(error.__cause__ or "").partition("\n")[0]
        raise BadInput(" ".join(f"{error}{cause and f': {cause}'}".split())[:300]) from None


def members(group: str, config_dirs: Sequence[str] = ()) -> list[str]:
    """Names of the yaml files of a group."""
    folders = [Path(d) / group for d in (conf_dir(), *config_dirs)]
    found = {str(f.relative_to(d).with_suffix("")) for d in folders if d.is_dir() for f in d.rglob("*.yaml")}
    return sorted(name.replace("\\", "/") for name in found)


def _cell(chosen: dict[str, str], *, sweep: bool, to_run: bool, tolerant: bool) -> tuple[Cell, set[str]]:
    """The cell of one point of a product, and the axes that it does not have."""
    groups = tuple(f"{k}={v}" for k, v in chosen.items() if k in CHOICES)
    for name in chosen:
        if "/" in name or (name not in CHOICES and "." not in name and name not in fields_of(Run)):
            raise BadInput(f"{name}: no such key or group{_suggest(name)}")
    base, groups, _ = _base(groups)
    values = {k: v for k, v in chosen.items() if k not in CHOICES}
    dropped = {k for k in values if not _has(base, k)}
    for name in dropped:
        if not sweep or name.split(".")[0] not in GROUPS:
            raise BadInput(_no_such_key(base, name))
    assignments = [f"{k}={v}" for k, v in values.items() if k not in dropped]
    overrides, config = (*groups, *assignments), _composed(_resolve(base, assignments))
    config = _grouped(config, chosen.get("experiment"))
    try:
        return _named(overrides, validate(config, complete=to_run), to_run), dropped
    except BadInput as error:
        if not tolerant:
            raise
        cell = _named(overrides, validate(config, complete=False), to_run=False)
        return cell._replace(problem=str(error)), dropped


def _has(base: DictConfig, name: str) -> bool:
    node: Any = base
    for part in name.split("."):
        if not OmegaConf.is_dict(node):
            return False
        if part not in node.keys():  # `in` denies required keys without a value
            return OmegaConf.is_struct(node) is False  # a mapping whose keys are the user's
        node = node._get_node(part)
    return True


def _no_such_key(base: DictConfig, name: str) -> str:
    group = name.split(".", 1)[0]
    if group not in GROUPS:
        return f"{name}: no such key{nearest(name, [*GROUPS, *fields_of(Run)])}"
    if group not in base:
        return (
            f"{name}: no such key for study={base.study.name}, which trains nothing"
            if is_study(base)
            else (f"{name}: there is no study; choose one of {', '.join(members('study', _search_path))}")
        )
    keys = [f"{group}.{k}" for k in base[group] if k != "_target_"]
    return f"{name}: no such key for {group}={base[group].get('name', group)}{nearest(name, keys)}"


def _suggest(name: str) -> str:
    """A hint for a name that is neither a group nor a key outside the groups."""
    full = [key for key in all_keys() if key.endswith(f".{name}")]
    return f"; did you mean '{full[0]}'?" if full else nearest(name, [*CHOICES, *fields_of(Run)])


def all_keys() -> list[str]:
    """The keys of all members of all groups."""
    schemas = [(g, s) for g, members in MEMBERS.items() for s in members.values()] + list(SINGLE.items())
    return list(dict.fromkeys(f"{group}.{name}" for group, schema in schemas for name in fields_of(schema)))


def _resolve(base: DictConfig, assignments: Sequence[str]) -> Config:
    """The composed configuration with values set, as plain data."""
    config = OmegaConf.create(OmegaConf.to_container(base, resolve=False))
    try:
        for override in OverridesParser.create().parse_overrides(list(assignments)):
            value = override.value()
            merge = isinstance(value, dict) and OmegaConf.is_dict(OmegaConf.select(config, override.key_or_group))
            OmegaConf.update(config, override.key_or_group, value, merge=merge)  # mappings as Hydra does
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise BadInput(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items() if k not in ("hydra", *OF_EXPERIMENT)}


def _composed(config: Config) -> Config:
    """The configuration with the sections that one of its members takes from further yaml files.

    A study has none of training's groups.
    """
    if is_study(config):
        return {k: v for k, v in config.items() if k not in GROUPS or k in groups_of(config)}
    dataset = config["dataset"]
    return config | {"dataset": member_of("dataset", dataset).composed(dataset, _dataset)}


def _grouped(config: Config, experiment: str | None) -> Config:
    """The configuration whose W&B group is the experiment's name, unless it has a group or there is no experiment."""
    logger = config["logger"]
    if logger["group"] is not None or experiment in (None, "null"):
        return config
    return config | {"logger": logger | {"group": experiment}}


@lru_cache(maxsize=64)
def _dataset(name: str, key: str) -> Config:
    """The section of a data set as its yaml file has it, not to be changed; `key` is what names it."""
    known = members("dataset", _search_path)
    if name not in known:
        raise BadInput(f"{key}: no dataset '{name}'{nearest(name, known)}")
    section = OmegaConf.to_container(_compose((f"dataset={name}",)).dataset, resolve=True)
    assert isinstance(section, dict)
    return {str(k): v for k, v in section.items()}


def from_composed(config: DictConfig, config_dirs: Sequence[str] = (), experiment: str | None = None) -> Cell:
    """The cell of a configuration that Hydra composed (as in a launcher's job).

    Args:
        config: see above.
        config_dirs: Hydra's folders of further groups.
        experiment: the experiment that Hydra composed, if any.
    """
    with _composer(config_dirs):
        return _named((), validate(_grouped(_composed(_resolve(config, ())), experiment)))


# ---- names -------------------------------------------------------------------------------------------------------


def _data_hash(config: Config) -> str:
    """Names the data by their contents; empty for a study, which draws its own."""
    return "" if is_study(config) else member_of("dataset", config["dataset"]).data_hash(config["dataset"])


def _contents(config: Config) -> dict[str, str]:
    """Content hashes of the source files that a run's factories lie in."""
    found = [(path, member_of(group, section), section) for path, group, section in sections(config)]
    return {f"{path}.content": schema.content(section) for path, schema, section in found if hasattr(schema, "content")}


def _named(overrides: Sequence[str], config: Config, to_run: bool = True) -> Cell:
    data_hash, contents = (_data_hash(config), _contents(config)) if to_run else ("", {})
    needs = _needs(config) if to_run else ()
    if needs:
        contents["needs"] = " ".join(need.sha256 if isinstance(need, Given) else need.train_id for need in needs)
    train, test = identity(config, data_hash, contents)
    return Cell(tuple(overrides), config, _hash([train, test]), _hash([train]), data_hash, needs)


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


def identity(config: Config, data_hash: str, contents: dict[str, str] | None = None) -> tuple[Config, Config]:
    """What names a run: the `train` and the `test` keys that differ from their declared defaults.

    Epochs and targets of all members enter, the data's content hash in place of its path, and the content hashes of
    source files that keys name.
    """
    found: dict[str, Config] = {"train": {"dataset.data": data_hash, "engine.epoch": Run.epoch}, "test": {}, "none": {}}
    found["train"] |= contents or {}
    for name, field in fields_of(Run).items():
        _note(found, name, field.key, config[name], field.default)
    for path, group, section in sections(config):
        schema = member_of(group, section)
        if "_target_" in section:
            found["train"][f"{path}._target_"] = section["_target_"]
        found["train"][f"{path}.epoch"] = schema.epoch
        for name, field in fields_of(schema).items():
            if name != "root" and not field.key.sections:
                _note(found, f"{path}.{name}", field.key, section[name], field.default)
    return found["train"], found["test"]


def _note(found: dict[str, Config], path: str, key: Key, value: Any, default: Any) -> None:
    if key.first_touches is not None and value[:1] != default[:1]:
        found[key.first_touches][f"{path}.0"] = value[0]
    if value != default:
        found[key.touches][path] = value


def _hash(value: Any) -> str:
    return config_hash(value)[:12]


def config_hash(value: Any) -> str:
    """sha256 of the canonical JSON of plain data, 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
