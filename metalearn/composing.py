"""Hydra's composition: configurations from chosen members and values, cached for sweeps. Imports no torch."""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from metalearn.paths import conf_dir
from metalearn.schema import GROUPS, MEMBERS, BadInput, fields_of, groups_of, is_study, member_of, nearest, register
from metalearn.schema.groups import Run
from metalearn.schema.registry import SINGLE

Config = dict[str, Any]
OPTIONAL = ("study", "experiment", "dataset_algorithm")
CHOICES = tuple(dict.fromkeys((*GROUPS, *OPTIONAL)))
OF_EXPERIMENT = ("grid", "sizes", "shows")
"""What an experiment's file says besides groups and keys."""


class composer:
    """Hydra's compose for the duration of a block, restoring whatever was initialised before.

    What was composed is kept from block to block, until a yaml file of these folders has changed.
    """

    _seen: tuple[Any, ...] = ()

    def __init__(self, config_dirs: Sequence[str]):
        self.dirs = [str(Path(d).resolve()) for d in config_dirs]

    def __enter__(self) -> None:
        register()
        self.before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        initialize_config_dir(conf_dir(), version_base="1.3")
        search_path.clear()
        search_path.extend(self.dirs)
        if (seen := tuple(_files(conf_dir(), *self.dirs))) != composer._seen:
            forget()
            composer._seen = seen

    def __exit__(self, *_: object) -> None:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = self.before


search_path: list[str] = []


def _files(*folders: str) -> Iterator[tuple[str, int, int]]:
    """Every yaml file below folders, with what changes when it is written."""
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                if name.endswith(".yaml"):
                    about = os.stat(os.path.join(place, name))
                    yield os.path.join(place, name), about.st_mtime_ns, about.st_size


def forget() -> None:
    """Drop what was composed; for whoever changes schemas, which no file shows."""
    base_of.cache_clear()
    dataset_section.cache_clear()


class Base(NamedTuple):
    """A configuration before any key is set, the complete choice of members, and what all groups have without it."""

    config: DictConfig
    choices: tuple[str, ...]
    chosen: dict[str, str | None]


@lru_cache(maxsize=512)
def base_of(choices: tuple[str, ...]) -> Base:
    """The configuration of a choice of members.

    A paper's departures for a pair of data set and algorithm (`dataset_algorithm/<dataset>_<algorithm>`) are chosen
    here, because Hydra does not let an interpolated group override others.
    """
    for choice in choices:
        group, name = choice.split("=", 1)
        known = members(group, search_path)
        if name not in known and not (name == "null" and group in OPTIONAL):
            raise BadInput(f"{group}={name}: no such {group}{nearest(name, known)}")
    given = any(c.startswith("dataset_algorithm=") for c in choices)
    choices = tuple(c for c in choices if not c.endswith("=null"))
    experiment = tuple(c for c in choices if c.startswith("experiment="))
    config = None
    if choices == experiment:
        config = composed(choices)
        chosen = dict(config.hydra.runtime.choices)
    else:  # composing takes long: what this choice leaves open is the same for all of an experiment's cells
        chosen = base_of(experiment).chosen | {k: v for k, v in (c.split("=", 1) for c in choices)}
    special = f"{chosen['dataset']}_{chosen['algorithm']}"
    given = given or chosen["study"] is not None or chosen["dataset_algorithm"] is not None
    if not given and special in members("dataset_algorithm", search_path):
        choices, config = (*choices, f"dataset_algorithm={special}"), None
    config = composed(choices) if config is None else config
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
    with composer(config_dirs):
        return composed(tuple(overrides)).hydra


def composed(choices: tuple[str, ...]) -> DictConfig:
    """What Hydra makes of a choice of members, with its own section.

    Raises:
        BadInput: for whatever Hydra does not accept.
    """
    places = ",".join(QuotedString(text=f"file://{d}", quote=Quote.single).with_quotes() for d in search_path)
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


def preset(experiment: str, key: str, config_dirs: Sequence[str] = ()) -> Any:
    """What an experiment's file says under one of `OF_EXPERIMENT`; None if it says nothing there."""
    with composer(config_dirs):
        return preset_of(experiment, key)


def preset_of(experiment: str, key: str) -> Any:
    """As `preset`, inside a `composer`."""
    found = base_of((f"experiment={experiment}",)).config.get(key)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def has(base: DictConfig, name: str) -> bool:
    """Whether a configuration has a key, with or without a value."""
    node: Any = base
    for part in name.split("."):
        if not OmegaConf.is_dict(node):
            return False
        if part not in node.keys():  # `in` denies required keys without a value
            return OmegaConf.is_struct(node) is False  # a mapping whose keys are the user's
        node = node._get_node(part)
    return True


def no_such_key(base: DictConfig, name: str) -> str:
    """The message for a key that a configuration does not have."""
    group = name.split(".", 1)[0]
    if group not in GROUPS:
        return f"{name}: no such key{nearest(name, [*GROUPS, *fields_of(Run)])}"
    if group not in base:
        return (
            f"{name}: no such key for study={base.study.name}, which trains nothing"
            if is_study(base)
            else (f"{name}: there is no study; choose one of {', '.join(members('study', search_path))}")
        )
    keys = [f"{group}.{k}" for k in base[group] if k != "_target_"]
    return f"{name}: no such key for {group}={base[group].get('name', group)}{nearest(name, keys)}"


def suggestion(name: str) -> str:
    """A hint for a name that is neither a group nor a key outside the groups."""
    full = [key for key in all_keys() if key.endswith(f".{name}")]
    return f"; did you mean '{full[0]}'?" if full else nearest(name, [*CHOICES, *fields_of(Run)])


def all_keys() -> list[str]:
    """The keys of all members of all groups."""
    schemas = [(g, s) for g, members in MEMBERS.items() for s in members.values()] + list(SINGLE.items())
    return list(dict.fromkeys(f"{group}.{name}" for group, schema in schemas for name in fields_of(schema)))


def resolved(base: DictConfig, assignments: Sequence[str]) -> Config:
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


def with_sections(config: Config) -> Config:
    """The configuration with the sections that one of its members takes from further yaml files.

    A study has none of training's groups.
    """
    if is_study(config):
        return {k: v for k, v in config.items() if k not in GROUPS or k in groups_of(config)}
    dataset = config["dataset"]
    return config | {"dataset": member_of("dataset", dataset).composed(dataset, dataset_section)}


def with_group(config: Config, experiment: str | None) -> Config:
    """The configuration whose W&B group is the experiment's name, unless it has a group or there is no experiment."""
    logger = config["logger"]
    if logger["group"] is not None or experiment in (None, "null"):
        return config
    return config | {"logger": logger | {"group": experiment}}


@lru_cache(maxsize=64)
def dataset_section(name: str, key: str) -> Config:
    """The section of a data set as its yaml file has it, not to be changed; `key` is what names it."""
    known = members("dataset", search_path)
    if name not in known:
        raise BadInput(f"{key}: no dataset '{name}'{nearest(name, known)}")
    section = OmegaConf.to_container(composed((f"dataset={name}",)).dataset, resolve=True)
    assert isinstance(section, dict)
    return {str(k): v for k, v in section.items()}
