"""From command lines to cells: products, names that last, and refusals that help."""

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
import tiny_omniglot
from hydra import compose
from hypothesis import given, settings
from hypothesis import strategies as st

from metalearn import cells, composing
from metalearn.cells import expand, from_composed
from metalearn.identity import identity
from metalearn.schema import MEMBERS, BadInput, fields_of, register
from metalearn.schema.algorithms import MAML
from metalearn.schema.datasets import Omniglot
from metalearn.schema.groups import Run
from metalearn.schema.keys import key
from metalearn.schema.registry import SINGLE

SINE = "dataset=sinusoid"


@pytest.fixture
def conf(tmp_path):
    """A user's folder of groups: `conf("experiment/x", text)` writes a file there and returns the folders."""

    def write(name: str, text: str) -> list[str]:
        path = tmp_path / "my conf, x=1" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return [str(tmp_path / "my conf, x=1")]

    return write


def one(*arguments: str, config_dirs=()) -> cells.Cell:
    (cell,) = expand(arguments, config_dirs)
    return cell


def test_the_overrides_of_a_cell_mean_it_alone(conf):
    """Products with equal values: a job that names a cell of one runs nothing of the other."""
    text = """# @package _global_
defaults:
  - override /dataset: sinusoid
grid:
  - {algorithm: [maml], algorithm.alpha: [0.1, 0.2]}
  - {algorithm: [maml], algorithm.inner_steps: [2, 3]}
"""
    folders = conf("experiment/mine", text)
    found = expand(["experiment=mine"], folders)
    assert len(found) == 4
    for cell in found:
        (again,) = expand(cell.overrides, folders, grid=False)
        assert again.cell_id == cell.cell_id


def ids(*arguments: str) -> tuple[str, str]:
    cell = one(*arguments)
    return cell.train_id, cell.cell_id


def values(found: list[cells.Cell], *paths: str) -> list[tuple]:
    """The values of these keys in each cell."""

    def at(config, path):
        return functools.reduce(lambda node, part: node[part], path.split("."), config)

    return [tuple(at(cell.config, path) for path in paths) for cell in found]


# ---- products ----------------------------------------------------------------------------------------------------


def test_choices_multiply_and_the_last_runs_fastest():
    found = expand([SINE, "algorithm=maml,fomaml", "seed=3,1,2"])
    expected = list(itertools.product(("maml", "fomaml"), (3, 1, 2)))
    assert values(found, "algorithm.name", "seed") == expected


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("seed=range(3)", [0, 1, 2]),
        ("seed=choice(2,0)", [2, 0]),
        ("seed=1,1,2,1", [1, 2]),
        ("seed=range(1,8,3)", [1, 4, 7]),
    ],
)
def test_ranges_and_repetitions(axis, expected):
    assert values(expand([SINE, axis]), "seed") == [(e,) for e in expected]


def test_values_that_change_no_number_make_no_cell():
    assert len(expand([SINE, "trainer.threads=1,2", "logger=csv,none"])) == 1


def test_an_axis_is_dropped_for_members_that_lack_it():
    found = expand([SINE, "algorithm=maml,reptile", "algorithm.inner_batch=5,null"])
    assert values(found, "algorithm.name") == [("maml",), ("reptile",), ("reptile",)]
    assert [c.config["algorithm"].get("inner_batch", "none") for c in found] == ["none", 5, None]
    assert "algorithm.inner_batch" not in " ".join(found[0].overrides)


def test_an_axis_that_no_member_has_is_refused():
    with pytest.raises(BadInput, match=r"algorithm.inner_batch: no member of this sweep has this key"):
        expand([SINE, "algorithm=maml,fomaml", "algorithm.inner_batch=5,6"])
    with pytest.raises(BadInput, match=r"algorithm.inner_stepz: .*did you mean 'algorithm.inner_steps'"):
        expand([SINE, "algorithm=maml,fomaml", "algorithm.inner_stepz=5,6"])


def test_later_arguments_win():
    assert one(SINE, "seed=1", "algorithm=reptile", "seed=2", "algorithm=maml").config["seed"] == 2


