"""Which schema belongs to which `_target_`, and how Hydra gets the defaults."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from metalearn.schema import algorithms, datasets, groups, mixture, own_data, parts, studies
from metalearn.schema.keys import BadInput, fields_of

MEMBERS: dict[str, dict[str, type]] = {
    "algorithm": {s.target: s for s in algorithms.ALGORITHMS},
    "dataset": {s.target: s for s in (*datasets.DATASETS, *own_data.DATASETS, *mixture.DATASETS)},
    "sampler": {s.target: s for s in parts.SAMPLERS},
    "backbone": {s.target: s for s in parts.BACKBONES},
    "regularizer": {s.target: s for s in parts.REGULARIZERS},
    "optimizer": {s.target: s for s in parts.OPTIMIZERS},
    "study": {s.target: s for s in studies.STUDIES},
}
"""Groups whose members have schemas of their own, by `_target_`."""

SINGLE: dict[str, type] = {"trainer": groups.Trainer, "evaluation": groups.Evaluation, "logger": groups.Logger}
"""Groups with one schema."""

GROUPS = (*MEMBERS, *SINGLE)
OF_STUDY = ("study", "logger")
"""The groups of a run that is a study."""
OF_TRAINING = tuple(g for g in GROUPS if g != "study")
"""The groups of a run that trains."""


def groups_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The groups that a run's configuration has."""
    return OF_STUDY if is_study(config) else OF_TRAINING


def is_study(config: Mapping[str, Any]) -> bool:
    """Whether a run is a study, which trains nothing and has no groups of training."""
    return config.get("study") is not None


def subject(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a run is about, in names: its algorithm and data set, or its study."""
    return tuple(config[group]["name"] for group in (("study",) if is_study(config) else ("algorithm", "dataset")))


def member_of(group: str, config: dict[str, Any]) -> Any:
    """The schema class of a group's composed configuration."""
    if group in SINGLE:
        return SINGLE[group]
    target = str(config.get("_target_"))
    if target not in MEMBERS[group]:
        raise BadInput(f"{group}._target_={target}: must be one of {', '.join(MEMBERS[group])}")
    return MEMBERS[group][target]


def sections(config: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, group and content of all members' sections of a run, those inside others included."""
    for group in groups_of(config):
        yield from _within(group, group, config[group])


def _within(path: str, group: str, section: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield path, group, section
    for name, field in fields_of(member_of(group, section)).items():
        if field.key.sections:
            for label, part in section[name].items():
                yield from _within(f"{path}.{name}.{label}", field.key.sections, part)


@cache
def register() -> None:
    """Put every schema's defaults where yaml files find them: `/schema/<group>/<name>`."""
    store = ConfigStore.instance()
    for group, members in MEMBERS.items():
        for target, schema in members.items():
            name = target.rsplit(".", 1)[1].lower()
            store.store(group=f"schema/{group}", name=name, node={"_target_": target} | _defaults(schema))
    for group, schema in SINGLE.items():
        store.store(group=f"schema/{group}", name=group, node=_defaults(schema))
    store.store(group="schema", name="run", node=_defaults(groups.Run))
    store.store(group="hydra/sweeper", name="cells", node={"_target_": "metalearn.sweeper.CellSweeper"})
    ConfigStore.__deepcopy__ = _itself  # type: ignore[attr-defined]


def _itself(store: ConfigStore, memo: dict[int, Any]) -> ConfigStore:
    """For each composition Hydra copies the store, a singleton of which it changes nothing: a quarter of the time."""
    return store


def _defaults(schema: type) -> dict[str, Any]:
    assert dataclasses.is_dataclass(schema)
    defaults = {name: field.default for name, field in fields_of(schema).items()}
    # a mapping's own keys are the user's
    return {k: DictConfig(v, flags={"struct": False}) if isinstance(v, dict) else v for k, v in defaults.items()}
