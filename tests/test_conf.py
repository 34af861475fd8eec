"""Every yaml composes, validates and instantiates (experiments: test_experiments); schemas and constructors agree."""

import inspect
import math
import re
import typing
from importlib import import_module
from pathlib import Path

import own_data
import pytest
import yaml
from small_data import small_files

from metalearn import composing
from metalearn.cells import expand
from metalearn.composing import members
from metalearn.paths import conf_dir
from metalearn.run import NOT_ARGUMENTS, build, build_data, build_learner
from metalearn.schema import GROUPS, MEMBERS, fields_of, is_study
from metalearn.schema.groups import Run
from metalearn.schema.registry import SINGLE
from metalearn.studies import Study

PLAIN = yaml.safe_load(Path(conf_dir(), "config.yaml").read_text())["defaults"]
CHOICES = [(group, name) for group in composing.CHOICES if group != "experiment" for name in members(group)]
TYPES = [(group, schema) for group, found in MEMBERS.items() for schema in found.values()]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What else the data sets that read files need: small ones, that pass for the published until pictures are read."""
    folder = tmp_path_factory.mktemp("data")
    with small_files(folder) as roots:
        yield {
            **{name: [f"dataset.root={root}", "dataset.checksum=off"] for name, root in roots.items()},
            "folder": [f"dataset.root={own_data.pictures(folder / 'pictures', classes=30, count=20, side=8)}"],
            "arrays": [f"dataset.root={own_data.classes(folder / 'x.npz', classes=30, count=20, shape=(3, 16, 12))}"],
            "torchmeta_regression": ["dataset.factory=test_torchmeta:lines", "dataset.shot=1", "dataset.queries=2"],
            "torchmeta_tasks": ["dataset.factory=test_torchmeta:blobs", "dataset.way=3"],
            "torchmeta_classes": ["dataset.factory=test_torchmeta:levels", "dataset.way=2", "dataset.queries=2"],
            "arrays_regression": [f"dataset.root={own_data.lines(folder / 'y.npz', tasks=20, count=10)}"],
        }


def placed(arguments: list[str], places: dict[str, list[str]], file: Path) -> list[str]:
    """The arguments with those that their data set, or that of a member's file, needs to be found."""
    names = re.findall(r"\bdataset[:=] ?(\w+)", " ".join(arguments)) or re.findall(r"/dataset: (\w+)", file.read_text())
    return [*arguments, *(places.get(names[-1], []) if names else [])]


def legal(group: str, name: str) -> list[str]:
    """A run that this member of a group can be part of; none of its own if the plain run has it."""
    if {group: name} in PLAIN:
        return []
    if group == "dataset_algorithm":
        (dataset,) = (d for d in members("dataset") if name.startswith(f"{d}_"))
        return [f"dataset={dataset}", f"algorithm={name.removeprefix(f'{dataset}_')}"]
    if group == "backbone" and name.startswith("mlp"):
        return [f"backbone={name}", "dataset=sinusoid"]
    if name == "arrays_regression" or name.startswith("torchmeta_"):
        return [f"dataset={name}", "backbone=mlp"]
    if (group, name) == ("backbone", "module"):
        return [f"backbone={name}", "backbone.factory=test_module:flat"]
    if (group, name) == ("dataset", "mixture"):
        return ["dataset=mixture", "dataset.members=[glyphs,group_glyphs]"]
    return [f"{group}={name}"]


def covering(names: list[str]) -> list[str]:
    """Pairs of data set and algorithm in which each of the two is found once at least."""
    kept, seen = [], set()
    for name in names:
        parts = {part for part in legal("dataset_algorithm", name)}
        if parts - seen:
            kept.append(name)
        seen |= parts
    return kept


PAIRS = members("dataset_algorithm")
SLOW_PAIRS = set(PAIRS) - set(covering(PAIRS))


def marked(value, slow):
    """A parameter, of the slow tests if so."""
    return pytest.param(*value, marks=pytest.mark.slow) if slow else pytest.param(*value)


@pytest.mark.parametrize(
    ("group", "name"),
    [marked(c, c[0] == "dataset_algorithm" and c[1] in SLOW_PAIRS) for c in CHOICES],
    ids=map("-".join, CHOICES),
)
def test_every_yaml_composes_and_instantiates(group, name, places):
    for cell in expand(placed(legal(group, name), places, Path(conf_dir(), group, f"{name}.yaml"))):
        if group == "dataset_algorithm":
            assert f"{group}={name}" in cell.overrides
        elif "name" in cell.config.get(group, {}):
            assert cell.config[group]["name"] == name
        if is_study(cell.config):
            assert isinstance(build("study", cell.config["study"]), Study)
            continue
        dataset = build("dataset", cell.config["dataset"])
        assert dataset.data_hash() == cell.data_hash
        learner = build_learner(cell.config, dataset)
        assert dataset.kind in learner.kinds and learner.configure_optimizers().param_groups
        assert build_data(cell.config, dataset).sampler.tasks(4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [marked((name,), name in SLOW_PAIRS) for name in PAIRS])