def test_departures_of_a_pair_are_taken_unless_declined_or_overridden():
    taken = one(SINE, "algorithm=reptile")
    assert taken.config["backbone"]["name"] == "mlp_reptile" and taken.config["trainer"]["meta_batch_size"] == 5
    assert taken.config["algorithm"]["inner_batch"] == 10
    mine = one(SINE, "algorithm=reptile", "backbone=mlp", "trainer.meta_batch_size=3")
    assert mine.config["backbone"]["name"] == "mlp" and mine.config["trainer"]["meta_batch_size"] == 3
    plain = one(SINE, "algorithm=reptile", "backbone=mlp", "dataset_algorithm=null")
    assert plain.config["trainer"]["meta_batch_size"] == 16
    assert plain.cell_id == one(*plain.overrides, "dataset_algorithm=null").cell_id


@pytest.fixture
def no_omniglot(monkeypatch):
    """Cells on Omniglot without its files."""
    monkeypatch.setattr(Omniglot, "data_hash", classmethod(lambda cls, dataset: "omniglot"))


def test_reptiles_headline_looks_at_one_query_at_a_time(no_omniglot):
    """Table 2 of Nichol et al. is not transductive; features are flattened, and the step curve is left out."""
    for arguments in ([], ["dataset=omniglot", "dataset.root=x"]):
        shown = one("algorithm=reptile", *arguments).config
        assert shown["evaluation"]["bn_modes"] == ["support_plus_one", "batch"]
        assert (shown["evaluation"]["steps"], shown["backbone"]["readout"]) == ("last", "flatten")
    assert one().config["evaluation"]["bn_modes"] == ["batch", "support_plus_one"]
    assert one("algorithm=reptile", "backbone=conv4_omniglot").config["backbone"]["readout"] == "mean"


def test_fomaml_has_an_inner_rate_of_its_own(no_omniglot):
    found = expand(["algorithm=maml,fomaml,anil", "dataset=omniglot", "dataset.root=x"])
    assert values(found, "algorithm.alpha") == [(0.4,), (0.1,), (0.4,)]


GRID = """# @package _global_
defaults:
  - override /dataset: sinusoid
  - override /backbone: mlp_reptile
trainer: {max_steps: 7}
logger: {project: "{a: 1}, it's"}
grid:
  - algorithm: [maml, reptile]
    algorithm.inner_batch: [5, null]
    seed: [0, 1]
  - dataset.variant: reptile
    optimizer.betas: [[0.5, 0.9]]
    logger.group: ["a b, c=1", "x"]
"""


def test_a_grid_is_a_list_of_products(conf):
    found = expand(["experiment=p/x"], conf("experiment/p/x", GRID))
    assert values(found, "algorithm.name", "seed", "dataset.variant", "optimizer.name") == [
        *(("maml", seed, "finn", "adam") for seed in (0, 1)),
        *(("reptile", seed, "reptile", "sgd") for _ in (5, None) for seed in (0, 1)),
        ("maml", 0, "reptile", "adam"),
    ]
    assert [c.config["algorithm"]["inner_batch"] for c in found[2:6]] == [5, 5, None, None]
    last = found[-1].config
    assert last["optimizer"]["betas"] == [0.5, 0.9] and last["logger"]["group"] == "a b, c=1"
    assert {(c.config["trainer"]["max_steps"], c.config["backbone"]["name"]) for c in found} == {(7, "mlp_reptile")}
    assert "grid" not in last


def test_the_group_of_an_experiments_cells_is_its_name_and_names_nothing(conf):
    conf("experiment/p/y", "# @package _global_\ngrid: [{seed: [4]}]\n")
    dirs = conf("experiment/p/z", "# @package _global_\nseed: 4\nlogger: {group: mine}\n")
    plain = one(SINE, "seed=4")
    cases = {
        ("experiment=p/y",): "p/y",
        ("experiment=p/y", "logger.group=own"): "own",
        ("experiment=p/z",): "mine",
        ("experiment=null", "seed=4"): None,
    }
    for more, group in cases.items():
        cell = one(SINE, *more, config_dirs=dirs)
        assert (cell.cell_id, cell.config["logger"]["group"]) == (plain.cell_id, group)


