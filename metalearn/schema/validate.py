"""Check a whole composed configuration, and normalise its values to their declared types."""

from collections.abc import Iterator
from typing import Any

from metalearn.schema.groups import Run
from metalearn.schema.keys import BadInput, Field, fields_of, nearest, show
from metalearn.schema.registry import GROUPS, groups_of, is_study, member_of

Config = dict[str, Any]


def validate(config: Config, *, complete: bool = True) -> Config:
    """The configuration with every value in its declared type.

    Args:
        config: the composed configuration.
        complete: whether required keys must have a value.

    Raises:
        BadInput: for the first key, value or combination that cannot be.
    """
    out: Config = _section("", fields_of(Run), {k: v for k, v in config.items() if k not in GROUPS}, complete)
    for group in groups_of(config):
        out[group] = _member(f"{group}.", group, config[group], complete)
    for problem in _of_study(out) if is_study(out) else _combinations(out):
        raise BadInput(problem)
    return out


def _member(prefix: str, group: str, section: Config, complete: bool) -> Config:
    """A member's section, in which every key has a value of its type, its `_target_` first."""
    schema = member_of(group, section)
    target = {"_target_": schema.target} if hasattr(schema, "target") else {}
    return target | _section(prefix, fields_of(schema), {k: v for k, v in section.items() if k != "_target_"}, complete)


def _section(prefix: str, fields: dict[str, Field], values: Config, complete: bool) -> Config:
    for name in values:
        if name not in fields:
            raise BadInput(f"{prefix}{name}: no such key{nearest(prefix + name, [prefix + f for f in fields])}")
    out = {}
    for name, field in fields.items():
        value = values.get(name, field.default)
        out[name] = value if field.lacks(value) and not complete else field.check(prefix + name, value)
        if group := field.key.sections:
            parts = out[name].items()
            out[name] = {label: _member(f"{prefix}{name}.{label}.", group, part, complete) for label, part in parts}
    return out


def _of_study(run: Config) -> Iterator[str]:
    """Why this study cannot be, if it cannot."""
    yield from member_of("study", run["study"]).problems(run["study"])


def _combinations(run: Config) -> Iterator[str]:
    """Why this run cannot be, if it cannot."""
    algorithm, dataset = member_of("algorithm", run["algorithm"]), member_of("dataset", run["dataset"])
    backbone = member_of("backbone", run["backbone"])
    name, source = run["algorithm"]["name"], run["dataset"]["name"]
    if not dataset.is_known(run["dataset"]):
        return
    yield from dataset.problems(run["dataset"])
    kind = dataset.kind_of(run["dataset"])
    if kind not in algorithm.kinds:
        yield f"algorithm={name}: only for {' and '.join(algorithm.kinds)}, and dataset={source} is {kind}"
    if dataset.side_known(run["dataset"]):
        yield from backbone.problems(run["backbone"], dataset.side(run["dataset"]))
    yield from algorithm.problems(run["algorithm"], run)
    test_way = run["dataset"].get("test_way")
    if algorithm.keeps_head(run["algorithm"]) and test_way not in (None, run["dataset"].get("way")):
        yield (
            f"dataset.test_way={test_way}: must equal dataset.way={run['dataset']['way']}, "
            f"because the head that {name} learns has that many outputs"
        )
    trainer = run["trainer"]
    if trainer["meta_batch_size"] % trainer["devices"]:
        yield (
            f"trainer.devices={trainer['devices']}: must divide trainer.meta_batch_size={trainer['meta_batch_size']}"
        )
    for key in ("val_episodes", "test_episodes"):  # each process has some: one without would not take part in gathering
        if trainer[key] < trainer["devices"]:
            yield f"trainer.{key}={trainer[key]}: must be >= trainer.devices={trainer['devices']}"
    if run["algorithm"].get("serial") and trainer["devices"] > 1:
        yield f"trainer.devices={trainer['devices']}: must be 1 with algorithm.serial=true"
    modes = run["evaluation"]["bn_modes"]
    if not modes or len(set(modes)) < len(modes):
        yield f"evaluation.bn_modes={show(modes)}: must name at least one mode, and none twice"