def test_keys_that_a_departures_comment_offers_can_be_set(name, places):
    """The authors' values, and those for other ways and shots, all at once."""
    file = Path(conf_dir(), "dataset_algorithm", f"{name}.yaml")
    comment = [x for x in file.read_text().splitlines() if x[0] == "#"]
    keys = re.findall(r"\w+\.\w+=[\w.]*\w", " ".join(comment))
    arguments = placed(legal("dataset_algorithm", name), places, file)
    (plain,), (changed,) = (expand([*arguments, *more]) for more in ([], keys))
    assert (plain.train_id == changed.train_id) == (not keys)


def test_every_group_has_members_and_every_folder_is_a_group():
    folders = {path.name for path in Path(conf_dir()).iterdir() if path.is_dir()}
    assert folders <= {*composing.CHOICES, "table", "hydra"} and set(GROUPS) <= {group for group, _ in CHOICES}


def constructor(schema) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a schema's class, with those that it hands on to its bases."""
    module, name = schema.target.rsplit(".", 1)
    found: dict[str, inspect.Parameter] = {}
    for base in getattr(import_module(module), name).__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters
            hints = typing.get_type_hints(base.__init__)
            found = {k: p.replace(annotation=hints.get(k)) for k, p in parameters.items()} | found
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return {name: p for name, p in found.items() if p.kind is p.KEYWORD_ONLY}


GIVEN = {  # by `build_learner`
    "backbone": {"input_shape", "outputs"},
    "algorithm": {"net", "kind", "regularizer", "chunk_bytes", "recompute", "combine", "seed"},
}


@pytest.mark.parametrize(("group", "schema"), TYPES, ids=lambda v: getattr(v, "__name__", v))
def test_keys_are_the_constructors_arguments(group, schema):
    keys = fields_of(schema).keys() - set(NOT_ARGUMENTS)
    arguments = constructor(schema)
    assert keys <= arguments.keys()
    assert arguments.keys() - keys - GIVEN.get(group, set()) == getattr(schema, "keyless", set())
    required = {name for name, p in arguments.items() if p.default is p.empty}
    assert required <= keys | GIVEN.get(group, set())


@pytest.mark.parametrize(("group", "schema"), TYPES, ids=lambda v: getattr(v, "__name__", v))
def test_choices_are_those_of_the_constructor(group, schema):
    fields = fields_of(schema)
    for name, parameter in constructor(schema).items():
        if name in fields and typing.get_origin(parameter.annotation) is typing.Literal:
            assert set(typing.get_args(parameter.annotation)) == set(fields[name].key.choices), name


@pytest.mark.parametrize("schema", [Run, *(s for _, s in TYPES), *SINGLE.values()], ids=lambda s: s.__name__)
def test_every_key_is_documented_and_allows_its_default(schema):
    for name, field in fields_of(schema).items():
        assert len(field.key.doc) > 5 and not field.key.doc.endswith("."), name
        if not field.key.required:
            assert field.check(name, field.default) == field.default
        assert field.key.touches in ("train", "test", "none")


@pytest.mark.parametrize(("group", "schema"), TYPES, ids=lambda v: getattr(v, "__name__", v))
def test_schemas_know_what_their_classes_say(group, schema):
    module, name = schema.target.rsplit(".", 1)
    cls = getattr(import_module(module), name)
    for attribute in ("kind", "kinds", "needs_head"):
        if hasattr(schema, attribute):
            assert getattr(schema, attribute) == getattr(cls, attribute)


SINE, OMNIGLOT, MINI, CIFAR = (1,), (1, 28, 28), (3, 84, 84), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "affine", "count"),
    [
        ("mlp_sine", SINE, 1, None, 1_761),
        ("mlp_reptile", SINE, 1, None, 4_353),
        ("conv4_omniglot", OMNIGLOT, 5, "none", 111_749),
        ("conv4_reptile", OMNIGLOT, 5, "none", 112_709),
        ("conv4_mini", MINI, 5, "full", 32_901),
        ("conv4_mini", MINI, 5, "none", 32_645),
        ("conv4_cifarfs", CIFAR, 5, "none", 28_805),
        ("conv4_proto", OMNIGLOT, 0, "none", 111_424),
        ("conv4_proto", OMNIGLOT, 0, "full", 111_936),
    ],
)
def test_parameter_counts(name, shape, outputs, affine, count):
    """The published sizes of the networks."""
    (cell,) = expand(legal("backbone", name))
    section = cell.config["backbone"] | ({} if affine is None else {"bn_affine": affine})
    net = build("backbone", section, input_shape=shape, outputs=outputs)
    assert sum(math.prod(shape) for shape in net.shapes().values()) == count