def test_the_command_line_beats_a_grid(conf):
    dirs = conf("experiment/p/x", GRID)
    assert values(expand(["experiment=p/x", "seed=5"], dirs), "seed") == [(5,)] * 4
    only = expand(["experiment=p/x", "algorithm=maml"], dirs)
    assert values(only, "algorithm.name", "seed", "dataset.variant") == [
        ("maml", 0, "finn"), ("maml", 1, "finn"), ("maml", 0, "reptile")
    ]  # fmt: skip
    assert values(expand(["experiment=p/x", "trainer.max_steps=9", "seed=0"], dirs)[:1], "trainer.max_steps") == [(9,)]


BLOCKS = """# @package _global_
defaults:
  - override /dataset: sinusoid
grid:
  - {algorithm: [maml, anil], dataset.shot: [5, 10], seed: [0, 1]}
  - {algorithm: [reptile], algorithm.alpha: [0.05], dataset.test_shot: [5], seed: [0, 1]}
  - {algorithm: [reptile], algorithm.alpha: [0.02], dataset.test_shot: [10], seed: [0, 1]}
"""


def test_the_command_line_narrows_a_grid_to_the_products_that_list_its_values(conf):
    """Neither MAML with Reptile's rate, nor one shot with what the grid sets for another."""
    dirs = conf("experiment/p/x", BLOCKS)
    shown = ("algorithm.name", "algorithm.alpha", "dataset.shot", "dataset.test_shot", "seed")

    def cells_of(*arguments):
        return values(expand(["experiment=p/x", *arguments], dirs), *shown)

    reptile = [("reptile", 0.05, 10, 5), ("reptile", 0.02, 10, 10)]
    assert cells_of("algorithm=maml", "seed=1") == [("maml", 0.01, 5, None, 1), ("maml", 0.01, 10, None, 1)]
    assert cells_of("algorithm=reptile,anil", "dataset.shot=5", "seed=3") == [
        ("anil", 0.01, 5, None, 3), *((*r[:2], 5, r[3], 3) for r in reptile)
    ]  # fmt: skip
    assert cells_of("algorithm=reptile", "dataset.test_shot=10", "seed=1,2") == [(*reptile[1], 1), (*reptile[1], 2)]
    for arguments in (["algorithm=fomaml"], ["algorithm=reptile", "algorithm.alpha=0.05", "dataset.test_shot=10"]):
        found = cells_of(*arguments, "seed=0")  # in no product: in place of all that is there
        assert len(found) == len(set(found)) >= 2 and {f[0] for f in found} == {arguments[0].split("=")[1]}


def test_experiments_multiply_and_refuse_what_is_wrong_in_them(conf):
    conf("experiment/a", "# @package _global_\nseed: 4\n")
    dirs = conf("experiment/b", "# @package _global_\ngrid: [{seed: [5, 4]}]\n")
    assert values(expand([SINE, "experiment=a,b"], dirs), "seed") == [(4,), (5,)]
    conf("experiment/c", "# @package _global_\ngrid: {seed: [5, 4]}\n")
    with pytest.raises(BadInput, match="experiment=c: its grid must be a list"):
        expand([SINE, "experiment=c"], dirs)
    conf("experiment/d", "# @package _global_\ngrid: [{algorithm.alpah: [5, 4]}]\n")
    with pytest.raises(BadInput, match="algorithm.alpah: .*did you mean 'algorithm.alpha'"):
        expand([SINE, "experiment=d"], dirs)


