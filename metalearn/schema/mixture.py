"""Keys of `mixture`, whose members are data sets with keys of their own."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from metalearn.schema.datasets import Config, Dataset, not_a_set, size_keys
from metalearn.schema.keys import BadInput, fields_of, key, nearest, show

SHARED = ("way", "shot", "queries", "test_way", "test_shot", "test_queries", "label_assignment", "seed")
"""Keys that hold for all members."""


def member_of(group: str, section: Config) -> Any:
    """As `metalearn.schema.registry.member_of`, which imports this module."""
    from metalearn.schema import registry

    return registry.member_of(group, section)


@dataclass
class Mixture(Dataset):
    """metalearn.datasets.mixture.Mixture."""

    target: ClassVar[str] = "metalearn.datasets.mixture.Mixture"
    training_only: ClassVar[tuple[str, ...]] = ("label_assignment", "weights")

    members: list[str] = key(..., "data sets, each a group, by the names of their files in conf/dataset")
    arguments: dict = key(  # type: ignore[type-arg]
        {},
        "keys of single members, as dataset.arguments.omniglot.root=<folder>; arguments.<member>.dataset says which "
        "data set a member is whose name is none",
        sections="dataset",
    )
    weights: list[float] = key(
        [], "odds of the members in training; [] for equal ones (validation and test take turns)", ge=0
    )
    seed: int | None = key(None, "seed of all members; null for each one's own", ge=0, lt=2**31)  # type: ignore[assignment]
    way: int | None = key(None, "classes of a training task (N); null for the members' own", ge=2)
    shot: int | None = key(None, "support examples (of a class) in training; null for the members' own", ge=1)
    queries: int | None = key(None, "query examples (of a class) in training; null for the members' own", ge=1)
    test_way: int | None = key(None, "classes of a validation or test task; null for the members' own", ge=2)
    test_shot: int | None = key(
        None, "support examples (of a class) in validation and test; null for the members' own", ge=1
    )
    test_queries: int | None = key(
        None, "query examples (of a class) in validation and test; null for the members' own", ge=1
    )
    label_assignment: str | None = key(
        None,
        "labels of a training task's classes, see the members; null for their own",
        choices=("mutually_exclusive", "fixed_label"),
    )

    @classmethod
    def composed(cls, dataset: Config, compose: Callable[[str, str], Config]) -> Config:
        """The section with the complete sections of all members, and with the shared keys on which they agree.

        A section among the arguments that has its `_target_` (in a yaml file of one's own, or composed here before) is
        complete already.

        Args:
            dataset: the section as composed.
            compose: the composed section of a data set, and the key that names it for errors.

        Raises:
            BadInput: for members and arguments that cannot be.
        """
        fields = fields_of(cls)
        if fields["members"].lacks(dataset["members"]):
            return dataset
        names = fields["members"].check("dataset.members", dataset["members"])
        arguments = fields["arguments"].check("dataset.arguments", dataset["arguments"])
        for name in arguments:
            if name not in names:
                raise BadInput(f"dataset.arguments.{name}: no such member{nearest(str(name), names)}")
        given = {k: dataset[k] for k in SHARED if dataset.get(k) is not None}
        parts = {name: cls._part(name, arguments.get(name) or {}, given, compose) for name in names}
        return dataset | {"arguments": parts} | _agreed(parts)

    @classmethod
    def _part(cls, name: str, own: Any, given: Config, compose: Callable[[str, str], Config]) -> Config:
        """The complete section of a member from its own arguments and the shared keys that are given."""
        path = f"dataset.arguments.{name}"
        if not re.fullmatch(r"\w+", name, re.ASCII):
            raise BadInput(f"dataset.members: '{name}' must be of letters, digits and underscores, as it names a group")
        if not isinstance(own, dict):
            raise BadInput(f"{path}={show(own)}: must be a mapping of the member's keys")
        part = own
        if "_target_" not in own:
            for k in given.keys() & own.keys():
                if own[k] != given[k]:
                    raise BadInput(f"{path}.{k}={show(own[k])}: dataset.{k}={show(given[k])} holds for all members")
            which, where = (own["dataset"], f"{path}.dataset") if "dataset" in own else (name, "dataset.members")
            part = compose(str(which), where) | {k: v for k, v in own.items() if k != "dataset"}
        schema = member_of("dataset", part)
        if schema is cls:
            raise BadInput(f"dataset.members: {name} is a mixture itself; name its members here instead")
        for k in given.keys() - fields_of(schema).keys():
            raise BadInput(f"dataset.{k}={show(given[k])}: {name} has no such key")
        return part | given

    @classmethod
    def is_known(cls, dataset: Config) -> bool:
        return not fields_of(cls)["members"].lacks(dataset["members"])

    @classmethod
    def kind_of(cls, dataset: Config) -> str:
        _, schema, part = _parts(dataset)[0]
        return schema.kind_of(part)

    @classmethod
    def side_known(cls, dataset: Config) -> bool:
        return any(schema.side_known(part) for _, schema, part in _parts(dataset))

    @classmethod
    def side(cls, dataset: Config) -> int | None:
        return next(schema.side(part) for _, schema, part in _parts(dataset) if schema.side_known(part))

    @classmethod
    def problems(cls, dataset: Config) -> Iterator[str]:
        members, weights = dataset["members"], dataset["weights"]
        yield from not_a_set("dataset.members", members, "data set")
        if weights and (len(weights) != len(members) or not sum(weights)):
            yield f"dataset.weights={show(weights)}: must be one for each of {len(members)} members, and not all 0"
        yield from _disagreements(dataset)
        for name, schema, part in _parts(dataset):
            yield from (_rename(name, problem) for problem in schema.problems(part))

    @classmethod
    def data_hash(cls, dataset: Config) -> str:
        from metalearn.datasets.archives import combined_hash

        hashes = []
        for name, schema, part in _parts(dataset):
            try:
                hashes.append(schema.data_hash(part))
            except BadInput as error:
                raise BadInput(_rename(name, str(error))) from None
        return combined_hash(*hashes)

    @classmethod
    def versions(cls, dataset: Config) -> dict[str, str]:
        return {f"{name}.{k}": v for name, schema, part in _parts(dataset) for k, v in schema.versions(part).items()}


def _parts(dataset: Config) -> list[tuple[str, Any, Config]]:
    """Name, schema and section of each member, in order."""
    parts = dataset["arguments"]
    return [(name, member_of("dataset", parts[name]), parts[name]) for name in dataset["members"]]


def _agreed(parts: dict[str, Config]) -> Config:
    """The shared keys that have one value in all sections."""
    found = {k: [part.get(k) for part in parts.values()] for k in SHARED}
    return {k: values[0] for k, values in found.items() if values and all(v == values[0] for v in values)}


def _disagreements(dataset: Config) -> Iterator[str]:
    """Why the members' episodes cannot be stacked."""
    parts = _parts(dataset)
    kinds = {name: schema.kind_of(part) for name, schema, part in parts}
    sides = {name: schema.side(part) for name, schema, part in parts if schema.side_known(part)}
    for what, found, unit in (("kind", kinds, ""), ("size of pictures", sides, " pixels")):
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name} {show(value)}{unit}" for name, value in found.items())
            yield f"dataset.members={show(dataset['members'])}: must be of one {what}, and are of several ({listed})"
    for split, prefix in (("train", ""), ("test", "test_")):
        for size in ("way", "shot", "queries"):
            values = {name: part[keys[size]] for name, _, part in parts if size in (keys := size_keys(part, split))}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{name} {value}" for name, value in values.items())
                yield f"dataset.{prefix}{size}: members disagree ({listed}); set dataset.{prefix}{size} for all of them"


def _rename(name: str, message: str) -> str:
    """A member's message with its keys as the mixture has them."""
    return re.sub(rf"\bdataset\.(?!(?:{'|'.join(SHARED)})\b)", f"dataset.arguments.{name}.", message)


DATASETS = (Mixture,)