def test_a_users_folder_adds_members_and_departures(conf):
    conf("algorithm/mine", "defaults: [/schema/algorithm/maml@_here_, _self_]\nname: mine\nalpha: 0.125\n")
    dirs = conf("dataset_algorithm/sinusoid_mine", "# @package _global_\ntrainer: {max_steps: 3}\n")
    for more, folders in (([], dirs), ([f"hydra.searchpath=['file://{dirs[0]}']"], [])):
        cell = one(SINE, "algorithm=mine", "backbone=mlp", *more, config_dirs=folders)
        assert (cell.config["algorithm"]["alpha"], cell.config["trainer"]["max_steps"]) == (0.125, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["algorithm=protonet", "+dataset.way=7", "++seed=3"],
        [SINE, "algorithm=maml,reptile", "algorithm.inner_batch=5,null", "evaluation.bn_modes=[running]"],
        [
            SINE,
            "algorithm.alpha=${seed}",
            "logger.group='a, b=c'",
            "logger.tags=[x,'y z']",
            "optimizer.betas=[0.5,0.9]",
        ],
    ],
)
def test_hydra_composes_the_same_cell_from_its_overrides(arguments):
    """What a launcher's job computes from `Cell.overrides` is the cell that was meant."""
    for cell in expand(arguments):
        with composing.composer([]):
            job = from_composed(compose("config", overrides=list(cell.overrides)))
        assert (job.cell_id, job.config) == (cell.cell_id, cell.config)


# ---- names -------------------------------------------------------------------------------------------------------


SCHEMAS = [("", Run), *((g, s) for g, found in MEMBERS.items() for s in found.values()), *SINGLE.items()]
FIELDS = [(group, schema, field) for group, schema in SCHEMAS for field in fields_of(schema).values()]
DECLARED = [found for found in FIELDS if not found[2].key.sections]  # sections within sections: test_mixture


@functools.cache
def plain_run() -> dict:
    return one(SINE).config


def run_with(group: str, schema: type, /, **changes) -> dict:
    """A run's configuration in which this schema has its defaults, or what is given."""
    section = {field.name: field.default for field in fields_of(schema).values()} | changes
    config = plain_run()
    return config | ({group: config.get(group, {}) | section | _target(schema)} if group else section)


def _target(schema: type) -> dict:
    return {"_target_": schema.target} if hasattr(schema, "target") else {}


def other(field):
    """A value different from the default."""
    if field.key.choices:
        choices = [c for c in field.key.choices if c != field.default]
        return choices[:1] if isinstance(field.default, list) else [*choices, "another"][0]
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, int | float):
        return field.default + 1
    return [7, *field.default] if isinstance(field.default, list) else "another"


@pytest.mark.parametrize(
    ("group", "schema", "field"), DECLARED, ids=lambda v: getattr(v, "__name__", getattr(v, "name", v))
)
def test_every_key_enters_the_names_that_it_touches(group, schema, field):
    """`train` keys both ids, `test` keys the cell's alone, `none` keys and paths neither; defaults are left out."""
    before = identity(run_with(group, schema), "data")
    after = identity(run_with(group, schema, **{field.name: other(field)}), "data")
    touches = "none" if field.name == "root" else field.key.touches
    assert (before[0] != after[0], before[1] != after[1]) == (touches == "train", touches == "test")
    path = f"{group}.{field.name}".lstrip(".")
    assert path not in before[0] | before[1]
    assert (path in after[0] | after[1]) == (touches != "none")


def test_ids_follow_what_keys_touch():
    train, cell = ids(SINE)
    assert len(train) == len(cell) == 12 and int(train, 16) != int(cell, 16)
    free = ["logger=none", "trainer.threads=3", "output_dir=x", "rerun=true", "algorithm.name=x", "trainer.chunk_mib=1"]
    assert ids(SINE, *free) == (train, cell)
    tests = [
        "trainer.test_episodes=7",
        "evaluation.steps=all",
        "evaluation.checkpoint=last",
        "evaluation.bn_modes=[batch]",
    ]
    found = [ids(SINE, k) for k in tests]
    assert {t for t, _ in found} == {train} and len({cell, *(c for _, c in found)}) == 1 + len(tests)
    trains = ["seed=1", "algorithm.alpha=1", "dataset.seed=1", "evaluation.seed=1", "evaluation.bn_modes=[running]"]
    found = [ids(SINE, k) for k in trains]
    assert len({train, *(t for t, _ in found)}) == len({cell, *(c for _, c in found)}) == 1 + len(trains)


def test_defaults_said_aloud_change_no_id():
    defaults = ["optimizer.lr=0.001", "algorithm.first_order=false", "dataset.shot=10", "trainer.test_episodes=600"]
    spelt = ["backbone=mlp_sine", "backbone.hidden=[40,40]", "evaluation.bn_modes=[batch,support_plus_one]", "seed=0.0"]
    assert ids(SINE, *defaults, *spelt, "dataset_algorithm=sinusoid_maml") == ids(SINE)


@pytest.fixture
def extended(monkeypatch):
    """MAML with one more key, as a later version might have it."""

    def extend(default):
        made = dataclasses.make_dataclass("MAML", [("extra", int, key(default, "new"))], bases=(MAML,))
        monkeypatch.setitem(MEMBERS["algorithm"], MAML.target, made)
        compose_anew()

    def compose_anew():
        register.cache_clear()
        register()
        composing.forget()

    yield extend
    monkeypatch.undo()
    compose_anew()


def test_a_new_key_orphans_no_result(extended):
    before = ids(SINE)
    extended(3)
    assert one(SINE).config["algorithm"]["extra"] == 3
    assert ids(SINE) == ids(SINE, "algorithm.extra=3") == before
    assert ids(SINE, "algorithm.extra=4") != before


@pytest.mark.parametrize(("group", "schema"), SCHEMAS, ids=lambda v: getattr(v, "__name__", v))
def test_a_raised_epoch_renames(group, schema, monkeypatch):
    before = identity(run_with(group, schema), "data")
    monkeypatch.setattr(schema, "epoch", schema.epoch + 1)
    assert identity(run_with(group, schema), "data")[0] != before[0]


def test_one_algorithm_by_two_names_is_one_cell():
    assert ids(SINE, "algorithm=fomaml") == ids(SINE, "algorithm=maml", "algorithm.first_order=true")
    assert ids(SINE, "algorithm=anil") == ids(SINE, "algorithm.adapted=head") != ids(SINE)
    assert len(expand([SINE, "algorithm=maml,fomaml", "algorithm.first_order=true,false"])) == 2


def test_contents_name_a_data_set_wherever_it_lies(monkeypatch, tmp_path):
    tiny_omniglot.pretend(monkeypatch)
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    places = {
        "zip": tiny_omniglot.archives(tmp_path / "zip"),
        "tree": tiny_omniglot.tree(tmp_path / "tree"),
        "changed": tiny_omniglot.tree(tmp_path / "changed", changed=True),
    }
    found = {p: one("dataset=omniglot", f"dataset.root={d}", "dataset.checksum=off") for p, d in places.items()}
    assert found["zip"].cell_id == found["tree"].cell_id
    assert found["zip"].train_id == found["tree"].train_id != found["changed"].train_id
    assert found["zip"].data_hash == found["tree"].data_hash != found["changed"].data_hash


# ---- bad input ---------------------------------------------------------------------------------------------------

REFUSED = [
    ("algorithm.alpa=1", "algorithm.alpa", "did you mean 'algorithm.alpha'"),
    ("sed=1", "sed", "did you mean 'seed'"),
    ("lr=1", "lr", "did you mean 'optimizer.lr'"),
    ("algoritm=maml", "algoritm", "did you mean 'algorithm'"),
    ("trainr.max_steps=1", "trainr.max_steps", "did you mean 'trainer'"),
    ("algorithm.m=3", "algorithm.m", "no such key for algorithm=maml"),
    ("+algorithm.extra=1", "algorithm.extra", "no such key for algorithm=maml"),
    ("++trainer.extra=1", "trainer.extra", "no such key"),
    ("+extra=1", "extra", "no such key"),
    ("algorithm=reptle", "algorithm=reptle", "did you mean 'reptile'"),
    ("algorithm=", "algorithm=", "no such algorithm"),
    ("experiment=tsa/fig99", "experiment=tsa/fig99", "no such experiment"),
    ("dataset_algorithm=omniglot_mam", "omniglot_mam", "did you mean 'omniglot_maml'"),
    ("dataset_algorithm=glyphs_reptile", "algorithm.inner_batch", "did you mean 'algorithm.minibatch'"),
    ("algorithm@other=maml", "algorithm@other=maml", "(@)"),
    ("algorithm/other=maml", "algorithm/other", "did you mean 'algorithm'"),
    ("~algorithm.alpha", "~algorithm.alpha", "cannot be deleted"),
    ("~algorithm", "~algorithm", "cannot be deleted"),
    ("algorithm", "'algorithm'", "not key=value"),
    ("=3", "'=3'", "not key=value"),
    ("algorithm.alpha==3", "algorithm.alpha==3", "cannot be read"),
    ("algorithm.alpha=abc", "algorithm.alpha=abc", "a finite number (>= 0)"),
    ("algorithm.alpha=-1", "algorithm.alpha=-1", ">= 0, auto or online"),
    ("algorithm.alpha=onlin", "algorithm.alpha=onlin", "(>= 0), auto or online; did you mean 'online'"),
    ("algorithm.alpha=Auto", "algorithm.alpha=Auto", "(>= 0), auto or online; did you mean 'auto'"),
    ("algorithm.alpha=null", "algorithm.alpha=null", "a finite number"),
    ("algorithm.alpha=nan", "algorithm.alpha=nan", "a finite number"),
    ("algorithm.alpha=inf", "algorithm.alpha=inf", "a finite number"),
    ("algorithm.alpha=1" + "0" * 400, "algorithm.alpha=10", "a finite number"),
    ("algorithm.alpha=true", "algorithm.alpha=true", "a finite number"),
    ("algorithm.alpha={a:1}", "algorithm.alpha={", "a finite number"),
    ("algorithm.alpha=${nothing}", "algorithm.alpha", "nothing"),
    ("algorithm.alpha.x=1", "algorithm.alpha.x", "did you mean 'algorithm.alpha'"),
    ("seed=1.5", "seed=1.5", "a whole number (>= 0 and < 2147483648)"),
    ("seed=2147483648", "seed=2147483648", "< 2147483648"),
    ("seed=null", "seed=null", "a whole number"),
    ("seed=interval(0,1)", "seed=interval(0,1)", "only lists of choices and ranges"),
    ("seed=glob(*)", "seed=glob(*)", "only lists of choices and ranges"),
    ("seed=range(0,1,0)", "seed=range(0,1,0)", "must not be zero"),
    ("seed=range(0,1,0.0)", "seed=range(0,1,0.0)", "Invalid range"),
    ("seed=range(1e9)", "seed=range(1e9)", "10000 values"),
    ("seed=range(3,3)", "seed=range(3,3)", "1 to 10000 values"),
    ("algorithm.first_order=1", "algorithm.first_order=1", "true or false"),
    ("optimizer.clip_norm=0", "optimizer.clip_norm=0", "> 0"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]", "2 values"),
    ("optimizer.betas=[0.9,1]", "optimizer.betas=[0.9,1]", "< 1"),
    ("optimizer.betas=0.9", "optimizer.betas=0.9", "a list"),
    ("backbone.readout=flaten", "backbone.readout=flaten", "one of flatten, mean; did you mean 'flatten'"),
    ("trainer.precision=16", "trainer.precision=16", "one of 32, 64"),
    ("output_dir=null", "output_dir=null", "a text"),
    ("evaluation.bn_modes=[]", "evaluation.bn_modes=[]", "at least one mode"),
    ("evaluation.bn_modes=[batch,batch]", "evaluation.bn_modes=[batch,batch]", "none twice"),
    ("evaluation.bn_modes=[batch,runing]", "[batch,runing]", "did you mean 'running'"),
    ("trainer.devices=3", "trainer.devices=3", "must divide trainer.meta_batch_size=16"),
    ("trainer.devices=4 trainer.val_episodes=3", "trainer.val_episodes=3", ">= trainer.devices=4"),
    ("dataset.way=900", "dataset.way=900", "<= 847"),
    ("dataset.test_way=5 dataset.way=142", "dataset.way=142", "head"),
    ("dataset.way=142", "dataset.way=142", "<= 141, the classes of split 'val'"),
    ("dataset.queries=20", "dataset.queries = 21", "<= 20"),
    ("dataset.test_shot=6", "dataset.test_shot + dataset.test_queries = 21", "<= 20"),
    ("dataset.test_way=4", "dataset.test_way=4", "dataset.way=5"),
    ("algorithm=null", "algorithm=null", "no such algorithm"),
    ("dataset=omniglot", "dataset.root", "required"),
    ("dataset=omniglot dataset.root=/nowhere", "/nowhere", "dataset.download=true"),
    ("dataset=sinusoid algorithm=matchingnet", "algorithm=matchingnet", "only for classification"),
    ("dataset=sinusoid backbone=conv4", "backbone=conv4", "use mlp_sine"),
    ("dataset=sinusoid algorithm.inner_loss_reduction=sum_over_shots", "=sum_over_shots", "use mean"),
    ("algorithm._target_=os.system", "algorithm._target_=os.system", "metalearn.algorithms.MAML"),
    ("algorithm._target_=[1]", "algorithm._target_=[1]", "metalearn.algorithms.MAML"),
    ("dataset=sinusoid algorithm=reptile algorithm.serial=true trainer.devices=5", "trainer.devices=5", "must be 1"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "named", "said"), REFUSED, ids=[r[0][:60] for r in REFUSED])
def test_bad_input_is_refused_by_key_value_and_bound(arguments, named, said):
    with pytest.raises(BadInput) as error:
        expand(arguments.split())
    message = str(error.value)
    assert named in message and said in message and len(message.splitlines()) <= 3


def test_more_classes_than_a_small_set_has(monkeypatch):
    """20 ways from 16 classes; the message names the key that was given."""
    sizes = {"train": (16, 20), "val": (20, 20), "test": (20, 20)}
    monkeypatch.setattr(MEMBERS["dataset"]["metalearn.datasets.glyphs.Glyphs"], "capacity", lambda dataset: sizes)
    with pytest.raises(BadInput, match=r"dataset.way=20: must be <= 16, the classes of split 'train'"):
        expand(["dataset.way=20"])


NAMES = [f"{g}.{f.name}".lstrip(".") for g, _, f in DECLARED] + list(composing.CHOICES)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
PIECES = st.lists(
    st.sampled_from(
        [*"[]{}(),:=~@$'\"\\ .-+#*/", "${", "}", "null", "true", "nan", "1e9", "0", "-1", "range(", "oc.env:"]
    ),
    max_size=6,
).map("".join)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(NAMES) | TEXT, value=TEXT | PIECES | st.integers().map(str) | st.floats().map(str))
def test_any_text_is_understood_or_refused(name, value):
    """One `key=value` of any text gives cells, or a BadInput of at most three lines."""
    try:
        assert expand([f"{name}={value}"])
    except BadInput as error:
        assert 0 < len(str(error).splitlines()) <= 3


def test_a_changed_file_is_read_again(conf, monkeypatch):
    """Compositions are kept from call to call, for as long as no yaml file is other than it was."""
    folders = conf("experiment/mine", "# @package _global_\nseed: 3\n")
    assert one(SINE, "experiment=mine", config_dirs=folders).config["seed"] == 3
    made = []
    monkeypatch.setattr(composing, "compose", lambda *a, **k: made.append(a) or compose(*a, **k))
    assert one(SINE, "experiment=mine", config_dirs=folders).config["seed"] == 3 and not made
    conf("experiment/mine", "# @package _global_\nseed: 45\n")
    assert one(SINE, "experiment=mine", config_dirs=folders).config["seed"] == 45 and made
    Path(folders[0], "experiment", "mine.yaml").unlink()
    with pytest.raises(BadInput, match="experiment=mine: no such experiment"):
        one(SINE, "experiment=mine", config_dirs=folders)


def test_hydra_is_left_as_it_was():
    with composing.initialize_config_dir(composing.conf_dir(), version_base="1.3"):
        before = composing.GlobalHydra.instance().hydra
        expand([SINE])
        assert composing.GlobalHydra.instance().hydra is before
